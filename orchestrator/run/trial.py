"""The protocol between a sweep and a run that is its trial: rungs, decisions.

A rung is a number of samples. When a trial reaches a rung, its training workers write a checkpoint and ask whether to
go on. The driver evaluates the checkpoint, asks the sweep, and passes on the answer.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from sigray.orchestrator.config import RunConfig
from sigray.orchestrator.run_folder import RunFolder

if TYPE_CHECKING:
    from sigray.workers.data.pool import SharedPool
    from sigray.workers.training.job import Answer

TRIAL_CPUS = 0.5
"""CPUs of the driver of a trial; Ray Tune allows no 0."""
_HOLD_S = 60.0  # seconds that a trial keeps its training workers at a rung before it releases them


class Trial(Protocol):
    """What a sweep adds to a run that is one of its trials.

    Attributes:
        name: SWEEP/TRIAL, for the metrics on Ray's dashboard.
        pool: the stream that the trials share.
        is_joined: whether the sweep has joined a cluster.
        rungs: samples seen at which the trial is evaluated and the sweep decides whether the trial goes on. A rung
            falls on the first step at or after these samples: the same count for every batch size that divides them.
            The end of the run is a rung of its own and not listed.
        passed: steps of the rungs after which the sweep let an earlier driver of this trial go on.
    """

    name: str
    pool: SharedPool
    is_joined: bool
    rungs: tuple[int, ...]
    passed: frozenset[int]

    def record(self, line: dict[str, float]) -> bool:
        """Take a line of metrics, an empty one first: the training workers are up.

        Returns:
            Whether the whole sweep stops.
        """

    def decide(self, evaluation: dict[str, Any], line: dict[str, float]) -> Answer:
        """Return whether to go on after a rung or the end; "wait" asks again later.

        Args:
            evaluation: of the checkpoint of the rung.
            line: the newest line of metrics.
        """


def rung_step(samples: int, global_batch_size: int) -> int:
    """Return the step of a rung: the first step at or after this many samples."""
    return -(-samples // global_batch_size)


class Rungs:
    """Follow a trial from rung to rung; a run without a trial has no rungs.

    Args:
        monitor: handle of the `RunMonitor`, of which the training workers ask the decision.

    Attributes:
        num_steps: steps of the whole run.
        steps: steps of the rungs.
        pending: step of the rung that waits for a decision; None: no rung waits.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, monitor: Any, trial: Trial | None) -> None:
        self._batch_size = config.train.global_batch_size
        # Samples that one block of each lane holds.
        self._round_size = config.data.total_lanes * config.data.block_size
        self._folder, self._monitor, self._trial = folder, monitor, trial
        self.num_steps = rung_step(config.train.num_samples, self._batch_size)
        self.steps = frozenset(rung_step(samples, self._batch_size) for samples in (trial.rungs if trial else ()))
        self.pending: int | None = None
        self._reached_at = 0.0
        self._waits = False  # the sweep cannot decide yet
        self._evaluation: dict[str, Any] | None = None

    def was_left_open(self, step: int) -> bool:
        """Return whether an earlier driver saved this rung and died before the decision."""
        return self._trial is not None and step in self.steps - self._trial.passed and step < self.num_steps

    @property
    def is_released(self) -> bool:
        """Whether the pending rung waits for longer than a trial keeps its workers."""
        return self.pending is not None and time.monotonic() - self._reached_at > _HOLD_S and self._waits

    def needs_evaluation(self, step: int) -> bool:
        """Return whether the sweep cannot decide without the evaluation of this step."""
        return self._trial is not None and step in (self.pending, self.num_steps)

    def subscribe(self, step: int) -> None:
        """Tell the other trials the block of its lanes from which this trial reads on."""
        if self._trial is not None:
            self._trial.pool.subscribe(step * self._batch_size // self._round_size)

    def record(self, line: dict[str, float]) -> bool:
        """Pass on a line of metrics; return whether the whole sweep stops."""
        return self._trial is not None and self._trial.record(line)

    def saved(self, step: int) -> None:
        """Take note of a checkpoint; if it is that of a rung, the rung is pending."""
        if self._trial is not None and step in self.steps and step < self.num_steps:
            self.pending = step
            self._evaluation, self._waits = None, False
            self._reached_at = time.monotonic()
            self._trial.pool.unsubscribe()

    def evaluated(self, result: dict[str, Any]) -> None:
        """Keep the evaluation of the pending rung."""
        if result["step"] == self.pending:
            self._evaluation = result

    def decide(self) -> Answer | None:
        """Ask the sweep about the pending rung; pass the answer to the workers.

        Returns:
            The sweep's answer; None if no rung is pending, or its evaluation is not there yet.
        """
        if self.pending is None or self._evaluation is None:
            return None
        answer = self.decide_on(self._evaluation)
        self._waits = answer == "wait"
        if answer == "wait":
            if time.monotonic() - self._reached_at > _HOLD_S:
                self._monitor.answer.remote(self.pending, "stop")  # the rung has its checkpoint
            return answer
        if answer == "go on":
            self.subscribe(self.pending)
        self._monitor.answer.remote(self.pending, answer)
        self.pending = self._evaluation = None
        return answer

    def decide_on(self, evaluation: dict[str, Any]) -> Answer:
        """Return the sweep's decision after an evaluation; "stop" without a sweep."""
        if self._trial is None:
            return "stop"
        return self._trial.decide(evaluation, self._folder.newest_line())
