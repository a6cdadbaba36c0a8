"""`sigray embed` while its workers are killed: every sample once, and the store is the one in which nothing died."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from sigray.orchestrator.config import load_config
from sigray.orchestrator.run.preflight import check_store
from sigray.workers.data.manifest import read_samples, scan_shards
from tests.helpers.data import TOWERS, write_dataset
from tests.helpers.processes import descendants_named
from tests.helpers.stores import make_store

SIGRAY = str(Path(sys.executable).with_name("sigray"))
SHARD_SIZE = 400


def write_config(tmp_path: Path, num_shards: int) -> Path:
    write_dataset(tmp_path / "train", [SHARD_SIZE] * num_shards)
    write_dataset(tmp_path / "held_out", [30, 12])
    content = {
        "run": {"name": "small", "dir": str(tmp_path)},
        "data": {"shards": str(tmp_path / "train"), "crop": "center"},
        "model": {
            # A model of its size would be done before anything can be killed.
            "towers": TOWERS | {"vision_cfg": {"image_size": 64}},
            "image_tower": "tests.helpers.stores:make_tower",
            "locked": ["visual"],
        },
        "train": {"num_samples": 1024, "global_batch_size": 64},
        "embeddings": {"store": str(tmp_path / "store"), "batch_size": 8},
        "eval": {"sets": {"held_out": {"shards": str(tmp_path / "held_out")}}},
        "cluster": {"num_workers": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def embed(config: Path, num_kills: int, rng: random.Random) -> tuple[int, str]:
    """Run `sigray embed`, killing its workers; returns how many were killed, and the output."""
    log, killed = config.parent / "embed.log", 0
    with log.open("w") as output:
        process = subprocess.Popen(
            [SIGRAY, "embed", str(config)],
            stdout=output,
            stderr=output,
            env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
            | {"COLUMNS": "160", "PYTHONPATH": str(Path(__file__).parents[3])},
        )
        due = time.monotonic()
        while process.poll() is None:
            workers = descendants_named(process.pid, "ray::Embedder.embed")  # at work on a shard
            if workers and killed < num_kills and time.monotonic() > due:
                os.kill(rng.choice(workers), signal.SIGKILL)
                killed += 1
                due = time.monotonic() + rng.uniform(0, 2)
            time.sleep(0.05)
    assert process.returncode == 0, log.read_text()
    return killed, log.read_text()


def test_a_store_in_which_workers_died_is_the_same_bit_for_bit(own_ray, tmp_path):
    check_a_store_in_which_workers_die(tmp_path, num_kills=3, num_shards=12)


def test_a_store_in_which_twenty_workers_died_is_the_same_bit_for_bit(own_ray, patience, tmp_path):
    check_a_store_in_which_workers_die(tmp_path, num_kills=20, num_shards=60)


def check_a_store_in_which_workers_die(tmp_path: Path, num_kills: int, num_shards: int) -> None:
    config = write_config(tmp_path, num_shards)
    killed, output = embed(config, num_kills, random.Random(num_kills))
    assert killed == num_kills, output
    run = load_config(config)
    settings = run.embeddings.model_dump(exclude={"store", "batch_size"})
    alone = make_store(tmp_path / "alone", run.data, run.model, str(tmp_path / "held_out"), **settings)
    names = {path.relative_to(alone.uri) for path in Path(alone.uri).rglob("*") if path.is_file()}
    assert len(names) == 2 * (num_shards + 2) + 1
    assert {path.relative_to(tmp_path / "store") for path in (tmp_path / "store").rglob("*.*")} - names == {
        Path("history/00000.json")
    }
    for name in names:
        assert (tmp_path / "store" / name).read_bytes() == Path(alone.uri, name).read_bytes(), name

    source = scan_shards(run.data.shards, run.data)
    stored = check_store(run).manifest(source, run.data)
    for one, other in zip(source.shards, stored.shards, strict=True):
        keys = [sample.key for sample in read_samples(one, run.data)]
        assert [sample.key for sample in read_samples(other, run.data)] == keys

    # Nothing is done twice, and what is lost is made again.
    lost = next((tmp_path / "store" / "train").glob("*.json"))
    lost.unlink()
    _, output = embed(config, 0, random.Random(0))
    assert f"{num_shards + 1} of {num_shards + 2} shards are there, {SHARD_SIZE} images to do" in output
    assert lost.exists()
    _, output = embed(config, 0, random.Random(0))
    assert "0 shards of it new" in output
    assert "starting Ray" not in output
