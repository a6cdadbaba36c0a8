"""A run in the background, through as many drivers as it needs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from sigray.orchestrator.chaos.processes import EXIT_S, Family
from sigray.orchestrator.config import ConfigError, RunConfig

_POLL_S = 0.25
_NUM_LOG_LINES = 25  # that an error shows


class LogReader:
    """Reads a run's progress from its output, piece by piece.

    Attributes:
        num_attempts: starts of the training workers.
        num_lines: logged steps, repeated ones included.
        num_in_attempt: logged steps of the newest attempt.
        step: the newest step.
        num_repeated: steps that were logged and are repeated after a restart.
    """

    def __init__(self) -> None:
        self.num_attempts = self.num_lines = self.num_in_attempt = self.step = self.num_repeated = 0
        self._rest = ""

    def feed(self, text: str) -> None:
        """Read the next piece of output; it may end within a line."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            line = line.replace(",", "")
            if match := re.match(r"steps +(\d+) to \d+\s*$", line):
                first_step = int(match[1])
                self.num_attempts += 1
                self.num_repeated += max(0, self.step - first_step)
                self.num_in_attempt = 0
                self.step = first_step
            elif match := re.match(r"step +(\d+)  samples ", line):
                self.num_lines += 1
                self.num_in_attempt += 1
                self.step = int(match[1])


class Supervised:
    """A run whose driver is started again whenever it ends early.

    Args:
        config: of the run.
        command: starts the run and resumes it.
        log: file for its output.
        say: receives a message for every restart.
        stuck_s: give up after so many seconds without a step, an attempt or a fault.
        max_idle_drivers: drivers in a row that may end without a step.

    Attributes:
        family: the live driver's processes.
        reader: the progress so far.
        num_restarts: of the driver.
        left_behind: commands of processes that outlived the last driver.
    """

    def __init__(
        self,
        config: RunConfig,
        command: list[str],
        log: Path,
        say: Callable[[str], None],
        *,
        stuck_s: float,
        max_idle_drivers: int = 3,
    ) -> None:
        self.config = config
        self.reader = LogReader()
        self.num_restarts = 0
        self.left_behind: list[str] = []
        self._command, self._log, self._say = command, log, say
        self._stuck_s, self._max_idle_drivers = stuck_s, max_idle_drivers
        self._num_idle_drivers = 0

    def __enter__(self) -> Supervised:
        self._log.write_text("")
        self._output = self._log.open(errors="replace")
        self._begin = time.monotonic()
        self._start("--overwrite")
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._output.close()

    @property
    def since_s(self) -> float:
        """Seconds since the start of the first driver."""
        return time.monotonic() - self._begin

    def follow(self, until: Callable[[], bool]) -> bool:
        """Follow the run until a condition holds; return False if the run ended before.

        Raises:
            ConfigError: if `sigray train` refuses to start.
            RuntimeError: if the run makes no progress.
        """
        while True:
            self.family.look()
            code = self._process.poll()  # before the output is read: if the driver has ended, its output is complete
            before = self._progress()
            self.reader.feed(self._output.read())
            if self._progress() != before:
                self.touch()
            if code == 0:
                self._end_family()
                return False
            if code is not None:
                self._restart(code)
            elif until():
                return True
            if time.monotonic() - self._touched > self._stuck_s:
                raise RuntimeError(f"the run made no step for {self._stuck_s:.0f} s:\n{self._last_lines()}")
            time.sleep(_POLL_S)

    def touch(self) -> None:
        """Restart the clock of `stuck_s`."""
        self._touched = time.monotonic()

    def kill(self) -> int:
        """Kill the driver and its Ray; return the driver's pid."""
        self.family.look()
        self._process.kill()
        self._process.wait()
        self.family.kill()
        return self._process.pid

    def _start(self, *options: str) -> None:
        hidden = ("RAY_ADDRESS", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        environment |= {"COLUMNS": "160", "TERM": "dumb"}
        with self._log.open("a", buffering=1) as output:
            output.write("" if options else f"\n--- driver {self.num_restarts + 1}\n")
            # A session of its own: Ctrl-C reaches only this process, which then ends the run.
            self._process = subprocess.Popen(
                [*self._command, *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        self.family = Family(self._process.pid)
        self._lines_before = self.reader.num_lines
        self.touch()

    def _restart(self, code: int) -> None:
        self.family.kill()
        is_idle = self.reader.num_lines == self._lines_before
        self._num_idle_drivers = self._num_idle_drivers + 1 if is_idle else 0
        if is_idle and code == 2:
            raise ConfigError(f"`sigray train` refuses (exit code 2):\n{self._last_lines()}")
        if self._num_idle_drivers >= self._max_idle_drivers:
            raise RuntimeError(f"`sigray train` ended with exit code {code}:\n{self._last_lines()}")
        self.num_restarts += 1
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        self._say(f"  the driver {how}; starting it again at step {self.reader.step:,}")
        self._start()

    def _end_family(self) -> None:
        """Wait for Ray's processes to end after the driver; record and kill the rest."""
        deadline = time.monotonic() + EXIT_S
        while (alive := self.family.look()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self.left_behind += [process.command[:120] for process in alive]
        self.family.kill()

    def _progress(self) -> tuple[int, int]:
        return self.reader.num_attempts, self.reader.num_lines

    def _last_lines(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-_NUM_LOG_LINES:]
        return "\n".join([*lines, f"(the end of {self._log})"])
