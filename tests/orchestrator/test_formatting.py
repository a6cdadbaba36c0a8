"""Numbers as messages and pages print them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigray.orchestrator import formatting as words
from sigray.orchestrator.formatting import format_duration, scale, ticks, with_unit


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


UNITS = [None, "short", "percentunit", "percent", "bytes", "Bps", "s", "gbytes", "cores", "suffix:/s"]


@given(
    low=st.floats(-1e12, 1e12).map(lambda value: float(f"{value:.6g}")),
    part=st.floats(1e-6, 1e3),
    unit=st.sampled_from(UNITS),
)
def test_ticks_differ_and_lie_on_the_axis(low, part, unit):
    high = low + part * max(1e-6, abs(low))
    found = ticks(low, high, unit)
    places, texts = [place for place, _ in found], [text for _, text in found]
    assert 2 <= len(found) <= 6
    assert len(set(texts)) == len(texts)
    slack = 1e-6 * (high - low)
    assert all(low - slack <= place <= high + slack for place in places)
    factor, suffix = scale(max(abs(low), abs(high)), unit)
    for place, text in found:
        assert float(text.removesuffix(suffix).replace(",", "")) == pytest.approx(place * factor, abs=slack * factor)


def test_values_have_a_unit():
    shown = {
        (2.5e9, "bytes"): "2.5 GB", (12345, "suffix:/s"): "12.3 k/s", (0.1225, "percentunit"): "12.2 %",
        (90, "s"): "90 s", (3000, "s"): "50 min", (12, "cores"): "12 cores", (12000, "tasks"): "12 k tasks",
        (5.5, "gbytes"): "5.5 GiB", (4.25, None): "4.25",
    }  # fmt: skip
    assert {key: with_unit(*key) for key in shown} == shown
    assert [text for _, text in ticks(0.12, 0.131, "percentunit")] == ["12.0 %", "12.5 %", "13.0 %"]
