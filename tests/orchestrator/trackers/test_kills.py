"""Trackers after many kills, and before a run: every line once, with the figures of metrics.jsonl."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from sigray.orchestrator.config import ConfigError
from sigray.orchestrator.run.tracker_process import TrackerProcess, check_trackers
from sigray.orchestrator.run_folder import RunFolder
from sigray.orchestrator.trackers.tensorboard_files import TensorBoard
from sigray.orchestrator.trackers.wandb_run import read_history
from sigray.workers.data.manifest import Manifest
from tests.helpers.hanging_server import hanging_mlflow
from tests.helpers.played_run import line_of, played_config

NUM_KILLS = 20


@pytest.fixture(scope="module")
def victims() -> list[str]:
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, minutes: None, victims: list[str]) -> RunFolder:
    """A run whose driver, whose trackers' process and whose wandb-core were killed, then left in peace."""
    folder = tmp_path_factory.mktemp("kills")
    variables = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        client = MlflowClient()
        client.create_experiment("sigray", artifact_location=str(folder / "artifacts"))
        # As the driver does. The first use makes MLflow's database in several transactions: a kill there breaks it.
        check_trackers(["wandb", "mlflow"])
    environment = os.environ | variables
    rng = random.Random(7)
    command = [sys.executable, "-m", "tests.helpers.played_run", str(folder)]
    driver = subprocess.Popen(command, env=environment)
    while len(victims) < NUM_KILLS:
        time.sleep(rng.uniform(0.3, 4.5))
        name = rng.choice(["driver", "trackers.sender", "trackers.sender", "wandb-core"])
        pids = [driver.pid] if name == "driver" else named(name, folder)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        victims += [name] if pids else []
        if name == "driver":
            driver.wait()
            driver = subprocess.Popen(command, env=environment)
    time.sleep(10)
    (folder / "stop").touch()
    assert driver.wait(timeout=120) == 0
    return RunFolder(played_config(folder, []))


def named(text: str, folder: Path) -> list[int]:
    """Processes of this run, also those that a killed child left, with a text in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (
                text.encode() in (path / "cmdline").read_bytes()
                and str(folder).encode() in (path / "environ").read_bytes()
            ):
                found.append(int(path.name))
    return found


def figures_of(lines: list[dict[str, float]], key: str) -> list[tuple[int, float]]:
    return [(int(line["samples_seen"]), line[key]) for line in lines]


KEYS = ("train/loss", "throughput/samples_per_s")


def test_the_process_of_the_trackers_was_among_the_victims(run, victims):
    assert len(victims) == NUM_KILLS
    assert set(victims) == {"driver", "trackers.sender", "wandb-core"}


def test_steps_were_repeated_and_stand_once(run):
    steps = [line["step"] for line in run.metrics()]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 100


def test_mlflow_has_each_line_once(run):
    found = mlflow_history(run, [*KEYS, "zero_shot_held_out_designer/top1"])
    for key in KEYS:
        assert found[key] == figures_of(run.metrics(), key)
    assert found["zero_shot_held_out_designer/top1"] == evaluated(run)


def test_wandb_has_each_line_once(run):
    rows = [row for file in sorted((run.path / "wandb").glob("*run-*/*.wandb")) for row in read_history(file)]
    lines = [row for row in rows if "step" in row]
    for key in KEYS:
        assert figures_of(lines, key) == figures_of(run.metrics(), key)
    assert figures_of([row for row in rows if "step" not in row], "zero_shot_held_out_designer/top1") == evaluated(run)
    assert [row["_step"] for row in rows] == list(range(len(rows)))


def test_tensorboard_has_each_line_once(run):
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((run.path / "tensorboard").iterdir()):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    for key in KEYS:
        # An event holds float32.
        assert found[key] == [(seen, float(np.float32(value))) for seen, value in figures_of(run.metrics(), key)]


def evaluated(run: RunFolder) -> list[tuple[int, float]]:
    steps = sorted(int(file.stem[5:]) for file in (run.path / "evaluations").iterdir())
    return [(step * 256, 1 / step) for step in steps]


def mlflow_history(run: RunFolder, keys: list[str]) -> dict[str, Any]:
    client = MlflowClient(f"sqlite:///{run.path.parent}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("sigray").experiment_id])
    assert found.info.status == "FINISHED"
    return {key: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, key)] for key in keys}


@pytest.mark.parametrize("variables", [
    {"MLFLOW_TRACKING_URI": "http://user:word@127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
    {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"},
])  # fmt: skip
def test_a_tracker_that_is_away_at_the_start_is_an_error(minutes, variables, tmp_path, monkeypatch):
    for name, value in {"HOME": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    name = "mlflow" if "MLFLOW_TRACKING_URI" in variables else "wandb"
    with pytest.raises(ConfigError, match=rf"run\.trackers: {name}: .*docs/trackers\.md") as caught:
        check_trackers([name])
    assert "word" not in str(caught.value)


def test_a_tracker_that_answers_only_the_check_does_not_hold_the_run(minutes, tmp_path, monkeypatch):
    config = played_config(tmp_path, ["tensorboard", "mlflow"])
    run = RunFolder(config)
    run.path.mkdir()
    run.begin(config, Manifest(()))
    with hanging_mlflow() as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        check_trackers(config.run.trackers)
        said: list[str] = []
        process = TrackerProcess(run, config.run.trackers, said.append, name="played", finish_s=8)
        run.append_metrics(line_of(1))
        run.save_summary({"status": "finished"})
        assert not process.finish()
    assert any("the trackers mlflow lack figures" in text for text in said)
    assert "sigray track" in said[-1]
    assert TensorBoard(run.path).open().samples_seen == 256
