"""A run's durable folder: on a local disk or in S3, through one small interface over pyarrow's file systems.

pyarrow because Ray Train names its storage by the same objects; it finds S3 credentials, region and endpoint in the
usual AWS variables (AWS_ENDPOINT_URL included).
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import xxhash
from pyarrow import fs

_PIECE = 2**20  # bytes that are hashed, then written, while they are in the processor's cache


class StorageError(OSError):
    """A storage path that cannot be read or written; the message names it and the store's reason."""


def fingerprint(content: bytes | memoryview) -> dict[str, Any]:
    """{"bytes", "xxh3_128"} of a file's content."""
    return {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}


class _HashedFile:
    """A writable file that counts and hashes its content. Hashing and writing release Python's lock."""

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
    except PermissionError:  # what a storage lies in need not be readable
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
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
        StorageError: where the URI cannot be understood.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        text = os.fspath(uri)
        if "@" in text.partition("://")[2].partition("/")[0]:  # pyarrow would take them, and every message repeat them
            raise StorageError("the URL of a storage holds credentials: give them by the environment, or by a role")
        self.is_local = "://" not in text
        self.uri = os.path.abspath(text) if self.is_local else text.rstrip("/")
        try:
            if self.is_local:
                self.filesystem, self.root = fs.LocalFileSystem(), self.uri
            else:
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
        """Replace one file at once: a reader sees the old content or the new, never a part.

        The content is durable when this returns: a host that loses power finds no commit mark without its files.
        """
        final = self._at(path)
        self._make_folder(Path(final).parent)
        if not self.is_local:  # an object of S3 appears whole when its upload ends, and is durable then
            with self.filesystem.open_output_stream(final, compression=None) as stream:
                stream.write(content)
            return
        part = f"{final}.{uuid.uuid4().hex}.tmp"
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, final)
        _sync_folder(Path(final).parent)

    def write_hashed(self, path: str, write: Callable[[Any], Any]) -> dict[str, Any]:
        """Write one file piece by piece, not all at once: a reader may see a part of it. Durable at the end.

        Args:
            write: called with a file object to write to.

        Returns:
            The content's `fingerprint`.
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
            except RuntimeError as error:  # torch's writer raises one about its own positions instead
                raise file.refusal or error from None
            if self.is_local:
                opened.flush()
                os.fsync(opened.fileno())
        if self.is_local:
            _sync_folder(Path(final).parent)
        return file.fingerprint()

    def read(self, path: str) -> bytes:
        """One file.

        Raises:
            FileNotFoundError: where there is none.
        """
        with self.filesystem.open_input_stream(self._at(path), compression=None) as stream:
            return stream.read()

    def exists(self, path: str) -> bool:
        return self.filesystem.get_file_info(self._at(path)).type != fs.FileType.NotFound

    def modified(self, path: str) -> float | None:
        """When a file was last written, in seconds of Unix time; None where there is none."""
        info = self.filesystem.get_file_info(self._at(path))
        return info.mtime_ns / 1e9 if info.mtime_ns is not None else None

    def list(self, path: str) -> list[str]:
        """Names of the files and folders in a folder, sorted; empty where the folder does not exist."""
        selector = fs.FileSelector(self._at(path), allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def delete(self, path: str) -> None:
        """Delete a file, if it is there."""
        if self.exists(path):
            self.filesystem.delete_file(self._at(path))

    def delete_folder(self, path: str) -> None:
        self.filesystem.delete_dir(self._at(path))

    def upload(self, local_file: Path, path: str) -> None:
        """Copy a local file in."""
        final = self._at(path)
        self.filesystem.create_dir(str(Path(final).parent), recursive=True)
        fs.copy_files(str(local_file), final, destination_filesystem=self.filesystem)

    def download(self, path: str, local_file: Path) -> None:
        """Copy a file out."""
        fs.copy_files(self._at(path), str(local_file), source_filesystem=self.filesystem)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder, if it is not there; on a disk its name is durable then, and those above it."""
        if self.is_local and folder.is_dir():
            return
        self.filesystem.create_dir(str(folder), recursive=True)
        for parent in folder.parents if self.is_local else ():
            _sync_folder(parent)
            if parent == Path(self.root).parent:
                return

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root
