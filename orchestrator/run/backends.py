"""Set up the process group of a worker group, for each accelerator.

Only this module and `workers/device.py` know the accelerators. CUDA workers use Ray Train's TorchConfig with nccl. CPU
and TPU workers use our `GlooConfig`, for three reasons. Ray 2.60 has a torch-xla backend for another accelerator only.
Ray's own TPU path needs torch_tpu, the young successor of torch-xla, which shares no environment with torch-xla. And
TorchConfig makes Ray's controller import torch, which delays the start of any worker by 2 s. Support for torch_tpu
would be another `Backend` beside `_GlooBackend`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ray.train.backend import Backend, BackendConfig

from sigray.orchestrator.config import ClusterConfig
from sigray.orchestrator.resources import worker_resources

if TYPE_CHECKING:
    from ray.train import ScalingConfig

_PROCESS_GROUP_TIMEOUT = timedelta(seconds=1800)
_START_ERROR = "SIGRAY_START_ERROR"
_SLICE_LABEL, _WORKER_ID_LABEL = "ray.io/tpu-slice-name", "ray.io/tpu-worker-id"


def backend_config(cluster: ClusterConfig) -> BackendConfig:
    """Return Ray Train's set-up of the process group: nccl for CUDA, else gloo."""
    if cluster.accelerator != "cuda":
        return GlooConfig()
    from ray.train.torch import TorchConfig

    return TorchConfig(backend="nccl")


def scaling_config(cluster: ClusterConfig, num_workers: int) -> ScalingConfig:
    """Return how Ray Train places a worker group; a TPU slice is reserved as a whole."""
    import ray.train

    config: Any = ray.train.ScalingConfig  # mypy sees the class of Ray Train v1
    return config(
        num_workers=num_workers,
        use_gpu=cluster.accelerator == "cuda",
        use_tpu=cluster.tpu_type is not None or cluster.accelerator == "tpu",
        resources_per_worker=worker_resources(cluster),
        topology=cluster.tpu_topology,
        accelerator_type=cluster.tpu_type,
    )


@dataclass
class GlooConfig(BackendConfig):
    """Gloo for workers on CPUs, and as the control plane of torch-xla workers."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _GlooBackend


class _GlooBackend(Backend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Start the process group, with ranks by slice and TPU worker id.

        PJRT counts hosts by TPU worker id, which Ray's own world rank does not follow.

        An error here must not be raised here: Ray Train would keep the placement group, and with it the slice, until
        the driver ends. `raise_start_error` raises the error in the training workers.
        """
        import ray
        from ray.train._internal.utils import get_address_and_port

        try:
            places = worker_group.execute(_place)
            order = sorted(range(len(places)), key=lambda index: (places[index], index))
            host, port = worker_group.execute_single(order[0], get_address_and_port)
            address = f"tcp://{host}:{port}"
            start = worker_group.execute_single_async
            ray.get([start(index, _start, rank, len(order), address) for rank, index in enumerate(order)])
        except Exception as error:
            # Without Ray's text, which names processes: a repeated error must have the same message.
            error = getattr(error, "cause", None) or error
            worker_group.execute(_remember_start_error, f"{type(error).__name__}: {error}")

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        worker_group.execute(_stop)


def raise_start_error() -> None:
    """Raise the error of the set-up, if any; a training worker calls this first.

    Raises:
        RuntimeError: if the process group could not be set up.
    """
    if _START_ERROR in os.environ:
        raise RuntimeError(f"the training workers could not be connected: {os.environ.pop(_START_ERROR)}")


def _place() -> tuple[str, int]:
    """Return slice and worker id of this worker's host; ("", 0) without a TPU.

    Raises:
        ValueError: if the worker id is not a number.
    """
    import ray

    labels: Any = ray.get_runtime_context().get_node_labels()
    worker_id = str(labels.get(_WORKER_ID_LABEL, "0"))
    if not worker_id.isdecimal():
        raise ValueError(f"a host's label {_WORKER_ID_LABEL} is {worker_id!r}, a number expected")
    return labels.get(_SLICE_LABEL, ""), int(worker_id)


def _start(rank: int, world_size: int, address: str) -> None:
    import torch.distributed as dist

    timeout = _PROCESS_GROUP_TIMEOUT
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size, timeout=timeout)


def _remember_start_error(message: str) -> None:
    os.environ[_START_ERROR] = message


def _stop() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
