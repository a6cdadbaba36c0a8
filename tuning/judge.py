"""The actor that holds a sweep's table and decides which trials go on.

A small actor on the driver's machine. Trials ask it, the driver reads it, and only this actor writes the table.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sigray.tuning.decide import Rules, decide
from sigray.tuning.table import Row, Table, Writer
from sigray.workers.storage import Storage

if TYPE_CHECKING:
    from sigray.workers.training.job import Answer


class Judge:
    """Hold the table of a sweep and decide which trials continue.

    Args:
        name: of the sweep, for the metrics on Ray's dashboard.
        uri: of the sweep's storage.
        rules: of the study's scheduler.
        num_rungs: for each budget.
    """

    def __init__(self, name: str, uri: str, rules: Rules, num_rungs: dict[int, int]) -> None:
        self._name, self._rules, self._num_rungs = name, rules, num_rungs
        self._writer = Writer(Storage(uri))
        self._lines: dict[int, dict[str, float]] = {}
        self._assignments: dict[int, tuple[dict[str, Any], list[Any]]] = {}
        self._is_stopping = False
        self._gauges: dict[str, Any] = {}

    def add(self, *events: dict[str, Any]) -> None:
        """Write events to the table."""
        self._writer.add(*events)

    def table(self) -> tuple[Table, dict[int, dict[str, float]]]:
        """The table, and the newest line of metrics of each trial."""
        return self._writer.table, self._lines

    def assign(self, number: int, stream: list[Any], content: dict[str, Any]) -> None:
        """Assign a config and a stream to a trial.

        Args:
            stream: handle of the pool's `StreamRegistry`, in a list.
            content: of its config.
        """
        self._assignments[number] = content, stream

    def assignment(self, number: int) -> tuple[dict[str, Any], list[Any], list[int]]:
        """Config and stream of a trial, and the rungs after which it was to go on."""
        passed = [result.rung for result in self._row(number).results if result.answer == "go on"]
        return *self._assignments[number], passed

    def stop(self) -> None:
        """Ask every trial to write a checkpoint and end."""
        self._is_stopping = True

    def heard(self, number: int, line: dict[str, float]) -> bool:
        """Take a trial's line of metrics; returns whether the trial shall stop."""
        self._lines[number] = line
        for name in ("train/loss", "samples_seen", "throughput/samples_per_s"):
            if name in line:
                self._gauge(name.replace("/", "_"), line[name], number)
        return self._is_stopping

    def decide(self, number: int, rung: int, samples_seen: int, value: float, more: dict[str, Any]) -> Answer:
        """Whether a trial goes on after a rung; the trial asks again after "wait".

        The result is written before the decision is made, and the decision before it is returned. A trial that dies in
        between asks again and gets the same answer.

        Args:
            value: of the study's metric.
            more: `loss` and `figures`, for the report.
        """
        row = self._row(number)
        if len(row.results) == rung:
            if not math.isfinite(value):
                raise ValueError(f"the figure of trial {number} is {value}")
            result = {"event": "result", "number": number, "rung": rung, "samples_seen": samples_seen, "value": value}
            self._writer.add(result | more)
            self._gauge("figure", value, number)
        known = row.results[rung]
        if known.answer is None:
            group = {other.number: other.progress() for other in self._rows() if other.group == row.group}
            decision = decide(self._rules, self._num_rungs[row.budget], group, number, rung)
            if decision.answer == "wait":
                # An open decision is not written: a resumed sweep decides it.
                return "stop" if self._is_stopping else "wait"
            self._writer.add(
                {"event": "decision", "number": number, "rung": rung, "answer": decision.answer, "why": decision.why}
            )
        return row.results[rung].answer  # type: ignore[return-value]

    def _rows(self) -> list[Row]:
        return list(self._writer.table.rows.values())

    def _row(self, number: int) -> Row:
        return self._writer.table.rows[number]

    def _gauge(self, name: str, value: float, number: int) -> None:
        """Export a figure to Ray's dashboard as ray_sigray_sweep_NAME, by sweep and trial."""
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(f"sigray_sweep_{name}", description=name, tag_keys=("sweep", "trial"))
        self._gauges[name].set(value, tags={"sweep": self._name, "trial": str(number)})
