"""Keep a run in MLflow: on a tracking server, or in a local database."""

from __future__ import annotations

import base64
import os
import time
from html import escape
from pathlib import Path
from typing import Any

from sigray.orchestrator.config import flattened
from sigray.orchestrator.run_folder import CONFIG, TrackedAs, read_run
from sigray.orchestrator.trackers.feed import Image, Row, Shown, is_of_evaluation

_ID_TAG = "sigray.id"
_MAX_PARAMS = 100  # of one request
_MAX_METRICS = 1000
_MAX_VALUE = 6000  # characters
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow:
    """A run of MLflow; the step of a figure is the count of samples seen.

    A row is in one `log_batch`, which a database keeps as a whole or not at all. The run is found by a tag, so that no
    id of MLflow's has to survive a kill.
    """

    def __init__(self, folder: Path, tracked: TrackedAs) -> None:
        self._folder, self._tracked = folder, tracked
        self._client: Any = None
        self._run = ""

    @staticmethod
    def check() -> None:
        """Raise if the server does not answer."""
        from mlflow.tracking import MlflowClient

        MlflowClient().search_experiments(max_results=1)

    def open(self) -> Shown:
        from mlflow.tracking import MlflowClient

        client = self._client = MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "sigray")
        found = client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else client.create_experiment(experiment)
        runs = client.search_runs([place], f"tags.`{_ID_TAG}` = '{self._tracked.id}'")
        tags = {_ID_TAG: self._tracked.id, **({"sweep": self._tracked.group} if self._tracked.group else {})}
        run = runs[0] if runs else client.create_run(place, run_name=self._tracked.name, tags=tags)
        self._run = run.info.run_id
        client.update_run(self._run, status="RUNNING")
        self._describe(run.data.params)
        shown = Shown()
        for key in run.data.metrics:
            if key == "step" or is_of_evaluation(key):
                for metric in client.get_metric_history(self._run, key):
                    shown.add_keys(metric.step, [key])
        return shown

    def _describe(self, known: dict[str, str]) -> None:
        """Log the config: as a file, and the keys that MLflow has no value of yet."""
        from mlflow.entities import Param

        config = flattened(read_run(str(self._folder)).model_dump(mode="json"))
        params = [Param(key[:250], str(value)[:_MAX_VALUE]) for key, value in config.items() if key not in known]
        for begin in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._run, params=params[begin : begin + _MAX_PARAMS])
        self._client.log_text(self._run, (self._folder / CONFIG).read_text(), CONFIG)

    def send(self, rows: list[Row]) -> None:
        """Send rows in few batches. SQLite takes some 50 a second, a server fewer."""
        batch: list[Any] = []
        for row in rows:
            metrics = self._metrics(row)
            if len(batch) + len(metrics) > _MAX_METRICS:
                self._client.log_batch(self._run, metrics=batch)
                batch = []
            batch += metrics
        self._client.log_batch(self._run, metrics=batch)

    def _metrics(self, row: Row) -> list[Any]:
        """Return the figures of a row as metrics; send its images."""
        from mlflow.entities import Metric

        figures = row.figures if row.is_evaluation else {**row.figures, "step": row.step}
        for key, images in row.images.items():
            self._client.log_text(self._run, _page(key, images), f"{key}/step-{row.step:010d}.html")
            figures = {**figures, key: len(images)}  # the mark of the images: a file has no step
        now_ms = int(time.time() * 1000)
        return [Metric(key, value, now_ms, row.samples_seen) for key, value in figures.items()]

    def note(self, notes: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self._run, tags=[RunTag(key, value) for key, value in notes.items()])

    def close(self, status: str) -> None:
        if status:
            self._client.set_terminated(self._run, _STATUS[status])


def _page(title: str, images: list[Image]) -> str:
    """Return an HTML page of held-out images with their names."""
    rows = [
        f'<tr><td><img src="data:image/png;base64,{base64.b64encode(image.png).decode()}" width=128></td>'
        f"<td><b>{escape(image.truth)}</b></td><td>{'<br>'.join(map(escape, image.best))}</td></tr>"
        for image in images
    ]
    head = "<tr><th>image</th><th>right name</th><th>best names</th></tr>"
    return f'<meta charset="utf-8"><h1>{escape(title)}</h1><table>{head}{"".join(rows)}</table>'
