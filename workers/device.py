"""What differs between CPU and CUDA inside a training worker, and nowhere else: device, autocast, copies, memory.

torch-xla joins here and in `orchestrator/backends.py`; nothing else of the training path names a device.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

Accelerator = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Device:
    """The accelerator of one training worker."""

    torch_device: torch.device
    precision: Literal["fp32", "bf16"]
    _copied: list[tuple[torch.cuda.Event, tuple[torch.Tensor, ...]]] = field(default_factory=list)

    @property
    def pins_memory(self) -> bool:
        return self.torch_device.type == "cuda"

    def to_device(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Copies that overlap with compute where the source is pinned; the source is held until its copy is done."""
        copies = [tensor.to(self.torch_device, non_blocking=True) for tensor in tensors]
        if self.pins_memory:
            # The feed writes into a batch's memory again once nobody holds it.
            self._copied[:] = [pair for pair in self._copied if not pair[0].query()]
            done = torch.cuda.Event()
            done.record()
            self._copied.append((done, tensors))
        return copies

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bf16 for the towers where the config says so."""
        if self.precision == "bf16":
            return torch.autocast(self.torch_device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    @property
    def product_dtype(self) -> torch.dtype:
        """Of the features that the loss multiplies with each other; its sums are float32 in any case."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def peak_memory_gib(self) -> float:
        """The most that this process has held: device memory on CUDA, resident set on CPU."""
        if self.torch_device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux

    def describe(self) -> str:
        if self.torch_device.type == "cuda":
            return torch.cuda.get_device_name(self.torch_device)
        return f"cpu, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def open_device(accelerator: Accelerator, local_rank: int, precision: Literal["fp32", "bf16"]) -> Device:
    """This worker's device.

    Raises:
        RuntimeError: where CUDA is asked for and this process sees no GPU.
    """
    if accelerator == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("cluster.accelerator is cuda, but this training worker sees no GPU")
        # Where a worker is shown its own GPU only, that is number 0 whatever its local rank.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return Device(device, precision)
    return Device(torch.device("cpu"), precision)


def check_collectives(device: Device, batch_per_rank: int) -> None:
    """Sum a known tensor over the ranks before the first step, and compare what must be equal on all of them.

    Some back ends return an unreduced tensor without a word (gloo on an XLA tensor, measured), and a ring of unequal
    chunks would hang.

    Raises:
        RuntimeError: where the sum is wrong or the ranks hold different numbers of pairs.
    """
    if not dist.is_initialized():
        return
    rank, world_size = dist.get_rank(), dist.get_world_size()
    probe = torch.tensor([float(rank + 1), batch_per_rank, batch_per_rank**2], device=device.torch_device)
    dist.all_reduce(probe)
    ranks, total, squares = probe.tolist()
    if ranks != world_size * (world_size + 1) / 2:
        raise RuntimeError(f"all_reduce over {world_size} ranks is broken: sum of ranks is {ranks}")
    if total != batch_per_rank * world_size or squares != batch_per_rank**2 * world_size:
        raise RuntimeError(f"rank {rank} holds {batch_per_rank} pairs per step, others hold another number")
