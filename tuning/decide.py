"""Which trials go on: pure functions of the results so far.

A trial is evaluated at rungs, counts of samples that are the same for every trial, and asks at each rung whether to go
on. It is compared with the trials of lower number that reached the same rung. So a decision does not depend on the
number of concurrent trials, the speed of machines or failures: a resumed sweep ends as an uninterrupted one. The price
is that a trial may wait at a rung for a trial of lower number. The trial with the lowest number never waits, so the
sweep always makes progress.

`in_order=False` compares with all trials that have reached the rung, as ASHA does. Then no trial waits, but another
sweep of the same study may decide differently.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Scheduler = Literal["none", "asha", "median", "hyperband"]


@dataclass(frozen=True)
class Rules:
    """The settings of a study's scheduler.

    Attributes:
        eta: of ASHA and HyperBand: one in eta trials goes on.
        min_trials: of median: other trials at a rung before a trial can stop there.
    """

    scheduler: Scheduler = "none"
    eta: int = 3
    min_trials: int = 3
    in_order: bool = True


@dataclass(frozen=True)
class Progress:
    """The results of a trial so far.

    Attributes:
        values: the metric at each rung that the trial reached, in order; higher is better.
        is_over: the trial reaches no further rung: stopped, failed, infeasible or at its end.
    """

    values: Sequence[float] = ()
    is_over: bool = False


@dataclass(frozen=True)
class Decision:
    """An answer to a trial, and the reason for the user."""

    answer: Literal["go on", "stop", "wait"]
    why: str


def decide(rules: Rules, num_rungs: int, trials: Mapping[int, Progress], number: int, rung: int) -> Decision:
    """Whether a trial goes on after a rung that it has reached.

    Args:
        num_rungs: of the study; the last is the end of the run.
        trials: of one seed, by number, with the trial itself and its value at this rung.
        number: of the trial.
        rung: 0 for the first.
    """
    if rung == num_rungs - 1:
        return Decision("stop", "at the end")
    if rules.scheduler == "none":
        return Decision("go on", "")
    first = first_rung(rules, num_rungs, _place(trials, number))
    if rung < first:
        return Decision("go on", f"its bracket begins to stop at rung {first + 1}")
    rivals = {
        other: progress
        for other, progress in trials.items()
        if other != number
        and (other < number or not rules.in_order)
        and first_rung(rules, num_rungs, _place(trials, other)) == first
    }
    if rules.in_order:
        missing = [other for other, progress in rivals.items() if len(progress.values) <= rung and not progress.is_over]
        if missing:
            return Decision("wait", f"for trial {min(missing)}")
    there = {other: progress.values for other, progress in rivals.items() if len(progress.values) > rung}
    own = trials[number].values
    if rules.scheduler == "median":
        return _by_median(rules, there, own, rung)
    return _by_rank(rules, {other: values[rung] for other, values in there.items()}, number, own[rung])


def _by_rank(rules: Rules, there: Mapping[int, float], number: int, own: float) -> Decision:
    """Decide by ASHA (arXiv 1810.05934): the best 1/eta of a rung, rounded up, go on."""
    rank = 1 + sum(value > own or (value == own and other < number) for other, value in there.items())
    count = len(there) + 1
    kept = math.ceil(count / rules.eta)
    return Decision("go on" if rank <= kept else "stop", f"{rank} of {count} at this rung, {kept} go on")


def _by_median(rules: Rules, there: Mapping[int, Sequence[float]], own: Sequence[float], rung: int) -> Decision:
    """Decide by median stopping (Golovin et al., Google Vizier, 2017).

    The trial's best value so far must reach the median of the other trials' mean values so far.
    """
    if len(there) < rules.min_trials:
        return Decision("go on", f"{len(there)} other trials at this rung, {rules.min_trials} are needed to compare")
    median = statistics.median(statistics.fmean(values[: rung + 1]) for values in there.values())
    best = max(own[: rung + 1])
    return Decision("go on" if best >= median else "stop", f"best {best:.4g}, median of the others' means {median:.4g}")


def _place(trials: Mapping[int, Progress], number: int) -> int:
    """Number of trials of the seed with a lower number."""
    return sum(other < number for other in trials)


def first_rung(rules: Rules, num_rungs: int, place: int) -> int:
    """The first rung at which a trial can be stopped: 0, except with HyperBand.

    Bracket k of HyperBand (arXiv 1603.06560) does not stop before rung k, and the last bracket stops no trial. Trials
    go to the brackets in order, in HyperBand's proportions.
    """
    if rules.scheduler != "hyperband":
        return 0
    sizes = bracket_sizes(rules.eta, num_rungs)
    place %= sum(sizes)
    for bracket, size in enumerate(sizes):
        if place < size:
            return bracket
        place -= size
    raise AssertionError


def bracket_sizes(eta: int, num_rungs: int) -> list[int]:
    """Number of trials in each HyperBand bracket, the earliest stopping first."""
    most = num_rungs - 1
    return [math.ceil((most + 1) / (s + 1) * eta**s) for s in range(most, -1, -1)]


def geometric_rungs(budget: int, eta: int, first: int) -> list[int]:
    """Rungs at budget / eta^k samples, rising, none below `first`."""
    rungs = [budget]
    while rungs[0] // eta >= first:
        rungs.insert(0, rungs[0] // eta)
    return rungs
