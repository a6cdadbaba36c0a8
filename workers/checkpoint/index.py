"""Which checkpoints a run has, and the lines of metrics that were saved with them; docs of the files: checkpoint.py.

Imports no torch: the page of a run, or a look from a laptop, would spend seconds and half a gigabyte on it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from sigray.workers.storage import Storage

FOLDER, METRICS_FOLDER, COMMIT = "checkpoints", "metrics", "commit.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files are not those that were committed: an older one may do."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What commit.json says."""

    name: str
    step: int  # steps done
    samples_seen: int
    files: dict[str, dict[str, Any]]  # name -> bytes, xxh3_128
    model: dict[str, Any]  # the run's model section


def list_checkpoints(storage: Storage) -> list[CheckpointInfo]:
    """The committed checkpoints of a run, oldest first; without those whose commit.json is damaged."""
    infos = []
    for name in committed_names(storage):
        try:
            infos.append(read_info(storage, name))
        except DamagedCheckpoint:
            continue
    return sorted(infos, key=lambda info: info.step)


def newest_checkpoint(storage: Storage) -> tuple[CheckpointInfo, float] | None:
    """The newest committed checkpoint whose commit.json can be read, and when it was committed, in Unix time."""
    for name in reversed(storage.list(FOLDER)):
        written = storage.modified(f"{FOLDER}/{name}/{COMMIT}")
        if written is not None:
            try:
                return read_info(storage, name), written
            except DamagedCheckpoint:
                continue
    return None


def is_committed(storage: Storage, info: CheckpointInfo) -> bool:
    """Whether a checkpoint is there, and not deleted since."""
    return storage.exists(f"{FOLDER}/{info.name}/{COMMIT}")


def read_info(storage: Storage, name: str) -> CheckpointInfo:
    """commit.json of a checkpoint.

    Raises:
        DamagedCheckpoint: where it is not there or not readable.
    """
    try:
        return CheckpointInfo(**json.loads(storage.read(f"{FOLDER}/{name}/{COMMIT}")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise DamagedCheckpoint(f"{storage.uri}/{FOLDER}/{name} is not a complete checkpoint: {error}") from error


def read_metrics(storage: Storage, last_step: float = math.inf) -> list[dict[str, float]]:
    """The lines of metrics of a run up to a checkpoint, as they were saved with it and those before."""
    lines: dict[int, dict[str, float]] = {}
    for name in storage.list(METRICS_FOLDER):
        if int(name[11:21]) <= last_step:
            for line in storage.read(f"{METRICS_FOLDER}/{name}").splitlines():
                content = json.loads(line)
                lines[int(content["step"])] = content
    return [lines[step] for step in sorted(lines)]


def committed_names(storage: Storage) -> list[str]:
    """Oldest first."""
    return [name for name in storage.list(FOLDER) if storage.exists(f"{FOLDER}/{name}/{COMMIT}")]
