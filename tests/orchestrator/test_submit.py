"""Jobs on a real head with a dashboard of this test's own: submitted, followed, lost and found, stopped, failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from orchestrator.config import FILES, ConfigError, check_resume, load_config
from orchestrator.submit import check_job, environment_differences, stage
from tests.conftest import TOWERS, write_dataset
from tests.s3 import free_ports
from tuning.cli import main

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submit")
    write_dataset(folder / "train", [40, 24])
    write_dataset(folder / "held_out", [8])
    (folder / "classes.json").write_text(json.dumps([{"id": name, "name": name} for name in ("red", "green")]))
    content = {
        "run": {"name": "job", "storage": str(folder / "storage")},
        "data": {"shards": str(folder / "train"), "block_size": 16, "num_lanes": 2},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 64, "global_batch_size": 16, "log_every_steps": 1},
        "eval": {"sets": {"colours": {"shards": str(folder / "held_out"), "classes": str(folder / "classes.json")}}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder / "run.yaml"


def test_what_a_job_carries(run_config, tmp_path):
    config = check_job(str(run_config), [])
    stage(config, tmp_path)
    staged = load_config(tmp_path / "sigray-config.yaml")
    assert (tmp_path / "tuning" / "cli.py").exists()
    assert not list(tmp_path.rglob("__pycache__"))
    carried = list((tmp_path / FILES).rglob("classes.json"))
    assert carried[0].read_bytes() == run_config.with_name("classes.json").read_bytes()
    # Relative in the file: it is found wherever the job is unpacked.
    text = yaml.safe_load((tmp_path / "sigray-config.yaml").read_text())["eval"]["sets"]["colours"]["classes"]
    assert tmp_path / text == carried[0]
    assert staged.train == config.train
    check_resume(config, staged)


def test_a_carried_file_is_what_it_holds(run_config):
    config = load_config(run_config)
    first, second, other = (
        config.model_copy(update={"model": config.model.model_copy(update={"tokenizer": f"{where}/tokenizer.json"})})
        for where in (f"/a/{FILES}/12", f"/b/{FILES}/12", f"/b/{FILES}/34")
    )
    check_resume(first, second)
    with pytest.raises(ConfigError, match="tokenizer"):
        check_resume(first, other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("run.storage=null", "run.storage is not set"),
        ("train.global_batch_sise=8", "did you mean 'global_batch_size'"),
        ("model.tokenizer=nowhere.json", "nowhere.json is named and does not exist"),
    ],
)
def test_a_bad_config_is_found_before_the_cluster_is_asked(run_config, change, said, capsys):
    # Nothing listens there: a word about the address would mean that it was asked.
    assert main(["submit", "--address", "http://127.0.0.1:9", "--", "train", str(run_config), change]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["sweep", "x.yaml"], ["train"], ["train", "x.yaml", "--overwrit"]])
def test_what_cannot_be_submitted_is_refused(words, capsys):
    assert main(["submit", "--", *words]) == 2
    assert "sigray" in capsys.readouterr().err


def test_a_cluster_file_that_is_not_there_is_said(run_config, tmp_path, capsys):
    assert main(["submit", "--cluster", str(tmp_path / "no.yaml"), "--", "train", str(run_config)]) == 2
    assert "no.yaml: no such file" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_said(run_config, capsys):
    assert main(["submit", "--address", "http://127.0.0.1:9", "--", "train", str(run_config)]) == 1
    assert "no Ray dashboard answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_another_environment_is_named():
    pinned = Path("requirements.txt").read_text()
    assert environment_differences(pinned) == []
    changed = pinned.replace("ray==2.60.0", "ray==2.61.0").replace("requests==", "requests==9")
    assert [line.split(":")[0] for line in environment_differences(changed)] == ["ray"]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray head with a dashboard, its processes in a group of their own; yields the dashboard's address."""
    gcs, dashboard, agent, grpc, metrics = free_ports(5)
    # Not pytest's folder: the path of a socket may have 107 characters.
    folder = Path(f"/tmp/sigray-head-{os.getpid()}")
    command = [str(BIN / "ray"), "start", "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--block"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}", "--num-cpus=4"]
    command += [f"--metrics-export-port={metrics}", "--object-store-memory=200000000", f"--temp-dir={folder}"]
    command += ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    home = tmp_path_factory.mktemp("head")  # jobs keep their runs' folders there
    log = (home / "ray.log").open("w")
    # As clusters/setup.sh has it: `python` of the head is that of the pinned environment.
    path = f"{BIN}:{os.environ['PATH']}"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PATH": path, "HOME": str(home)}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while True:
            asked = subprocess.run(
                [str(BIN / "sigray"), "status", "--address", f"http://127.0.0.1:{dashboard}"],
                env=environment,
                capture_output=True,
                text=True,
            )
            if asked.returncode == 0:
                break
            assert process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, asked.stderr + Path(log.name).read_text()
            time.sleep(1)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        process.send_signal(signal.SIGTERM)  # with --block it ends all that it has started
        process.wait(timeout=60)
        log.close()
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def sigray(head: str, command: str, *words: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "sigray"), command, "--address", head, *words],
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.ray
def test_a_job_from_its_submission_to_its_end(head, run_config):
    """One head for all: starting it costs ten seconds, a job forty."""
    # Submitted and left alone; a lost terminal is one that is killed.
    submitted = sigray(head, "submit", "--job=first", "--no-follow", "--", "train", str(run_config))
    assert (submitted.returncode, submitted.stdout) == (0, "job first\n"), submitted.stderr
    lost = subprocess.Popen(
        [str(BIN / "sigray"), "logs", "--address", head, "first"],
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert lost.stdout is not None
    assert any("job of run job on " in line for line in lost.stdout)
    lost.kill()
    lost.wait()
    # Found again, from its beginning to its end.
    again = sigray(head, "logs", "first")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("job of run job on ") == 1
    assert again.stdout.count("step      4  samples        64") == 1
    assert "finished at 64 samples" in again.stdout
    assert list((run_config.parent / "storage" / "job" / "checkpoints").glob("step-0000000004"))
    listed = sigray(head, "status").stdout
    assert "first" in listed
    assert "succeeded" in listed

    # The exit code is the run's; where nothing is there to train on, 2.
    words = ["train", str(run_config), "run.name=other", "data.shards=/nowhere/*.tar"]
    failed = sigray(head, "submit", "--", *words)
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "/nowhere" in failed.stdout

    # Stopped: with a checkpoint, so the same run goes on where it was.
    words = ["train", str(run_config), "run.name=long", "train.num_samples=1600000"]
    assert sigray(head, "submit", "--job=long", "--no-follow", "--", *words).returncode == 0
    deadline = time.monotonic() + 120
    while "step     10" not in log_of(head, "long"):
        assert time.monotonic() < deadline, log_of(head, "long")
        time.sleep(0.5)
    stopped = sigray(head, "stop", "long")
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped" in stopped.stdout
    assert list((run_config.parent / "storage" / "long" / "checkpoints").glob("step-*/commit.json"))
    assert sigray(head, "logs", "nothing").returncode == 2


def log_of(head: str, job: str) -> str:
    import urllib.request

    return json.loads(urllib.request.urlopen(f"{head}/api/jobs/{job}/logs").read())["logs"]
