"""A folder of local copies of objects, shared by the processes of a host."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sigray.workers.config import StoresConfig
from sigray.workers.data.store_stream import StoreStream
from sigray.workers.data.tar import DataError
from sigray.workers.stores import ObjectInfo


class ShardCache:
    """A folder of local copies of objects, shared by the processes of a host.

    Every change is made under a lock on the folder. Space is reserved before a download begins, so the folder never
    grows above `max_bytes`; the least recently used copies are evicted. A download holds a lock on its file: a file
    without a lock belongs to a dead process and is deleted.

    Args:
        folder: is made if it does not exist. Other files in it stay as they are.
        max_bytes: of all copies together.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes

    def path_of(self, info: ObjectInfo, stores: StoresConfig) -> Path:
        """Return the local copy of an object, and download it first if needed.

        Open the copy at once: another process may evict it. An open file stays readable after that; if the copy was
        evicted before it was opened, call this again.

        Raises:
            DataError: as `StoreStream.read`; the object is larger than the cache; the disk is full.
        """
        if info.num_bytes > self.max_bytes:
            raise DataError(
                f"{info.url} has {info.num_bytes} bytes, more than the whole shard cache {self.folder} may have "
                f"({self.max_bytes}): raise data.shard_cache_gib, or stream the shards with data.shard_cache=null"
            )
        path = self.folder / (hashlib.sha256(f"{info.url} {info.etag}".encode()).hexdigest()[:32] + ".tar")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                if self._touched(path, info.num_bytes):
                    return path
                with self._locked():
                    file = self._reserve(path, info.num_bytes)
                if file is None:
                    time.sleep(0.1)  # another process downloads it, or has reserved all the space
                    continue
                with file:
                    self._download(file, info, stores)
                    with self._locked():  # else another process might not count its bytes
                        os.replace(file.name, path)
                return path
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(
                    f"{info.url}: the disk of the shard cache {self.folder} is full: free some space or lower "
                    f"data.shard_cache_gib ({self.max_bytes / 2**30:.3g} now)"
                ) from error
            raise DataError(f"{info.url}: the shard cache {self.folder} cannot be used: {error}") from error

    def _download(self, file: IO[bytes], info: ObjectInfo, stores: StoresConfig) -> None:
        """Fill the reserved file; delete it on any error."""
        try:
            with contextlib.closing(StoreStream(info, stores)) as stream:
                for position in range(0, info.num_bytes, 1 << 20):
                    file.write(stream.read(min(1 << 20, info.num_bytes - position)))
            file.flush()
            os.fsync(file.fileno())  # else a copy may have the right size and zeros in it after a power loss
        except BaseException:
            os.unlink(file.name)
            raise

    def _touched(self, path: Path, num_bytes: int) -> bool:
        """Return whether the copy exists, and mark it as just used."""
        try:
            os.utime(path)
            return path.stat().st_size == num_bytes
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _reserve(self, path: Path, num_bytes: int) -> IO[bytes] | None:
        """Evict copies and return an open, locked file of that size; None: try later."""
        if self._touched(path, num_bytes):
            return None
        wanted = path.with_suffix(".part")
        copies: list[tuple[int, int, Path]] = []  # time of last use (ns), bytes, path
        num_used = 0
        for other in self.folder.iterdir():
            if not re.fullmatch(r"[0-9a-f]{32}\.(tar|part)", other.name):
                continue
            with contextlib.suppress(FileNotFoundError):  # a download failed meanwhile
                if other.suffix == ".part" and _is_abandoned(other):
                    other.unlink()
                    continue
                status = other.stat()
                num_used += status.st_size
                if other.suffix == ".tar":
                    copies.append((status.st_mtime_ns, status.st_size, other))
        if wanted.exists():
            return None
        copies.sort()
        if num_used - sum(size for _, size, _ in copies) + num_bytes > self.max_bytes:
            return None
        while num_used + num_bytes > self.max_bytes:
            _, size, oldest = copies.pop(0)
            oldest.unlink(missing_ok=True)
            num_used -= size
        file = open(wanted, "xb")  # noqa: SIM115 - the caller closes it
        fcntl.flock(file, fcntl.LOCK_EX)
        os.ftruncate(file.fileno(), num_bytes)
        return file


def _is_abandoned(path: Path) -> bool:
    """Return whether no process holds a lock on a file."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
