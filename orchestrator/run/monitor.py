"""Carry events from training workers to the driver, and requests back.

The training workers post events to the `RunMonitor` actor, and the driver takes them twice a second. The answer to a
line of metrics is the driver's request: go on, save, or stop at this step.

`RayHooks` reports each durable checkpoint to Ray Train, and asks Ray Train for preemptions. Both calls wait for all
ranks. So a thread of each training worker makes them (`InOrder`), in the same order on each.

Imports no torch: the actor's process would spend six seconds of a busy start on it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sigray.workers.checkpoint.index import CheckpointInfo
    from sigray.workers.training.job import Answer, Request


_END_S = 10.0  # twenty polls of Ray Train's controller


class RunMonitor:
    """Ray actor between training workers and driver; reserves no CPU."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._request: Request = "go on"
        self._answers: dict[int, Answer] = {}

    def post(self, kind: str, content: Any) -> None:
        """Add an event for the driver."""
        self._events.append({"kind": kind, "content": content})

    def record(self, metrics: dict[str, float]) -> Request:
        """Add a line of metrics; return the driver's request to the training workers."""
        self.post("metrics", metrics)
        request = self._request
        if request == "save":
            self._request = "go on"
        return request

    def ask(self, step: int) -> Answer:
        """Return the decision about a rung; each question is an event, so a heartbeat."""
        self.post("asked", step)
        return self._answers.get(step, "wait")

    def answer(self, step: int, answer: Answer) -> None:
        """Set the decision about a rung."""
        self._answers[step] = answer

    def take(self) -> list[dict[str, Any]]:
        """Return the events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def request(self, request: Request) -> None:
        """Set the request that the next line of metrics is answered with."""
        self._request = request

    def begin(self, request: Request) -> None:
        """Begin an attempt: forget requests and answers of the attempt before."""
        self._request = request
        self._answers = {}


class InOrder:
    """Make calls in the order in which they came, on a daemon thread.

    Args:
        failed: called on that thread with the error of a call.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._failed = failed
        threading.Thread(target=self._run, name="ray-train-calls", daemon=True).start()

    def add(self, call: Callable[[], None]) -> None:
        self._calls.put(call)

    def wait(self, timeout_s: float) -> bool:
        """Return whether all calls so far are over within this time."""
        over = threading.Event()
        self.add(over.set)
        return over.wait(timeout_s)

    def _run(self) -> None:
        while True:
            call = self._calls.get()
            try:
                call()
            except Exception as error:
                self._failed(error)


class RayHooks:
    """Hooks of the training loop under Ray Train: each call is an event.

    Our own commit files say which checkpoints exist. The hooks report checkpoints to Ray Train and read none from it:
    if the workers die, its controller may not have polled the newest report.

    Args:
        monitor: handle of the `RunMonitor`.
        storage_uri: of the run.
        has_folder: whether the storage is Ray Train's own folder of the run, in which it can name a checkpoint.
        sees_preemptions: whether Ray Train watches for preempted nodes.
    """

    def __init__(self, monitor: Any, storage_uri: str, *, has_folder: bool, sees_preemptions: bool) -> None:
        self._monitor = monitor
        self._storage_uri, self._has_folder, self._sees_preemptions = storage_uri, has_folder, sees_preemptions
        self._lines: list[dict[str, float]] = []  # of metrics, since the newest shared checkpoint
        self._preempted: frozenset[str] = frozenset()  # nodes that were announced
        self._must_save = False  # because a node will be preempted

    def joined(self) -> None:
        """Post the handle of this training worker, by which the driver can kill it."""
        import ray

        self._call("post", "joined", ray.get_runtime_context().current_actor)
        self._in_order = InOrder(lambda error: self.warn(f"Ray Train was not told of a checkpoint: {error}"))

    def ended(self) -> None:
        """Wait until Ray Train has taken all reports. All ranks call this after training."""
        if not self._in_order.wait(_END_S):
            self.warn(f"Ray Train has not taken a report for {_END_S:g} s: its Result may lack the newest checkpoint")

    def started(self, facts: dict[str, Any]) -> None:
        self._call("post", "started", facts)

    def record(self, metrics: dict[str, float]) -> Request:
        self._lines.append(metrics)
        request: Request = self._call("record", metrics)
        if request == "go on" and self._must_save:
            self._must_save = False
            return "save"
        return request

    def share(self, info: CheckpointInfo | None) -> None:
        """Have Ray Train's controller take note of a checkpoint, without a copy."""
        import ray.train

        metrics: dict[str, Any] = {}
        checkpoint = None
        if info is not None:
            metrics, self._lines = checkpoint_metrics(info, self._lines, self._storage_uri)
            if self._has_folder:
                checkpoint = ray.train.Checkpoint(metrics["checkpoint_uri"])
        mode: Any = ray.train.CheckpointUploadMode.NO_UPLOAD
        report: Any = ray.train.report  # mypy sees the function of Ray Train v1
        self._in_order.add(lambda: report(metrics, checkpoint=checkpoint, checkpoint_upload_mode=mode))

    def look_ahead(self) -> None:
        """Ask Ray Train whether a node will be preempted; rank 0 saves at the next line."""
        if self._sees_preemptions:
            self._in_order.add(self._ask_for_preemptions)

    def _ask_for_preemptions(self) -> None:
        import ray.train

        info = ray.train.get_preemption_info()
        nodes = frozenset(info.preempted_node_to_ranks) if info is not None else frozenset()
        if info is not None and not nodes <= self._preempted and ray.train.get_context().get_world_rank() == 0:
            deadline_ms = info.deadline_ms  # Unix time; 0 or None: unknown
            self._call("post", "preempted", deadline_ms / 1000 - time.time() if deadline_ms else None)
            self._must_save = True
        self._preempted |= nodes

    def refused(self, rank: int, reasons: dict[str, tuple[int, str]]) -> None:
        self._call("post", "refused", (rank, reasons))

    def phase_began(self, number: int, step: int) -> None:
        self._call("post", "phase", (number, step))

    def checkpointed(self, info: CheckpointInfo) -> None:
        self._call("post", "checkpoint", asdict(info))

    def ask(self, step: int) -> Answer:
        return self._call("ask", step)

    def warn(self, message: str) -> None:
        self._call("post", "warning", message)

    def failed(self, error: BaseException) -> None:
        """Post the error of this training worker; Ray Train passes on only one."""
        # In a list: Ray takes an argument that is an error of its own for a failure to compute the argument.
        with contextlib.suppress(Exception):  # Ray Train reports an error that cannot be sent
            self._call("post", "failed", [error])

    def _call(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(getattr(self._monitor, method).remote(*arguments))


def checkpoint_metrics(
    info: CheckpointInfo, lines: list[dict[str, float]], storage_uri: str
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Return the metrics of a report to Ray Train, and the lines of later steps.

    Args:
        lines: of metrics, oldest first.

    Returns:
        `step`, `samples_seen`, `checkpoint_uri` and the figures of the line of this step, as plain numbers of Python:
        others end Ray Train's controller.
    """
    line = next((line for line in lines if line["step"] == info.step), {})
    figures = {key: float(value) for key, value in line.items()}
    counts = {"step": int(info.step), "samples_seen": int(info.samples_seen)}
    return figures | counts | {"checkpoint_uri": info.uri(storage_uri)}, [
        line for line in lines if line["step"] > info.step
    ]
