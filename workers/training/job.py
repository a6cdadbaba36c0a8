"""What the driver and a training worker agree on: the job, requests and reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sigray.workers.checkpoint.index import CheckpointInfo
from sigray.workers.config import (
    Accelerator,
    CheckpointConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PhaseConfig,
    ShardingConfig,
    TrainConfig,
)
from sigray.workers.data.loader import BlockSource
from sigray.workers.data.manifest import Manifest
from sigray.workers.training.profile import Profile

Request = Literal["go on", "save", "stop"]
"""What the driver requests after a line of metrics.
save: a checkpoint now; stop: a checkpoint, then the end of the run."""

Answer = Literal["go on", "stop", "wait"]
"""The driver's decision at a rung; after "wait" the worker asks again."""


class Hooks(Protocol):
    """Reports and questions to the driver, of rank 0; `warn` and `refused` of any.

    All ranks call `share` and `look_ahead`, in the same order. Neither waits for another rank.
    """

    def started(self, facts: dict[str, Any]) -> None:
        """Training starts; `facts` is the start-up block."""

    def phase_began(self, number: int, step: int) -> None:
        """Training goes on in another phase, after so many steps."""

    def record(self, metrics: dict[str, float]) -> Request:
        """Record one line of metrics; returns what the driver requests."""

    def refused(self, rank: int, reasons: dict[str, tuple[int, str]]) -> None:
        """Record a rank's refused and cut samples: reason -> count, the first sample."""

    def checkpointed(self, info: CheckpointInfo) -> None:
        """A checkpoint is durable."""

    def share(self, info: CheckpointInfo | None) -> None:
        """Share a durable checkpoint, which is None on ranks other than 0.

        All ranks call this equally often.
        """

    def look_ahead(self) -> None:
        """All ranks call this one step before a line of metrics."""

    def ask(self, step: int) -> Answer:
        """Whether to continue after a rung whose checkpoint is durable."""

    def warn(self, message: str) -> None:
        """Show a warning that does not end the run. On any rank, from any thread."""


@dataclass
class TrainJob:
    """Everything that a training worker needs to know."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    loss: LossConfig
    optim: OptimConfig
    sharding: ShardingConfig
    checkpoint: CheckpointConfig
    phases: list[PhaseConfig]
    seed: int
    accelerator: Accelerator
    devices_per_worker: int | None  # XLA only; None: all devices of the host
    cpus_per_worker: int
    manifest: Manifest
    storage_uri: str
    owner: str | None  # of the run's lease
    blocks: BlockSource
    hooks: Hooks
    rungs: frozenset[int] = frozenset()  # steps after which the ranks save and ask the driver whether to continue
    saves_start: bool = False  # a checkpoint before the first step, to evaluate the initial weights
    profile: Profile | None = None  # which steps to profile; the run ends after them
