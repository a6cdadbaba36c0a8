"""Every metric that leaves a run for Prometheus, defined once: name, unit, meaning, and where its value comes from.

`orchestrator/cluster/prometheus.py` makes the Grafana dashboard and the alert rules from this table. The driver sets what it
knows (`RunMetrics`), each data-shard worker what it has done (`WorkerMetrics`); Ray exports both to Prometheus, with
`ray_` before the name and `_total` behind a counter's. Imports no Ray before something is set.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: in Prometheus, without Ray's `ray_`.
        title: what a person reads.
        unit: one that Grafana knows ("short" for a plain number).
        group: the row that it stands in.
        meaning: one sentence.
        kind: gauge, or counter for what only grows.
        key: of a line of metrics (`metrics.jsonl`) that it is taken from; "" where it is set by name.
        tags: labels besides `run`.
        expr: what to draw, where it is not the metric itself; {name} stands for it.
    """

    name: str
    title: str
    unit: str
    group: str
    meaning: str
    kind: Literal["gauge", "counter"] = "gauge"
    key: str = ""
    tags: tuple[str, ...] = ()
    expr: str = "{name}"

    @property
    def exported(self) -> str:
        """The name in Prometheus."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")

    @property
    def query(self) -> str:
        """PromQL for its panel."""
        return self.expr.format(name=self.exported)


def _line(key: str, title: str, unit: str, group: str, meaning: str) -> Metric:
    return Metric(f"sigray_{key.replace('/', '_')}", title, unit, group, meaning, key=key)


_RATE = "sum by (run) (rate({name}[1m]))"
METRICS = (
    _line("train/loss", "Loss", "short", "Training", "Of the newest step, over the global batch."),
    _line("train/logit_scale", "Logit scale", "short", "Training", "exp(t'), the temperature's inverse; starts at 10."),
    _line("train/logit_bias", "Logit bias", "short", "Training", "b; starts at -10."),
    _line("train/positive_logit_mean", "Mean logit of pairs", "short", "Training",
          "exp(t') x + b over the pairs of the newest global batch; without b under the softmax loss."),
    _line("train/negative_logit_mean", "Mean logit of negatives", "short", "Training",
          "The same over all other combinations of an image and a text of that batch."),
    _line("train/grad_norm", "Gradient norm", "short", "Training", "Of all gradients together, before clipping."),
    _line("train/learning_rate", "Learning rate", "short", "Training", "Of the newest step."),
    _line("samples_seen", "Samples seen", "short", "Training", "Pairs that entered a loss since the run began."),
    _line("throughput/samples_per_s", "Samples per second", "short", "Speed", "Of all training workers."),
    Metric("sigray_throughput_worker_samples_per_s", "Samples per second and worker", "short", "Speed",
           "All training workers run in step, so each has its part of the whole."),
    _line("data/wait_pct", "Data wait", "percent", "Speed", "Time that training workers waited for samples."),
    _line("data/queue_batches", "Batches ready", "short", "Speed", "Queued at a training worker, on average."),
    _line("data/busy_workers", "Data-shard workers busy", "short", "Speed", "How many were decoding, on average."),
    _line("memory/peak_gib", "Peak memory", "gbytes", "Speed", "Of a training worker: its device's or its own."),
    _line("compile/num_programs", "Compiled programs", "short", "Speed", "Recompilations let it grow after step 2."),
    _line("data/refused_samples", "Samples refused", "short", "Data", "By this attempt, over all training workers."),
    Metric("sigray_data_refused_by_reason", "Refusals by reason", "short", "Data",
           "Samples that a data-shard worker could not use.", "counter", tags=("reason",),
           expr="sum by (run, reason) ({name})"),
    Metric("sigray_data_decoded_samples", "Decoded", "short", "Data", "Samples per second over all data-shard workers.",
           "counter", expr=_RATE),
    Metric("sigray_s3_bytes", "S3 bytes", "Bps", "Data", "Bytes per second that data-shard workers read from S3.",
           "counter", expr=_RATE),
    Metric("sigray_s3_retries", "S3 retries", "short", "Data", "Requests that were repeated, by what had failed.",
           "counter", tags=("failure",), expr="sum by (run, failure) ({name})"),
    Metric("sigray_checkpoint_time_s", "Checkpoint age", "s", "Safety", "Since the newest durable checkpoint.",
           expr="time() - {name}"),
    Metric("sigray_checkpoint_every_s", "Checkpoint interval", "s", "Safety", "checkpoint.save_every_s of the config."),
    Metric("sigray_heard_time_s", "Silence", "s", "Safety", "Since the training workers last said anything.",
           expr="time() - {name}"),
    Metric("sigray_restarts", "Restarts", "short", "Safety", "Lives of the training workers that ended before the run.",
           "counter"),
    Metric("sigray_bad_steps", "Bad steps", "short", "Safety", "Losses or gradients that were not finite, or leapt.",
           "counter"),
    Metric("sigray_training_workers", "Training workers", "short", "Safety", "Of this attempt."),
    Metric("sigray_data_workers", "Data-shard workers", "short", "Safety", "Up or on their way."),
    Metric("sigray_zero_shot_top1", "Zero-shot top-1", "percentunit", "Evaluation",
           "Of each set's classes, on the newest evaluated checkpoint.", tags=("set",)),
)  # fmt: skip
REPEAT_S = 5.0
"""Between two settings of a gauge that has not changed."""
BY_NAME = {metric.name: metric for metric in METRICS}


class _Exporter:
    """Sets metrics of the table through Ray, with the run's name."""

    def __init__(self, run: str) -> None:
        self._run, self._made = run, {}  # type: ignore[var-annotated]

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge, or add to a counter."""
        metric = BY_NAME[name]
        assert set(tags) == set(metric.tags), f"{name}: tags {sorted(tags)}"
        made = self._made.get(name)
        if made is None:
            from ray.util import metrics

            kind: Any = metrics.Counter if metric.kind == "counter" else metrics.Gauge
            made = self._made[name] = kind(name, description=metric.meaning, tag_keys=("run", *metric.tags))
        tags = {"run": self._run, **tags}
        if metric.kind == "gauge":
            made.set(value, tags=tags)
        elif value > 0:
            made.inc(value, tags=tags)


class RunMetrics(_Exporter):
    """What the driver knows of its run.

    Ray drops a gauge that is not set again within twice its export interval (20 s), and a rule that compares the time
    of the last word with now would find nothing to compare: the driver calls `repeat` while it lives.

    Args:
        run: its name.
        save_every_s: checkpoint.save_every_s.
        clock: seconds of Unix time.
    """

    def __init__(self, run: str, save_every_s: float | None = None, clock: Callable[[], float] = time.time) -> None:
        super().__init__(run)
        self._clock, self._save_every_s = clock, save_every_s
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._repeated_at = clock()

    def set(self, name: str, value: float, **tags: str) -> None:
        if BY_NAME[name].kind == "gauge":
            self._gauges[name, tuple(tags.items())] = value
        super().set(name, value, **tags)

    def repeat(self) -> None:
        """Set the gauges again where that is due. Called often."""
        if self._clock() - self._repeated_at >= REPEAT_S:
            self._repeated_at = self._clock()
            for (name, tags), value in list(self._gauges.items()):
                self.set(name, value, **dict(tags))

    def started(self, facts: dict[str, Any]) -> None:
        """The training workers are up."""
        self._world_size = facts["world_size"]
        self.set("sigray_training_workers", facts["world_size"])
        self.set("sigray_heard_time_s", self._clock())
        self.set("sigray_checkpoint_time_s", self._clock())  # its age counts from here, until there is one
        if self._save_every_s is not None:
            self.set("sigray_checkpoint_every_s", self._save_every_s)

    def line(self, line: dict[str, float], num_data_workers: int | None) -> None:
        """A line of metrics came."""
        self.set("sigray_heard_time_s", self._clock())
        for metric in METRICS:
            if metric.key in line:
                self.set(metric.name, float(line[metric.key]))
        self.set("sigray_throughput_worker_samples_per_s", line["throughput/samples_per_s"] / self._world_size)
        if num_data_workers is not None:
            self.set("sigray_data_workers", num_data_workers)

    def checkpoint(self) -> None:
        """A checkpoint is durable."""
        self.set("sigray_checkpoint_time_s", self._clock())

    def evaluation(self, result: dict[str, Any]) -> None:
        """A checkpoint was evaluated."""
        for name, figures in result["zero_shot"].items():
            self.set("sigray_zero_shot_top1", figures["top1"], set=name)

    def ended(self, is_bad_step: bool) -> None:
        """The training workers ended before the run."""
        self.set("sigray_restarts", 1)
        if is_bad_step:
            self.set("sigray_bad_steps", 1)


class WorkerMetrics(_Exporter):
    """What a data-shard worker has done since the last call.

    Args:
        run: name of the run.
    """

    def __init__(self, run: str) -> None:
        super().__init__(run)
        self._told: Counter[tuple[str, str]] = Counter()

    def tell(self, decoded: int, refused: Counter[str], traffic: Counter[str]) -> None:
        """Totals since the worker began.

        Args:
            decoded: samples.
            refused: samples by reason.
            traffic: of S3: "bytes", and retries by kind of failure.
        """
        self._add("sigray_data_decoded_samples", "", decoded)
        for reason, count in refused.items():
            self._add("sigray_data_refused_by_reason", reason, count, reason=reason)
        for key, count in traffic.items():
            if key == "bytes":
                self._add("sigray_s3_bytes", "", count)
            else:
                self._add("sigray_s3_retries", key, count, failure=key)

    def _add(self, name: str, key: str, total: float, **tags: str) -> None:
        self.set(name, total - self._told[name, key], **tags)
        self._told[name, key] = int(total)
