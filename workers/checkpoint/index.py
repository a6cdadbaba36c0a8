"""The checkpoints of a run and their lines of metrics, without torch.

`workers/checkpoint/writer.py` documents the files. A report page, or a command on a laptop, would need seconds and
half a gigabyte to import torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from sigray.workers.parse import Count, ParseError, as_type, parse_json
from sigray.workers.storage import Storage

FOLDER = "checkpoints"
METRICS_FOLDER = "metrics"
COMMIT = "commit.json"
EMA_FILE = "ema.safetensors"
_METRICS_NAME = re.compile(r"\d{10}-(\d{10})\.jsonl")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files differ from the committed ones; an older one may work."""


@dataclass(frozen=True)
class CheckpointInfo:
    """Content of commit.json."""

    name: str
    step: Count  # steps done
    samples_seen: Count
    files: dict[str, dict[str, Any]]  # name -> bytes, xxh3_128
    model: dict[str, Any]  # the run's model section

    @property
    def has_ema(self) -> bool:
        """Whether the checkpoint holds an average of the weights beside the last ones."""
        return EMA_FILE in self.files

    def uri(self, storage_uri: str) -> str:
        """Return the checkpoint's folder in the storage of its run."""
        return f"{storage_uri}/{FOLDER}/{self.name}"


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
        info = as_type(CheckpointInfo, parse_json(storage.read(f"{FOLDER}/{name}/{COMMIT}")))
        if info.name != name:
            raise ParseError(f"{COMMIT} is of {info.name!r}")
        as_type(_Model, info.model)
    except (FileNotFoundError, ParseError) as error:
        raise DamagedCheckpoint(f"{storage.uri}/{FOLDER}/{name} is not a complete checkpoint: {error}") from error
    return info


@dataclass(frozen=True)
class _Model:
    locked: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Position:
    step: Count


def metrics_line(text: bytes | str) -> dict[str, float]:
    """Return a line of metrics; raise ParseError for another content."""
    line = parse_json(text)
    as_type(_Position, line)
    return line


def read_metrics(
    storage: Storage, last_step: float = math.inf, after: float = -1, max_files: int | None = None
) -> list[dict[str, float]]:
    """Lines of metrics saved with the checkpoints up to a step.

    Args:
        after: leave out the lines up to this step, and files without others.
        max_files: read only so many files, the newest.

    Raises:
        CheckpointError: names the file with another content.
    """
    lines: dict[int, dict[str, float]] = {}
    matches = (_METRICS_NAME.fullmatch(name) for name in storage.list(METRICS_FOLDER))
    names = [match[0] for match in matches if match and after < int(match[1]) <= last_step]
    for name in names[-max_files:] if max_files else names:
        for number, text in enumerate(storage.read(f"{METRICS_FOLDER}/{name}").splitlines(), 1):
            try:
                line = metrics_line(text)
            except ParseError as error:
                raise CheckpointError(f"{storage.uri}/{METRICS_FOLDER}/{name}, line {number}: {error}") from None
            lines[int(line["step"])] = line
    return [lines[step] for step in sorted(lines) if step > after]


def committed_names(storage: Storage) -> list[str]:
    """Names of the folders with a commit.json, oldest first."""
    return [name for name in storage.list(FOLDER) if storage.exists(f"{FOLDER}/{name}/{COMMIT}")]
