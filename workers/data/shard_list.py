"""List shards: which tars the patterns of a config name.

    list_shards    patterns -> URLs, and the files whose sizes a listing named
    find_shards    patterns -> files

A name that exists is always itself, whatever brackets and braces it holds; only other names are patterns.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from sigray.workers.config import Patterns, StoresConfig
from sigray.workers.data.tar import DataError, check_is_file
from sigray.workers.stores import MissingError, ObjectInfo, StoreError, can_list, list_objects, stat
from sigray.workers.urls import is_remote, is_utf8

MAX_NAMES = 1_000_000  # that a pattern may list or expand to; LAION-5B is 232,000 tars with two sidecars each
_NUM_QUEUED = 10_000  # calls that wait for a thread; each takes a kilobyte
_MAX_DEPTH = 100  # of braces in braces
_MAGIC = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$")

Item = TypeVar("Item")


@dataclass(frozen=True)
class ShardFile:
    """A tar that exists, not yet counted."""

    url: str
    num_bytes: int
    fingerprint: str


ParallelMap = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]
"""(function, items) -> results in the items' order."""


def in_threads(function: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    """Map in threads of this process, as a `ParallelMap`."""
    with ThreadPoolExecutor(min(16, len(items) or 1)) as pool:
        for start in range(0, len(items), _NUM_QUEUED):
            yield from pool.map(function, items[start : start + _NUM_QUEUED])


def list_shards(patterns: Patterns, stores: StoresConfig, key: str = "data.shards") -> dict[str, ShardFile | None]:
    """Return the absolute paths and s3:// URLs of all tars that the patterns name.

    With each its file, None if no listing has named its size.

    Args:
        patterns: each a path, a folder, a glob or a brace pattern (`train-{000000..000127}.tar`), or one of these
            in a store.
        stores: settings for URLs.
        key: of the config, for errors.

    Raises:
        DataError: a pattern names nothing or too much, or two patterns name the same shard.
    """
    found: dict[str, ShardFile | None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            for url, file in _in_store(pattern, stores) if is_remote(pattern) else _in_folders(pattern):
                if not is_utf8(url):
                    raise DataError(f"{os.fsencode(url)!r}: the name is not UTF-8: rename the file")
                if url in found:
                    raise DataError(f"{url} is named twice by the patterns: every shard must be named once")
                if len(found) == MAX_NAMES:
                    raise _too_many(pattern)
                found[url] = file
        except (DataError, StoreError) as error:
            raise DataError(f"{key}: {error}") from error
    return found


def _in_folders(pattern: str) -> Iterator[tuple[str, None]]:
    """Yield the tars that a local pattern names."""
    for name in _expanded(os.path.abspath(pattern), lambda whole: os.path.lexists(whole) or any(_matches(whole))):
        if os.path.isdir(name):
            names = [os.path.join(name, tar) for tar in _tars_in(name, pattern)]
        elif os.path.lexists(name) or not _MAGIC.search(name):
            names = [name]
        else:
            names = sorted(_bounded(_matches(name), pattern))
        if not names:
            raise DataError(f"{pattern!r} names no .tar file; {_what_exists(name)}")
        yield from ((os.path.abspath(path), None) for path in names)


def _tars_in(folder: str, pattern: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            names = _bounded((entry.name for entry in entries), pattern)
            return sorted(name for name in names if name.endswith(".tar") and not name.startswith("."))
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {reason_of(error, folder)}") from error


def _matches(pattern: str) -> Iterator[str]:
    """Yield the paths that match a glob; leading folders that exist are no patterns."""
    folder = "/"
    parts = pattern.strip("/").split("/")
    while parts and os.path.lexists(os.path.join(folder, parts[0])):
        folder = os.path.join(folder, parts.pop(0))
    return glob.iglob(os.path.join(glob.escape(folder), *parts))


def _in_store(pattern: str, stores: StoresConfig) -> Iterator[tuple[str, ShardFile | None]]:
    """Yield the tars that a URL's pattern names; https:// and hf:// know braces only."""
    if not can_list(pattern):
        path = pattern.partition("?")[0]
        if not path.endswith(".tar") or _MAGIC.search(path):
            raise DataError(f"{path!r} cannot be listed: name the .tar files, by braces or as a list")
        yield from ((name, None) for name in _expanded(pattern, lambda name: False))
        return

    def below(name: str) -> list[ObjectInfo]:
        """Return the tars in a folder: s3://b/train has none of train_old's."""
        infos = _bounded(list_objects(f"{name.removesuffix('/')}/", stores), pattern)
        return [info for info in infos if info.url.endswith(".tar")]

    def exists(name: str) -> bool:
        if re.search(r"[*?\[{]", name.split("/")[2]):  # of a bucket
            return False
        with suppress(MissingError):
            return stat(name, stores).url == name
        return bool(below(name))

    def matches(name: str) -> list[ObjectInfo]:
        fixed = _MAGIC.split(name)[0]
        parts = name.split("/")
        if fixed.count("/") < 3:
            raise DataError(f"{pattern!r} names no bucket: SCHEME://BUCKET/PATTERN expected")
        infos = _bounded(list_objects(fixed, stores, is_flat="/" not in name[len(fixed) :]), pattern)
        keys = ((info, info.url.split("/")) for info in infos if info.num_bytes or info.url.endswith(".tar"))
        return [info for info, key in keys if len(key) == len(parts) and all(map(fnmatchcase, key, parts))]

    for name in _expanded(pattern, exists):
        is_glob = _MAGIC.search(name) is not None and not exists(name)
        if name.endswith(".tar") and not is_glob:
            yield name, None
            continue
        infos = matches(name) if is_glob else below(name)
        if not infos:
            front = _MAGIC.split(name)[0] if is_glob else name
            first = next((info.url for info in list_objects(front, stores)), None)
            raise DataError(f"{pattern!r} names no object that ends in .tar; {_what_begins(front, first)}")
        for info in sorted(infos, key=lambda info: info.url):
            yield info.url, ShardFile(info.url, info.num_bytes, f"etag-{info.etag}")


def _expanded(pattern: str, exists: Callable[[str], bool]) -> Iterable[str]:
    """Return the names of a brace pattern; the pattern itself if it exists."""
    import braceexpand

    if "{" not in pattern or exists(pattern):
        return [pattern]
    try:
        if _num_names(pattern) <= MAX_NAMES:
            return braceexpand.braceexpand(pattern)
    except ValueError:  # unbalanced braces, a number of 5,000 digits
        return [pattern]
    raise _too_many(pattern)


def _num_names(pattern: str) -> int:
    """Return the number of names of a brace pattern, without the names."""

    def product(text: str) -> int:
        return math.prod(map(int, re.findall("\0(\\d+)\0", text)))

    def count(braces: re.Match[str]) -> str:
        number = sum(map(product, braces[1].split(",")))
        if ends := _RANGE.fullmatch(braces[1]):
            number = abs(int(ends[2]) - int(ends[1])) // (int(ends[3] or 1) or 1) + 1
        return f"\0{min(number, MAX_NAMES + 1)}\0"

    for _ in range(_MAX_DEPTH):
        pattern, num_found = _BRACES.subn(count, pattern)
        if not num_found:
            return product(pattern)
    return MAX_NAMES + 1


def _bounded(items: Iterable[Item], pattern: str) -> Iterator[Item]:
    for number, item in enumerate(items):
        if number == MAX_NAMES:
            raise _too_many(pattern)
        yield item


def _too_many(pattern: str) -> DataError:
    shown = repr(pattern if len(pattern) <= 200 else f"{pattern[:200]}...")
    return DataError(f"{shown} lists more than {MAX_NAMES:,} names: use a longer prefix or a smaller range")


def find_shards(patterns: Patterns, stores: StoresConfig, key: str, broken: list[str]) -> list[ShardFile]:
    """Return the files of `list_shards`; append what is missing to `broken`."""
    found = list_shards(patterns, stores, key)
    unknown = [url for url, file in found.items() if file is None]
    for url, result in zip(unknown, in_threads(lambda url: _stat(url, stores), unknown), strict=True):
        if isinstance(result, str):
            broken.append(f"{url}: {result}")
        else:
            found[url] = result
    return [file for file in found.values() if file is not None]


def _stat(url: str, stores: StoresConfig) -> ShardFile | str:
    try:
        if is_remote(url):
            info = stat(url, stores)
            return ShardFile(url, info.num_bytes, f"etag-{info.etag}")
        return stat_local(url)
    except FileNotFoundError as error:
        if os.path.islink(url):
            return f"is a symbolic link to {os.readlink(url)}, which does not exist"
        joined = "; give several patterns as a list, not joined by `::`" if "::" in url else ""
        return reason_of(error, url) + joined
    except (DataError, OSError) as error:
        return reason_of(error, url)


def stat_local(url: str) -> ShardFile:
    """Return a local tar's size and modification time.

    Raises:
        DataError: the name is a folder, a FIFO or a device.
        OSError: there is no such file.
    """
    status = os.stat(url)
    check_is_file(url, status)
    return ShardFile(url, status.st_size, f"mtime-{status.st_mtime_ns}")


def reason_of(error: Exception, url: str) -> str:
    """Return an error's text without the URL in front."""
    text = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
    return text.removeprefix(f"{url}: ")


def _what_exists(name: str) -> str:
    """Describe the folder of a local name that names nothing."""
    fixed = _MAGIC.split(name)[0]
    folder = name if os.path.isdir(name) else os.path.dirname(fixed) or "/"
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return f"the folder {folder} does not exist"
    except OSError as error:
        return f"the folder {folder} cannot be read: {reason_of(error, folder)}"
    if not names:
        return f"the folder {folder} exists and is empty"
    shown = next(filter(_COMPRESSED.search, names), names[0])
    return f"the folder {folder} exists and holds {len(names)} other names, as {_told(shown)}"


def _what_begins(prefix: str, first: str | None) -> str:
    """Describe the first key that begins with a URL's prefix."""
    if first is None:
        return "no object's key begins with that prefix"
    if first.startswith(f"{prefix.removesuffix('/')}/"):
        return f"that folder holds other names, as {_told(first)}"
    return f"no folder has that name, though {first} begins with it: for all of these, write {prefix}*"


def _told(name: str) -> str:
    remedy = ": unpack compressed tars, with gunzip or zstd -d" if _COMPRESSED.search(name) else ""
    return f"{name!r}{remedy}"
