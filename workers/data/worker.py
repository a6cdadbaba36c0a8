"""The data-shard worker: turns (lane, block number) into a decoded block.

    K  samples in a block            S  image size            T  context length

It holds nothing that cannot be computed again, so it may be killed, restarted or doubled at any moment: the same
question has the same answer from any worker at any time. What it keeps between calls are caches only: for each lane
the open shard and the encoded samples of one shuffle window, and decoded images for the next epoch where no random
crop changes them.

A refused sample is replaced by a rule that depends on the order alone: by the first usable one among the slots of its
own window, from half a window further on, so that the two copies of the replacement stand in different batches.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from sigray.workers.config import DataConfig, ModelConfig
from sigray.workers.data.buffers import Mappings, Place
from sigray.workers.data.decode import Decoder, Refused, SampleRandom, sample_random
from sigray.workers.data.embedding_store import EmbeddingReader, StoreFormat
from sigray.workers.data.manifest import Manifest, caption_member, read_samples
from sigray.workers.data.order import DatasetOrder, LaneSlice, SampleRef, StreamOrder, Window
from sigray.workers.data.tar import DataError, TarSample
from sigray.workers.model.inputs import shapes
from sigray.workers.model.tokenizer import build_tokenizer

# Windows of remote shards that are read while the one before is decoded.
_NUM_READERS = 2


@dataclass
class Block:
    """K consecutive samples of a lane: what a data-shard worker answers."""

    images: np.ndarray  # (K, S, S, 3) uint8; of a store (K, D), uint16 standing for bfloat16; no rows: in their places
    tokens: np.ndarray  # (K, T) int32
    samples: np.ndarray  # (K, 3) int64: epoch, shard in the manifest, index in the shard
    keys: list[str]  # of the pairs that stand in the rows
    replaced: np.ndarray  # (K,) bool: the row's own sample was refused, another one stands in its place
    refused: Counter[str] = field(default_factory=Counter)  # samples replaced in this block, by reason
    refused_keys: dict[str, str] = field(default_factory=dict)  # the first of each reason: shard url and key
    decode_s: float = 0.0  # how long the worker was busy with it
    has_straggler: bool = False  # who was told where the images belong has not answered yet, another one has


def build_order(manifest: Manifest, data: DataConfig, seed: int) -> StreamOrder:
    """The order of a run's training stream."""
    datasets = manifest.datasets()
    return StreamOrder(
        [[shard.num_samples for shard in shards] for shards in datasets.values()],
        [data.shards[name].weight for name in datasets] if isinstance(data.shards, dict) else (1.0,),
        seed=seed,
        num_lanes=data.num_lanes,
        shuffle_window=data.shuffle_window,
    )


@dataclass(frozen=True)
class ImageKind:
    """What an image is in a block: pixels, or the embedding in its place."""

    shape: tuple[int, ...]  # (S, S, 3); of a store (D,)
    dtype: np.dtype  # uint8; of a store that of its numbers, uint16 standing for bfloat16


def image_kind(manifest: Manifest, model: ModelConfig) -> ImageKind:
    """What the images of a run's training stream are."""
    if manifest.store is None:
        image_size, _, _ = shapes(model)
        return ImageKind((image_size, image_size, 3), np.dtype(np.uint8))
    store = StoreFormat(**manifest.store)
    return ImageKind((store.dim,), np.dtype(store.numpy_dtype))


class DataWorker:
    """Evaluates lanes. A plain class; `workers/data/pool.py` makes Ray actors of it.

    Args:
        manifest: the run's shards.
        data: the run's data section.
        model: decides image size, context length and tokenizer.
        seed: the run's seed.

    Attributes:
        num_decoded: samples in the blocks that were decoded so far, those decoded again counted again.
        num_served: samples in the blocks that were asked for so far.
        refused: samples of the blocks decoded so far that could not be used, by reason.
    """

    def __init__(self, manifest: Manifest, data: DataConfig, model: ModelConfig, *, seed: int) -> None:
        self.num_decoded = self.num_served = 0
        self.refused: Counter[str] = Counter()
        self._manifest, self._data, self._seed = manifest, data, seed
        self._order = build_order(manifest, data, seed)
        image_size, self._context_length, vocab_size = shapes(model)
        self._tokenizer = build_tokenizer(model, self._context_length, vocab_size)
        self._decoder = Decoder(data, image_size)
        self._store = StoreFormat(**manifest.store) if manifest.store is not None else None
        self._image = image_kind(manifest, model)
        self._embeddings = EmbeddingReader(self._store) if self._store is not None else None
        self._windows = _Windows(manifest, self._order, data)
        self._mappings = Mappings()
        self._blocks: dict[int, OrderedDict[int, Block]] = {}  # the latest decoded last
        is_fixed = data.crop == "center" if self._store is None else self._store.num_views == 1
        self._cache = _Cache(data.cache_mib * 2**20 if is_fixed else 0, data)

    def block(self, lane: int, number: int, places: Sequence[Place] = ()) -> Block:
        """Samples [number K, (number + 1) K) of a lane.

        Args:
            places: where whoever asks wants the images. Where its memory is to be found from here, they are written
                there and the block comes without them, else they come with the block.

        Raises:
            DataError: for a shard that changed or broke, and for a window without a single usable sample.
        """
        blocks = self._blocks.setdefault(lane, OrderedDict())
        rows = self._mappings.rows(places, self._image.shape, self._image.dtype) if places else None
        block = blocks.get(number)
        if block is None:
            begin = time.perf_counter()
            if rows is not None and len(rows) == self._data.block_size and self._data.shared_blocks == 1:
                block = self._decode_block(lane, number, np.empty((0, *self._image.shape), self._image.dtype), rows)
            else:  # ranks may share a block, and runs a stream: decode it once
                images = np.empty((self._data.block_size, *self._image.shape), self._image.dtype)
                block = blocks[number] = self._decode_block(lane, number, images, images)
            block.decode_s = time.perf_counter() - begin
            self.num_decoded += len(block.samples)
            self.refused.update(block.refused)
            if len(blocks) > self._data.shared_blocks:
                # The one decoded first, not the one used longest ago: that is what the slowest reader asks for next.
                blocks.popitem(last=False)
        self.num_served += len(block.samples)
        if rows is None:
            return block
        for row, image in enumerate(block.images):
            if row in rows:
                rows[row][...] = image
        return replace(block, images=block.images[:0])

    def _decode_block(
        self, lane: int, number: int, images: np.ndarray, rows: np.ndarray | dict[int, np.ndarray]
    ) -> Block:
        """The block with `images`; row i goes to `rows[i]`."""
        size = self._data.block_size
        block = Block(
            images=images,
            tokens=np.empty((size, self._context_length), np.int32),
            samples=self._order.places(LaneSlice(lane, number * size, (number + 1) * size)),
            keys=[],
            replaced=np.zeros(size, bool),
        )
        captions = []
        for row, place in enumerate(block.samples.tolist()):
            index, ref = number * size + row, SampleRef(*place)
            sample = self._cache.sample(ref)
            if sample is None:
                samples, slot = self._windows.get(lane, index)
                sample = samples[slot]
            try:
                captions.append(self._decode(sample, ref, rows[row]))
            except Refused as reason:
                block.refused[str(reason)] += 1
                url = self._manifest.shards[ref.shard].url
                block.refused_keys.setdefault(str(reason), f"{url} {sample.key}")
                block.replaced[row] = True
                sample, caption = self._replacement(lane, index, ref, rows[row])
                captions.append(caption)
            block.keys.append(sample.key)
        block.tokens[:] = self._tokenizer(captions)
        return block

    def _decode(self, sample: TarSample, ref: SampleRef, out: np.ndarray) -> str:
        """The image into `out`; returns the caption."""
        if sample.has_duplicates:
            raise Refused("duplicate key")
        random = sample_random(self._seed, ref.epoch, ref.shard, ref.index)
        caption = self._decoder.choose_caption(sample.members, random)
        cached = self._cache.image(ref)
        if cached is None:
            self._decode_image(sample, random, out)
            self._cache.put(ref, sample, out)
        else:
            out[:] = cached
        return caption

    def _decode_image(self, sample: TarSample, random: SampleRandom, out: np.ndarray) -> None:
        if self._embeddings is None or self._store is None:
            self._decoder.decode_image(sample.members, out, random)
        else:
            view = int(next(random.uniforms("view")) * self._store.num_views)
            out[:] = self._embeddings.read(sample.members, view)

    def _replacement(self, lane: int, index: int, ref: SampleRef, out: np.ndarray) -> tuple[TarSample, str]:
        samples, slot = self._windows.get(lane, index)
        length = len(samples)
        for step in range(length):
            sample = samples[(slot + length // 2 + step) % length]
            try:
                if sample.has_duplicates:
                    continue
                random = sample_random(self._seed, ref.epoch, ref.shard, ref.index)
                caption = self._decoder.choose_caption(sample.members, random)
                self._decode_image(sample, random, out)
            except Refused:
                continue
            return sample, caption
        raise DataError(
            f"none of {length} neighbouring samples is usable, among them {self._manifest.shards[ref.shard].url} key "
            f"{samples[slot].key}: run without these shards, or check data.image_keys and data.captions"
        )


class _Windows:
    """The encoded samples of the windows that lanes are in; of remote shards, the next ones are read meanwhile."""

    def __init__(self, manifest: Manifest, order: StreamOrder, data: DataConfig) -> None:
        self._manifest, self._order, self._data = manifest, order, data
        # Readers at different places of a shared stream are in two neighbouring windows at most, nearly always.
        self._num_kept = 1 if data.shared_blocks == 1 else 2
        self._loaded: dict[int, dict[tuple[int, int], list[TarSample]]] = {}
        self._readers: dict[int, _LineReader] = {}
        self._ahead: dict[int, tuple[tuple[int, int], Future[list[TarSample]]]] = {}
        # Local shards are mapped: reading them ahead is the kernel's work.
        is_remote = any(shard.url.startswith("s3://") for shard in manifest.shards)
        self._turns = threading.Semaphore(_NUM_READERS) if is_remote else None

    def get(self, lane: int, index: int) -> tuple[list[TarSample], int]:
        """The window around a lane's sample number `index`, in the lane's order, and that sample's slot in it."""
        window, slot = self._order.window(lane, index)
        place = window.epoch, window.start
        loaded = self._loaded.setdefault(lane, {})
        if place not in loaded:
            place_ahead, future = self._ahead.pop(lane, (None, None))
            samples = future.result() if future is not None else []
            loaded[place] = samples if place_ahead == place else self._read(lane, window)
            while len(loaded) > self._num_kept:
                loaded.pop(next(iter(loaded)))  # the oldest
            if self._turns is not None:
                following, _ = self._order.window(lane, index - slot + len(window.permutation))
                place_ahead = following.epoch, following.start
                self._ahead[lane] = place_ahead, self._read_ahead(lane, following, self._turns)
        return loaded[place], slot

    def _read_ahead(self, lane: int, window: Window, turns: threading.Semaphore) -> Future[list[TarSample]]:
        """In a thread that the end of the process does not wait for, as it would for an executor's."""
        future: Future[list[TarSample]] = Future()

        def read() -> None:
            with turns:
                try:
                    future.set_result(self._read(lane, window))
                except BaseException as error:  # raised where the window is wanted
                    future.set_exception(error)

        threading.Thread(target=read, name="window", daemon=True).start()
        return future

    def _read(self, lane: int, window: Window) -> list[TarSample]:
        reader = self._readers.get(lane)
        if reader is None or (reader.epoch, reader.position) != (window.epoch, window.start):
            if reader is not None:
                reader.close()
            dataset = self._order.dataset_of(lane)
            reader = _LineReader(self._manifest, dataset, self._data, window.epoch, window.start)
            self._readers[lane] = reader
        samples = reader.take(len(window.permutation))
        return [samples[number] for number in window.permutation.tolist()]


class _Cache:
    """Decoded images and what their captions stand in, by place in the manifest; takes no more once it is full."""

    def __init__(self, max_bytes: int, data: DataConfig) -> None:
        self._free_bytes, self._endings = max_bytes, {caption_member(source) for source in data.captions}
        self._samples: dict[tuple[int, int], tuple[np.ndarray, TarSample]] = {}

    def sample(self, ref: SampleRef) -> TarSample | None:
        """The sample without its image."""
        known = self._samples.get(ref.in_manifest)
        return known[1] if known else None

    def image(self, ref: SampleRef) -> np.ndarray | None:
        """(S, S, 3)."""
        known = self._samples.get(ref.in_manifest)
        return known[0] if known else None

    def put(self, ref: SampleRef, sample: TarSample, image: np.ndarray) -> None:
        if image.nbytes > self._free_bytes:
            return
        small = {ending: bytes(content) for ending, content in sample.members.items() if ending in self._endings}
        num_bytes = image.nbytes + sum(map(len, small.values())) + 1024  # 1024: the objects around them, about
        if num_bytes <= self._free_bytes:
            self._free_bytes -= num_bytes
            self._samples[ref.in_manifest] = image.copy(), TarSample(sample.key, sample.index, 0, small)


class _LineReader:
    """Reads one epoch's line of shards from a position on. Neighbouring windows share an open shard."""

    def __init__(self, manifest: Manifest, dataset: DatasetOrder, data: DataConfig, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._manifest, self._dataset, self._data = manifest, dataset, data
        self._samples = self._read()

    def take(self, count: int) -> list[TarSample]:
        samples = [next(self._samples) for _ in range(count)]
        self.position += count
        return samples

    def close(self) -> None:
        self._samples.close()

    def _read(self) -> Generator[TarSample]:
        position = self.position
        while position < self._dataset.num_samples:
            ref = self._dataset.locate(self.epoch, position)
            shard = self._manifest.shards[ref.shard]
            yield from read_samples(shard, self._data, start=ref.index)
            position += shard.num_samples - ref.index
