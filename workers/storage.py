"""A run's durable folder, on a local disk or in a store (`workers/stores.py`).

On a disk, a file is written beside its place, synced and renamed. In a store, an object appears whole when its upload
ends and is then durable. A file that several may write at once (lease, commit mark) is written by `write_if`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import xxhash

from sigray.workers.config import StoresConfig
from sigray.workers.stores import (
    StoreError,
    error_of,
    explained,
    kind_of,
    listed,
    open_store,
    shown_url,
    stat,
    within,
)
from sigray.workers.urls import is_remote, local_or_url

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_PIECE = 2**20  # bytes that are hashed and then written, while they are in the processor's cache
_PART_BYTES = 8 << 20  # of a read
_SENT_BYTES = 16 << 20  # S3 takes 10,000 parts of at least 5 MiB
_NUM_PARTS = 8  # sent or received at the same time: a store gives each connection 50 to 100 MB/s
# Until a store answers an upload nothing is read, so this is also the time for a part: 1 MB/s over all connections.
_STORES = StoresConfig(read_timeout_s=60)
_LIST_S = 100.0  # for the names in one folder, at 1,000 in 0.2 s
_PROBE = StoresConfig(read_timeout_s=4)  # a start waits for one retry


class StorageError(OSError):
    """A storage that cannot be used; the message names its path and the reason."""


def fingerprint(content: bytes | memoryview) -> dict[str, Any]:
    """Return {"bytes", "xxh3_128"} of a file's content."""
    return {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}


class ChangedError(StorageError):
    """A file has another version than the writer knew."""


class _HashedFile:
    """A writable file that counts and hashes its content; both release the GIL.

    Args:
        copies: whether the stream keeps what it is given. torch reuses its buffer after each write.
    """

    def __init__(self, stream: Any, copies: bool) -> None:
        self._stream, self._copies = stream, copies
        self._hash = xxhash.xxh3_128()
        self._num_bytes = 0
        self.refusal: Exception | None = None  # of the stream

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content).cast("B")
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            self._hash.update(piece)
            try:
                self._stream.write(bytes(piece) if self._copies else piece)
            except Exception as error:  # OSError, or a kind of obstore's
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
        uri: a local path, or s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX.

    Attributes:
        uri: the folder, absolute.

    Raises:
        StorageError: the URI cannot be parsed.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        text = os.fspath(uri)
        if "@" in text.partition("://")[2].partition("/")[0]:  # every message would show them
            raise StorageError("the URL of a storage holds credentials: give them by the environment, or by a role")
        if "://" in text and (found := re.search(r"[?#\s\x00-\x1f].*", text, re.DOTALL)):
            raise StorageError(
                f"the URL of a storage holds {found[0][:60]!r}: give scheme, bucket and prefix only; "
                "variables such as AWS_ENDPOINT_URL and AWS_REGION set endpoint and region"
            )
        try:
            place = local_or_url(text)
        except ValueError as error:
            raise StorageError(f"storage {error}") from None
        self.is_local = not is_remote(place)
        self.uri = place if self.is_local else place.rstrip("/")

    def check_writable(self) -> None:
        """Write, read and delete a small file.

        Raises:
            StorageError: with the store's reason.
        """
        probe = f".sigray-probe-{uuid.uuid4().hex}"
        try:
            if self.is_local:
                self.write(probe, b"sigray")
            else:
                store, key = open_store(self._at(probe), _PROBE, max_retries=1)
                with explained(self.uri, _PROBE):
                    store.put(key, b"sigray")
            self.delete(probe)
        except OSError as error:
            raise StorageError(f"{self.uri} is not writable: {error}") from error

    def write(self, path: str, content: bytes) -> None:
        """Replace one file atomically: a reader sees the old content or the new.

        The content is durable when this returns, so no commit mark survives a power loss without its files.
        """
        if not self.is_local:
            with self._store(path) as (store, key):
                store.put(key, content, chunk_size=_SENT_BYTES, max_concurrency=_NUM_PARTS)
            return
        final = self._at(path)
        self._make_folder(Path(final).parent)
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

    def read_version(self, path: str) -> tuple[bytes | None, Any]:
        """Return content and version of a file, for `write_if`; None, None without one."""
        try:
            if self.is_local:
                content = self.read(path)
                return content, content
            with self._store(path) as (store, key):
                found = store.get(key)
                return bytes(found.bytes()), _version(found.meta)
        except FileNotFoundError:
            return None, None

    def write_if(self, path: str, content: bytes, version: Any) -> None:
        """Replace a file if it still has this version.

        In a store this is one conditional put, of which the store carries out one of several. A disk has no such
        write: there the file is read and then replaced.

        Args:
            version: as `read_version` returns it; None: there must be no file.

        Raises:
            ChangedError: the file has another version.
        """
        if not self.is_local:
            try:
                with self._store(path) as (store, key):
                    store.put(key, content, mode=version or "create")
            except StoreError as error:
                if error.kind not in ("changed", "exists", "missing"):
                    raise
            else:
                return
        found, now = self.read_version(path)
        if self.is_local and now == version:
            self.write(path, content)
        elif found != content:  # else the answer to our own write was lost, and the write repeated
            raise ChangedError(f"{self.uri}/{path} was written by another process")

    def write_hashed(self, path: str, write: Callable[[Any], Any]) -> dict[str, Any]:
        """Write one file in pieces, durable at the end; returns its `fingerprint`.

        On a disk, a reader may see a part of the file before the end.

        Args:
            write: called with a file object to write to.
        """

        def write_to(stream: Any) -> dict[str, Any]:
            file = _HashedFile(stream, copies=not self.is_local)
            try:
                write(file)
            except RuntimeError as error:  # torch's writer hides the refusal: it complains about its own positions
                raise file.refusal or error from None
            return file.fingerprint()

        if not self.is_local:
            from obstore import open_writer

            with self._store(path) as (store, key):
                stream = open_writer(store, key, buffer_size=_SENT_BYTES, max_concurrency=_NUM_PARTS)
                try:
                    found = write_to(stream)
                    stream.close()  # not after an error: the object would appear
                except OSError as error:  # obstore's writer raises no kinds
                    raise error_of(self._at(path), kind_of(error), _STORES) from None
            return found
        final = self._at(path)
        self._make_folder(Path(final).parent)
        with open(final, "wb") as opened:
            found = write_to(opened)
            opened.flush()
            os.fsync(opened.fileno())
        _sync_folder(Path(final).parent)
        return found

    def read(self, path: str) -> bytes:
        """Return the content of one file.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        return Path(self._at(path)).read_bytes() if self.is_local else b"".join(_parts(self._at(path)))

    def exists(self, path: str) -> bool:
        return self.modified(path) is not None

    def modified(self, path: str) -> float | None:
        """Return when a file was last written (Unix time, s); None if there is none."""
        try:
            if self.is_local:
                return os.stat(self._at(path)).st_mtime
            with self._store(path) as (store, key):
                return store.head(key)["last_modified"].timestamp()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def walk(self) -> list[str]:
        """Return the paths of all files below the folder; a symlink counts as a file."""
        found = []
        if not self.is_local:
            with self._store() as (store, prefix):
                paths = {item["path"] for item in listed(store, prefix, self.uri, _STORES.deadline_s)}
            paths = {path[len(prefix) :].lstrip("/") for path in paths}
            # Consoles mark a folder by an empty object, whose name ends in a slash that obstore drops.
            return sorted(paths - {"", *(str(parent) for path in paths for parent in PurePosixPath(path).parents)})
        for folder, folders, names in os.walk(self.uri):
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            found += [os.path.join(folder, name) for name in [*names, *links]]
        return sorted(os.path.relpath(path, self.uri) for path in found)

    def list(self, path: str) -> list[str]:
        """Return the sorted names in a folder; empty if the folder does not exist."""
        if self.is_local:
            with contextlib.suppress(FileNotFoundError):
                return sorted(os.listdir(self._at(path)))
            return []
        with self._store(path) as (store, prefix):
            found = within(_LIST_S, lambda: store.list_with_delimiter(prefix or None), self._at(path))
        paths = {*found["common_prefixes"], *(item["path"] for item in found["objects"])} - {prefix}  # its own mark
        return sorted(each.rstrip("/").rpartition("/")[2] for each in paths)

    def delete_files(self, paths: Iterable[str]) -> None:
        """Delete files and symlinks, and the folders that are empty then."""
        if not self.is_local:
            with self._store() as (store, prefix):
                _delete(store, [f"{prefix}/{path}".lstrip("/") for path in paths])
            return
        for path in paths:
            os.unlink(self._at(path))
            for parent in list(Path(path).parents)[:-1]:
                with contextlib.suppress(OSError):  # it holds other files
                    os.rmdir(self._at(str(parent)))

    def remove_if_empty(self) -> None:
        """Delete the folder of a local storage if nothing is in it."""
        if self.is_local:
            with contextlib.suppress(OSError):
                os.rmdir(self.uri)

    def delete(self, path: str) -> None:
        """Delete a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            if self.is_local:
                os.unlink(self._at(path))
                return
            with self._store(path) as (store, key):
                store.delete(key)

    def delete_folder(self, path: str) -> None:
        if self.is_local:
            shutil.rmtree(self._at(path))
            return
        with self._store(path) as (store, prefix):
            _delete(store, [item["path"] for item in listed(store, prefix, self._at(path), _STORES.deadline_s)])

    def upload(self, local_file: Path, path: str) -> None:
        """Copy a local file into the folder."""
        if self.is_local:
            self.write(path, local_file.read_bytes())
            return
        with self._store(path) as (store, key):
            store.put(key, local_file, chunk_size=_SENT_BYTES, max_concurrency=_NUM_PARTS)

    def download(self, path: str, local_file: Path) -> None:
        """Copy a file to a local one."""
        if self.is_local:
            shutil.copyfile(self._at(path), local_file)
            return
        with local_file.open("wb") as file:
            file.writelines(_parts(self._at(path)))

    def _make_folder(self, folder: Path) -> None:
        """Make a folder, its name and those of its parents durable."""
        if folder.is_dir():
            return
        folder.mkdir(parents=True, exist_ok=True)
        for parent in folder.parents:
            _sync_folder(parent)
            if parent == Path(self.uri).parent:
                return

    @contextlib.contextmanager
    def _store(self, path: str = "") -> Iterator[tuple[ObjectStore, str]]:
        """Open the store with the key of a path; its errors are a `StoreError`."""
        url = self._at(path)
        with explained(url, _STORES):
            yield open_store(url, _STORES)

    def _at(self, path: str) -> str:
        return f"{self.uri}/{path}" if path else self.uri


def local_copy(place: str, key: str = "") -> Path:
    """Return a file of this machine: a path itself, or a copy of a URL's object.

    A copy is kept by the version of its object.

    Args:
        key: of the config, for errors.

    Raises:
        StoreError: the object is missing, or its store cannot be reached or refuses.
    """
    if not is_remote(place):
        return Path(place)
    try:
        found = stat(place)
    except StoreError as error:
        raise type(error)(f"{key}: {error}" if key else str(error), error.kind) from None
    cache = url_cache(f"{place} {found.etag} {found.num_bytes}")
    file = cache / shown_url(place).rpartition("/")[2]
    if not file.exists() or not found.etag:  # without an ETag, nothing tells whether the object is the same
        cache.mkdir(parents=True, exist_ok=True)
        part = cache / f"{uuid.uuid4().hex}.tmp"
        with part.open("wb") as opened:
            opened.writelines(_parts(place))
        part.replace(file)
    return file


def url_cache(key: str) -> Path:
    """Return the folder of this machine for the copy of a URL of one version."""
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "sigray", "urls", name)


def _parts(url: str) -> Iterator[Any]:
    """Yield the parts of one version of an object, some of which are received ahead."""
    with explained(url, _STORES):
        store, key = open_store(url, _STORES)
        found = store.get(key)
        size, etag = found.meta["size"], found.meta["e_tag"]
        if size <= _PART_BYTES:
            yield found.bytes()
            return
        del found

        def part(begin: int) -> Any:
            options: Any = {"range": (begin, min(begin + _PART_BYTES, size)), "if_match": etag}
            return store.get(key, options=options).bytes()

        starts = range(0, size, _PART_BYTES)
        with ThreadPoolExecutor(_NUM_PARTS) as pool:
            for first in range(0, len(starts), _NUM_PARTS):
                yield from pool.map(part, starts[first : first + _NUM_PARTS])


def _version(meta: Any) -> Any:
    """Return what a conditional put compares: an ETag, at Google also a generation."""
    return {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}


def _delete(store: ObjectStore, keys: list[str]) -> None:
    """Delete objects, of which some may be gone."""
    try:
        store.delete(keys)
    except FileNotFoundError:
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                store.delete(key)
