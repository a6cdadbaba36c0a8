"""The commands that need Ray, by URL on each store; tests/orchestrator/test_places.py has the others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient

from sigray.orchestrator.run_folder import RunFolder, read_run
from sigray.orchestrator.trackers.wandb_run import read_history
from sigray.workers.storage import Storage
from tests.helpers.data import COLOURS, TOWERS, write_dataset
from tests.helpers.runs import LIMIT_S, SIGRAY, Sigray
from tests.helpers.stored import SCHEMES

ROOT = Path(__file__).parents[3]
NUM_SAMPLES, BATCH = 1600, 16


@pytest.mark.parametrize("scheme", SCHEMES[1:])  # of s3, test_jobs.py
def test_embedded_killed_resumed_and_evaluated(own_ray, new_place, scheme, tmp_path):
    place = new_place(scheme)
    variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    variables |= {"COLUMNS": "160", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "WANDB_MODE": "offline"}
    variables |= {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    trackers = ["tensorboard", "wandb", "mlflow"] if scheme == SCHEMES[1] else ["tensorboard"]
    if "mlflow" in trackers:
        client = MlflowClient(variables["MLFLOW_TRACKING_URI"])
        client.create_experiment("sigray", artifact_location=str(tmp_path / "artifacts"))

    def sigray(*words: str) -> str:
        done = subprocess.run(
            [SIGRAY, *words], env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    given = Storage(place)
    for folder, sizes in (("train", [40, 24]), ("held_out", [16])):
        for path in write_dataset(tmp_path / folder, sizes):
            given.write(f"{folder}/{path.name}", path.read_bytes())
    given.write("classes.json", json.dumps([{"id": name, "name": name} for name in COLOURS]).encode())

    content = {
        "run": {"name": "walk", "dir": str(tmp_path / "runs"), "storage": f"{place}/runs", "trackers": trackers},
        "data": {"shards": f"{place}/train", "crop": "center", "block_size": 16, "num_lanes": 2, "num_workers": 1},
        "model": {
            "towers": TOWERS,
            "image_tower": "tests.helpers.stores:make_tower",
            "locked": ["visual"],
        },
        "train": {
            "num_samples": NUM_SAMPLES,
            "global_batch_size": BATCH,
            "log_every_steps": 1,
            "ledger": True,
        },
        "embeddings": {"store": f"{place}/embeddings", "batch_size": 8},
        "eval": {"sets": {"colours": {"shards": f"{place}/held_out", "classes": f"{place}/classes.json"}}},
        "checkpoint": {"save_every_steps": 10},
        "cluster": {"num_workers": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    sigray("embed", "run.yaml")

    run = f"{place}/runs/walk"
    killed = Sigray(tmp_path / "killed.log", variables, "train", str(tmp_path / "run.yaml"), has_session=True)
    killed.wait_until(lambda: any("commit.json" in name for name in names(given, "runs/walk/checkpoints")))
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    assert re.search(r"steps +[1-9][\d,]* to", sigray("resume", run))  # not from its beginning
    assert json.loads(given.read("runs/walk/summary.json"))["status"] == "finished"

    if "mlflow" in trackers:
        check_trackers(tmp_path)

    assert "top-1" in sigray("eval", run)
    assert "exactly once" in sigray("data", "audit", run)


def check_trackers(folder: Path) -> None:
    """Check that a run that was killed and resumed is one run, with each line once."""
    lines = RunFolder(read_run(str(folder / "runs" / "walk"))).metrics()
    losses = [(line["samples_seen"], line["train/loss"]) for line in lines]
    assert [seen for seen, _ in losses] == list(range(BATCH, NUM_SAMPLES + 1, BATCH))
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("sigray").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["checkpoint"].endswith(f"/runs/walk/checkpoints/step-{NUM_SAMPLES // BATCH:010d}")
    assert run.data.params["train.global_batch_size"] == str(BATCH)
    assert run.data.metrics["zero_shot_colours/top1"] >= 0
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == losses
    files = sorted((folder / "runs" / "walk" / "wandb").glob("offline-run-*/*.wandb"))
    rows = [row for file in files for row in read_history(file) if "step" in row]
    assert [(row["samples_seen"], row["train/loss"]) for row in rows] == losses


def names(storage: Storage, folder: str) -> list[str]:
    return [f"{name}/{file}" for name in storage.list(folder) for file in storage.list(f"{folder}/{name}")]
