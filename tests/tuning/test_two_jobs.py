"""A sweep and a run on a cluster that fits one of them at a time: both end, and the one that waits names the other."""

from __future__ import annotations

import json
import os
from pathlib import Path

import yaml

from tests.helpers.runs import Sigray, SmallRun


def test_a_sweep_and_a_run_that_do_not_fit_together_both_end(own_ray, tmp_path: Path):
    """Each holding a data-shard worker, they would wait for the place of a training worker for ever."""
    from ray.cluster_utils import Cluster

    small = SmallRun(tmp_path)
    base = yaml.safe_load(small.config.read_text())
    base["data"]["num_workers"] = 1
    base["cluster"] = {"num_workers": 1}
    base["train"]["num_samples"] = 480
    base["eval"]["pixel_baseline"] = False
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    study = {
        "name": "rates",
        "base": "base.yaml",
        "dir": str(tmp_path / "sweeps"),
        "metric": "retrieval.colours.image_to_text_r10",
        "budget": 480,
        "space": {"optim.lr": {"grid": [1e-3, 1e-2]}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    try:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"COLUMNS": "160"}
        address = f"cluster.address={cluster.address}"
        sweep = Sigray(tmp_path / "sweep.log", environment, "sweep", tmp_path / "study.yaml", address)
        run = Sigray(tmp_path / "run.log", environment, "train", tmp_path / "base.yaml", "run.name=other", address)
        assert (sweep.wait(), run.wait()) == (0, 0), sweep.output() + run.output()
    finally:
        cluster.shutdown()
    said = sweep.output() + run.output()
    assert "waiting until run other (" in said or "waiting until sweep rates (" in said, said
    summary = json.loads((tmp_path / "runs" / "other" / "summary.json").read_text())
    assert summary["status"] == "finished"
    table = (tmp_path / "sweeps" / "rates" / "trials.csv").read_text()
    assert table.count("finished") == 2
