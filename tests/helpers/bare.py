"""The training loop without Ray: a bare gloo group, each rank with a data-shard worker in its own process.

The reference for whole runs under Ray, which must give the same losses and the same weights, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sigray.orchestrator.config import RunConfig
from sigray.orchestrator.run.preflight import check_store
from sigray.orchestrator.run.worker_group import train_job
from sigray.workers.checkpoint.index import CheckpointInfo
from sigray.workers.data.buffers import Place
from sigray.workers.data.manifest import scan_shards
from sigray.workers.data.views import Pixels
from sigray.workers.data.worker import Block, DataWorker
from sigray.workers.training.job import Answer, Request
from sigray.workers.training.profile import Profile
from sigray.workers.training.train import train_loop_per_worker


class OneWorker:
    """A BlockSource that decodes in this process, by value or into the batches' memory."""

    def __init__(self, worker: DataWorker, shares_memory: bool = False) -> None:
        self._worker, self.shares_memory = worker, shares_memory

    def request(
        self, lane: int, number: int, places: Sequence[Place] = (), pixels: Pixels | None = None
    ) -> tuple[Sequence[Place], Pixels | None]:
        return places, pixels

    def wait(self, lane: int, number: int, handle: tuple[Sequence[Place], Pixels | None]) -> Block:
        return self._worker.block(lane, number, *handle)


class Recorder:
    """Hooks that remember, and stop the run after a given step."""

    def __init__(self, last_step: int | None = None) -> None:
        self._last_step = last_step
        self.lines: list[dict[str, float]] = []
        self.checkpoints: list[CheckpointInfo] = []
        self.shared: list[str | None] = []  # name of each shared checkpoint; None on ranks other than 0
        self.num_looks = 0
        self.warnings: list[str] = []
        self.phases: list[tuple[int, int]] = []
        self.starts: list[int] = []

    def started(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.starts.append(facts["first_step"])

    def phase_began(self, number: int, step: int) -> None:
        self.phases.append((number, step))

    def record(self, metrics: dict[str, float]) -> Request:
        self.lines.append(metrics)
        return "stop" if metrics["step"] == self._last_step else "go on"

    def refused(self, rank: int, reasons: dict[str, tuple[int, str]]) -> None:
        self.reasons = reasons

    def checkpointed(self, info: CheckpointInfo) -> None:
        self.checkpoints.append(info)

    def share(self, info: CheckpointInfo | None) -> None:
        self.shared.append(None if info is None else info.name)

    def look_ahead(self) -> None:
        self.num_looks += 1

    def ask(self, step: int) -> Answer:
        return "go on"

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def train_bare(
    rank: int, world_size: int, config: RunConfig, last_step: int | None = None, profile: Profile | None = None
) -> dict[str, Any]:
    """Train a config on this rank, to its end or to a step of it; see `tests.helpers.ranks.run_on_ranks`.

    Returns:
        `losses` by step, the newest checkpoint's `files` and all `lines` of metrics; empty on ranks other than 0. And
        the names of the checkpoints that were `committed` and `shared`, `num_looks`, the `phases` that began, and the
        first steps of the `starts`.
    """
    manifest = scan_shards(config.data.shards, config.data)
    if config.embeddings.store is not None:
        manifest = check_store(config).manifest(manifest, config.data)
    recorder = Recorder(last_step)
    blocks = OneWorker(DataWorker(manifest, config.data, config.model, seed=config.run.seed))
    train_loop_per_worker(train_job(config, world_size, manifest, blocks, recorder, profile=profile))
    return {
        "losses": {line["step"]: line["train/loss"] for line in recorder.lines},
        "lines": recorder.lines,
        "files": recorder.checkpoints[-1].files if recorder.checkpoints else {},
        "committed": [info.name for info in recorder.checkpoints],
        "shared": recorder.shared,
        "num_looks": recorder.num_looks,
        "phases": recorder.phases,
        "starts": recorder.starts,
    }
