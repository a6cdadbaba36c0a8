"""The files of a run's folder, and when each is written.

    config.yaml          the resolved config                                      at the start
    manifest.json        the shards that the order is computed from               at the start
    metrics.jsonl        one line per log interval                                as they come
    events.jsonl         messages: restarts, warnings, the end                    as they come
    tensorboard/         the same for TensorBoard                                 as they come
    evaluations/         one JSON per evaluated checkpoint                        as they come
    checkpoints/         unless run.storage says otherwise                        by the training workers
    summary.json         outcome and final figures                                at the end
    report.html          the picture of the run                                   at the end

Copies of config.yaml and manifest.json stand beside the checkpoints, so a run can be resumed from its storage alone.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from typing import Any

from sigray.orchestrator.config import ConfigError, RunConfig, parse_config, parse_mapping
from sigray.workers.checkpoint.index import metrics_line, read_metrics
from sigray.workers.data.manifest import Manifest
from sigray.workers.data.tar import DataError
from sigray.workers.parse import ParseError, as_type, parse_json
from sigray.workers.storage import Storage

CONFIG, MANIFEST, METRICS, SUMMARY = "config.yaml", "manifest.json", "metrics.jsonl", "summary.json"
EVENTS, EVALUATIONS, REPORT = "events.jsonl", "evaluations", "report.html"
_MAX_MANIFEST_BYTES = 1 << 30  # of four million shards


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

    def is_used(self) -> bool:
        """Return whether a run has begun here."""
        return (self.path / CONFIG).exists() or self.storage.exists(CONFIG)

    def clear(self) -> None:
        """Delete the run with its checkpoints."""
        if self.storage.exists(""):
            self.storage.delete_folder("")
        shutil.rmtree(self.path, ignore_errors=True)

    def begin(self, config: RunConfig, manifest: Manifest) -> None:
        """Save config and manifest, locally and beside the checkpoints."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name, text in {CONFIG: config.to_yaml(), MANIFEST: json.dumps(manifest.to_json())}.items():
            (self.path / name).write_text(text)
            self.storage.write(name, text.encode())

    def manifest(self) -> Manifest:
        """Return the manifest that the run began with.

        Raises:
            DataError: for a file with another content.
        """
        content = self.storage.read(MANIFEST)
        try:
            return as_type(Manifest, parse_json(content, max_bytes=_MAX_MANIFEST_BYTES))
        except ParseError as error:
            raise DataError(f"{self.storage.uri}/{MANIFEST}: {error}") from None

    def append_metrics(self, metrics: dict[str, float]) -> None:
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(metrics) + "\n")

    def append_event(self, text: str, kind: str) -> None:
        """Append a message about the run, with its time."""
        with (self.path / EVENTS).open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 1), "kind": kind, "text": text}) + "\n")

    def restore_metrics(self, last_step: int) -> None:
        """Keep the lines up to a checkpoint and delete the later ones.

        Later lines belong to steps that are repeated. If the driver has moved to another machine, earlier lines come
        from the checkpoints.
        """
        lines = [line for line in self.metrics() if line["step"] <= last_step]
        if last_step and (not lines or lines[-1]["step"] < last_step):
            by_step = {line["step"]: line for line in [*read_metrics(self.storage, last_step), *lines]}
            lines = [by_step[step] for step in sorted(by_step)]
        (self.path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def metrics(self) -> list[dict[str, float]]:
        """Return all lines of metrics, without a line that a crash cut short."""
        path = self.path / METRICS
        lines = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            with contextlib.suppress(ParseError):
                lines.append(metrics_line(line))
        return lines

    def save_evaluation(self, result: dict[str, Any]) -> None:
        folder = self.path / EVALUATIONS
        folder.mkdir(exist_ok=True)
        (folder / f"step-{result['step']:010d}.json").write_text(json.dumps(result))

    def save_summary(self, summary: dict[str, Any]) -> None:
        (self.path / SUMMARY).write_text(json.dumps(summary, indent=1))

    def upload_records(self) -> None:
        """Copy the local records to a remote storage."""
        if not self.storage.is_local:
            records = [self.path / name for name in (METRICS, EVENTS, SUMMARY, REPORT)]
            for file in [*records, *(self.path / EVALUATIONS).glob("*.json")]:
                if file.exists():
                    self.storage.upload(file, file.relative_to(self.path).as_posix())


def read_run(run: str) -> RunConfig:
    """Return the config of a run, given its local folder or its storage URI.

    Raises:
        ConfigError: if the folder holds no run.
    """
    storage = Storage(run)
    try:
        content = storage.read(CONFIG)
    except OSError as error:
        raise ConfigError(
            f"{run} is not a run: it holds no {CONFIG}. Give the folder that `sigray train` printed"
        ) from error
    source = f"{run}/{CONFIG}"
    return parse_config(parse_mapping(content, source, "the config of a run expected"), source)
