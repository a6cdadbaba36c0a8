"""Keep a run in trackio's database on this machine.

`trackio sync` sends the database to a Space. trackio's `log` queues in memory and turns errors into warnings, so a kill
would lose lines. Its database takes rows in one transaction each.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sigray.orchestrator.config import flattened
from sigray.orchestrator.run_folder import TrackedAs, read_run
from sigray.orchestrator.trackers.feed import Row, Shown


class Trackio:
    """A run of trackio; the step of a row is the count of samples seen."""

    def __init__(self, folder: Path, tracked: TrackedAs) -> None:
        self._folder, self._tracked = folder, tracked
        self._project = os.environ.get("TRACKIO_PROJECT", "sigray")
        self._config: dict[str, Any] = {}
        self._storage: Any = None

    @staticmethod
    def check() -> None:
        """Raise if trackio cannot be imported."""
        import trackio.sqlite_storage  # noqa: F401

    def open(self) -> Shown:
        from trackio.sqlite_storage import SQLiteStorage

        self._storage = SQLiteStorage
        config = flattened(read_run(str(self._folder)).model_dump(mode="json"))
        self._config = config | ({"_Group": self._tracked.group} if self._tracked.group else {})
        shown = Shown()
        for log in SQLiteStorage.get_logs(self._project, run_id=self._tracked.id):
            shown.add_keys(log["step"], list(log))
        return shown

    def send(self, rows: list[Row]) -> None:
        rows = [row for row in rows if row.figures]  # images are not sent
        self._storage.bulk_log(
            self._project,
            self._tracked.name,
            [row.figures for row in rows],
            steps=[row.samples_seen for row in rows],
            config=self._config,
            run_id=self._tracked.id,
        )

    def note(self, notes: dict[str, str]) -> None:
        """trackio has no facts of a run beside its config."""

    def close(self, status: str) -> None:
        """trackio's database needs no end."""
