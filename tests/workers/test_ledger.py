"""The ledger of an attempt: its rows come back, a dead attempt's go, and a checkpoint waits for those of all ranks."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers.bare import Recorder
from workers.committed import list_checkpoints
from workers.config import CheckpointConfig
from workers.feed import Batch
from workers.fence import RunTakenOver
from workers.ledger import Ledger, ledger_files
from workers.storage import Storage
from workers.train import _Saver


def batch_of(step: int, size: int = 3) -> Batch:
    samples = np.array([[step, 1, row] for row in range(size)])
    keys = [f"{step}-{row}" for row in range(size)]
    replaced = np.arange(size) == step % size
    return Batch(step, torch.empty(0), torch.empty(0), samples=samples, keys=keys, replaced=replaced)


def write(storage: Storage, rank: int, first: int, *until: int, owner: str | None = None) -> Ledger:
    """An attempt from step `first` on, with checkpoints after these steps."""
    ledger = Ledger(storage, rank, first, print, owner)
    for begin, end in zip((first, *until), until, strict=False):
        for step in range(begin, end):
            ledger.add(batch_of(step))
        ledger.write(end)
    ledger.close(10)
    return ledger


def test_rows_come_back_as_they_entered_the_loss(tmp_path):
    write(Storage(tmp_path), 0, 0, 2, 5)
    names = ["0000000000-0000000002-rank-0.parquet", "0000000002-0000000005-rank-0.parquet"]
    assert Storage(tmp_path).list("ledger") == names
    rows = pq.read_table(io.BytesIO(Storage(tmp_path).read(f"ledger/{names[1]}"))).to_pylist()
    assert rows == [
        {"step": step, "epoch": step, "shard": 1, "index": row, "key": f"{step}-{row}", "replaced": row == step % 3}
        for step in (2, 3, 4)
        for row in range(3)
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_dead_attempt_wrote_beyond_its_checkpoint_goes(tmp_path, rank):
    """Both ranks wrote up to step 30, the checkpoint of step 20 is the last: rank 0 deletes, for all."""
    storage = Storage(tmp_path)
    for other in (0, 1):
        write(storage, other, 0, 10, 20, 30)
    Ledger(storage, rank, 20, print).close(10)
    kept = sorted(path for until in (10, 20) for path in ledger_files(until - 10, until, 2))
    dead = ledger_files(20, 30, 2)
    assert [f"ledger/{name}" for name in storage.list("ledger")] == (kept if rank == 0 else sorted([*kept, *dead]))


def test_ranks_that_a_dead_driver_left_write_no_rows(tmp_path):
    storage = Storage(tmp_path)
    storage.write("lease.json", b'{"owner": "second"}')
    with pytest.raises(RunTakenOver, match="another driver"):
        write(storage, 0, 0, 10, owner="first")
    assert storage.list("ledger") == []


def test_a_checkpoint_waits_for_the_ledgers_of_all_ranks(tmp_path):
    """Through the training loop's own saver, as rank 0 of two."""
    module = torch.nn.Linear(2, 2)
    trainer: Any = SimpleNamespace(module=module, optimizer=torch.optim.SGD(module.parameters()))
    job: Any = SimpleNamespace(
        train=SimpleNamespace(ledger=True, global_batch_size=6),
        checkpoint=CheckpointConfig(),
        model=SimpleNamespace(model_dump=lambda mode: {}),
        hooks=Recorder(),
        owner=None,
    )
    storage = Storage(tmp_path)
    saver = _Saver(job, storage, trainer, 0, 2, 0)
    saver.add(batch_of(0))
    saver.save(1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "checkpoints" / "step-0000000001" / "optimizer.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)  # three looks for rank 1's file
    assert list_checkpoints(storage) == []
    write(storage, 1, 0, 1)
    saver.close()
    assert [info.step for info in list_checkpoints(storage)] == [1]
    assert [info.step for info in job.hooks.checkpoints] == [1]
