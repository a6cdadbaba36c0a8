"""Sample counts without a pass over the shards: from a cache or from sidecars.

A sidecar lies beside the tars: a wids index, img2dataset's `_stats.json` or `sizes.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sigray.workers.config import DataConfig, StoresConfig, caption_member
from sigray.workers.data.shard_list import ShardFile, in_threads
from sigray.workers.data.tar import BLOCK, LocalFile
from sigray.workers.parse import ParseError, as_type, parse_json
from sigray.workers.stores import read_object, shown_url
from sigray.workers.urls import is_remote

_WIDS_INDEX = ("index.json", "shardindex.json", "wids-meta.json")
_MAX_BYTES = 256 << 20  # of a sidecar or cache; a wids index of 200,000 shards has 40 MB


@dataclass(frozen=True)
class ShardCount:
    """Result of a pass over a shard's headers; a sidecar gives `num_samples` only."""

    num_samples: int
    marks: tuple[int, ...] = ()
    num_pairs: int = 0  # samples with an image and a caption member
    endings: tuple[str, ...] = ()
    links: tuple[tuple[int, int, int], ...] | None = None  # hard links: header, first byte and size of the content
    unusable: dict[str, int] = field(default_factory=dict, hash=False)  # members and samples by reason


def known_counts(files: list[ShardFile], data: DataConfig, rules: int) -> dict[ShardFile, ShardCount]:
    """Return the counts from this machine's cache, else from sidecars."""
    known: dict[ShardFile, ShardCount] = {}
    for folder, in_folder in _by_folder(files).items():
        known |= _cached_counts(in_folder, _read_json(str(_cache_path(folder, data, rules)), data.stores))
        if unknown := [file for file in in_folder if file not in known]:
            known |= _sidecar_counts(folder, unknown, data.stores)
    return known


def _by_folder(files: Iterable[ShardFile]) -> dict[str, list[ShardFile]]:
    folders: dict[str, list[ShardFile]] = {}
    for file in files:
        folders.setdefault(shown_url(file.url).rpartition("/")[0], []).append(file)
    return folders


def _cache_path(folder: str, data: DataConfig, rules: int) -> Path:
    """Return the cache file of a folder, the members that make a pair, and the rules."""
    members = [data.image_keys, [caption_member(source) for source in data.captions]]
    what = json.dumps([folder, *members, rules])
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "sigray", "shards", f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.json")


def _cache_key(file: ShardFile) -> str:
    return f"{file.url} {file.num_bytes} {file.fingerprint}"


def _cached_counts(files: list[ShardFile], cache: dict[str, Any]) -> dict[ShardFile, ShardCount]:
    found = {}
    for file in files:
        with suppress(ParseError, KeyError):  # a damaged entry: the shard is counted again
            found[file] = as_type(ShardCount, cache[_cache_key(file)])
    return found


def cache_counts(counts: dict[ShardFile, ShardCount], data: DataConfig, rules: int) -> None:
    """Cache the results of header passes; an unwritable cache is not an error."""
    for folder, files in _by_folder(counts).items():
        path = _cache_path(folder, data, rules)
        saved = _read_json(str(path), data.stores)
        entries = {_cache_key(file): asdict(counts[file]) for file in files if counts[file].endings}
        if entries.keys() <= saved.keys():
            continue
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
            temporary.write_text(json.dumps(saved | entries))
            temporary.replace(path)


def _sidecar_counts(folder: str, files: list[ShardFile], stores: StoresConfig) -> dict[ShardFile, ShardCount]:
    """Return counts from sidecars: wids index, sizes.json, NAME_stats.json.

    What cannot be a tar's count, and what sidecars disagree about, is left to a pass over the headers. Another wrong
    count is an error when the shard is read.
    """
    by_url = {file.url: file for file in files}
    told: dict[ShardFile, set[int]] = {}

    def note(name: Any, count: Any, num_bytes: Any = None) -> None:
        """Note the count of a tar; `name` is a URL, or relative to the folder."""
        file = by_url.get(str(name)) or by_url.get(f"{folder}/{str(name).removeprefix('./')}")
        if file is None or type(count) is not int or not 0 <= count <= file.num_bytes // BLOCK:
            return
        if num_bytes is None or num_bytes == file.num_bytes:
            told.setdefault(file, set()).add(count)

    for name in _WIDS_INDEX:
        entries = _read_json(f"{folder}/{name}", stores).get("shardlist")
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict):
                note(entry.get("url"), entry.get("nsamples"), entry.get("filesize"))
    for name, count in _read_json(f"{folder}/sizes.json", stores).items():
        note(name, count)
    unknown = {file.url: shown_url(file.url).removesuffix(".tar") + "_stats.json" for file in files if file not in told}
    # img2dataset writes a file for each tar: if the first tar has none, no tar has one.
    if unknown and "successes" in _read_json(next(iter(unknown.values())), stores):
        contents = in_threads(lambda url: _read_json(url, stores), list(unknown.values()))
        for url, content in zip(unknown, contents, strict=True):
            note(url, content.get("successes"))
    return {file: ShardCount(counts.pop()) for file, counts in told.items() if len(counts) == 1}


def _read_json(url: str, stores: StoresConfig) -> dict[str, Any]:
    """Read a small JSON object; {} if it is missing or damaged."""
    with suppress(OSError, ValueError):
        if is_remote(url):
            text = read_object(url, stores, _MAX_BYTES + 1)
        else:
            file = LocalFile(url)  # no FIFO, whose read would wait for ever
            text = file.read(min(file.num_bytes, _MAX_BYTES + 1))
        return as_type(dict[str, Any], parse_json(text, max_bytes=_MAX_BYTES))
    return {}
