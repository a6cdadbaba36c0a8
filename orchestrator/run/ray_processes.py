"""The processes of a Ray that a driver starts: marked, and killed.

Each process inherits a mark in its environment, so the processes of one Ray are known also after their parents are
dead. The driver ends them, and its watcher if the driver dies first: a process that runs this file.
The file imports little, so that the watcher starts in 30 ms and takes 9 MB.
"""

import contextlib
import os
import signal
import sys
import time

MARK = "SIGRAY_DRIVER"
_EXIT_TIMEOUT_S = 10.0  # of killed processes


def marked(mark: str) -> list[int]:
    """Return the ids of all live processes that carry a mark."""
    line = f"{MARK}={mark}".encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        # A process that has ended and another user's process show no environment.
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if line in file.read().split(b"\0"):
                found.append(int(name))
    return found


def kill_marked(mark: str) -> None:
    """Kill all processes that carry a mark, and those that they start meanwhile."""
    deadline = time.monotonic() + _EXIT_TIMEOUT_S
    while (pids := marked(mark)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def clean_up(mark: str, folder: str) -> None:
    """Kill all processes that carry a mark, and delete their folder, if they have one."""
    kill_marked(mark)
    if folder:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.read()  # returns when the driver has ended: no other process has the other end
    clean_up(*sys.argv[1:])
