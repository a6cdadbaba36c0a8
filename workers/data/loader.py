"""The loader: prefetches and assembles this rank's part of every global batch.

The whole state is the number of the next step. `BlockSource` is the one way to the data-shard workers:
(lane, number) -> a handle that `wait` turns into a Block. Under Ray that is an actor call and its reference; tests pass
a plain DataWorker.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from sigray.losses.spans import span
from sigray.workers.config import DataConfig
from sigray.workers.data.buffers import BufferPool, PageLock, Place, SharedBuffer
from sigray.workers.data.label_noise import Noise
from sigray.workers.data.order import StreamOrder
from sigray.workers.data.tar import DataError
from sigray.workers.data.views import Pixels
from sigray.workers.data.worker import CUT, Block, ImageKind


class BlockSource(Protocol):
    """Where decoded blocks come from."""

    @property
    def shares_memory(self) -> bool:
        """Whether a data-shard worker may be able to write to this process's memory."""

    def request(self, lane: int, number: int, places: Sequence[Place] = (), pixels: Pixels | None = None) -> Any:
        """Request a block without waiting; returns a handle.

        Args:
            places: the data-shard worker writes the images there if it can reach this memory.
            pixels: image size and views; None: images of the size of the data-shard worker's model.
        """

    def wait(self, lane: int, number: int, handle: Any) -> Block:
        """The block of a request."""


@dataclass
class Batch:
    """This rank's part of the global batch of `step`."""

    step: int
    images: torch.Tensor  # (b, S, S, 3) uint8; with views (b, num_bytes), see `views.split`; of a store (b, D) floats
    tokens: torch.Tensor  # (b, T) int32
    samples: np.ndarray  # (b, 3) int64: epoch, shard in the manifest, index in the shard
    keys: list[str]  # of the pairs in the rows
    replaced: np.ndarray  # (b,) bool: the row holds another pair, because its own sample was refused
    give_back: Callable[[], None] = field(default=lambda: None, repr=False)  # returns the images' memory to the loader
    extras: list[dict[str, Any]] = field(default_factory=list)  # of the pairs in the rows; empty in `sigray train`

    def release(self) -> None:
        """Return the images' memory to the loader, once, after the step.

        `images` is gone then. A copy that is still under way, or any other view of it, delays the next use of the
        memory, see `workers/data/buffers.py`. Tokens, samples and keys stay.
        """
        del self.images
        self.give_back()


def as_tensor(images: np.ndarray) -> torch.Tensor:
    """A block's images or embeddings without a copy; uint16 are bits of bfloat16."""
    tensor = torch.from_numpy(images)
    return tensor.view(torch.bfloat16) if images.dtype == np.uint16 else tensor


@dataclass
class Counts:
    """What loaders have read, one after the other.

    Attributes:
        num_read: samples of the blocks that came.
        refused: samples replaced so far, by reason.
        reasons: the same, and captions that were cut: count and first sample by reason.
    """

    num_read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)


class _Piece(NamedTuple):
    """Rows [first, last) of a block, at `row` and on of a rank's part of a batch."""

    block: tuple[int, int]  # lane and number
    first: int
    last: int
    row: int


class Loader:
    """An iterator over this rank's batches from `first_step` to `last_step`.

    Args:
        data: block_size, max_bad_fraction and the length of the prefetch.
        image_kind: of these pixels.
        pixels: as `BlockSource.request`.
        first_step, last_step: the steps [first_step, last_step).
        page_lock: of a device that copies from page-locked memory, see `SharedBuffer`.
        noise: of the labels, if the run asks for it.
        counts: of the loader before, to go on with.

    Attributes:
        wait_s: seconds that the consumer has waited for batches so far.
        decode_s: seconds that data-shard workers were busy with the blocks that came.
        counts: of this loader, and of those before it.
    """

    def __init__(
        self,
        order: StreamOrder,
        source: BlockSource,
        data: DataConfig,
        *,
        image_kind: ImageKind,
        pixels: Pixels | None = None,
        global_batch_size: int,
        rank: int,
        world_size: int,
        first_step: int,
        last_step: int,
        page_lock: PageLock | None = None,
        noise: Noise | None = None,
        counts: Counts | None = None,
    ) -> None:
        self.wait_s = self.decode_s = 0.0
        self.counts = counts or Counts()
        self._order, self._source, self._data = order, source, data
        self._global_batch_size, self._pixels = global_batch_size, pixels
        assert pixels is None or pixels.shape == image_kind.shape, f"{pixels}: {image_kind}"
        self._rank, self._world_size = rank, world_size
        self._steps = range(first_step, last_step)
        self._pins_memory = page_lock is not None
        self._pool = BufferPool((global_batch_size // world_size, *image_kind.shape), image_kind.dtype, page_lock)
        self._buffers: dict[int, SharedBuffer] = defaultdict(self._pool.take)  # of requested steps
        self._parts: dict[int, dict[tuple[int, int], _Piece]] = {}  # of requested steps, see `_own`
        self._noise = noise
        self._needs_all = noise is not None and noise.moves_captions
        self._stop = threading.Event()
        self._ready: queue.Queue[Batch | Exception | None] = queue.Queue(maxsize=2)
        threading.Thread(target=self._produce, name="loader", daemon=True).start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            begin = time.perf_counter()
            with span("data wait"):
                batch = self._ready.get()
            self.wait_s += time.perf_counter() - begin
            if batch is None:
                return
            if isinstance(batch, Exception):
                raise batch
            yield batch

    @property
    def num_ready(self) -> int:
        """Assembled batches that the consumer has not taken."""
        return self._ready.qsize()

    def close(self) -> None:
        """Stop requesting blocks, and end the iteration. Safe to call at any time."""
        self._stop.set()
        with contextlib.suppress(queue.Empty):  # the thread may wait to add a batch
            while True:
                self._ready.get_nowait()
        with contextlib.suppress(queue.Full):
            self._ready.put_nowait(None)

    def _produce(self) -> None:
        try:
            for batch in self._batches():
                self._ready.put(batch)
                if self._stop.is_set():
                    return
            self._ready.put(None)
        except Exception as error:  # raised again in the training thread
            self._ready.put(error)

    def _pieces(self, step: int, rank: int, world_size: int) -> list[_Piece]:
        """A rank's part of a step, in the batch's order."""
        size = self._data.block_size
        pieces: list[_Piece] = []
        row = 0
        for part in self._order.rank_part(step, self._global_batch_size, rank, world_size):
            for number in range(part.start // size, -(-part.stop // size)):
                first = max(part.start - number * size, 0)
                last = min(part.stop - number * size, size)
                pieces.append(_Piece((part.lane, number), first, last, row))
                row += last - first
        return pieces

    def _own(self, step: int) -> dict[tuple[int, int], _Piece]:
        """The pieces of this rank's part of a future step, by block, in its order."""
        if step not in self._parts:
            self._parts[step] = {piece.block: piece for piece in self._pieces(step, self._rank, self._world_size)}
        return self._parts[step]

    def _needed(self, step: int) -> Iterable[_Piece]:
        """This rank's pieces, or all of the batch if captions move within it."""
        return self._pieces(step, 0, 1) if self._needs_all else self._own(step).values()

    def _batches(self) -> Iterator[Batch]:
        outstanding: dict[tuple[int, int], tuple[Any, list[SharedBuffer]]] = {}  # handles, and the buffers to write to
        blocks: dict[tuple[int, int], Block] = {}
        num_requested = self._data.num_requested_batches(self._global_batch_size)
        requested_until = self._steps.start
        for step in self._steps:
            while requested_until < min(step + num_requested, self._steps.stop):
                for piece in self._needed(requested_until):
                    if piece.block not in outstanding and piece.block not in blocks:
                        places, buffers = self._places(piece.block, requested_until)
                        handle = self._source.request(*piece.block, places, self._pixels)
                        outstanding[piece.block] = handle, buffers
                requested_until += 1
            for piece in self._needed(step):
                if piece.block not in blocks:
                    handle, buffers = outstanding.pop(piece.block)
                    block = blocks[piece.block] = self._source.wait(*piece.block, handle)
                    if not block.has_straggler:
                        for buffer in buffers:
                            buffer.add_writers(-1)
                    self._count(block)
            yield self._assemble(step, blocks)
            for place in [place for place in blocks if self._is_used_up(*place, step + 1)]:
                del blocks[place]

    def _is_used_up(self, lane: int, number: int, step: int) -> bool:
        """Whether no batch from `step` on takes a sample of this block."""
        return (number + 1) * self._data.block_size <= self._order.next_index(lane, step, self._global_batch_size)

    def _places(self, block: tuple[int, int], step: int) -> tuple[list[Place], list[SharedBuffer]]:
        """Where a block's rows belong in this rank's batches from `step` on."""
        # A block that all ranks request is decoded once for all of them, and comes with its images.
        if not self._source.shares_memory or (self._needs_all and self._world_size > 1):
            return [], []
        places: list[Place] = []
        buffers: list[SharedBuffer] = []
        while step in self._steps and not self._is_used_up(*block, step):
            piece = self._own(step).get(block)
            if piece is not None:
                buffer = self._buffers[step]
                if buffer.address is None:  # all of them or none: the block comes with its images or without
                    return [], []
                places.append(Place(buffer.address, piece.row, piece.first, piece.last - piece.first))
                buffers.append(buffer)
            step += 1
        for buffer in buffers:
            buffer.add_writers(1)
        return places, buffers

    def _assemble(self, step: int, blocks: dict[tuple[int, int], Block]) -> Batch:
        def cut(name: str, pieces: Iterable[_Piece]) -> np.ndarray:
            return np.concatenate([getattr(blocks[piece.block], name)[piece.first : piece.last] for piece in pieces])

        buffer = self._pool.complete(self._buffers[step])
        own = list(self._own(step).values())
        del self._buffers[step], self._parts[step]
        for piece in own:
            rows = blocks[piece.block].images[piece.first : piece.last]
            if len(rows):
                buffer.array[piece.row : piece.row + len(rows)] = rows
        tokens, samples = cut("tokens", own), cut("samples", own)
        if self._noise is not None:
            if self._needs_all:
                whole = self._pieces(step, 0, 1)
                rows = self._noise.caption_rows(cut("samples", whole))
                tokens = cut("tokens", whole)[rows[self._rank * len(samples) : (self._rank + 1) * len(samples)]]
            self._noise.corrupt(samples, buffer.array, tokens)
        captions = torch.from_numpy(tokens)
        return Batch(
            step,
            as_tensor(buffer.hand_out()),
            captions.pin_memory() if self._pins_memory else captions,
            samples=samples,
            keys=[key for piece in own for key in blocks[piece.block].keys[piece.first : piece.last]],
            replaced=cut("replaced", own),
            extras=[extra for piece in own for extra in blocks[piece.block].extras[piece.first : piece.last]],
            give_back=functools.partial(self._pool.release, buffer),
        )

    def _count(self, block: Block) -> None:
        counts = self.counts
        counts.num_read += len(block.samples)
        self.decode_s += block.decode_s
        counts.refused.update(block.refused)
        if block.refused_keys:
            new = dict(counts.reasons)  # not changed in place: the training thread reads it
            for reason, first in block.refused_keys.items():
                count, first = new.get(reason, (0, first))
                new[reason] = (count + (block.num_cut if reason == CUT else block.refused[reason]), first)
            counts.reasons = new
        num_refused = counts.refused.total()
        max_bad_fraction = self._data.max_bad_fraction
        # A rate needs a base: two bad samples in the first block say nothing yet.
        if num_refused > max_bad_fraction * max(counts.num_read, 1024):
            table = "\n  ".join(
                f"{count} x {reason}, first {counts.reasons[reason][1]}"
                for reason, count in counts.refused.most_common()
            )
            raise DataError(
                f"{num_refused} of {counts.num_read} samples refused, more than data.max_bad_fraction "
                f"{max_bad_fraction}:\n  {table}"
            )
