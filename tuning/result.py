"""What `sigray.sweep` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sigray.tuning.report import known_best
from sigray.tuning.study import Study, trial_name
from sigray.tuning.table import Row, Status, Table


@dataclass(frozen=True)
class SweepTrial:
    """A trial of a sweep.

    Attributes:
        values: the values of the study's space.
        figure: the study's metric at the newest rung; None before the first.
        samples_seen: pairs seen at the newest rung.
        error: why the trial failed or cannot run; None otherwise.
        folder: local folder of the trial's run.
    """

    number: int
    seed: int
    status: Status
    values: dict[str, Any]
    figure: float | None
    samples_seen: int
    error: str | None
    folder: Path


@dataclass(frozen=True)
class SweepResult:
    """The outcome of a sweep.

    Attributes:
        status: stopped: a signal ended the sweep before all trials were over; the same call continues it.
        metric: of the study.
        trials: by number.
        best: the first seed of the best configuration; None if none is above chance. FOLDER/best.yaml has its config.
        folder: local folder of the sweep, with trials.csv and report.html.
        storage: URI of the sweep's storage.
        table: the whole table of results.
    """

    status: Literal["finished", "stopped"]
    metric: str
    trials: list[SweepTrial]
    best: SweepTrial | None
    folder: Path
    storage: str
    table: Table = field(repr=False)


def result_of(study: Study, table: Table) -> SweepResult:
    """Return the outcome of a sweep from its table."""
    trials = [_trial(study, row) for row in table.rows.values()]
    best = known_best(study, table)
    return SweepResult(
        "finished" if all(row.is_over for row in table.rows.values()) else "stopped",
        study.config.metric,
        trials,
        next((trial for trial in trials if best is not None and trial.number == best.rows[0].number), None),
        study.config.folder,
        study.config.storage_uri,
        table,
    )


def _trial(study: Study, row: Row) -> SweepTrial:
    figure = row.results[-1].value if row.results else None
    folder = study.config.folder / "trials" / trial_name(row.number)
    return SweepTrial(row.number, row.seed, row.status, row.values, figure, row.samples_seen, row.error, folder)
