"""Verdicts on a study's claims: did the table show the expected direction?

A claim compares two sides at equal seed, budget and values of all other dimensions. Each seed gives one mean
difference. The difference has two sources of noise. A rate over n images is a sample: the difference of two rates p and
q has at most the variance p(1-p)/n + q(1-q)/n. And another seed gives another model.

A direction counts as seen if every seed shows it and the mean is more than two standard errors from zero. The error is
that of the images or, with three or more seeds, that of the seeds if it is larger.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sigray.tuning.study import Claim, split_metric
from sigray.tuning.table import Result, Row


@dataclass(frozen=True)
class Verdict:
    """The verdict on a claim."""

    answer: Literal["seen", "the other way", "undecided", "no data"]
    mean: float = 0.0  # difference better - worse, or the difference of two such differences (than_where)
    error: float = 0.0  # standard error of the mean
    by_seed: tuple[float, ...] = ()
    num_pairs: int = 0


def verdict(claim: Claim, rows: Iterable[Row], metric: str, derived: Sequence[str]) -> Verdict:
    """Judge a claim.

    Args:
        derived: dimensions computed from others (`expr`), which may differ.
    """
    rows = [row for row in rows if row.status not in ("failed", "infeasible")]
    pairs = _pairs(claim, rows, claim.where, derived)
    leads, variances = _by_seed(pairs, metric)
    num_pairs = len(pairs)
    if claim.than_where is not None:
        pairs = _pairs(claim, rows, claim.than_where, derived)
        others, other_variances = _by_seed(pairs, metric)
        leads = {seed: leads[seed] - others[seed] for seed in leads.keys() & others.keys()}
        variances = {seed: variances[seed] + other_variances[seed] for seed in leads}
        num_pairs += len(pairs)
    if not leads:
        return Verdict("no data")
    by_seed = tuple(leads[seed] for seed in sorted(leads))
    mean = statistics.fmean(by_seed)
    error = math.sqrt(sum(variances.values())) / len(leads)
    if len(by_seed) >= 3:
        error = max(error, statistics.stdev(by_seed) / math.sqrt(len(by_seed)))
    answer: Literal["seen", "the other way", "undecided"] = "undecided"
    if mean > 2 * error and min(by_seed) > 0:
        answer = "seen"
    elif mean < -2 * error and max(by_seed) < 0:
        answer = "the other way"
    return Verdict(answer, mean, error, by_seed, num_pairs)


def _pairs(
    claim: Claim, rows: Sequence[Row], where: dict[str, Any], derived: Sequence[str]
) -> list[tuple[Row, Result, Result]]:
    may_differ = {*claim.better, *claim.worse, *derived}
    pairs = []
    for row in rows:
        better = row.at(claim.at)
        if better is None or not (claim.better | where).items() <= row.values.items():
            continue
        for other in rows:
            worse = other.at(claim.at)
            if worse is None or other.group != row.group or not (claim.worse | where).items() <= other.values.items():
                continue
            # A dimension that only one of them has (`when`) does not count as different.
            names = (row.values.keys() & other.values.keys()) - may_differ
            if all(row.values[name] == other.values[name] for name in names):
                pairs.append((row, better, worse))
    return pairs


def _by_seed(pairs: Sequence[tuple[Row, Result, Result]], metric: str) -> tuple[dict[int, float], dict[int, float]]:
    """Mean difference of each seed, and its variance as a sample of images."""
    differences: dict[int, list[float]] = {}
    variances: dict[int, list[float]] = {}
    for row, better, worse in pairs:
        differences.setdefault(row.seed, []).append(better.value - worse.value)
        variances.setdefault(row.seed, []).append(sample_variance(better, metric) + sample_variance(worse, metric))
    means = {seed: statistics.fmean(values) for seed, values in differences.items()}
    return means, {seed: sum(values) / len(values) ** 2 for seed, values in variances.items()}


def sample_variance(result: Result, metric: str) -> float:
    """The variance p(1-p)/n of a rate over n images or captions."""
    task, name, figure = split_metric(metric)
    asked = {"text_to_image": "num_captions", "merged_text_to_image": "num_distinct_captions"}
    counted = asked.get(figure.rpartition("_")[0], "num_images")
    count = result.figures.get(task, {}).get(name, {}).get(counted) or 1
    return result.value * (1 - result.value) / count
