"""Attempts: heartbeats, bad steps, growing, the time of training."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from rich.console import Console

from sigray.orchestrator.config import RunConfig, parse_config
from sigray.orchestrator.run import supervisor
from sigray.orchestrator.run.policy import GiveUp, Retry, RunFailed
from sigray.orchestrator.run.progress import Display
from sigray.orchestrator.run.supervisor import Heartbeat, Supervisor
from sigray.workers.checkpoint.writer import leave_out, read_left_out
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
    records: Any = SimpleNamespace(facts={}, prometheus=SimpleNamespace(ended=lambda is_bad_step: None))
    nothing: Any = None
    return Supervisor(config_of(**sections), group, nothing, records, nothing, nothing, shown()[0], nothing)


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


def test_training_workers_without_a_heartbeat_are_killed(watched):
    assert watched.look(1000, ("joined", "first"), ("joined", "second"), ("warning", "up")) == []
    assert watched.look(1000 + TIMEOUT_S - 1) == []
    assert watched.look(1000 + TIMEOUT_S) == ["first", "second"]
    assert "no heartbeat from the training workers for 11 min 40 s: killing them" in watched.said.getvalue()
    assert watched.look(1001 + TIMEOUT_S) == ["first", "second"]  # once, and not at each poll until they have ended
    assert watched.look(1000 + 2 * TIMEOUT_S) == ["first", "second"] * 2


def test_a_heartbeat_starts_the_timeout_again(watched):
    watched.look(1000, ("joined", "first"), ("warning", "up"))
    assert watched.look(1600, ("warning", "slow")) == []
    assert watched.look(1000 + TIMEOUT_S) == []
    assert watched.look(1600 + TIMEOUT_S - 1) == []
    assert watched.look(1600 + TIMEOUT_S) == ["first"]


def test_the_timeout_begins_with_the_first_heartbeat(watched):
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
    watched.records = SimpleNamespace(started=ignore, metrics=ignore, prometheus=SimpleNamespace(checkpoint=ignore))  # type: ignore[assignment]
    watched.rungs = SimpleNamespace(record=ignore, saved=ignore)  # type: ignore[assignment]
    watched.evaluations = SimpleNamespace(add=ignore)  # type: ignore[assignment]
    if kind == "checkpoint":
        content = {"name": "step-1", "step": 1, "samples_seen": 100, "files": {}, "model": {}}
    watched._take(kind, content if kind != "warning" else "text")
    assert beats == [kind]


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
def test_a_run_grows_if_the_difference_fits(monkeypatch, tmp_path, num_free, asked):
    requests: list[str] = []
    monitor = SimpleNamespace(request=SimpleNamespace(remote=requests.append))
    cluster = {"num_workers": [1, 4], "grow_after_s": 60}
    supervised = supervisor_of(Storage(tmp_path), monitor, cluster=cluster)
    monkeypatch.setattr(supervisor, "num_placed", lambda groups: len(groups[0]) <= num_free)
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


def test_an_observer_stops_the_run(tmp_path):
    requests: list[str] = []
    monitor = SimpleNamespace(take=SimpleNamespace(remote=list), request=SimpleNamespace(remote=requests.append))
    made = supervisor_of(Storage(tmp_path), monitor)
    nothing = SimpleNamespace(poll=lambda: None, decide=lambda: None)
    made.records.prometheus.repeat = lambda: None
    made.evaluations = made.rungs = made._pool = nothing
    made.observer = SimpleNamespace(must_stop=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "get", lambda value: value)
        made._poll()
        assert requests == []
        made.observer.must_stop = True
        made._poll()
        made._poll()
    assert requests == ["stop"]
