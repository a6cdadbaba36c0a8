"""How the process group of the training workers comes up, seen from Ray Train's controller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.train._internal.utils import get_address_and_port

from sigray.orchestrator.run import backends


class Group:
    """Stands for Ray Train's worker group: each worker on a host of its own.

    Attributes:
        started: rank, world size and address that each worker was started with, by its index.
    """

    def __init__(self, places: list[tuple[str, int]]) -> None:
        self._places = places
        self.started: dict[int, tuple[Any, ...]] = {}

    def execute(self, function: Callable[..., Any]) -> list[Any]:
        assert function is backends._place
        return self._places

    def execute_single(self, index: int, function: Callable[..., Any]) -> Any:
        assert function is get_address_and_port
        return f"host-{index}", 1000 + index

    def execute_single_async(self, index: int, function: Callable[..., Any], *arguments: Any) -> int:
        assert function is backends._start
        self.started[index] = arguments
        return index


def test_all_workers_meet_at_the_host_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group([("b", 0), ("a", 1), ("a", 0)])
    monkeypatch.setattr(ray, "get", lambda references: references)
    backends._GlooBackend().on_start(group, backends.GlooConfig())
    address = "tcp://host-2:1002"
    assert group.started == {2: (0, 3, address), 1: (1, 3, address), 0: (2, 3, address)}
