"""Define every Prometheus metric once: name, unit, meaning, source of its value.

`orchestrator/cluster/prometheus.py` makes the Grafana dashboard and the alert rules from this table. The driver sets
its own (`RunMetrics`), each data-shard worker its totals (`WorkerMetrics`), a sweep's judge those of the sweep
(`SweepMetrics`). Ray exports them to Prometheus, with `ray_` before the name and `_total` after a counter's. This
module imports Ray only when a metric is set.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """One metric."""

    name: str  # in Prometheus, without Ray's `ray_`
    title: str  # of its panel
    unit: str  # one that Grafana knows ("short" for a plain number)
    group: str  # the panel's row
    meaning: str  # one sentence
    kind: Literal["gauge", "counter"] = "gauge"  # a counter only grows
    key: str = ""  # in a line of metrics (`metrics.jsonl`); "" if the metric is set by name
    tags: tuple[str, ...] = ()  # labels besides that of the owner
    expr: str = "max by ({labels}) ({name})"  # PromQL of the panel; {name} is the exported name
    owner: Literal["run", "sweep"] = "run"  # the first label: the name of a run, SWEEP/TRIAL for a trial; or of a sweep

    @property
    def exported(self) -> str:
        """Return the name in Prometheus."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")

    @property
    def query(self) -> str:
        """Return the PromQL of the panel."""
        return self.expr.format(name=self.exported, labels=", ".join(self.labels))

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the labels that tell the panel's series apart."""
        return (self.owner, *self.tags)

    @property
    def legend(self) -> str:
        """Return Grafana's pattern for the name of a series, SWEEP/TRIAL for a trial."""
        return " ".join(f"{{{{{label}}}}}" for label in self.labels).replace("}} {{trial}}", "}}/{{trial}}")


def _line(key: str, title: str, unit: str, group: str, meaning: str) -> Metric:
    return Metric(f"sigray_{key.replace('/', '_')}", title, unit, group, meaning, key=key)


def _of_sweep(name: str, title: str, unit: str, meaning: str, *tags: str) -> Metric:
    return Metric(f"sigray_sweep_{name}", title, unit, "Sweeps", meaning, tags=tags, owner="sweep")


_RATE = "sum by ({labels}) (rate({name}[1m]))"
_AGE = "time() - max by ({labels}) ({name})"
_SUM = "sum by ({labels}) ({name})"
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
    _line("throughput/samples_per_s", "Samples per second", "suffix:/s", "Speed", "Of all training workers."),
    Metric("sigray_throughput_worker_samples_per_s", "Samples per second and worker", "suffix:/s", "Speed",
           "All training workers run in step, so each has its part of the whole."),
    _line("data/wait_pct", "Data wait", "percent", "Speed", "Time that training workers waited for samples."),
    _line("data/queue_batches", "Batches ready", "short", "Speed", "Queued at a training worker, on average."),
    _line("data/busy_workers", "Data-shard workers busy", "short", "Speed", "How many were decoding, on average."),
    _line("memory/peak_gib", "Peak memory", "gbytes", "Speed", "Of a training worker: its device's or its own."),
    _line("compile/num_programs", "Compiled programs", "short", "Speed", "Recompilations let it grow after step 2."),
    _line("data/refused_samples", "Samples refused", "short", "Data", "By this attempt, over all training workers."),
    Metric("sigray_data_refused_by_reason", "Refusals by reason", "short", "Data",
           "Samples that a data-shard worker could not use, and captions that it cut.", "counter", tags=("reason",),
           expr=_SUM),
    Metric("sigray_data_decoded_samples", "Decoded", "suffix:/s", "Data",
           "Samples per second over all data-shard workers.", "counter", expr=_RATE),
    Metric("sigray_store_bytes", "Store bytes", "Bps", "Data",
           "Bytes per second that data-shard workers read from stores.",
           "counter", expr=_RATE),
    Metric("sigray_store_retries", "Store retries", "short", "Data", "Requests that were repeated, by what had failed.",
           "counter", tags=("failure",), expr=_SUM),
    Metric("sigray_checkpoint_time_s", "Checkpoint age", "s", "Safety", "Since the newest durable checkpoint.",
           expr=_AGE),
    Metric("sigray_checkpoint_every_s", "Checkpoint interval", "s", "Safety", "checkpoint.save_every_s of the config."),
    Metric("sigray_heard_time_s", "Silence", "s", "Safety", "Since the last line of metrics of the training workers.",
           expr=_AGE),
    Metric("sigray_restarts", "Restarts", "short", "Safety", "Attempts that ended before the run.", "counter"),
    Metric("sigray_bad_steps", "Bad steps", "short", "Safety", "Losses or gradients that were not finite, or leapt.",
           "counter"),
    Metric("sigray_training_workers", "Training workers", "short", "Safety", "Of this attempt."),
    Metric("sigray_data_workers", "Data-shard workers", "short", "Safety", "Running or starting."),
    Metric("sigray_zero_shot_top1", "Zero-shot top-1", "percentunit", "Evaluation",
           "Of each set's classes, on the newest evaluated checkpoint.", tags=("set",)),
    Metric("sigray_retrieval_r1", "Retrieval recall at 1", "percentunit", "Evaluation",
           "Of each set with captions, on the newest evaluated checkpoint.", tags=("set", "direction")),
    Metric("sigray_linear_probe_top1", "Linear probe top-1", "percentunit", "Evaluation",
           "Of each set with linear_probe, on the newest evaluated checkpoint.", tags=("set",)),
    _of_sweep("best_figure", "Best figure so far", "percentunit", "Of the configuration that leads the sweep's table."),
    _of_sweep("figure", "Figure by trial", "percentunit", "The study's metric at the trial's last rung.", "trial"),
    _of_sweep("trials", "Trials by state", "short", "Of those proposed so far.", "state"),
    _of_sweep("samples_seen", "Samples seen by trial", "short", "Pairs that entered a loss of the trial.", "trial"),
)  # fmt: skip
REPEAT_S = 5.0
"""Time between two settings of an unchanged gauge."""
BY_NAME = {metric.name: metric for metric in METRICS}


class _Exporter:
    """Sets metrics of the table through Ray, with the name of a run or sweep."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._made: dict[str, Any] = {}

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge, or add to a counter."""
        metric = BY_NAME[name]
        assert set(tags) == set(metric.tags), f"{name}: tags {sorted(tags)}"
        made = self._made.get(name)
        if made is None:
            from ray.util import metrics

            kind: Any = metrics.Counter if metric.kind == "counter" else metrics.Gauge
            made = self._made[name] = kind(name, description=metric.meaning, tag_keys=metric.labels)
        tags = {metric.owner: self._owner, **tags}
        if metric.kind == "gauge":
            made.set(value, tags=tags)
        elif value > 0:
            made.inc(value, tags=tags)


class RunMetrics(_Exporter):
    """The driver's metrics of its run.

    Ray drops a gauge that is not set again within twice its export interval (20 s). Then an alert rule would
    miss the time of the last heartbeat, so the driver calls `repeat` until it ends.

    Args:
        clock: seconds of Unix time.
    """

    def __init__(self, run: str, save_every_s: float | None = None, clock: Callable[[], float] = time.time) -> None:
        super().__init__(run)
        self._clock = clock
        self._save_every_s = save_every_s
        self._gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._repeated_at = clock()

    def set(self, name: str, value: float, **tags: str) -> None:
        if BY_NAME[name].kind == "gauge":
            self._gauges[name, tuple(tags.items())] = value
        super().set(name, value, **tags)

    def repeat(self) -> None:
        """Set the gauges again if that is due. Called often."""
        if self._clock() - self._repeated_at >= REPEAT_S:
            self._repeated_at = self._clock()
            for (name, tags), value in list(self._gauges.items()):
                self.set(name, value, **dict(tags))

    def started(self, facts: dict[str, Any]) -> None:
        """Set what is known when the training workers are up."""
        self._world_size = facts["world_size"]
        self.set("sigray_training_workers", facts["world_size"])
        self.set("sigray_heard_time_s", self._clock())
        self.set("sigray_checkpoint_time_s", self._clock())  # until there is a checkpoint, its age counts from here
        if self._save_every_s is not None:
            self.set("sigray_checkpoint_every_s", self._save_every_s)

    def line(self, line: dict[str, float], num_data_workers: int | None) -> None:
        """Set the metrics of a line."""
        self.set("sigray_heard_time_s", self._clock())
        for metric in METRICS:
            if metric.key in line:
                self.set(metric.name, float(line[metric.key]))
        self.set("sigray_throughput_worker_samples_per_s", line["throughput/samples_per_s"] / self._world_size)
        if num_data_workers is not None:
            self.set("sigray_data_workers", num_data_workers)

    def checkpoint(self) -> None:
        """Record that a checkpoint is durable."""
        self.set("sigray_checkpoint_time_s", self._clock())

    def evaluation(self, result: dict[str, Any]) -> None:
        """Set the result of a checkpoint's evaluation."""
        for name, figures in result["zero_shot"].items():
            self.set("sigray_zero_shot_top1", figures["top1"], set=name)
        for name, figures in result["linear_probe"].items():
            self.set("sigray_linear_probe_top1", figures["top1"], set=name)
        for name, figures in result["retrieval"].items():
            for direction in ("image_to_text", "text_to_image"):
                self.set("sigray_retrieval_r1", figures[f"{direction}_r1"], set=name, direction=direction)

    def ended(self, is_bad_step: bool) -> None:
        """Count an attempt that ended before the run."""
        self.set("sigray_restarts", 1)
        if is_bad_step:
            self.set("sigray_bad_steps", 1)


class SweepMetrics(_Exporter):
    """A sweep's metrics. `update` sets all again, because Ray drops old gauges."""

    def update(
        self, figures: dict[str, float], samples_seen: dict[str, float], states: Counter[str], best: float | None
    ) -> None:
        """Set the metrics.

        Args:
            figures, samples_seen: by trial.
            states: number of trials in each state.
            best: mean figure of the best configuration so far.
        """
        for trial, figure in figures.items():
            self.set("sigray_sweep_figure", figure, trial=trial)
        for trial, samples in samples_seen.items():
            self.set("sigray_sweep_samples_seen", samples, trial=trial)
        for state, count in states.items():
            self.set("sigray_sweep_trials", count, state=state)
        if best is not None:
            self.set("sigray_sweep_best_figure", best)


class WorkerMetrics(_Exporter):
    """A data-shard worker's counters."""

    def __init__(self, run: str) -> None:
        super().__init__(run)
        self._exported: Counter[tuple[str, str]] = Counter()

    def update(self, decoded: int, refused: Counter[str], traffic: Counter[str]) -> None:
        """Add the growth of totals since the last call.

        Args:
            decoded: samples since the worker began.
            refused: samples by reason, and cut captions, since then.
            traffic: of stores, since then: "bytes", and retries by kind of failure.
        """
        self._add("sigray_data_decoded_samples", "", decoded)
        for reason, count in refused.items():
            self._add("sigray_data_refused_by_reason", reason, count, reason=reason)
        for key, count in traffic.items():
            if key == "bytes":
                self._add("sigray_store_bytes", "", count)
            else:
                self._add("sigray_store_retries", key, count, failure=key)

    def _add(self, name: str, key: str, total: float, **tags: str) -> None:
        self.set(name, total - self._exported[name, key], **tags)
        self._exported[name, key] = int(total)
