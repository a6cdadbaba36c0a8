"""The data-shard workers of `sigray.stream`: Ray actors or processes."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import torch.distributed as dist

from sigray.workers.config import DataConfig
from sigray.workers.data.extras import Extras
from sigray.workers.data.loader import BlockSource
from sigray.workers.data.stream_arguments import from_rank_0, has_group

logger = logging.getLogger(__name__)
_LEAVE_S = 10.0


class Workers:
    """The data-shard workers as one rank uses them."""

    kind: Literal["actors", "processes"]
    blocks: BlockSource

    def forget(self) -> None:
        """Drop the requests of a loop that has ended."""

    def close(self) -> None:
        """End this rank's use."""


def start_workers(arguments: Any, seed: int, extras: Extras, world_size: int) -> Workers:
    """Return Ray actors if this process has joined a Ray, else processes."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return _Actors(arguments, seed, extras, world_size)
    return _Processes(arguments, seed, extras, world_size)


def _share(data: DataConfig, world_size: int) -> int:
    """Return how many data-shard workers a rank starts for itself."""
    num_workers = data.num_workers if isinstance(data.num_workers, int) else data.num_workers[-1]
    return -(-num_workers // world_size)


class _Processes(Workers):
    """A rank's share of the workers, as its own processes."""

    kind = "processes"

    def __init__(self, arguments: Any, seed: int, extras: Extras, world_size: int) -> None:
        from ray import cloudpickle  # by value what is defined in the user's script

        from sigray.workers.data.processes import ProcessBlocks

        data = arguments[1]
        try:
            content = cloudpickle.dumps((arguments, {"seed": seed, "extras": extras}))
        except Exception as error:
            raise ValueError(f"map={extras.map_name} cannot be sent to data-shard workers: {error}") from error
        self.blocks: ProcessBlocks = ProcessBlocks(content, _share(data, world_size), data.worker_timeout_s)

    def forget(self) -> None:
        self.blocks.forget()

    def close(self) -> None:
        self.blocks.close()


_OWNED: list[Any] = []  # pools that other ranks still read: without a handle here, Ray would end their actors


class _Actors(Workers):
    """Workers under Ray, started by process 0 of a group for all.

    Without a group, each rank starts its share."""

    kind = "actors"

    def __init__(self, arguments: Any, seed: int, extras: Extras, world_size: int) -> None:
        from sigray.workers.data.pool import DataPool, PoolBlocks

        manifest, data, model = arguments
        num_readers = dist.get_world_size() if has_group() else 1
        num_workers = _share(data, 1 if has_group() else world_size)
        self._pool: DataPool | None = None

        def start() -> Any:
            _warn_if_short(num_workers, data)
            sized = data.model_copy(update={"num_workers": num_workers})
            self._pool = DataPool(manifest, sized, model, seed=seed, num_readers=num_readers, extras=extras)
            self._pool.start()
            return self._pool.registry

        self._registry = from_rank_0(start)
        self.blocks = PoolBlocks(self._registry, data.worker_timeout_s)

    def close(self) -> None:
        import ray

        from sigray.workers.data.pool import listed

        if not ray.is_initialized():
            return
        try:
            if ray.get(self._registry.leave.remote(), timeout=_LEAVE_S):
                for actor in listed(self._registry.actors.remote()):
                    ray.kill(actor)
                ray.kill(self._registry)
            elif self._pool is not None:
                _OWNED.append(self._pool)
        except ray.exceptions.RayError:  # the owner has gone, and the actors with it
            pass


def _warn_if_short(num_workers: int, data: DataConfig) -> None:
    """Say what the workers wait for: a job that trains on all CPUs leaves them none."""
    import ray

    needed = num_workers * data.cpus_per_worker
    free = ray.available_resources().get("CPU", 0.0)
    if free < needed:
        logger.warning(
            "sigray.stream: %d data-shard workers need %g CPUs, and %g are free. They start when there are enough. Let "
            "the training workers reserve fewer (ScalingConfig.resources_per_worker), or lower num_workers or "
            "cpus_per_worker",
            num_workers,
            needed,
            free,
        )
