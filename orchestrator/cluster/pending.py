"""Why training workers are pending, and whether the cluster can meet the demand.

The supervisor of a run decides how long to wait; this module says why. `pending_reason` is arithmetic over
observations: the resources of hosts, their free resources, and the node types of an autoscaler. The rest of the file
observes. Hosts come from Ray. The autoscaler comes from its own process, whose command line names the cluster file that
`ray up` left on the head. If the driver runs elsewhere (KubeRay gives the autoscaler a container of its own), the
autoscaler is unknown, and the sentence says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sigray.orchestrator.config import ClusterConfig
from sigray.workers.parse import parse_yaml

_LABELS = ("ray.io/node-group", "ray.io/tpu-slice-name", "ray.io/tpu-pod-type")  # of Host's last three fields
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Demand:
    """Training workers that start together.

    Attributes:
        num_workers: workers of the group.
        resources: Ray resources of each worker.
        pod_type: the one TPU slice that the workers fill, as v4-32; None: workers may be on any hosts.
        data_workers: resources of each data-shard worker that starts with them.
    """

    num_workers: int
    resources: dict[str, float]
    pod_type: str | None = None
    data_workers: tuple[dict[str, float], ...] = ()

    def text(self) -> str:
        """Describe the demand, as '2 training workers of 12 CPU, 1 GPU'."""
        plural = "s" * (self.num_workers != 1)
        text = f"{self.num_workers} training worker{plural} of {_each(self.resources)}"
        if self.pod_type:
            text = f"{self.num_workers} TPU host{plural} of {self.pod_type}"
        count = len(self.data_workers)
        also = f" and {count} data-shard worker{'s' * (count != 1)} of {_each(self.data_workers[0])}" if count else ""
        return text + also


@dataclass(frozen=True)
class Host:
    """A host that is up.

    Attributes:
        total, free: Ray resources.
        group: the autoscaler's name of the host's node type, if the host is labelled with one.
        slice_name, pod_type: TPU slice of the host, and the type of that slice.
    """

    total: dict[str, float]
    free: dict[str, float]
    group: str | None = None
    slice_name: str | None = None
    pod_type: str | None = None


@dataclass(frozen=True)
class NodeType:
    """A node type of an autoscaler.

    Attributes:
        resources: Ray resources of each host; empty: unknown.
        max_nodes: nodes at the same time.
        hosts: hosts of each node; a TPU slice has several.
        pod_type: TPU slice that a node is.
    """

    name: str
    resources: dict[str, float]
    max_nodes: int
    hosts: int = 1
    pod_type: str | None = None


@dataclass(frozen=True)
class Autoscaler:
    """What an autoscaler can start.

    Attributes:
        runs: False: hosts are only started by hand.
        types: node types of workers.
        max_nodes: nodes of all types together; None: no such bound.
    """

    runs: bool
    types: tuple[NodeType, ...] = ()
    max_nodes: int | None = None


def _each(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount) or "nothing"


def pending_reason(
    demand: Demand, hosts: Sequence[Host], autoscaler: Autoscaler | None, holders: Sequence[str] = ()
) -> str:
    """Say in a sentence why a demand is pending, and what the run waits for.

    Args:
        demand: workers that do not fit at the moment.
        hosts: hosts that are up.
        autoscaler: None: unknown.
        holders: what other jobs hold, as far as they say so.
    """
    has = _num_fitting(demand, hosts)
    free = _num_fitting(demand, [dataclasses.replace(host, total=host.free) for host in hosts])
    begin = f"needs {demand.text()}, has "
    if free >= demand.num_workers and not (demand.data_workers or holders):
        return f"{begin}them: waiting for Ray to place them"
    if has >= demand.num_workers:
        until = f"{' or '.join(holders[:10])} releases them" if holders else "the others are released"
        together = ", but not together with the data-shard workers" if free >= demand.num_workers else ""
        return f"{begin}{has}, {free} free{together}: waiting until {until}"
    begin += f"{has}: "
    if autoscaler is None:
        return f"{begin}waiting for hosts; the driver cannot see whether an autoscaler runs"
    if not autoscaler.runs:
        return f"{begin}no autoscaler runs: start hosts by hand"
    if any(not kind.resources for kind in autoscaler.types):
        return f"{begin}waiting for the autoscaler; the cluster file names no resources of its hosts"
    if _max_workers(demand, hosts, autoscaler) >= demand.num_workers:
        names = " or ".join(kind.name for kind in autoscaler.types if _workers_per_node(demand, kind))
        return f"{begin}waiting for the autoscaler ({names})"
    return f"{begin}cannot be met by this cluster file: {_why_not(demand, hosts, autoscaler)}"


def _fit(demand: Demand, resources: dict[str, float]) -> int:
    """Return the number of workers that fit these resources."""
    counts = [(resources.get(name, 0) + _ROUNDING) // amount for name, amount in demand.resources.items() if amount]
    return int(min(counts, default=demand.num_workers))


def _num_fitting(demand: Demand, hosts: Sequence[Host]) -> int:
    """Return how many workers fit these hosts; for a slice, those on the best one."""
    if demand.pod_type is None:
        return sum(_fit(demand, host.total) for host in hosts)
    slices: Counter[str] = Counter()
    for number, host in enumerate(hosts):
        if host.pod_type in (None, demand.pod_type):
            slices[host.slice_name or f"host {number}"] += min(1, _fit(demand, host.total))  # one worker per host
    return max(slices.values(), default=0)


def _workers_per_node(demand: Demand, kind: NodeType) -> int:
    """Return the number of workers that fit one node of a type."""
    if demand.pod_type is None:
        return kind.hosts * _fit(demand, kind.resources)
    return kind.hosts * min(1, _fit(demand, kind.resources)) if kind.pod_type == demand.pod_type else 0


def _max_workers(demand: Demand, hosts: Sequence[Host], autoscaler: Autoscaler) -> int:
    """Return how many workers fit after the autoscaler has started what helps."""
    each = [(_workers_per_node(demand, kind), kind.max_nodes) for kind in autoscaler.types]
    here = _num_fitting(demand, hosts)
    left = sum(count for _, count in each) if autoscaler.max_nodes is None else autoscaler.max_nodes
    if demand.pod_type is not None:
        return max([here, *(size for size, count in each if min(count, left) > 0)])
    # Hosts that the autoscaler did not start come on top.
    by_hand = [host for host in hosts if not any(_is_of(host, kind) for kind in autoscaler.types)]
    total = _num_fitting(demand, by_hand)
    for size, count in sorted(each, reverse=True):
        total += size * min(count, left)
        left -= min(count, left)
    return max(total, here)


def _is_of(host: Host, kind: NodeType) -> bool:
    if host.group is not None:
        return host.group == kind.name
    return all(host.total.get(name, 0) == amount for name, amount in kind.resources.items())


def _why_not(demand: Demand, hosts: Sequence[Host], autoscaler: Autoscaler) -> str:
    if demand.pod_type is not None:
        if not any(kind.pod_type == demand.pod_type and kind.max_nodes for kind in autoscaler.types):
            return f"no node type is a {demand.pod_type}"
        return f"a {demand.pod_type} has {max(_workers_per_node(demand, kind) for kind in autoscaler.types)} such hosts"
    usable = [kind for kind in autoscaler.types if kind.max_nodes]
    for name, amount in demand.resources.items():
        largest = max((kind.resources.get(name, 0) for kind in usable), default=0)
        if amount and largest + _ROUNDING < amount:
            return f"no node type offers {name}" if not largest else f"no node type has more than {largest:g} {name}"
    if not any(_workers_per_node(demand, kind) for kind in usable):
        return f"no node type has all of {', '.join(demand.resources)} together"
    return f"its node types fit at most {_max_workers(demand, hosts, autoscaler)} (max_workers)"


# ------------------------------------------------------------------------------------------------- observing


def why_pending(demand: Demand, holders: Sequence[str]) -> str:
    """Say why a demand is pending on the cluster that this process has joined."""
    import ray

    autoscaler = find_autoscaler(ray.get_runtime_context().gcs_address)
    return pending_reason(demand, cluster_hosts(), autoscaler, holders)


def demand_of(cluster: ClusterConfig, num_workers: int, data_workers: Sequence[dict[str, float]] = ()) -> Demand:
    """Return the demand of training workers of a config, and of data-shard workers."""
    from sigray.orchestrator.resources import worker_resources

    pod_type = None
    if cluster.tpu_type is not None and cluster.tpu_topology is not None:
        from ray._private.accelerators.tpu import infer_tpu_pod_type_from_topology  # as Ray's own reservation

        pod_type = infer_tpu_pod_type_from_topology(cluster.tpu_topology, cluster.tpu_type)
    return Demand(num_workers, worker_resources(cluster), pod_type, tuple(data_workers))


def cluster_hosts() -> list[Host]:
    """Return the hosts of the cluster that this process has joined."""
    import ray
    from ray._private.state import available_resources_per_node  # Ray's public API has no free resources by node

    free = available_resources_per_node()
    return [
        Host(node["Resources"], free.get(node["NodeID"], {}), *map(node["Labels"].get, _LABELS))
        for node in ray.nodes()
        if node["Alive"]
    ]


def find_autoscaler(gcs_address: str, processes: Path = Path("/proc")) -> Autoscaler | None:
    """Return a cluster's autoscaler, found by its process on this host.

    Args:
        gcs_address: address of the cluster, as host:port.
        processes: folder in which the kernel lists processes.

    Returns:
        None if the cluster's autoscaler does not run on this host.
    """
    for file in processes.glob("[0-9]*/cmdline"):
        # The process may just have ended, or the file may not be Ray's. A pending reason must not fail a run.
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, ArithmeticError):
            words = file.read_bytes().decode(errors="replace").split("\0")
            is_monitor = any(word.endswith("/monitor.py") and "/autoscaler/" in word for word in words)
            if not is_monitor or f"--gcs-address={gcs_address}" not in words:
                continue
            for word in words:
                if word.startswith("--autoscaling-config="):
                    return autoscaler_of(parse_yaml(Path(word.partition("=")[2]).expanduser().read_bytes()))
            return Autoscaler(runs=False)
    return None


def autoscaler_of(config: dict[str, Any]) -> Autoscaler:
    """Return what a `ray up` file lets its autoscaler start."""
    from ray._private.accelerators import tpu  # Ray's arithmetic: v4-16 is 8 chips on two hosts

    types = []
    for name, group in (config.get("available_node_types") or {}).items():
        if name == config.get("head_node_type"):
            continue
        slice_type = (group.get("node_config") or {}).get("acceleratorType")
        hosts = 1
        if slice_type:
            chips = tpu.get_total_chips_from_accelerator_type(slice_type)
            hosts = chips // tpu.get_num_tpu_visible_chips_per_host(slice_type)
        resources = {key: float(amount) for key, amount in (group.get("resources") or {}).items()}
        max_nodes = int(group.get("max_workers", config.get("max_workers", 0)))
        types.append(NodeType(name, resources, max_nodes, hosts, slice_type))
    most = config.get("max_workers")
    return Autoscaler(True, tuple(types), None if most is None else int(most))
