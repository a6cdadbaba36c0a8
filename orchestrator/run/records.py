"""Record what a run reports: run folder, Prometheus, terminal."""

from __future__ import annotations

import contextlib
from typing import Any

from sigray.orchestrator.config import RunConfig
from sigray.orchestrator.run.progress import Display
from sigray.orchestrator.run.summary import data_facts, environment
from sigray.orchestrator.run_folder import RunFolder
from sigray.workers.data.manifest import Manifest
from sigray.workers.metrics import RunMetrics


class RunRecords:
    """Pass each report of a run to all its records.

    Args:
        name: of the run, for its metrics in Prometheus.

    Attributes:
        facts: start-up facts of the newest attempt; empty before the first one.
        reasons: why samples were refused or cut in the newest attempt, by rank.
        prometheus: the run's metrics in Prometheus.
    """

    def __init__(
        self, config: RunConfig, folder: RunFolder, manifest: Manifest, display: Display, *, name: str
    ) -> None:
        self._name = config.run.name
        self._folder, self._manifest, self._display = folder, manifest, display
        self.prometheus = RunMetrics(name, config.checkpoint.save_every_s)
        self.facts: dict[str, Any] = {}
        self.reasons: dict[int, dict[str, tuple[int, str]]] = {}

    def started(self, facts: dict[str, Any]) -> None:
        """Begin an attempt."""
        first_step = facts["first_step"]
        if self.facts:
            self._display.say(f"the training workers were restarted and go on from step {first_step:,}", "restart")
        else:
            self._display.keep(f"training begins at step {first_step:,}", "note")
        self.facts = facts
        self.reasons = {}
        self.prometheus.started(facts)
        self._folder.restore_metrics(first_step)
        data = data_facts(self._manifest)
        self._folder.save_summary({"name": self._name, "facts": facts, "data": data, "environment": environment()})
        with contextlib.suppress(OSError):  # for pages only; the end copies the records again
            self._folder.upload_records()
        self._display.start(str(self._folder.path), facts, data)

    def phase_began(self, number: int, step: int) -> None:
        """Note that another phase begins after so many steps."""
        (phase,) = (phase for phase in self.facts["phases"] if phase["number"] == number)
        self._display.say(f"phase {number} begins after step {step:,}: {', '.join(phase['changes'])}")

    def metrics(self, line: dict[str, float], num_data_workers: int | None) -> None:
        """Record a line of metrics.

        Args:
            num_data_workers: data-shard workers of this run; None: the run shares those of a sweep.
        """
        self._folder.append_metrics(line)
        self._display.metrics(line)
        self.prometheus.line(line, num_data_workers)

    def refused(self, rank: int, reasons: dict[str, tuple[int, str]]) -> None:
        """Record a rank's refused and cut samples: reason -> count, the first sample."""
        self.reasons[rank] = reasons

    def refused_of_all(self) -> dict[str, dict[str, Any]]:
        """Return count and first sample of each reason, the most frequent first."""
        merged: dict[str, dict[str, Any]] = {}
        for reasons in self.reasons.values():
            for reason, (count, first) in reasons.items():
                merged.setdefault(reason, {"count": 0, "first": first})["count"] += count
        return dict(sorted(merged.items(), key=lambda entry: -entry[1]["count"]))

    def evaluation(self, result: dict[str, Any]) -> None:
        self._folder.save_evaluation(result)
        self.prometheus.evaluation(result)
        self._display.evaluation(result)

    def close(self) -> None:
        self._display.close()
