"""The number of trials that fit on a cluster at once, from its free resources.

Ray Tune counts only the driver process of a trial, half a CPU, and not the training workers that the trial starts. So
it would start too many trials, each holding resources that the training workers of others need. Here a trial counts
with all resources that it will request, node by node: a worker of four GPUs does not fit on two nodes with three free
GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SLICE_LABEL = "ray.io/tpu-slice-name"


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Attributes:
        free: Ray resources that no job outside the sweep holds.
        labels: of the node; hosts of one TPU slice have the same slice name.
    """

    free: dict[str, float]
    labels: dict[str, str]


@dataclass(frozen=True)
class Demand:
    """Resources that are placed together or not at all.

    Attributes:
        workers: resources of each training worker.
        others: resources of single processes that may run anywhere.
    """

    workers: Sequence[dict[str, float]]
    others: Sequence[dict[str, float]]


def count_trials(nodes: Sequence[Node], pools: Demand, trial: Demand, most: int) -> int:
    """Number of trials that can run at once.

    Args:
        pools: the data-shard workers that the trials share.
        most: upper bound.
    """
    free = [dict(node.free) for node in nodes]
    if not _place(nodes, free, pools):
        return 0
    count = 0
    while count < most and _place(nodes, free, trial):
        count += 1
    return count


def _place(nodes: Sequence[Node], free: list[dict[str, float]], demand: Demand) -> bool:
    """Subtract a demand from `free`; returns False if it does not fit."""
    if any("TPU" in worker for worker in demand.workers):
        if not _place_on_slice(nodes, free, demand.workers):
            return False
    elif not all(_place_one(free, range(len(free)), worker) for worker in demand.workers):
        return False
    return all(_place_one(free, range(len(free)), other) for other in demand.others)


def _place_on_slice(nodes: Sequence[Node], free: list[dict[str, float]], workers: Sequence[dict[str, float]]) -> bool:
    """Place the TPU workers of a trial within one slice, as they share a mesh."""
    slices: dict[str, list[int]] = {}
    for number, node in enumerate(nodes):
        if "TPU" in node.free:
            slices.setdefault(node.labels.get(SLICE_LABEL, f"node {number}"), []).append(number)
    for members in slices.values():
        before = [dict(free[number]) for number in members]
        if all(_place_one(free, members, worker) for worker in workers):
            return True
        for number, amounts in zip(members, before, strict=True):
            free[number] = amounts
    return False


def _place_one(free: list[dict[str, float]], among: Sequence[int], demand: dict[str, float]) -> bool:
    """Place on the best-fitting node, so that larger free blocks stay whole."""
    fitting = [
        number
        for number in among
        if all(free[number].get(name, 0) + 1e-6 >= amount for name, amount in demand.items() if amount)
    ]
    if not fitting:
        return False
    best = min(fitting, key=lambda number: sum(free[number].get(name, 0) for name in demand))
    for name, amount in demand.items():
        free[best][name] = free[best].get(name, 0) - amount
    return True
