"""The lines of metrics in a run's folder, and numbers as pages print them."""

from __future__ import annotations

import json

import pytest

from sigray.orchestrator import formatting as words
from sigray.orchestrator.config import parse_config
from sigray.orchestrator.run.folder import METRICS, RunFolder
from sigray.orchestrator.run.monitor import format_duration
from tests.helpers.data import TOWERS


@pytest.fixture
def folder(tmp_path):
    content = {
        "run": {"name": "a", "dir": str(tmp_path)},
        "data": {"shards": "/tars"},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 64, "global_batch_size": 16},
    }
    found = RunFolder(parse_config(content, "a"))
    found.path.mkdir()
    return found


def steps(folder: RunFolder) -> list[float]:
    return [line["step"] for line in folder.metrics()]


def test_steps_behind_a_checkpoint_are_forgotten(folder):
    for step in (1, 2, 3, 4):
        folder.append_metrics({"step": step})
    folder.restore_metrics(3)
    assert steps(folder) == [1, 2, 3]
    folder.restore_metrics(0)
    assert steps(folder) == []


def test_a_line_that_a_crash_cut_short_is_left_out(folder):
    folder.append_metrics({"step": 1})
    with (folder.path / METRICS).open("a") as file:
        file.write(json.dumps({"step": 2})[:-4])
    assert steps(folder) == [1]


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
