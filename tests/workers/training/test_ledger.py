"""The ledger of an attempt: its rows come back, a dead attempt's go, and a checkpoint waits for those of all ranks."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sigray.workers.checkpoint.index import list_checkpoints, read_metrics
from sigray.workers.checkpoint.lease import RunTakenOver
from sigray.workers.config import CheckpointConfig
from sigray.workers.data.loader import Batch
from sigray.workers.storage import Storage
from sigray.workers.training.ledger import Ledger, ledger_files
from sigray.workers.training.saver import Saver
from tests.helpers.bare import Recorder
from tests.helpers.stored import KINDS


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


@pytest.fixture(params=KINDS)
def storage(request: pytest.FixtureRequest, new_place: Callable[[str], str]) -> Storage:
    return Storage(new_place(request.param))


def test_rows_come_back_as_they_entered_the_loss(storage):
    write(storage, 0, 0, 2, 5)
    names = ["0000000000-0000000002-rank-0.parquet", "0000000002-0000000005-rank-0.parquet"]
    assert storage.list("ledger") == names
    rows = pq.read_table(io.BytesIO(storage.read(f"ledger/{names[1]}"))).to_pylist()
    assert rows == [
        {"step": step, "epoch": step, "shard": 1, "index": row, "key": f"{step}-{row}", "replaced": row == step % 3}
        for step in (2, 3, 4)
        for row in range(3)
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_dead_attempt_wrote_beyond_its_checkpoint_goes(storage, rank):
    """Both ranks wrote up to step 30, the checkpoint of step 20 is the last: rank 0 deletes, for all."""
    for other in (0, 1):
        write(storage, other, 0, 10, 20, 30)
    Ledger(storage, rank, 20, print).close(10)
    kept = sorted(path for until in (10, 20) for path in ledger_files(until - 10, until, 2))
    dead = ledger_files(20, 30, 2)
    assert [f"ledger/{name}" for name in storage.list("ledger")] == (kept if rank == 0 else sorted([*kept, *dead]))


def test_ranks_that_a_dead_driver_left_write_no_rows(storage):
    storage.write("lease.json", b'{"owner": "second"}')
    with pytest.raises(RunTakenOver, match="another driver"):
        write(storage, 0, 0, 10, owner="first")
    assert storage.list("ledger") == []


def saver_of(
    storage: Storage, world_size: int = 1, first_step: int = 0, owner: str | None = None, has_ledger: bool = True
) -> tuple[Saver, Recorder]:
    """The training loop's own saver, as rank 0 has it; and what it tells."""
    module = torch.nn.Linear(2, 2)
    trainer: Any = SimpleNamespace(module=module, optimizer=torch.optim.SGD(module.parameters()))
    hooks = Recorder()
    job: Any = SimpleNamespace(
        train=SimpleNamespace(ledger=has_ledger, global_batch_size=6),
        checkpoint=CheckpointConfig(storage_timeout_s=20),
        hooks=hooks,
        owner=owner,
    )
    device: Any = None  # `save` sums nothing over ranks
    phase: Any = SimpleNamespace(end_step=100, model=SimpleNamespace(model_dump=lambda mode: {}))
    steps = {"first_step": first_step, "num_steps": 100}
    saver = Saver(job, storage, trainer, device, phase=phase, rank=0, world_size=world_size, **steps)
    return saver, hooks


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_checkpoint_waits_for_the_ledgers_of_all_ranks(storage):
    saver, hooks = saver_of(storage, world_size=2)
    saver.add(batch_of(0))
    saver.save(1)
    wait_until(lambda: storage.exists("checkpoints/step-0000000001/optimizer.pt"))
    time.sleep(0.3)  # three looks for rank 1's file
    assert list_checkpoints(storage) == []
    write(storage, 1, 0, 1)
    saver.close()
    assert [info.step for info in list_checkpoints(storage)] == [1]
    assert [info.step for info in hooks.checkpoints] == [1]


def test_a_resumed_attempt_saves_from_its_first_step_on(storage):
    saver, hooks = saver_of(storage, first_step=20)
    for step in (20, 21):
        saver.add(batch_of(step))
        saver.record({"step": step + 1})
        saver.save(step + 1)
        wait_until(lambda step=step: [info.step for info in list_checkpoints(storage)][-1:] == [step + 1])
    saver.close()
    assert [(info.step, info.samples_seen) for info in hooks.checkpoints] == [(21, 126), (22, 132)]
    assert storage.list("metrics") == ["0000000020-0000000021.jsonl", "0000000021-0000000022.jsonl"]
    assert [line["step"] for line in read_metrics(storage)] == [21, 22]
    assert storage.read("metrics/0000000021-0000000022.jsonl") == b'{"step": 22}\n'
    assert [f"ledger/{name}" for name in storage.list("ledger")] == [
        *ledger_files(20, 21, 1),
        *ledger_files(21, 22, 1),
    ]


@pytest.mark.parametrize("has_ledger", [True, False])
def test_nothing_is_saved_of_a_run_that_another_driver_has(tmp_path, has_ledger):
    storage = Storage(tmp_path)
    storage.write("lease.json", b'{"owner": "second"}')
    saver, hooks = saver_of(storage, owner="first", has_ledger=has_ledger)
    saver.add(batch_of(0))
    saver.save(1)
    with pytest.raises(RunTakenOver, match="another driver"):
        saver.close()
    assert (storage.list("ledger"), storage.list("checkpoints"), storage.list("metrics")) == ([], [], [])
    assert hooks.checkpoints == []
