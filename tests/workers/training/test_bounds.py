"""What must not grow with the length of a run: blocks and buffers that the loader holds, and the base of a rate."""

from __future__ import annotations

import contextlib
import gc
import os
import weakref
from collections import Counter

import numpy as np
import pytest

from sigray.workers.config import WeightedShards
from sigray.workers.data.loader import Loader
from sigray.workers.data.manifest import Manifest, scan_shards
from sigray.workers.data.tar import DataError, TarSample
from sigray.workers.data.worker import Block, DataWorker, ImageKind, build_order, image_kind
from tests.helpers.bare import OneWorker

BATCH, NUM_STEPS, PREFETCH = 12, 300, 2


class Stored:
    """A BlockSource of empty images that remembers, without holding them, which of its blocks are alive.

    Args:
        is_bad: whether a sample is refused, by the number of samples before it.
    """

    shares_memory = False

    def __init__(self, block_size: int, is_bad=lambda number: False) -> None:
        self._block_size, self._is_bad, self._num_given = block_size, is_bad, 0
        self._images: list[weakref.ref[np.ndarray]] = []
        self.asked_before: list[tuple[int, int]] = []  # lanes and numbers, before the first block was waited for

    def request(self, lane, number, places, pixels):
        if not self._images:
            self.asked_before.append((lane, number))

    def wait(self, lane, number, handle):
        size = self._block_size
        bad = np.array([self._is_bad(self._num_given + row) for row in range(size)])
        self._num_given += size
        images = np.zeros((size, 2, 2, 3), np.uint8)
        self._images.append(weakref.ref(images))
        refused = Counter({"unreadable image": int(bad.sum())}) if bad.any() else Counter()
        return Block(
            images=images,
            tokens=np.ones((size, 8), np.int32),
            samples=np.zeros((size, 3), np.int64),
            keys=[""] * size,
            replaced=bad,
            refused=refused,
            refused_keys=dict.fromkeys(refused, "a.tar sample"),
        )

    def num_alive(self) -> int:
        return sum(images() is not None for images in self._images)


def loader_of(
    manifest: Manifest, data, source, kind: ImageKind, num_steps: int, max_bad_fraction: float = 1.0
) -> Loader:
    return Loader(
        build_order(manifest, data, 5),
        source,
        data.model_copy(update={"prefetch_batches": PREFETCH, "max_bad_fraction": max_bad_fraction}),
        image_kind=kind,
        global_batch_size=BATCH,
        rank=0,
        world_size=1,
        first_step=0,
        last_step=num_steps,
    )


SMALL = ImageKind((2, 2, 3), np.dtype(np.uint8))


def test_blocks_are_released_when_no_later_batch_needs_them(data_config):
    manifest, source = scan_shards(data_config.shards, data_config), Stored(data_config.block_size)
    alive = [source.num_alive() for _ in loader_of(manifest, data_config, source, SMALL, NUM_STEPS)]
    assert len(alive) == NUM_STEPS
    # 4 samples of each of the 3 lanes a step, blocks of 4: a batch touches at most 2 blocks of a lane. The loader may
    # have taken the blocks of the next step and not yet dropped those of the last one.
    assert 0 < max(alive) <= 2 * 2 * 3


def test_blocks_ahead_are_counted_over_the_lanes_of_all_datasets(data_config, tar_folder):
    names = ["shard-000.tar", "shard-002.tar"]
    shards = {name: WeightedShards(shards=str(tar_folder / name), weight=1) for name in names}
    data = data_config.model_copy(update={"shards": shards, "block_size": 8})
    source = Stored(data.block_size)
    with contextlib.closing(loader_of(scan_shards(shards, data), data, source, SMALL, NUM_STEPS)) as loader:
        next(iter(loader))
    # Blocks of 2 x 3 lanes fill 4 batches, and 2 more are prefetched: 12 samples of each lane.
    assert sorted(source.asked_before) == [(lane, number) for lane in range(6) for number in range(2)]


def memory_of_batches() -> int:
    """Buffers of this process for batches: files in memory by the names that workers/data/buffers.py gives them."""
    names = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            names.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sum(name.startswith("/memfd:sigray-") for name in names)


def test_buffers_of_batches_are_used_again(data_config, model_config):
    manifest = scan_shards(data_config.shards, data_config)
    worker = DataWorker(manifest, data_config.model_copy(update={"crop": "center"}), model_config, seed=5)
    gc.collect()
    before, held = memory_of_batches(), []
    source = OneWorker(worker, shares_memory=True)
    for batch in loader_of(manifest, data_config, source, image_kind(manifest, model_config), NUM_STEPS // 3):
        batch.release()
        held.append(memory_of_batches() - before)
    assert len(held) == NUM_STEPS // 3
    # Prefetched: 2 batches and as many as a round of blocks fills, 1. A block reaches into one batch more. Two are
    # ready, one is put there, and one is the consumer's.
    assert 0 < max(held) <= (PREFETCH + 1) + 1 + 2 + 1 + 1


def num_encoded() -> int:
    """Encoded samples that are referenced in this process."""
    return sum(isinstance(thing, TarSample) for thing in gc.get_objects())


def test_encoded_samples_are_released_with_their_window(data_config, model_config):
    data = data_config.model_copy(update={"cache_mib": 0})
    manifest = scan_shards(data.shards, data)
    gc.collect()
    before, held = num_encoded(), []
    worker = DataWorker(manifest, data, model_config, seed=5)
    for number in range(20):
        for lane in range(data.num_lanes):
            worker.block(lane, number)
        if number in (3, 19):  # a look at all objects of the process costs a tenth of a second
            held.append(num_encoded() - before)
    # A window in each lane; and of each lane's open shard, the sample that is being read.
    assert 0 < max(held) <= data.num_lanes * (data.shuffle_window + 2)


@pytest.mark.parametrize(("every", "is_too_many"), [(200, False), (67, True)])  # 0.5 % and 1.5 %
def test_a_rate_of_bad_samples_is_one_of_all_samples_read(data_config, every, is_too_many):
    """1 % may be bad. 0.5 % of 5,000 samples are more than 1 % of the 1,024 that a rate is first measured against."""
    manifest = scan_shards(data_config.shards, data_config)
    source = Stored(data_config.block_size, lambda number: number % every == every - 1)
    loader, error, num_samples = loader_of(manifest, data_config, source, SMALL, 5000 // BATCH, 0.01), "", 0
    try:
        for _ in loader:
            num_samples += BATCH
    except DataError as raised:
        error = str(raised)
    if is_too_many:
        # The eleventh, of sample 736, is more than 1 % of 1,024; a few batches were handed out before.
        assert error.startswith("11 of 7")
        assert 600 < num_samples < 740
    else:
        assert (error, num_samples) == ("", 5000 // BATCH * BATCH)
        assert loader.counts.refused["unreadable image"] >= 24
