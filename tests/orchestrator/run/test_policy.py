"""Decisions without a cluster: from observed figures to values."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigray.orchestrator.batch import micro_batch, usable_sizes
from sigray.orchestrator.run.policy import (
    Attempt,
    Failure,
    GiveUp,
    Retry,
    after_bad_step,
    after_failure,
    classify_failure,
    sizes_to_try,
    wanted_data_workers,
)
from sigray.orchestrator.run.trial import rung_step
from sigray.workers.checkpoint.index import DamagedCheckpoint
from sigray.workers.data.tar import DataError
from sigray.workers.storage import StorageError


def lines(*waits_and_busy):
    return [{"data/wait_pct": wait, "data/busy_workers": busy} for wait, busy in waits_and_busy]


def test_waiting_trainers_get_another_data_worker():
    waiting = lines((40, 2), (30, 2), (20, 2))
    assert wanted_data_workers(waiting, 2, 1, 4) == 3
    assert wanted_data_workers(waiting, 4, 1, 4) == 4
    assert wanted_data_workers(waiting[:2], 2, 1, 4) == 2  # too few lines since the last change
    assert wanted_data_workers(lines((40, 2), (0, 2), (40, 2)), 2, 1, 4) == 2  # one pause is no shortage


def test_idle_data_workers_go():
    assert wanted_data_workers(lines(*[(0, 0.6)] * 3), 3, 1, 4) == 2
    assert wanted_data_workers(lines(*[(0, 0.6)] * 3), 3, 3, 4) == 3
    assert wanted_data_workers(lines(*[(0, 1.5)] * 3), 3, 1, 4) == 3  # two would be busy three quarters of the time
    assert wanted_data_workers(lines(*[(3, 0.6)] * 3), 3, 1, 4) == 3
    assert wanted_data_workers(lines(*[(0, 0.0)] * 3), 1, 1, 4) == 1


def test_growing_and_shrinking_come_to_rest():
    """A run that needs 2.4 workers' time: whatever it begins with, it ends at a number and stays there."""
    for start in range(1, 7):
        current, seen = start, []
        for _ in range(20):
            wait = max(0.0, 100 * (1 - current / 2.4))
            current = wanted_data_workers(lines(*[(wait, min(current, 2.4))] * 3), current, 1, 6)
            seen.append(current)
        assert len(set(seen[-8:])) == 1, seen
        assert 3 <= seen[-1] <= 4


def error_named(name: str, message: str = "", **fields) -> Exception:
    """An exception of a class that needs Ray or a GPU."""
    error = type(name, (RuntimeError,), {})(message)
    for key, value in fields.items():
        setattr(error, key, value)
    return error


BROKEN = RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [10.0.0.1]:4711")
GONE = ValueError("Default process group has not been initialized, please make sure to call init_process_group.")


def test_torch_calls_a_missing_process_group_by_these_words():
    import torch.distributed as dist

    with pytest.raises(ValueError, match=re.escape(str(GONE))):
        dist.barrier()


@pytest.mark.parametrize(
    ("errors", "failure"),
    [
        ([error_named("ActorDiedError")], Failure.DIED),
        ([BROKEN, error_named("ActorDiedError")], Failure.DIED),
        ([BROKEN], Failure.DIED),  # Ray has not noticed the death yet
        ([BROKEN, error_named("ActorDiedError", preempted=True)], Failure.PREEMPTED),
        ([error_named("PreemptionError")], Failure.PREEMPTED),
        ([error_named("ActorDiedError", "the node was running low on memory")], Failure.MEMORY),
        ([error_named("OutOfMemoryError", "CUDA out of memory"), BROKEN], Failure.MEMORY),
        ([BROKEN, FloatingPointError("the loss of step 3 is nan")], Failure.BAD_STEP),
        ([BROKEN, DataError("12 of 90 samples refused")], Failure.INPUT),
        ([GONE], Failure.DIED),
        ([GONE, error_named("WorkerHealthCheckFailedError")], Failure.DIED),
        ([GONE, DataError("12 of 90 samples refused")], Failure.INPUT),
        ([DamagedCheckpoint("x")], Failure.INPUT),
        ([StorageError("no space left on device")], Failure.STORE),
        ([ConnectionRefusedError()], Failure.STORE),
        ([error_named("WorkerGroupStartupFailedError")], Failure.NO_START),
        ([error_named("WorkerGroupStartupTimeoutError")], Failure.TAKEN),
        ([KeyError("image")], Failure.ERROR),
    ],
)
def test_what_ended_an_attempt(errors, failure):
    assert classify_failure(errors)[0] is failure
    assert classify_failure(errors[::-1])[0] is failure


def test_a_death_is_told_and_not_the_connections_that_it_broke():
    death = error_named("ActorDiedError")
    assert classify_failure([BROKEN, death])[1] is death


def attempts(*endings):
    """(minutes, first step, last step, failure) each, the words the same."""
    return [Attempt(60.0 * minutes, first, last, failure, "words") for minutes, first, last, failure in endings]


def test_what_would_come_again_is_not_tried_again():
    for failure in (Failure.INPUT, Failure.BAD_STEP, Failure.MEMORY):
        assert isinstance(after_failure(attempts((0, 0, 50, failure)), 10), GiveUp)
    once = attempts((0, 0, 50, Failure.ERROR))
    assert after_failure(once, 10) == Retry(0)
    assert isinstance(after_failure([*once, *attempts((5, 40, 50, Failure.ERROR))], 10), GiveUp)
    assert after_failure([*once, *attempts((5, 40, 51, Failure.ERROR))], 10) == Retry(0)


def test_failures_are_counted_by_the_hour_and_preemptions_are_not():
    deaths = [(minutes, minutes, minutes + 1, Failure.DIED) for minutes in range(0, 600, 20)]
    assert all(after_failure(attempts(*deaths[:count]), 3) == Retry(0) for count in range(1, len(deaths)))
    assert isinstance(after_failure(attempts(*deaths), 2), GiveUp)
    preemptions = [(minutes, minutes, minutes + 1, Failure.PREEMPTED) for minutes in range(100)]
    assert after_failure(attempts(*preemptions), 0) == Retry(0)
    assert isinstance(after_failure(attempts((0, 0, 9, Failure.DIED)), 0), GiveUp)


def test_pauses_grow_while_nothing_is_done():
    stuck = [(minutes, 40, 40, Failure.STORE) for minutes in range(9)]
    pauses = [after_failure(attempts(*stuck[:count]), 100).pause_s for count in range(1, 10)]
    assert pauses == [2, 4, 8, 16, 32, 64, 120, 120, 120]
    assert after_failure(attempts(*stuck, (10, 40, 45, Failure.STORE)), 100) == Retry(0)


def test_sizes_are_those_that_divide_the_batch():
    assert usable_sizes(1, 8, 24) == [8, 6, 4, 3, 2, 1]
    assert usable_sizes(5, 5, 24) == []


def test_the_largest_group_at_once_and_a_smaller_one_after_some_patience():
    assert sizes_to_try([4, 2, 1], waited_s=0, patience_s=10) == [4]
    assert sizes_to_try([4, 2, 1], waited_s=9, patience_s=10) == [4]
    assert sizes_to_try([4, 2, 1], waited_s=10, patience_s=10) == [4, 2, 1]


@given(part=st.integers(1, 3000), limit=st.integers(1, 3000))
def test_a_micro_batch_divides_and_is_the_largest(part, limit):
    size = micro_batch(part, limit)
    assert size == max(other for other in range(1, min(part, limit) + 1) if part % other == 0)


@given(rows=st.integers(1, 300), limit=st.integers(1, 3000), num_devices=st.integers(1, 8))
def test_a_micro_batch_divides_over_the_devices_of_a_worker(rows, limit, num_devices):
    """And where the part does not, it need not either."""
    part = rows * num_devices
    fitting = [size for size in range(num_devices, part + 1, num_devices) if part % size == 0]
    expected = max([size for size in fitting if size <= limit], default=num_devices)
    assert micro_batch(part, limit, num_devices) == expected
    assert micro_batch(7, limit, 2) == (7 if limit >= 7 else 1)


def test_a_rung_is_the_first_step_at_or_behind_it():
    assert [rung_step(samples, 128) for samples in (1, 127, 128, 129, 900)] == [1, 1, 1, 2, 8]


def test_bad_steps_are_left_out_unless_there_are_many():
    assert isinstance(after_bad_step(500, [], "stop"), GiveUp)
    assert after_bad_step(500, [], "rewind") == Retry(0)
    many = list(range(400, 410))
    assert isinstance(after_bad_step(500, many, "rewind"), GiveUp)
    assert after_bad_step(5000, many, "rewind") == Retry(0)
