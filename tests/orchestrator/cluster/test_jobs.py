"""Jobs on a real head with a dashboard: submit, follow, follow again, stop, fail."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sigray.orchestrator.cluster.jobs import check_job, environment_differences, stage, submit
from sigray.orchestrator.config import FILES, ConfigError, check_resume, load_config
from sigray.orchestrator.reports.http_server import serve
from sigray.orchestrator.reports.live_server import RUNS, Pages
from sigray.tuning.cli import main
from tests.helpers.data import TOWERS, write_dataset
from tests.helpers.head import BIN, Head, ray_head
from tests.helpers.runs import LIMIT_S

CANARY = "c4n4ryS3cretThatNobodyMayKeep"


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
    assert (tmp_path / "sigray" / "tuning" / "cli.py").exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]
    assert not list(tmp_path.rglob("__pycache__"))
    # The entrypoint runs `python -m` in this folder: the carried package wins over an installed one.
    where = [sys.executable, "-c", "import sigray.orchestrator; print(sigray.orchestrator.__file__)"]
    printed = subprocess.run(where, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(tmp_path / "sigray" / "orchestrator" / "__init__.py")
    carried = list((tmp_path / FILES).rglob("classes.json"))
    assert carried[0].read_bytes() == run_config.with_name("classes.json").read_bytes()
    # The path is relative to the file, so the job can be unpacked in any folder.
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
        ("model.tokenizer=nowhere.json", "nowhere.json does not exist"),
    ],
)
def test_a_bad_config_is_found_before_the_cluster_is_asked(run_config, change, said, capsys):
    # Nothing listens there: a message about the address would mean that the client called it.
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
    assert main(["submit", "--address", "127.0.0.1:9", "--", "train", str(run_config)]) == 2
    assert "no Ray dashboard answers at http://127.0.0.1:9: connection refused" in capsys.readouterr().err


def test_another_environment_is_named():
    pinned = Path("requirements.txt").read_text()
    assert environment_differences(pinned) == []
    changed = pinned.replace("ray==2.60.0", "ray==2.61.0").replace("requests==", "requests==9")
    assert [line.split(":")[0] for line in environment_differences(changed)] == ["ray"]


class Recorder:
    """Records the request to a cluster, and which of the uploaded files hold a word."""

    def __init__(self, word: str) -> None:
        self._word = word

    def submit_job(self, **options: Any) -> str:
        self.options = options
        files = [path for path in Path(options["runtime_env"]["working_dir"]).rglob("*") if path.is_file()]
        assert len(files) > 20
        self.holding = [path for path in files if self._word in path.read_text(errors="replace")]
        return "job"


def test_a_job_is_placed_on_the_head_and_carries_no_secret(run_config):
    """Ray puts a driver without resources on the head; a value that --env passes is in one place only."""
    client = Recorder(CANARY)
    submit(client, load_config(run_config), ["--overwrite"], env={"AWS_SECRET_ACCESS_KEY": CANARY})
    assert client.options.keys() == {"entrypoint", "submission_id", "runtime_env", "metadata"}
    assert client.holding == []
    env = client.options["runtime_env"].pop("env_vars")
    assert env.pop("AWS_SECRET_ACCESS_KEY") == CANARY
    assert CANARY not in f"{client.options} {env}"


def test_rays_controller_stays_with_the_driver():
    """The driver is on the head. Ray 2.60 pins the controller to it; another Ray may use a spot machine."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    source = inspect.getsource(DataParallelTrainer._initialize_and_run_controller)
    assert re.search(r"RAY_NODE_ID_KEY: ray\.get_runtime_context\(\)\.get_node_id\(\)", source)


@pytest.fixture(scope="module")
def head(own_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head")) as up:
        yield up


def sigray(head: Head, command: str, *words: str, timeout: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "sigray"), command, "--address", head.address, *words],
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "SIGRAY_CANARY": CANARY},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_a_job_from_its_submission_to_its_end(head, run_config):
    """One head for all: starting it costs ten seconds, a job forty."""
    # Submitted without following. To lose the terminal, the test kills `sigray logs`.
    first = [
        "--job=first",
        "--no-follow",
        "--pages=http://127.0.0.1:3999",
        "--env",
        "SIGRAY_CANARY",
        "--",
        "train",
        str(run_config),
    ]
    deadline = time.monotonic() + LIMIT_S
    while "No available agent" in (submitted := sigray(head, "submit", *first)).stderr:  # a busy head needs longer
        assert time.monotonic() < deadline, submitted.stderr
    assert (submitted.returncode, submitted.stdout) == (0, "job first\n"), submitted.stderr
    lost = subprocess.Popen(
        [str(BIN / "sigray"), "logs", "--address", head.address, "first"],
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert lost.stdout is not None
    assert any("job of run job on " in line for line in lost.stdout)
    lost.kill()
    lost.wait()
    # Followed again, from the beginning to the end.
    again = sigray(head, "logs", "first")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("job of run job on ") == 1
    assert again.stdout.count("step      4  samples        64") == 1
    assert "finished at 64 samples" in again.stdout
    assert list((run_config.parent / "storage" / "job" / "checkpoints").glob("step-0000000004"))
    # The name that --env passed is shown. The value is in no output and no file, Ray's own logs included.
    browser = {"User-Agent": "Mozilla/5.0"}  # other clients with the token may read it, as they may run code there
    said = [again.stdout, *(get(f"{head.address}/api/jobs/{job}", browser) for job in ("", "first"))]
    said.append(sigray(head, "status").stdout)
    assert "SIGRAY_CANARY" in said[1]
    kept = [path for folder in (run_config.parent / "storage", head.home, head.folder) for path in folder.rglob("*")]
    holding = [path for path in kept if path.is_file() and CANARY in path.read_text(errors="replace")]
    assert len(kept) > 50
    assert holding == []
    assert not any(CANARY in text for text in said)
    listed = sigray(head, "status").stdout
    assert "first" in listed
    assert "succeeded" in listed
    # The metadata on the Jobs page of Ray's dashboard, and the page that it names.
    assert json.loads(said[2])["metadata"] == {
        "page": "http://127.0.0.1:3999/runs/job",
        "job_name": "job",
        "storage": f"{run_config.parent}/storage/job",
    }
    places = [str(head.home / "sigray-runs"), str(run_config.parent / "storage")]
    with serve(Pages(places, [RUNS]).answer, 0) as port:
        told = json.loads(get(f"http://127.0.0.1:{port}/api/runs/job"))
    assert (told["status"], told["step"], told["planned_samples"]) == ("finished", 4, 64)
    assert told["checkpoint"]["step"] == 4

    # The exit code is the run's: 2 if there is nothing to train on.
    words = ["train", str(run_config), "run.name=other", "data.shards=/nowhere/*.tar"]
    failed = sigray(head, "submit", "--", *words)
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "/nowhere" in failed.stdout

    # Stopped with a checkpoint, so the same run can continue.
    words = ["train", str(run_config), "run.name=long", "train.num_samples=1600000"]
    assert sigray(head, "submit", "--job=long", "--no-follow", "--", *words).returncode == 0
    deadline = time.monotonic() + LIMIT_S
    while "step     10" not in log_of(head, "long"):
        assert time.monotonic() < deadline, log_of(head, "long")
        time.sleep(0.5)
    stopped = sigray(head, "stop", "long")
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped" in stopped.stdout
    assert list((run_config.parent / "storage" / "long" / "checkpoints").glob("step-*/commit.json"))
    assert sigray(head, "logs", "nothing").returncode == 2


def get(url: str, headers: dict[str, str] | None = None) -> str:
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers or {})).read().decode()


def log_of(head: Head, job: str) -> str:
    return json.loads(get(f"{head.address}/api/jobs/{job}/logs"))["logs"]
