"""What differs between CPU, CUDA and TPU inside a training worker, and nowhere else.

`Device` is what the step and the loop talk to: one torch device per worker, run eagerly, with collectives over the
workers. `XlaDevice` is its twin under torch-xla: a worker is a host with several devices, operations are recorded and
compiled, and the devices share one program (GSPMD). `orchestrator/run/backends.py` brings the process groups up; no other
file imports torch_xla or calls torch.cuda (tests/test_layout.py). torch-xla 2.9 is its last release: its successor
would join here and there.
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
    ring_sigmoid_loss,
    ring_softmax_loss,
    sharded_sigmoid_loss,
    sharded_softmax_loss,
)
from sigray.losses.spans import span
from sigray.workers.config import Accelerator, LossConfig, Precision
from sigray.workers.model.towers import tower_blocks
from sigray.workers.sharding import gather

_PORTABLE = 1  # cudaHostRegisterPortable
_COPIES_AHEAD = 3  # the device must not run out of work while the host asks for the many small kernels of a text tower


@dataclass(frozen=True)
class Device:
    """The accelerator of one training worker, a CPU or a CUDA device.

    Attributes:
        torch_device: where modules and tensors go.
        precision: of the towers and of the products of the loss.
        splits_weights: whether weights, gradients and optimizer state lie in parts on all devices.
    """

    torch_device: torch.device
    precision: Precision
    splits_weights: bool = False
    _copied: list[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = field(default_factory=list)
    _asked_for: list[torch.cuda.Event] = field(default_factory=list)
    _copy_stream: list[torch.cuda.Stream] = field(default_factory=list)

    @property
    def num_devices(self) -> int:
        """How many devices share this worker's part of a batch."""
        return 1

    @property
    def random_rank(self) -> int:
        """What tells the random draws of this worker's program from those of others."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def pins_memory(self) -> bool:
        return self.torch_device.type == "cuda"

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module here, with the weights of rank 0 on every rank."""
        module = module.to(self.torch_device)
        if dist.is_initialized():
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)
            if self.splits_weights:
                self._split(module)
        return module

    def _split(self, module: nn.Module) -> None:
        """FSDP2: the blocks of both towers, then what is left of each; `logit_scale` and `logit_bias` stay whole."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.torch_device.type, (dist.get_world_size(),))
        for tower in (module.get_submodule("visual"), module.get_submodule("text")):
            for block in tower_blocks(tower):
                fully_shard(block, mesh=mesh)
            fully_shard(tower, mesh=mesh)

    def split_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimizer's state lie where its weights do, once it is made; FSDP2's does by itself."""

    def page_lock(self, memory: mmap.mmap) -> bool:
        """Page-lock memory for as long as it lives; returns whether CUDA did it. Only where `pins_memory`.

        As torch's own `_pin_memory_utils`, for a thread that has not chosen a device yet.
        """
        runtime, pointer = torch.cuda.cudart(), ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with torch.cuda.device(self.torch_device):
            if int(runtime.cudaHostRegister(pointer, len(memory), _PORTABLE)):
                return False
        weakref.finalize(memory, runtime.cudaHostUnregister, pointer).atexit = False
        return True

    def to_device(self, *tensors: Tensor) -> list[Tensor]:
        """Copies that overlap with what is computed where the source is pinned; it is held until its copy is done.

        The host waits here while the device has the work behind `_COPIES_AHEAD` earlier calls still before it: a call
        more would hold another micro-batch in the device's memory.
        """
        if not self.pins_memory:
            return [tensor.to(self.torch_device) for tensor in tensors]
        current = torch.cuda.current_stream(self.torch_device)
        begun = torch.cuda.Event()
        begun.record(current)
        self._asked_for.append(begun)
        if len(self._asked_for) > _COPIES_AHEAD:
            self._asked_for.pop(0).synchronize()
        # On a stream of their own: the host is ahead of the device, so the copy runs beside the step before.
        if not self._copy_stream:
            self._copy_stream.append(torch.cuda.Stream(self.torch_device))
        (stream,) = self._copy_stream
        with torch.cuda.stream(stream):
            copies = [tensor.to(self.torch_device, non_blocking=True) for tensor in tensors]
            done = torch.cuda.Event()
            done.record()
        current.wait_stream(stream)
        for copy in copies:
            copy.record_stream(current)  # its memory is the copy stream's, and must not be used again too early
        # The loader writes to the memory of a released batch again as soon as no tensor views it.
        self._copied[:] = [pair for pair in self._copied if not pair[0].query()]
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

    def seed(self, number: int) -> None:
        """Begin the random draws of dropout and patch dropout anew."""
        torch.manual_seed(number)

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function that keeps its arguments only, and is called again in the backward pass, with equal draws."""
        from torch.utils.checkpoint import checkpoint

        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    def lay_out(self, features: Tensor) -> Tensor:
        """(rows, D) as the towers give them -> what `loss` takes."""
        return features

    def loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        config: LossConfig,
        *,
        seed: int,
        micro_batch_size: int,
        late_checks: list[Callable[[], None]],
    ) -> Tensor:
        """The loss of this worker's pairs against those of all; its mean over workers is that of the global batch.

        Args:
            image_features, text_features: of all rows of this worker, laid out, micro-batches one after another.
            logit_scale, logit_bias: scalars; the scale already exponentiated.
            config: which loss.
            seed: of random negatives, the same on all workers.
            micro_batch_size: rows of one.
            late_checks: receives what may raise NonFiniteFeatures, to be called behind the backward pass.

        Raises:
            NonFiniteFeatures: on every rank, where the host looks for NaN at once (on CPU; never under XLA).
        """
        features = image_features, text_features, logit_scale, logit_bias
        if config.name == "softmax":
            return ring_softmax_loss(*features, tile_size=config.tile_size, late_checks=late_checks)
        negatives = Negatives(config.negatives, config.negatives_fraction, seed)
        return ring_sigmoid_loss(*features, negatives=negatives, tile_size=config.tile_size, late_checks=late_checks)

    @property
    def settle(self) -> Callable[[], None] | None:
        """Have what was recorded compiled and computed; None where operations run as they are called."""
        return None

    @property
    def settle_span(self) -> Callable[[], None] | None:
        """Wait until what a span of a profile asked for is computed; None where it is, or cannot be told apart."""
        if self.torch_device.type == "cuda":
            return lambda: torch.cuda.synchronize(self.torch_device)
        return None

    def compiler_report(self) -> str:
        """What the compiler under this device counts; empty where there is none."""
        return ""

    def average_gradients(self, module: nn.Module) -> None:
        """Mean over ranks of every gradient, in one all-reduce of one flat buffer.

        Not DistributedDataParallel: it regroups its buckets after the first step, so with three ranks or more a
        resumed run would add the same numbers in another order than the unbroken one, and the weights would part in
        the last bit.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        # FSDP2 has averaged those of split weights in the backward pass.
        gradients = [
            grad for p in module.parameters() if (grad := p.grad) is not None and not isinstance(grad, DTensor)
        ]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._all_reduce(flat)
        flat.div_(dist.get_world_size())
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _all_reduce(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)

    def clip_gradients(self, module: nn.Module, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most this; returns the norm before."""
        kinds: dict[bool, list[nn.Parameter]] = {}
        for parameter in module.parameters():
            kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
        norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds.values()]
        norm = torch.stack([gather(norm) for norm in norms]).norm() if len(norms) > 1 else gather(norms[0])
        for kind in kinds.values():
            nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
        return norm

    def optimizer_options(self) -> dict[str, Any]:
        """Which implementation of an optimizer of torch's to take."""
        return {"fused": True}

    def number(self, value: float) -> float | Tensor:
        """A number that changes from step to step, as operations take it."""
        return value

    def read(self, tensors: Sequence[Tensor]) -> list[float]:
        """Scalars that lie on the device; the host waits for them."""
        return torch.stack(list(tensors)).tolist()

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Numbers of the host, summed over the workers; the same on all of them."""
        if not dist.is_initialized():
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self._host_numbers)
        dist.all_reduce(tensor)
        return tensor.tolist()

    @property
    def _host_numbers(self) -> torch.device:
        """Where the process group takes numbers of the host."""
        return self.torch_device

    def check_collectives(self) -> None:
        """Sum known numbers over all that this worker computes with others.

        Some back ends return an unreduced tensor without a word (gloo on an XLA tensor, measured).

        Raises:
            RuntimeError: where a sum is wrong.
        """
        if not dist.is_initialized():
            return
        rank, world_size = dist.get_rank(), dist.get_world_size()
        probe = torch.full((3,), float(rank + 1), device=self.torch_device)
        self._all_reduce(probe)
        _check_sum(probe[0].item(), world_size * (world_size + 1) / 2, f"all_reduce over {world_size} ranks")

    def num_programs(self) -> int:
        """Programs compiled so far; 0 where nothing is compiled, or not counted."""
        return 0

    def peak_memory_gib(self) -> float:
        """The most that this process has held: device memory on CUDA, resident set on CPU."""
        if self.torch_device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux

    def describe(self) -> str:
        if self.torch_device.type == "cuda":
            return torch.cuda.get_device_name(self.torch_device)
        return f"cpu, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


@dataclass(frozen=True)
class XlaDevice(Device):
    """All devices of one host, or of all hosts of a slice, as one program under torch-xla.

    The first dimension of batches and features is split over `mesh`. Where PJRT joins the hosts (a TPU slice), the
    program spans all of them, and its gradients are complete. Where it does not (the CPU client knows one process
    only), each host has a program of its own, and the rest goes through gloo in the hosts' memory.

    Attributes:
        mesh: of all devices of the program, one axis.
    """

    mesh: Any = None

    @property
    def num_devices(self) -> int:
        return self._program_devices // self._num_hosts

    @property
    def _program_devices(self) -> int:
        return int(self.mesh.size())

    @property
    def _num_hosts(self) -> int:
        """Of the program."""
        import torch_xla.runtime

        return torch_xla.runtime.process_count()

    @property
    def random_rank(self) -> int:
        # Every host of a program must record the same one.
        return super().random_rank if self._num_hosts == 1 else 0

    @property
    def pins_memory(self) -> bool:
        return False

    @property
    def _slices(self) -> Slices:
        is_alone = self._num_hosts > 1 or not dist.is_initialized() or dist.get_world_size() == 1
        return Slices(self._program_devices, self._mark, self._settle, None if is_alone else dist.group.WORLD)

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
        """Split the longest dimension that divides over the devices; what has none stays whole."""
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
        # With several hosts in the program each of them brings its own rows.
        several = self._num_hosts > 1
        specs = [
            spmd.ShardingSpec(self.mesh, ("data", *[None] * (tensor.ndim - 1)), minibatch=several) for tensor in tensors
        ]
        return [send([tensor], self.torch_device, spec)[0] for tensor, spec in zip(tensors, specs, strict=True)]

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "bf16":
            return torch.autocast("xla", dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def seed(self, number: int) -> None:
        import torch_xla

        torch_xla.manual_seed(number)

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # torch's own has no barrier: XLA would find both passes equal, and keep the result of the first.
        from torch_xla.utils.checkpoint import checkpoint

        inputs = (*args, *kwargs.values())
        if not any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
            return function(*args, **kwargs)  # torch_xla's finds gradients of weights only behind one of an input

        def run(*values: Any) -> Any:
            return function(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

        return checkpoint(run, *inputs)

    def lay_out(self, features: Tensor) -> Tensor:
        """(rows, D) -> (n, rows / n, D): one slice on each device, where the batch put it."""
        return self._mark(features.view(self._program_devices, -1, features.shape[1]))

    def loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        config: LossConfig,
        *,
        seed: int,
        micro_batch_size: int,
        late_checks: list[Callable[[], None]],
    ) -> Tensor:
        features = image_features, text_features, logit_scale, logit_bias
        slices = self._slices
        if config.name == "softmax":
            return sharded_softmax_loss(*features, slices=slices, tile_size=config.tile_size)
        negatives = Negatives(config.negatives, config.negatives_fraction, seed)
        indices = None
        if negatives.keep == "random":
            indices = self._indices(image_features, micro_batch_size * self._num_hosts, slices.ranks.rank)
        return sharded_sigmoid_loss(
            *features, slices=slices, negatives=negatives, indices=indices, tile_size=config.tile_size
        )

    def _indices(self, features: Tensor, micro_batch_size: int, rank: int) -> Tensor:
        """(n, b) int32: the row of the global batch that stands at each place; every micro-batch is split anew."""
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
        if self._num_hosts == 1:  # else the program has summed over all of its hosts
            super().average_gradients(module)

    def _all_reduce(self, tensor: Tensor) -> None:
        self._settle()
        host = tensor.cpu()
        dist.all_reduce(host)
        tensor.copy_(host.to(self.torch_device))

    def optimizer_options(self) -> dict[str, Any]:
        # The count of steps on the device: as a number of the host it would make every step another program.
        return {"foreach": False, "capturable": True}

    def number(self, value: float) -> float | Tensor:
        # Not a number of Python's: one that rounds to 1 would be a constant of another program.
        return torch.tensor(value, device=self.torch_device)

    def read(self, tensors: Sequence[Tensor]) -> list[float]:
        return [tensor.item() for tensor in tensors]

    @property
    def _host_numbers(self) -> torch.device:
        return torch.device("cpu")

    def check_collectives(self) -> None:
        (probe,) = self.to_device(torch.arange(1.0, self.num_devices + 1))
        total, each = probe.sum(), self.num_devices * (self.num_devices + 1) / 2
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
        except RuntimeError:  # PJRT's CPU client does not count
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
        accelerator: of the config.
        local_rank: number of this worker on its machine.
        precision: tf32 and bf16 let CUDA and TPU round the inputs of float32 products, fp32 does not.
        num_devices: XLA devices of this worker; None: all that there are.
        splits_weights: see `Device`.

    Raises:
        RuntimeError: where CUDA is asked for and this process sees no GPU, or other XLA devices than expected.
    """
    if accelerator in ("tpu", "xla_cpu"):
        return _open_xla(accelerator == "tpu", precision, num_devices, splits_weights)
    if accelerator == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("cluster.accelerator is cuda, but this training worker sees no GPU")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
        # Where a worker is shown its own GPU only, that is number 0 whatever its local rank.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return Device(device, precision, splits_weights)
    return Device(torch.device("cpu"), precision, splits_weights)


def _open_xla(is_tpu: bool, precision: Precision, num_devices: int | None, splits_weights: bool) -> XlaDevice:
    # Read when torch_xla is imported, so before it is.
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
    # Before any backward pass: torch counts its devices at the first one.
    device = torch_xla.device()
    total, hosts = torch_xla.runtime.global_runtime_device_count(), torch_xla.runtime.process_count()
    if num_devices is not None and total != num_devices * hosts:
        raise RuntimeError(
            f"this training worker sees {total // hosts} XLA devices on its host, cluster.devices_per_worker is "
            f"{num_devices}: set it to what the hosts have, or leave it out"
        )
    if precision != "bf16":  # a TPU multiplies float32 in bfloat16 unless told otherwise
        torch_xla.backends.set_mat_mul_precision("highest" if precision == "fp32" else "high")
    return XlaDevice(device, precision, splits_weights, mesh=spmd.Mesh(np.arange(total), (total,), ("data",)))


def check_collectives(device: Device, batch_per_rank: int) -> None:
    """What must hold before the first step: sums over devices and ranks are right, every rank holds as many pairs.

    A ring of unequal chunks would hang.

    Raises:
        RuntimeError: where a sum is wrong or the ranks hold different numbers of pairs.
        ValueError: where the devices of this worker cannot share its pairs.
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
