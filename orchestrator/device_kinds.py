"""Known devices: memory, speed and links, with sources. Imports no torch.

Vendors print peaks, and no training reaches them. `UTILISATION` is the one assumption that turns a peak into a speed;
docs/plan.md compares it with the paper's runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

GB, GIB = 10**9, 2**30

UTILISATION = 0.35
"""Fraction of a TPU's peak that a step reaches, second forward passes included.

PaLM, counted in the same way, reached 0.58 on TPU v4, with matrices 24 times as wide as a Base tower's (arXiv
2204.02311, section 4.1). The paper's runs on TPU v4 check it (benchmarks/plan.py)."""
GPU_UTILISATION = 0.25
"""Fraction of a GPU's peak that a step reaches.

Base towers on an H100 reached 0.22 to 0.28 (benchmarks/results/2026-11-26-gpu.json). No other kind was measured."""
COMPILED = 1.2
"""Speedup of a step on a GPU by train.compile_blocks: 1.21 and 1.27 in that file."""


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device.

    Attributes:
        name: as cluster.device names it.
        accelerators: the values of cluster.accelerator that run on it.
        memory: bytes of one device.
        peaks: FLOP/s of dense matrix products, by train.precision.
        utilisation: fraction of the peak that a step reaches.
        framework: bytes that a process holds on the device before the first tensor.
        ring_bytes_per_s: bandwidth of one device on a ring inside an island, both directions together.
        island: number of devices with such links.
        network_bytes_per_s: bandwidth of one device to another island.
        per_host: devices of one training worker if the config names no number.
        source: of the figures.
    """

    name: str
    accelerators: tuple[str, ...]
    memory: float
    peaks: dict[str, float]
    utilisation: float
    framework: float
    ring_bytes_per_s: float
    island: int
    network_bytes_per_s: float
    per_host: int
    source: str

    def link(self, num_devices: int) -> float:
        """Return the bytes per second that a device can send on a ring of all."""
        return self.ring_bytes_per_s if num_devices <= self.island else self.network_bytes_per_s


def _kind(
    name: str,
    memory: float,
    tflops: tuple[float, float, float],
    link_gb_s: float,
    island: int,
    per_host: int,
    network_gb_s: float,
    page: str,
) -> DeviceKind:
    is_tpu = name.startswith("tpu")
    sources = (
        f"nvidia.com/en-us/data-center/{page}, without sparsity; half of the bidirectional link rate",
        f"cloud.google.com/tpu/docs/{page}; links: jax-ml.github.io/scaling-book/tpus, one axis, both ways",
    )
    return DeviceKind(
        name,
        ("tpu",) if is_tpu else ("cuda",),
        memory,
        peaks={precision: value * 1e12 for precision, value in zip(("bf16", "tf32", "fp32"), tflops, strict=True)},
        utilisation=UTILISATION if is_tpu else GPU_UTILISATION,
        framework=(0.5 if is_tpu else 1.5) * GIB,  # GPU: context, cuBLAS and nccl
        ring_bytes_per_s=link_gb_s * GB,
        island=island,
        network_bytes_per_s=network_gb_s * GB,
        per_host=per_host,
        source=sources[is_tpu],
    )


# Memory is decimal if the vendor says GB and binary if it says GiB. GPUs are the SXM variants, in hosts of eight. Each
# has a network card of 200 (A100) or 400 Gbit/s (H100, H200), as in the vendor's own DGX. L4s are linked by PCIe.
# TFLOP/s are of bf16, tf32 and fp32. XLA computes float32 products in bfloat16 passes: one at its default precision
# (tf32 here), six at the highest.
DEVICES = {
    kind.name: kind
    for kind in (
        _kind("tpu-v4", 32 * GIB, (275, 275, 275 / 6), 90, 4096, 4, 6.25, "v4"),
        _kind("tpu-v5e", 16 * GB, (197, 197, 197 / 6), 90, 256, 8, 3.125, "v5e"),
        _kind("tpu-v5p", 95 * GIB, (459, 459, 459 / 6), 180, 8960, 4, 6.25, "v5p"),
        _kind("tpu-v6e", 32 * GB, (918, 918, 918 / 6), 180, 256, 8, 12.5, "v6e"),
        _kind("a100-40", 40 * GB, (312, 156, 19.5), 300, 8, 1, 25, "a100"),
        _kind("a100-80", 80 * GB, (312, 156, 19.5), 300, 8, 1, 25, "a100"),
        _kind("h100", 80 * GB, (989, 494, 67), 450, 8, 1, 50, "h100"),
        _kind("h200", 141 * GB, (989, 494, 67), 450, 8, 1, 50, "h200"),
        _kind("l4", 24 * GB, (121, 60, 30.3), 32, 8, 1, 1.5, "l4"),
    )
}
CPU = "cpu"
"""The name of this machine, which `this_machine.py` measures."""


def _known(name: str) -> str:
    if name not in DEVICES:
        raise ValueError(f"no device {name!r} is known: {', '.join(DEVICES)}")
    return name


DeviceName = Annotated[str, AfterValidator(_known)]
