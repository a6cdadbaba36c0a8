"""A group of training workers that shrinks and grows with its machines: several raylets on this one."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sigray.orchestrator.config import load_config
from tests.helpers.bare import train_bare
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import Sigray, SmallRun

# Longer than any machine needs for what happens to the run; then it is interrupted.
BATCH, NUM_STEPS, NUM_COMPARED = 96, 100_000, 51
ELASTIC = [
    "run.name=elastic",
    "cluster.num_workers=[1, 2]",
    "cluster.resources_per_worker={training: 1}",
    "cluster.shrink_after_s=4",
    "cluster.grow_after_s=5",
    "data.num_workers=1",
    f"train.num_samples={NUM_STEPS * BATCH}",
    f"train.global_batch_size={BATCH}",
    "train.micro_batch_size=1",  # slow steps: a few hundred are enough to compare
    # Which patches are dropped depends on the rank: with another number of ranks it is another run.
    "model.towers.vision_cfg.patch_dropout=0",
    "eval.sets={}",
    "eval.pixel_baseline=false",
    "checkpoint.save_every_steps=5",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun(tmp_path_factory.mktemp("elastic"))


@pytest.fixture(scope="module")
def machines(own_ray: None) -> Iterator[Any]:
    """A cluster of a head for data-shard workers and of machines that fit one training worker each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def output(small: SmallRun, machines: Any) -> str:
    """Output of a run that begins on two machines, loses one, gets another, loses that one with a notice, and is
    interrupted."""
    machines.add_node(num_cpus=2, resources={"training": 1})
    lost = machines.add_node(num_cpus=2, resources={"training": 1})
    machines.wait_for_nodes()
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"COLUMNS": "160"}
    run = Sigray(
        small.folder / "elastic.log",
        environment,
        "train",
        small.config,
        f"cluster.address={machines.address}",
        *ELASTIC,
    )
    path = small.folder / "runs" / "elastic"
    run.wait_until(lambda: len(list((path / "checkpoints").glob("*/commit.json"))) >= 3)
    machines.remove_node(lost, allow_graceful=False)
    run.wait_until(lambda: "training workers: 2 -> 1" in run.output())
    run.wait_until(lambda: run.output().count("devices") == 2)
    announced = machines.add_node(num_cpus=2, resources={"training": 1})
    run.wait_until(lambda: run.output().count("devices") == 3)
    drain(machines.address, announced.node_id, seconds=8)
    run.wait_until(lambda: "saving a checkpoint" in run.output())
    time.sleep(8)
    machines.remove_node(announced, allow_graceful=False)
    run.wait_until(lambda: run.output().count("devices") == 4)
    lines = small.folder / "runs" / "elastic" / "metrics.jsonl"
    num_lines = max(NUM_COMPARED, len(lines.read_text().splitlines()) + 10)
    run.wait_until(lambda: len(lines.read_text().splitlines()) >= num_lines)
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 130, run.output()
    return run.output()


def drain(address: str, node_id: str, seconds: int) -> None:
    """What an autoscaler does when its cloud announces a preemption."""
    command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([*command, "--deadline-remaining-seconds", str(seconds)], check=True, timeout=60)


def test_it_shrinks_and_grows(output):
    assert "a training worker or its machine died: " in output
    assert "training workers: 2 -> 1" in output
    assert "capacity for 2 training workers: saving a checkpoint, then starting them" in output
    assert "training workers: 1 -> 2" in output
    sizes = re.findall(r"batch +(96 pairs = \d+ x \d workers)", output)
    # On a busy machine the drained node may still have free resources, and the one worker starts again.
    assert [size for size, _ in itertools.groupby(sizes)] == [
        "96 pairs = 48 x 2 workers",
        "96 pairs = 96 x 1 workers",
        "96 pairs = 48 x 2 workers",
        "96 pairs = 96 x 1 workers",
    ]
    # Of the eight seconds some have passed on a busy machine.
    assert re.search(r"a node will be preempted in [0-8] s: saving a checkpoint", output), output
    assert "Traceback" not in output


def test_growing_repeats_no_step(output):
    """A group that stops to grow, after a step at least, writes a checkpoint first."""
    num_grown = 0
    for grown in re.finditer("1 -> 2", output):
        attempt = output[: grown.start()].rpartition("devices")[2]
        done = re.findall(r"step +([\d,]+)  samples", attempt)
        begin = re.search(r"steps +([\d,]+) to 100,000", output[grown.end() :])
        if done and begin is not None:
            assert begin[1] == done[-1]
            num_grown += 1
    assert num_grown


def test_the_losses_are_those_of_a_run_in_which_nothing_changed(small, output):
    """Two sums of the same numbers in another order: in float32 the losses part by rounding."""
    config = load_config(
        small.config, [*ELASTIC, "cluster.num_workers=1", "train.micro_batch_size=null", f"run.dir={small.folder}/bare"]
    )
    path = small.folder / "runs" / "elastic"
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines}
    assert len(lines) == len(losses) >= NUM_COMPARED
    expected = run_on_ranks(1, train_bare, config, len(lines))[0]["losses"]
    assert losses == pytest.approx(expected, rel=1e-3)


def test_the_ledger_is_exact(small, output, capsys):
    from sigray.orchestrator.cli.main import main

    assert main(["data", "audit", str(small.folder / "runs" / "elastic")]) == 0
    assert re.search(rf"each of [\d,]+ steps has its {BATCH} pairs", capsys.readouterr().out)
