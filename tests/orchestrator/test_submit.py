"""Jobs on a real head with a dashboard of this test's own: submitted, followed, lost and found, stopped, failed."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from orchestrator.config import FILES, ConfigError, check_resume, load_config
from orchestrator.pages import RUNS, Pages
from orchestrator.serving import serve
from orchestrator.submit import check_job, environment_differences, stage
from tests.conftest import TOWERS, write_dataset
from tests.head import BIN, ray_head
from tuning.cli import main


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
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the head."""
    return tmp_path_factory.mktemp("head")


@pytest.fixture(scope="module")
def head(home: Path) -> Iterator[str]:
    """The dashboard's address."""
    with ray_head(home) as up:
        yield up.address


def sigray(head: str, command: str, *words: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "sigray"), command, "--address", head, *words],
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.ray
def test_a_job_from_its_submission_to_its_end(head, home, run_config):
    """One head for all: starting it costs ten seconds, a job forty."""
    # Submitted and left alone; a lost terminal is one that is killed.
    pages = "--pages=http://127.0.0.1:3999"
    submitted = sigray(head, "submit", "--job=first", pages, "--no-follow", "--", "train", str(run_config))
    assert (submitted.returncode, submitted.stdout) == (0, "job first\n"), submitted.stderr
    # What the Jobs page of Ray's dashboard shows of it.
    (listed,) = json.loads(urllib.request.urlopen(f"{head}/api/jobs/").read())
    assert listed["metadata"] == {
        "job_name": "job",
        "page": "http://127.0.0.1:3999/runs/job",
        "storage": f"{run_config.parent}/storage/job",
    }
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
    table = sigray(head, "status").stdout
    assert "first" in table
    assert "succeeded" in table
    # Its page is fed by the folder that the job keeps below the head's home.
    with serve(Pages([str(home / "sigray-runs")], [RUNS]).answer, 0) as port:
        told = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/api/runs/job").read())
    assert (told["status"], told["step"], told["planned_samples"]) == ("finished", 4, 64)
    assert told["checkpoint"]["step"] == 4

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
    return json.loads(urllib.request.urlopen(f"{head}/api/jobs/{job}/logs").read())["logs"]
