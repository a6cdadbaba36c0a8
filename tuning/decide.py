"""Which trials go on: pure functions of the results so far.

A trial is evaluated at rungs, counts of samples that are the same for every trial, and asks at each whether to go on.
It is compared with the trials before it that have come to the same rung; "before" is a matter of their numbers, not of
the clock. So a decision does not depend on how many trials run at once, on which machine is faster, or on what died
meanwhile, and a sweep that is resumed ends as one that was never interrupted. The price is that a trial may have to
wait at a rung for one with a lower number. The trial with the lowest number never waits, so all go on in the end.

`in_order=False` compares with whatever has come to the rung already, as ASHA does. Then nobody waits, and another
sweep of the same study may decide otherwise.
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
    """What a study says about stopping.

    Attributes:
        eta: of ASHA and HyperBand: one in so many goes on.
        min_trials: of median: trials at a rung before any is stopped there.
    """

    scheduler: Scheduler = "none"
    eta: int = 3
    min_trials: int = 3
    in_order: bool = True


@dataclass(frozen=True)
class Progress:
    """What is known of a trial.

    Attributes:
        values: its figure at each rung that it has come to, in order; higher is better.
        is_over: it comes to no further rung: stopped, failed, infeasible or at its end.
    """

    values: Sequence[float] = ()
    is_over: bool = False


@dataclass(frozen=True)
class Decision:
    """`why` is for people."""

    answer: Literal["go on", "stop", "wait"]
    why: str


def decide(rules: Rules, num_rungs: int, trials: Mapping[int, Progress], number: int, rung: int) -> Decision:
    """Whether a trial goes on behind a rung to which it has come.

    Args:
        num_rungs: of the study; the last is the end of the run.
        trials: of one seed, by number, the trial itself and the value at this rung included.
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
        late = [other for other, progress in rivals.items() if len(progress.values) <= rung and not progress.is_over]
        if late:
            return Decision("wait", f"for trial {min(late)}")
    there = {other: progress.values for other, progress in rivals.items() if len(progress.values) > rung}
    own = trials[number].values
    if rules.scheduler == "median":
        return _by_median(rules, there, own, rung)
    return _by_rank(rules, {other: values[rung] for other, values in there.items()}, number, own[rung])


def _by_rank(rules: Rules, there: Mapping[int, float], number: int, own: float) -> Decision:
    """ASHA (arXiv 1810.05934) as a stopping rule: the best of every eta at a rung go on, rounded up."""
    rank = 1 + sum(value > own or (value == own and other < number) for other, value in there.items())
    count = len(there) + 1
    kept = math.ceil(count / rules.eta)
    return Decision("go on" if rank <= kept else "stop", f"{rank} of {count} at this rung, {kept} go on")


def _by_median(rules: Rules, there: Mapping[int, Sequence[float]], own: Sequence[float], rung: int) -> Decision:
    """Median stopping (Golovin et al., Google Vizier, 2017): the best so far against the others' means so far."""
    if len(there) < rules.min_trials:
        return Decision("go on", f"{len(there)} other trials at this rung, {rules.min_trials} are needed to compare")
    median = statistics.median(statistics.fmean(values[: rung + 1]) for values in there.values())
    best = max(own[: rung + 1])
    return Decision("go on" if best >= median else "stop", f"best {best:.4g}, median of the others' means {median:.4g}")


def _place(trials: Mapping[int, Progress], number: int) -> int:
    """How many trials of the seed have a lower number."""
    return sum(other < number for other in trials)


def first_rung(rules: Rules, num_rungs: int, place: int) -> int:
    """The first rung at which a trial can be stopped: 0, but for HyperBand.

    HyperBand (arXiv 1603.06560) hedges: bracket k does not stop before rung k, and the last stops nobody. The trials
    are dealt over the brackets one after the other, in its proportions.
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
    """Trials in each of HyperBand's brackets, the one that stops earliest first."""
    most = num_rungs - 1
    return [math.ceil((most + 1) / (s + 1) * eta**s) for s in range(most, -1, -1)]


def geometric_rungs(budget: int, eta: int, first: int) -> list[int]:
    """Counts of samples that grow by eta and end with the budget: budget / eta^k, none below `first`."""
    rungs = [budget]
    while rungs[0] // eta >= first:
        rungs.insert(0, rungs[0] // eta)
    return rungs
