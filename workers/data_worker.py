"""The data-shard worker: a Ray actor that turns (lane, block number) into a decoded block.

    K  samples in a block            S  image size            T  context length

It holds nothing that cannot be computed again, so it may be killed, restarted or doubled at any moment: the same
question has the same answer from any worker at any time. What it keeps between calls are caches only: for each lane
the open shard and the encoded samples of one shuffle window, and decoded samples for the next epoch.

A refused sample is replaced by a rule that depends on the order alone: by the first usable one among the slots of its
own window, from half a window further on, so that the two copies of the replacement stand in different batches.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from workers.config import DataConfig, ModelConfig
from workers.decode import Refused, build_tokenizer, decode_caption, decode_image, pick_member
from workers.order import StreamOrder, Window
from workers.shards import DataError, Manifest, read_samples
from workers.towers import shapes

logger = logging.getLogger(__name__)

Sample = dict[str, Any]


@dataclass
class Block:
    """K consecutive samples of a lane, as they travel through the object store."""

    images: np.ndarray  # (K, S, S, 3) uint8
    tokens: np.ndarray  # (K, T) int32
    refused: Counter[str] = field(default_factory=Counter)  # samples replaced in this block, by reason
    refused_keys: dict[str, str] = field(default_factory=dict)  # the first of each reason: shard url and key


def build_order(manifest: Manifest, data: DataConfig, seed: int) -> StreamOrder:
    """The order of a run's training stream."""
    return StreamOrder(
        [shard.num_samples for shard in manifest.shards],
        seed=seed,
        num_lanes=data.num_lanes,
        shuffle_window=data.shuffle_window,
    )


class DataWorker:
    """Evaluates lanes. A plain class; `orchestrator/launch.py` makes Ray actors of it.

    Args:
        manifest: the run's shards.
        data: the run's data section.
        model: decides image size, context length and tokenizer.
        seed: the run's seed.
    """

    def __init__(self, manifest: Manifest, data: DataConfig, model: ModelConfig, *, seed: int) -> None:
        self._manifest, self._data = manifest, data
        self._order = build_order(manifest, data, seed)
        self._image_size, self._context_length, vocab_size = shapes(model)
        self._tokenizer = build_tokenizer(model, self._context_length, vocab_size)
        self._readers: dict[int, _LineReader] = {}
        self._windows: dict[int, tuple[tuple[int, int], list[Sample]]] = {}
        self._newest: dict[int, tuple[int, Block]] = {}
        self._cache = _Cache(data.cache_mib * 2**20)

    def block(self, lane: int, number: int) -> Block:
        """Samples [number K, (number + 1) K) of a lane.

        Raises:
            DataError: for a shard that changed or broke, and for a window without a single usable sample.
        """
        known = self._newest.get(lane)
        if known is None or known[0] != number:  # two ranks may share a lane's block: decode it once
            known = self._newest[lane] = (number, self._decode_block(lane, number))
        return known[1]

    def _decode_block(self, lane: int, number: int) -> Block:
        size, image_size = self._data.block_size, self._image_size
        images = np.empty((size, image_size, image_size, 3), np.uint8)
        tokens = np.empty((size, self._context_length), np.int32)
        refused: Counter[str] = Counter()
        refused_keys: dict[str, str] = {}
        captions: dict[int, str] = {}  # of the rows that were decoded now
        places: dict[int, tuple[int, int]] = {}  # of those that are good for the cache
        for row in range(size):
            window, slot = self._order.window(lane, number * size + row)
            place = self._order.locate(window.epoch, window.start + int(window.permutation[slot])).in_manifest
            known = self._cache.get(place)
            if known is not None:
                images[row], tokens[row] = known
                continue
            samples = self._load(lane, window)
            sample = samples[window.permutation[slot]]
            try:
                images[row], captions[row] = self._decode(sample)
                places[row] = place
            except Refused as reason:
                refused[str(reason)] += 1
                refused_keys.setdefault(str(reason), f"{sample['__url__']} {sample['__key__']}")
                images[row], captions[row] = self._replacement(window, slot, samples)
        if captions:
            tokens[list(captions)] = self._tokenizer(list(captions.values()))
        for row, place in places.items():
            self._cache.put(place, images[row], tokens[row])
        return Block(images, tokens, refused, refused_keys)

    def _decode(self, sample: Sample) -> tuple[np.ndarray, str]:
        caption = decode_caption(pick_member(sample, self._data.caption_keys, "caption"))
        return decode_image(pick_member(sample, self._data.image_keys, "image"), self._image_size), caption

    def _replacement(self, window: Window, slot: int, samples: list[Sample]) -> tuple[np.ndarray, str]:
        length = len(window.permutation)
        for step in range(length):
            try:
                return self._decode(samples[window.permutation[(slot + length // 2 + step) % length]])
            except Refused:
                continue
        first = samples[0]
        raise DataError(
            f"none of {length} neighbouring samples is usable, from {first['__url__']} key {first['__key__']} on: "
            "run without these shards, or check data.image_keys and data.caption_keys"
        )

    def _load(self, lane: int, window: Window) -> list[Sample]:
        """The encoded samples of a window, in the order of the epoch's line."""
        place = (window.epoch, window.start)
        if lane not in self._windows or self._windows[lane][0] != place:
            reader = self._readers.get(lane)
            if reader is None or (reader.epoch, reader.position) != place:
                reader = self._readers[lane] = _LineReader(self._manifest, self._order, self._data, *place)
            self._windows[lane] = (place, reader.take(len(window.permutation)))
        return self._windows[lane][1]


class _Cache:
    """Decoded (image, tokens) by place in the manifest; takes no more once it is full."""

    def __init__(self, max_bytes: int) -> None:
        self._free_bytes = max_bytes
        self._samples: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def get(self, place: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
        return self._samples.get(place)

    def put(self, place: tuple[int, int], image: np.ndarray, tokens: np.ndarray) -> None:
        num_bytes = image.nbytes + tokens.nbytes + 512  # 512: the objects around them, about
        if num_bytes <= self._free_bytes:
            self._free_bytes -= num_bytes
            self._samples[place] = image.copy(), tokens.copy()


class _LineReader:
    """Reads one epoch's line of shards from a position on. Neighbouring windows share an open shard."""

    def __init__(self, manifest: Manifest, order: StreamOrder, data: DataConfig, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._manifest, self._order, self._data = manifest, order, data
        self._samples = self._read()

    def take(self, count: int) -> list[Sample]:
        samples = [next(self._samples) for _ in range(count)]
        self.position += count
        return samples

    def _read(self) -> Iterator[Sample]:
        position = self.position
        while position < self._order.num_samples:
            ref = self._order.locate(self.epoch, position)
            shard = self._manifest.shards[ref.shard]
            yield from read_samples(shard, start=ref.index, s3_endpoint=self._data.s3_endpoint)
            position += shard.num_samples - ref.index


class ActorBlocks:
    """The way from a training worker to the data-shard workers: lanes dealt over actors, dead and hung ones replaced.

    Args:
        actors: handles of `DataWorker` actors that Ray restarts (max_restarts=-1, max_task_retries=-1).
        timeout_s: a block that takes longer has its actor killed and restarted.
    """

    def __init__(self, actors: list[Any], timeout_s: float) -> None:
        self._actors, self._timeout_s = actors, timeout_s

    def request(self, lane: int, number: int) -> Any:
        return self._actor(lane).block.remote(lane, number)

    def wait(self, lane: int, number: int, handle: Any) -> Block:
        """The block; raises DataError as the worker did, RuntimeError where three workers in a row hang on it."""
        import ray

        for _ in range(3):
            try:
                return ray.get(handle, timeout=self._timeout_s)
            except ray.exceptions.GetTimeoutError:
                logger.warning("lane %d block %d took over %.0f s: replacing its worker", lane, number, self._timeout_s)
                ray.kill(self._actor(lane), no_restart=False)
                handle = self.request(lane, number)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
        raise RuntimeError(
            f"lane {lane} block {number}: three data-shard workers gave no answer within {self._timeout_s:.0f} s each; "
            "raise data.worker_timeout_s if decoding is slow, or check that the shards can be read"
        )

    def _actor(self, lane: int) -> Any:
        return self._actors[lane % len(self._actors)]
