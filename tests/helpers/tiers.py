"""Which tier and which marks a test has: what its fixtures need decides, not a mark that one must remember.

    short   what `make test` runs: no more than the Ray that all tests share
    long    a Ray, a cluster or a compiler of its own; minutes (`make test-all`)
    soak    many minutes, for a look at what only time shows
    network fetches from package registries

`--tier NAME` chooses, `short` by default; `-m` selects within the tier and never switches another one on.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TIERS = ("short", "long", "soak", "network")

# What a test is that needs a fixture: its tier and its marks. The fixtures stand in tests/conftest.py.
NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "shared_ray": ("short", ("ray",)),
    "own_ray": ("long", ("ray",)),
    "minutes": ("long", ()),
    "namespaces": ("long", ("cluster",)),
    "patience": ("soak", ()),
    "registries": ("network", ()),
    "torch_xla": ("short", ("xla",)),
    "cuda": ("short", ("gpu",)),
}


def tier_of(fixtures: list[str]) -> str:
    """The last tier that one of these fixtures belongs to; `short` without any."""
    return max((NEEDS[name][0] for name in fixtures if name in NEEDS), key=TIERS.index, default="short")


def marks_of(fixtures: list[str]) -> set[str]:
    return {mark for name in fixtures if name in NEEDS for mark in NEEDS[name][1]}


class Tiers:
    """A pytest plugin: marks what was collected, and keeps the tier that was asked for."""

    def __init__(self, wanted: str) -> None:
        self._wanted = wanted

    def pytest_report_header(self) -> str:
        return f"tier: {self._wanted} (--tier {'|'.join(TIERS)})"

    @pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, left_out = [], []
        for item in items:
            fixtures = getattr(item, "fixturenames", [])
            for mark in marks_of(fixtures):
                item.add_marker(mark)
            (kept if tier_of(fixtures) == self._wanted else left_out).append(item)
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = kept


@dataclass
class RayWatch:
    """A pytest plugin: fails a test that is not marked `ray` and under which a Ray came up, in whatever process.

    Ray takes seconds to come up, so a look at the processes below this one twice a second misses none.
    """

    period_s: float = 0.5
    process: str = "raylet"
    _known: set[int] = field(default_factory=set)
    _item: pytest.Item | None = None
    _found: str = ""
    _done: threading.Event = field(default_factory=threading.Event)

    def pytest_sessionstart(self) -> None:
        threading.Thread(target=self._watch, name="ray-watch", daemon=True).start()

    def pytest_sessionfinish(self) -> None:
        self._done.set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        self._item, self._found = item, ""
        return (yield)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if self._found:
            pytest.fail(f"{self._found} came up, and no fixture of the test says so: shared_ray or own_ray does")

    def _watch(self) -> None:
        while not self._done.wait(self.period_s):
            for pid in processes_below(os.getpid(), self.process):
                item = self._item
                if pid not in self._known and item is not None and item.get_closest_marker("ray") is None:
                    self._found = f"{self.process} {pid}"
                self._known.add(pid)


def processes_below(ancestor: int, wanted: str) -> list[int]:
    """Ids of the processes of a name (its first 15 characters) that a process or its descendants started."""
    parents, found = {}, []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            name, rest = (entry / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
        except (OSError, IndexError):  # it has ended
            continue
        parents[int(entry.name)] = int(rest.split()[1])
        if name == wanted:
            found.append(int(entry.name))

    def is_below(pid: int) -> bool:
        while pid > 1 and pid != ancestor:
            pid = parents.get(pid, 0)
        return pid == ancestor

    return [pid for pid in found if is_below(pid)]
