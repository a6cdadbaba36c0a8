"""`sigray train` on the TPU path: a slice of two hosts, reserved, trained on, interrupted, resumed and given back.

The hosts are raylets of this machine that claim what those of a v4-16 would (resources and labels), and torch-xla's CPU
client stands in for their chips. What comes out must equal a bare gloo run without Ray or XLA.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from sigray.orchestrator.config import load_config
from tests.helpers.bare import train_bare
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import BATCH, Sigray, SmallRun

NUM_STEPS = 50
SLICE = [
    "cluster.accelerator=xla_cpu",
    "cluster.tpu_type=TPU-V4",
    "cluster.tpu_topology=2x2x2",
    "cluster.devices_per_worker=2",
    "cluster.num_workers=2",
    "data.num_workers=1",
    f"train.num_samples={NUM_STEPS * BATCH}",
    "train.micro_batch_size=null",
    "train.ema=100",
    # What is dropped depends on the random numbers of the device.
    "model.towers.vision_cfg.patch_dropout=0",
    "eval.pixel_baseline=false",
]


def add_slice(cluster: Any, name: str, worker_ids: list[str]) -> list[Any]:
    """Two hosts as those of a v4-16 announce themselves; the first holds the slice's head."""
    labels = {"ray.io/tpu-slice-name": name, "ray.io/tpu-topology": "2x2x2", "ray.io/tpu-pod-type": "v4-16"}
    nodes = []
    for number, worker_id in enumerate(worker_ids):
        resources = {"TPU": 4, "accelerator_type:TPU-V4": 1} | ({} if number else {"TPU-v4-16-head": 1})
        own = labels | {"ray.io/tpu-worker-id": worker_id}
        with mock.patch.dict(os.environ, {"TPU_NAME": name}):  # Ray asks a process of the head for the slice's name
            nodes.append(cluster.add_node(num_cpus=2, resources=resources, labels=own, wait=True))
    return nodes


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun(tmp_path_factory.mktemp("slice"))


@pytest.fixture(scope="module")
def cluster(own_ray: None, torch_xla: None) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    # Compiled without optimization: the test compiles far more than it computes. Ray's workers inherit from its nodes.
    with mock.patch.dict(os.environ, {"XLA_FLAGS": "--xla_backend_optimization_level=0"}):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
        yield cluster
        cluster.shutdown()


def sigray(small: SmallRun, cluster: Any, log: str, *arguments: object) -> Sigray:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return Sigray(
        small.folder / log, environment | {"COLUMNS": "160"}, *arguments, f"cluster.address={cluster.address}"
    )


@pytest.fixture(scope="module")
def hosts(cluster: Any) -> list[Any]:
    return add_slice(cluster, "slice", ["0", "1"])


@pytest.fixture(scope="module")
def first_output(small: SmallRun, cluster: Any, hosts: list[Any]) -> str:
    """Output of the run until Ctrl-C; then the slice is free again for the next one."""
    run = sigray(small, cluster, "first.log", "train", small.config, *SLICE)
    run.wait_until(lambda: small.num_lines() >= 20)
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 130, run.output()
    return run.output()


@pytest.fixture(scope="module")
def second_output(small: SmallRun, cluster: Any, first_output: str) -> str:
    run = sigray(small, cluster, "second.log", "resume", small.path)
    assert run.wait() == 0, run.output()
    return run.output()


def test_the_losses_are_those_of_gloo(small, second_output):
    """Fifty steps; float32, other order of additions."""
    on_cpu = ["cluster.accelerator=cpu", "cluster.devices_per_worker=1"]
    on_cpu += ["cluster.tpu_type=null", "cluster.tpu_topology=null", f"run.dir={small.folder}/bare"]
    config = load_config(small.config, [*SLICE, *on_cpu])
    expected = run_on_ranks(2, train_bare, config)[0]["losses"]
    assert len(expected) == NUM_STEPS
    assert small.losses() == pytest.approx(expected, rel=1e-3)


def test_nothing_is_compiled_after_the_second_step_of_a_driver(small, second_output):
    lines = [json.loads(line) for line in (small.path / "metrics.jsonl").read_text().splitlines()]
    (second_begin,) = re.findall(r"steps +(\d+) to 50", second_output)
    records = [line["compile/num_programs"] for line in lines if line["step"] > 2]
    records.pop(int(second_begin) - 2)  # the first step of the second driver
    assert len(set(records[: int(second_begin) - 2])) == 1
    assert len(set(records[int(second_begin) - 2 :])) == 1


def test_the_run_is_evaluated(small, second_output):
    summary = json.loads((small.path / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["zero_shot"]["colours"]["num_images"] == 24
    assert summary["without_ema"]["zero_shot"]["colours"]["num_images"] == 24
    assert "2 training worker(s) on torch-xla, 2 CPU devices each" in second_output


def test_a_start_that_fails_gives_the_slice_back(small, cluster, hosts, second_output):
    """One slice, a label on it that is no number: the second attempt could not begin if the first still held it."""
    for host in hosts:
        cluster.remove_node(host)
    add_slice(cluster, "broken", ["0", "none"])
    run = sigray(small, cluster, "broken.log", "train", small.config, *SLICE, "run.name=broken")
    assert run.wait() == 1
    assert run.output().count("the training workers could not be connected: ") == 2, run.output()
    assert "a host's label ray.io/tpu-worker-id is 'none', a number expected" in run.output()
    assert "the same error came twice at the same step" in run.output()
