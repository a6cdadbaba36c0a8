"""A run's durable folder: on a local disk or in S3, through one small interface over pyarrow's file systems.

pyarrow because Ray Train names its storage by the same objects; it finds S3 credentials, region and endpoint in the
usual AWS variables (AWS_ENDPOINT_URL included).
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyarrow import fs

_PIECE = 8 * 2**20  # bytes that are hashed, then written, while they are in the cache


class StorageError(OSError):
    """A storage path that cannot be read or written; the message names it and the store's reason."""


class _HashedFile:
    """A file to write to that counts and hashes what passes. Both leave the interpreter to other threads meanwhile."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.num_bytes, self.hash = stream, 0, hashlib.sha256()

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content).cast("B")
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            self.hash.update(piece)
            self._stream.write(piece)
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        pass


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
        """Replace one file at once: a reader sees the old content or the new, never a part."""
        final = self._at(path)
        self.filesystem.create_dir(str(Path(final).parent), recursive=True)
        # An S3 object appears whole when its upload ends; a local file needs the rename.
        target = f"{final}.{uuid.uuid4().hex}.tmp" if self.is_local else final
        with self.filesystem.open_output_stream(target, compression=None) as stream:
            stream.write(content)
        if target != final:
            self.filesystem.move(target, final)

    def write_hashed(self, path: str, write: Callable[[Any], Any]) -> dict[str, Any]:
        """Write one file piece by piece, not all at once: a reader may see a part of it.

        Args:
            write: called with a file object to write to.

        Returns:
            {"bytes", "sha256"} of the content.
        """
        final = self._at(path)
        self.filesystem.create_dir(str(Path(final).parent), recursive=True)
        with self.filesystem.open_output_stream(final, compression=None) as stream:
            file = _HashedFile(stream)
            write(file)
        return {"bytes": file.num_bytes, "sha256": file.hash.hexdigest()}

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

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root
