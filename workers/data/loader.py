"""The training side of the stream: this rank's part of every global batch, asked for ahead and assembled.

The whole state is the number of the next step. `blocks` is the one way to the data-shard workers: (lane, number) ->
something that `wait` turns into a Block. Under Ray that is an actor call and its reference; tests pass a plain
DataWorker.
"""

from __future__ import annotations

import functools
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from sigray.losses.spans import span
from sigray.workers.data.buffers import PageLock, Place, SharedBuffer
from sigray.workers.data.label_noise import Noise
from sigray.workers.data.order import StreamOrder
from sigray.workers.data.tar import DataError
from sigray.workers.data.worker import Block, ImageKind


class BlockSource(Protocol):
    """Where decoded blocks come from."""

    @property
    def shares_memory(self) -> bool:
        """Whether there is any use in telling places."""

    def request(self, lane: int, number: int, places: Sequence[Place] = ()) -> Any:
        """Ask for a block and return at once with a handle.

        Args:
            places: where its images shall be written, by whom this memory is in reach of.
        """

    def wait(self, lane: int, number: int, handle: Any) -> Block:
        """The block behind a handle of `request`."""


@dataclass
class Batch:
    """This rank's part of the global batch of `step`."""

    step: int
    images: torch.Tensor  # (b, S, S, 3) uint8; of a store (b, D) floats
    tokens: torch.Tensor  # (b, T) int32
    samples: np.ndarray  # (b, 3) int64: epoch, shard in the manifest, index in the shard
    keys: list[str]  # of the pairs that stand in the rows
    replaced: np.ndarray  # (b,) bool: another pair stands in the place of the row's own sample


def as_tensor(images: np.ndarray) -> torch.Tensor:
    """Images or embeddings as a block holds them, without a copy; its uint16 are the bits of bfloat16."""
    tensor = torch.from_numpy(images)
    return tensor.view(torch.bfloat16) if images.dtype == np.uint16 else tensor


class _Buffers:
    """Memory for batches that is used again once nobody holds the batch.

    The first touch of a page costs as much as copying it, and page-locked memory costs a system call.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, page_lock: PageLock | None) -> None:
        self._new = functools.partial(SharedBuffer, shape, dtype, page_lock)
        self._delivered: list[SharedBuffer] = []

    def take(self) -> SharedBuffer:
        """For a batch, contents undefined."""
        for place, buffer in enumerate(self._delivered):
            # The buffer itself and the call; a tensor made of the array, or a view of it, would be one more.
            if sys.getrefcount(buffer.array) == 2:
                return self._delivered.pop(place)
        return self._new()

    def deliver(self, buffer: SharedBuffer) -> np.ndarray:
        """The batch, for somebody who holds it as long as it is needed."""
        self._delivered.append(buffer)
        return buffer.array


class _Piece(NamedTuple):
    """Rows [first, last) of a block, which begin at a row of a rank's part of a batch."""

    block: tuple[int, int]  # lane and number
    first: int
    last: int
    row: int


class Loader:
    """An iterator over this rank's batches from `first_step` to `last_step`.

    Args:
        order: of the run.
        source: of the blocks.
        image_kind: of the run's images.
        global_batch_size, block_size, prefetch_batches: as in the config.
        rank, world_size: of this training worker.
        first_step, last_step: the steps [first_step, last_step).
        max_bad_fraction: refused samples per sample read above which `DataError` is raised.
        page_lock: of the device, where it copies from page-locked memory, see `SharedBuffer`.
        noise: of the labels, where the run asks for it.

    Attributes:
        wait_s: seconds that the consumer has waited for batches so far.
        decode_s: seconds that data-shard workers have been busy with the blocks that came.
        refused: samples replaced so far, by reason.
    """

    def __init__(
        self,
        order: StreamOrder,
        source: BlockSource,
        *,
        image_kind: ImageKind,
        global_batch_size: int,
        block_size: int,
        rank: int,
        world_size: int,
        first_step: int,
        last_step: int,
        prefetch_batches: int,
        max_bad_fraction: float,
        page_lock: PageLock | None = None,
        noise: Noise | None = None,
    ) -> None:
        self.wait_s = self.decode_s = 0.0
        self.refused: Counter[str] = Counter()
        self.refused_keys: dict[str, str] = {}
        self._order, self._source = order, source
        self._global_batch_size, self._block_size = global_batch_size, block_size
        self._rank, self._world_size = rank, world_size
        self._steps = range(first_step, last_step)
        self._max_bad_fraction = max_bad_fraction
        # All lanes come to the end of a block at about the same step: what they are asked for ahead must reach into the
        # next block, or the data-shard workers have nothing to do between one round of blocks and the next.
        num_lanes = order.num_lanes * len(order.datasets)
        self._num_ahead = prefetch_batches + -(-block_size * num_lanes // global_batch_size)
        self._pins_memory = page_lock is not None
        self._free = _Buffers((global_batch_size // world_size, *image_kind.shape), image_kind.dtype, page_lock)
        self._buffers: dict[int, SharedBuffer] = {}  # of steps that blocks were asked for
        self._parts: dict[int, dict[tuple[int, int], _Piece]] = {}  # of those steps, see `_own`
        self._noise = noise
        self._takes_all = noise is not None and noise.moves_captions
        self._num_read = 0
        self._stop = threading.Event()
        self._ready: queue.Queue[Batch | Exception | None] = queue.Queue(maxsize=2)
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True)
        self._thread.start()

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
        """Batches that are assembled and not yet taken."""
        return self._ready.qsize()

    def close(self) -> None:
        """Stop asking for blocks. Safe to call at any time."""
        self._stop.set()

    def _produce(self) -> None:
        try:
            for batch in self._batches():
                if not self._put(batch):
                    return
            self._put(None)
        except Exception as error:  # handed to the training thread, which raises it
            self._put(error)

    def _put(self, item: Batch | Exception | None) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _pieces(self, step: int, rank: int, world_size: int) -> list[_Piece]:
        """A rank's part of a step, in the batch's order."""
        size, pieces, row = self._block_size, [], 0
        for part in self._order.rank_part(step, self._global_batch_size, rank, world_size):
            for number in range(part.start // size, -(-part.stop // size)):
                first, last = max(part.start - number * size, 0), min(part.stop - number * size, size)
                pieces.append(_Piece((part.lane, number), first, last, row))
                row += last - first
        return pieces

    def _own(self, step: int) -> dict[tuple[int, int], _Piece]:
        """The pieces of this rank's part of a step that is still to come, by block and in the batch's order."""
        if step not in self._parts:
            self._parts[step] = {piece.block: piece for piece in self._pieces(step, self._rank, self._world_size)}
        return self._parts[step]

    def _needed(self, step: int) -> Iterable[_Piece]:
        """The pieces of this rank's part; of the whole batch where captions come from anywhere in it."""
        if self._takes_all:
            return self._pieces(step, 0, 1)
        return self._own(step).values()

    def _batches(self) -> Iterator[Batch]:
        asked: dict[tuple[int, int], tuple[Any, list[SharedBuffer]]] = {}  # handles, and who is written to
        blocks: dict[tuple[int, int], Block] = {}
        asked_until = self._steps.start
        for step in self._steps:
            while asked_until < min(step + self._num_ahead, self._steps.stop):
                for piece in self._needed(asked_until):
                    if piece.block not in asked and piece.block not in blocks:
                        places, buffers = self._places(piece.block, asked_until)
                        asked[piece.block] = self._source.request(*piece.block, places), buffers
                asked_until += 1
            for piece in self._needed(step):
                if piece.block not in blocks:
                    handle, buffers = asked.pop(piece.block)
                    block = blocks[piece.block] = self._source.wait(*piece.block, handle)
                    if not block.has_straggler:
                        for buffer in buffers:
                            buffer.num_writers -= 1
                    self._count(block)
            yield self._assemble(step, blocks)
            for place in [place for place in blocks if self._is_past(*place, step + 1)]:
                del blocks[place]

    def _is_past(self, lane: int, number: int, step: int) -> bool:
        """Whether no batch from `step` on takes a sample of this block."""
        return (number + 1) * self._block_size <= self._order.next_index(lane, step, self._global_batch_size)

    def _places(self, block: tuple[int, int], step: int) -> tuple[list[Place], list[SharedBuffer]]:
        """Where the rows of a block belong in this rank's batches from `step` on, and those batches' memory."""
        # What all ranks ask for is decoded once, for all of them.
        if not self._source.shares_memory or (self._takes_all and self._world_size > 1):
            return [], []
        wanted: list[tuple[SharedBuffer, _Piece]] = []
        while step in self._steps and not self._is_past(*block, step):
            if block in self._own(step):
                wanted.append((self._buffer(step), self._own(step)[block]))
            step += 1
        places = [
            Place(buffer.address, piece.row, piece.first, piece.last - piece.first)
            for buffer, piece in wanted
            if buffer.address is not None
        ]
        if len(places) < len(wanted):  # all of them or none: the block comes with its images or without
            return [], []
        buffers = [buffer for buffer, _ in wanted]
        for buffer in buffers:
            buffer.num_writers += 1
        return places, buffers

    def _buffer(self, step: int) -> SharedBuffer:
        """The memory of the batch of a step that is still to come."""
        if step not in self._buffers:
            self._buffers[step] = self._free.take()
        return self._buffers[step]

    def _assemble(self, step: int, blocks: dict[tuple[int, int], Block]) -> Batch:
        def cut(name: str, pieces: Iterable[_Piece]) -> np.ndarray:
            return np.concatenate([getattr(blocks[piece.block], name)[piece.first : piece.last] for piece in pieces])

        buffer, own = self._buffer(step), list(self._own(step).values())
        del self._buffers[step], self._parts[step]
        if buffer.num_writers:  # somebody who is late may write there at any time
            late, buffer = buffer, self._free.take()
            buffer.array[...] = late.array
        images = self._free.deliver(buffer)
        for piece in own:
            rows = blocks[piece.block].images[piece.first : piece.last]
            if len(rows):
                images[piece.row : piece.row + len(rows)] = rows
        tokens, samples = cut("tokens", own), cut("samples", own)
        if self._noise is not None:
            if self._takes_all:
                whole = self._pieces(step, 0, 1)
                rows = self._noise.caption_rows(cut("samples", whole))
                tokens = cut("tokens", whole)[rows[self._rank * len(images) : (self._rank + 1) * len(images)]]
            self._noise.corrupt(samples, images, tokens)
        captions = torch.from_numpy(tokens)
        return Batch(
            step,
            as_tensor(images),
            captions.pin_memory() if self._pins_memory else captions,
            samples=samples,
            keys=[key for piece in own for key in blocks[piece.block].keys[piece.first : piece.last]],
            replaced=cut("replaced", own),
        )

    def _count(self, block: Block) -> None:
        self._num_read += len(block.samples)
        self.decode_s += block.decode_s
        self.refused.update(block.refused)
        for reason, key in block.refused_keys.items():
            self.refused_keys.setdefault(reason, key)
        num_refused = self.refused.total()
        # A rate needs a base: two bad samples in the first block say nothing yet.
        if num_refused > self._max_bad_fraction * max(self._num_read, 1024):
            table = "\n  ".join(
                f"{count} x {reason}, first {self.refused_keys[reason]}" for reason, count in self.refused.most_common()
            )
            raise DataError(
                f"{num_refused} of {self._num_read} samples refused, more than data.max_bad_fraction "
                f"{self._max_bad_fraction}:\n  {table}"
            )
