"""Check the arguments of `sigray.stream`, on one process and over a process group."""

from __future__ import annotations

import json
import operator
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from sigray.workers.config import DataConfig, ModelConfig, member_ending
from sigray.workers.data.extras import RESERVED, Extras

Value = TypeVar("Value")
Checked = tuple[dict[str, Any], DataConfig, ModelConfig, Extras]


def place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and world size: as given, of torch.distributed, of the environment."""
    names = ("rank", "world_size")
    values: tuple[Any, Any] = (rank, world_size)
    if values == (None, None) and has_group():
        values = (dist.get_rank(), dist.get_world_size())
    elif values == (None, None):
        names = ("RANK", "WORLD_SIZE")
        values = (os.environ.get("RANK"), os.environ.get("WORLD_SIZE"))
        if values == (None, None):
            return 0, 1
        values = tuple(int(text) if text and text.isdigit() else text for text in values)  # type: ignore[assignment]
    if None in values:
        raise ValueError(f"{names[0]}={values[0]}, {names[1]}={values[1]}: give both or neither")
    size = whole(names[1], values[1], 1)
    return whole(names[0], values[0], 0, size - 1), size


def whole(name: str, value: Any, least: int, most: int = 2**62) -> int:
    """Return a whole number between bounds as an int of Python's."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= most:
        at_most = "" if most == 2**62 else f" and at most {most}"
        raise ValueError(f"{name}={value!r}: a whole number of at least {least}{at_most} expected")
    return number


def endings(members: Sequence[str]) -> tuple[str, ...]:
    if isinstance(members, str) or not all(isinstance(ending, str) for ending in members):
        raise ValueError(f'members={members!r}: a list of endings expected, such as ["npy", "json"]')
    endings = tuple(member_ending(ending) for ending in members)
    if taken := [ending for ending in endings if ending in RESERVED]:
        raise ValueError(f"members={taken}: sigray has other values of this name")
    return endings


def has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def same_on_all_processes(check: Callable[[], Checked], state: dict[str, Any] | None) -> Checked:
    """Return the checked arguments; raise on all processes if one differs."""
    if not has_group():
        return check()
    error: Exception | None = None
    texts: dict[str, str] = {}
    rank = None
    try:
        numbers, config, settings, extras = found = check()
        rank = numbers["rank"]
        sections = {"data": config.model_dump(mode="json"), "model": settings.model_dump(mode="json")}
        others = {"state": state, "members": extras.members, "map": extras.map_name}
        compared = {**numbers, **sections, **others}
        del compared["rank"]
        texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in compared.items()}
    except Exception as raised:
        error = raised
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, (None if error is None else f"{type(error).__name__}: {error}", rank, texts))
    if error is not None:
        raise error
    for process, (message, _, its) in enumerate(of_all):
        if message is not None:
            raise ValueError(f"process {process}: {message}")
        for name, text in its.items():
            first = of_all[0][2][name]
            if text != first:
                raise ValueError(f"{name} is {first[:300]} on process 0 and {text[:300]} on process {process}")
    ranks = Counter(rank for _, rank, _ in of_all)
    if len(ranks) != numbers["world_size"] or len(set(ranks.values())) != 1:
        raise ValueError(
            f"rank is {sorted(ranks.elements())} on the processes of the group: each of the ranks below "
            f"world_size={numbers['world_size']} must come equally often"
        )
    return found


def from_rank_0(make: Callable[[], Value]) -> Value:
    """Return what process 0 made, on every process of the group; raise what it raised."""
    if not has_group():
        return make()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = make()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]
