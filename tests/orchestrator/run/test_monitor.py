"""What the hooks tell Ray Train of checkpoints, and ask of preemptions."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.train

from sigray.orchestrator.run.monitor import InOrder, RayHooks, checkpoint_metrics
from sigray.orchestrator.run.worker_group import train_callbacks
from sigray.workers.checkpoint.index import CheckpointInfo
from tests.helpers.plain_ray import PlainRay

STORAGE = "/runs/a"


def checkpoint(step: int) -> CheckpointInfo:
    return CheckpointInfo(f"step-{step:010d}", step, step * 8, {}, {})


class Monitor:
    """Stands for the handle of the `RunMonitor`: a driver that lets the run go on."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.post = SimpleNamespace(remote=lambda kind, content: self.events.append((kind, content)))
        self.record = SimpleNamespace(remote=lambda metrics: "go on")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> PlainRay:
    made = PlainRay(monkeypatch)
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    return made


def hooks_of(monitor: Monitor, **options: bool) -> RayHooks:
    hooks = RayHooks(monitor, STORAGE, **{"has_folder": True, "sees_preemptions": True} | options)
    hooks.joined()
    return hooks


def test_calls_are_made_in_order_and_an_error_stops_none():
    made, failed = [], []
    in_order = InOrder(failed.append)
    for number in range(5):
        in_order.add(lambda number=number: made.append(number) if number != 2 else made[99])
    assert in_order.wait(60)
    assert made == [0, 1, 3, 4]
    assert [type(error) for error in failed] == [IndexError]


def test_a_report_that_waits_holds_no_training_worker(plain, monkeypatch):
    may_end, threads = threading.Event(), []

    def report(*_: Any, **__: Any) -> None:
        threads.append(threading.current_thread())
        may_end.wait(2)

    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr("sigray.orchestrator.run.monitor._END_S", 0.1)
    monitor = Monitor()
    hooks = hooks_of(monitor)
    hooks.share(checkpoint(1))
    hooks.share(checkpoint(2))
    hooks.ended()  # the end of training does not wait for ever
    assert monitor.events[-1][0] == "warning"
    assert "has not taken a report" in monitor.events[-1][1]
    may_end.set()
    assert threading.current_thread() not in threads


def test_ray_train_is_told_of_a_checkpoint_where_it_is(plain):
    hooks = hooks_of(Monitor())
    hooks.record({"step": 4, "train/loss": np.float32(0.5)})
    hooks.record({"step": 8, "train/loss": np.float32(0.25)})
    hooks.share(checkpoint(4))
    hooks.share(None)
    hooks.ended()
    (told, how), (nothing, no_checkpoint) = plain.reports
    path = f"{STORAGE}/checkpoints/step-0000000004"
    assert told == {"step": 4, "samples_seen": 32, "train/loss": 0.5, "checkpoint_uri": path}
    assert {type(value) for value in told.values()} == {int, float, str}  # np.float32 ends Ray Train's controller
    assert how["checkpoint"].path == path
    assert how["checkpoint_upload_mode"] is ray.train.CheckpointUploadMode.NO_UPLOAD
    assert (nothing, no_checkpoint["checkpoint"]) == ({}, None)


def test_a_checkpoint_in_a_store_is_told_by_its_uri_alone(plain):
    hooks = hooks_of(Monitor(), has_folder=False)
    hooks.share(checkpoint(4))
    hooks.ended()
    ((told, how),) = plain.reports
    assert (told["checkpoint_uri"], how["checkpoint"]) == (f"{STORAGE}/checkpoints/step-0000000004", None)


def test_a_checkpoint_has_the_line_of_its_step():
    lines = [{"step": step, "train/loss": 1.0 / step} for step in (2, 4, 6)]
    told, later = checkpoint_metrics(checkpoint(4), lines, STORAGE)
    assert told["train/loss"] == 0.25
    assert later == lines[2:]
    assert "train/loss" not in checkpoint_metrics(checkpoint(5), lines, STORAGE)[0]


def test_a_preemption_saves_once_for_each_node(plain, monkeypatch):
    infos = [None, ["a"], ["a"], ["a", "b"]]
    monitor = Monitor()
    hooks = hooks_of(monitor)
    requests = []
    for nodes in infos:
        info = nodes and SimpleNamespace(
            preempted_node_to_ranks={node: [0] for node in nodes}, deadline_ms=1000 * (time.time() + 60)
        )
        monkeypatch.setattr(ray.train, "get_preemption_info", lambda info=info: info)
        hooks.look_ahead()
        hooks.ended()
        requests += [hooks.record({"step": len(requests)}), hooks.record({"step": len(requests)})]
    assert requests == ["go on", "go on", "save", "go on", "go on", "go on", "save", "go on"]
    seconds = [content for kind, content in monitor.events if kind == "preempted"]
    assert [50 < left <= 60 for left in seconds] == [True, True]


def test_without_ray_trains_watcher_nothing_is_asked(plain, monkeypatch):
    asked = []
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: asked.append(1))
    hooks = hooks_of(Monitor(), sees_preemptions=False)
    hooks.look_ahead()
    hooks.ended()
    assert asked == []


def test_a_callback_must_be_one_of_ray_train():
    (made,) = train_callbacks(["tests.helpers.plain_ray:NoCallback"])
    assert isinstance(made, ray.train.UserCallback)
    with pytest.raises(ValueError, match="gave a Store, a ray.train.UserCallback expected"):
        train_callbacks(["tests.helpers.plain_ray:Store"])
