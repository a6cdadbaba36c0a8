"""How a worker group comes up on each accelerator. With `workers/device.py` the only place that knows them.

CUDA workers are Ray Train's own: TorchConfig with nccl. CPU and TPU workers have `GlooConfig`, ours: Ray 2.60 has a
torch-xla backend for another accelerator only, its own TPU path wants torch_tpu, the young successor of torch-xla that
shares no environment with it, and TorchConfig makes Ray's controller import torch, 2 s before any worker is started.
torch_tpu's door is here: another `Backend` beside `_GlooBackend`.
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

_PROCESS_GROUP_TIMEOUT_S = 1800
_START_ERROR = "SIGRAY_START_ERROR"
_SLICE_LABEL, _WORKER_ID_LABEL = "ray.io/tpu-slice-name", "ray.io/tpu-worker-id"


def backend_config(cluster: ClusterConfig) -> BackendConfig:
    """Ray Train's process-group set-up: nccl between GPUs, gloo between all others."""
    if cluster.accelerator != "cuda":
        return GlooConfig()
    from ray.train.torch import TorchConfig

    return TorchConfig(backend="nccl")


def scaling_config(cluster: ClusterConfig, num_workers: int) -> ScalingConfig:
    """How Ray Train places a worker group; hosts of a TPU slice are reserved together."""
    import ray.train

    reserves_slices = cluster.tpu_type is not None
    slices = {"topology": cluster.tpu_topology, "accelerator_type": cluster.tpu_type} if reserves_slices else {}
    config: Any = ray.train.ScalingConfig  # mypy sees that of Ray Train v1
    return config(
        num_workers=num_workers,
        use_gpu=cluster.accelerator == "cuda",
        use_tpu=reserves_slices or cluster.accelerator == "tpu",
        resources_per_worker=worker_resources(cluster),
        **slices,
    )


@dataclass
class GlooConfig(BackendConfig):
    """Training workers on CPUs and under torch-xla, for which gloo is a control plane."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _GlooBackend


class _GlooBackend(Backend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Ranks by slice and TPU worker id: Ray's own world rank follows neither, and PJRT counts hosts by it.

        What fails here must not be raised here: Ray Train would not give back the placement group, and with it the
        slice, before the driver ends. `raise_start_error` raises it in the training workers.
        """
        import ray
        from ray.train._internal.utils import get_address_and_port

        try:
            places = worker_group.execute(_place)
            order = sorted(range(len(places)), key=lambda index: (places[index], index))
            host, port = worker_group.execute_single(order[0], get_address_and_port)
            starts = [
                worker_group.execute_single_async(index, _start, rank, len(order), f"tcp://{host}:{port}")
                for rank, index in enumerate(order)
            ]
            ray.get(starts)
        except Exception as error:
            # Without Ray's words around it, which name processes: what comes twice must sound the same.
            error = getattr(error, "cause", None) or error
            worker_group.execute(_remember_start_error, f"{type(error).__name__}: {error}")

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        worker_group.execute(_stop)


def raise_start_error() -> None:
    """Called by a training worker before anything else.

    Raises:
        RuntimeError: where the worker group did not come up.
    """
    if _START_ERROR in os.environ:
        raise RuntimeError(f"the training workers could not be connected: {os.environ.pop(_START_ERROR)}")


def _place() -> tuple[str, int]:
    """Slice and number in it of this worker's host; ("", 0) where it is no TPU.

    Raises:
        ValueError: for a number that is none.
    """
    import ray

    labels: Any = ray.get_runtime_context().get_node_labels()
    worker_id = str(labels.get(_WORKER_ID_LABEL, "0"))
    if not worker_id.isdecimal():
        raise ValueError(f"a host's label {_WORKER_ID_LABEL} is {worker_id!r}, a number expected")
    return labels.get(_SLICE_LABEL, ""), int(worker_id)


def _start(rank: int, world_size: int, address: str) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=address,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_PROCESS_GROUP_TIMEOUT_S),
    )


def _remember_start_error(message: str) -> None:
    os.environ[_START_ERROR] = message


def _stop() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
