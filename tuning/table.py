"""The table of a sweep's results, which is its whole state and always on disk.

results.jsonl has a line for each event:

    {"event": "trial", "number", "seed", "budget", "values", "overrides"}        the trial was proposed
    {"event": "infeasible", "number", "why"}                                     it cannot run and was not started
    {"event": "result", "number", "rung", "samples_seen", "value", "loss", "figures"}     it reached a rung
    {"event": "decision", "number", "rung", "answer", "why"}                     go on or stop
    {"event": "failed", "number", "why"}                                         it ended with an error
    {"event": "retry", "number"}                                                 it shall run again
    {"event": "stream", "decoded", "served", "cpu_s"}                samples and CPU seconds of a shared stream

The rest (the status of trials, a searcher's knowledge, a scheduler's comparisons) is computed from these lines, so a
resumed sweep continues with the full state.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sigray.orchestrator.config import ConfigError
from sigray.tuning.decide import Progress
from sigray.tuning.search import Outcome
from sigray.tuning.space import Point
from sigray.workers.parse import Count, ParseError, as_type, parse_json
from sigray.workers.storage import Storage

RESULTS = "results.jsonl"
Status = Literal["waiting", "begun", "finished", "stopped", "failed", "infeasible"]


@dataclass
class Result:
    """A trial at a rung."""

    rung: Count
    samples_seen: Count
    value: float
    loss: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)  # zero_shot and retrieval, as of the evaluation
    answer: str | None = None  # None until it is decided
    why: str = ""


@dataclass
class Row:
    """A trial with its results."""

    number: Count
    seed: Count
    budget: Count
    values: dict[str, Any]
    overrides: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    error: str | None = None
    is_infeasible: bool = False

    @property
    def status(self) -> Status:
        if self.is_infeasible:
            return "infeasible"
        if self.error is not None:
            return "failed"
        if not self.results:
            return "waiting"
        if self.results[-1].answer == "stop":
            return "finished" if self.results[-1].samples_seen >= self.budget else "stopped"
        return "begun"

    @property
    def is_over(self) -> bool:
        return self.status not in ("waiting", "begun")

    @property
    def is_undecided(self) -> bool:
        """Whether the trial may not go on from its newest rung, which is not the last one."""
        return bool(self.results) and self.results[-1].answer is None and self.samples_seen < self.budget

    @property
    def group(self) -> tuple[int, int]:
        """Key of the trials that are compared with each other."""
        return self.seed, self.budget

    @property
    def key(self) -> str:
        """The same for the same configuration under another seed."""
        return json.dumps([self.budget, self.overrides], sort_keys=True)

    @property
    def decided(self) -> list[Result]:
        return [result for result in self.results if result.answer is not None]

    @property
    def samples_seen(self) -> int:
        return self.results[-1].samples_seen if self.results else 0

    def at(self, samples: int | None) -> Result | None:
        """The result at a rung given in samples; None: at the end of the budget."""
        wanted = self.budget if samples is None else samples
        # A rung falls on the first step at or after its count.
        found = [result for result in self.results if result.samples_seen >= wanted]
        before = [result for result in self.results if result.samples_seen < wanted]
        return found[0] if found and found[0].rung == len(before) else None

    def progress(self) -> Progress:
        return Progress([result.value for result in self.results], self.is_over)

    def outcome(self) -> Outcome:
        """The outcome for the searcher, without the figures of a failed trial."""
        usable = [] if self.status in ("failed", "infeasible") else [result.value for result in self.results]
        return Outcome(Point(self.values, self.overrides), usable, self.is_over, self.status == "finished")


@dataclass(frozen=True)
class _Decision:
    rung: Count
    answer: str
    why: str


@dataclass
class Table:
    """The rows by number, in rising order, and the costs of the streams."""

    rows: dict[int, Row] = field(default_factory=dict)
    streams: list[dict[str, float]] = field(default_factory=list)

    def add(self, event: dict[str, Any]) -> None:
        """Apply one event.

        Raises:
            ParseError: for an unknown event.
        """
        kind = event.get("event")
        if kind == "trial":
            row = as_type(Row, {key: event[key] for key in event.keys() - {"results", "error", "is_infeasible"}})
            self.rows[row.number] = row
        elif kind == "stream":
            costs = {key: event.get(key) for key in ("decoded", "served", "cpu_s")}
            self.streams.append(as_type(dict[str, float], costs))
        elif kind in ("infeasible", "failed", "retry"):
            row = self._row(event)
            row.error = None if kind == "retry" else as_type(str, event.get("why"))
            row.is_infeasible = kind == "infeasible"
        elif kind == "result":
            self._row(event).results.append(as_type(Result, event))
        elif kind == "decision":
            decision = as_type(_Decision, event)
            results = self._row(event).results
            if decision.rung >= len(results):
                raise ParseError(f"trial {event['number']} has no result at rung {decision.rung}")
            results[decision.rung].answer, results[decision.rung].why = decision.answer, decision.why
        else:
            raise ParseError(f"unknown event {kind!r:.60}")

    def _row(self, event: dict[str, Any]) -> Row:
        row = self.rows.get(as_type(int, event.get("number")))
        if row is None:
            raise ParseError(f"there is no trial {event['number']}")
        return row

    @property
    def samples_spent(self) -> int:
        """Samples seen by all trials together, up to their last results."""
        return sum(row.samples_seen for row in self.rows.values())

    def counts(self) -> dict[str, int]:
        """Number of trials by status."""
        statuses = [row.status for row in self.rows.values()]
        return {status: statuses.count(status) for status in sorted(set(statuses))}


class Writer:
    """Add events to the table in memory and to the file.

    The file is replaced atomically, so a reader never sees half a line.

    Attributes:
        table: the content of the file; empty if the file is missing.

    Raises:
        ConfigError: if the file has unknown events.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        lines = storage.read(RESULTS).splitlines() if storage.exists(RESULTS) else []
        self._events: list[dict[str, Any]] = []
        self.table = Table()
        for number, line in enumerate(lines, 1):
            try:
                self._events.append(as_type(dict[str, Any], parse_json(line)))
                self.table.add(self._events[-1])
            except ParseError as error:
                raise ConfigError(f"{storage.uri}/{RESULTS}, line {number}: {error}") from None

    def add(self, *events: dict[str, Any]) -> None:
        """Add events; they are durable on return."""
        for event in events:
            self.table.add(event)
        self._events += events
        self._storage.write(RESULTS, "".join(json.dumps(event) + "\n" for event in self._events).encode())


def read_table(storage: Storage) -> Table:
    """The table of a sweep; raises as `Writer`."""
    return Writer(storage).table


@dataclass(frozen=True)
class Ranked:
    """A configuration over all of its seeds."""

    rows: Sequence[Row]
    rung: int  # the last that all seeds reached; -1 if none
    mean: float  # of the figure there

    @property
    def values(self) -> dict[str, Any]:
        return self.rows[0].values


def ranking(rows: Iterable[Row]) -> list[Ranked]:
    """The configurations of the largest budget, best first.

    Sorted by the last rung that all seeds reached, then by the mean of the metric there.
    """
    rows = list(rows)
    largest = max((row.budget for row in rows), default=0)
    by_key: dict[str, list[Row]] = {}
    for row in rows:
        if row.budget == largest and row.status not in ("infeasible", "failed"):
            by_key.setdefault(row.key, []).append(row)
    ranked = []
    for group in by_key.values():
        rung = min(len(row.results) for row in group) - 1
        values = [row.results[rung].value for row in group] if rung >= 0 else [float("-inf")]
        ranked.append(Ranked(group, rung, statistics.fmean(values)))
    return sorted(ranked, key=lambda one: (-one.rung, -one.mean, one.rows[0].number))


def as_csv(table: Table, num_rungs: int) -> str:
    """The final table as CSV; it does not depend on time or machine."""
    names = list(dict.fromkeys(name for row in table.rows.values() for name in row.values))
    rungs = range(num_rungs)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "seed", "budget", *names, "status", "samples_seen", *(f"rung_{n + 1}" for n in rungs)])
    for row in table.rows.values():
        values = [row.values.get(name, "") for name in names]
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
        figures = [repr(row.results[n].value) if n < len(row.results) else "" for n in rungs]
        writer.writerow([row.number, row.seed, row.budget, *texts, row.status, row.samples_seen, *figures])
    return out.getvalue()
