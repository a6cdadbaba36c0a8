"""Reads a run folder for its page.

Any file may be missing, cut short or older than the others: a run can stop before its first evaluation, or die after a
resume and leave the summary of an earlier attempt. So the newest evaluation file overrides the summary. Every figure
is optional.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import yaml

from sigray.orchestrator.config import ConfigError
from sigray.orchestrator.run_folder import CONFIG, EVALUATIONS, METRICS, SUMMARY
from sigray.workers.checkpoint.index import read_metrics
from sigray.workers.storage import Storage

_RATE_LINES = 10  # of metrics, whose median speed gives the time left


@dataclass
class RunFiles:
    """The content of a run folder.

    Attributes:
        storage: the folder.
        metrics, evaluations: by step.
        unreadable: names of files that could not be read.
        is_driven: whether a driver has the run now; False for a written page.
    """

    storage: Storage
    name: str
    config_text: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]
    unreadable: list[str]
    is_driven: bool = False

    @property
    def newest(self) -> dict[str, Any]:
        """The newest evaluation; the summary's figures if no evaluation file exists."""
        return self.evaluations[-1] if self.evaluations else self.summary

    @property
    def newest_line(self) -> dict[str, Any]:
        """The newest line of metrics, empty before the first."""
        return self.metrics[-1] if self.metrics else {}

    @property
    def zero_shot(self) -> dict[str, dict[str, Any]]:
        return find_dict(self.newest, "zero_shot")

    @property
    def retrieval(self) -> dict[str, dict[str, Any]]:
        return find_dict(self.newest, "retrieval")

    @property
    def samples_seen(self) -> int:
        return int(max(find_number(source, "samples_seen") or 0 for source in (self.summary, self.newest_line)))

    @property
    def step(self) -> int:
        """Steps done."""
        return int(max(find_number(self.summary, "steps") or 0, find_number(self.newest_line, "step") or 0))

    @property
    def left_s(self) -> float | None:
        """Seconds to the end at the speed of the newest lines.

        Pauses for checkpoints and restarts do not count.
        """
        rates = [find_number(line, "throughput/samples_per_s") or 0 for line in self.metrics[-_RATE_LINES:]]
        rate = median(rates) if rates else 0
        planned = self.planned_samples
        return max(planned - self.samples_seen, 0) / rate if planned and rate else None

    @property
    def global_batch_size(self) -> int | None:
        sources = ((self.summary, "facts"), (self.config, "train"))
        sizes = (find_number(source, section, "global_batch_size") for source, section in sources)
        return next((int(size) for size in sizes if size), None)

    @property
    def planned_samples(self) -> int | None:
        """Length of the whole run, in whole steps."""
        steps = find_number(self.summary, "facts", "num_steps")
        batch = self.global_batch_size
        if steps and batch:
            return int(steps * batch)
        wanted = find_number(self.config, "train", "num_samples")
        return math.ceil(wanted / batch) * batch if wanted and batch else None

    @property
    def status(self) -> str:
        """The summary's status; "unfinished" if no summary covers the newest metrics.

        While a driver has the run: "running", or "starting" before the first line.
        """
        if self.is_driven:
            return "running" if self.metrics else "starting"
        is_stale = (find_number(self.summary, "steps") or 0) < self.step
        return "unfinished" if is_stale else find_text(self.summary, "status") or "unfinished"

    def baseline(self, name: str) -> float | None:
        """Return the top-1 of the pixel nearest neighbour.

        It does not depend on the checkpoint, so any file may have it.
        """
        sources = (*reversed(self.evaluations), self.summary)
        values = (find_number(source, "zero_shot", name, "pixel_baseline_top1") for source in sources)
        return next((value for value in values if value is not None), None)


def read_run_files(storage: Storage) -> RunFiles:
    """Read a run folder, locally or in S3.

    Raises:
        ConfigError: if the folder holds no file of a run.
    """
    unreadable: list[str] = []

    def text(path: str) -> str:
        try:
            return storage.read(path).decode("utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def load(path: str, parse: Callable[[str], Any]) -> dict[str, Any]:
        try:
            content = parse(storage.read(path).decode("utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, yaml.YAMLError):
            content = None
        if not isinstance(content, dict):
            unreadable.append(path)
            return {}
        return content

    files = [f"{EVALUATIONS}/{name}" for name in storage.list(EVALUATIONS) if name.endswith(".json")]
    if not files and not any(storage.exists(name) for name in (CONFIG, METRICS, SUMMARY)):
        raise ConfigError(
            f"{storage.uri} is not a run: it holds no {CONFIG}. Give the local folder that `sigray train` named"
        )
    config = load(CONFIG, yaml.safe_load)
    summary = load(SUMMARY, json.loads)
    evaluations = [content for file in files if (content := load(file, json.loads))]
    lines = _lines(text(METRICS))
    if not storage.is_local:  # metrics.jsonl comes at the end; each checkpoint brings the lines before it
        known = {line.get("step") for line in lines}
        lines += [line for line in read_metrics(storage) if line["step"] not in known]
        lines.sort(key=lambda line: line["samples_seen"])
    return RunFiles(
        storage=storage,
        name=find_text(summary, "name") or find_text(config, "run", "name") or storage.uri.rpartition("/")[2],
        config_text=text(CONFIG),
        config=config,
        metrics=lines,
        evaluations=sorted(evaluations, key=lambda evaluation: find_number(evaluation, "step") or 0),
        summary=summary,
        unreadable=unreadable,
    )


def _lines(text: str) -> list[dict[str, Any]]:
    """Return the lines of metrics without a line that a crash cut short."""
    lines = []
    for each in text.splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(each))
    return [line for line in lines if find_number(line, "samples_seen") is not None]


def _find(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def find_number(content: Any, *keys: str) -> float | None:
    """Return the finite number at a path of keys, None if there is none."""
    value = _find(content, *keys)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def find_text(content: Any, *keys: str) -> str | None:
    """Return the non-empty text, or number, at a path of keys."""
    value = _find(content, *keys)
    return str(value) if isinstance(value, str | int | float) and value != "" else None


def find_dict(content: Any, *keys: str) -> dict[str, Any]:
    value = _find(content, *keys)
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def find_list(content: Any, *keys: str) -> list[Any]:
    value = _find(content, *keys)
    return value if isinstance(value, list) else []
