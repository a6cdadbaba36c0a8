"""The driver without Ray: actors are plain objects of this process, tasks are calls, what Ray is asked is recorded.

For tests of the driver's wiring, in which everything but Ray is the product's own: a run with `PlainRay` decodes,
trains, writes checkpoints and evaluates. All of it happens in one process, so the world size is 1.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

import pytest
import ray
import ray.experimental.internal_kv as internal_kv
import ray.train
import ray.train.v2.api.data_parallel_trainer as ray_train

from sigray.orchestrator import address
from sigray.orchestrator.cluster import pending
from sigray.orchestrator.run import own_ray, ray_death, supervisor
from sigray.orchestrator.run.ray_session import LEAN_RAY
from sigray.workers.checkpoint import lease


class _Reference:
    """What a call has given."""

    def __init__(self, value: Any = None, error: Exception | None = None) -> None:
        self.value, self.error = value, error


class _Call:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def remote(self, *arguments: Any, **named: Any) -> _Reference:
        arguments = tuple(one.value if isinstance(one, _Reference) else one for one in arguments)
        try:
            return _Reference(self._function(*arguments, **named))
        except Exception as error:
            return _Reference(error=error)


class Handle:
    """The handle of an actor; `actor` is the actor itself."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> _Call:
        return _Call(getattr(self.actor, name) if name != "__ray_ready__" else lambda: True)


class _Remote:
    """A class or function that `ray.remote` was given."""

    def __init__(self, made: PlainRay, function: Any, options: dict[str, Any]) -> None:
        self._made, self._function, self._options = made, function, options

    def options(self, **options: Any) -> _Remote:
        return _Remote(self._made, self._function, {**self._options, **options})

    def remote(self, *arguments: Any, **named: Any) -> Any:
        self._made.asked.append((self._function.__name__, self._options))
        if isinstance(self._function, type):
            handle = Handle(self._function(*arguments, **named))
            self._made.handles.setdefault(self._function.__name__, []).append(handle)
            return handle
        return _Call(self._function).remote(*arguments, **named)


class Store:
    """Stands for Ray's key-value store."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def _internal_kv_get(self, key: str, namespace: str) -> bytes | None:
        return self._values.get(key)

    def _internal_kv_put(self, key: str, value: str, overwrite: bool, namespace: str) -> bool:
        exists = key in self._values
        if overwrite or not exists:
            self._values[key] = value.encode()
        return exists

    def _internal_kv_del(self, key: str, namespace: str) -> None:
        self._values.pop(key, None)

    def _internal_kv_list(self, prefix: str, namespace: str) -> list[bytes]:
        return [key.encode() for key in self._values if key.startswith(prefix)]


class NoCallback(ray.train.UserCallback):
    """A callback of Ray Train that does nothing."""


class PlainRay:
    """Stands for Ray in this process.

    Attributes:
        started: the arguments of each `ray.init`.
        asked: name and options of each actor and task.
        trainers: the arguments of each Ray Train trainer.
        groups: bundles of each placement group.
        handles: of the actors, by the name of their class.
        killed: handles that were killed.
        reports: metrics and other arguments of each report to Ray Train.
        num_free: number of bundles that fit.
        train: runs what a training worker runs; a test may put another function in its place.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[dict[str, Any]] = []
        self._is_up = False
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.trainers: list[dict[str, Any]] = []
        self.groups: list[list[dict[str, float]]] = []
        self.handles: dict[str, list[Handle]] = {}
        self.killed: list[Any] = []
        self.reports: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.num_free = 1000
        self.train: Callable[[Callable[[dict[str, Any]], None]], None] = lambda function: function({})
        context = types.SimpleNamespace(get_node_id=lambda: "0" * 56, gcs_address="", current_actor="training worker")
        for name, value in {
            "init": self._init,
            "is_initialized": lambda: self._is_up,
            "shutdown": lambda: setattr(self, "_is_up", False),
            "nodes": list,
            "put": _Reference,
            "get": self._get,
            "wait": lambda references, **_: (list(references), []),
            "kill": lambda handle, **_: self.killed.append(handle),
            "remote": self._remote,
            "get_runtime_context": lambda: context,
        }.items():
            monkeypatch.setattr(ray, name, value)
        # `ray.util.placement_group` is also the name of a function there.
        placement = importlib.import_module("ray.util.placement_group")
        monkeypatch.setattr(placement, "placement_group", self._group)
        monkeypatch.setattr(placement, "remove_placement_group", lambda group: group.table.update(state="REMOVED"))
        monkeypatch.setattr(ray.util, "placement_group_table", lambda group: group.table)
        monkeypatch.setattr(ray.train, "report", lambda metrics, **named: self.reports.append((metrics, named)))
        monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)
        monkeypatch.setattr(ray_train, "DataParallelTrainer", self._trainer)
        monkeypatch.setattr(ray_death, "joined_death", lambda: str)
        # Every address is that of a Ray, and each machine has the devices that a config names.
        monkeypatch.setattr(address, "_why_no_ray", lambda given: None)
        monkeypatch.setattr(own_ray, "machine_accelerators", lambda: {"GPU": 1000.0, "TPU": 1000.0})
        # It reads the state of a real cluster, for a sentence.
        monkeypatch.setattr(pending, "why_pending", lambda demand, holders: f"no capacity for {demand.text()}")
        kept = Store()
        for name in ("_internal_kv_get", "_internal_kv_put", "_internal_kv_del", "_internal_kv_list"):
            monkeypatch.setattr(internal_kv, name, getattr(kept, name))
        monkeypatch.setattr(supervisor, "_POLL_S", 0.01)
        monkeypatch.setattr(lease, "_SETTLE_S", 0.0)
        # Set first, so that what the driver sets is taken back at the end of the test.
        for name in ("RAY_ADDRESS", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_ENABLE_STATE_TRACKING", *LEAN_RAY):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)

    def options_of(self, name: str) -> list[dict[str, Any]]:
        """With which options the actors or tasks of a class or function were asked for."""
        return [options for asked, options in self.asked if asked == name]

    def _get(self, reference: Any) -> Any:
        if isinstance(reference, list):
            return [self._get(one) for one in reference]
        if reference.error is not None:
            raise reference.error
        return reference.value

    def _init(self, **arguments: Any) -> None:
        self.started.append(arguments)
        self._is_up = True

    def _remote(self, function: Any = None, **options: Any) -> Any:
        if function is not None:
            return _Remote(self, function, {})
        return lambda given: _Remote(self, given, options)

    def _group(self, bundles: list[dict[str, float]], strategy: str) -> Any:
        self.groups.append(bundles)
        state, reason = ("CREATED", "FINISHED") if len(bundles) <= self.num_free else ("PENDING", "NO_RESOURCES")
        table = {"state": state, "stats": {"scheduling_state": reason}}
        return types.SimpleNamespace(wait=lambda timeout_seconds: state == "CREATED", table=table)

    def _trainer(self, function: Callable[[dict[str, Any]], None], **arguments: Any) -> Any:
        self.trainers.append(arguments)
        return types.SimpleNamespace(fit=lambda: self.train(function))
