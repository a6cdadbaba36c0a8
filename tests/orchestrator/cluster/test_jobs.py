"""Jobs on a real head with a dashboard: submit, follow, follow again, stop, fail."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobDetails, JobStatus

from sigray.orchestrator.carried_files import FILES
from sigray.orchestrator.cli.main import CLUSTER_COMMANDS, COMMANDS, _parser
from sigray.orchestrator.cluster.jobs import FILE, Job, environment_differences, jobs_lines, newest_job, stage, submit
from sigray.orchestrator.config import ConfigError, check_resume, load_config
from sigray.orchestrator.reports.http_server import serve
from sigray.orchestrator.reports.live_server import RUNS, Pages
from sigray.orchestrator.run.preflight import with_inputs
from sigray.orchestrator.run_folder import RunFolder, read_run
from sigray.tuning.cli import main, sweep
from sigray.tuning.study import load_study
from sigray.workers.data.manifest import Manifest
from tests.helpers.data import COLOURS, TOWERS, write_dataset
from tests.helpers.head import BIN, Head, ray_head
from tests.helpers.runs import LIMIT_S

CANARY = "c4n4ryS3cretThatNobodyMayKeep"


@pytest.fixture(scope="module")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submit")
    write_dataset(folder / "train", [40, 24])
    write_dataset(folder / "held_out", [8])
    (folder / "classes.json").write_text(json.dumps([{"id": name, "name": name} for name in COLOURS]))
    content = {
        "run": {"name": "job", "storage": str(folder / "storage")},
        "data": {"shards": str(folder / "train"), "block_size": 16, "num_lanes": 2},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 64, "global_batch_size": 16, "log_every_steps": 1},
        "eval": {"sets": {"colours": {"shards": str(folder / "held_out"), "classes": str(folder / "classes.json")}}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def study(run_config: Path) -> Path:
    """A study of two batch sizes of the run, with a large scale."""
    content = {
        "name": "tiny",
        "base": "run.yaml",
        "metric": "zero_shot.colours.top1",
        "budget": 64,
        "space": {"train.global_batch_size": {"grid": [8, 16]}},
        "scales": {"large": {"budget": 128}},
    }
    run_config.with_name("study.yaml").write_text(yaml.safe_dump(content))
    return run_config.with_name("study.yaml")


def job_of(*words: object) -> Job:
    """The job of a command's words, by the parser of the command line."""
    options = _parser([*COMMANDS, *CLUSTER_COMMANDS, sweep]).parse_args(list(map(str, words)))
    return options.job_of(options)


def test_what_a_job_carries(run_config, tmp_path, monkeypatch):
    config = load_config(run_config)
    stage(job_of("train", run_config), tmp_path)
    monkeypatch.chdir(tmp_path)
    staged = load_config(FILE)
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
    text = yaml.safe_load((tmp_path / FILE).read_text())["eval"]["sets"]["colours"]["classes"]
    assert tmp_path / text == carried[0]
    assert staged.train == config.train
    check_resume(config, staged)


def test_a_resubmission_is_the_same_run_if_its_files_are(run_config, tmp_path, monkeypatch):
    """Each job is unpacked into another folder; the content of a file counts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["train", run_config, f"model.tokenizer={tmp_path}/t.json", f"run.storage={tmp_path}/storage"]
    for folder, content in (("first", "a"), ("second", "a"), ("third", "b")):
        (tmp_path / "t.json").write_text(content)
        (tmp_path / folder).mkdir()
        stage(job_of(*words), tmp_path / folder)
        monkeypatch.chdir(tmp_path / folder)
        config = load_config(FILE)
        if folder == "first":
            RunFolder(config).begin(config, Manifest(()))
            shutil.move(tmp_path / "first", tmp_path / "gone")
            continue
        saved = read_run(config.storage_uri)
        assert Path(saved.model.tokenizer).read_text() == "a"
        with nullcontext() if folder == "second" else pytest.raises(ConfigError, match="model.tokenizer"):
            check_resume(saved, with_inputs(config, print, saved))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("run.storage=null", "run.storage is not set"),
        ("train.global_batch_sise=8", "did you mean 'global_batch_size'"),
        ("run.storage=runs", "run.storage=runs is a path on this machine"),
        ("model.tokenizer=nowhere.json", "model.tokenizer=nowhere.json is no file"),
        ("data.stores.profile=AKIA" + "A" * 16, "data.stores.profile: an Amazon access key"),
    ],
)
@pytest.mark.parametrize("command", ["train", "profile"])
def test_a_bad_config_is_found_before_the_cluster_is_asked(run_config, command, change, said, capsys):
    # Nothing listens there: a message about the address would mean that the client called it.
    assert main(["submit", "--address", "http://127.0.0.1:9", "--", command, str(run_config), change]) == 2
    assert said in capsys.readouterr().err


PLACE = "/mnt/runs/a"  # of the hosts, and not of this machine


@pytest.mark.parametrize(("words", "said"), [
    ([], "give a command"),
    (["plan", "run.yaml"], "`sigray plan` cannot be a job: submit takes train, resume, sweep"),
    (["submit", "--", "train"], "`sigray submit` cannot be a job"),
    (["resume", "runs/a"], "runs/a is a folder of this machine"),
    (["eval", "runs/a/checkpoints/step-0000000004"], "a folder of this machine"),
    (["export", "runs/a"], "a folder of this machine"),
    (["export", PLACE, "--format=onnx", "--with-decoder"], "--with-decoder needs safetensors"),
    (["export", PLACE, "--out", "exported"], "--out exported is a folder of this machine"),
    (["eval", PLACE, "eval.sets.a.classes=nowhere.txt"], "eval.sets.a.classes=nowhere.txt is no file"),
    (["eval", PLACE, "data.stores.secret_key=canary"], "data.stores.secret_key: a secret by its name"),
    (["export", PLACE, "--out", "s3://name:canary@bucket/out"], "name and password in a URL"),
    (["embed", "CONFIG"], "embeddings.store is not set"),
    (["sweep", "--plan", "STUDY"], "start no trial"),
    (["sweep", "--resume", "sweeps/a"], "sweeps/a is a folder of this machine"),
    (["sweep", "STUDY"], "storage is not set"),
    (["sweep", "STUDY", "storage=out"], "storage=out is a path on this machine"),
    (["sweep", "STUDY", "storage=/mnt", "model.tokenizer=nowhere.json"], "model.tokenizer=nowhere.json is no file"),
    (["sweep", "STUDY", "storage=/mnt", "budged=8"], "did you mean 'budget'"),
])  # fmt: skip
def test_what_cannot_be_submitted_is_refused(run_config, study, words, said, capsys, monkeypatch):
    monkeypatch.setattr("sigray.orchestrator.cluster.jobs.job_client", lambda *_: nullcontext(Recorder("canary")))
    paths = {"CONFIG": str(run_config), "STUDY": str(study)}
    assert main(["submit", "--", *(paths.get(word, word) for word in words)]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "canary" not in told


def test_each_command_is_a_job(run_config, study):
    """The words on the head, the page, and the command that uses the result."""
    tower = ["model.image_tower=/mnt/tower.pt", "model.locked=[visual]", "embeddings.store=s3://b/store"]
    storage = f"{run_config.parent}/storage/job"
    expected = {
        ("train", run_config, "--overwrite"): ("train FILE --overwrite", "/runs/job", f"export {storage}"),
        ("profile", run_config, "--steps=1", "--warm-up=1"): (
            "profile FILE --steps 1 --warm-up 1",
            "/runs/job-profile",
            f"fetch {storage}-profile/profile job-profile-traces",
        ),
        ("embed", run_config, *tower): (
            "embed FILE", "/", f"submit -- train {run_config} {shlex.join(tower)}",
        ),
        ("resume", PLACE, "optim.lr=1"): (f"resume {PLACE} optim.lr=1", "/runs/a", f"export {PLACE}"),
        ("eval", f"{PLACE}/checkpoints/step-0000000004"): (
            f"eval {PLACE}/checkpoints/step-0000000004", "/runs/a", f"fetch {PLACE}/evaluations",
        ),
        ("export", PLACE, "--format=onnx"): (
            f"export {PLACE} --format onnx --out {PLACE}/export/onnx", "/runs/a", f"fetch {PLACE}/export/onnx",
        ),
        ("export", PLACE, "--format=safetensors", "--with-decoder"): (
            f"export {PLACE} --format safetensors --out {PLACE}/export/safetensors --with-decoder",
            "/runs/a",
            f"fetch {PLACE}/export/safetensors",
        ),
        ("export", PLACE, "--out=s3://b/out", "--overwrite"): (
            f"export {PLACE} --format open_clip --out s3://b/out --overwrite", "/runs/a", "fetch s3://b/out",
        ),
        ("sweep", study, "storage=s3://b/sweeps", "--overwrite"): (
            "sweep FILE --overwrite", "/sweeps/tiny", "submit -- train s3://b/sweeps/tiny/best.yaml",
        ),
        ("sweep", "--resume", "/mnt/sweeps/tiny", "--retry"): (
            "sweep --resume /mnt/sweeps/tiny --retry", "/sweeps/tiny", "submit -- train /mnt/sweeps/tiny/best.yaml",
        ),
    }  # fmt: skip
    for words, (command, page, result) in expected.items():
        job = job_of(*words)
        found = (shlex.join(job.words).replace(FILE, "FILE"), job.page, shlex.join(job.result))
        assert found == (command, page, result)
        assert (job.file is not None) == ("FILE" in command)


def test_a_study_goes_to_the_head_as_it_was_checked(run_config, study, tmp_path, monkeypatch):
    """With its scale, its base run and its files; local folders become those of the head."""
    job = job_of("sweep", study, "storage=s3://b/sweeps", "scale=large", "optim.lr=0.5")
    stage(job, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = load_study(study, ["storage=s3://b/sweeps", "scale=large", "optim.lr=0.5"])
    after = load_study(FILE)
    assert after.config.budget == before.config.budget == 128
    assert Path(after.base["eval"]["sets"]["colours"]["classes"]).is_relative_to(tmp_path / FILES)
    classes = {"eval": None, "run": None}
    assert after.base | classes == before.base | classes
    client = Recorder(CANARY)
    submit(client, job, where=["--cluster", "my cluster.yaml"])
    assert client.options["entrypoint"].endswith(f'tuning.cli sweep {FILE} dir="$HOME/sigray-sweeps"')
    use = "sigray submit --cluster 'my cluster.yaml' -- train s3://b/sweeps/tiny/best.yaml"
    assert client.options["metadata"]["result"] == use
    assert client.options["runtime_env"]["env_vars"]["SIGRAY_JOB_RESULT"] == use


def job(id: str, status: str, start: float) -> Any:
    status = JobStatus(status)
    return JobDetails(type="SUBMISSION", submission_id=id, status=status, start_time=start, entrypoint="", metadata={})


def test_ids_are_whole_and_the_newest_job_is_taken():
    old, ended = "a-run-with-a-long-name-" * 6, "b"
    jobs = [job(old, "RUNNING", 1e12), job(ended, "SUCCEEDED", 2e12)]
    lines = jobs_lines(jobs)
    assert [line.split()[0] for line in lines] == ["job", ended, old]
    assert newest_job(jobs) == ended
    assert newest_job(jobs, at_work=True) == old
    with pytest.raises(ConfigError, match="no job of the cluster is at work"):
        newest_job(jobs[1:], at_work=True)


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
    submit(client, job_of("train", run_config), env={"AWS_SECRET_ACCESS_KEY": CANARY})
    assert client.options.keys() == {"entrypoint", "submission_id", "runtime_env", "metadata"}
    assert client.holding == []
    env = client.options["runtime_env"].pop("env_vars")
    assert env.pop("AWS_SECRET_ACCESS_KEY") == CANARY
    assert CANARY not in f"{client.options} {env}"


@pytest.mark.parametrize(("words", "names"), [
    (["train", "CONFIG", "run.trackers=[wandb,tensorboard]"], {"WANDB_API_KEY", "WANDB_PROJECT"}),
    (["sweep", "STUDY", "storage=s3://b/sweeps", "run.trackers=[mlflow]"], {"MLFLOW_TRACKING_PASSWORD"}),
    (["train", "CONFIG"], set()),
])  # fmt: skip
def test_a_job_gets_the_variables_of_its_trackers(run_config, study, words, names, capsys, monkeypatch):
    client = Recorder(CANARY)
    monkeypatch.setattr("sigray.orchestrator.cluster.jobs.job_client", lambda *_: nullcontext(client))
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, CANARY)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    paths = {"CONFIG": str(run_config), "STUDY": str(study)}
    assert main(["submit", "--no-follow", "--", *(paths.get(word, word) for word in words)]) == 0
    env = client.options["runtime_env"].pop("env_vars")
    assert {name for name, value in env.items() if value == CANARY} == names
    assert client.holding == []
    said = capsys.readouterr().out
    assert CANARY not in f"{client.options} {said}"
    assert all(name in said for name in names)


@pytest.mark.parametrize(("said", "calls"), [("No available agent to submit job", 2), ("no space left", 1)])
def test_a_head_that_has_just_started_gets_its_job(run_config, monkeypatch, said, calls):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    client = Recorder(CANARY)
    accept, asked = client.submit_job, []

    def submit_job(**options: Any) -> str:
        asked.append(options["submission_id"])
        if len(asked) == 1:
            raise RuntimeError(f"Request failed with status code 500: {said}")
        return accept(**options)

    client.submit_job = submit_job
    with nullcontext() if calls == 2 else pytest.raises(RuntimeError, match=said):
        submit(client, job_of("train", run_config), id="a")
    assert asked == ["a"] * calls


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
    submitted = sigray(head, "submit", *first)
    assert (submitted.returncode, submitted.stdout) == (0, "job first\n"), submitted.stderr
    lost = subprocess.Popen(
        [str(BIN / "sigray"), "logs", "--address", head.address, "first"],
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert lost.stdout is not None
    assert any("sigray train job as a job on " in line for line in lost.stdout)
    lost.kill()
    lost.wait()
    # Followed again, from the beginning to the end.
    again = sigray(head, "logs", "first")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("sigray train job as a job on ") == 1
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
        "result": f"sigray export {run_config.parent}/storage/job",
    }
    assert again.stdout.splitlines()[-1] == f"use the result: sigray export {run_config.parent}/storage/job"
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
    stopped = sigray(head, "stop")  # the newest at work
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped" in stopped.stdout
    assert list((run_config.parent / "storage" / "long" / "checkpoints").glob("step-*/commit.json"))
    assert sigray(head, "logs", "nothing").returncode == 2


def test_a_sweep_its_best_run_and_its_export_by_their_last_lines(head, run_config, study, s3_variables, tmp_path):
    """What a user does with a bucket: each job's last line is the next command, or fetches the result."""
    environment = head.environment | s3_variables | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    names = [word for name in s3_variables for word in ("--env", name)]

    def shell(command: str) -> str:
        done = subprocess.run(
            command, shell=True, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def job(*words: object) -> tuple[str, str]:
        """Follow a job to its end; its log and the command in its last line."""
        said = shell(shlex.join(["sigray", "submit", "--address", head.address, *names, "--", *map(str, words)]))
        return said, said.splitlines()[-1].removeprefix("use the result: ")

    shards = f"data.shards={run_config.parent}/train"
    learns = ("budget=640", "optim.lr=3e-3")  # enough for a figure above chance
    said, train_best = job("sweep", study, "storage=s3://sigray/sweeps", shards, *learns)
    assert "trials: 2 finished" in said
    assert train_best.endswith("-- train s3://sigray/sweeps/tiny/best.yaml")
    # Another submission of the sweep goes on: the files that it carries are the same, in another folder.
    assert "resuming it" in job("sweep", study, "storage=s3://sigray/sweeps", shards, *learns)[0]
    trained = shell(f"{train_best} run.storage=s3://sigray/runs")
    assert "finished at 640 samples" in trained
    run = "s3://sigray/runs/tiny_best"
    assert trained.splitlines()[-1] == f"use the result: sigray export {run}"
    shell(job("eval", run, "eval.batch_size=8")[1])
    file = max((tmp_path / "evaluations").iterdir())
    evaluation = json.loads(file.read_text())
    assert evaluation["zero_shot"]["colours"]["num_images"] == 8
    shell(job("export", run, "--out=s3://sigray/models/tiny", "--format=safetensors")[1])
    assert {"README.md", "model.safetensors"} <= {path.name for path in (tmp_path / "tiny").iterdir()}


def get(url: str, headers: dict[str, str] | None = None) -> str:
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers or {})).read().decode()


def log_of(head: Head, job: str) -> str:
    return json.loads(get(f"{head.address}/api/jobs/{job}/logs"))["logs"]
