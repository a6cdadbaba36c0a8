"""Processes of this machine, found by what started them: a test kills only what it started."""

from __future__ import annotations

import subprocess


def descendants_named(ancestor: int, name: str) -> list[int]:
    """Process ids below a process whose command line begins with a name."""
    listing = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(maxsplit=2) for line in listing.splitlines()]
    processes = [(int(pid), int(parent), args) for pid, parent, args in rows]
    family = {ancestor}
    while grown := {pid for pid, parent, _ in processes if parent in family} - family:
        family |= grown
    return [pid for pid, _, args in processes if pid in family and args.startswith(name)]
