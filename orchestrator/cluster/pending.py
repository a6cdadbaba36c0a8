"""What a cluster lacks for a run's training workers, in one sentence, and whether it can come to it by itself.

`room` is arithmetic over what was observed: what hosts have, what of it is free, and what an autoscaler could bring.
The rest of the file observes: hosts through Ray, the autoscaler through its own process, which names the cluster file
that `ray up` left on the head. Where the driver does not run beside it (KubeRay keeps it in a container of its own),
nothing is known of it, and that is said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sigray.orchestrator.cluster.files import chips_per_host, tpu_chips
from sigray.orchestrator.config import ClusterConfig

_GROUP, _SLICE, _POD_TYPE = "ray.io/node-group", "ray.io/tpu-slice-name", "ray.io/tpu-pod-type"
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Need:
    """Training workers that start together.

    Attributes:
        count: of them.
        resources: Ray resources of each.
        pod_type: of the one TPU slice that all of them fill, as v4-32; None: they may be anywhere.
    """

    count: int
    resources: dict[str, float]
    pod_type: str | None = None

    def text(self) -> str:
        """As '4 TPU hosts of v4-32', or '2 training workers of 12 CPU, 1 GPU'."""
        plural = "s" * (self.count != 1)
        if self.pod_type:
            return f"{self.count} TPU host{plural} of {self.pod_type}"
        each = ", ".join(f"{amount:g} {name}" for name, amount in self.resources.items() if amount)
        return f"{self.count} training worker{plural} of {each or 'nothing'}"


@dataclass(frozen=True)
class Host:
    """A machine that is up.

    Attributes:
        total, free: Ray resources.
        group: the autoscaler's name of its node type, where it says so.
        slice_name, pod_type: of a TPU host.
    """

    total: dict[str, float]
    free: dict[str, float]
    group: str | None = None
    slice_name: str | None = None
    pod_type: str | None = None


@dataclass(frozen=True)
class NodeType:
    """What an autoscaler can bring up.

    Attributes:
        resources: of each host; empty: not known.
        most: nodes at the same time.
        hosts: of each node; a TPU slice has several.
        pod_type: of a TPU.
    """

    name: str
    resources: dict[str, float]
    most: int
    hosts: int = 1
    pod_type: str | None = None


@dataclass(frozen=True)
class Autoscaler:
    """Whether one runs, and what it can bring up.

    Attributes:
        runs: False: machines come by hand only.
        types: of worker nodes.
        most: nodes of all types together; None: no such bound.
    """

    runs: bool
    types: tuple[NodeType, ...] = ()
    most: int | None = None


@dataclass(frozen=True)
class Room:
    """What `room` found.

    Attributes:
        sentence: what is needed, what is there, and what is waited for.
        can_be_met: whether the cluster can come to it by itself; None: not known.
    """

    sentence: str
    can_be_met: bool | None


def room(need: Need, hosts: Sequence[Host], autoscaler: Autoscaler | None) -> Room:
    """What a cluster lacks.

    Args:
        need: what does not fit at the moment.
        hosts: that are up.
        autoscaler: None: not known.
    """
    has, free = (_places(need, hosts, [getattr(host, kind) for host in hosts]) for kind in ("total", "free"))
    begin = f"needs {need.text()}, has "
    if free >= need.count:
        return Room(f"{begin}them: waiting for Ray to place them", True)
    if has >= need.count:
        return Room(f"{begin}{has}, {free} free: waiting for those that hold the others", True)
    begin += f"{has}: "
    if autoscaler is None:
        return Room(f"{begin}waiting for machines; whether an autoscaler runs cannot be seen from here", None)
    if not autoscaler.runs:
        return Room(f"{begin}no autoscaler runs, so it waits for machines that somebody starts", False)
    if any(not kind.resources for kind in autoscaler.types):
        return Room(
            f"{begin}waiting for the autoscaler, of whose hosts the cluster file does not say what they have", None
        )
    if _reach(need, hosts, autoscaler) >= need.count:
        names = " or ".join(kind.name for kind in autoscaler.types if _of_type(need, kind))
        return Room(f"{begin}waiting for the autoscaler ({names})", True)
    return Room(f"{begin}cannot be met by this cluster.yaml: {_why_not(need, hosts, autoscaler)}", False)


def _fit(need: Need, resources: dict[str, float]) -> int:
    """Workers that such a host has place for."""
    counts = [(resources.get(name, 0) + _ROUNDING) // amount for name, amount in need.resources.items() if amount]
    return int(min(counts, default=need.count))


def _places(need: Need, hosts: Sequence[Host], amounts: Sequence[dict[str, float]]) -> int:
    """Workers that these hosts have place for; of a slice, on the best one."""
    if need.pod_type is None:
        return sum(_fit(need, amount) for amount in amounts)
    slices: dict[str, int] = {}
    for number, (host, amount) in enumerate(zip(hosts, amounts, strict=True)):
        if host.pod_type in (None, need.pod_type):
            name = host.slice_name or f"host {number}"
            slices[name] = slices.get(name, 0) + min(1, _fit(need, amount))  # each host is one worker
    return max(slices.values(), default=0)


def _of_type(need: Need, kind: NodeType) -> int:
    """Workers that one node of a type has place for."""
    if need.pod_type is None:
        return kind.hosts * _fit(need, kind.resources)
    return kind.hosts * min(1, _fit(need, kind.resources)) if kind.pod_type == need.pod_type else 0


def _reach(need: Need, hosts: Sequence[Host], autoscaler: Autoscaler) -> int:
    """Workers that there is place for once all that could help is up."""
    each = [(_of_type(need, kind), kind.most) for kind in autoscaler.types]
    if need.pod_type is not None:
        most = autoscaler.most if autoscaler.most is not None else 1
        here = _places(need, hosts, [host.total for host in hosts])
        return max([here, *(size for size, count in each if min(count, most) > 0)])
    # Hosts that no autoscaler brought are there besides.
    by_hand = [host for host in hosts if not any(_is_of(host, kind) for kind in autoscaler.types)]
    reach = _places(need, by_hand, [host.total for host in by_hand])
    left = autoscaler.most if autoscaler.most is not None else sum(count for _, count in each)
    for size, count in sorted(each, reverse=True):
        reach, left = reach + size * min(count, left), left - min(count, left)
    return max(reach, _places(need, hosts, [host.total for host in hosts]))


def _is_of(host: Host, kind: NodeType) -> bool:
    if host.group is not None:
        return host.group == kind.name
    return all(host.total.get(name, 0) == amount for name, amount in kind.resources.items())


def _why_not(need: Need, hosts: Sequence[Host], autoscaler: Autoscaler) -> str:
    if need.pod_type is not None:
        if not any(kind.pod_type == need.pod_type and kind.most for kind in autoscaler.types):
            return f"no node type brings up a {need.pod_type}"
        return f"a node of {need.pod_type} has {max(_of_type(need, kind) for kind in autoscaler.types)} such hosts"
    usable = [kind for kind in autoscaler.types if kind.most]
    for name, amount in need.resources.items():
        largest = max((kind.resources.get(name, 0) for kind in usable), default=0)
        if amount and largest + _ROUNDING < amount:
            return f"no node type offers {name}" if not largest else f"no node type has more than {largest:g} {name}"
    if not any(_of_type(need, kind) for kind in usable):
        return f"no node type has all of {', '.join(need.resources)} together"
    return f"its node types have place for {_reach(need, hosts, autoscaler)} at most (max_workers)"


# ------------------------------------------------------------------------------------------------- observing


def need_of(cluster: ClusterConfig, count: int) -> Need:
    """What so many training workers of a config need."""
    from sigray.orchestrator.run.backends import pod_type, worker_resources

    return Need(count, worker_resources(cluster), pod_type(cluster))


def cluster_hosts() -> list[Host]:
    """The machines of the cluster that this process has joined."""
    import ray
    from ray._private.state import available_resources_per_node  # what is free stands nowhere else by node

    free = available_resources_per_node()
    return [
        Host(
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
            group=node["Labels"].get(_GROUP),
            slice_name=node["Labels"].get(_SLICE),
            pod_type=node["Labels"].get(_POD_TYPE),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def find_autoscaler(gcs_address: str, processes: Path = Path("/proc")) -> Autoscaler | None:
    """The autoscaler of a cluster, from its process on this machine; None where there is none to see.

    Args:
        gcs_address: of the cluster, as host:port.
        processes: where the kernel lists them.
    """
    for file in processes.glob("[0-9]*/cmdline"):
        # A process that has just ended, a file that is none of Ray's: a sentence is not worth a run.
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
            words = file.read_bytes().decode(errors="replace").split("\0")
            is_monitor = any(word.endswith("/monitor.py") and "/autoscaler/" in word for word in words)
            if not is_monitor or f"--gcs-address={gcs_address}" not in words:
                continue
            for word in words:
                if word.startswith("--autoscaling-config="):
                    return autoscaler_of(yaml.safe_load(Path(word.partition("=")[2]).expanduser().read_text()))
            return Autoscaler(runs=False)
    return None


def autoscaler_of(config: dict[str, Any]) -> Autoscaler:
    """What a `ray up` file lets its autoscaler bring up."""
    types = []
    for name, group in (config.get("available_node_types") or {}).items():
        if name == config.get("head_node_type"):
            continue
        kind = str((group.get("node_config") or {}).get("acceleratorType", ""))
        generation, _, size = kind.partition("-")
        chips = int(tpu_chips(generation, int(size))) if size.isdecimal() else 0
        types.append(
            NodeType(
                name,
                {key: float(amount) for key, amount in (group.get("resources") or {}).items()},
                int(group.get("max_workers", config.get("max_workers", 0))),
                hosts=chips // chips_per_host(generation, chips) if chips else 1,
                pod_type=kind if chips else None,
            )
        )
    most = config.get("max_workers")
    return Autoscaler(True, tuple(types), None if most is None else int(most))
