"""How a worker group comes up on each accelerator. With `workers/device.py` the only place that knows them."""

from __future__ import annotations

from typing import Any

from orchestrator.config import ClusterConfig


def torch_config(cluster: ClusterConfig) -> Any:
    """Ray Train's process-group set-up: gloo between CPU workers, nccl between GPUs."""
    from ray.train.torch import TorchConfig

    return TorchConfig(backend={"cpu": "gloo", "cuda": "nccl"}[cluster.accelerator])


def worker_resources(cluster: ClusterConfig) -> dict[str, float]:
    """What Ray reserves for one training worker."""
    gpu = {"GPU": 1.0} if cluster.accelerator == "cuda" else {}
    return {"CPU": float(cluster.cpus_per_worker), **gpu, **cluster.resources_per_worker}
