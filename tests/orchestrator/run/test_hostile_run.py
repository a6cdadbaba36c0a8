"""A whole run over a shard of hostile samples: it ends with a table of reasons, and its audit is exact."""

import json
import os
from collections import Counter

import yaml

from tests.helpers.data import TOWERS, write_tar
from tests.helpers.hostile import CUT, hostile_samples
from tests.helpers.runs import Sigray

_DATA = {
    "image_keys": ["png"],
    "captions": {"txt": 1, "json:x": 1},
    "block_size": 16,
    "num_lanes": 2,
    "shuffle_window": 128,
    "max_bad_fraction": 0.5,
}


def test_a_run_over_200_hostile_samples(own_ray, tmp_path):
    samples = hostile_samples(200, 312)
    named = [{"__key__": f"{number:03d}", **members} for number, (members, _) in enumerate(samples)]
    write_tar(tmp_path / "data" / "a.tar", named)
    config = {
        "run": {"name": "hostile", "dir": str(tmp_path / "runs")},
        "data": {"shards": str(tmp_path / "data"), **_DATA},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 512, "global_batch_size": 32, "ledger": True, "log_every_steps": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"COLUMNS": "160"}
    run = Sigray(tmp_path / "log", environment, "train", tmp_path / "run.yaml")
    assert run.wait() == 0, run.output()
    folder = tmp_path / "runs" / "hostile"
    found = json.loads((folder / "summary.json").read_text())["refused"]
    expected = Counter(reason for _, reason in samples if reason)
    assert {reason: each["count"] for reason, each in found.items() if reason != CUT} == {
        reason: count for reason, count in expected.items() if reason != CUT
    }
    assert found[CUT]["count"] >= expected[CUT]  # a replacement's caption may be cut too
    keys = {reason: each["first"].split()[-1] for reason, each in found.items() if reason != CUT}
    assert all(samples[int(key)][1] == reason for reason, key in keys.items())
    assert f"{expected['unreadable image']} x unreadable image, first " in run.output()
    audit = Sigray(tmp_path / "audit", environment, "data", "audit", folder)
    assert audit.wait() == 0, audit.output()
    assert "exact: each of 16 steps has its 32 pairs" in audit.output()
