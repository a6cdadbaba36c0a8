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
from typing import Any

from sigray.workers.storage import Storage

MAX_BYTES = 16 << 20  # parsed, it takes up to 21 times as much
MAX_NAMES = 10_000  # of a listing
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # NONBLOCK: a FIFO has no writer to wait for
Version = tuple[int, ...] | None


class LinkError(OSError):
    """A path with a symbolic link in it."""


class ForeignFolder(Storage):
    """A folder below a place, for one look.

    Args:
        place: a folder that the user named; it may be a link.
        name: the path below it, without `..`.
        places: all such folders.
        max_bytes: of a file; all files that the look reads may have four times as much.

    Attributes:
        seen: what the look has read or looked for, with the version.
    """

    def __init__(
        self, place: Storage, name: str = "", places: Sequence[Storage] = (), max_bytes: int = MAX_BYTES
    ) -> None:
        self._place, self._name = place, name
        self._places = places or [place]
        self.seen: dict[tuple[ForeignFolder, str], Version] = {}
        self.is_local, self.filesystem = place.is_local, place.filesystem
        self.uri, self.root = (f"{base}/{name}" if name else base for base in (place.uri, place.root))
        self._max_bytes = max_bytes
        self._left = 4 * max_bytes

    def below(self, name: str) -> ForeignFolder:
        """Return a folder inside of this folder."""
        return self._other(self._place, f"{self._name}/{name}" if self._name else name)

    def _other(self, place: Storage, name: str) -> ForeignFolder:
        other = ForeignFolder(place, name, self._places, self._max_bytes)
        other.seen = self.seen
        return other

    def at(self, uri: str) -> ForeignFolder | None:
        """Return the folder of a URI, unopened; None if it is below none of the places."""
        uri = uri if "://" in uri else os.path.abspath(uri)
        for place in self._places:
            inside = uri.removeprefix(f"{place.uri}/")
            if inside != uri and ".." not in inside.split("/"):
                return self._other(place, inside)
        return None

    def read(self, path: str, max_bytes: int | None = None) -> bytes:
        """Return the content of one regular file.

        Raises:
            FileNotFoundError: the file does not exist.
            LinkError: a part of the path is a link.
            OSError: it is no regular file, or larger than the bound.
        """
        # YAML takes 20 times as long to parse; a resolved config has 10 kB. A parser of JSON stops all threads, and the
        # list cannot wait 0.5 s for each file of 4 MiB.
        share = 64 if path.endswith(".yaml") else 4 if path.endswith(".json") and self._max_bytes < MAX_BYTES else 1
        max_bytes = max_bytes or self._max_bytes // share
        return self._read_end(path, max_bytes, must_fit=True)[0]

    def read_lines(self, path: str, max_bytes: int | None = None) -> tuple[list[bytes], int]:
        """Return the last lines of a file, and how many bytes before them are left out."""
        content, size = self._read_end(path, max_bytes or self._max_bytes)
        if size > len(content):
            content = content.partition(b"\n")[2]
        return content.splitlines(), size - len(content)

    def exists(self, path: str) -> bool:
        return self._note(path) is not None if self.is_local else super().exists(path)

    def modified(self, path: str) -> float | None:
        if not self.is_local:
            return super().modified(path)
        found = self._note(path)
        return found[-1] / 1e9 if found else None

    def is_changed(self) -> bool:
        """Return whether anything that the look has seen is different now."""
        return not self.is_local or any(folder._version(path) != was for (folder, path), was in self.seen.items())

    def num_bytes(self) -> int:
        """Return the bytes of the first files of a local folder."""
        if not self.is_local:
            return 0
        with self._opened("") as descriptor, os.scandir(descriptor) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in itertools.islice(entries, 100))

    def list(self, path: str) -> list[str]:
        """Return the sorted names in a folder, at most 10,000."""
        if not self.is_local:
            return super().list(path)[:MAX_NAMES]
        self._note(path)
        try:
            with self._opened(path) as descriptor, os.scandir(descriptor) as entries:
                return sorted(entry.name for entry in itertools.islice(entries, MAX_NAMES))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _read_end(self, path: str, max_bytes: int, must_fit: bool = False) -> tuple[bytes, int]:
        """Return the last bytes of a file, and its size."""
        with contextlib.ExitStack() as stack:
            file: Any
            if self.is_local:
                self._note(path)
                descriptor = stack.enter_context(self._opened(path))
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise OSError(f"{path} is no regular file")
                file = stack.enter_context(open(descriptor, "rb", buffering=0, closefd=False))
            else:
                file = stack.enter_context(self.filesystem.open_input_file(self._at(path)))
            size = file.seek(0, os.SEEK_END)
            if must_fit and size > max_bytes:
                raise OSError(f"{path} has {size:,} bytes; pages read at most {max_bytes:,}")
            begin = max(0, size - max_bytes)
            file.seek(begin)
            self._left -= size - begin
            if self._left < 0:
                raise OSError(f"{self.uri} holds more than {4 * self._max_bytes >> 20} MiB to read")
            return file.read(size - begin), size

    def _note(self, path: str) -> Version:
        return self.seen.setdefault((self, path), self._version(path))

    def _version(self, path: str) -> Version:
        """Return what changes with a file or folder, its time last; None if it is absent."""
        folder, _, name = f"/{path}".rpartition("/")
        try:
            with self._opened(folder if name != ".." else path) as descriptor:
                found = os.stat(name or ".", dir_fd=descriptor, follow_symlinks=False)
                return found.st_mode, found.st_ino, found.st_size, found.st_ctime_ns, found.st_mtime_ns
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
