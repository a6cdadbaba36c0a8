"""The process that sends a run to its trackers.

    python -m sigray.orchestrator.trackers.sender FOLDER SECONDS NAME ...   sends the run of a folder
    python -m sigray.orchestrator.trackers.sender --check NAME ...          can each tracker be reached?

The driver starts one on its host and writes nothing to it. The process reads the files of the run's folder, each
tracker in a thread of its own. So a tracker may be slow, hang or fail, and the process may be killed: training and the
other trackers go on. A tracker is asked what it has before anything is sent, also after each failure. So no line is
sent twice.

The end of standard input says that the run has ended, or that the driver died. The process then sends the rest and
ends, after SECONDS at the latest. Standard output has lines for the user, as JSON: {"text"}.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from sigray.orchestrator.run_folder import TRACKERS, TRACKERS_LOCK, TrackedAs, read_run
from sigray.orchestrator.trackers.feed import Feed, Row, Shown, read_status
from sigray.orchestrator.trackers.mlflow_run import MLflow
from sigray.orchestrator.trackers.tensorboard_files import TensorBoard
from sigray.orchestrator.trackers.trackio_run import Trackio
from sigray.orchestrator.trackers.variables import SECRETS
from sigray.orchestrator.trackers.wandb_run import WandB
from sigray.workers.checkpoint.index import newest_checkpoint
from sigray.workers.parse import as_type, parse_json
from sigray.workers.storage import Storage

_POLL_S = 1.0
_MAX_ROWS = 50  # that are sent at once to catch up
_CHECKPOINT_POLL_S = 30.0
_LAST_LOOK_S = 20.0  # for the storage to name the last checkpoint
_MAX_PAUSE_S = 60.0  # between two tries to reach a tracker
_URL_PASSWORD = re.compile(r"://[^/@\s]*@")


class Tracker(Protocol):
    """One run in one tracker."""

    def open(self) -> Shown:
        """Begin the run, or continue it after a failure; return what is there."""

    def send(self, rows: list[Row]) -> None:
        """Send rows in their order, each as a whole or not at all."""

    def note(self, notes: dict[str, str]) -> None:
        """Set facts of the run, such as its newest checkpoint."""

    def close(self, status: str) -> None:
        """End the run: finished, stopped or failed; empty if its driver died."""


ADAPTERS: dict[str, Callable[[Path, TrackedAs], Tracker]] = {
    "tensorboard": lambda folder, tracked: TensorBoard(folder),
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
_CHECKS: dict[str, Callable[[], None]] = {"wandb": WandB.check, "mlflow": MLflow.check, "trackio": Trackio.check}


class Checkpoints:
    """Look for the newest durable checkpoint, in a thread: the storage may hang."""

    def __init__(self, folder: Path, ended: threading.Event) -> None:
        self._folder, self._ended = folder, ended
        self._newest = ""
        self._has_last = threading.Event()
        threading.Thread(target=self._look, name="checkpoints", daemon=True).start()

    def newest(self, *, is_last: bool) -> str:
        """Return the URI of the newest one known; empty without one.

        Args:
            is_last: whether to wait, for a while, for a look after the end of the run.
        """
        if is_last:
            self._has_last.wait(_LAST_LOOK_S)
        return self._newest

    def _look(self) -> None:
        storage = Storage(read_run(str(self._folder)).storage_uri)
        while not self._has_last.is_set():
            is_last = self._ended.is_set()
            with contextlib.suppress(OSError, ValueError):
                newest = newest_checkpoint(storage)
                if newest is not None:
                    self._newest = newest[0].uri(storage.uri)
            if is_last:
                self._has_last.set()
            self._ended.wait(_CHECKPOINT_POLL_S)


class Sender:
    """Send a run to one tracker, until the run has ended and all is sent.

    Args:
        say: shows a message to the user.
        checkpoints: looks for the newest one.
        ended: set when the run has ended.
    """

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        folder: Path,
        say: Callable[[str], None],
        checkpoints: Checkpoints,
        ended: threading.Event,
    ) -> None:
        self.name, self._tracker, self._folder, self._say = name, tracker, folder, say
        self._checkpoints, self._ended = checkpoints, ended
        self.is_done = False

    def run(self) -> None:
        """Send until the end; a failure is a warning, and tried again."""
        pause_s = _POLL_S
        is_away = False
        while not self.is_done:
            try:
                for _ in self._send_until_the_end():
                    if is_away:
                        self._say(f"the tracker {self.name} takes lines again")
                    pause_s = _POLL_S
                    is_away = False
            except Exception as error:
                if not is_away:
                    self._say(
                        f"the tracker {self.name} fails, training goes on, and it gets what it lacks later: "
                        f"{without_secrets(f'{type(error).__name__}: {error}')}"
                    )
                is_away = True
                if self._ended.wait(pause_s):
                    time.sleep(_POLL_S)
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _send_until_the_end(self) -> Any:
        """Yield after each pass over the files that succeeded."""
        shown = self._tracker.open()
        feed = Feed(self._folder, shown)
        noted: dict[str, str] = {}
        while True:
            is_last = self._ended.is_set()  # before the files are read: they hold everything by then
            rows = feed.rows()
            while some := list(itertools.islice(rows, _MAX_ROWS)):
                self._tracker.send(some)
                for row in some:
                    shown.add(row)
            status = read_status(self._folder) if is_last else "running"
            notes = {"status": status or "its driver died", "checkpoint": self._checkpoints.newest(is_last=is_last)}
            notes = {key: value for key, value in notes.items() if value}
            if notes != noted:
                self._tracker.note(notes)
                noted = notes
            if is_last:
                self._tracker.close(status)
                self.is_done = True
            yield
            if is_last:
                return
            self._ended.wait(_POLL_S)


def without_secrets(text: str) -> str:
    """Return the first line of a message without keys and passwords."""
    text = _URL_PASSWORD.sub("://...@", text.strip().partition("\n")[0])
    for name in SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, f"${name}")
    return text[:500]


def send(
    folder: Path, names: list[str], ended: threading.Event, say: Callable[[str], None], finish_s: float
) -> list[str]:
    """Send a run until it has ended; return the trackers that lack something.

    Args:
        finish_s: seconds that trackers get to take the rest after the end.
    """
    with (folder / TRACKERS_LOCK).open("w") as lock:
        # The process of an earlier driver may still send the rest.
        deadline = None
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if ended.is_set():
                deadline = deadline or time.monotonic() + finish_s
                if time.monotonic() > deadline:
                    return names
            time.sleep(0.2)
        tracked = as_type(TrackedAs, parse_json((folder / TRACKERS).read_bytes()))
        checkpoints = Checkpoints(folder, ended)
        senders = [Sender(name, ADAPTERS[name](folder, tracked), folder, say, checkpoints, ended) for name in names]
        threads = [threading.Thread(target=sender.run, name=sender.name, daemon=True) for sender in senders]
        for thread in threads:
            thread.start()
        ended.wait()
        deadline = time.monotonic() + finish_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [sender.name for sender in senders if not sender.is_done]


def _check(name: str) -> str:
    try:
        _CHECKS.get(name, lambda: None)()
    except Exception as error:
        return without_secrets(f"{type(error).__name__}: {error}")
    return ""


def main() -> None:
    """Send, or check; end at once afterwards, whatever threads still do."""
    # Libraries print to standard output; the driver reads only what is said here.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # a failure is tried again here
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")

    def say(text: str) -> None:
        with contextlib.suppress(OSError):  # the driver may be gone
            lines.write(json.dumps({"text": text}) + "\n")

    first, *others = sys.argv[1:]
    if first == "--check":
        for name in others:
            if problem := _check(name):
                say(f"{name}: {problem}")
        os._exit(0)
    os.nice(10)  # training first
    ended = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.buffer.read()
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    finish_s = float(others[0])
    behind = send(Path(first), others[1:], ended, say, finish_s)
    if behind:
        say(f"after {finish_s:.0f} s the trackers {', '.join(behind)} lack figures of the run")
    os._exit(1 if behind else 0)


if __name__ == "__main__":
    main()
