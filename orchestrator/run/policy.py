"""Decide about failures and sizes: pure functions on which `supervisor.py` acts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from sigray.orchestrator.batch import MAX_DATA_WORKER_UTILISATION

HOUR_S = 3600.0
_MAX_BAD_STEPS, _BAD_STEPS_WITHIN = 10, 1000
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 120.0

# Lines of metrics that a decision takes into account: a checkpoint or a new shard may delay a single line.
_NUM_LINES = 3
_MUCH_WAIT_PCT = 5.0
_LITTLE_WAIT_PCT = 1.0


def wanted_data_workers(lines: Sequence[dict[str, float]], current: int, least: int, most: int) -> int:
    """Return how many data-shard workers a run should have.

    One more if the training workers wait for data. One fewer if they do not wait and the others would not become full.

    Args:
        lines: metrics since the number last changed, oldest first: `data/wait_pct`, and `data/busy_workers`, the mean
            number of workers that were decoding.
        current: workers that run or start.
        least, most: data.num_workers.
    """
    newest = lines[-_NUM_LINES:]
    if len(newest) == _NUM_LINES:
        waits = [line["data/wait_pct"] for line in newest]
        busy = max(line["data/busy_workers"] for line in newest)
        if min(waits) > _MUCH_WAIT_PCT:
            current += 1
        elif max(waits) < _LITTLE_WAIT_PCT and current > 1 and busy < MAX_DATA_WORKER_UTILISATION * (current - 1):
            current -= 1
    return min(max(current, least), most)


class Failure(Enum):
    """Cause of the end of an attempt; the value is for the user."""

    DIED = "a training worker or its machine died"
    PREEMPTED = "a node was preempted"
    STORE = "the storage or the shards could not be reached"
    NO_START = "the training workers did not start"
    TAKEN = "the resources of the training workers were taken"
    ERROR = "an error in a training worker"
    INPUT = "config, data or checkpoint"
    BAD_STEP = "a bad step"
    MEMORY = "out of memory"


_DEATHS = {
    "WorkerHealthCheckFailedError",
    "ActorDiedError",
    "RayActorError",
    "ActorUnavailableError",
    "WorkerCrashedError",
    "NodeDiedError",
}
_STORE_ERRORS = {"OSError", "StorageError", "ConnectionError", "TimeoutError", "EndpointConnectionError"}
_START_ERRORS = {"WorkerGroupStartupFailedError"}
_TAKEN_ERRORS = {"WorkerGroupStartupTimeoutError"}
# By name, so that a decision needs neither torch nor Ray. All base classes of an exception count.
_PERMANENT = {
    "FloatingPointError": Failure.BAD_STEP,
    "OutOfMemoryError": Failure.MEMORY,
    "MemoryError": Failure.MEMORY,
    "ValueError": Failure.INPUT,
}
# When a training worker dies, its peers see a broken connection. If Ray Train already ends the group, they miss their
# process group, for which torch raises a ValueError. Both are consequences of the death.
_BROKEN_CONNECTIONS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Socket closed",
    "NCCL",
    "process group has not been initialized",
    "Invalid process group specified",
)


def classify_failure(errors: Sequence[BaseException]) -> tuple[Failure, BaseException]:
    """Return the cause of an attempt's end, and the error that shows the cause.

    Permanent errors outrank transient ones. A worker death outranks the connection errors that it caused.

    Args:
        errors: of all training workers.
    """
    broken = [error for error in errors if any(text in str(error) for text in _BROKEN_CONNECTIONS)]

    def first(kinds: set[str]) -> BaseException | None:
        for error in errors:
            names = {kind.__name__ for kind in type(error).__mro__} - ({"ValueError"} if error in broken else set())
            if names & kinds:
                return error
        return None

    for name, failure in _PERMANENT.items():
        if (error := first({name})) is not None:
            return failure, error
    preempted = next((error for error in errors if getattr(error, "preempted", False)), first({"PreemptionError"}))
    if preempted is not None:
        return Failure.PREEMPTED, preempted
    if (error := first(_DEATHS)) is not None:
        # Only the message says that Ray's memory monitor killed the worker.
        is_memory = "running low on memory" in str(error)
        return Failure.MEMORY if is_memory else Failure.DIED, error
    if broken:
        return Failure.DIED, broken[0]
    others = ((_TAKEN_ERRORS, Failure.TAKEN), (_START_ERRORS, Failure.NO_START), (_STORE_ERRORS, Failure.STORE))
    for kinds, failure in others:
        if (error := first(kinds)) is not None:
            return failure, error
    return Failure.ERROR, errors[0]


@dataclass(frozen=True)
class Attempt:
    """An attempt of the training workers that failed."""

    ended_at: float  # seconds of a monotonic clock
    first_step: int  # steps done when the attempt began
    last_step: int  # steps done at the newest line of metrics
    failure: Failure
    message: str


@dataclass(frozen=True)
class Retry:
    """Start the training workers again after a pause.

    Attributes:
        was_taken: whether another job took their resources before they started.
    """

    pause_s: float
    was_taken: bool = False


@dataclass(frozen=True)
class GiveUp:
    """End the run; the reason is for the user, empty if the error says enough."""

    reason: str = ""


class RunFailed(RuntimeError):
    """Training failed; the message is for the user."""


def after_failure(attempts: Sequence[Attempt], max_failures_per_hour: int) -> Retry | GiveUp:
    """Decide whether to start the training workers again.

    Permanent failures end the run at once: bad input, a loss that is not a number, too little memory, an error with
    the same message at the same step as before. Other failures are retried as often as the budget allows. The retry
    comes at once if the attempt made progress, else after growing pauses. Preemptions are not counted, and neither are
    starts whose resources another job took.

    Args:
        attempts: failed attempts, oldest first; the decision is about the newest.
    """
    newest = attempts[-1]
    if newest.failure is Failure.TAKEN:
        return Retry(0.0, was_taken=True)
    attempts = [attempt for attempt in attempts if attempt.failure is not Failure.TAKEN]
    if newest.failure in (Failure.INPUT, Failure.BAD_STEP, Failure.MEMORY):
        return GiveUp()
    if newest.failure is Failure.ERROR and any(
        (before.last_step, before.message) == (newest.last_step, newest.message) for before in attempts[-2:-1]
    ):
        return GiveUp("the same error came twice at the same step")
    num_counted = sum(
        one.failure is not Failure.PREEMPTED and newest.ended_at - one.ended_at < HOUR_S for one in attempts
    )
    if newest.failure is not Failure.PREEMPTED and num_counted > max_failures_per_hour:
        return GiveUp(
            f"{num_counted} failures within an hour, cluster.max_failures_per_hour={max_failures_per_hour} are allowed"
        )
    stuck = itertools.takewhile(lambda attempt: attempt.last_step <= attempt.first_step, reversed(attempts))
    num_stuck = sum(1 for _ in stuck)
    return Retry(min(_FIRST_PAUSE_S * 2 ** (num_stuck - 1), _LONGEST_PAUSE_S) if num_stuck else 0.0)


def sizes_to_try(sizes: Sequence[int], waited_s: float, patience_s: float) -> Sequence[int]:
    """Return which numbers of training workers may start, largest first.

    The largest number starts at once, a smaller one only after `patience_s`. Workers of the attempt before may still
    hold their resources, and hosts that start together do not join in the same second.

    Args:
        sizes: usable numbers of workers, largest first.
        waited_s: seconds since the wait began.
        patience_s: cluster.shrink_after_s.
    """
    return sizes if waited_s >= patience_s else sizes[:1]


def after_bad_step(step: int, left_out: Sequence[int], on_bad_loss: str) -> Retry | GiveUp:
    """Decide whether to go back to the last checkpoint and omit a bad step's batch.

    Args:
        step: the bad step, counted from 1.
        left_out: earlier steps whose batches are left out.
    """
    if on_bad_loss == "stop":
        return GiveUp("train.on_bad_loss=rewind would go back and leave the batch of that step out")
    recent = [other for other in left_out if step - other < _BAD_STEPS_WITHIN]
    if len(recent) >= _MAX_BAD_STEPS:
        return GiveUp(
            f"{_MAX_BAD_STEPS} of the last {_BAD_STEPS_WITHIN:,} steps are left out already ({recent}): more won't help"
        )
    return Retry(0.0)
