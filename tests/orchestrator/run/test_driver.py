"""The driver beside training: heartbeats, bad steps, growing, the best checkpoint, the environment of a summary."""

from __future__ import annotations

import io
import shutil
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from rich.console import Console

from sigray.orchestrator.config import RunConfig, parse_config
from sigray.orchestrator.run import summary, supervisor
from sigray.orchestrator.run.evaluations import Evaluations
from sigray.orchestrator.run.policy import GiveUp, Retry, RunFailed
from sigray.orchestrator.run.progress import Display
from sigray.orchestrator.run.supervisor import Heartbeat, Supervisor
from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.checkpoint.writer import CheckpointWriter, leave_out, read_best, read_left_out
from sigray.workers.storage import Storage
from sigray.workers.training.step import BadStep
from tests.helpers.data import TOWERS

TIMEOUT_S = 700.0


def config_of(**sections: Any) -> RunConfig:
    content = {
        "run": {"name": "small"},
        "data": {"shards": "tars"},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 1000, "global_batch_size": 100},
    }
    return parse_config(content | sections, "test")


def shown() -> tuple[Display, io.StringIO]:
    """A display, and what it shows."""
    output = io.StringIO()
    return Display(Console(file=output, width=500)), output


def supervisor_of(storage: Storage, monitor: Any = None, **sections: Any) -> Supervisor:
    """A supervisor without processes."""
    group: Any = SimpleNamespace(folder=SimpleNamespace(storage=storage), monitor=monitor, pool=None)
    records: Any = SimpleNamespace(facts={}, ended=lambda is_bad_step: None)
    nothing: Any = None
    return Supervisor(config_of(**sections), group, nothing, records, nothing, nothing, shown()[0])


class Watched:
    """The heartbeat of two training workers, and a clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.killed = 1000.0, []
        display, self.said = shown()
        self._heartbeat = Heartbeat(TIMEOUT_S, display)
        monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(ray, "kill", self.killed.append)

    def look(self, now: float, *events: tuple[str, Any]) -> list[str]:
        """One poll of the supervisor; returns the workers that were killed so far."""
        self.now = now
        for kind, content in events:
            if kind == "joined":
                self._heartbeat.joined(content)
            else:
                self._heartbeat.beat()
        self._heartbeat.check()
        return self.killed


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def test_training_workers_of_which_nothing_is_heard_are_killed(watched):
    assert watched.look(1000, ("joined", "first"), ("joined", "second"), ("warning", "up")) == []
    assert watched.look(1000 + TIMEOUT_S - 1) == []
    assert watched.look(1000 + TIMEOUT_S) == ["first", "second"]
    assert "no heartbeat from the training workers for 11 min 40 s: killing them" in watched.said.getvalue()
    assert watched.look(1001 + TIMEOUT_S) == ["first", "second"]  # once, and not at each poll until they have ended
    assert watched.look(1000 + 2 * TIMEOUT_S) == ["first", "second"] * 2


def test_what_is_heard_puts_the_hang_off(watched):
    watched.look(1000, ("joined", "first"), ("warning", "up"))
    assert watched.look(1600, ("warning", "slow")) == []
    assert watched.look(1000 + TIMEOUT_S) == []
    assert watched.look(1600 + TIMEOUT_S - 1) == []
    assert watched.look(1600 + TIMEOUT_S) == ["first"]


def test_workers_that_are_not_all_up_are_not_taken_for_hung(watched):
    """Imports, compilation and a slow first read of the weights may take longer than any step."""
    assert watched.look(1000, ("joined", "first")) == []
    assert watched.look(1000 + 10 * TIMEOUT_S) == []


@pytest.mark.parametrize("kind", ["started", "metrics", "checkpoint", "warning", "asked"])
def test_each_event_of_the_training_loop_is_a_heartbeat(kind, tmp_path):
    watched = supervisor_of(Storage(tmp_path))
    beats: list[str] = []
    watched._heartbeat = SimpleNamespace(beat=lambda: beats.append(kind))  # type: ignore[assignment]
    content = {"first_step": 0, "step": 1.0, "name": "", "samples_seen": 1}
    ignore = lambda *_: None  # noqa: E731
    watched.records = SimpleNamespace(started=ignore, metrics=ignore, checkpoint=ignore)  # type: ignore[assignment]
    watched.rungs = SimpleNamespace(record=ignore, saved=ignore)  # type: ignore[assignment]
    watched.evaluations = SimpleNamespace(add=ignore)  # type: ignore[assignment]
    if kind == "checkpoint":
        content = {"name": "step-1", "step": 1, "samples_seen": 100, "files": {}, "model": {}}
    watched._take(kind, content if kind != "warning" else "text")
    assert beats == [kind]


def evaluations_of(storage: Storage, **sections: Any) -> tuple[Evaluations, RunConfig, io.StringIO]:
    """A queue of evaluations without processes, its config, and what it says."""
    config = config_of(**sections)
    display, said = shown()
    folder: Any = SimpleNamespace(storage=storage)
    nothing: Any = None
    return Evaluations(config, folder, nothing, nothing, display), config, said


def test_the_best_checkpoint_is_kept(tmp_path):
    """Figures as they come in, and the writer's own pruning after each checkpoint."""
    storage = Storage(tmp_path)
    figure = "zero_shot.colours.top1"
    evaluations, config, said = evaluations_of(storage, checkpoint={"keep_best": figure, "keep_newest": 1})
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters())
    writer = CheckpointWriter(storage, module, optimizer, config.checkpoint, {}, warn=print)
    kept = []
    for step, value in [(10, 0.3), (20, 0.7), (30, 0.7), (40, 0.5), (50, 0.9), (60, None), (70, 0.8)]:
        writer.save(step, step * 100)
        writer.wait()
        kept.append([info.step for info in list_checkpoints(storage)])
        evaluations._mark_best({"step": step, "zero_shot": {"colours": {"top1": value}}})
    writer.close()
    # The newest, which has no figure yet, and the best of those before.
    assert kept == [[10], [10, 20], [20, 30], [20, 40], [20, 50], [50, 60], [50, 70]]
    assert read_best(storage) == ("step-0000000050", 0.9)
    assert said.getvalue().count("is no figure of the evaluation: nothing is marked as best") == 1


def test_without_keep_best_nothing_is_marked(tmp_path):
    evaluations, _, _ = evaluations_of(Storage(tmp_path))
    evaluations._mark_best({"step": 10, "zero_shot": {"colours": {"top1": 0.5}}})
    assert read_best(Storage(tmp_path)) is None


@pytest.mark.parametrize("num_left_out", [9, 10])
def test_a_run_goes_back_until_ten_steps_are_left_out(tmp_path, num_left_out):
    storage = Storage(tmp_path)
    before = list(range(101, 101 + num_left_out))
    for step in before:
        leave_out(storage, step)
    train = {"num_samples": 100_000, "global_batch_size": 100, "on_bad_loss": "rewind"}
    supervised = supervisor_of(storage, train=train)
    supervised._errors = [BadStep(150, "step 150: the loss is nan")]
    decision = supervised._decide()
    if num_left_out < 10:
        assert decision == Retry(0.0)
        assert read_left_out(storage) == [*before, 150]
    else:
        assert isinstance(decision, GiveUp)
        assert read_left_out(storage) == before


@pytest.mark.parametrize(("num_free", "asked"), [(1, []), (2, ["stop"]), (3, ["stop"])])
def test_a_run_grows_where_there_is_room_for_the_difference(monkeypatch, tmp_path, num_free, asked):
    requests: list[str] = []
    monitor = SimpleNamespace(request=SimpleNamespace(remote=requests.append))
    cluster = {"num_workers": [1, 4], "grow_after_s": 60}
    supervised = supervisor_of(Storage(tmp_path), monitor, cluster=cluster)
    monkeypatch.setattr(supervisor, "_fits", lambda resources, count: count <= num_free)
    supervised._grow(2, 61)  # 100 pairs divide by 4 workers and not by 3
    assert requests == asked


def test_a_run_that_fails_says_how_long_it_trained(monkeypatch, tmp_path):
    supervised = supervisor_of(Storage(tmp_path))
    clock = SimpleNamespace(now=1000.0)

    def fail() -> None:
        supervised._training_since = clock.now
        clock.now += 90
        raise RunFailed

    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(supervised, "_run_attempts", fail)
    with pytest.raises(RunFailed):
        supervised.run()
    assert supervised.train_s == 90


def test_only_a_commit_of_sigray_is_named(monkeypatch, tmp_path):
    """An installed sigray may be inside a repository of its user."""
    monkeypatch.delenv("SIGRAY_COMMIT", raising=False)
    file = tmp_path / "site-packages" / "summary.py"
    file.parent.mkdir()
    shutil.copy(summary.__file__, file)
    monkeypatch.setattr(summary, "__file__", str(file))

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert summary._commit() == "unknown"
    git("add", "-A")
    git("commit", "-m", "second")
    assert len(summary._commit()) >= 7
    assert summary._commit() != "unknown"
    monkeypatch.setenv("SIGRAY_COMMIT", "abc")
    assert summary._commit() == "abc"
