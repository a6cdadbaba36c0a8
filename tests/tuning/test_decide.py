"""Decisions: what stops, what never does, and that neither timing nor interruptions change any of them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigray.tuning.decide import Progress, Rules, bracket_sizes, decide, first_rung, geometric_rungs

SCHEDULERS = ["none", "asha", "median", "hyperband"]


def curves(num_trials: int, num_rungs: int, seed: int) -> list[list[float]]:
    """What each trial would show at each rung, if it came there; many ties."""
    generator = random.Random(seed)
    return [[generator.randrange(8) / 8 for _ in range(num_rungs)] for _ in range(num_trials)]


def play(rules: Rules, values: list[list[float]], parallel: int, seed: int, lost: tuple[int, ...] = ()) -> dict:
    """A sweep whose trials come to their rungs in a random order, `parallel` at once.

    Returns:
        {trial: values at the rungs that it came to}.
    """
    generator, num_rungs = random.Random(seed), len(values[0])
    trials = {number: Progress() for number in range(len(values))}
    running: set[int] = set()
    asking: dict[int, int] = {}  # trials that wait at a rung
    num_questions = 0
    while not all(progress.is_over for progress in trials.values()):
        for number in trials:
            if len(running) < parallel and not trials[number].is_over:
                running.add(number)
        number = generator.choice(sorted(running))
        have = list(trials[number].values)
        if number not in asking:
            asking[number] = len(have)
            have.append(values[number][len(have)])
            trials[number] = Progress(have)
        rung = asking[number]
        is_lost = number in lost and rung == 1
        decision = decide(rules, num_rungs, trials, number, rung)
        num_questions += 1
        assert num_questions < 100_000, "nobody goes on"
        if decision.answer == "wait" and not is_lost:
            continue
        del asking[number]
        if decision.answer == "stop" or is_lost:
            trials[number] = Progress(have, is_over=True)
            running.discard(number)
    return {number: list(progress.values) for number, progress in trials.items()}


@settings(max_examples=60)
@given(
    st.sampled_from(SCHEDULERS),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(0, 1000),
    st.integers(1, 5),
    st.integers(0, 1000),
)
def test_decisions_do_not_depend_on_who_is_faster_or_on_how_many_run_at_once(
    scheduler, num_trials, num_rungs, seed, parallel, timing
):
    values = curves(num_trials, num_rungs, seed)
    rules = Rules(scheduler, eta=3, min_trials=2)
    assert play(rules, values, parallel, timing) == play(rules, values, 1, 0)


@settings(max_examples=30)
@given(st.sampled_from(["asha", "hyperband", "median"]), st.integers(0, 500), st.integers(0, 50))
def test_trials_that_are_lost_hold_nobody_up(scheduler, seed, timing):
    values = curves(9, 3, seed)
    rules = Rules(scheduler, eta=2, min_trials=1)
    assert play(rules, values, 4, timing, lost=(0, 3, 4)) == play(rules, values, 1, 0, lost=(0, 3, 4))


@given(st.sampled_from(["asha", "hyperband"]), st.integers(1, 15), st.integers(2, 4), st.integers(0, 1000))
def test_the_best_at_a_rung_always_goes_on(scheduler, num_trials, num_rungs, seed):
    values = curves(num_trials, num_rungs, seed)
    seen = play(Rules(scheduler, eta=4), values, 2, seed)
    for rung in range(num_rungs - 1):
        there = {number: have[rung] for number, have in seen.items() if len(have) > rung}
        best = min(number for number, value in there.items() if value == max(there.values()))
        assert len(seen[best]) > rung + 1


def test_asha_keeps_one_in_eta():
    """Falling values: each trial is worse than those before it, so as many go on as the first third."""
    values = [[1 - number / 100] * 3 for number in range(27)]
    seen = play(Rules("asha", eta=3), values, 1, 0)
    lengths = [len(have) for have in seen.values()]
    assert lengths[0] == 3
    assert sum(length > 1 for length in lengths) == 1  # trial n is n-th of n, which is never within n / 3 for n > 1
    rising = play(Rules("asha", eta=3), values[::-1], 1, 0)
    assert all(len(have) == 3 for have in rising.values())


def test_asha_rounds_up():
    trials = {number: Progress([value]) for number, value in enumerate([0.4, 0.3, 0.2, 0.35])}
    decision = decide(Rules("asha", eta=3), 2, trials, 3, 0)
    assert (decision.answer, decision.why) == ("go on", "2 of 4 at this rung, 2 go on")


def test_brackets_are_compared_within_themselves():
    """Nine trials in the first bracket, none before trial 9 in the second."""
    trials = {number: Progress([0.9, 0.9]) for number in range(9)} | {9: Progress([0.1, 0.1])}
    decision = decide(Rules("hyperband", eta=3), 3, trials, 9, 1)
    assert (decision.answer, decision.why) == ("go on", "1 of 1 at this rung, 1 go on")


def test_ranks_are_told_and_ties_go_to_the_lower_number():
    trials = {0: Progress([0.5]), 1: Progress([0.5]), 2: Progress([0.6])}
    rules = Rules("asha", eta=2)
    assert decide(rules, 2, trials, 0, 0).answer == "go on"
    second = decide(rules, 2, trials, 1, 0)
    assert (second.answer, second.why) == ("stop", "2 of 2 at this rung, 1 go on")
    assert decide(rules, 2, trials, 2, 0).answer == "go on"


def test_in_order_waits_for_lower_numbers_and_out_of_order_for_nobody():
    trials = {0: Progress(), 1: Progress([0.2]), 2: Progress([0.9])}
    assert decide(Rules("asha"), 2, trials, 1, 0).why == "for trial 0"
    assert decide(Rules("asha", in_order=False), 2, trials, 1, 0).answer == "stop"
    over = trials | {0: Progress(is_over=True)}
    assert decide(Rules("asha"), 2, over, 1, 0).answer == "go on"


def test_median_stops_below_the_median_and_needs_enough_trials():
    trials = {n: Progress([value, value]) for n, value in enumerate([0.2, 0.4, 0.6])}
    rules = Rules("median", min_trials=3)
    assert decide(rules, 3, trials | {3: Progress([0.3, 0.39])}, 3, 1).answer == "stop"
    assert decide(rules, 3, trials | {3: Progress([0.41, 0.1])}, 3, 1).answer == "go on"  # its best so far counts
    assert decide(rules, 3, {0: trials[0], 1: trials[1], 3: Progress([0.1])}, 3, 0).answer == "go on"


def test_median_looks_no_further_than_the_rung():
    """The others have got ahead; 0.3 is above what they had at the first rung."""
    trials = {number: Progress([0.2, 1.0]) for number in range(3)} | {3: Progress([0.3])}
    assert decide(Rules("median", min_trials=3), 3, trials, 3, 0).answer == "go on"


def test_hyperband_deals_trials_over_brackets_and_the_last_stops_nobody():
    sizes = bracket_sizes(3, 3)
    assert sizes == [9, 5, 3]
    rules = Rules("hyperband", eta=3)
    brackets = [first_rung(rules, 3, place) for place in range(34)]
    assert [brackets[:17].count(bracket) for bracket in range(3)] == sizes
    assert brackets[17:] == brackets[:17]
    values = [[1 - number / 100] * 3 for number in range(17)]
    seen = play(rules, values, 2, 0)
    assert all(len(seen[number]) == 3 for number in range(14, 17))
    assert sum(len(have) == 1 for have in seen.values()) > 0


def test_nothing_stops_without_a_scheduler_and_all_stop_at_the_end():
    assert decide(Rules(), 2, {0: Progress([0.1])}, 0, 0).answer == "go on"
    assert decide(Rules(), 2, {0: Progress([0.1, 0.2])}, 0, 1).answer == "stop"


@pytest.mark.parametrize(
    ("budget", "eta", "first", "rungs"),
    [(900, 3, 100, [100, 300, 900]), (1000, 3, 112, [333, 1000]), (10, 2, 100, [10]), (64, 4, 1, [1, 4, 16, 64])],
)
def test_geometric_rungs(budget, eta, first, rungs):
    assert geometric_rungs(budget, eta, first) == rungs
