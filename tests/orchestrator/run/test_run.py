"""A whole run through the command line, on the Ray that the tests share: killed, interrupted, resumed, evaluated.

A run costs a minute of process starts here, so there is one, and everything happens to it: its data and its
checkpoints lie in a real S3 server, a data-shard worker, a training worker and the driver are killed, Ctrl-C stops it,
and another driver resumes it from its storage. What it must equal comes from `tests/helpers/bare.py`: no Ray, no S3,
nothing dies. Runs with a Ray of their own are in the long tier (test_chaos.py).
"""

from __future__ import annotations

import json
import os
import re
import signal
from typing import Any

import pytest
import yaml

from sigray.orchestrator.config import load_config
from sigray.workers.checkpoint.lease import RunLease
from sigray.workers.storage import Storage
from tests.helpers.bare import train_bare
from tests.helpers.processes import descendants_named
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import BATCH, NUM_STEPS, Sigray, SmallRun
from tests.helpers.s3 import BUCKET

STORAGE = f"s3://{BUCKET}/runs/small"
IN_S3 = [f"run.storage=s3://{BUCKET}/runs", f"data.shards=s3://{BUCKET}/tars/"]


def name(step: int) -> str:
    return f"step-{step:010d}"


def committed(bucket: Any) -> list[str]:
    """The checkpoints' commit marks in the run's storage."""
    keys = [item.key.removeprefix("runs/small/") for item in bucket.objects.filter(Prefix="runs/small/checkpoints/")]
    return [key for key in keys if key.endswith("commit.json")]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def undisturbed(small: SmallRun) -> dict[str, Any]:
    config = load_config(small.config, [f"run.dir={small.folder}/bare"])
    return run_on_ranks(2, train_bare, config)[0]


@pytest.fixture(scope="module")
def s3(s3_variables: dict[str, str]) -> dict[str, str]:
    """An environment that reaches the S3 server, and no Ray cluster that the machine's own may name."""
    others = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return others | s3_variables | {"COLUMNS": "160"}


@pytest.fixture(scope="module")
def arguments(small: SmallRun, shared_ray: Any) -> list[str]:
    """Arguments of `sigray train` for each driver."""
    return [str(small.config), *IN_S3, f"cluster.address={shared_ray.address}"]


@pytest.fixture(scope="module")
def bucket(s3: dict[str, str]) -> Any:
    import boto3

    return boto3.resource(
        "s3",
        endpoint_url=s3["AWS_ENDPOINT_URL"],
        region_name=s3["AWS_DEFAULT_REGION"],
        aws_access_key_id=s3["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=s3["AWS_SECRET_ACCESS_KEY"],
    ).Bucket(BUCKET)


@pytest.fixture(scope="module")
def first_output(small: SmallRun, s3: dict[str, str], bucket: Any, arguments: list[str]) -> str:
    """Output of the run until its driver is killed, before which one worker of each kind is killed."""
    for path in (small.folder / "train").iterdir():
        bucket.upload_file(str(path), f"tars/{path.name}")
    # Evaluation begins with the second driver: here its processes would import torch beside two starts of the workers.
    run = Sigray(small.folder / "first.log", s3, "train", *arguments, "eval.sets={}", "eval.pixel_baseline=false")
    run.wait_until(lambda: small.num_lines() >= 3)
    os.kill(workers_named("DataWorkerActor")[0], signal.SIGKILL)
    run.wait_until(lambda: small.num_lines() >= 14 and committed(bucket))
    os.kill(workers_named("RayTrainWorker")[0], signal.SIGKILL)
    run.wait_until(lambda: "were restarted and go on from step" in run.output())
    run.wait_until(lambda: small.num_lines() >= 31 and max(committed(bucket), default="") >= f"checkpoints/{name(20)}")
    run.process.kill()  # Ray ends what its driver had started
    run.process.wait()
    return run.output()


def workers_named(name: str) -> list[int]:
    """Process ids of the shared Ray's workers with a name."""
    return descendants_named(os.getpid(), f"ray::{name}")


@pytest.fixture(scope="module")
def second_output(small: SmallRun, s3: dict[str, str], first_output: str, arguments: list[str]) -> str:
    """Output of the same command once more, until Ctrl-C."""
    num_lines = small.num_lines()
    run = Sigray(small.folder / "second.log", s3, "train", *arguments)
    # After the third checkpoint: two are kept, so the first is deleted, which Ray Train must not mind on resume.
    run.wait_until(lambda: small.num_lines() >= num_lines + 21)
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 130, run.output()
    return run.output()


@pytest.fixture(scope="module")
def third_output(small: SmallRun, s3: dict[str, str], second_output: str) -> str:
    """Output of the resume, by a driver that knows the storage and nothing else."""
    (small.path / "metrics.jsonl").unlink()
    run = Sigray(small.folder / "third.log", s3, "resume", STORAGE)
    assert run.wait() == 0, run.output()
    return run.output()


def test_a_killed_worker_is_replaced(first_output):
    assert re.search(r"a training worker or its machine died: .*\. Starting the workers again", first_output)
    assert re.search(r"restarted and go on from step [12]\d\b", first_output)
    assert "Traceback" not in first_output


def test_a_killed_drivers_run_goes_on_with_the_same_command(second_output):
    assert f"{STORAGE} holds a run of this name: going on with it" in second_output
    (first_step,) = re.findall(r"steps +(\d+) to 120", second_output)
    assert int(first_step) >= 20


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(second_output):
    assert re.search(r"stopped at [\d,]+ samples after", second_output)
    assert f"continue with: sigray resume {STORAGE}" in second_output
    assert "Traceback" not in second_output


def test_killed_and_resumed_equals_undisturbed_bit_for_bit(small, bucket, undisturbed, third_output):
    """Also: Ray changes nothing, S3 changes nothing, and two runs of one config give the same losses."""
    assert small.losses() == undisturbed["losses"]
    commit = bucket.Object(f"runs/small/checkpoints/{name(NUM_STEPS)}/commit.json").get()["Body"].read()
    assert json.loads(commit)["files"] == undisturbed["files"]  # sizes and hashes of weights and optimizer state


def test_the_ledger_shows_every_sample_once_per_epoch(small, s3, third_output):
    """120 steps of 24 in epochs of 200, with a killed trainer, a killed data-shard worker and two drivers."""
    run = Sigray(small.folder / "audit.log", s3, "data", "audit", STORAGE)
    assert run.wait() == 0, run.output()
    assert "exact: each of 120 steps has its 24 pairs" in run.output()
    assert "every sample of 14 complete epochs was used exactly once" in run.output()


def test_a_run_leaves_what_its_user_expects(small, bucket, third_output):
    summary = json.loads((small.path / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert (summary["steps"], summary["samples_seen"]) == (NUM_STEPS, NUM_STEPS * BATCH)
    zero_shot = summary["zero_shot"]["colours"]
    assert (zero_shot["num_classes"], zero_shot["num_images"], zero_shot["chance1"]) == (4, 24, 0.25)
    assert zero_shot["pixel_baseline_top1"] > 0.9  # plain colours: a neighbour in pixels knows them
    assert 0 <= zero_shot["top1"] <= zero_shot["top5"] == 1
    assert summary["retrieval"]["colours"]["image_to_text_chance10"] == 10 / 24
    losses = small.losses()
    assert list(losses) == list(range(1, NUM_STEPS + 1))
    assert losses[NUM_STEPS] < losses[1]
    keys = [item.key.removeprefix("runs/small/") for item in bucket.objects.filter(Prefix="runs/small/")]
    assert len(committed(bucket)) == 2
    assert committed(bucket)[-1] == f"checkpoints/{name(NUM_STEPS)}/commit.json"
    records = {"config.yaml", "manifest.json", "metrics.jsonl", "events.jsonl", "summary.json", "report.html"}
    assert records <= set(keys)
    events = [json.loads(line) for line in (small.path / "events.jsonl").read_text().splitlines()]
    assert any("go on from step" in event["text"] for event in events if event["kind"] == "restart")
    assert [event["text"] for event in events if event["text"] in ("stopped", "finished")] == ["stopped", "finished"]
    assert f"evaluations/{name(NUM_STEPS)}.json" in keys
    assert list((small.path / "tensorboard").glob("events.*"))
    assert "colours" in (small.path / "report.html").read_text()
    assert yaml.safe_load((small.path / "config.yaml").read_text())["data"]["prefetch_batches"] == 4


def test_no_key_of_the_store_is_kept(small, s3, bucket, third_output):
    """The runs read and wrote with it: it is in no file of theirs, no object, and nothing that was printed."""
    secret = s3["AWS_SECRET_ACCESS_KEY"].encode()
    files = [path for path in small.folder.rglob("*") if path.is_file()]
    objects = list(bucket.objects.filter(Prefix="runs/"))
    assert len(files) > 20
    assert len(objects) > 10
    assert [path for path in files if secret in path.read_bytes()] == []
    assert [item.key for item in objects if secret in item.get()["Body"].read()] == []


def test_the_output_tells_the_batch_arithmetic_and_chance(third_output):
    for text in (
        "24 pairs = 12 x 2 workers",
        "200 pairs in 4 shards",
        "data wait",
        "colours: zero-shot, 4 classes",
        "text to image R@10",
        "chance",
        "25.00%",
        "report: ",
    ):
        assert text in third_output, third_output
    assert "Traceback" not in third_output


def test_eval_of_a_checkpoint_repeats_the_figures(small, s3, third_output):
    """A Ray task in another cluster, weights from S3: the same figures to the last digit."""
    path = small.path / "evaluations" / f"{name(NUM_STEPS)}.json"
    before = json.loads(path.read_text())
    path.unlink()
    run = Sigray(small.folder / "eval.log", s3, "eval", f"{STORAGE}/checkpoints/{name(NUM_STEPS)}")
    assert run.wait() == 0, run.output()
    assert json.loads(path.read_text()) == before
    for text in ("colours: zero-shot, 4 classes", "chance", "25.00%", "100.00%"):
        assert text in run.output()


def test_an_existing_run_is_not_overwritten(small, third_output, s3, capsys, monkeypatch):
    error = error_of(["train", str(small.config), *IN_S3, "run.seed=1"], s3, capsys, monkeypatch)
    assert "run.seed: the run was started with 0, now 1" in error
    assert "--overwrite" in error


def test_a_second_driver_is_refused(small, third_output, s3, capsys, monkeypatch):
    storage = Storage(small.folder / "leased" / "small")
    with RunLease(storage):
        error = error_of(["train", str(small.config), f"run.storage={small.folder}/leased"], s3, capsys, monkeypatch)
    assert f"is being run by process {os.getpid()}" in error


def test_resume_with_another_model_is_refused(small, third_output, s3, capsys, monkeypatch):
    error = error_of(["resume", STORAGE, "model.towers.embed_dim=32"], s3, capsys, monkeypatch)
    assert "model.towers.embed_dim: the run was started with 16, now 32" in error


def error_of(arguments: list[str], environment: dict[str, str], capsys: Any, monkeypatch: Any) -> str:
    """The message of a command that must end with exit code 2 and start no Ray.

    In this process: the same code as the command, without its six seconds of imports.
    """
    import ray

    from sigray.orchestrator.cli.main import main

    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert not ray.is_initialized()
    return error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.shards={folder}/train/none-*.tar", "names no .tar file"),
        ("data.shards={folder}/train/none.tar", "none.tar: no such file"),
        ("run.storage={folder}/run.yaml/below", "is not writable"),
        ("data.captions={{caption: 1}}", "no usable pair in 4 shards"),
        ("train.global_batch_size=400", "takes 400 samples of shards, which has 200"),
        ("eval.sets.colours.classes={folder}/none.json", "eval classes .*none.json"),
        ("model.towers.vision_cfg.pool_type=none", "image_features of two pairs have shape"),
    ],
)
def test_bad_input_is_told_before_anything_starts(small, override, message, capsys, monkeypatch):
    override = override.format(folder=small.folder)
    error = error_of(["train", str(small.config), "run.name=bad", override], {}, capsys, monkeypatch)
    assert re.search(message, error), error
    assert not (small.folder / "runs" / "bad" / "config.yaml").exists()


def test_resume_of_nothing_is_told(tmp_path, capsys, monkeypatch):
    assert f"{tmp_path} is not a run" in error_of(["resume", str(tmp_path)], {}, capsys, monkeypatch)
