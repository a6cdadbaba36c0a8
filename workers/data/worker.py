"""The data-shard worker: turns (lane, block number) into a decoded block.

    K  samples in a block            S  image size            T  context length

A worker holds nothing that cannot be computed again, so it may be killed, restarted or doubled at any moment. The same
request has the same answer from any worker at any time. Between requests a worker keeps caches only: the open shard of
each lane, the encoded samples of one shuffle window, and decoded images for the next epoch unless crops are random.
A worker knows no phases: a request names the pixels that it wants.

A refused sample is replaced by a rule that depends on the order alone. The replacement is the first usable sample of
its window from half a window further on, so that the two copies stand in different batches.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sigray.workers.config import DataConfig, ModelConfig, caption_member
from sigray.workers.data.buffers import Mappings, Place
from sigray.workers.data.decode import Decoder, Refused, sample_random
from sigray.workers.data.embedding_store import EmbeddingReader, StoreFormat
from sigray.workers.data.extras import Extras
from sigray.workers.data.manifest import Manifest, read_samples
from sigray.workers.data.order import LaneSlice, SampleRef, StreamOrder, Window
from sigray.workers.data.tar import DataError, TarSample
from sigray.workers.data.views import Pixels
from sigray.workers.model.inputs import image_inputs, shapes
from sigray.workers.model.tokenizer import build_tokenizer, cut_caption
from sigray.workers.texts import first_ten
from sigray.workers.urls import is_remote

CUT = "caption cut"
"""Not a refusal: the sample is used, with the start of its caption."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NUM_PREFETCHING = 2  # windows of remote shards that are read while the windows before are decoded


@dataclass
class Block:
    """K consecutive samples of a lane, as a data-shard worker returns them."""

    # (K, S, S, 3) uint8, with views (K, num_bytes); of a store (K, D), uint16 for bfloat16; no rows: in `places`
    images: np.ndarray
    tokens: np.ndarray  # (K, T) int32
    samples: np.ndarray  # (K, 3) int64: epoch, shard in the manifest, index in the shard
    keys: list[str]  # of the pairs in the rows
    replaced: np.ndarray  # (K,) bool: the row holds another pair, because its own sample was refused
    extras: list[dict[str, Any]] = field(default_factory=list)  # of the pairs in the rows; empty without `Extras`
    refused: Counter[str] = field(default_factory=Counter)  # samples replaced in this block, by reason
    num_cut: int = 0  # captions that were cut before they were tokenized
    refused_keys: dict[str, str] = field(default_factory=dict)  # first of each reason, and of CUT: shard url and key
    decode_s: float = 0.0  # time in which the worker decoded it
    has_straggler: bool = False  # it comes from a backup; the worker that received the places has not answered


def keep_freed_memory() -> None:
    """Keep freed memory of large arrays in this process, for the next arrays.

    glibc maps every large array again, and the first touch of each page costs. Its largest threshold is 32 MiB; a block
    of 128 samples at 224 px has 18.
    """
    with contextlib.suppress(OSError):  # no glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def build_order(
    manifest: Manifest, data: DataConfig, seed: int, mixes: Sequence[tuple[int, Mapping[str, float]]] = ()
) -> StreamOrder:
    """The order of a run's training stream.

    Args:
        mixes: samples after which other weights hold, and the weights of all datasets by name.
    """
    datasets = manifest.datasets()
    return StreamOrder(
        [[shard.num_samples for shard in shards] for shards in datasets.values()],
        [data.shards[name].weight for name in datasets] if isinstance(data.shards, dict) else (1.0,),
        [(start, [weights[name] for name in datasets]) for start, weights in mixes],
        seed=seed,
        num_lanes=data.num_lanes,
        shuffle_window=data.shuffle_window,
    )


def check_batch(
    manifest: Manifest,
    data: DataConfig,
    seed: int,
    global_batch_size: int,
    mixes: Sequence[tuple[int, Mapping[str, float]]] = (),
) -> None:
    """Check that no batch would hold a pair twice.

    Args:
        mixes: as `build_order`.

    Raises:
        ValueError: with both numbers.
    """
    order = build_order(manifest, data, seed, mixes)
    for number, (name, dataset) in enumerate(zip(manifest.datasets(), order.datasets, strict=True)):
        share = max(
            order.num_of_dataset(number, start + global_batch_size) - order.num_of_dataset(number, start)
            for start in (0, *(start for start, _ in mixes))
        )
        if dataset.num_samples < share:
            raise ValueError(
                f"global_batch_size={global_batch_size} takes {share} samples of shards{'.' + name if name else ''}, "
                f"which has {dataset.num_samples}: one batch would hold a pair twice and count it as its own negative"
            )


@dataclass(frozen=True)
class ImageKind:
    """Shape and dtype of an image in a block, or of the embedding in its place."""

    shape: tuple[int, ...]  # `Pixels.shape`; of a store (D,)
    dtype: np.dtype  # uint8; of a store that of its numbers, uint16 standing for bfloat16


def image_kind(manifest: Manifest, model: ModelConfig, pixels: Pixels | None = None) -> ImageKind:
    """Shape and dtype of the images of a run's training stream.

    Args:
        pixels: as `BlockSource.request`.
    """
    if manifest.store is None:
        pixels = pixels or Pixels(shapes(model)[0])
        return ImageKind(pixels.shape, np.dtype(np.uint8))
    assert pixels is None, f"{pixels}: the store has embeddings, and no pixels"
    store = StoreFormat(**manifest.store)
    return ImageKind((store.dim,), np.dtype(store.numpy_dtype))


class DataWorker:
    """Decodes blocks. A plain class; `workers/data/pool.py` makes Ray actors of it.

    Args:
        model: decides image size, unless a request names pixels, context length and tokenizer.
        extras: further members of a sample, and a map function; None in `sigray train`.

    Attributes:
        num_decoded: samples of decoded blocks; a block decoded again counts again.
        num_served: samples of requested blocks.
        num_cut: captions of decoded blocks that were cut.
        refused: samples of decoded blocks that could not be used, by reason.
    """

    def __init__(
        self, manifest: Manifest, data: DataConfig, model: ModelConfig, *, seed: int, extras: Extras | None = None
    ) -> None:
        self.num_decoded = self.num_served = self.num_cut = 0
        self.refused: Counter[str] = Counter()
        self._manifest, self._data, self._seed = manifest, data, seed
        self._extras = extras
        self._order = build_order(manifest, data, seed)
        self._model = model
        image_size, self._context_length, vocab_size = shapes(model)
        self._tokenizer = build_tokenizer(model, self._context_length, vocab_size)
        self._store = StoreFormat(**manifest.store) if manifest.store is not None else None
        self._embeddings = EmbeddingReader(self._store) if self._store is not None else None
        self._windows = _Windows(manifest, self._order, data)
        self._mappings = Mappings()
        self._blocks: dict[int, OrderedDict[tuple[int, Pixels], Block]] = {}  # the latest decoded last
        self._model_pixels = Pixels(image_size)
        self._set_pixels(None)

    def block(self, lane: int, number: int, places: Sequence[Place] = (), pixels: Pixels | None = None) -> Block:
        """Samples [number K, (number + 1) K) of a lane.

        Args:
            places: memory for the images. If this process finds that memory, it writes them there and the block comes
                without images, else they come with the block.
            pixels: image size and views; None: images of the model's size. Not of embeddings; no views beside extras.

        Raises:
            DataError: if a shard changed or broke, or a window has no usable sample.
        """
        if (pixels or self._model_pixels) != self._pixels:
            self._set_pixels(pixels)
        blocks = self._blocks.setdefault(lane, OrderedDict())
        rows = self._mappings.rows(places, self._image.shape, self._image.dtype) if places else None
        block = blocks.get((number, self._pixels))
        if block is None:
            begin = time.perf_counter()
            if rows is not None and len(rows) == self._data.block_size and self._data.shared_blocks == 1:
                block = self._decode_block(lane, number, np.empty((0, *self._image.shape), self._image.dtype), rows)
            else:  # ranks may share a block, and runs a stream: decode once
                images = np.empty((self._data.block_size, *self._image.shape), self._image.dtype)
                block = blocks[number, self._pixels] = self._decode_block(lane, number, images, images)
            block.decode_s = time.perf_counter() - begin
            self.num_decoded += len(block.samples)
            self.refused.update(block.refused)
            self.num_cut += block.num_cut
            if len(blocks) > self._data.shared_blocks:
                # The block decoded first, not the one used longest ago: the slowest subscriber requests that one next.
                blocks.popitem(last=False)
        self.num_served += len(block.samples)
        if rows is None:
            return block
        for row, image in enumerate(block.images):
            if row in rows:
                rows[row][...] = image
        return replace(block, images=block.images[:0])

    def _set_pixels(self, pixels: Pixels | None) -> None:
        """Decode these pixels from now on."""
        views = None if pixels is None else pixels.views
        assert views is None or self._extras is None, f"{views}: extras take images without views"
        self._image = image_kind(self._manifest, self._model, pixels)
        self._pixels = pixels or self._model_pixels
        self._decoder = Decoder(self._data, self._pixels.image_size, image_inputs(self._model), views)
        if self._store is not None:
            is_fixed = self._store.num_views == 1
        else:
            is_fixed = self._data.crop == "center" and views is None  # views are random, whatever the crop
        kept = {caption_member(source) for source in self._data.captions}
        kept |= {*(self._extras.members if self._extras else ())}
        self._cache = _Cache(self._data.cache_mib * 2**20 if is_fixed else 0, kept)

    def describe(self, lane: int, number: int) -> str:
        """Name the shards and samples of a block, for messages."""
        size = self._data.block_size
        found: dict[int, list[int]] = {}
        for _, shard, index in self._order.places(LaneSlice(lane, number * size, (number + 1) * size)).tolist():
            found.setdefault(shard, []).append(index)
        parts = [
            f"samples {min(indices)} to {max(indices)} of {self._manifest.shards[shard].url}"
            for shard, indices in found.items()
        ]
        return first_ten(parts)

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
            index = number * size + row
            ref = SampleRef(*place)
            sample, image = self._cache.get(ref) or (None, None)
            if sample is None:
                samples, slot = self._windows.get(lane, index)
                sample = samples[slot]
            try:
                caption = self._decode(sample, ref, rows[row], image)
                if image is None:
                    self._cache.put(ref, sample, rows[row])
                caption, extra = self._extend(sample, ref, ref.shard, caption, rows[row])
            except Refused as reason:
                block.refused[str(reason)] += 1
                block.refused_keys.setdefault(str(reason), self._named(ref, sample))
                block.replaced[row] = True
                sample, caption, extra = self._replacement(lane, index, ref, rows[row])
            captions.append(caption)
            if self._extras is not None:
                block.extras.append(extra)
            cut = cut_caption(captions[-1], self._context_length)
            if len(cut) < len(captions[-1]):
                block.num_cut += 1
                block.refused_keys.setdefault(CUT, self._named(ref, sample))
                captions[-1] = cut
            block.keys.append(sample.key)
        block.tokens[:] = self._tokenizer(captions)
        return block

    def _named(self, ref: SampleRef, sample: TarSample) -> str:
        return f"{self._manifest.shards[ref.shard].url} {sample.key}"

    def _decode(self, sample: TarSample, ref: SampleRef, out: np.ndarray, cached: np.ndarray | None = None) -> str:
        """Write the image to `out`, return the caption; drawn with the numbers of `ref`.

        Raises:
            Refused: if the sample cannot be used.
        """
        if sample.refusal:
            raise Refused(sample.refusal)
        random = sample_random(self._seed, ref.epoch, ref.shard, ref.index)
        caption = self._decoder.choose_caption(sample.members, random)
        if cached is not None:
            out[:] = cached
        elif self._embeddings is None or self._store is None:
            self._decoder.decode_image(sample.members, out, random)
        else:
            view = int(next(random.uniforms("view")) * self._store.num_views)
            out[:] = self._embeddings.read(sample.members, view)
        return caption

    def _extend(
        self, sample: TarSample, ref: SampleRef, shard: int, caption: str, out: np.ndarray
    ) -> tuple[str, dict[str, Any]]:
        """As `Extras.add`, drawn with the numbers of `ref`; `shard` is the sample's own."""
        if self._extras is None:
            return caption, {}
        random = sample_random(self._seed, ref.epoch, ref.shard, ref.index)
        return self._extras.add(sample, self._manifest.shards[shard].url, caption, out, random)

    def _replacement(
        self, lane: int, index: int, ref: SampleRef, out: np.ndarray
    ) -> tuple[TarSample, str, dict[str, Any]]:
        samples, slot = self._windows.get(lane, index)
        length = len(samples)
        for step in range(length):
            other = (slot + length // 2 + step) % length
            with contextlib.suppress(Refused):
                caption = self._decode(samples[other], ref, out)
                ((_, shard, _),) = self._order.places(LaneSlice(lane, index - slot + other, index - slot + other + 1))
                return samples[other], *self._extend(samples[other], ref, int(shard), caption, out)
        raise DataError(
            f"none of {length} neighbouring samples is usable, among them {self._manifest.shards[ref.shard].url} key "
            f"{samples[slot].key}: run without these shards, or check data.image_keys and data.captions"
            f"{' and map' if self._extras is not None and self._extras.map is not None else ''}"
        )


class _Windows:
    """The encoded samples of each lane's window; the next remote one is prefetched."""

    def __init__(self, manifest: Manifest, order: StreamOrder, data: DataConfig) -> None:
        self._manifest, self._order, self._data = manifest, order, data
        # Subscribers at different positions of a stream are nearly always in two neighbouring windows at most.
        self._num_kept = 1 if data.shared_blocks == 1 else 2
        self._loaded: dict[int, dict[tuple[int, int], list[TarSample]]] = {}
        self._readers: dict[int, tuple[tuple[int, int], Generator[TarSample]]] = {}  # and their epoch and position
        self._prefetched: dict[int, tuple[tuple[int, int], Future[list[TarSample]]]] = {}
        # The kernel prefetches local shards.
        has_remote = any(is_remote(shard.url) for shard in manifest.shards)
        self._permits = threading.Semaphore(_NUM_PREFETCHING) if has_remote else None

    def get(self, lane: int, index: int) -> tuple[list[TarSample], int]:
        """The window around sample `index` of a lane, in its order; that sample's slot."""
        window, slot = self._order.window(lane, index)
        place = window.epoch, window.start
        loaded = self._loaded.setdefault(lane, {})
        if place not in loaded:
            prefetched, future = self._prefetched.pop(lane, (None, None))
            samples = future.result() if future is not None else []
            loaded[place] = samples if prefetched == place else self._read(lane, window)
            while len(loaded) > self._num_kept:
                loaded.pop(next(iter(loaded)))  # the oldest
            if self._permits is not None:
                following, _ = self._order.window(lane, index - slot + len(window.permutation))
                future = self._prefetch(lane, following, self._permits)
                self._prefetched[lane] = (following.epoch, following.start), future
        return loaded[place], slot

    def _prefetch(self, lane: int, window: Window, permits: threading.Semaphore) -> Future[list[TarSample]]:
        future: Future[list[TarSample]] = Future()

        def read() -> None:
            with permits:
                try:
                    future.set_result(self._read(lane, window))
                except BaseException as error:  # raised in `get`
                    future.set_exception(error)

        # Not an executor's thread: the end of the process would wait for that.
        threading.Thread(target=read, name="window prefetch", daemon=True).start()
        return future

    def _read(self, lane: int, window: Window) -> list[TarSample]:
        place, reader = self._readers.pop(lane, (None, None))
        if reader is None or place != (window.epoch, window.start):
            if reader is not None:
                reader.close()
            reader = self._from(lane, window.epoch, window.start)
        samples = list(itertools.islice(reader, len(window.permutation)))
        self._readers[lane] = (window.epoch, window.start + len(samples)), reader
        return [samples[number] for number in window.permutation.tolist()]

    def _from(self, lane: int, epoch: int, position: int) -> Generator[TarSample]:
        """The samples of an epoch from a position on; windows share an open shard."""
        dataset = self._order.dataset_of(lane)
        while position < dataset.num_samples:
            ref = dataset.locate(epoch, position)
            shard = self._manifest.shards[ref.shard]
            yield from read_samples(shard, self._data, start=ref.index)
            position += shard.num_samples - ref.index


class _Cache:
    """Decoded images and some members by sample; takes no more once it is full."""

    def __init__(self, max_bytes: int, endings: set[str]) -> None:
        self._free_bytes = max_bytes
        self._endings = endings
        self._samples: dict[tuple[int, int], tuple[TarSample, np.ndarray]] = {}

    def get(self, ref: SampleRef) -> tuple[TarSample, np.ndarray] | None:
        """The sample without its encoded image, and the decoded one (S, S, 3)."""
        return self._samples.get(ref.in_manifest)

    def put(self, ref: SampleRef, sample: TarSample, image: np.ndarray) -> None:
        if image.nbytes > self._free_bytes:
            return
        small = {ending: bytes(content) for ending, content in sample.members.items() if ending in self._endings}
        num_bytes = image.nbytes + sum(map(len, small.values())) + 1024  # 1024: the objects around them, about
        if num_bytes <= self._free_bytes:
            self._free_bytes -= num_bytes
            self._samples[ref.in_manifest] = TarSample(sample.key, sample.index, 0, small), image.copy()
