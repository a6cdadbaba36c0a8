"""List shards: which tars the patterns of a config name.

list_shards    patterns -> URLs, and the files whose sizes a listing named
find_shards    patterns -> files
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sigray.workers.config import Patterns, S3Config
from sigray.workers.data.tar import DataError


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
        yield from pool.map(function, items)


def list_shards(patterns: Patterns, s3: S3Config) -> dict[str, ShardFile | None]:
    """Return the absolute paths and s3:// URLs of all tars that the patterns name.

    With each its file, None if no listing has named its size.

    Args:
        patterns: each a path, a glob, a brace pattern (`train-{000000..000127}.tar`), a folder, or an s3:// prefix.
        s3: settings for s3:// URLs.

    Raises:
        DataError: a pattern names nothing, or two patterns name the same shard.
    """
    import braceexpand

    found: dict[str, ShardFile | None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        of_pattern: list[tuple[str, ShardFile | None]] = []
        for name in braceexpand.braceexpand(pattern):
            if name.startswith("s3://") and not name.endswith(".tar"):
                from sigray.workers.data.s3 import list_objects

                tars = [info for info in list_objects(name, s3) if info.url.endswith(".tar")]
                of_pattern += [(i.url, ShardFile(i.url, i.num_bytes, f"etag-{i.etag}")) for i in tars]
            elif name.startswith("s3://"):
                of_pattern.append((name, None))
            else:
                if os.path.isdir(name):
                    names = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
                else:
                    names = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
                of_pattern += [(os.path.abspath(path), None) for path in names]
        if not of_pattern:
            raise DataError(f"no shards: {pattern!r} names no .tar file; {_what_exists(pattern)}")
        for url, file in of_pattern:
            if url in found:
                raise DataError(f"{url} is named twice by the patterns {patterns}: every shard must be named once")
            found[url] = file
    return found


def find_shards(patterns: Patterns, s3: S3Config, broken: list[str]) -> list[ShardFile]:
    """Return the tars that patterns name; append what is missing to `broken`."""
    found = list_shards(patterns, s3)
    unknown = [url for url, file in found.items() if file is None]
    for url, result in zip(unknown, in_threads(lambda url: _stat(url, s3), unknown), strict=True):
        if isinstance(result, str):
            broken.append(f"{url}: {result}")
        else:
            found[url] = result
    return [file for file in found.values() if file is not None]


def _stat(url: str, s3: S3Config) -> ShardFile | str:
    try:
        if url.startswith("s3://"):
            from sigray.workers.data.s3 import stat

            info = stat(url, s3)
            return ShardFile(url, info.num_bytes, f"etag-{info.etag}")
        return stat_local(url)
    except (DataError, OSError) as error:
        return reason_of(error, url)


def stat_local(url: str) -> ShardFile:
    """Return a local tar's size and modification time."""
    status = os.stat(url)
    return ShardFile(url, status.st_size, f"mtime-{status.st_mtime_ns}")


def reason_of(error: Exception, url: str) -> str:
    """Return an error's text without the URL in front."""
    text = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
    return text.removeprefix(f"{url}: ")


def _what_exists(pattern: str) -> str:
    """Describe the fixed front part of a pattern that names nothing."""
    if pattern.startswith("s3://"):
        return "no object's key begins with that prefix and ends in .tar"
    fixed = re.split(r"[*?\[{]", pattern)[0]
    folder = Path(fixed if fixed.endswith("/") or os.path.isdir(fixed) else os.path.dirname(fixed)).absolute()
    return f"the folder {folder} {'exists' if folder.is_dir() else 'does not exist'}"
