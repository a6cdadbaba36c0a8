"""How many trials fit: node by node, all that a trial asks for, and TPU slices as a whole."""

from __future__ import annotations

import pytest

from sigray.tuning.capacity import SLICE_LABEL, Demand, Node, count_trials

DRIVER = [{"CPU": 1.0}, {"CPU": 0.5}]
NO_POOL = Demand([], [])


def trial(num_workers: int, **resources: float) -> Demand:
    return Demand([resources] * num_workers, DRIVER)


def machine(slice_name: str = "", **free: float) -> Node:
    return Node(free, {SLICE_LABEL: slice_name} if slice_name else {})


@pytest.mark.parametrize(
    ("nodes", "demand", "count"),
    [
        ([machine(CPU=8)], trial(1, CPU=1), 3),  # 2.5 each
        ([machine(CPU=2)], trial(1, CPU=1), 0),
        ([machine(CPU=64, GPU=8)], trial(2, CPU=4, GPU=1), 4),
        ([machine(CPU=16, GPU=3), machine(CPU=16, GPU=3)], trial(1, CPU=1, GPU=4), 0),  # six, but nowhere four
        ([machine(CPU=16, GPU=2), machine(CPU=16, GPU=2)], trial(4, CPU=1, GPU=1), 1),  # its workers may part
        ([machine(CPU=4, GPU=8)], trial(1, CPU=1, GPU=1), 1),  # processors run out first
    ],
)
def test_trials_are_counted_with_all_that_they_need(nodes, demand, count):
    assert count_trials(nodes, NO_POOL, demand, 100) == count


def test_the_shared_data_workers_are_placed_first():
    pool = Demand([], [{"CPU": 1.0}] * 3)
    assert count_trials([machine(CPU=8)], pool, trial(1, CPU=1), 100) == 2
    assert count_trials([machine(CPU=2)], pool, trial(1, CPU=0.1), 100) == 0


def test_large_places_stay_large():
    """The pool's GPU is the single one, so that the other two stay together."""
    nodes = [machine(CPU=9, GPU=2), machine(CPU=9, GPU=1)]
    assert count_trials(nodes, Demand([], [{"GPU": 1.0}]), trial(1, GPU=2), 9) == 1


def test_no_more_than_wanted():
    assert count_trials([machine(CPU=100)], NO_POOL, trial(1, CPU=1), 7) == 7


def test_a_trial_on_tpu_has_a_slice_to_itself_and_never_parts_over_two():
    hosts = [machine(name, CPU=100, TPU=4) for name in "aabb"]
    assert count_trials(hosts, NO_POOL, trial(2, CPU=1, TPU=4), 100) == 2
    assert count_trials(hosts, NO_POOL, trial(3, CPU=1, TPU=4), 100) == 0
    # The same hosts without names are single ones.
    assert count_trials([machine(CPU=100, TPU=4)] * 4, NO_POOL, trial(2, CPU=1, TPU=4), 100) == 0


def test_a_trial_that_does_not_fit_on_a_slice_takes_nothing_from_it():
    hosts = [machine("a", CPU=100, TPU=4), machine("b", CPU=100, TPU=4), machine("b", CPU=100, TPU=4)]
    assert count_trials(hosts, NO_POOL, trial(2, CPU=1, TPU=4), 100) == 1


def test_a_slice_that_was_tried_in_vain_is_given_back():
    """The driver's one and a half CPUs fit only where the first worker was put for a moment."""
    hosts = [machine("a", CPU=2, TPU=4), machine("b", CPU=1, TPU=4), machine("b", CPU=1, TPU=4)]
    assert count_trials(hosts, NO_POOL, trial(2, CPU=1, TPU=4), 100) == 1


def test_what_is_placed_together_is_never_more_than_there_is():
    """Ten workers of different machines, filled to the brim: 10 x 3 CPU hold 10 workers of 2 and, with the rest, no
    more drivers than fit into the single CPUs that are left."""
    nodes = [machine(CPU=3.0) for _ in range(10)]
    count = count_trials(nodes, NO_POOL, trial(1, CPU=2), 100)
    # Of ten machines, each trial takes 2 + 1 of one and half of another.
    assert count == 8
