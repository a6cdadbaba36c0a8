"""Carry events from training workers to the driver, and requests back.

The training workers post events to the `RunMonitor` actor, and the driver takes them twice a second. The answer to a
line of metrics is the driver's request: go on, save, or stop at this step.

Imports no torch: the actor's process would spend six seconds of a busy start on it.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sigray.workers.checkpoint.index import CheckpointInfo
    from sigray.workers.training.job import Answer, Request


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


class RayHooks:
    """Hooks of the training loop under Ray Train: each call is an event.

    Ray Train learns of no checkpoint. `ray.train.report` holds all ranks until its controller has polled them, and its
    list of checkpoints can differ from the durable ones.

    Args:
        monitor: handle of the `RunMonitor`.
    """

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def joined(self) -> None:
        """Post the handle of this training worker, by which the driver can kill it."""
        import ray

        self._call("post", "joined", ray.get_runtime_context().current_actor)

    def started(self, facts: dict[str, Any]) -> None:
        self._call("post", "started", facts)

    def record(self, metrics: dict[str, float]) -> Request:
        return self._call("record", metrics)

    def refused(self, rank: int, reasons: dict[str, tuple[int, str]]) -> None:
        self._call("post", "refused", (rank, reasons))

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
