"""The training loop without Ray: a bare gloo group, each rank with a data-shard worker in its own process.

The reference for whole runs under Ray, which must give the same losses and the same weights, bit for bit.
"""

from __future__ import annotations

from typing import Any

from orchestrator.config import RunConfig
from workers.checkpoint import CheckpointInfo
from workers.data_worker import Block, DataWorker
from workers.shards import build_manifest, list_shards
from workers.train import TrainJob, train_loop_per_worker


class OneWorker:
    """A BlockSource that decodes in this process."""

    def __init__(self, worker: DataWorker) -> None:
        self._worker = worker

    def request(self, lane: int, number: int) -> None:
        return None

    def wait(self, lane: int, number: int, handle: None) -> Block:
        return self._worker.block(lane, number)


class Recorder:
    """Hooks that remember; asks the loop to stop after `stop_at` steps."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.lines: list[dict[str, float]] = []
        self.checkpoints: list[CheckpointInfo] = []
        self._stop_at = stop_at

    def started(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def record(self, metrics: dict[str, float]) -> bool:
        self.lines.append(metrics)
        return metrics["step"] == self._stop_at

    def checkpointed(self, info: CheckpointInfo | None, metrics: dict[str, float]) -> None:
        if info is not None:
            self.checkpoints.append(info)


def train_bare(rank: int, world_size: int, config: RunConfig, stop_at: int | None = None) -> dict[str, Any]:
    """Train a config on this rank; see `tests.ranks.run_on_ranks`.

    Returns:
        `losses` by step and the newest checkpoint's `files`; both empty on ranks other than 0.
    """
    data = config.data
    manifest = build_manifest(list_shards(data.shards), image_keys=data.image_keys, caption_keys=data.caption_keys)
    recorder = Recorder(stop_at)
    train_loop_per_worker(
        TrainJob(
            data=data,
            model=config.model,
            train=config.train,
            optim=config.optim,
            checkpoint=config.checkpoint,
            seed=config.run.seed,
            accelerator=config.cluster.accelerator,
            cpus_per_worker=config.cluster.cpus_per_worker,
            manifest=manifest,
            storage_uri=config.storage_uri,
            blocks=OneWorker(DataWorker(manifest, data, config.model, seed=config.run.seed)),
            hooks=recorder,
        )
    )
    return {
        "losses": {line["step"]: line["train/loss"] for line in recorder.lines},
        "files": recorder.checkpoints[-1].files if recorder.checkpoints else {},
    }
