"""What a driver does beside training: hung workers, bad steps, room for more workers, the best checkpoint."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from rich.console import Console

from sigray.orchestrator.config import parse_config
from sigray.orchestrator.run.driver import RunFailed, _Run
from sigray.orchestrator.run.monitor import Display
from sigray.orchestrator.run.policy import GiveUp, Retry
from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.checkpoint.writer import CheckpointWriter, leave_out, read_best, read_left_out
from sigray.workers.storage import Storage
from sigray.workers.training.step import BadStep
from tests.helpers.data import TOWERS

TIMEOUT_S = 700.0


def run_of(storage: Storage, **sections: Any) -> tuple[_Run, io.StringIO]:
    """A run that has begun, without its processes; and what it says."""
    content = {
        "run": {"name": "small"},
        "data": {"shards": "tars"},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 1000, "global_batch_size": 100},
    }
    said = io.StringIO()
    folder: Any = SimpleNamespace(storage=storage)
    manifest: Any = None
    lease: Any = None
    display = Display(Console(file=said, width=500))
    return _Run(parse_config(content | sections, "test"), folder, manifest, display, lease), said


class Watched:
    """A run with two training workers, its monitor, and a clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, storage: Storage) -> None:
        self.now, self.killed = 1000.0, []
        self._events: list[dict[str, Any]] = []
        self.run, self.said = run_of(storage, cluster={"hang_timeout_s": TIMEOUT_S})
        nothing = SimpleNamespace(repeat=lambda: None, tend=lambda: None)
        self.run._metrics = self.run._pool = nothing
        self.run._monitor = SimpleNamespace(take=SimpleNamespace(remote=self._take))
        self.run._to_evaluate, self.run._evaluation, self.run._rung = [], None, None
        self.run._workers, self.run._heard_at = [], None
        clock = SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now)
        monkeypatch.setattr("sigray.orchestrator.run.driver.time", clock)
        monkeypatch.setattr(ray, "get", lambda answer: answer)
        monkeypatch.setattr(ray, "kill", self.killed.append)

    def _take(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events

    def look(self, now: float, *events: tuple[str, Any]) -> list[str]:
        """One turn of the driver's loop; returns the workers that were killed so far."""
        self.now = now
        self._events = [{"kind": kind, "content": content} for kind, content in events]
        self.run._take_events()
        self.run._kill_if_hung()
        return self.killed


@pytest.fixture
def watched(monkeypatch, tmp_path):
    return Watched(monkeypatch, Storage(tmp_path))


def test_training_workers_of_which_nothing_is_heard_are_killed(watched):
    assert watched.look(1000, ("joined", "first"), ("joined", "second"), ("warning", "up")) == []
    assert watched.look(1000 + TIMEOUT_S - 1) == []
    assert watched.look(1000 + TIMEOUT_S) == ["first", "second"]
    assert "nothing was heard of the training workers for 11 min 40 s: killing them" in watched.said.getvalue()
    assert watched.look(1001 + TIMEOUT_S) == ["first", "second"]  # once, and not at each look until they are gone
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


def test_the_best_checkpoint_is_kept(tmp_path):
    """Figures as they come in, and the writer's own pruning behind each checkpoint."""
    storage = Storage(tmp_path)
    figure = "zero_shot.colours.top1"
    run, said = run_of(storage, checkpoint={"keep_best": figure, "keep_newest": 1})
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters())
    writer = CheckpointWriter(storage, module, optimizer, run.config.checkpoint, {}, warn=print)
    kept = []
    for step, value in [(10, 0.3), (20, 0.7), (30, 0.7), (40, 0.5), (50, 0.9), (60, None), (70, 0.8)]:
        writer.save(step, step * 100)
        writer.wait()
        kept.append([info.step for info in list_checkpoints(storage)])
        run._mark_best({"step": step, "zero_shot": {"colours": {"top1": value}}})
    writer.close()
    # The newest, which has no figure yet, and the best of those before.
    assert kept == [[10], [10, 20], [20, 30], [20, 40], [20, 50], [50, 60], [50, 70]]
    assert read_best(storage) == ("step-0000000050", 0.9)
    assert said.getvalue().count("is no figure of the evaluation: nothing is marked as best") == 1


def test_without_keep_best_nothing_is_marked(tmp_path):
    run, _ = run_of(Storage(tmp_path))
    run._mark_best({"step": 10, "zero_shot": {"colours": {"top1": 0.5}}})
    assert read_best(Storage(tmp_path)) is None


@pytest.mark.parametrize("num_left_out", [9, 10])
def test_a_run_goes_back_until_ten_steps_are_left_out(tmp_path, num_left_out):
    storage = Storage(tmp_path)
    before = list(range(101, 101 + num_left_out))
    for step in before:
        leave_out(storage, step)
    train = {"num_samples": 100_000, "global_batch_size": 100, "on_bad_loss": "rewind"}
    run, _ = run_of(storage, train=train)
    run._metrics = SimpleNamespace(ended=lambda is_bad_step: None)
    run._errors = [BadStep(150, "step 150: the loss is nan")]
    decision = run._judge()
    if num_left_out < 10:
        assert decision == Retry(0.0)
        assert read_left_out(storage) == [*before, 150]
    else:
        assert isinstance(decision, GiveUp)
        assert read_left_out(storage) == before


@pytest.mark.parametrize(("num_free", "asked"), [(1, []), (2, ["stop"]), (3, ["stop"])])
def test_a_run_grows_where_there_is_room_for_the_difference(monkeypatch, tmp_path, num_free, asked):
    run, _ = run_of(Storage(tmp_path), cluster={"num_workers": [1, 4], "grow_after_s": 60})
    requests: list[str] = []
    run._monitor = SimpleNamespace(request=SimpleNamespace(remote=requests.append))
    monkeypatch.setattr("sigray.orchestrator.run.driver._has_room", lambda resources, count: count <= num_free)
    run._grow(2, 61)  # 100 pairs divide by 4 workers and not by 3
    assert requests == asked


def test_a_run_that_fails_says_how_long_it_trained(monkeypatch, tmp_path):
    run, _ = run_of(Storage(tmp_path))
    clock = SimpleNamespace(now=1000.0)

    def fail() -> None:
        run._training_since = clock.now
        clock.now += 90
        raise RunFailed

    monkeypatch.setattr("sigray.orchestrator.run.driver.time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(run, "_follow", fail)
    with pytest.raises(RunFailed):
        run.watch()
    assert run.train_s == 90
