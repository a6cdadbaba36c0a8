"""All differences between CPU, CUDA and TPU in a training worker.

The step and the loop use `Device`: one torch device per worker, run eagerly, with collectives over the workers.
`XlaDevice` does the same under torch-xla: a worker is a host with several devices. It records operations, and one
compiled program runs on all devices (GSPMD).

`orchestrator/run/backends.py` starts the process groups; no other file imports torch_xla or calls torch.cuda
(tests/test_layout.py). torch-xla 2.9 is its last release: a successor would change these two files.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sigray.losses import (
    Negatives,
    Slices,
    all_reduce_gradients,
    ring_sigmoid_loss,
    ring_softmax_loss,
    sharded_sigmoid_loss,
    sharded_softmax_loss,
)
from sigray.losses.spans import span
from sigray.workers.config import Accelerator, LossConfig, Precision
from sigray.workers.model.towers import named_parts, tower_blocks
from sigray.workers.sharding import gather

Features = tuple[Tensor, Tensor, Tensor, Tensor]
"""image_features, text_features, logit_scale, logit_bias of a worker.
The features are those of all rows; logit_scale is already exponentiated."""
LateChecks = list[Callable[[], None]]

_PORTABLE = 1  # cudaHostRegisterPortable
_MAX_QUEUED_COPIES = 3  # enough work for the device while the host launches the many small kernels of a text tower


@dataclass(frozen=True)
class Device:
    """The accelerator of one training worker, a CPU or a CUDA device.

    Attributes:
        torch_device: of modules and tensors.
        precision: of the towers and of the products of the loss.
        splits_weights: whether each device holds a part of weights, gradients and optimizer state.
    """

    torch_device: torch.device
    precision: Precision
    splits_weights: bool = False
    _copied: list[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = field(default_factory=list)
    _begun: list[torch.cuda.Event] = field(default_factory=list)
    _copy_stream: list[torch.cuda.Stream] = field(default_factory=list)

    @property
    def num_devices(self) -> int:
        """Number of devices that share this worker's part of a batch."""
        return 1

    @property
    def random_rank(self) -> int:
        """Number that separates the random draws of this worker's program from others."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def pins_memory(self) -> bool:
        return self.torch_device.type == "cuda"

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, with the weights of rank 0 on every rank."""
        module = module.to(self.torch_device)
        if dist.is_initialized():
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)
            if self.splits_weights:
                self._split(module)
        return module

    def _split(self, module: nn.Module) -> None:
        """Split the blocks of each part with FSDP2, then the rest of the part."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.torch_device.type, (dist.get_world_size(),))
        for _, part in named_parts(module):
            for block in tower_blocks(part):
                fully_shard(block, mesh=mesh)
            fully_shard(part, mesh=mesh)  # and not the module: `logit_scale` and `logit_bias` stay whole

    def split_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Split a new optimizer state as its weights; FSDP2 has done so already."""

    def page_lock(self, memory: mmap.mmap) -> bool:
        """Page-lock memory until it is freed; returns whether CUDA did it.

        Only if `pins_memory`. As torch's own `_pin_memory_utils`, for a thread that has not chosen a device yet.
        """
        runtime = torch.cuda.cudart()
        pointer = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with torch.cuda.device(self.torch_device):
            if int(runtime.cudaHostRegister(pointer, len(memory), _PORTABLE)):
                return False
        weakref.finalize(memory, runtime.cudaHostUnregister, pointer).atexit = False
        return True

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Copy tensors to the device, beside the computation if they are pinned.

        The source is held until its copy is done. The host waits here until the device has finished the work of all
        but the last `_MAX_QUEUED_COPIES` calls: one more call would hold another micro-batch in device memory.
        """
        if not self.pins_memory:
            return [tensor.to(self.torch_device) for tensor in tensors]
        current = torch.cuda.current_stream(self.torch_device)
        begun = torch.cuda.Event()
        begun.record(current)
        self._begun.append(begun)
        if len(self._begun) > _MAX_QUEUED_COPIES:
            self._begun.pop(0).synchronize()
        # On their own stream: the host runs ahead of the device, so the copy overlaps with the step before.
        if not self._copy_stream:
            self._copy_stream.append(torch.cuda.Stream(self.torch_device))
        (stream,) = self._copy_stream
        with torch.cuda.stream(stream):
            copies = [tensor.to(self.torch_device, non_blocking=True) for tensor in tensors]
            done = torch.cuda.Event()
            done.record()
        current.wait_stream(stream)
        for copy in copies:
            copy.record_stream(current)  # the copy stream allocated it, and must not reuse its memory too early
        # The loader writes to the memory of a released batch again as soon as no tensor views it.
        self._copied[:] = [pair for pair in self._copied if not pair[0].query()]
        self._copied.append((done, tensors))
        return copies

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """bf16 for the towers, if `train.precision` is bf16."""
        if self.precision == "bf16":
            return torch.autocast(self.torch_device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    @property
    def product_dtype(self) -> torch.dtype:
        """Data type of the features in the products of the loss; its sums are float32."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def seed(self, number: int) -> None:
        """Seed the random draws of dropout and patch dropout."""
        torch.manual_seed(number)

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function again in the backward pass, with equal random draws."""
        from torch.utils.checkpoint import checkpoint

        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    def lay_out(self, features: Tensor) -> Tensor:
        """(rows, D) from the towers -> the layout that `loss` takes."""
        return features

    def loss(
        self, features: Features, config: LossConfig, *, seed: int, micro_batch_size: int, late_checks: LateChecks
    ) -> Tensor:
        """The loss of this worker's pairs against the pairs of all workers.

        Its mean over workers is the loss of the global batch.

        Args:
            features: laid out, micro-batches one after another; the last two are scalars.
            config: which loss.
            seed: of random negatives, the same on all workers.
            micro_batch_size: rows of a micro-batch.
            late_checks: receives functions to call after the backward pass, which may raise NonFiniteFeatures.

        Raises:
            NonFiniteFeatures: on every rank, if the host looks for NaN at once (on CPU; never under XLA).
        """
        if config.name == "softmax":
            return ring_softmax_loss(*features, tile_size=config.tile_size, late_checks=late_checks)
        negatives = Negatives(config.negatives, config.negatives_fraction, seed)
        return ring_sigmoid_loss(*features, negatives=negatives, tile_size=config.tile_size, late_checks=late_checks)

    @property
    def settle(self) -> Callable[[], None] | None:
        """Compiles and computes recorded operations; None if nothing is recorded."""
        return None

    @property
    def settle_span(self) -> Callable[[], None] | None:
        """Waits for the operations of a profiled span; None if the host has or cannot."""
        if self.torch_device.type == "cuda":
            return lambda: torch.cuda.synchronize(self.torch_device)
        return None

    def compiler_report(self) -> str:
        """Counters of the compiler under this device; empty if there is none."""
        return ""

    def average_gradients(self, module: nn.Module) -> None:
        """Mean over ranks of every gradient, see `losses.all_reduce_gradients`."""
        all_reduce_gradients(module, all_reduce=self._all_reduce)

    def average(self, tensor: Tensor) -> Tensor:
        """The mean over ranks, in place."""
        if dist.is_initialized():
            self._all_reduce(tensor)
            tensor /= dist.get_world_size()
        return tensor

    def _all_reduce(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)

    def clip_gradients(self, module: nn.Module, max_norm: float) -> Tensor:
        """Scale all gradients to at most this norm; returns the norm before."""
        kinds: dict[bool, list[nn.Parameter]] = {}
        for parameter in module.parameters():
            kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
        norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds.values()]
        norm = torch.stack([gather(norm) for norm in norms]).norm() if len(norms) > 1 else gather(norms[0])
        for kind in kinds.values():
            nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
        return norm

    def optimizer_options(self) -> dict[str, Any]:
        """Options that choose the implementation of torch's optimizers."""
        return {"fused": True}

    def number(self, value: float) -> float | Tensor:
        """A number that changes from step to step, as operations take it."""
        return value

    def read(self, tensors: Sequence[Tensor]) -> list[float]:
        """Values of scalars on the device; the host waits for them."""
        return torch.stack(list(tensors)).tolist()

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Sum numbers of the host over the workers; the same on all of them."""
        if not dist.is_initialized():
            return list(values)
        device = "cpu" if self.torch_device.type == "xla" else self.torch_device  # gloo does not know XLA's tensors
        tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def check_collectives(self) -> None:
        """Sum known numbers over the other workers and devices.

        Some back ends return an unreduced tensor without an error (gloo on an XLA tensor, measured).

        Raises:
            RuntimeError: if a sum is wrong.
        """
        if not dist.is_initialized():
            return
        rank, world_size = dist.get_rank(), dist.get_world_size()
        probe = torch.full((3,), float(rank + 1), device=self.torch_device)
        self._all_reduce(probe)
        _check_sum(probe[0].item(), world_size * (world_size + 1) / 2, f"all_reduce over {world_size} ranks")

    def num_programs(self) -> int:
        """Programs compiled so far; 0 if none are, or if they are not counted."""
        return 0

    def peak_memory_gib(self) -> float:
        """Largest memory of this process: device memory on CUDA, resident set on CPU."""
        if self.torch_device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux

    def describe(self) -> str:
        if self.torch_device.type == "cuda":
            return torch.cuda.get_device_name(self.torch_device)
        return f"cpu, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


@dataclass(frozen=True)
class XlaDevice(Device):
    """All devices of one host or of a whole slice, as one torch-xla program.

    The first dimension of batches and features is split over `mesh`. If PJRT joins the hosts (a TPU slice), the program
    spans all of them, and its gradients are complete. If it does not (the CPU client knows one process only), each host
    has its own program. Then gloo adds the gradients in host memory.
    """

    mesh: Any = None  # of all devices of the program, one axis

    @property
    def num_devices(self) -> int:
        return self._program_devices // self._num_hosts

    @property
    def _program_devices(self) -> int:
        return int(self.mesh.size())

    @property
    def _num_hosts(self) -> int:
        """Number of hosts of the program."""
        import torch_xla.runtime

        return torch_xla.runtime.process_count()

    @property
    def random_rank(self) -> int:
        # Every host of a program must record the same one.
        return super().random_rank if self._num_hosts == 1 else 0

    @property
    def pins_memory(self) -> bool:
        return False

    def _mark(self, tensor: Tensor) -> Tensor:
        import torch_xla.distributed.spmd as spmd

        spmd.mark_sharding(tensor, self.mesh, ("data", *[None] * (tensor.ndim - 1)))
        return tensor

    def place(self, module: nn.Module) -> nn.Module:
        if dist.is_initialized():
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)  # on the host: gloo does not know XLA's tensors
        module = module.to(self.torch_device)
        if self.splits_weights:
            for parameter in module.parameters():
                self._spread(parameter)
        return module

    def _spread(self, tensor: Tensor) -> None:
        """Split the longest dimension that divides over the devices, if there is one."""
        import torch_xla.distributed.spmd as spmd

        sizes = [(size, -axis) for axis, size in enumerate(tensor.shape) if size % self._program_devices == 0]
        if sizes:
            axis = -max(sizes)[1]
            spmd.mark_sharding(tensor, self.mesh, tuple("data" if n == axis else None for n in range(tensor.ndim)))

    def split_state(self, optimizer: torch.optim.Optimizer) -> None:
        if self.splits_weights:
            for parameter, state in optimizer.state.items():
                for tensor in state.values():
                    if tensor.shape == parameter.shape:
                        self._spread(tensor)

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        import torch_xla.core.xla_model
        import torch_xla.distributed.spmd as spmd

        send: Any = torch_xla.core.xla_model.send_cpu_data_to_device
        # If the program has several hosts, each host brings its own rows.
        several = self._num_hosts > 1
        specs = [
            spmd.ShardingSpec(self.mesh, ("data", *[None] * (tensor.ndim - 1)), minibatch=several) for tensor in tensors
        ]
        return [send([tensor], self.torch_device, spec)[0] for tensor, spec in zip(tensors, specs, strict=True)]

    def seed(self, number: int) -> None:
        import torch_xla

        torch_xla.manual_seed(number)

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # torch's own checkpoint has no barrier: XLA would merge the two equal passes and keep the first result.
        from torch_xla.utils.checkpoint import checkpoint

        inputs = (*args, *kwargs.values())
        if not any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
            return function(*args, **kwargs)  # torch_xla's finds gradients of weights only if an input has one

        def run(*values: Any) -> Any:
            return function(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

        return checkpoint(run, *inputs)

    def lay_out(self, features: Tensor) -> Tensor:
        """(rows, D) -> (n, rows / n, D): one slice per device, as the batch was split."""
        return self._mark(features.view(self._program_devices, -1, features.shape[1]))

    def loss(
        self, features: Features, config: LossConfig, *, seed: int, micro_batch_size: int, late_checks: LateChecks
    ) -> Tensor:
        is_alone = self._num_hosts > 1 or not dist.is_initialized() or dist.get_world_size() == 1
        slices = Slices(self._program_devices, self._mark, self._settle, None if is_alone else dist.group.WORLD)
        if config.name == "softmax":
            return sharded_softmax_loss(*features, slices=slices, tile_size=config.tile_size)
        negatives = Negatives(config.negatives, config.negatives_fraction, seed)
        indices = None
        if negatives.keep == "random":
            indices = self._indices(features[0], micro_batch_size * self._num_hosts, slices.ranks.rank)
        return sharded_sigmoid_loss(
            *features, slices=slices, negatives=negatives, indices=indices, tile_size=config.tile_size
        )

    def _indices(self, features: Tensor, micro_batch_size: int, rank: int) -> Tensor:
        """(n, b) int32: row in the global batch of each place; micro-batches split singly."""
        count, num_pairs, _ = features.shape
        rows = torch.arange(count * num_pairs, dtype=torch.int32).view(-1, count, micro_batch_size // count)
        indices = rows.transpose(0, 1).reshape(count, num_pairs) + rank * count * num_pairs
        return self._mark(indices.to(self.torch_device))

    @property
    def settle(self) -> Callable[[], None] | None:
        return self._settle

    @staticmethod
    def _settle() -> None:
        import torch_xla

        with span("device program") as is_profiled:
            torch_xla.sync(wait=is_profiled)

    def compiler_report(self) -> str:
        from torch_xla.debug import metrics

        return metrics.metrics_report()

    def average_gradients(self, module: nn.Module) -> None:
        if self._num_hosts == 1:  # with more hosts, the program has summed over all of them
            super().average_gradients(module)

    def average(self, tensor: Tensor) -> Tensor:
        return super().average(tensor) if self._num_hosts == 1 else tensor

    def _all_reduce(self, tensor: Tensor) -> None:
        self._settle()
        host = tensor.cpu()
        dist.all_reduce(host)
        tensor.copy_(host.to(self.torch_device))

    def optimizer_options(self) -> dict[str, Any]:
        # Keeps the count of steps on the device: a host number would make every step another program.
        return {"foreach": False, "capturable": True}

    def number(self, value: float) -> float | Tensor:
        # Not a Python number: one that rounds to 1 would be a constant of another program.
        return torch.tensor(value, device=self.torch_device)

    def read(self, tensors: Sequence[Tensor]) -> list[float]:
        return [tensor.item() for tensor in tensors]

    def check_collectives(self) -> None:
        (probe,) = self.to_device(torch.arange(1.0, self.num_devices + 1))
        total = probe.sum()
        each = self.num_devices * (self.num_devices + 1) / 2
        self._settle()
        _check_sum(total.item(), each * self._num_hosts, f"a sum over {self._program_devices} XLA devices")
        if self._num_hosts == 1:
            super().check_collectives()

    def num_programs(self) -> int:
        from torch_xla.debug import metrics

        return metrics.counter_value("UncachedCompile") or 0

    def peak_memory_gib(self) -> float:
        import torch_xla.core.xla_model

        try:
            known: Any = torch_xla.core.xla_model.get_memory_info(self.torch_device)
        except RuntimeError:  # PJRT's CPU client has no counter
            return super().peak_memory_gib()
        return known["peak_bytes_used"] / 2**30

    def describe(self) -> str:
        import torch_xla.runtime

        kind = torch_xla.runtime.device_type()
        return f"torch-xla, {self.num_devices} {kind} device{'s' * (self.num_devices > 1)} each"


def open_device(
    accelerator: Accelerator,
    local_rank: int,
    precision: Precision,
    num_devices: int | None = None,
    *,
    splits_weights: bool = False,
) -> Device:
    """This worker's device.

    Args:
        local_rank: number of this worker on its machine.
        precision: tf32 and bf16 let CUDA and TPU round the inputs of float32 products, fp32 does not.
        num_devices: XLA devices of this worker; None: all that it sees.

    Raises:
        RuntimeError: if the config says cuda and this process sees no GPU, or if XLA devices are missing.
    """
    if accelerator in ("tpu", "xla_cpu"):
        return _open_xla(accelerator == "tpu", precision, num_devices, splits_weights)
    if accelerator == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("cluster.accelerator is cuda, but this training worker sees no GPU")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
        # If a worker sees only its own GPU, that is number 0 at any local rank.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return Device(device, precision, splits_weights)
    return Device(torch.device("cpu"), precision, splits_weights)


def _open_xla(is_tpu: bool, precision: Precision, num_devices: int | None, splits_weights: bool) -> XlaDevice:
    # torch_xla reads it when it is imported.
    os.environ["PJRT_DEVICE"] = "TPU" if is_tpu else "CPU"
    if not is_tpu and num_devices is not None:
        os.environ["CPU_NUM_DEVICES"] = str(num_devices)
    try:
        import torch_xla
    except ImportError as error:
        raise RuntimeError(f"cluster.accelerator needs torch-xla (pip install 'sigray[tpu]'): {error}") from error
    import numpy as np
    import torch_xla.backends
    import torch_xla.distributed.spmd as spmd
    import torch_xla.runtime

    torch_xla.runtime.use_spmd()
    # Before any backward pass: the first one makes torch count its devices.
    device = torch_xla.device()
    total, hosts = torch_xla.runtime.global_runtime_device_count(), torch_xla.runtime.process_count()
    if num_devices is not None and total != num_devices * hosts:
        raise RuntimeError(
            f"this training worker sees {total // hosts} XLA devices on its host, cluster.devices_per_worker is "
            f"{num_devices}: set it to the number of the hosts, or remove it"
        )
    if precision != "bf16":  # by default a TPU multiplies float32 in bfloat16
        torch_xla.backends.set_mat_mul_precision("highest" if precision == "fp32" else "high")
    return XlaDevice(device, precision, splits_weights, mesh=spmd.Mesh(np.arange(total), (total,), ("data",)))


def check_collectives(device: Device, batch_per_rank: int) -> None:
    """Check before the first step that sums over devices and ranks are right.

    Every rank must hold the same number of pairs: a ring of unequal chunks would hang.

    Raises:
        RuntimeError: if a sum is wrong, or the ranks hold different numbers of pairs.
        ValueError: if the devices of this worker cannot share its pairs evenly.
    """
    if batch_per_rank % device.num_devices:
        raise ValueError(
            f"{batch_per_rank} pairs per training worker do not divide over its {device.num_devices} devices: change "
            "train.global_batch_size"
        )
    device.check_collectives()
    if not dist.is_initialized():
        return
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total, squares = device.sum_over_ranks([batch_per_rank, batch_per_rank**2])
    if total != batch_per_rank * world_size or squares != batch_per_rank**2 * world_size:
        raise RuntimeError(f"rank {rank} holds {batch_per_rank} pairs per step, others hold another number")


def _check_sum(found: float, expected: float, what: str) -> None:
    if found != expected:
        raise RuntimeError(f"{what} is broken: {found} instead of {expected}")
