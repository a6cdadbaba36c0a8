"""`sigray data audit` on ledgers that the Ledger itself wrote."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sigray.orchestrator.cli.main import main
from sigray.orchestrator.config import RunConfig, parse_config
from sigray.orchestrator.data.audit import audit_run
from sigray.orchestrator.run_folder import RunFolder
from sigray.workers.data.loader import Batch
from sigray.workers.data.manifest import scan_shards
from sigray.workers.data.worker import build_order
from sigray.workers.training.ledger import Ledger
from tests.helpers.data import TOWERS, write_dataset
from tests.helpers.reference import samples_of

BATCH, WORLD_SIZE = 8, 2


@pytest.fixture(autouse=True)
def wide_terminal_and_own_memory(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path) -> RunConfig:
    """Of 40 samples in three shards."""
    write_dataset(tmp_path / "tars", [20, 7, 13])
    return config_of(tmp_path, str(tmp_path / "tars"))


def config_of(folder: Path, shards: object) -> RunConfig:
    content = {
        "run": {"name": "small", "dir": str(folder / "runs")},
        "data": {"shards": shards, "num_lanes": 3, "shuffle_window": 10},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 800, "global_batch_size": BATCH, "ledger": True},
    }
    return parse_config(content, "test")


def write_ledger(config: RunConfig, num_steps: int, change=lambda batch: batch) -> str:
    """A run of so many steps on two ranks, checkpoints at every fifth; returns its folder."""
    folder = RunFolder(config)
    manifest = scan_shards(config.data.shards, config.data)
    folder.begin(config, manifest)
    order = build_order(manifest, config.data, config.run.seed)
    for rank in range(WORLD_SIZE):
        ledger = Ledger(folder.storage, rank, 0, warn=print)
        for step in range(num_steps):
            part = order.rank_part(step, BATCH, rank, WORLD_SIZE)
            refs = [ref for piece in part for ref in samples_of(order, piece)]
            batch = Batch(
                step,
                torch.empty(0),
                torch.empty(0),
                np.array([(ref.epoch, ref.shard, ref.index) for ref in refs]),
                [f"key{ref.index}" for ref in refs],
                np.zeros(len(refs), bool),
            )
            ledger.add(change(batch))
            if step % 5 == 4:
                ledger.write(step + 1)
        if num_steps % 5:
            ledger.write(num_steps)
        ledger.close(10)
    return str(config.folder)


def run(capsys, *words: object) -> tuple[int, str, str]:
    code = main(["data", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rows(out: str) -> list[list[str]]:
    """The lines of the audit's table."""
    return [re.split(r" {2,}", line.strip()) for line in out.splitlines() if re.match(r" +(\w+ +)?\d", line)]


def test_exact_ledger(config, capsys):
    code, out, err = run(capsys, "audit", write_ledger(config, 12))
    assert code == 0, err
    # 96 pairs: two epochs of 40 and 16 of the third. A step may belong to two epochs.
    assert rows(out) == [
        ["1", "40", "40", "0", "0", "0", "1-5", "complete"],
        ["2", "40", "40", "0", "0", "0", "6-10", "complete"],
        ["3", "40", "16", "-", "0", "0", "11-12", "under way"],
    ]
    assert (
        "each of 12 steps has its 8 pairs, none twice; every sample of 2 complete epochs was used exactly once" in out
    )


def test_replaced_samples_are_counted(config, capsys):
    def change(batch):
        return replace(batch, replaced=batch.samples[:, 2] == 0)

    code, out, _ = run(capsys, "audit", write_ledger(config, 5, change))
    assert code == 0
    assert rows(out) == [["1", "40", "40", "0", "0", "3", "1-5", "complete"]]


def test_missing_and_doubled_samples_are_named(config, capsys):
    """One pair of the second step enters the loss in the place of another."""
    lost_and_used = []

    def change(batch):
        if batch.step != 1 or lost_and_used:
            return batch
        samples = batch.samples.copy()
        lost_and_used.extend([samples[0].tolist(), samples[1].tolist()])
        samples[0] = samples[1]
        return replace(batch, samples=samples)

    code, out, err = run(capsys, "audit", write_ledger(config, 10, change))
    assert code == 1
    assert "sigray: the ledger is not exact: 1 sample missing, 1 sample doubled" in err
    assert rows(out)[0] == ["1", "40", "40", "1", "1", "0", "1-5", "complete, not exact"]
    assert rows(out)[1] == ["2", "40", "40", "0", "0", "0", "6-10", "complete"]
    urls = [f"{config.data.shards}/shard-{number:03d}.tar" for number in range(3)]
    (_, lost_shard, lost), (_, used_shard, used) = lost_and_used
    assert f"epoch 1, missing:\n  {urls[lost_shard]} sample {lost}\n" in out
    assert f"epoch 1, doubled:\n  {urls[used_shard]} sample {used}\n" in out


def test_steps_without_their_pairs_are_named(config, capsys):
    """Rank 1's file of the steps 6 to 10 is gone."""
    run_folder = write_ledger(config, 12)
    (lost,) = Path(run_folder, "ledger").glob("0000000005-0000000010-rank-1.parquet")
    lost.unlink()
    code, out, err = run(capsys, "audit", run_folder)
    assert code == 1
    assert "20 samples missing, 5 steps without exactly 8 pairs" in err
    assert "step 6: 4 rows, 8 expected" in out
    assert re.search(r"epoch 2, missing:(\n  \S+ sample \d+){10}\n  and 10 more\n", out)


def test_datasets_have_epochs_of_their_own(tmp_path, capsys):
    write_dataset(tmp_path / "photos", [30])
    write_dataset(tmp_path / "drawings", [10])
    shards = {
        "photos": {"shards": str(tmp_path / "photos"), "weight": 1},
        "drawings": {"shards": str(tmp_path / "drawings"), "weight": 1},
    }
    config = config_of(tmp_path, shards)
    code, out, _ = run(capsys, "audit", write_ledger(config, 10))
    assert code == 0
    assert rows(out) == [
        ["photos", "1", "30", "30", "0", "0", "0", "1-8", "complete"],
        ["photos", "2", "30", "10", "-", "0", "0", "8-10", "under way"],
        *(
            ["drawings", str(epoch), "10", "10", "0", "0", "0", steps, "complete"]
            for epoch, steps in [(1, "1-3"), (2, "3-5"), (3, "6-8"), (4, "8-10")]
        ),
    ]


def test_steps_of_an_epoch_are_those_of_its_rows(tmp_path):
    """Against the rows themselves, for weights and a batch that divide nothing."""
    for name, size in {"a": 23, "b": 11, "c": 5}.items():
        write_dataset(tmp_path / name, [size])
    weights = {"a": 3, "b": 2.2, "c": 0.7}
    shards = {name: {"shards": str(tmp_path / name), "weight": weight} for name, weight in weights.items()}
    config = config_of(tmp_path, shards)
    seen: dict[tuple[int, int], list[int]] = {}

    def note(batch):
        for epoch, shard, _ in batch.samples.tolist():
            seen.setdefault((shard, epoch), []).append(batch.step)
        return batch

    write_ledger(config, 17, note)
    found = audit_run(config)
    assert len(found.audit.epochs) == len(seen)
    for epoch in found.audit.epochs:
        steps = seen[found.datasets.index(epoch.dataset), epoch.epoch]
        assert found.steps_of(epoch) == range(min(steps), max(steps) + 1)


@pytest.mark.parametrize("what", ["no run", "no ledger"])
def test_nothing_to_audit(config, tmp_path, capsys, what):
    if what == "no ledger":
        RunFolder(config).begin(config, scan_shards(config.data.shards, config.data))
    code, _, err = run(capsys, "audit", config.folder)
    assert code == 2
    assert ("is not a run" if what == "no run" else "train with train.ledger=true") in err


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (None, None, "is no ledger"),
        ("step", 10**12, "names steps of another file"),
        ("step", -1, "names steps of another file"),
        ("index", -1, "names samples"),
        ("shard", -(10**9), "names samples"),
        ("shard", 10**9, "names samples"),
        ("index", None, "a row lacks a value"),
    ],
)
def test_a_ledger_with_other_content_is_named(config, capsys, column, value, message):
    write_ledger(config, 5)
    path = config.folder / "ledger" / "0000000000-0000000005-rank-1.parquet"
    if column is None:
        path.write_bytes(path.read_bytes()[:-20])
    else:
        lines = pq.read_table(path).to_pylist()
        lines[3][column] = value
        pq.write_table(pa.Table.from_pylist(lines), path)
    code, _, err = run(capsys, "audit", config.folder)
    assert code == 2
    assert f"{path.name} " in err
    assert message in err
