"""The files of a run's folder, and when each is written.

    config.yaml          the resolved config                                      at the start
    manifest.json        the shards that the order is computed from               at the start
    metrics.jsonl        one line per log interval                                as they come
    events.jsonl         messages: restarts, warnings, the end                    as they come
    tensorboard/         the same for TensorBoard                                 as they come
    trackers.json        the run's id in its trackers                             at the start
    evaluations/         one JSON per evaluated checkpoint                        as they come
    checkpoints/         unless run.storage says otherwise                        by the training workers
    summary.json         devices and data; outcome and final figures              at the start; at the end
    report.html          the picture of the run                                   at the end

Copies of config.yaml and manifest.json stand beside the checkpoints, so a run can be resumed from its storage alone.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sigray.orchestrator.carried_files import FILES, find_carried, keep_carried
from sigray.orchestrator.config import ConfigError, RunConfig, parse_config, parse_mapping
from sigray.workers.checkpoint.index import metrics_line, newest_checkpoint, read_metrics
from sigray.workers.checkpoint.lease import LEASE_FILE
from sigray.workers.data.manifest import Manifest
from sigray.workers.data.tar import DataError
from sigray.workers.model.inputs import inputs_of
from sigray.workers.parse import ParseError, as_type, parse_json
from sigray.workers.storage import Storage
from sigray.workers.texts import first_ten

CONFIG, MANIFEST, METRICS, SUMMARY = "config.yaml", "manifest.json", "metrics.jsonl", "summary.json"
EVENTS, EVALUATIONS, REPORT = "events.jsonl", "evaluations", "report.html"
TRACKERS = "trackers.json"
TRACKERS_LOCK = "trackers.lock"
PENDING = "pending"  # kind of an event: the run waits for room; the next event of another kind ends that
EXPORTED = (
    "README.md", "config.json", "tokenizer.json", "tokenizer_config.json", "open_clip_config.json",
    "open_clip_model.safetensors", "model.safetensors", "*.onnx", "*.onnx.data", "processor_config.json",
    "preprocessor_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
)  # fmt: skip
_MAX_MANIFEST_BYTES = 1 << 30  # of four million shards


# What a run writes, and Ray Train and the trackers for the run: `--overwrite` deletes nothing else.
WRITTEN = (
    CONFIG, MANIFEST, METRICS, EVENTS, SUMMARY, REPORT, "best_checkpoint.json", "left_out.json", LEASE_FILE,
    "evaluations/step-*.json", "checkpoints/step-*/model.safetensors", "checkpoints/step-*/optimizer.pt",
    "checkpoints/step-*/ema.safetensors", "checkpoints/step-*/commit.json", "metrics/*.jsonl", "ledger/*.parquet",
    "profile/rank-*", "profile/step.png", "profile/ray_timeline.json", "tensorboard/events.out.tfevents.*",
    TRACKERS, TRACKERS_LOCK, "wandb/debug*.log", "wandb/latest-run", "wandb/run-*", "wandb/offline-run-*",
    *(f"export/*/{name}" for name in EXPORTED),
    f"{FILES}/*/*", ".validate_storage_marker", "checkpoint_manager_snapshot.json",
    # These names are of symlinks: the next run must not write to where they point.
    EVALUATIONS, "checkpoints", "checkpoints/step-??????????", "metrics", "ledger", "profile", "tensorboard", "export",
    "wandb",
)  # fmt: skip
_NO_RUN = "--overwrite deletes only what sigray wrote. Choose another name, or move the folder away"


def clear_folder(place: Storage, written: Iterable[str]) -> list[str]:
    """Delete the files of these patterns; return the others.

    The lease stays: the caller holds it. A symlink is deleted, not what it points to.
    """
    pattern = re.compile("|".join(map(fnmatch.translate, written)))
    paths = place.walk()
    # An interrupted write leaves NAME.HEX.tmp.
    ours = {path for path in paths if pattern.match(re.sub(r"\.[0-9a-f]{32}\.tmp$", "", path))}
    place.delete_files(sorted(ours - {LEASE_FILE}))
    return [f"{place.uri}/{path}" for path in paths if path not in ours]


def left_message(paths: list[str]) -> str:
    """Return a sentence about files that were not deleted."""
    return f"files that sigray did not write are left: {first_ten(paths)}"


def check_kind(place: Storage, name: str, sections: set[str]) -> None:
    """Raise ConfigError if a YAML file lacks the sections of its kind."""
    try:
        has = parse_mapping(place.read(name), f"{place.uri}/{name}", "a mapping expected").keys()
    except ConfigError as error:
        raise ConfigError(f"{error}: {_NO_RUN}") from None
    if not sections <= has:
        raise ConfigError(f"{place.uri}/{name} has no {min(sections - has)}: {_NO_RUN}")


def check_inputs(place: Storage, content: Any, key: str = "") -> None:
    """Raise ConfigError if a path of a config is in a folder, also by symlinks."""
    if isinstance(content, dict | list):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        for name, value in pairs:
            check_inputs(place, value, f"{key}.{name}".lstrip("."))
    elif isinstance(content, str) and ("://" in content or os.path.isabs(content)):
        path, folder = (content, place.uri) if "://" in content else map(os.path.realpath, (content, place.uri))
        if f"{path}/".startswith(f"{folder}/"):
            raise ConfigError(f"{key}={content} is in {place.uri}, which --overwrite clears: choose another name")


def evaluation_name(step: int) -> str:
    """Return the file of a checkpoint's evaluation."""
    return f"{EVALUATIONS}/step-{step:010d}.json"


@dataclass(frozen=True)
class TrackedAs:
    """How a run is called in its trackers.

    Attributes:
        id: of this run alone; a run that begins again with --overwrite has another.
        name: of the run; SWEEP/TRIAL for a trial.
        group: the sweep of a trial; empty for other runs.
    """

    id: str
    name: str
    group: str = ""


class RunFolder:
    """The files of one run.

    Args:
        config: names the folder and the storage of the run.

    Attributes:
        path: the local folder.
        storage: holds the checkpoints; the same folder unless run.storage is set.
    """

    def __init__(self, config: RunConfig) -> None:
        self.path = config.folder
        self.storage = Storage(config.storage_uri)
        self._kept_step: float | None = None  # of the last line in metrics.jsonl; None: unread
        self._newest_line: dict[str, float] | None = None

    def is_used(self) -> bool:
        """Return whether a run has begun here."""
        return (self.path / CONFIG).exists() or self.storage.exists(CONFIG)

    def clear(self) -> list[str]:
        """Delete the run without its lease; return the files of something else."""
        return [name for place in self._places() for name in clear_folder(place, WRITTEN)]

    def check_clear(self, config: RunConfig) -> None:
        """Check that `clear` would delete a run, and no input of another.

        Raises:
            ConfigError: names the folder that holds something else.
        """
        for place in self._places():
            check_inputs(place, config.model_dump(mode="json", exclude={"run"}))
            if place.exists(CONFIG):
                check_kind(place, CONFIG, {"run", "data", "train"})
                if not place.exists(MANIFEST):
                    raise ConfigError(f"{place.uri} holds a {CONFIG} but no {MANIFEST}: {_NO_RUN}")

    def _places(self) -> list[Storage]:
        return [self.storage, *([] if str(self.path) == self.storage.uri else [Storage(self.path)])]

    def begin(self, config: RunConfig, manifest: Manifest) -> None:
        """Save manifest and config, locally and with the files of a job in the storage.

        The config comes last, because `is_used` looks for it.
        """
        keep_carried(config.model_dump(mode="json"), self.storage)
        for name, text in {MANIFEST: json.dumps(manifest.to_json()), CONFIG: config.to_yaml()}.items():
            for place in self._places():
                place.write(name, text.encode())

    def tracked_as(self, name: str, group: str) -> TrackedAs:
        """Return how trackers call the run: as before, else by a new id that is saved.

        Args:
            name, group: of a run that has no id yet.
        """
        tracked = TrackedAs(uuid.uuid4().hex[:16], name, group)
        for place in reversed(self._places()):
            with contextlib.suppress(FileNotFoundError, ParseError):
                tracked = as_type(TrackedAs, parse_json(place.read(TRACKERS)))
        for place in self._places():
            place.write(TRACKERS, json.dumps(asdict(tracked)).encode())
        return tracked

    def remove_if_empty(self) -> None:
        """Delete folders in which a failed start left nothing."""
        for place in self._places():
            place.remove_if_empty()

    def saved_config(self) -> RunConfig:
        """Return the config of the run that has begun here.

        Raises:
            ConfigError: another storage holds its checkpoints.
        """
        if not self.storage.exists(CONFIG):
            saved = read_run(str(self.path))
            raise ConfigError(
                f"{self.path} holds a run of this name with checkpoints in {saved.storage_uri}, and "
                f"{self.storage.uri} holds none: set run.storage as it was, copy the files there first, choose another "
                "run.name, or start again with --overwrite"
            )
        return read_run(self.storage.uri)

    def finished_summary(self, config: RunConfig, *, at_start: bool) -> dict[str, Any] | None:
        """Return the summary of a run to which its config adds nothing; None otherwise.

        The newest checkpoint and its evaluation must be there, with `at_start` also that of the initial weights.
        """
        newest = newest_checkpoint(self.storage)
        if newest is None or newest[0].samples_seen < config.train.num_samples:
            return None
        steps = {newest[0].step, *([0] if at_start else [])} if config.eval.sets else set()
        if any(not any(each.exists(evaluation_name(step)) for each in self._places()) for step in steps):
            return None
        summary = self.summary()
        return summary if summary.get("status") == "finished" else None

    def summary(self) -> dict[str, Any]:
        """Return the content of summary.json, empty without a readable one."""
        place = next((place for place in self._places() if place.exists(SUMMARY)), None)
        try:
            summary = parse_json(place.read(SUMMARY)) if place else {}
        except ParseError:
            return {}
        return summary if isinstance(summary, dict) else {}

    def manifest(self) -> Manifest:
        """Return the manifest that the run began with.

        Raises:
            DataError: for a file with another content.
        """
        content = self.storage.read(MANIFEST)
        try:
            return Manifest.from_json(parse_json(content, max_bytes=_MAX_MANIFEST_BYTES))
        except ParseError as error:
            raise DataError(f"{self.storage.uri}/{MANIFEST}: {error}") from None

    def append_metrics(self, metrics: dict[str, float]) -> None:
        """Append a line of metrics, unless its step has one.

        A restart repeats steps: the loss is the same, the times are not. Trackers were sent the first line and cannot
        take it back, so the first line stays here too.
        """
        self._newest_line = metrics
        if self._kept_step is None:
            self._kept_step = max((line["step"] for line in self.metrics()), default=-1)
        if metrics["step"] > self._kept_step:
            self._append(METRICS, metrics)
            self._kept_step = metrics["step"]

    def append_event(self, text: str, kind: str) -> None:
        """Append a message about the run, with its time."""
        self._append(EVENTS, {"time": round(time.time(), 1), "kind": kind, "text": text})

    def _append(self, name: str, line: dict[str, Any]) -> None:
        try:
            with (self.path / name).open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            error.filename = str(self.path / name)  # a write to a full disk names no file
            raise

    def restore_metrics(self, last_step: int) -> None:
        """Add the lines up to a checkpoint that this machine lacks.

        If the driver has moved to another machine, they come from the storage: from a copy of the file, and from the
        checkpoints.
        """
        lines = self.metrics()
        if last_step and (not lines or max(line["step"] for line in lines) < last_step):
            copied = parsed_metrics(self.storage.read(METRICS)) if self.storage.exists(METRICS) else []
            lines = [*read_metrics(self.storage, last_step), *copied, *lines]
        by_step = {line["step"]: line for line in lines}
        lines = [by_step[step] for step in sorted(by_step)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        Storage(self.path).write(METRICS, text.encode())
        self._kept_step = lines[-1]["step"] if lines else -1
        self._newest_line = next((line for line in reversed(lines) if line["step"] <= last_step), {})

    def metrics(self) -> list[dict[str, float]]:
        """Return all lines of metrics, without a line that a crash cut short."""
        path = self.path / METRICS
        return parsed_metrics(path.read_bytes()) if path.exists() else []

    def newest_line(self) -> dict[str, float]:
        """Return the line of the newest step of this attempt; empty before the first.

        Steps that a restart repeats have later lines in the file.
        """
        return (self.metrics() or [{}])[-1] if self._newest_line is None else self._newest_line

    def save_evaluation(self, result: dict[str, Any]) -> None:
        Storage(self.path).write(evaluation_name(result["step"]), json.dumps(result).encode())

    def has_evaluation(self, step: int) -> bool:
        return (self.path / evaluation_name(step)).exists()

    def save_summary(self, summary: dict[str, Any]) -> None:
        Storage(self.path).write(SUMMARY, json.dumps(summary, indent=1).encode())

    def upload_records(self) -> None:
        """Copy the local records to the storage, if it is another folder."""
        if self.storage.uri != str(self.path):
            records = [self.path / name for name in (METRICS, EVENTS, SUMMARY, REPORT)]
            for file in [*records, *(self.path / EVALUATIONS).glob("*.json")]:
                if file.exists():
                    self.storage.upload(file, file.relative_to(self.path).as_posix())


def parsed_metrics(content: bytes) -> list[dict[str, float]]:
    """Return the lines of metrics of a file, without a line that a crash cut short."""
    lines = []
    for line in content.splitlines():
        with contextlib.suppress(ParseError):
            lines.append(metrics_line(line))
    return lines


def read_run(run: str) -> RunConfig:
    """Return the config of a run, given its local folder or its storage URI.

    Raises:
        ConfigError: if the folder holds no run.
    """
    storage = Storage(run)
    try:
        content = storage.read(CONFIG)
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = f" ({error})" if "://" in run else ""  # there may be no such bucket
        raise ConfigError(
            f"{run} is not a run: it holds no {CONFIG}{reason}. Give the folder that `sigray train` printed"
        ) from error
    source = f"{run}/{CONFIG}"
    saved = parse_mapping(content, source, "the config of a run expected")
    config = parse_config(find_carried(saved, lambda: storage), source)
    # A run that began until November 2026 recorded no inputs: it goes on with what was usual then.
    return config.model_copy(update={"model": config.model.model_copy(update=inputs_of(config.model))})
