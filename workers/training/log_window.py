"""Metrics of the steps since the last line, and the check that each step was good."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from sigray.losses import mean_logits
from sigray.workers.data.loader import Loader
from sigray.workers.device import Device
from sigray.workers.training.job import TrainJob
from sigray.workers.training.phases import Phase
from sigray.workers.training.step import BadStep, StepResult

_NUM_RECENT = 100  # good losses whose median a new loss is compared with


class LogWindow:
    """The steps between two lines of metrics; only `close` reads the device.

    Args:
        phase: of these steps; lines of a run with phases have its number.
    """

    def __init__(self, loader: Loader, device: Device, job: TrainJob, phase: Phase) -> None:
        self._loader, self._device, self._job = loader, device, job
        self._phase: dict[str, float] = {"train/phase": phase.number} if job.phases else {}
        self._reasons: dict[str, tuple[int, str]] = {}
        self._global_batch_size = job.train.global_batch_size
        self._max_loss_ratio = job.train.max_loss_ratio
        self._has_bias = phase.loss.name == "sigmoid"
        self._results: dict[int, StepResult] = {}  # by step, counted from 1
        self._good_losses: deque[float] = deque(maxlen=_NUM_RECENT)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time so far: to copy a checkpoint is not training time."""
        self._begin = time.perf_counter()
        self._num_timed = 0
        self._wait_s, self._decode_s = self._loader.wait_s, self._loader.decode_s

    def add(self, step: int, result: StepResult) -> None:
        self._results[step] = result
        self._num_timed += 1

    def close(self, steps_done: int) -> dict[str, float]:
        """Metrics of the window; empty if all of its steps were left out.

        Values that differ between ranks are averaged. The loss is that of the last step.

        Raises:
            BadStep: for the window's first bad step, on every rank.
        """
        if not self._results:
            return {}
        results = list(self._results.values())
        newest = results[-1]
        losses = self._device.read([result.loss for result in results])
        terms = self._device.read([term for each in results for term in each.terms.values()]) if newest.terms else []
        norms = self._device.read([result.grad_norm for result in results])
        scale, bias = self._device.read([newest.logit_scale, newest.logit_bias])
        features = newest.feature_means.tolist()
        loader = self._loader
        if loader.counts.reasons != self._reasons:
            self._reasons = loader.counts.reasons
            self._job.hooks.refused(dist.get_rank() if dist.is_initialized() else 0, self._reasons)
        times_s = loader.wait_s - self._wait_s, loader.decode_s - self._decode_s
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        sums = self._device.sum_over_ranks(
            [*features, *terms, *losses, loader.num_ready, *times_s, loader.counts.refused.total()]
        )
        features = [total / world_size for total in sums[: len(features)]]
        terms = [total / world_size for total in sums[len(features) :][: len(terms)]]
        *losses, num_ready, wait_s, decode_s, num_refused = sums[len(features) + len(terms) :]
        means = [total / world_size for total in losses]
        of_step = [dict(zip(newest.terms, part, strict=True)) for part in _cut(terms, len(results))]
        for step, loss, norm, own in zip(self._results, means, norms, of_step, strict=True):
            reason = why_bad(loss, norm, self._good_losses, self._max_loss_ratio, own)
            if reason:
                raise BadStep(step, f"step {step}: {reason}. Lower optim.lr, or train in fp32")
            self._good_losses.append(loss)
        positive, negative = mean_logits(features, self._global_batch_size, scale, bias if self._has_bias else 0.0)
        elapsed_s = time.perf_counter() - self._begin
        metrics = {
            "step": steps_done,
            "samples_seen": steps_done * self._global_batch_size,
            **self._phase,
            "train/loss": means[-1],
            **{f"train/{name}": value for name, value in of_step[-1].items()},
            "train/logit_scale": scale,
            "train/logit_bias": bias,
            "train/positive_logit_mean": positive,
            **({} if negative is None else {"train/negative_logit_mean": negative}),
            "train/grad_norm": norms[-1],
            "train/learning_rate": newest.learning_rate,
            "throughput/samples_per_s": self._num_timed * self._global_batch_size / elapsed_s,
            "data/wait_pct": 100 * wait_s / world_size / elapsed_s,
            "data/queue_batches": num_ready / world_size,
            "data/busy_workers": decode_s / elapsed_s,
            "data/refused_samples": num_refused,
            "memory/peak_gib": self._device.peak_memory_gib(),
            "compile/num_programs": self._device.num_programs(),
        }
        self._results = {}
        self.restart_clock()
        return metrics


def _cut(values: list[float], num_parts: int) -> list[list[float]]:
    size = len(values) // num_parts
    return [values[number * size : (number + 1) * size] for number in range(num_parts)]


def why_bad(
    loss: float,
    grad_norm: float,
    before: Sequence[float],
    max_ratio: float | None,
    terms: Mapping[str, float],
) -> str:
    """What is wrong with a step; empty for a good one.

    Args:
        before: losses of the good steps before it, the newest last.
        max_ratio: train.max_loss_ratio.
        terms: of a loss with several.
    """
    if not math.isfinite(loss):
        bad = [f"{name} {value}" for name, value in terms.items() if not math.isfinite(value)]
        return f"the loss is {loss}" + (f" ({', '.join(bad)})" if bad else "")
    if not math.isfinite(grad_norm):
        return f"the norm of the gradients is {grad_norm}"
    if max_ratio is not None and len(before) >= _NUM_RECENT // 5:
        median = statistics.median(before)
        if loss > max_ratio * median:
            return f"the loss is {loss:.4g}, the median of the {len(before)} steps before it {median:.4g}"
    return ""
