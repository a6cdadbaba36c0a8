"""This machine as a device: its memory, and its speed from a few matrix products."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

from sigray.orchestrator.device_kinds import CPU, GB, GIB, DeviceKind

_FRAMEWORK = 0.95 * GIB  # resident set of a training worker after its imports, measured (torch's CUDA build)
_UTILISATION = 0.5  # of the speed of a large product, see docs/plan.md
_RING_BYTES_PER_S = 1.0 * GB  # gloo over loopback; between hosts: 10 Gbit/s Ethernet


def this_cpu(num_workers: int, threads: int) -> DeviceKind:
    """Return this machine as the device of each of `num_workers` training workers.

    Times matrix products for a fifth of a second.

    Args:
        threads: of each training worker.
    """
    fp32, bf16 = (_product_speed(dtype, threads) for dtype in (torch.float32, torch.bfloat16))
    return DeviceKind(
        name=CPU,
        accelerators=("cpu", "xla_cpu"),
        memory=machine_memory() / num_workers,
        peaks={"bf16": bf16, "tf32": fp32, "fp32": fp32},
        utilisation=_UTILISATION,
        framework=_FRAMEWORK,
        ring_bytes_per_s=_RING_BYTES_PER_S,
        island=num_workers,
        network_bytes_per_s=_RING_BYTES_PER_S,
        per_host=1,
        source=f"products timed on this machine, {threads} thread{'s' * (threads > 1)} a worker",
    )


def machine_memory() -> int:
    """Return the bytes of this machine, or of the container around this process."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _product_speed(dtype: torch.dtype, threads: int) -> float:
    """Return the FLOP/s of products as a Base tower has them, the best of several."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.ones(1024, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)
        best = math.inf
        until = time.perf_counter() + 0.1
        while time.perf_counter() < until:
            begin = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)
    return 2 * 1024 * 768 * 768 / best
