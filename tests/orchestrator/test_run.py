"""Whole runs through the command line and a Ray of their own: trained, interrupted, killed, resumed, evaluated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import COLOURS, TOWERS, write_dataset
from tests.s3 import BUCKET, s3_server

pytestmark = pytest.mark.ray
SIGRAY = str(Path(sys.executable).parent / "sigray")
NUM_STEPS, BATCH = 40, 24
# The test's environment may name a cluster; these runs start their own.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"COLUMNS": "160"}


class Runs:
    """A folder with data, a config and the runs made of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_dataset(folder / "train", [60, 40, 70, 30])
        write_dataset(folder / "held_out", [24])
        (folder / "classes.json").write_text(json.dumps([{"id": name, "name": name} for name in COLOURS]))
        content = {
            "run": {"name": "unbroken", "dir": str(folder / "runs")},
            "data": {"shards": str(folder / "train"), "block_size": 16, "num_lanes": 3, "shuffle_window": 32},
            # Dropout in the text tower's place: patch dropout makes a step depend on its random state.
            "model": {"towers": {**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], "patch_dropout": 0.25}}},
            "train": {"num_samples": NUM_STEPS * BATCH, "global_batch_size": BATCH, "log_every_steps": 1},
            "optim": {"num_warmup_samples": 48},
            "eval": {
                "pixel_baseline": True,
                "sets": {
                    "colours": {
                        "shards": str(folder / "held_out"),
                        "classes": str(folder / "classes.json"),
                        "templates": ["{}", "a {} field"],
                    }
                },
            },
            "cluster": {"num_workers": 2},
            "checkpoint": {"save_every_steps": 15},
        }
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(content))

    def path(self, name: str) -> Path:
        return self.folder / "runs" / name

    def losses(self, name: str) -> dict[int, float]:
        lines = (self.path(name) / "metrics.jsonl").read_text().splitlines()
        losses = [(line["step"], line["train/loss"]) for line in map(json.loads, lines)]
        assert len(dict(losses)) == len(losses), "a step is logged twice"
        return dict(losses)

    def checkpoint(self, name: str, step: int) -> dict[str, dict[str, object]]:
        """Sizes and SHA-256 of the weights and the optimizer's state."""
        folder = self.path(name) / "checkpoints" / f"step-{step:010d}"
        return json.loads((folder / "commit.json").read_text())["files"]


def sigray(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [SIGRAY, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | (env or {}), timeout=280)


def start_and_wait_for_step(step: int, metrics: Path, *arguments: object, env: dict[str, str] | None = None):
    """Start `sigray` in the background and return its process once `step` is logged."""
    output = metrics.parent.with_suffix(".log").open("w+")
    command = [SIGRAY, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=output, stderr=output, text=True, env=ENVIRONMENT | (env or {}))
    process.log = output.name  # type: ignore[attr-defined]
    deadline = time.monotonic() + 240
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert process.poll() is None, Path(output.name).read_text()
        assert time.monotonic() < deadline, Path(output.name).read_text()
        time.sleep(0.02)
    return process


def descendants(pid: int) -> list[int]:
    children = [
        int(line)
        for line in subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
        ).stdout.split()
    ]
    return children + [deeper for child in children for deeper in descendants(child)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def unbroken(runs: Runs) -> subprocess.CompletedProcess[str]:
    done = sigray("train", runs.config)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_a_run_leaves_what_its_user_expects(runs, unbroken):
    folder = runs.path("unbroken")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert (summary["steps"], summary["samples_seen"]) == (NUM_STEPS, NUM_STEPS * BATCH)
    zero_shot = summary["zero_shot"]["colours"]
    assert (zero_shot["num_classes"], zero_shot["num_images"], zero_shot["chance1"]) == (4, 24, 0.25)
    assert zero_shot["pixel_baseline_top1"] > 0.9  # plain colours: a neighbour in pixels knows them
    assert 0 <= zero_shot["top1"] <= zero_shot["top5"] == 1
    assert summary["retrieval"]["colours"]["image_to_text_chance10"] == 10 / 24
    losses = runs.losses("unbroken")
    assert list(losses) == list(range(1, NUM_STEPS + 1))
    assert losses[NUM_STEPS] < losses[1]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step-0000000015",
        "step-0000000030",
        "step-0000000040",
    ]
    assert sorted(path.stem for path in (folder / "evaluations").iterdir()) == [
        "step-0000000015",
        "step-0000000030",
        "step-0000000040",
    ]
    assert list((folder / "tensorboard").glob("events.*"))
    assert "colours" in (folder / "report.html").read_text()
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["prefetch_batches"] == 4


def test_the_output_tells_the_batch_arithmetic_and_chance(unbroken):
    for text in ("24 pairs = 12 x 2 workers", "200 pairs in 4 shards", "data wait", "chance 25.00%", "report: "):
        assert text in unbroken.stdout, unbroken.stdout
    assert "Traceback" not in unbroken.stdout + unbroken.stderr


def test_interrupted_on_s3_and_resumed_ends_with_the_same_weights(runs, unbroken, tmp_path):
    """Also that two runs of one config give the same losses, bit for bit: the first half is a run of its own."""
    with s3_server(tmp_path) as variables:
        upload_shards(runs.folder / "train", variables)
        arguments = ["run.name=s3", f"run.storage=s3://{BUCKET}/runs", f"data.shards=s3://{BUCKET}/tars/"]
        metrics = runs.path("s3") / "metrics.jsonl"
        process = start_and_wait_for_step(18, metrics, "train", runs.config, *arguments, env=variables)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130, Path(process.log).read_text()
        stopped_at = json.loads((runs.path("s3") / "summary.json").read_text())["steps"]
        assert 18 <= stopped_at < NUM_STEPS
        assert f"sigray resume s3://{BUCKET}/runs/s3" in Path(process.log).read_text()
        resumed = sigray("resume", f"s3://{BUCKET}/runs/s3", env=variables)
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        assert f"steps    {stopped_at} to {NUM_STEPS}" in resumed.stdout
        assert runs.losses("s3") == runs.losses("unbroken")
        assert newest_files_on_s3(variables) == runs.checkpoint("unbroken", NUM_STEPS)


def upload_shards(folder: Path, variables: dict[str, str]) -> None:
    client = s3_client_for(variables)
    for path in folder.iterdir():
        client.upload_file(str(path), BUCKET, f"tars/{path.name}")


def newest_files_on_s3(variables: dict[str, str]) -> dict[str, object]:
    key = f"runs/s3/checkpoints/step-{NUM_STEPS:010d}/commit.json"
    return json.loads(s3_client_for(variables).get_object(Bucket=BUCKET, Key=key)["Body"].read())["files"]


def s3_client_for(variables: dict[str, str]):
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=variables["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
    )


def test_killed_workers_cost_steps_and_nothing_else(runs, unbroken):
    metrics = runs.path("killed") / "metrics.jsonl"
    process = start_and_wait_for_step(5, metrics, "train", runs.config, "run.name=killed", "eval.pixel_baseline=false")
    names = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in descendants(process.pid)}
    (data_worker,) = [pid for pid, name in names.items() if "DataWorker" in name]
    os.kill(data_worker, signal.SIGKILL)
    while len(metrics.read_text().splitlines()) < 20:
        assert process.poll() is None, Path(process.log).read_text()
        time.sleep(0.02)
    trainer = next(pid for pid, name in names.items() if "RayTrainWorker" in name or "TrainWorker" in name)
    os.kill(trainer, signal.SIGKILL)
    assert process.wait(timeout=200) == 0, Path(process.log).read_text()
    assert "were restarted and go on from step" in Path(process.log).read_text()
    assert runs.losses("killed") == runs.losses("unbroken")
    assert runs.checkpoint("killed", NUM_STEPS) == runs.checkpoint("unbroken", NUM_STEPS)


def test_eval_of_a_checkpoint_repeats_the_figures(runs, unbroken):
    folder = runs.path("unbroken")
    before = json.loads((folder / "evaluations" / "step-0000000030.json").read_text())
    done = sigray("eval", folder / "checkpoints" / "step-0000000030")
    assert done.returncode == 0, done.stdout + done.stderr
    after = json.loads((folder / "evaluations" / "step-0000000030.json").read_text())
    assert after["zero_shot"]["colours"].pop("pixel_baseline_top1") > 0.9
    assert after == before
    for text in ("zero-shot top-5", "text to image R@10", "chance", "25.00%"):
        assert text in done.stdout


def test_an_existing_run_is_not_overwritten(runs, unbroken):
    before = runs.checkpoint("unbroken", NUM_STEPS)
    done = sigray("train", runs.config)
    assert done.returncode == 2
    assert "already holds a run: go on with `sigray resume" in done.stderr
    assert runs.checkpoint("unbroken", NUM_STEPS) == before


def test_resume_with_another_model_is_refused(runs, unbroken):
    done = sigray("resume", runs.path("unbroken"), "model.towers.embed_dim=32")
    assert done.returncode == 2
    assert "model.towers.embed_dim: the run was started with 16, now 32" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.shards={folder}/train/none-*.tar"], "names no .tar file"),
        (["data.shards={folder}/train/none.tar"], "none.tar: no such file"),
        (["run.storage={folder}/run.yaml/below"], "is not writable"),
        (["data.caption_keys=[caption]"], "no usable pair in 4 shards"),
        (["train.global_batch_size=400"], "larger than the 200 samples of data.shards"),
        (["eval.sets.colours.classes={folder}/none.json"], "eval classes .*none.json"),
        (["model.towers.vision_cfg.pool_type=none"], "image_features of two pairs have shape"),
    ],
)
def test_bad_input_is_told_before_anything_starts(runs, arguments, message, capsys):
    """In this process: the same code behind the same exit code, without seven times seven seconds of imports."""
    import re

    from orchestrator.cli import main

    arguments = [argument.format(folder=runs.folder) for argument in arguments]
    assert main(["train", str(runs.config), "run.name=bad", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert not (runs.path("bad") / "config.yaml").exists()
    import ray

    assert not ray.is_initialized()
