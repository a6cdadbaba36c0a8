"""Programs of a user's that call `ray.init`: tried again if Ray does not start.

Ray 2.60 gives a raylet 30 seconds, without a setting. Two tests at once, each with clusters, may need more.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

TOO_SLOW = "The current node timed out during startup"
_NUM_TRIES = 3


def start_program(start: Callable[[], subprocess.Popen[str]], log: Path, begun: str) -> subprocess.Popen[str]:
    """Start a program that appends to a log; return it once its Ray is up, or it has failed for another reason.

    Args:
        begun: what the program writes after its Ray is up.
    """
    for number in range(_NUM_TRIES):
        size = log.stat().st_size if log.exists() else 0
        process = start()
        while process.poll() is None and begun not in _since(log, size):
            time.sleep(0.1)
        if process.poll() is None or TOO_SLOW not in _since(log, size) or number == _NUM_TRIES - 1:
            break
    return process


def run_program(run: Callable[[], subprocess.CompletedProcess[str]]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, again if its Ray did not start."""
    for _ in range(_NUM_TRIES):
        done = run()
        if TOO_SLOW not in done.stderr:
            break
    return done


def _since(log: Path, size: int) -> str:
    return log.read_bytes()[size:].decode(errors="replace") if log.exists() else ""
