"""Processes of this machine, found in /proc and signalled by pid and start time.

A pid alone may name another process by the time of the signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

EXIT_S = 10.0
"""Seconds that Ray's processes get to end after their driver."""


@dataclass(frozen=True)
class Process:
    """A line of the process table."""

    pid: int
    parent: int
    started: int  # clock ticks since boot; no other process ever has the same pid and start
    state: str  # as ps has it: T is stopped, Z is dead but not yet waited for
    command: str


def read_process(pid: int) -> Process | None:
    """Return one process of this machine, None if it does not exist."""
    try:
        # The name in brackets may hold anything, brackets too.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Process(pid, int(fields[1]), int(fields[19]), fields[0], command)


def is_alive(process: Process) -> bool:
    """Return whether this process, not a later one with its pid, is alive."""
    now = read_process(process.pid)
    return now is not None and now.started == process.started and now.state != "Z"


def descendants(processes: Mapping[int, Process], ancestors: set[int]) -> set[int]:
    """Return the pids of the ancestors and of all their descendants."""
    family = set(ancestors)
    while grown := {pid for pid, process in processes.items() if process.parent in family} - family:
        family |= grown
    return family


class Family:
    """A process and its descendants, which it still knows after a parent's death.

    The children of a dead process get another parent.

    Args:
        pid: of a child of this process.
    """

    def __init__(self, pid: int) -> None:
        self._known = {pid: process} if (process := read_process(pid)) else {}

    def look(self) -> list[Process]:
        """Return the live members.

        Call it often: a process that starts and loses its parent between two calls stays unknown.
        """
        found = (read_process(int(entry)) for entry in os.listdir("/proc") if entry.isdigit())
        now = {process.pid: process for process in found if process is not None}
        before = {pid for pid, process in self._known.items() if pid in now and now[pid].started == process.started}
        self._known = {pid: now[pid] for pid in descendants(now, before) if pid in now and now[pid].state != "Z"}
        return sorted(self._known.values(), key=lambda process: process.pid)

    def kill(self) -> None:
        """Kill all live members."""
        deadline = time.monotonic() + EXIT_S
        while (alive := self.look()) and time.monotonic() < deadline:
            for process in alive:
                send(process, signal.SIGKILL)
            time.sleep(0.05)


def send(process: Process, number: signal.Signals) -> bool:
    """Signal a process, never a later one with its pid; return whether it existed."""
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(process.pid)
        try:
            if is_alive(process):  # checked after the handle was opened, so the handle names this process
                signal.pidfd_send_signal(handle, number)
                return True
        finally:
            os.close(handle)
    return False
