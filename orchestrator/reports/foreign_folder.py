"""Read run folders of unknown origin.

Pages and reports read a run through a `ForeignFolder`. No part of a path below the place may be a link, a file must be
a regular one, and bytes and names are bounded. A URI in a file reaches a storage only if it lies below one of the
places that the user named.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sigray.workers.storage import Storage

MAX_BYTES = 16 << 20  # of a file; parsed, it takes up to 21 times as much
MAX_NAMES = 10_000  # of a listing
# YAML takes 20 times as long to parse; a resolved config has 10 kB. The parser of JSON stops all threads.
_MAX_BYTES_OF = {".yaml": 256 << 10, ".json": 1 << 20}
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # NONBLOCK: a FIFO has no writer to wait for


class LinkError(OSError):
    """A path with a symbolic link in it."""


class ForeignFolder(Storage):
    """A folder below a place, for one look: all files that it reads may have 64 MiB.

    Args:
        place: a folder that the user named; it may be a link.
        name: the path below it, without `..`.
        places: all such folders.
    """

    def __init__(self, place: Storage, name: str = "", places: Sequence[Storage] = ()) -> None:
        self._place, self._name = place, name
        self._places = places or [place]
        self.is_local = place.is_local
        self.uri = f"{place.uri}/{name}" if name else place.uri
        self._left = 4 * MAX_BYTES

    def below(self, name: str) -> ForeignFolder:
        """Return a folder inside of this folder."""
        return ForeignFolder(self._place, f"{self._name}/{name}".lstrip("/"), self._places)

    def at(self, uri: str) -> ForeignFolder | None:
        """Return the folder of a URI, unopened; None if it is below none of the places."""
        uri = uri if "://" in uri else os.path.abspath(uri)
        for place in self._places:
            inside = uri.removeprefix(f"{place.uri}/")
            if inside != uri and ".." not in inside.split("/"):
                return ForeignFolder(place, inside, self._places)
        return None

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """Return the content of one regular file.

        Raises:
            FileNotFoundError: the file does not exist.
            LinkError: a part of the path is a link.
            OSError: it is no regular file, or larger than the bound.
        """
        limit = max_bytes or _MAX_BYTES_OF.get(Path(path).suffix, MAX_BYTES)
        return b"".join(self._read_pieces(path, limit, must_fit=True)[0])

    def read_lines(self, path: str, max_bytes: int = MAX_BYTES, num_pieces: int = 1) -> tuple[list[bytes], int]:
        """Return the last lines of a file, and how many bytes are left out.

        Args:
            num_pieces: of a longer file, so many pieces, evenly spread; the last one is its end. A line of which a
                piece has the beginning only is among the lines.
        """
        # A piece is a round trip if the place is a bucket.
        pieces, left_out = self._read_pieces(path, max_bytes, num_pieces if self.is_local else 1)
        if left_out:
            whole = [piece.partition(b"\n")[2] for piece in pieces]
            left_out += sum(map(len, pieces)) - sum(map(len, whole))
            pieces = whole
        return [line for piece in pieces for line in piece.splitlines()], left_out

    def exists(self, path: str) -> bool:
        return self._stat(path) is not None if self.is_local else super().exists(path)

    def modified(self, path: str) -> float | None:
        if not self.is_local:
            return super().modified(path)
        found = self._stat(path)
        return found.st_mtime if found else None

    def list(self, path: str) -> list[str]:
        """Return the sorted names in a folder, at most 10,000."""
        if not self.is_local:
            return super().list(path)[:MAX_NAMES]
        try:
            with self._opened(path) as descriptor, os.scandir(descriptor) as entries:
                return sorted(entry.name for entry in itertools.islice(entries, MAX_NAMES))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _read_pieces(
        self, path: str, max_bytes: int, num_pieces: int = 1, must_fit: bool = False
    ) -> tuple[Sequence[bytes], int]:
        """Return the ends of equal parts of a file, and how many bytes are left out."""
        with contextlib.ExitStack() as stack:
            file: Any
            if self.is_local:
                descriptor = stack.enter_context(self._opened(path))
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise OSError(f"{path} is no regular file")
                file = stack.enter_context(open(descriptor, "rb", buffering=0, closefd=False))
            else:
                from obstore import open_reader

                file = open_reader(*stack.enter_context(self._store(path)))
            size = file.seek(0, os.SEEK_END)
            if must_fit and size > max_bytes:
                raise OSError(f"{path} has {size:,} bytes; pages read at most {max_bytes:,}")
            self._left -= min(size, max_bytes)
            if self._left < 0:
                raise OSError(f"{self.uri} holds more than {4 * MAX_BYTES >> 20} MiB to read")
            if size <= max_bytes:
                num_pieces = 1
            pieces = []
            length = min(size, max_bytes) // num_pieces
            for number in range(1, num_pieces + 1):
                file.seek(size * number // num_pieces - length)
                pieces.append(bytes(file.read(length)))
            return pieces, size - length * num_pieces

    def _stat(self, path: str) -> os.stat_result | None:
        folder, _, name = f"/{path}".rpartition("/")
        try:
            with self._opened(folder if name != ".." else path) as descriptor:
                return os.stat(name or ".", dir_fd=descriptor, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError, LinkError):
            return None

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        """Open a path below the place, part by part."""
        parts = [part for part in f"{self._name}/{path}".split("/") if part]
        descriptor = os.open(self._place.uri, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in parts:
                if part == "..":
                    raise FileNotFoundError(errno.ENOENT, f"{path} leads out of its folder")
                inner = os.open(part, _FLAGS, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = inner
            yield descriptor
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise LinkError(f"{path or self._name} is a symbolic link, which pages do not follow") from None
            raise
        finally:
            os.close(descriptor)
