"""A real sweep through the command line: its driver is killed, a trial crashes, one cannot run; and it ends as it must.

A sweep costs a minute of process starts here, so there is one. What it must equal is computed without Ray: every trial
trained in this process (`tests/helpers/bare.py`), its checkpoints evaluated, and the decisions made in the order of
the trials.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sigray.orchestrator.config import load_config, parse_config
from sigray.tuning.cli import main
from sigray.tuning.feasible import feasible
from sigray.tuning.judge import Judge
from sigray.tuning.study import Study, load_study
from sigray.tuning.sweep import STUDY, Display, _Sweep, figure_of, shortened
from sigray.tuning.table import RESULTS, Table, as_csv, read_table
from sigray.tuning.tune_adapter import Watch
from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.evaluation.evaluate import evaluate_checkpoint
from sigray.workers.evaluation.features import EvaluationJob
from sigray.workers.storage import Storage
from tests.helpers.bare import train_bare
from tests.helpers.data import TOWERS, write_dataset
from tests.helpers.processes import descendants_named
from tests.helpers.runs import LIMIT_S
from tests.helpers.sweeps import write_small_study

SWEEP = "import sys; from sigray.tuning.cli import main; sys.exit(main(sys.argv[1:]))"
RUNGS = (192, 384, 768)


def write_study(folder: Path) -> Path:
    cases = {
        "slow": {"optim.lr": 1.0e-5, "train.global_batch_size": 24},
        "good": {"optim.lr": 3.0e-3, "train.global_batch_size": 24},
        "large batch": {"optim.lr": 1.0e-3, "train.global_batch_size": 48},
        "crashes": {"optim.lr": 1.0e30, "train.global_batch_size": 24},
        "cannot run": {"train.global_batch_size": 400},
    }
    return write_small_study(
        folder,
        {
            "data": {"block_size": 8},
            "train": {"num_samples": 768, "log_every_steps": 2},
            # Between the rungs too: a trial goes on from where it was killed, not only from a rung.
            "checkpoint": {"save_every_steps": 4},
        },
        rungs=list(RUNGS[:-1]),
        scheduler={"name": "asha", "eta": 2},
        # The order: large batch and good side by side to the end, then crashes, then slow, which is stopped.
        search={"seed": 1},
        space={"trial": {"cases": cases}},
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return load_study(write_study(tmp_path_factory.mktemp("sweep")))


class Driver:
    """`sigray sweep` in the background, its output in a file."""

    def __init__(self, log: Path, *arguments: object) -> None:
        self.log = log
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"COLUMNS": "200"}
        with log.open("w") as output:
            command = [sys.executable, "-c", SWEEP, "sweep", *map(str, arguments)]
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

    def wait_until(self, condition: Any, timeout_s: float = LIMIT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        """-9, and its Ray: processes of a driver that is killed may outlive it."""
        processes = descendants_named(self.process.pid, "")
        self.process.kill()
        self.process.wait()
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def table_now(study: Study) -> Table:
    return read_table(Storage(study.config.storage_uri))


@pytest.fixture(scope="module")
def outputs(own_ray: None, study: Study) -> tuple[str, str]:
    """What the two drivers printed, the first killed after the first decision."""
    folder = study.config.folder.parent.parent
    first = Driver(folder / "first.log", folder / "study.yaml")
    first.wait_until(lambda: any(row.results and row.results[0].answer for row in table_now(study).rows.values()))
    first.kill()
    second = Driver(folder / "second.log", "--resume", study.config.folder)
    assert second.process.wait(timeout=LIMIT_S) == 0, second.log.read_text()
    return first.log.read_text(), second.log.read_text()


def test_killed_at_three_moments_gives_the_same_table(own_ray, patience, tmp_path):
    """Before any result, between a result and the next, and when a trial is over already."""
    path = write_study(tmp_path)
    study = load_study(path)

    def rows() -> list[Any]:
        return list(table_now(study).rows.values())

    trials = study.config.folder / "trials"
    moments = [
        lambda: list(trials.glob("*/metrics.jsonl")) and not any(row.results for row in rows()),
        lambda: any(len(row.results) >= 1 and row.status == "begun" for row in rows()),
        lambda: any(row.status in ("finished", "stopped") for row in rows()),
    ]
    for number, moment in enumerate(moments):
        driver = Driver(tmp_path / f"{number}.log", path)
        driver.wait_until(moment)
        driver.kill()
        assert any(not row.is_over for row in rows()), "it was over before it was killed"
    last = Driver(tmp_path / "last.log", path)
    assert last.process.wait(timeout=LIMIT_S) == 0, last.log.read_text()
    expected = as_csv(without_ray(study, tmp_path / "bare"), len(RUNGS))
    assert (study.config.folder / "trials.csv").read_text() == expected


def without_ray(study: Study, folder: Path) -> Table:
    """The table as it must be: every trial trained here, and the judge asked in the order of the trials."""
    from sigray.tuning.search import Search

    config, search = study.config, Search(study)
    judge = Judge("expected", str(folder), config.rules, {config.budgets[0]: len(RUNGS)})
    for number in range(search.num_trials):
        proposal = search.propose(number, [])
        overrides = proposal.point.overrides
        judge.add(
            {
                "event": "trial",
                "number": number,
                "seed": proposal.seed,
                "budget": proposal.budget,
                "values": proposal.point.values,
                "overrides": overrides,
            }
        )
        if proposal.point.values["trial"] == "cannot run":
            judge.add({"event": "infeasible", "number": number, "why": ""})
            continue
        if proposal.point.values["trial"] == "crashes":
            judge.add({"event": "failed", "number": number, "why": ""})
            continue
        content = study.trial_content(number, proposal.seed, proposal.budget, overrides)
        content["run"]["dir"] = str(folder / "runs")
        run = parse_config(content, "bare")
        for rung, samples in enumerate(RUNGS):
            train_bare(0, 1, run, last_step=samples // run.train.global_batch_size)
            info = list_checkpoints(Storage(run.storage_uri))[-1]
            assert info.samples_seen == samples
            evaluation = evaluate_checkpoint(
                EvaluationJob(run.storage_uri, info, run.model, run.data, run.eval, run.embeddings)
            )
            more = {"loss": None, "figures": {}}
            if judge.decide(number, rung, samples, figure_of(evaluation, config.metric), more) == "stop":
                break
    return judge.table()[0]


def test_killed_and_resumed_gives_the_table_that_no_ray_gives(study, outputs, tmp_path):
    """Figures to the last digit, and every decision: Ray, sharing, the kill and the resume change nothing."""
    expected = as_csv(without_ray(study, tmp_path), len(RUNGS))
    assert (study.config.folder / "trials.csv").read_text() == expected
    statuses = [row.status for row in table_now(study).rows.values()]
    assert statuses.count("finished") >= 1
    assert statuses.count("stopped") >= 1
    assert (statuses.count("failed"), statuses.count("infeasible")) == (1, 1)


def test_what_was_done_is_not_done_again(study, outputs):
    events = [json.loads(line) for line in (study.config.folder / "results.jsonl").read_text().splitlines()]
    places = [(event["event"], event["number"], event.get("rung")) for event in events if "number" in event]
    assert len(places) == len(set(places))
    logs = [path.read_text() for path in sorted((study.config.folder / "trials").glob("*.log"))]
    assert sum("holds a run of this name: going on with it" in log for log in logs) >= 1
    # At least the trial that goes on had a checkpoint when the driver was killed.
    starts = [[int(step) for step in re.findall(r"steps +(\d+) to", log)] for log in logs]
    assert all(steps == sorted(steps) for steps in starts), starts
    assert any(len(steps) >= 2 and steps[-1] >= 4 for steps in starts), starts


def test_what_cannot_run_is_told_before_anything_starts(study, outputs):
    first, second = outputs
    told = re.search(r"trial \d cannot run and is skipped \(trial=cannot run\): .* takes 400 samples", first)
    assert told is not None, first
    assert told.start() < first.index("starting Ray")
    assert not list((study.config.folder / "trials").glob(f"trial-*{number_of(study, 'cannot run')}*"))
    assert "cannot run and is skipped" not in second


def test_a_trial_that_crashes_is_told_and_ends_nothing(study, outputs):
    row = table_now(study).rows[number_of(study, "crashes")]
    assert re.search(r"the (loss|norm of the gradients) is|NaN or infinity", row.error), row.error
    assert f"trial {row.number} (trial=crashes, seed 0) failed, the sweep goes on:" in "".join(outputs)
    assert "Traceback" not in "".join(outputs)


def test_trials_side_by_side_share_what_is_decoded(study, outputs):
    """Of the second driver. A trial asks for each block once: what was served more often was shared."""
    (stream,) = table_now(study).streams
    assert 0 < 1.15 * stream["decoded"] < stream["served"]


def test_a_sweep_leaves_what_its_user_expects(study, outputs):
    folder = study.config.folder
    best = load_config(folder / "best.yaml")
    assert best.train.num_samples == RUNGS[-1]
    page = (folder / "report.html").read_text()
    assert "Best of 3\u00a0configurations: " in page
    assert "failed</b> (trial\u00a0crashes)" in page
    assert "1 failed, " in outputs[1]
    assert "\nBest of 3 configurations: trial " in outputs[1]
    summary = json.loads((folder / "trials" / f"trial-{number_of(study, 'good'):03d}" / "summary.json").read_text())
    assert summary["status"] in ("finished", "stopped")


def test_a_finished_sweep_starts_nothing(study, outputs, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = (study.config.folder / "results.jsonl").read_bytes()
    assert main(["sweep", "--resume", str(study.config.folder)]) == 0
    assert "starting Ray" not in capsys.readouterr().out
    assert (study.config.folder / "results.jsonl").read_bytes() == before


def number_of(study: Study, name: str) -> int:
    return next(number for number, row in table_now(study).rows.items() if row.values["trial"] == name)


def test_a_long_reason_is_cut_and_says_where_the_rest_is():
    assert shortened("training failed:\n  out of memory\n\n", "trial-001.log") == "training failed: out of memory"
    long = shortened("training failed\n" + "x " * 1000, "trial-001.log")
    assert len(long) < 450
    assert long.endswith("... (all of it: trials/trial-001.log)")


def test_another_study_under_the_same_name_is_refused(study, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    home = tmp_path / "small"
    home.mkdir()
    (home / "study.yaml").write_text(study.config.to_yaml())
    path = study.config.folder.parent.parent / "study.yaml"
    assert main(["sweep", str(path), f"dir={tmp_path}", "budget=1000", "optim.lr=5"]) == 2
    error = capsys.readouterr().err
    for text in (
        "holds another study of this name:",
        "budget: the sweep was started with 768, now 1000",
        "optim.lr: the run was started with 0.001, now 5",
        "--overwrite",
    ):
        assert text in error, error


def test_where_a_sweep_runs_may_change(study, tmp_path):
    from sigray.tuning.sweep import _check_same

    home = tmp_path / "small"
    home.mkdir()
    (home / "study.yaml").write_text(study.config.to_yaml())
    path = study.config.folder.parent.parent / "study.yaml"
    other = load_study(path, [f"dir={tmp_path}", "cluster.num_workers=2", "data.num_workers=3", "parallel=7"])
    _check_same(other, Storage(home))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep"], "give a study"),
        (["sweep", "none.yaml"], "none.yaml: no such file"),
        (["sweep", "--resume", "{folder}"], "is no sweep: it holds no study.yaml"),
        (["sweep", "study.yaml", "--resume", "{folder}"], "take the study from their folder"),
        (["sweep", "--resume", "{folder}", "cluster.address=auto"], "is no sweep"),
    ],
)
def test_bad_input_is_told(arguments, message, tmp_path, capsys):
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_trial_that_can_run_no_more_is_not_tried_again(tmp_path, capsys):
    """Its data has shrunk since: the reason is told before anything starts, and the sweep stays as it was."""
    path = write_study(tmp_path)
    study, storage = load_study(path), Storage(str(tmp_path / "sweeps" / "small"))
    driver = _Sweep(study, storage, Display(Console(quiet=True)))
    driver.prepare()
    runnable = [number for number, row in driver.table.rows.items() if row.status != "infeasible"]
    driver._add(*({"event": "failed", "number": number, "why": "a fault"} for number in runnable))
    storage.write(STUDY, study.config.to_yaml().encode())
    before = storage.read(RESULTS)
    shutil.rmtree(tmp_path / "train")
    write_dataset(tmp_path / "train", [20])
    assert main(["sweep", str(path), "--retry"]) == 2
    assert re.search(r"trial \d failed and cannot run again: .*global_batch_size", capsys.readouterr().err)
    assert storage.read(RESULTS) == before


def test_a_study_of_which_nothing_can_run_is_refused(study, tmp_path, capsys):
    path = study.config.folder.parent.parent / "study.yaml"
    assert (
        main(["sweep", str(path), f"dir={tmp_path}", "space.trial={cases: {big: {train.global_batch_size: 400}}}"]) == 2
    )
    error = capsys.readouterr().err
    assert "no trial of the study can run; trial 0: global_batch_size=400 takes 400 samples" in error
    assert not (tmp_path / "small" / "results.jsonl").exists()


def test_a_tracker_that_is_missing_is_told_before_anything_starts(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sigray.orchestrator.run.tracker_process.importlib.util.find_spec", lambda name: None)
    path = study.config.folder.parent.parent / "study.yaml"
    assert main(["sweep", str(path), f"dir={tmp_path}", "run.trackers=[wandb]"]) == 2
    assert "run.trackers: wandb needs a library that is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_plan_shows_all_trials_and_writes_nothing(study, tmp_path, capsys):
    path = study.config.folder.parent.parent / "study.yaml"
    assert main(["sweep", str(path), f"dir={tmp_path}", "--plan"]) == 0
    output = capsys.readouterr().out
    assert output.count("waiting") == 4
    assert output.count("infeasible") == 1
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.global_batch_size": 400}, "takes 400 samples of shards, which has 200"),
        ({"train.global_batch_size": 192}, "the rungs at 96 and 192 samples fall on the same step"),
        ({"train.micro_batch_size": 7}, "train.micro_batch_size=7 does not divide the 24 pairs"),
        ({"model.towers": {**TOWERS, "embed_dim": "x"}}, "towers.embed_dim='x': a whole number"),
        ({"optim.beta2": 2}, "optim.beta2=2: should be less than 1"),
        # 6.4 billion numbers in the embedding alone, on a device of 24 GB.
        (
            {
                "model.towers": {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], "vocab_size": 400_000_000}},
                "cluster.accelerator": "cuda",
                "cluster.device": "l4",
            },
            "one l4 needs",
        ),
    ],
)
def test_why_a_trial_cannot_run(study, overrides, message):
    from sigray.workers.data.manifest import scan_shards

    content = study.trial_content(0, 0, 768, {"train.global_batch_size": 24} | overrides)
    found = feasible(content, (96, *RUNGS), lambda config: scan_shards(config.data.shards, config.data))
    assert isinstance(found, str)
    assert message in found


class Undecided:
    """A trial that has to wait at its rung."""

    def __init__(self, pool: Any, seconds: float) -> None:
        self.name, self.is_joined, self.pool, self.rungs, self.passed = "trial", False, pool, RUNGS[1:], frozenset()
        self.asked: list[tuple[int, float]] = []  # samples seen, and CPUs that were free
        self._seconds, self._until = seconds, 0.0

    def record(self, line: dict[str, float]) -> bool:
        return False

    def decide(self, evaluation: dict[str, Any], line: dict[str, float]) -> str:
        import ray

        self._until = self._until or time.monotonic() + self._seconds
        self.asked.append((evaluation["samples_seen"], ray.available_resources()["CPU"]))
        if evaluation["samples_seen"] == RUNGS[-1]:
            return "stop"
        return "wait" if time.monotonic() < self._until else "go on"


def test_a_sweep_that_stops_waits_for_trials_that_run_and_no_others():
    driver = types.SimpleNamespace(is_stopping=False, look=lambda: None)
    watch = Watch(driver)

    def stops(*statuses: str) -> bool:
        watch.on_step_end(0, [types.SimpleNamespace(status=status) for status in statuses])
        return watch.stop_all()

    assert not stops("PENDING", "PENDING")  # a trial that waits for resources is no reason to stop
    driver.is_stopping = True
    assert not stops("PENDING", "RUNNING")
    assert stops("PENDING", "TERMINATED")
    assert not watch("trial", {})


def test_a_trial_that_waits_long_gives_its_places_to_others_and_repeats_no_step(
    own_ray, patience, tmp_path, monkeypatch
):
    import ray
    from rich.console import Console

    from sigray.orchestrator.run import trial as trial_module
    from sigray.orchestrator.run.driver import train
    from sigray.workers.data.manifest import scan_shards
    from sigray.workers.data.pool import DataPool, SharedPool

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(trial_module, "_HOLD_S", 2.0)
    write_study(tmp_path)
    config = load_config(tmp_path / "base.yaml", [f"run.dir={tmp_path}/runs", "checkpoint.save_every_steps=100"])
    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False)
    try:
        pool = DataPool(scan_shards(config.data.shards, config.data), config.data, config.model, seed=0, window=20)
        pool.start()
        trial = Undecided(SharedPool(pool.registry, "trial"), seconds=12)
        statuses, after = [], []
        for _ in range(2):  # as the sweep starts the trial again when it can decide
            result = train(config, Console(file=(tmp_path / "log").open("a")), trial=trial)
            statuses.append(result.status)
            time.sleep(12)
            after.append(ray.available_resources()["CPU"])
    finally:
        ray.shutdown()
    assert statuses == ["stopped", "finished"]
    assert after[0] > trial.asked[0][1], "the training worker kept its place"
    steps = [json.loads(line)["step"] for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(2, 34, 2))
