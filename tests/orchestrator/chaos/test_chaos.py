"""Faults on purpose: what is drawn, what is compared, which processes are hit, and one run in which things die."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from sigray.orchestrator.chaos.chaos import common_overrides, disturbed_overrides
from sigray.orchestrator.chaos.comparison import Outcome, differences, rounding, verdict
from sigray.orchestrator.chaos.faults import KINDS, choose_kinds, draw, refused_steps
from sigray.orchestrator.chaos.processes import Family, Process, descendants, is_alive, read_process, send
from sigray.orchestrator.chaos.supervised import LogReader, Supervised
from sigray.orchestrator.cli.main import main
from sigray.orchestrator.config import ConfigError, RunConfig, load_config, override
from tests.helpers.runs import SmallRun

ALL = list(KINDS)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    content = {
        "run": {"name": "a", "dir": str(tmp_path / "runs")},
        "data": {"shards": str(tmp_path)},
        "model": {"name": "ViT-B-16-SigLIP"},
        "train": {"num_samples": 1190, "global_batch_size": 10},  # 119 steps
        "checkpoint": {"save_every_steps": 20},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return load_config(tmp_path / "run.yaml")


# ------------------------------------------------------------------------------------------------------- drawing


def test_a_seed_repeats_its_faults_and_another_one_has_others():
    first, again, other = ([draw(seed, number, ALL, 20) for number in range(40)] for seed in (0, 0, 1))
    assert first == again
    assert [plan.kind for plan in first] != [plan.kind for plan in other]
    assert [plan.wait_s for plan in first] != [plan.wait_s for plan in other]


def test_every_kind_comes_once_in_each_round():
    for number in range(0, 100, len(ALL)):
        assert sorted(draw(3, number + place, ALL, 20).kind for place in range(len(ALL))) == sorted(ALL)
    assert len({tuple(draw(3, number + place, ALL, 20).kind for place in range(10)) for number in (0, 10, 20)}) == 3


def test_waits_have_the_mean_that_was_asked_for():
    plans = [draw(5, number, ALL, 20) for number in range(4000)]
    assert all(0 <= plan.wait_s <= 60 and 0 <= plan.choice < 1 for plan in plans)
    # An exponential of mean 20 cut at 60: 20 (1 - e^-3) = 19.0, its mean over 4000 within 3 standard errors of 0.28.
    assert sum(plan.wait_s for plan in plans) / len(plans) == pytest.approx(19.0, abs=0.9)


def test_by_default_all_kinds_are_drawn_that_the_run_can_have(config):
    chosen = set(choose_kinds(config, None))
    assert {"trainer", "data-worker", "driver", "node", "gcs", "storage", "truncate"} <= chosen
    assert "evaluation" not in chosen
    remote = override(config, ["run.storage=s3://bucket/runs", "checkpoint.keep_newest=1"], "test")
    assert not {"storage", "truncate"} & set(choose_kinds(remote, None))
    evaluated = override(config, ["eval.sets.a.shards=/tars"], "test")
    assert "evaluation" in choose_kinds(evaluated, None)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["meteor"], "'meteor' is none of trainer, "),
        (["evaluation"], "evaluation is not possible here: the run has no eval.sets"),
        ([], "--kinds is empty"),
    ],
)
def test_kinds_that_cannot_be_drawn_are_refused(config, wanted, message):
    with pytest.raises(ConfigError, match=message):
        choose_kinds(config, wanted)


def test_the_two_runs_differ_in_nothing_that_weights_depend_on(config, tmp_path):
    out = tmp_path / "runs" / "a-chaos"
    common, other = (common_overrides(config, out, name) for name in ("undisturbed", "disturbed"))
    undisturbed = override(config, common, "test")
    disturbed = override(config, [*other, *disturbed_overrides(config, ALL, 50)], "test")
    assert undisturbed.folder == out / "undisturbed"
    assert disturbed.folder == out / "disturbed"
    assert undisturbed.train.ledger
    assert undisturbed.cluster.address is None
    assert disturbed.cluster.max_failures_per_hour == config.cluster.max_failures_per_hour + 50
    assert disturbed.data.worker_timeout_s == 10
    for section in ("model", "train", "loss", "optim", "eval", "checkpoint"):
        assert getattr(disturbed, section) == getattr(undisturbed, section)
    assert disturbed.data == override(undisturbed, ["data.worker_timeout_s=10"], "test").data
    remote = override(config, ["run.storage=s3://bucket/runs/"], "test")
    assert 'run.storage="s3://bucket/runs/a-chaos"' in common_overrides(remote, out, "disturbed")


def test_all_kinds_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["chaos", "--help"])
    text = capsys.readouterr().out
    for name, kind in KINDS.items():
        assert f"  {name:<18}{kind.what}\n" in text


def test_the_checkpoints_to_come_are_refused(config):
    assert refused_steps(config, 0) == [20, 40, 60, 80, 100]
    assert refused_steps(config, 79) == [80, 100, 119]
    assert refused_steps(config, 80) == [100, 119]
    assert refused_steps(config, 119) == []
    by_time = override(config, ["checkpoint.save_every_steps=null", "train.log_every_steps=7"], "test")
    assert refused_steps(by_time, 8) == [14, 21, 28, 35, 42]


# ----------------------------------------------------------------------------------------------------- comparing

FILES = {"model.safetensors": {"bytes": 5, "xxh3_128": "ab"}, "optimizer.pt": {"bytes": 7, "xxh3_128": "cd"}}
LOSSES = [(1, 0.5), (2, 0.25), (3, 0.125)]


@pytest.mark.parametrize(
    ("other", "first"),
    [
        (Outcome(3, FILES, LOSSES), None),
        (Outcome(3, dict(reversed(FILES.items())), LOSSES), None),
        (Outcome(2, FILES, LOSSES), "the last checkpoint is of step 2, undisturbed 3"),
        (Outcome(0, {}, []), "the last checkpoint is of step 0, undisturbed 3"),
        (Outcome(3, {**FILES, "optimizer.pt": {"bytes": 7, "xxh3_128": "ce"}}, LOSSES), "optimizer.pt of step 3 has"),
        (Outcome(3, {"model.safetensors": FILES["model.safetensors"]}, LOSSES), "optimizer.pt of step 3 has"),
        (Outcome(3, FILES, [*LOSSES, (2, 0.25)]), "step 2 is logged 2 times"),
        (Outcome(3, FILES, LOSSES[:2]), "step 3 is not logged"),
        (Outcome(3, FILES, [*LOSSES, (4, 0.1)]), "step 4 is logged, but not undisturbed"),
        (
            Outcome(3, FILES, [(1, 0.5), (2, 0.25000000000000006), (3, 0.125)]),
            "the loss of step 2 is 0.25000000000000006",
        ),
        (Outcome(3, FILES, [(1, 0.5), (2, float("nan")), (3, 0.125)]), "the loss of step 2 is nan"),
    ],
)
def test_each_difference_is_found(other, first):
    found = differences(Outcome(3, FILES, LOSSES), other, is_exact=True)
    if first is None:
        assert found == []
        assert verdict(found, 3, "") == "identical: weights, optimizer and 3 losses; ledger exact"
    else:
        assert [line[: len(first)] for line in found[:1]] == [first]
        assert verdict(found, 3, "").startswith(f"different: {found[0]}")


def test_where_bits_may_differ_the_last_losses_are_compared(config):
    assert rounding(config) == ""
    why = rounding(override(config, ["cluster.num_workers=[1, 2]"], "test"))
    assert why.startswith("cluster.num_workers=[1, 2]")
    assert rounding(override(config, ["cluster.accelerator=cuda"], "test"))
    rounded = Outcome(3, {}, [(1, 0.9), (2, 0.25), (3, 0.12501)])
    assert differences(Outcome(3, FILES, LOSSES), rounded, is_exact=False) == []
    assert verdict([], 3, why).startswith("alike: the last losses agree to 0.001")
    far = Outcome(3, {}, [(1, 0.5), (2, 0.25), (3, 0.1252)])
    assert differences(Outcome(3, FILES, LOSSES), far, is_exact=False)[0].startswith("the loss of step 3 is 0.1252")


OUTPUT = """\
starting Ray on this machine
run      /runs/a
batch    24 pairs = 12 x 2 workers
steps    0 to 1,200
step      9  samples     90  loss  2.1  scale  10.00
step  1,000  samples 10,000  loss  2.1  scale  10.00
a training worker or its machine died: x. Starting the workers again
steps    980 to 1,200
step    990  samples  9,900  loss  2.1  scale  10.00
st
--- driver 2
steps    980 to 1,200
"""


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_the_output_tells_attempts_and_repeated_steps(size):
    reader = LogReader()
    for begin in range(0, len(OUTPUT), size):
        reader.feed(OUTPUT[begin : begin + size])
    assert (reader.num_attempts, reader.num_lines, reader.num_in_attempt, reader.step) == (3, 3, 0, 980)
    assert reader.num_repeated == 20 + 10


# ----------------------------------------------------------------------------------------------------- processes

# Starts a child that starts a child; all three sleep.
PARENT = """\
import subprocess, sys, time
level = int(sys.argv[1])
if level:
    subprocess.Popen([sys.executable, "-S", "-c", sys.argv[2], str(level - 1), sys.argv[2]])
time.sleep(60)
"""


def wait_until(condition, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_descendants_are_those_below():
    processes = {pid: Process(pid, parent, 0, "S", "") for pid, parent in {2: 1, 3: 2, 4: 3, 5: 1, 6: 5, 7: 4}.items()}
    assert descendants(processes, {2}) == {2, 3, 4, 7}
    assert descendants(processes, {4, 5}) == {4, 5, 6, 7}
    assert descendants(processes, set()) == set()


def test_children_of_a_dead_parent_stay_in_the_family():
    top = subprocess.Popen([sys.executable, "-S", "-c", PARENT, "2", PARENT])
    try:
        family = Family(top.pid)
        wait_until(lambda: len(family.look()) == 3)
        assert os.getpid() not in {process.pid for process in family.look()}
        top.kill()
        top.wait()
        left = family.look()
        assert len(left) == 2
        send(left[0], signal.SIGSTOP)
        wait_until(lambda: family.look()[0].state == "T")
        family.kill()  # a stopped one too
        assert family.look() == []
        assert not any(map(is_alive, left))
    finally:
        top.kill()
        top.wait()


def test_a_process_that_has_the_pid_of_another_is_left_alone():
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    try:
        process = read_process(child.pid)
        earlier = Process(process.pid, process.parent, process.started - 1, process.state, process.command)
        assert not send(earlier, signal.SIGKILL)
        assert child.poll() is None
        assert send(process, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert not send(process, signal.SIGKILL)
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("trainer", "ray::RayTrainWorker"),
        ("trainer", "ray::RayTrainWorker.execute"),
        ("data-worker", "ray::DataWorkerActor.__init__"),
        ("node", "/venv/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/x"),
        ("gcs", "/venv/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp/x"),
        ("evaluation", "ray::evaluate_checkpoint"),
        ("evaluation", "ray::FeatureWorker.images"),
    ],
)
def test_a_kind_hits_its_process_and_no_other(kind, command, config, tmp_path, monkeypatch):
    others = [
        "ray::IDLE",
        "ray::RunMonitor",
        "ray::RayTrainWorkerGroup",
        "python log_monitor.py --raylet",
        "raylet.log",
    ]
    table = [Process(100 + place, 1, -1, "S", text) for place, text in enumerate([*others[:2], command, *others[2:]])]
    run = Supervised(config, [], tmp_path / "log", print, stuck_s=1)
    run.family = Family(-1)
    sent = []
    monkeypatch.setattr(
        "sigray.orchestrator.chaos.faults.send", lambda process, number: sent.append(process.command) or True
    )
    monkeypatch.setattr(run.family, "look", lambda: table)
    hit = KINDS[kind].inject(run, 0.99)
    assert hit.pid == 102
    assert hit.is_over()  # no such process
    assert sent == [command]
    monkeypatch.setattr(run.family, "look", lambda: [process for process in table if process.pid != 102])
    assert KINDS[kind].inject(run, 0.99) is None


# A run of three steps that does as its life says: its exit code, or h to hang.
RUN = """\
import pathlib, sys, time
folder, lives = pathlib.Path(sys.argv[1]), sys.argv[2]
number = len(list(folder.glob("life-*")))
(folder / f"life-{number}").write_text(" ".join(sys.argv[3:]))
life = lives[number]
if life.isupper():
    print("steps    0 to 3", "step      1  samples     90  loss", sep="\\n", flush=True)
if life in "hH":
    time.sleep(60)
print("the last words")
sys.exit("abc".index(life.lower()))
"""


def supervised(config: RunConfig, folder: Path, lives: str, **options) -> tuple[Supervised, list[str]]:
    """Exit codes by letters, a for 0; in capitals after a step."""
    said: list[str] = []
    command = [sys.executable, "-S", "-c", RUN, str(folder), lives]
    options = {"stuck_s": 30.0} | options
    return Supervised(config, command, folder / "log", said.append, **options), said


def test_a_driver_that_ends_is_started_again(config, tmp_path):
    run, said = supervised(config, tmp_path, "HBbCba")
    with run:
        assert run.follow(lambda: run.reader.num_lines > 0)
        run.kill()
        assert not run.follow(lambda: False)
    assert (run.num_restarts, run.reader.num_attempts, run.left_behind) == (5, 3, [])
    assert [text.split(";")[0].strip() for text in said] == [
        "the driver was killed (SIGKILL)",
        "the driver ended with exit code 1",
        "the driver ended with exit code 1",
        "the driver ended with exit code 2",
        "the driver ended with exit code 1",
    ]
    assert (tmp_path / "life-0").read_text() == "--overwrite"
    assert (tmp_path / "life-1").read_text() == ""


@pytest.mark.parametrize(
    ("lives", "options", "kind", "message"),
    [
        ("Bc", {}, ConfigError, "refuses .*\n(.*\n)*the last words"),
        ("Bbbb", {}, RuntimeError, "ended with exit code 1:\n(.*\n)*the last words"),
        ("B", {"max_idle_drivers": 0}, RuntimeError, "ended with exit code 1"),
        ("H", {"stuck_s": 1.5}, RuntimeError, "no step for 2 s"),
    ],
)
def test_a_run_that_does_not_get_on_is_an_error(lives, options, kind, message, config, tmp_path):
    run, _ = supervised(config, tmp_path, lives, **options)
    with run, pytest.raises(kind, match=message):
        run.follow(lambda: False)
    assert run.family.look() == []


def test_a_storage_that_refuses_is_mended_again(config, tmp_path, monkeypatch):
    run, _ = supervised(config, tmp_path, "")
    run.reader.feed("steps 0 to 119\nstep     59  samples  1,200  loss\n")
    checkpoints = config.folder / "checkpoints"
    (checkpoints / "step-0000000060").mkdir(parents=True)
    hit = KINDS["storage"].inject(run, 0)
    assert not hit.is_over()
    assert sorted(path.name[-3:] for path in checkpoints.iterdir() if path.is_file()) == ["080", "100", "119"]
    monkeypatch.setattr("sigray.orchestrator.chaos.faults._REFUSE_S", 0.0)
    run.reader.feed("step     79  samples  1,200  loss\n")
    assert not hit.is_over()
    run.reader.feed("step     80  samples  1,200  loss\n")
    wait_until(hit.is_over)
    hit.undo()
    assert [path.name for path in checkpoints.iterdir()] == ["step-0000000060"]


def test_only_whole_checkpoints_are_cut_and_one_is_left(config, tmp_path):
    run, _ = supervised(config, tmp_path, "H")
    checkpoints = config.folder / "checkpoints"

    def commit(step: int) -> Path:
        folder = checkpoints / f"step-{step:010d}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x" * 10)
        files = {"model.safetensors": {"bytes": 10, "xxh3_128": ""}}
        info = {"name": folder.name, "step": step, "samples_seen": step, "files": files, "model": {}}
        (folder / "commit.json").write_text(json.dumps(info))
        return folder / "model.safetensors"

    with run:
        first = commit(20)
        assert KINDS["truncate"].inject(run, 0) is None
        second = commit(40)
        assert KINDS["truncate"].inject(run, 0).pid
        assert (first.stat().st_size, second.stat().st_size) == (10, 5)
        assert KINDS["truncate"].inject(run, 0) is None
        third = commit(60)
        assert KINDS["truncate"].inject(run, 0)
        assert [path.stat().st_size for path in (first, second, third)] == [10, 5, 5]


# ---------------------------------------------------------------------------------------------------------- a run


def test_a_run_in_which_things_die_ends_as_if_nothing_had_happened(own_ray, tmp_path, capsys):
    small = SmallRun(tmp_path)
    # Each start of a Ray costs 25 s on two cores, so each kind comes once. Waits are short: 120 steps take 10 s.
    arguments = ["eval={}", "train.ledger=false", "--faults", "4", "--every-s", "0.3"]
    code = main(["chaos", str(small.config), *arguments, "--kinds", "trainer,data-worker,driver,truncate"])
    out = tmp_path / "runs" / "small-chaos"
    output = capsys.readouterr()
    logs = "\n".join(path.read_text() for path in out.glob("*.log"))
    assert code == 0, output.out + output.err + logs
    assert "identical: weights, optimizer and 120 losses; ledger exact" in output.out
    result = json.loads((out / "chaos.json").read_text())
    counts = Counter(fault["kind"] for fault in result["faults"])
    assert counts == {"trainer": 1, "data-worker": 1, "driver": 1, "truncate": 1}
    assert result["num_restarts"] == 2
    assert result["num_attempts"] == 4
    assert result["left_behind"] == []
    times = [fault["time_s"] for fault in result["faults"]]
    assert all(before < after for before, after in itertools.pairwise(times))
