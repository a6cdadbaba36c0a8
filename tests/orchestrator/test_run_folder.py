"""The lines of metrics in a run's folder."""

from __future__ import annotations

import json

import pytest

from sigray.orchestrator.config import parse_config
from sigray.orchestrator.run_folder import METRICS, RunFolder
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
