"""The actor that holds a sweep's table and decides which trials go on.

A small actor on the driver's machine. Trials ask it, the driver reads it, and only this actor writes the table.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from sigray.tuning.decide import Rules, decide
from sigray.tuning.study import trial_name
from sigray.tuning.table import Row, Table, Writer, ranking
from sigray.workers.metrics import REPEAT_S, SweepMetrics
from sigray.workers.storage import Storage

if TYPE_CHECKING:
    from sigray.workers.training.job import Answer

STATES = ("waiting", "running", "done", "stopped", "failed", "infeasible")


class Judge:
    """Hold the table of a sweep and decide which trials continue.

    Args:
        name: of the sweep, for the metrics on Ray's dashboard.
        uri: of the sweep's storage.
        rules: of the study's scheduler.
        num_rungs: for each budget.
    """

    def __init__(self, name: str, uri: str, rules: Rules, num_rungs: dict[int, int]) -> None:
        self._rules, self._num_rungs = rules, num_rungs
        self._metrics = SweepMetrics(name)
        self._exported_at = -math.inf
        self._writer = Writer(Storage(uri))
        self._lines: dict[int, dict[str, float]] = {}
        self._assignments: dict[int, tuple[dict[str, Any], list[Any]]] = {}
        self._is_stopping = False

    def add(self, *events: dict[str, Any]) -> None:
        """Write events to the table."""
        self._writer.add(*events)

    def table(self, running: Collection[int] | None = None) -> tuple[Table, dict[int, dict[str, float]]]:
        """The table, and the newest line of metrics of each trial.

        Args:
            running: the trials that run, for the metrics; None: export none.
        """
        if running is not None and time.monotonic() - self._exported_at >= REPEAT_S:
            self._exported_at = time.monotonic()
            self._export(running)
        return self._writer.table, self._lines

    def assign(self, number: int, stream: list[Any], content: dict[str, Any]) -> None:
        """Assign a config and a stream to a trial.

        Args:
            stream: handle of the pool's `StreamRegistry`, in a list.
            content: of its config.
        """
        self._assignments[number] = content, stream
        self._lines.pop(number, None)

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
        return self.settle(number, rung)

    def settle(self, number: int, rung: int) -> Answer:
        """Decide about a result in the table, also for a trial without a process."""
        row = self._row(number)
        if row.results[rung].answer is None:
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

    def _export(self, running: Collection[int]) -> None:
        """Set the sweep's metrics on Ray's dashboard."""
        rows = self._rows()
        states = Counter(dict.fromkeys(STATES, 0))
        states.update(state_of(row, row.number in running) for row in rows)
        seen = {
            row.number: max(self._lines.get(row.number, {}).get("samples_seen", 0), row.samples_seen) for row in rows
        }
        leader = next(iter(ranking(rows)), None)
        self._metrics.update(
            {trial_name(row.number): row.results[-1].value for row in rows if row.results},
            {trial_name(number): samples for number, samples in seen.items() if samples},
            states,
            leader.mean if leader is not None and leader.rung >= 0 else None,
        )


def state_of(row: Row, is_running: bool) -> str:
    """Return the state of a trial, one of `STATES`."""
    if row.is_over:
        return "done" if row.status == "finished" else row.status
    return "running" if is_running else "waiting"
