"""Record which pair entered the loss of which step, and audit the record.

    RUN/ledger/0000000040-0000000080-rank-0.parquet    rank 0's rows of steps 40 to 79, counted from 0

Each rank writes its rows when a checkpoint is due, and the checkpoint is committed after all ranks have written. So
every step that a resumed run does not repeat has its rows. The next attempt deletes the rows that a dead attempt wrote
after its last checkpoint. The ledger records what happened and not the plan: keys come from the tars, with the samples.
"""

from __future__ import annotations

import io
import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sigray.workers.checkpoint.async_writer import BackgroundWriter
from sigray.workers.checkpoint.lease import Fence
from sigray.workers.checkpoint.writer import read_left_out
from sigray.workers.data.loader import Batch
from sigray.workers.data.manifest import Manifest
from sigray.workers.data.order import StreamOrder
from sigray.workers.data.tar import DataError
from sigray.workers.storage import Storage

FOLDER = "ledger"
_NAME = re.compile(r"(\d{10})-(\d{10})-rank-(\d+)\.parquet")
_INTEGERS = ("step", "epoch", "shard", "index")
_SCHEMA = pa.schema({**dict.fromkeys(_INTEGERS, pa.int64()), "key": pa.string(), "replaced": pa.bool_()})


def ledger_files(first_step: int, steps_done: int, world_size: int) -> list[str]:
    """Return the files of the ranks between two checkpoints, in the run's storage."""
    return [f"{FOLDER}/{first_step:010d}-{steps_done:010d}-rank-{rank}.parquet" for rank in range(world_size)]


class Ledger(BackgroundWriter):
    """Writes one rank's rows, which it collects since the last checkpoint.

    Args:
        first_step: of the attempt; rank 0 deletes the files from this step on.
        warn: called from another thread when the storage refuses.
        owner: of the run's lease, see `workers/checkpoint/lease.py`.
    """

    def __init__(
        self, storage: Storage, rank: int, first_step: int, warn: Callable[[str], None], owner: str | None = None
    ) -> None:
        super().__init__("ledger", warn, Fence(storage, owner))
        self._storage, self._rank, self._first_step = storage, rank, first_step
        self._rows: list[tuple[np.ndarray, np.ndarray, list[str], np.ndarray]] = []
        if rank == 0:
            for name in storage.list(FOLDER):
                if (match := _NAME.fullmatch(name)) and int(match[2]) > first_step:
                    storage.delete(f"{FOLDER}/{name}")

    def add(self, batch: Batch) -> None:
        """Add the rows of a batch that entered a loss."""
        steps = np.full(len(batch.keys), batch.step)
        self._rows.append((steps, batch.samples, batch.keys, batch.replaced))  # not the batch, which holds the pixels

    def write(self, steps_done: int) -> None:
        """Write the rows in the background; the checkpoint of `steps_done` waits for them."""
        rows = self._rows
        name = ledger_files(self._first_step, steps_done, self._rank + 1)[-1]
        self._rows = []
        self._first_step = steps_done
        self.submit(f"the ledger up to step {steps_done:,}", lambda: self._storage.write(name, _parquet(rows)))


def _parquet(rows: list[tuple[np.ndarray, np.ndarray, list[str], np.ndarray]]) -> bytes:
    steps, samples, batch_keys, replaced = zip(*rows, strict=True)
    keys = list(itertools.chain.from_iterable(batch_keys))
    columns = [np.concatenate(steps), *np.concatenate(samples).T, keys, np.concatenate(replaced)]
    content = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_SCHEMA), content, compression="zstd")
    return content.getvalue()


@dataclass
class EpochAudit:
    """Number of uses of the samples of one epoch of a dataset."""

    dataset: str
    epoch: int
    num_samples: int  # in the dataset
    num_used: int  # rows
    num_replaced: int
    is_over: bool  # every sample must have been used
    num_missing: int
    num_doubled: int
    missing: list[str]  # URL and index of the first ones
    doubled: list[str]


@dataclass
class Audit:
    """Result of an audit."""

    num_steps: int
    epochs: list[EpochAudit]
    wrong_steps: list[str]  # steps without exactly one global batch of rows
    left_out: list[int]  # steps, counted from 1, whose pairs changed no weights

    @property
    def is_exact(self) -> bool:
        """Return whether the ledger has every step once and every sample once per epoch."""
        return not self.wrong_steps and not any(epoch.num_missing or epoch.num_doubled for epoch in self.epochs)


def audit(storage: Storage, manifest: Manifest, order: StreamOrder, global_batch_size: int) -> Audit:
    """Count the rows of a run's ledger; its order only says which epochs are over.

    Raises:
        DataError: the run has no ledger, or the ledger names a sample that the manifest does not have.
    """
    names = [name for name in storage.list(FOLDER) if _NAME.fullmatch(name)]
    if not names:
        raise DataError(f"{storage.uri}/{FOLDER} holds nothing: train with train.ledger=true and a checkpoint")
    datasets = list(manifest.datasets())
    sizes = np.array([shard.num_samples for shard in manifest.shards])
    first_number = np.concatenate([[0], np.cumsum(sizes)])
    dataset_of_shard = np.array([datasets.index(shard.dataset) for shard in manifest.shards])
    uses: dict[tuple[int, int], np.ndarray] = {}  # (dataset, epoch) -> uses of each sample of the manifest
    replaced: Counter[tuple[int, int]] = Counter()
    rows_of_step: Counter[int] = Counter()
    for name in names:
        content = storage.read(f"{FOLDER}/{name}")
        try:
            table = pq.read_table(io.BytesIO(content), schema=_SCHEMA)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{storage.uri}/{FOLDER}/{name} is no ledger: {error}") from None
        if any(column.null_count for column in table.columns):
            raise DataError(f"{storage.uri}/{FOLDER}/{name} is no ledger: a row lacks a value")
        steps, epochs, shards, indices = (table[column].to_numpy() for column in _INTEGERS)
        first_step, steps_done = map(int, name.split("-")[:2])
        if not ((steps >= first_step) & (steps < steps_done)).all():
            raise DataError(f"{storage.uri}/{FOLDER}/{name} names steps of another file")
        is_known = (epochs >= 0) & (shards >= 0) & (shards < len(sizes)) & (indices >= 0)
        if not (is_known.all() and (indices < sizes[shards]).all()):
            raise DataError(f"{storage.uri}/{FOLDER}/{name} names samples that the run's manifest does not have")
        rows_of_step.update(dict(zip(*(part.tolist() for part in np.unique(steps, return_counts=True)), strict=True)))
        for dataset, epoch in {*zip(dataset_of_shard[shards].tolist(), epochs.tolist(), strict=True)}:
            chosen = (dataset_of_shard[shards] == dataset) & (epochs == epoch)
            counts = np.bincount(first_number[shards[chosen]] + indices[chosen], minlength=first_number[-1])
            uses[dataset, epoch] = uses.get((dataset, epoch), 0) + counts
            replaced[dataset, epoch] += int(table["replaced"].to_numpy(zero_copy_only=False)[chosen].sum())
    num_steps = max(rows_of_step) + 1
    wrong = [
        f"step {step + 1}: {rows_of_step[step]} rows, {global_batch_size} expected"
        for step in range(num_steps)
        if rows_of_step[step] != global_batch_size
    ]
    found = []
    for (dataset, epoch), counts in sorted(uses.items()):
        num_samples = order.datasets[dataset].num_samples
        is_over = order.num_of_dataset(dataset, num_steps * global_batch_size) >= (epoch + 1) * num_samples
        wrong_rows = is_over & (counts == 0) & (dataset_of_shard.repeat(sizes) == dataset), counts > 1
        missing, doubled = map(np.flatnonzero, wrong_rows)
        numbers = int(counts.sum()), replaced[dataset, epoch], is_over, len(missing), len(doubled)
        first = (_names(manifest, first_number, rows[:10]) for rows in (missing, doubled))
        found.append(EpochAudit(datasets[dataset], epoch, num_samples, *numbers, *first))
    return Audit(num_steps, found, wrong, read_left_out(storage))


def _names(manifest: Manifest, first_number: np.ndarray, numbers: np.ndarray) -> list[str]:
    shards = (np.searchsorted(first_number, numbers, side="right") - 1).tolist()
    return [
        f"{manifest.shards[shard].url} sample {number - int(first_number[shard])}"
        for shard, number in zip(shards, numbers.tolist(), strict=True)
    ]
