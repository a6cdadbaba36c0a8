"""The memory of batches, shared with the data-shard workers on the same machine.

    training worker     BufferPool     the buffers of a loader: memory without a name in any file system
    request             Place          which rows of a block belong where in which buffer
    data-shard worker   Mappings       finds a buffer by its address, or does not: another machine or container

The name of a buffer is drawn at random, so the memory found at an address is always the buffer meant. The states of a
buffer, each with its only writers:

    state      begins with                            who may write                          may become
    free       new memory, or the last view gone      no process                             filling
    filling    a step that takes the buffer           `num_writers` data-shard workers       complete, abandoned
    complete   the last writer's answer               the loader: rows by value, noise       held
    held       the delivery of the batch              the consumer                           released
    released   `Batch.release`                        no process; tensors may view it        free
    abandoned  a copy, because a backup request won   the straggler, at any time             nothing

Memory is written again after two events: the consumer has released the batch, and the last view of it is gone. Release
alone is not enough. A copy from page-locked memory to CUDA and a transfer of torch-xla end after the step that began
them, and both keep a tensor. A slice that a caller keeps is a view too, so its contents stay. The last view alone would
need one buffer more: the consumer's loop holds a batch until the next one arrives. A batch that is never released keeps
its memory to itself, and both are freed together.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

PageLock = Callable[[mmap.mmap], bool]
State = Literal["free", "filling", "complete", "held", "released", "abandoned"]
_NEXT: dict[State, tuple[State, ...]] = {
    "free": ("filling",),
    "filling": ("complete", "abandoned"),
    "complete": ("held",),
    "held": ("released",),
    "released": ("free",),
    "abandoned": (),
}


@dataclass(frozen=True)
class Address:
    """Where a process finds a buffer: this file descriptor of process `pid`."""

    pid: int
    descriptor: int
    name: str
    num_bytes: int

    def is_there(self) -> bool:
        """Whether this process can find the buffer there."""
        return _shows(self.pid, self.descriptor, self.name)

    def open(self) -> int | None:
        """Return a descriptor of this process; None if the buffer is not there."""
        with contextlib.suppress(OSError):
            descriptor = os.open(f"/proc/{self.pid}/fd/{self.descriptor}", os.O_RDWR)
            if _shows(os.getpid(), descriptor, self.name):
                return descriptor
            os.close(descriptor)
        return None


def _shows(pid: int, descriptor: int, name: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{descriptor}") == f"/memfd:{name} (deleted)"
    except OSError:
        return False


@dataclass(frozen=True)
class Place:
    """Rows [first, first + count) of a block belong at [row, row + count) of a buffer."""

    address: Address
    row: int
    first: int
    count: int


class SharedBuffer:
    """Memory for a batch, and its state.

    Args:
        shape, dtype: of the batch.
        page_lock: locks memory for a device until it is freed, and returns whether it could; None: not wanted.

    Attributes:
        state: see the table above.
        array: the batch, for the loader; contents undefined at first.
        address: None if no other process can write: the system has no such memory, or it could not be locked.
        num_writers: data-shard workers that received places here and have not answered.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, page_lock: PageLock | None = None) -> None:
        self.state: State = "free"
        self.num_writers = 0
        self.address: Address | None = None
        self._shape, self._dtype = shape, dtype
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        memory: Any = None
        descriptor = None
        name = f"sigray-{uuid.uuid4().hex}"
        with contextlib.suppress(AttributeError, OSError):  # no Linux; a sandbox that forbids it
            descriptor = os.memfd_create(name)
        if descriptor is not None:
            weakref.finalize(self, os.close, descriptor)
            os.ftruncate(descriptor, num_bytes)
            shared = mmap.mmap(descriptor, num_bytes)
            if page_lock is None or page_lock(shared):
                memory = shared
                self.address = Address(os.getpid(), descriptor, name, num_bytes)
        if memory is None:
            memory = np.empty(num_bytes, np.uint8) if page_lock is None else _pinned(num_bytes)
        self._memory = memoryview(memory)
        self.array = self._view()

    def become(self, state: State) -> None:
        assert state in _NEXT[self.state], f"{state} after {self.state}"
        assert state not in ("complete", "abandoned") or (state == "complete") == (self.num_writers == 0), state
        self.state = state

    def add_writers(self, change: int) -> None:
        """Count a data-shard worker that received places here (1), or its answer (-1)."""
        assert self.state == "filling", self.state
        self.num_writers += change

    def hand_out(self) -> np.ndarray:
        """The batch, in a new array. `is_viewed` covers all that is made of it."""
        self.become("held")
        array = self._view()
        # What is made of an array refers to its base: this one's own, as `_memory` is no array and ends the search.
        self._base = weakref.ref(array.base)
        return array

    @property
    def is_viewed(self) -> bool:
        """Whether an array or a tensor of the batch handed out last is still there."""
        return self._base() is not None

    def _view(self) -> np.ndarray:
        return np.frombuffer(self._memory, np.uint8).view(self._dtype).reshape(self._shape)


class BufferPool:
    """The buffers of a loader.

    Memory is used again: the first touch of a page costs as much as copying it, and page-locked memory a system call.
    `release` is called by the consumer's thread, the rest by the loader's.

    Args:
        shape, dtype, page_lock: as `SharedBuffer`.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, page_lock: PageLock | None = None) -> None:
        self._shape, self._dtype, self._page_lock = shape, dtype, page_lock
        self._released: list[SharedBuffer] = []

    def take(self) -> SharedBuffer:
        """A buffer for a step, contents undefined."""
        buffer = next((buffer for buffer in self._released if not buffer.is_viewed), None)
        if buffer is None:
            buffer = SharedBuffer(self._shape, self._dtype, self._page_lock)
        else:
            self._released.remove(buffer)
            buffer.become("free")
        buffer.become("filling")
        return buffer

    def complete(self, buffer: SharedBuffer) -> SharedBuffer:
        """A buffer with these contents that no data-shard worker can change.

        If a backup request won, it is a copy: the straggler may still write to the old buffer.
        """
        if buffer.num_writers:
            copy = self.take()
            copy.array[...] = buffer.array
            buffer.become("abandoned")
            buffer = copy
        buffer.become("complete")
        return buffer

    def release(self, buffer: SharedBuffer) -> None:
        """Take a delivered buffer back. Once per batch."""
        buffer.become("released")
        self._released.append(buffer)


def _pinned(num_bytes: int) -> np.ndarray:
    """Page-locked memory that torch allocates."""
    import torch

    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()


class Mappings:
    """The buffers of training workers that this process has mapped."""

    def __init__(self) -> None:
        self._found: dict[Address, np.ndarray] = {}

    def rows(self, places: Sequence[Place], shape: tuple[int, ...], dtype: np.dtype) -> dict[int, np.ndarray] | None:
        """The memory of each row of a block, by number; None if a buffer is missing.

        Args:
            shape, dtype: of a row.
        """
        rows = {}
        for place in places:
            whole = self._open(place.address)
            if whole is None:
                return None
            batch = whole.view(dtype).reshape(-1, *shape)
            for number in range(place.count):
                rows[place.first + number] = batch[place.row + number]
        return rows

    def _open(self, address: Address) -> np.ndarray | None:
        if address not in self._found:
            # A mapping keeps the memory of a dead training worker.
            self._found = {known: whole for known, whole in self._found.items() if known.is_there()}
            descriptor = address.open()
            if descriptor is not None:
                with contextlib.suppress(OSError):  # no memory, or too many mappings
                    self._found[address] = np.frombuffer(mmap.mmap(descriptor, address.num_bytes), np.uint8)
                os.close(descriptor)
        return self._found.get(address)
