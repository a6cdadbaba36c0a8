"""Reads a run folder for its page.

Any file may be missing, cut short or older than the others: a run can stop before its first evaluation, or die after a
resume and leave the summary of an earlier attempt. So the newest evaluation file overrides the summary. Every figure
is optional.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from sigray.orchestrator.config import ConfigError
from sigray.orchestrator.reports.foreign_folder import MAX_BYTES, ForeignFolder
from sigray.orchestrator.run_folder import CONFIG, EVALUATIONS, EVENTS, METRICS, PENDING, SUMMARY
from sigray.workers.checkpoint.index import CheckpointError, CheckpointInfo, read_metrics
from sigray.workers.parse import ParseError, parse_json, parse_yaml

_RATE_LINES = 10  # of metrics, whose median speed gives the time left
_LINE_BYTES = 64 << 10  # at most; the list reads no more of metrics and events
_LIST_PIECES = 16  # of the metrics, for a curve of the whole run
_LIST_FILES = 8  # of lines beside checkpoints
_LIST_EVALUATION_BYTES = 4 << 20  # with its images
_EVENTS_BYTES = 1 << 20
_MAX_EVALUATIONS = 1000
_MAX_SETS = 20  # of an evaluation; each has charts
_MAX_TEXT = 300  # characters of a name
_MAX_PROBLEMS = 10
_LARGEST = 1e100  # a larger number is none: arithmetic with it would overflow


@dataclass
class RunFiles:
    """The content of a run folder.

    Attributes:
        storage: the folder.
        metrics, evaluations: by step.
        events: the newest first, each with time, kind and text.
        unreadable: sentences on what could not be read.
        is_driven: whether a driver has the run now; False for a written page.
        checkpoint: the newest one and its Unix time; None for a written page.
    """

    storage: ForeignFolder
    name: str
    config_text: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]
    events: list[dict[str, Any]]
    unreadable: list[str]
    is_driven: bool = False
    checkpoint: tuple[CheckpointInfo, float] | None = None

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
        return sets_of(self.newest, "zero_shot")

    @property
    def retrieval(self) -> dict[str, dict[str, Any]]:
        return sets_of(self.newest, "retrieval")

    @property
    def samples_seen(self) -> int:
        if self._is_summed_up:
            return int(find_number(self.summary, "samples_seen") or 0)
        counts = (find_number(source, "samples_seen") or 0 for source in (self.summary, self.newest_line))
        return int(max(*counts, self.checkpoint[0].samples_seen if self.checkpoint else 0))

    @property
    def step(self) -> int:
        """Steps done; a checkpoint may be newer than the newest line."""
        if self._is_summed_up:
            return int(find_number(self.summary, "steps") or 0)
        done = find_number(self.summary, "steps") or 0, find_number(self.newest_line, "step") or 0
        return int(max(*done, self.checkpoint[0].step if self.checkpoint else 0))

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
    def phases(self) -> list[tuple[int, str]]:
        """Samples after which each phase begins, after the first, and what it changes."""
        listed = find_dict(self.summary, "facts").get("phases")
        found = []
        for phase in listed if isinstance(listed, list) else []:
            step = find_number(phase, "first_step") if isinstance(phase, dict) else None
            if step is not None and self.global_batch_size:
                changes = phase.get("changes")
                text = ", ".join(map(str, changes)) if isinstance(changes, list) else ""
                found.append((int(step) * self.global_batch_size, text))
        return found

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

        While a driver has the run: "running", "starting" before the first line, or "waiting for room".
        """
        if self.is_driven and self.events and self.events[0]["kind"] == PENDING:
            return "waiting for room"
        if self.is_driven:
            return "running" if self.samples_seen else "starting"
        return (find_text(self.summary, "status") or "unfinished") if self._is_summed_up else "unfinished"

    @property
    def _is_summed_up(self) -> bool:
        """Whether the summary covers the newest line and checkpoint.

        A run that stopped while it repeated steps has lines of later steps.
        """
        steps = find_number(self.summary, "steps") or 0
        covered = max(steps, find_number(self.summary, "last_line_step") or 0)
        has_all_lines = covered >= (find_number(self.newest_line, "step") or 0)
        return not self.is_driven and has_all_lines and (not self.checkpoint or steps >= self.checkpoint[0].step)

    def baseline(self, name: str) -> float | None:
        """Return the top-1 of the pixel nearest neighbour.

        It does not depend on the checkpoint, so any file may have it.
        """
        sources = (*reversed(self.evaluations), self.summary)
        values = (find_number(source, "zero_shot", name, "pixel_baseline_top1") for source in sources)
        return next((value for value in values if value is not None), None)


def read_run_files(storage: ForeignFolder, *, for_list: bool = False) -> RunFiles:
    """Read a run folder, locally or in S3.

    Args:
        for_list: read only what an entry of the list shows: some of the metrics, the newest evaluation.

    Raises:
        ConfigError: if the folder holds no file of a run.
    """
    unreadable: list[str] = []

    @contextlib.contextmanager
    def reading(path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            pass
        except (OSError, ParseError, CheckpointError) as error:
            unreadable.append(f"{path} is left out: {error}")

    def load(path: str, parse: Callable[[bytes], Any], max_bytes: int | None = None) -> tuple[dict[str, Any], bytes]:
        text = b""
        with reading(path):
            text = storage.read(path, max_bytes)
            content = parse(text)
            if isinstance(content, dict):
                return content, text
            raise ParseError("a mapping expected")
        return {}, text

    files: list[str] = []
    with reading(EVALUATIONS):
        files = [f"{EVALUATIONS}/{name}" for name in storage.list(EVALUATIONS) if name.endswith(".json")]
    if not files and not any(storage.exists(name) for name in (CONFIG, METRICS, SUMMARY)):
        raise ConfigError(
            f"{storage.uri} is not a run: it holds no {CONFIG}. Give the local folder that `sigray train` named"
        )
    config, config_text = load(CONFIG, parse_yaml)
    summary, _ = load(SUMMARY, parse_json, None if for_list else MAX_BYTES)
    lines: list[Any] = []
    with reading(METRICS):
        lines, left_out = read_lines(storage, for_list=for_list)
        if left_out and not for_list:
            unreadable.append(f"{METRICS}: its first {left_out:,} bytes are left out")
    with reading("metrics"):  # metrics.jsonl comes to a storage at the end; each checkpoint brings the lines before it
        step = (find_number(lines[-1], "step") or 0) if lines else -1
        saved = read_metrics(storage, after=step, max_files=_LIST_FILES if for_list else None)
        lines += [line for line in saved if find_number(line, "samples_seen") is not None]
    events = []
    with reading(EVENTS):
        for event in parsed_lines(storage.read_lines(EVENTS, _LINE_BYTES if for_list else _EVENTS_BYTES)[0]):
            at, kind, text = find_number(event, "time"), find_text(event, "kind"), find_text(event, "text")
            if at is not None and kind and text:
                events.append({"time": at, "kind": kind, "text": text})
    most, max_bytes = (1, _LIST_EVALUATION_BYTES) if for_list else (_MAX_EVALUATIONS, MAX_BYTES)
    if len(files) > most > 1:
        unreadable.append(f"{EVALUATIONS}: only {_MAX_EVALUATIONS:,} of {len(files):,} files are read")
    # The newest first: the bound of all bytes leaves out the oldest.
    evaluations = [content for file in files[: -most - 1 : -1] if (content := load(file, parse_json, max_bytes)[0])]
    if len(unreadable) > _MAX_PROBLEMS:
        unreadable[_MAX_PROBLEMS:] = [f"{len(unreadable) - _MAX_PROBLEMS:,} more are left out"]
    name = find_text(summary, "name") or find_text(config, "run", "name") or storage.uri.rpartition("/")[2]
    return RunFiles(
        storage=storage,
        name=name[:_MAX_TEXT],
        config_text=config_text.decode(errors="replace"),
        config=config,
        metrics=lines,
        evaluations=sorted(evaluations, key=lambda evaluation: find_number(evaluation, "step") or 0),
        summary=summary,
        events=events[::-1],
        unreadable=[text[:_MAX_TEXT] for text in unreadable],
    )


def read_lines(storage: ForeignFolder, *, for_list: bool = False) -> tuple[list[dict[str, Any]], int]:
    """Return lines of metrics, and how many bytes are left out.

    Args:
        for_list: read few lines, evenly spread over the run.
    """
    limits = (_LINE_BYTES, _LIST_PIECES) if for_list else (MAX_BYTES, 1)
    found, left_out = storage.read_lines(METRICS, *limits)
    return [content for content in parsed_lines(found) if find_number(content, "samples_seen") is not None], left_out


def parsed_lines(lines: list[bytes]) -> list[Any]:
    """Return the values of lines of JSON, without a line that a crash cut short."""
    found = []
    for line in lines:
        with contextlib.suppress(ParseError):
            found.append(parse_json(line, max_bytes=_LINE_BYTES))
    return found


def sets_of(evaluation: dict[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """Return the figures of the evaluated sets by name, of the first sets only."""
    figures = list(find_dict(evaluation, task).items())[:_MAX_SETS]
    return {name[:_MAX_TEXT]: found for name, found in figures}


def _find(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def find_number(content: Any, *keys: str) -> float | None:
    """Return the finite number at a path of keys, None if there is none."""
    value = _find(content, *keys)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
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
