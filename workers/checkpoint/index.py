"""The checkpoints of a run and their lines of metrics, without torch.

`workers/checkpoint/writer.py` documents the files. A report page, or a command on a laptop, would need seconds and
half a gigabyte to import torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from sigray.workers.storage import Storage

FOLDER = "checkpoints"
METRICS_FOLDER = "metrics"
COMMIT = "commit.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files differ from the committed ones; an older one may work."""


@dataclass(frozen=True)
class CheckpointInfo:
    """Content of commit.json."""

    name: str
    step: int  # steps done
    samples_seen: int
    files: dict[str, dict[str, Any]]  # name -> bytes, xxh3_128
    model: dict[str, Any]  # the run's model section


def list_checkpoints(storage: Storage) -> list[CheckpointInfo]:
    """Checkpoints of a run with a readable commit.json, oldest first."""
    infos = []
    for name in committed_names(storage):
        try:
            infos.append(read_info(storage, name))
        except DamagedCheckpoint:
            continue
    return sorted(infos, key=lambda info: info.step)


def newest_checkpoint(storage: Storage) -> tuple[CheckpointInfo, float] | None:
    """The newest checkpoint with a readable commit.json, and its Unix time of commit.

    For pages. A resume verifies the files too: `load_newest` of `workers/checkpoint/writer.py`.
    """
    for name in reversed(storage.list(FOLDER)):
        written = storage.modified(f"{FOLDER}/{name}/{COMMIT}")
        if written is not None:
            try:
                return read_info(storage, name), written
            except DamagedCheckpoint:
                continue
    return None


def is_committed(storage: Storage, info: CheckpointInfo) -> bool:
    """Whether a checkpoint is committed, and not deleted since."""
    return storage.exists(f"{FOLDER}/{info.name}/{COMMIT}")


def read_info(storage: Storage, name: str) -> CheckpointInfo:
    """Read commit.json of a checkpoint.

    Raises:
        DamagedCheckpoint: if it is missing or unreadable.
    """
    try:
        return CheckpointInfo(**json.loads(storage.read(f"{FOLDER}/{name}/{COMMIT}")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise DamagedCheckpoint(f"{storage.uri}/{FOLDER}/{name} is not a complete checkpoint: {error}") from error


def read_metrics(storage: Storage, last_step: float = math.inf) -> list[dict[str, float]]:
    """Lines of metrics saved with the checkpoints up to a step."""
    lines: dict[int, dict[str, float]] = {}
    for name in storage.list(METRICS_FOLDER):
        if int(name[11:21]) <= last_step:
            for line in storage.read(f"{METRICS_FOLDER}/{name}").splitlines():
                content = json.loads(line)
                lines[int(content["step"])] = content
    return [lines[step] for step in sorted(lines)]


def committed_names(storage: Storage) -> list[str]:
    """Names of the folders with a commit.json, oldest first."""
    return [name for name in storage.list(FOLDER) if storage.exists(f"{FOLDER}/{name}/{COMMIT}")]
