"""A run's durable folder, on a local disk or in S3, over pyarrow's file systems.

pyarrow because Ray Train takes its storage as the same objects. pyarrow finds S3 credentials, region and endpoint in
the usual AWS variables (AWS_ENDPOINT_URL included).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import xxhash
from pyarrow import fs

from sigray.workers.urls import local_or_url

_PIECE = 2**20  # bytes that are hashed and then written, while they are in the processor's cache


class StorageError(OSError):
    """A storage that cannot be used; the message names its path and the reason."""


def fingerprint(content: bytes | memoryview) -> dict[str, Any]:
    """Return {"bytes", "xxh3_128"} of a file's content."""
    return {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}


class _HashedFile:
    """A writable file that counts and hashes its content; both release the GIL."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._hash = xxhash.xxh3_128()
        self._num_bytes = 0
        self.refusal: OSError | None = None  # of the stream

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content).cast("B")
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            self._hash.update(piece)
            try:
                self._stream.write(piece)
            except OSError as error:
                self.refusal = error
                raise
        self._num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        pass

    def fingerprint(self) -> dict[str, Any]:
        return {"bytes": self._num_bytes, "xxh3_128": self._hash.hexdigest()}


def _sync_folder(folder: Path) -> None:
    """Make the names in a local folder durable."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # the parent of a storage need not be readable
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


class Storage:
    """One folder, addressed by relative POSIX paths.

    Args:
        uri: a local path, or s3://BUCKET/PREFIX.

    Attributes:
        uri: the folder, absolute.
        filesystem, root: the same for pyarrow and Ray.

    Raises:
        StorageError: the URI cannot be parsed.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        text = os.fspath(uri)
        if "@" in text.partition("://")[2].partition("/")[0]:  # pyarrow would accept them, and every message show them
            raise StorageError("the URL of a storage holds credentials: give them by the environment, or by a role")
        if "://" in text and (found := re.search(r"[?#\s\x00-\x1f].*", text, re.DOTALL)):
            # pyarrow takes options from a query, endpoint_override too: a name in a config could choose the host.
            raise StorageError(
                f"the URL of a storage holds {found[0][:60]!r}: give scheme, bucket and prefix only; "
                "AWS_ENDPOINT_URL and AWS_REGION set endpoint and region"
            )
        try:
            place = local_or_url(text)
        except ValueError as error:
            raise StorageError(f"storage {error}") from None
        self.is_local = "://" not in place
        self.uri = place if self.is_local else place.rstrip("/")
        try:
            self.filesystem, self.root = fs.FileSystem.from_uri(self.uri)
        except (OSError, ValueError) as error:
            raise StorageError(f"{self.uri}: {error}") from error

    def check_writable(self) -> None:
        """Write, read and delete a small file.

        Raises:
            StorageError: with the store's reason.
        """
        probe = f".sigray-probe-{uuid.uuid4().hex}"
        try:
            self.write(probe, b"sigray")
            self.filesystem.delete_file(self._at(probe))
        except OSError as error:
            raise StorageError(f"{self.uri} is not writable: {error}") from error

    def write(self, path: str, content: bytes) -> None:
        """Replace one file atomically: a reader sees the old content or the new.

        The content is durable when this returns, so no commit mark survives a power loss without its files.
        """
        final = self._at(path)
        self._make_folder(Path(final).parent)
        if not self.is_local:  # an S3 object appears whole when its upload ends, and is then durable
            with self.filesystem.open_output_stream(final, compression=None) as stream:
                stream.write(content)
            return
        part = f"{final}.{uuid.uuid4().hex}.tmp"
        try:
            with open(part, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, final)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(part)
            error.filename = error.filename or final  # a write to a full disk names no file
            raise
        _sync_folder(Path(final).parent)

    def write_hashed(self, path: str, write: Callable[[Any], Any]) -> dict[str, Any]:
        """Write one file in pieces, durable at the end; returns its `fingerprint`.

        A reader may see a part of the file before the end.

        Args:
            write: called with a file object to write to.
        """
        final = self._at(path)
        self._make_folder(Path(final).parent)
        stream: AbstractContextManager[Any] = (
            open(final, "wb") if self.is_local else self.filesystem.open_output_stream(final, compression=None)  # noqa: SIM115
        )
        with stream as opened:
            file = _HashedFile(opened)
            try:
                write(file)
            except RuntimeError as error:  # torch's writer hides the OSError: it complains about its own positions
                raise file.refusal or error from None
            if self.is_local:
                opened.flush()
                os.fsync(opened.fileno())
        if self.is_local:
            _sync_folder(Path(final).parent)
        return file.fingerprint()

    def read(self, path: str) -> bytes:
        """Return the content of one file.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        with self.filesystem.open_input_stream(self._at(path), compression=None) as stream:
            return stream.read()

    def exists(self, path: str) -> bool:
        return self.filesystem.get_file_info(self._at(path)).type != fs.FileType.NotFound

    def modified(self, path: str) -> float | None:
        """Return when a file was last written (Unix time, s); None if there is none."""
        info = self.filesystem.get_file_info(self._at(path))
        return info.mtime_ns / 1e9 if info.mtime_ns is not None else None

    def walk(self) -> list[str]:
        """Return the paths of all files below the folder; a symlink counts as a file."""
        if not isinstance(self.filesystem, fs.LocalFileSystem):
            selector = fs.FileSelector(self.root, allow_not_found=True, recursive=True)
            found = [info.path for info in self.filesystem.get_file_info(selector) if info.type == fs.FileType.File]
        else:
            found = []
            for folder, folders, names in os.walk(self.root):
                links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
                found += [os.path.join(folder, name) for name in [*names, *links]]
        return sorted(os.path.relpath(path, self.root) for path in found)

    def list(self, path: str) -> list[str]:
        """Return the sorted names in a folder; empty if the folder does not exist."""
        selector = fs.FileSelector(self._at(path), allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def delete_files(self, paths: Iterable[str]) -> None:
        """Delete files and symlinks, and the folders that are empty then."""
        for path in paths:
            if not isinstance(self.filesystem, fs.LocalFileSystem):
                self.filesystem.delete_file(self._at(path))
                continue
            os.unlink(self._at(path))
            for parent in list(Path(path).parents)[:-1]:
                with contextlib.suppress(OSError):  # it holds other files
                    os.rmdir(self._at(str(parent)))

    def remove_if_empty(self) -> None:
        """Delete the folder of a local storage if nothing is in it."""
        if self.is_local:
            with contextlib.suppress(OSError):
                os.rmdir(self.root)

    def delete(self, path: str) -> None:
        """Delete a file, if it exists."""
        if self.exists(path):
            self.filesystem.delete_file(self._at(path))

    def delete_folder(self, path: str) -> None:
        self.filesystem.delete_dir(self._at(path))

    def upload(self, local_file: Path, path: str) -> None:
        """Copy a local file into the folder."""
        final = self._at(path)
        self._make_folder(Path(final).parent)
        fs.copy_files(str(local_file), final, destination_filesystem=self.filesystem)

    def download(self, path: str, local_file: Path) -> None:
        """Copy a file to a local one."""
        fs.copy_files(self._at(path), str(local_file), source_filesystem=self.filesystem)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder; on a disk, make its name and those of its parents durable."""
        if self.is_local and folder.is_dir():
            return
        self.filesystem.create_dir(str(folder), recursive=True)
        for parent in folder.parents if self.is_local else ():
            _sync_folder(parent)
            if parent == Path(self.root).parent:
                return

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root
