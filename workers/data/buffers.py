"""A batch's memory, into which data-shard workers on the same machine write what they decode.

    training worker     SharedBuffer    memory without a name in any file system, gone with its last process
    the question        Place           which rows of a block belong where in which buffer
    data-shard worker   Mappings        finds that memory by its address, or does not: another machine or container

What is found is certain to be the buffer meant: its name is drawn at random.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

PageLock = Callable[[mmap.mmap], bool]


@dataclass(frozen=True)
class Address:
    """Where a process finds a buffer: file descriptor `descriptor` of process `pid`, which shows `name`."""

    pid: int
    descriptor: int
    name: str
    num_bytes: int

    def is_there(self) -> bool:
        """Whether the buffer can be found there, as this process sees the machine."""
        return _shows(self.pid, self.descriptor, self.name)

    def open(self) -> int | None:
        """A descriptor of this process; None where the buffer is not there."""
        try:
            descriptor = os.open(f"/proc/{self.pid}/fd/{self.descriptor}", os.O_RDWR)
        except OSError:
            return None
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
    """Memory for a batch.

    Args:
        shape, dtype: of its rows together.
        page_lock: locks memory for a device as long as it lives, and says whether it could; None: not wanted.

    Attributes:
        array: the batch; contents undefined at first.
        address: None where the memory is this process's own: the system has no other, or it could not be locked.
        num_writers: answers that are due from whoever was told to write here. While there are any, the contents may
            change.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, page_lock: PageLock | None = None) -> None:
        self.num_writers = 0
        self.address: Address | None = None
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        whole, descriptor, name = None, None, f"sigray-{uuid.uuid4().hex}"
        with contextlib.suppress(AttributeError, OSError):  # no Linux; a sandbox that forbids it
            descriptor = os.memfd_create(name)
        if descriptor is not None:
            weakref.finalize(self, os.close, descriptor)
            os.ftruncate(descriptor, num_bytes)
            memory = mmap.mmap(descriptor, num_bytes)
            if page_lock is None or page_lock(memory):
                whole = np.frombuffer(memory, np.uint8)
                self.address = Address(os.getpid(), descriptor, name, num_bytes)
        if whole is None:
            whole = np.empty(num_bytes, np.uint8) if page_lock is None else _pinned(num_bytes)
        self.array = whole.view(dtype).reshape(shape)


def _pinned(num_bytes: int) -> np.ndarray:
    """Page-locked memory of torch's own."""
    import torch

    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()


class Mappings:
    """The buffers of training workers that this process has found so far."""

    def __init__(self) -> None:
        self._found: dict[Address, np.ndarray] = {}

    def rows(self, places: Sequence[Place], shape: tuple[int, ...], dtype: np.dtype) -> dict[int, np.ndarray] | None:
        """Where each row of a block belongs, by its number in the block; None where a buffer is not to be found.

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
            # Memory of training workers that are gone would stay for as long as somebody has it mapped.
            self._found = {known: whole for known, whole in self._found.items() if known.is_there()}
            descriptor = address.open()
            if descriptor is None:
                return None
            try:
                self._found[address] = np.frombuffer(mmap.mmap(descriptor, address.num_bytes), np.uint8)
            except OSError:  # no memory, or too many mappings
                return None
            finally:
                os.close(descriptor)
        return self._found[address]
