"""A run that older code began goes on under this code: config, manifest, checkpoint and numerics."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from sigray.orchestrator.config import check_resume
from sigray.orchestrator.run_folder import RunFolder, read_run
from sigray.workers.data.manifest import scan_shards
from tests.helpers.bare import train_bare

OLD = Path(__file__).parents[2] / "data" / "run_2026_11"


def test_a_run_of_the_former_package_names_resumes(tmp_path):
    """Bit for bit, if this machine rounds as the one that wrote the run did."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "runs" / "small"
    shutil.copytree(tmp_path / "run", folder)
    for file in (folder / "config.yaml", folder / "manifest.json"):
        file.write_text(file.read_text().replace("@", str(tmp_path)))
    for shard in json.loads((folder / "manifest.json").read_text())["shards"]:
        os.utime(shard["url"], ns=(0, int(shard["fingerprint"].removeprefix("mtime-"))))  # git keeps no times
    config = read_run(str(folder))
    check_resume(config, config)
    saved = RunFolder(config).manifest()
    assert saved.is_old
    assert saved.differences(scan_shards(config.data.shards, config.data, is_old=True)) == []

    resumed = train_bare(0, 1, config)
    expected = json.loads((OLD / "unbroken.json").read_text())
    assert [line["step"] for line in resumed["lines"]] == [5, 6, 7, 8]
    weights = load_file(folder / "checkpoints" / "step-0000000008" / "model.safetensors")
    unbroken = load_file(OLD / "unbroken.safetensors")
    assert weights.keys() == unbroken.keys()
    for name, tensor in weights.items():  # another CPU's kernels add in another order
        torch.testing.assert_close(tensor, unbroken[name], rtol=1e-4, atol=1e-4, msg=name)

    fresh = train_bare(0, 1, config.model_copy(update={"run": config.run.model_copy(update={"name": "fresh"})}))
    rounds_alike = fresh["losses"] == {int(step): loss for step, loss in expected["losses"].items()}
    assert not rounds_alike or resumed["files"] == fresh["files"] == expected["files"]
