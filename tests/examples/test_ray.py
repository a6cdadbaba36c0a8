"""sigray in other people's Ray: the example of a Tuner, and a program with a Ray of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.in_their_ray import FOUND, SEEN
from tests.helpers.runs import LIMIT_S, SmallRun
from tests.helpers.start_ray import run_program

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "cluster.num_workers=1", "data.num_workers=1", "train.micro_batch_size=8", "train.global_batch_size=64",
    "train.ledger=false", "checkpoint.save_every_steps=8", "checkpoint.keep_newest=9", "eval.pixel_baseline=false",
]  # fmt: skip
TUNER = """
import sys
from examples.ray.tuner import main
from tests.helpers.in_their_ray import placement_groups

main(*sys.argv[1:])
print("placement groups left:", placement_groups())
"""


def python(folder: Path, *arguments: str) -> str:
    """Standard output of a Python in the tree."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"SEEN_FOLDER": str(folder), "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    command = [sys.executable, *arguments]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S)

    done = run_program(run)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_six_trials_of_a_users_tuner_end(own_ray, tmp_path):
    small = SmallRun(tmp_path)
    output = python(
        tmp_path, "-c", TUNER, str(small.config), "zero_shot/colours/top1", *SMALL, "train.num_samples=1536"
    )
    assert "6 trials, 0 failed; best: {" in output
    assert "placement groups left: 0" in output
    logs = [path.read_text() for path in (tmp_path / "runs" / "small").glob("*-trial.log")]
    assert len(logs) == 6
    ended = [re.search(r"1,536 samples, colours", log) is not None for log in logs]
    assert True in ended
    stopped = [log for log, is_whole in zip(logs, ended, strict=True) if not is_whole]
    assert all("stopping: a last checkpoint is written" in log for log in stopped)


@pytest.fixture(scope="module")
def found(own_ray: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("theirs")
    small = SmallRun(folder)
    config = folder / "theirs.yaml"
    config.write_text(small.config.read_text().replace("num_samples: 2880", "num_samples: 720"))
    python(folder, "-m", "tests.helpers.in_their_ray", str(config))
    found: dict[str, Any] = json.loads((folder / FOUND).read_text())
    reports = (folder / SEEN).read_text().splitlines()
    return found | {"reports": [json.loads(report) for report in reports], "runs": f"{folder}/runs"}


def checkpoints(found: dict[str, Any], run: str) -> list[str]:
    return [f"{found['runs']}/{run}/checkpoints/step-{step:010d}" for step in (10, 20, 30)]


def test_a_run_in_a_thread_and_in_a_ray_that_is_there(found):
    thread = found["thread"]
    assert (thread["status"], thread["has_ray"], thread["placement_groups"]) == ("finished", True, 0)


def test_ray_train_sees_the_run_and_each_durable_checkpoint(found):
    thread, names = found["thread"], checkpoints(found, "thread")
    assert thread["checkpoint"] == thread["ray_checkpoint"] == names[-1]
    assert thread["files"] == ["commit.json", "model.safetensors", "optimizer.pt"]
    assert thread["ray_step"] == 30
    assert found["reports"] == [[step, name, 2] for step, name in zip((10, 20, 30), names, strict=True)]
    assert thread["runs"] == ["FINISHED"]


def test_tune_gets_a_result_for_each_checkpoint(found):
    assert found["tune"] == {"steps": [10, 20, 30], "checkpoint_paths": checkpoints(found, "tune")}


def test_population_based_training_is_refused_before_a_trial_starts(found):
    assert "PopulationBasedTraining: population based training does nothing here" in found["population"]
    assert found["population"].endswith(" False")
