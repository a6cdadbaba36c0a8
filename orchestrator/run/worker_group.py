"""Build the group of training workers of an attempt: job and Ray trainer.

Ray Train's trainer is constructed here and nowhere else.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigray.orchestrator.config import RunConfig
from sigray.orchestrator.run.monitor import RayHooks
from sigray.orchestrator.run.places import START_S
from sigray.orchestrator.run_folder import RunFolder
from sigray.workers.data.manifest import Manifest
from sigray.workers.named import find_named
from sigray.workers.storage import Storage

if TYPE_CHECKING:
    from sigray.workers.data.loader import BlockSource
    from sigray.workers.data.pool import DataPool, SharedPool
    from sigray.workers.training.job import Hooks, TrainJob
    from sigray.workers.training.profile import Profile


@dataclass(frozen=True)
class WorkerGroup:
    """What all attempts of a run have in common.

    Attributes:
        monitor: handle of the `RunMonitor`.
        owner: owner of the run's lease.
        rungs: steps of a trial's rungs.
        profile: the steps to profile.
        saves_start: whether the initial weights are saved, to be evaluated.
    """

    config: RunConfig
    folder: RunFolder
    manifest: Manifest
    pool: DataPool | SharedPool
    monitor: Any
    owner: str
    rungs: frozenset[int]
    profile: Profile | None = None
    saves_start: bool = False

    def trainer(self, num_workers: int) -> Any:
        """Return Ray Train's trainer of one attempt; `policy.py` decides about retries."""
        import ray.train

        # TorchTrainer asks for torch_tpu if there are TPUs, before any code of ours runs.
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        from sigray.orchestrator.run.backends import backend_config, raise_start_error, scaling_config
        from sigray.workers.training.train import train_loop_per_worker

        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_S))
        config = self.config
        storage = self.folder.storage
        # A checkpoint can only be named below Ray Train's folder, and Ray Train cannot open a store as we do.
        home = Path(storage.uri) if storage.is_local else self.folder.path
        watches = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0"
        hooks = RayHooks(self.monitor, storage.uri, has_folder=storage.is_local, sees_preemptions=watches)
        blocks = self.pool.blocks(config.data.worker_timeout_s)
        job = train_job(config, num_workers, self.manifest, blocks, hooks, self.owner, self.rungs, self.profile)
        job = replace(job, saves_start=self.saves_start)

        def train_worker(_: dict[str, Any]) -> None:
            hooks.joined()
            try:
                raise_start_error()
                train_loop_per_worker(job)
                hooks.ended()
            except Exception as error:
                hooks.failed(error)
                raise

        # Ray's record of an earlier attempt. Our own commit files say which checkpoints exist. Ray's controller alone
        # reads and writes this file, and it runs on the driver's host.
        Storage(home).delete("checkpoint_manager_snapshot.json")
        failure_config: Any = ray.train.FailureConfig  # mypy sees the class of Ray Train v1
        return DataParallelTrainer(
            train_worker,
            train_loop_config={},
            backend_config=backend_config(config.cluster),
            scaling_config=scaling_config(config.cluster, num_workers),
            run_config=ray.train.RunConfig(
                name=home.name,
                storage_path=str(home.parent),
                callbacks=train_callbacks(config.cluster.train_callbacks),
                failure_config=failure_config(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            ),
        )


def train_callbacks(names: list[str]) -> list[Any]:
    """Return the callbacks of cluster.train_callbacks.

    Raises:
        ValueError: if one is no `UserCallback` of Ray Train.
    """
    from ray.train import UserCallback

    made = [find_named(name, "cluster.train_callbacks")() for name in names]
    for name, callback in zip(names, made, strict=True):
        if not isinstance(callback, UserCallback):
            kind = type(callback).__name__
            raise ValueError(f"cluster.train_callbacks={name!r} gave a {kind}, a ray.train.UserCallback expected")
    return made


def train_job(
    config: RunConfig,
    num_workers: int,
    manifest: Manifest,
    blocks: BlockSource,
    hooks: Hooks,
    owner: str | None = None,
    rungs: frozenset[int] = frozenset(),
    profile: Profile | None = None,
) -> TrainJob:
    """Return what the training workers of a run need to know of its config."""
    from sigray.workers.training.job import TrainJob

    return TrainJob(
        data=config.data,
        model=config.model,
        train=config.train.model_copy(update={"micro_batch_size": config.micro_batch_size(num_workers)}),
        loss=config.loss,
        optim=config.optim,
        sharding=config.sharding,
        checkpoint=config.checkpoint,
        phases=config.phases,
        seed=config.run.seed,
        accelerator=config.cluster.accelerator,
        devices_per_worker=config.cluster.num_devices,
        cpus_per_worker=config.cluster.cpus_per_worker,
        manifest=manifest,
        storage_uri=config.storage_uri,
        owner=owner,
        blocks=blocks,
        hooks=hooks,
        rungs=rungs,
        profile=profile,
    )
