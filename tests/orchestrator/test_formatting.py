"""Numbers as messages and pages print them."""

import pytest

from sigray.orchestrator import formatting as words
from sigray.orchestrator.formatting import format_duration


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.0, "0"), (1.0, "100"), (0.1012, "10.1"), (0.0029, "0.29"), (0.00058, "0.058"), (1e-6, "under 0.001")],
)
def test_a_rate_has_as_many_digits_as_it_needs(rate, text):
    assert words.percent(rate) == f"{text}\u00a0%"


@pytest.mark.parametrize(
    ("number", "text"),
    [(2.1319, "2.132"), (0.00098, "0.00098"), (-10.0, "\u221210"), (84992.0, "84,992"), (-0.5, "\u22120.5")],
)
def test_a_number_has_four_digits_and_a_true_minus(number, text):
    assert words.decimal(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3725, "1 h 02 min"), (200, "3 min 20 s"), (59.6, "1 min 00 s"), (59.4, "59 s"), (0, "0 s")]
)
def test_a_duration_is_rounded_to_seconds(seconds, text):
    assert format_duration(seconds) == text
