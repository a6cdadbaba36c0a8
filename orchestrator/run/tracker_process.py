"""Check trackers; start and end the process that sends a run to them.

Nothing here waits for a tracker while the run trains.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sigray
from sigray.orchestrator.config import ConfigError, TrackerName
from sigray.orchestrator.run.signals import blocked_for_children
from sigray.orchestrator.run_folder import RunFolder
from sigray.workers.parse import ParseError, parse_json

_LIBRARIES = ("wandb", "mlflow", "trackio")  # importable names, and those of the extras
_CHECK_S = 120.0  # on a busy machine, imports alone take half a minute
_FINISH_S = 60.0
_KILL_S = 5.0  # after the time that the process allows itself
_MAX_RESTARTS = 10  # in a row
_LIVED_S = 600.0  # after which a death is no longer one in a row
_QUIET_S = 2.0  # of waiting, before the run says for what it waits
_MODULE = "sigray.orchestrator.trackers.sender"


def check_trackers(names: list[TrackerName]) -> None:
    """Check that the libraries of trackers are here, and that their servers answer.

    Raises:
        ConfigError: names the tracker and the remedy.
    """
    for name in names:
        if name in _LIBRARIES and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"run.trackers: {name} needs a library that is not installed: pip install 'sigray[{name}]', or leave "
                "it out"
            )
    away = [name for name in names if name in _LIBRARIES]
    if not away:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-m", _MODULE, "--check", *away],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_CHECK_S,
            env=_environment(),
        )
        problems = [parse_json(line)["text"].rstrip(".") for line in done.stdout.splitlines()]
        if done.returncode:
            problems.append(f"{', '.join(away)}: the check ended with code {done.returncode}")
    except subprocess.TimeoutExpired:
        problems = [f"{', '.join(away)}: no answer within {_CHECK_S:.0f} s"]
    if problems:
        raise ConfigError(
            "run.trackers: " + "; ".join(problems) + ". Set its variables (docs/trackers.md), or leave it out"
        )


class TrackerProcess:
    """The process that sends a run to its trackers; restarted if it dies.

    Args:
        say: shows a message; called from a thread.
        folder: of the run, which has its config.
        name, group: as `TrackedAs`.
        finish_s: seconds that trackers get to take the rest after the end of the run.
    """

    def __init__(
        self,
        folder: RunFolder,
        names: list[TrackerName],
        say: Callable[[str], None],
        *,
        name: str,
        group: str = "",
        finish_s: float = _FINISH_S,
    ) -> None:
        self._finish_s = finish_s
        self._path = folder.path
        self._say = say
        self._names = list(dict.fromkeys(names))
        self._ended = threading.Event()
        self._is_over = False  # the process gets no more time
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        folder.tracked_as(name, group)
        self._thread = threading.Thread(target=self._keep_running, name="trackers", daemon=True)
        if self._names:
            self._thread.start()

    def _keep_running(self) -> None:
        """Start the process, pass on what it says, and start it again if it was killed."""
        deaths = 0
        while True:
            began = time.monotonic()
            with self._lock:
                process = self._process = _start(self._path, self._finish_s, self._names)
                if self._ended.is_set():
                    _close_input(process)
            assert process.stdout is not None
            for line in process.stdout:
                with contextlib.suppress(ParseError, KeyError, TypeError):
                    self._say(parse_json(line)["text"])
            code = process.wait()
            if self._is_over or (code >= 0 and self._ended.is_set()):
                return
            deaths = 1 if time.monotonic() - began > _LIVED_S else deaths + 1
            if deaths > _MAX_RESTARTS:
                self._say(f"the process of the trackers died {deaths} times: trackers get nothing more: {self._remedy}")
                return
            self._say(f"the process of the trackers died (code {code}): starting it again")
            self._ended.wait(min(60.0, 2.0**deaths))

    @property
    def _remedy(self) -> str:
        return f"`sigray track {self._path}` sends what they lack"

    def __enter__(self) -> TrackerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        is_hurried = kind is not None and issubclass(kind, KeyboardInterrupt)  # the second signal
        self.finish(waits=not is_hurried)

    def finish(self, *, waits: bool = True) -> bool:
        """Let the process send the rest, and end it after a time; Ctrl-C ends the wait.

        Returns:
            Whether the trackers have everything.
        """
        self._ended.set()
        with self._lock:
            if self._process is not None:
                _close_input(self._process)
        if not self._names or not waits:
            return not self._names  # the process ends by itself
        try:
            self._thread.join(_QUIET_S)
            if self._thread.is_alive():
                self._say(f"waiting for the trackers ({', '.join(self._names)}), at most {self._finish_s:.0f} s")
                self._thread.join(self._finish_s + _KILL_S)
        except KeyboardInterrupt:
            self._say("not waiting for the trackers")
        self._is_over = True
        process = self._process
        if self._thread.is_alive() and process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        is_done = process is not None and process.poll() == 0
        if not is_done:
            self._say(f"trackers may lack figures of the run: {self._remedy}")
        return is_done


def _start(folder: Path, finish_s: float, names: Sequence[str]) -> subprocess.Popen[bytes]:
    with blocked_for_children():
        return subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(folder), str(finish_s), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # of libraries, which may print what is secret
            start_new_session=True,
            env=_environment(),
        )


def _environment() -> dict[str, str]:
    """Return variables with which the process imports this sigray, in any folder."""
    paths = [str(Path(sigray.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _close_input(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
