"""Read what a run records for trackers: figures by step, held-out images.

A step has one line in metrics.jsonl, and a line never changes: a restart that repeats the step adds none
(`RunFolder.append_metrics`). So a tracker that shows each line once shows the figures of the file.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sigray.orchestrator.run_folder import EVALUATIONS, METRICS, SUMMARY
from sigray.workers.checkpoint.index import metrics_line
from sigray.workers.parse import ParseError, parse_json

_TASKS = ("zero_shot", "retrieval", "linear_probe")
_OF_EVALUATION = re.compile(rf"(without_ema_)?({'|'.join(_TASKS)})_|images/")
_UNUSABLE = re.compile(r"[^A-Za-z0-9_.\- ]")  # in a name; MLflow takes no other characters
_MAX_IMAGES = 8  # of each held-out set


def is_of_evaluation(key: str) -> bool:
    """Return whether a tracker's key is that of an evaluation's figure or images."""
    return _OF_EVALUATION.match(key) is not None


@dataclass(frozen=True)
class Image:
    """A held-out image.

    Attributes:
        png: content of the file.
        truth: its right name, or its own captions.
        best: the names with the largest cosines, the best first; then what a decoder wrote.
    """

    png: bytes
    truth: str
    best: list[str]


@dataclass(frozen=True)
class Row:
    """The figures of one line of metrics.jsonl, or of one evaluation.

    Attributes:
        figures: by key; those of an evaluation as `zero_shot_SET/top1`.
        images: of an evaluation, by key as `images/SET`.
    """

    step: int
    samples_seen: int
    figures: dict[str, float]
    images: dict[str, list[Image]] = field(default_factory=dict)
    is_evaluation: bool = False


@dataclass
class Shown:
    """What a tracker has of a run.

    Attributes:
        samples_seen: of the newest line; -1 without one.
        evaluations: samples seen and key of each figure, and of each set of images.
    """

    samples_seen: int = -1
    evaluations: set[tuple[int, str]] = field(default_factory=set)

    def add(self, row: Row) -> None:
        if row.is_evaluation:
            self.evaluations |= {(row.samples_seen, key) for key in (*row.figures, *row.images)}
        else:
            self.samples_seen = max(self.samples_seen, row.samples_seen)

    def add_keys(self, samples_seen: int, keys: list[str]) -> None:
        """Add what a tracker tells: keys that it has for a count of samples."""
        of_evaluation = {(samples_seen, key) for key in keys if is_of_evaluation(key)}
        self.evaluations |= of_evaluation
        if not of_evaluation:
            self.samples_seen = max(self.samples_seen, samples_seen)


class Feed:
    """Read a run's folder again and again, each time only what is new.

    Args:
        folder: of the run.
        shown: what the tracker has already.
    """

    def __init__(self, folder: Path, shown: Shown) -> None:
        self._folder, self._shown = folder, shown
        self._file: tuple[int, int] | None = None  # inode and offset in metrics.jsonl
        self._read: dict[str, float] = {}  # when each file of an evaluation was written

    def rows(self) -> Iterator[Row]:
        """Yield what the tracker lacks, lines first. The caller adds each row to `shown`."""
        for line in self._new_lines():
            if line["samples_seen"] > self._shown.samples_seen:
                figures = {key: float(value) for key, value in line.items() if "/" in key}
                yield Row(int(line["step"]), int(line["samples_seen"]), figures)
        for path in sorted((self._folder / EVALUATIONS).glob("step-*.json")):
            written = path.stat().st_mtime
            if self._read.get(path.name) != written:
                row = self._evaluation(path)
                if row is not None and (row.figures or row.images):
                    yield row
                self._read[path.name] = written

    def _new_lines(self) -> Iterator[dict[str, float]]:
        """Yield the lines that were not read yet; all of them if the file is another one."""
        path = self._folder / METRICS
        if not path.exists():
            return
        with path.open("rb") as file:
            inode = path.stat().st_ino
            begin = self._file[1] if self._file is not None and self._file[0] == inode else 0
            file.seek(begin)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # half written
                begin += len(line)
                try:
                    parsed = metrics_line(line)
                except ParseError:
                    parsed = {}
                if "samples_seen" in parsed:
                    yield parsed
                self._file = inode, begin

    def _evaluation(self, path: Path) -> Row | None:
        try:
            content = parse_json(path.read_bytes())
            step, samples_seen = int(content["step"]), int(content["samples_seen"])
        except (ParseError, KeyError, TypeError, ValueError):
            return None
        figures: dict[str, float] = {}
        for which, figures_of in (("", content), ("without_ema_", content.get("without_ema") or {})):
            for task in _TASKS:
                for name, found in (figures_of.get(task) or {}).items():
                    figures |= {
                        f"{which}{task}_{_UNUSABLE.sub('_', name)}/{key}": float(value)
                        for key, value in found.items()
                        if not key.startswith("num_") and isinstance(value, int | float)
                    }
        images = {
            f"images/{_UNUSABLE.sub('_', name)}": _images(of) for name, of in (content.get("sheets") or {}).items()
        }
        known = {key for seen, key in self._shown.evaluations if seen == samples_seen}
        return Row(
            step,
            samples_seen,
            {key: value for key, value in figures.items() if key not in known},
            {key: found for key, found in images.items() if found and key not in known},
            is_evaluation=True,
        )


def _images(entries: list[dict[str, Any]]) -> list[Image]:
    images = []
    for entry in entries[:_MAX_IMAGES]:
        try:
            png = base64.b64decode(entry["png_base64"])
        except (KeyError, TypeError, binascii.Error):
            continue
        truth = entry.get("truth", "; ".join(map(str, entry.get("captions", []))))
        best = [str(best["name"]) for best in entry.get("best", [])]
        best += [f"caption: {entry['caption']}"] if "caption" in entry else []
        images.append(Image(png, str(truth), best))
    return images


def read_status(folder: Path) -> str:
    """Return how a run ended: finished, stopped or failed; empty if its driver died."""
    try:
        return str(parse_json((folder / SUMMARY).read_bytes()).get("status", ""))
    except (OSError, ParseError, AttributeError):
        return ""
