"""What `sigray.train` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from sigray.orchestrator.run_folder import RunFolder
from sigray.workers.checkpoint.index import newest_checkpoint

Figures: TypeAlias = dict[str, dict[str, float]]
"""The figures of each held-out set, by the name of the set."""


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run.

    Attributes:
        status: stopped: a signal or a sweep ended the run before its last sample; `sigray resume` continues it.
        steps: optimizer updates done.
        samples_seen: pairs that entered a loss.
        loss: of the newest line of metrics; None before the first.
        checkpoint: URI of the newest durable checkpoint; None before the first.
        zero_shot, retrieval, linear_probe: of the newest evaluated checkpoint; empty without one.
        train_s, total_s: seconds since the training workers were up, and of the whole call.
        folder: the run's local folder.
        storage: URI of the folder that holds the run's checkpoints.
        summary: content of summary.json; empty if the run was stopped before it began.
        ray_result: `ray.train.Result` of the last group of training workers that ended without an error; None if this
            call trained nothing.
    """

    status: Literal["finished", "stopped"]
    steps: int
    samples_seen: int
    loss: float | None
    checkpoint: str | None
    zero_shot: Figures
    retrieval: Figures
    linear_probe: Figures
    train_s: float
    total_s: float
    folder: Path
    storage: str
    summary: dict[str, Any] = field(repr=False)
    ray_result: Any = field(default=None, repr=False)


def result_of(folder: RunFolder, summary: dict[str, Any], ray_result: Any = None) -> TrainResult:
    """Return the outcome of a run from its summary and its storage."""
    newest = newest_checkpoint(folder.storage)
    return TrainResult(
        summary["status"],
        steps=int(summary["steps"]),
        samples_seen=int(summary["samples_seen"]),
        loss=summary["loss"],
        checkpoint=newest[0].uri(folder.storage.uri) if newest else None,
        zero_shot=summary["zero_shot"],
        retrieval=summary["retrieval"],
        linear_probe=summary.get("linear_probe", {}),
        train_s=summary["train_s"],
        total_s=summary["total_s"],
        folder=folder.path,
        storage=folder.storage.uri,
        summary=summary,
        ray_result=ray_result,
    )


def not_begun(folder: RunFolder, total_s: float) -> TrainResult:
    """Return the outcome of a run that was stopped before its folder was written."""
    return TrainResult(
        "stopped", 0, 0, None, None, {}, {}, {}, 0.0, total_s, folder.path, folder.storage.uri, summary={}
    )
