"""Was it seen? Only where every seed shows it and it is larger than the noise; otherwise it is said that it was not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sigray.tuning.study import Claim
from sigray.tuning.verdict import sample_variance, verdict
from tests.helpers.sweeps import table_of, trial

METRIC = "zero_shot.colours.top1"


def rows(figures: dict[tuple[str, int], list[float]], num_images: int = 10_000) -> list[Any]:
    """Trials by (loss, batch), one figure for each seed."""
    events, number = [], 0
    for (loss, batch), by_seed in figures.items():
        for seed, value in enumerate(by_seed):
            events.append(trial(number, seed, **{"loss": loss, "batch": batch, "lr": batch / 10}))
            events.append(
                {
                    "event": "result",
                    "number": number,
                    "rung": 0,
                    "samples_seen": 900,
                    "value": value,
                    "loss": None,
                    "figures": {"zero_shot": {"colours": {"top1": value, "num_images": num_images}}},
                }
            )
            events.append({"event": "decision", "number": number, "rung": 0, "answer": "stop", "why": ""})
            number += 1
    return list(table_of(*events).rows.values())


def claim(**more: Any) -> Claim:
    return Claim(text="", better={"loss": "sigmoid"}, worse={"loss": "softmax"}, **more)


def judge(figures: dict[tuple[str, int], list[float]], num_images: int = 10_000, **more: Any) -> Any:
    return verdict(claim(**more), rows(figures, num_images), METRIC, ["lr"])


def test_a_clear_lead_in_every_seed_is_seen():
    found = judge({("sigmoid", 1): [0.60, 0.62], ("softmax", 1): [0.50, 0.51]})
    assert (found.answer, found.num_pairs) == ("seen", 2)
    assert found.mean == pytest.approx(0.105)
    assert found.by_seed == pytest.approx((0.10, 0.11))
    assert judge({("softmax", 1): [0.60, 0.62], ("sigmoid", 1): [0.50, 0.51]}).answer == "the other way"


def test_one_seed_that_disagrees_leaves_it_open():
    assert judge({("sigmoid", 1): [0.70, 0.49], ("softmax", 1): [0.50, 0.50]}).answer == "undecided"


def test_a_lead_within_the_noise_of_the_images_is_open():
    """0.5 over 100 images has a standard error of 0.05, a difference of two 0.07."""
    figures = {("sigmoid", 1): [0.58], ("softmax", 1): [0.50]}
    found = judge(figures, num_images=100)
    assert found.answer == "undecided"
    assert found.error == pytest.approx(0.07, abs=1e-3)
    assert judge(figures, num_images=10_000).answer == "seen"


def test_more_pairs_of_a_seed_blur_less():
    """The error of a mean of two differences, each of two rates of 0.5 over 100 images."""
    half = {(loss, batch): [0.5] for loss in ("sigmoid", "softmax") for batch in (1, 2)}
    found = judge(half, num_images=100)
    assert found.num_pairs == 2
    assert found.error == pytest.approx(math.sqrt(2 * 2 * 0.25 / 100) / 2)


def test_seeds_that_differ_widely_count_as_noise():
    wide = {("sigmoid", 1): [0.51, 0.90, 0.52], ("softmax", 1): [0.50, 0.50, 0.50]}
    assert judge(wide).answer == "undecided"


def test_only_equal_trials_are_compared():
    found = judge({("sigmoid", 1): [0.9], ("softmax", 2): [0.1]})
    assert found.answer == "no data"
    found = judge({("sigmoid", 1): [0.6], ("softmax", 1): [0.5], ("sigmoid", 2): [0.9]})
    assert (found.num_pairs, found.mean) == (1, pytest.approx(0.1))


def test_where_and_than_where():
    figures = {
        ("sigmoid", 1): [0.6, 0.6],
        ("softmax", 1): [0.4, 0.4],
        ("sigmoid", 9): [0.6, 0.6],
        ("softmax", 9): [0.59, 0.6],
    }
    assert judge(figures, where={"batch": 1}).mean == pytest.approx(0.2)
    found = judge(figures, where={"batch": 1}, than_where={"batch": 9})
    assert found.answer == "seen"
    assert found.by_seed == pytest.approx((0.19, 0.2))
    assert judge(figures, where={"batch": 9}, than_where={"batch": 1}).answer == "the other way"


def test_failed_trials_are_no_evidence():
    all_rows = rows({("sigmoid", 1): [0.9], ("softmax", 1): [0.1]})
    all_rows[1].error = "out of memory"
    assert verdict(claim(), all_rows, METRIC, []).answer == "no data"


def test_text_to_image_counts_captions():
    (row,) = rows({("sigmoid", 1): [0.5]})
    counts = {"num_images": 100, "num_captions": 25, "num_distinct_captions": 20}
    row.results[0].figures = {"retrieval": {"colours": counts}}
    assert sample_variance(row.results[0], "retrieval.colours.merged_text_to_image_r1") == 0.25 / 20
    assert sample_variance(row.results[0], "retrieval.colours.merged_image_to_text_r1") == 0.25 / 100
    assert sample_variance(row.results[0], "retrieval.colours.text_to_image_r1") == 0.25 / 25
    assert sample_variance(row.results[0], "retrieval.colours.image_to_text_r1") == 0.25 / 100
