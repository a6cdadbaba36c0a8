"""A sweep and a run on a cluster that fits one of them at a time: both end, and the one that waits names the other."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.helpers.runs import Sigray
from tests.helpers.sweeps import write_small_study


def test_a_sweep_and_a_run_that_do_not_fit_together_both_end(own_ray, tmp_path: Path):
    """Each holding a data-shard worker, they would wait for the place of a training worker for ever."""
    from ray.cluster_utils import Cluster

    space = {"optim.lr": {"grid": [1e-3, 1e-2]}}
    study = write_small_study(tmp_path, {"data": {"block_size": 16}, "train": {"num_samples": 480}}, space=space)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    try:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"COLUMNS": "160"}
        address = f"cluster.address={cluster.address}"
        sweep = Sigray(tmp_path / "sweep.log", environment, "sweep", study, address)
        run = Sigray(tmp_path / "run.log", environment, "train", tmp_path / "base.yaml", "run.name=other", address)
        assert (sweep.wait(), run.wait()) == (0, 0), sweep.output() + run.output()
    finally:
        cluster.shutdown()
    said = sweep.output() + run.output()
    assert "waiting until run other (" in said or "waiting until sweep small (" in said, said
    summary = json.loads((tmp_path / "runs" / "other" / "summary.json").read_text())
    assert summary["status"] == "finished"
    table = (tmp_path / "sweeps" / "small" / "trials.csv").read_text()
    assert table.count("finished") == 2
