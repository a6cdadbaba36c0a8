"""Decisions as values: pure functions of what was observed. `supervisor.py` acts on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from sigray.orchestrator.batch import MAX_DATA_WORKER_UTILISATION

HOUR_S = 3600.0
_MAX_BAD_STEPS, _BAD_STEPS_WITHIN = 10, 1000
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 120.0

# Lines of metrics that a decision looks at: a single line may hold a checkpoint's or a shard's pause.
_NUM_LINES = 3
_MUCH_WAIT_PCT = 5.0
_LITTLE_WAIT_PCT = 1.0


def wanted_data_workers(lines: Sequence[dict[str, float]], current: int, least: int, most: int) -> int:
    """How many data-shard workers a run should have.

    One more while the trainers wait for data; one fewer once they do not wait and one fewer would still not be full.

    Args:
        lines: metrics since the number last changed, oldest first: `data/wait_pct`, and `data/busy_workers`, how many
            workers' time was spent on decoding.
        current: workers that there are or that are starting.
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
    """What ended an attempt of the training workers; the value is for the user."""

    DIED = "a training worker or its machine died"
    PREEMPTED = "a machine was taken away"
    STORE = "the storage or the shards could not be reached"
    NO_START = "the training workers did not start"
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
_START_ERRORS = {"WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError"}
# By name, so that neither torch nor Ray is needed to decide; and of exceptions, all classes that they derive from.
_PERMANENT = {
    "FloatingPointError": Failure.BAD_STEP,
    "OutOfMemoryError": Failure.MEMORY,
    "MemoryError": Failure.MEMORY,
    "ValueError": Failure.INPUT,
}
# A trainer whose peer dies sees a broken connection or, once Ray Train has begun to end the group around it, a process
# group that is gone, which torch calls a ValueError; that is not its own error.
_BROKEN_CONNECTIONS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Socket closed",
    "NCCL",
    "process group has not been initialized",
    "Invalid process group specified",
)


def classify_failure(errors: Iterable[BaseException]) -> tuple[Failure, BaseException]:
    """What ended an attempt, of the errors of all training workers, and the error that says so.

    What will come again wins over what may not, and a death over the connections that it broke.
    """
    errors = list(errors)
    broken = [error for error in errors if any(text in str(error) for text in _BROKEN_CONNECTIONS)]
    names = [
        (error, {kind.__name__ for kind in type(error).__mro__} - ({"ValueError"} if error in broken else set()))
        for error in errors
    ]

    def first(kinds: set[str]) -> BaseException | None:
        return next((error for error, of_one in names if of_one & kinds), None)

    for name, failure in _PERMANENT.items():
        if (error := first({name})) is not None:
            return failure, error
    preempted = next((error for error in errors if getattr(error, "preempted", False)), first({"PreemptionError"}))
    if preempted is not None:
        return Failure.PREEMPTED, preempted
    if (error := first(_DEATHS)) is not None:
        # Ray says in words that its memory monitor did it.
        is_memory = "running low on memory" in str(error)
        return Failure.MEMORY if is_memory else Failure.DIED, error
    if broken:
        return Failure.DIED, broken[0]
    for kinds, failure in ((_START_ERRORS, Failure.NO_START), (_STORE_ERRORS, Failure.STORE)):
        if (error := first(kinds)) is not None:
            return failure, error
    return Failure.ERROR, errors[0]


@dataclass(frozen=True)
class Attempt:
    """One life of the training workers that ended by a failure."""

    ended_at: float  # seconds of a clock
    first_step: int  # steps done when it began
    last_step: int  # steps that it is known to have done
    failure: Failure
    message: str


@dataclass(frozen=True)
class Retry:
    """Start the training workers again after a pause."""

    pause_s: float


@dataclass(frozen=True)
class GiveUp:
    """End the run; the reason is for the user, empty where the error itself says all."""

    reason: str = ""


class RunFailed(RuntimeError):
    """A run that ended by an error in the training workers; the message is for the user."""


def after_failure(attempts: Sequence[Attempt], max_failures_per_hour: int) -> Retry | GiveUp:
    """Whether to try again.

    What would come again ends the run at once: bad input, a loss that is not a number, too little memory, an error
    with the same words at the same step as before. The rest is tried again, at once where the attempt had got ahead,
    with growing pauses where it had not, and not more often than the budget allows. Preemptions are not counted.

    Args:
        attempts: those that failed, oldest first; the newest is the one to decide about.
        max_failures_per_hour: cluster.max_failures_per_hour.
    """
    newest = attempts[-1]
    if newest.failure in (Failure.INPUT, Failure.BAD_STEP, Failure.MEMORY):
        return GiveUp()
    if len(attempts) > 1 and newest.failure is Failure.ERROR:
        before = attempts[-2]
        if (before.last_step, before.message) == (newest.last_step, newest.message):
            return GiveUp("the same error came twice at the same step")
    counted = [
        attempt
        for attempt in attempts
        if attempt.failure is not Failure.PREEMPTED and newest.ended_at - attempt.ended_at < HOUR_S
    ]
    if newest.failure is not Failure.PREEMPTED and len(counted) > max_failures_per_hour:
        return GiveUp(
            f"{len(counted)} failures within an hour, cluster.max_failures_per_hour={max_failures_per_hour} are allowed"
        )
    num_stuck = 0
    for attempt in reversed(attempts):
        if attempt.last_step > attempt.first_step:
            break
        num_stuck += 1
    return Retry(min(_FIRST_PAUSE_S * 2 ** (num_stuck - 1), _LONGEST_PAUSE_S) if num_stuck else 0.0)


def choose_size(sizes: Sequence[int], fitting: int, waited_s: float, patience_s: float) -> int | None:
    """How many training workers to start; None to wait a little longer.

    The largest number at once. A smaller one only after some patience: those of the attempt before may still hold
    their places, and machines that start together do not join in the same second.

    Args:
        sizes: usable ones, largest first.
        fitting: for how many there is room now.
    """
    best = next((size for size in sizes if size <= fitting), None)
    if best == sizes[0] or waited_s >= patience_s:
        return best
    return None


def after_bad_step(step: int, left_out: Sequence[int], on_bad_loss: str) -> Retry | GiveUp:
    """Whether to go back to the checkpoint before a bad step and leave its batch out.

    Args:
        step: the bad one, counted from 1.
        left_out: those before it.
        on_bad_loss: train.on_bad_loss.
    """
    if on_bad_loss == "stop":
        return GiveUp("train.on_bad_loss=rewind would go back and leave the batch of that step out")
    recent = [other for other in left_out if step - other < _BAD_STEPS_WITHIN]
    if len(recent) >= _MAX_BAD_STEPS:
        return GiveUp(
            f"{_MAX_BAD_STEPS} of the last {_BAD_STEPS_WITHIN:,} steps are left out already ({recent}): more won't help"
        )
    return Retry(0.0)
