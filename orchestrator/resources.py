"""Compute the Ray resources of a run's workers, and the shape of TPU slices."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sigray.orchestrator.config import ClusterConfig
    from sigray.workers.config import EvalConfig


def worker_resources(cluster: ClusterConfig) -> dict[str, float]:
    """Return the resources that Ray reserves for one training worker."""
    resources = {"CPU": float(cluster.cpus_per_worker)}
    if cluster.accelerator == "cuda":
        resources["GPU"] = 1.0
    if cluster.tpu_type is not None:
        resources["TPU"] = float(_slice_shape(cluster)[1])
    elif cluster.accelerator == "tpu":
        resources["TPU"] = float(cluster.devices_per_worker or 0)
    return {**resources, **cluster.resources_per_worker}


def evaluation_resources(evaluation: EvalConfig) -> dict[str, float]:
    """Return the resources that Ray reserves for one worker of an evaluation."""
    resources = {"CPU": float(evaluation.cpus_per_worker)}
    return resources if evaluation.accelerator == "cpu" else {**resources, "GPU": 1.0}


def check_slices(cluster: ClusterConfig) -> None:
    """Check by Ray's own table of topologies that the workers fill whole slices.

    Raises:
        ValueError: if Ray does not know the type or topology, or the number of workers is not that of the hosts.
    """
    if cluster.tpu_type is None:
        return
    try:
        hosts, _ = _slice_shape(cluster)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"cluster.tpu_type={cluster.tpu_type} with cluster.tpu_topology={cluster.tpu_topology}: {error}"
        ) from error
    if cluster.worker_range != (hosts, hosts):
        raise ValueError(
            f"cluster.num_workers={cluster.num_workers}: a {cluster.tpu_type} slice of {cluster.tpu_topology} has "
            f"{hosts} host(s), and each is one training worker: set cluster.num_workers to {hosts}"
        )


def _slice_shape(cluster: ClusterConfig) -> tuple[int, int]:
    """Return the number of hosts of one slice, and the number of chips of each host."""
    from ray.util.tpu import get_tpu_worker_resources

    assert cluster.tpu_topology is not None
    assert cluster.tpu_type is not None
    hosts, resources = get_tpu_worker_resources(cluster.tpu_topology, cluster.tpu_type)
    return hosts, int(resources["TPU"])
