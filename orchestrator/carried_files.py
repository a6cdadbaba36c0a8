"""Files that a job carries and its run keeps, each below the hash of its content.

A config names such a file by its place in the job's folder, which Ray deletes after the job. The storage of a run or
sweep keeps a copy, so its config can be used again from any machine.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sigray.workers.storage import Storage

FILES = "sigray-files"  # folder of the carried files
_CARRIED = re.compile(rf"(?:^|/)({FILES}/([0-9a-f]{{16}})/(?!\.\.?$)[^/]+)$")


def carried_name(content: bytes, name: str) -> str:
    """Return the place of a file in the folder of a job or a run."""
    return f"{FILES}/{hashlib.sha256(content).hexdigest()[:16]}/{name}"


def keep_carried(content: Any, storage: Storage) -> None:
    """Copy the carried files that a config names beside the config."""
    for text, match in _named(content):
        if Path(text).is_file() and not storage.exists(match[1]):
            storage.write(match[1], Path(text).read_bytes())


def find_carried(content: Any, open_storage: Callable[[], Storage]) -> Any:
    """Return a config that names each carried file by a place on this machine.

    A job's own folder comes first, so a resubmission names the same paths. A file of the storage is cached.
    """
    found = {}
    for text, match in _named(content):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "sigray", match[1])
        places = [Path(match[1]).absolute(), Path(text), cache]
        if not any(place.exists() for place in places) and (storage := open_storage()).exists(match[1]):
            data = storage.read(match[1])
            if carried_name(data, cache.name) != match[1]:
                raise ValueError(f"{storage.uri}/{match[1]} has another content than its name says: it was replaced")
            cache.parent.mkdir(parents=True, exist_ok=True)
            part = cache.with_name(f".{cache.name}.{os.getpid()}")
            part.write_bytes(data)
            part.replace(cache)
        found[text] = next((str(place) for place in places if place.exists()), text)
    return _replaced(content, found)


def _named(content: Any) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield the texts in a nested mapping that name a carried file."""
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _named(value)
    elif isinstance(content, str) and (match := _CARRIED.search(content)):
        yield content, match


def _replaced(content: Any, texts: dict[str, str]) -> Any:
    if isinstance(content, dict):
        return {key: _replaced(value, texts) for key, value in content.items()}
    if isinstance(content, list):
        return [_replaced(value, texts) for value in content]
    return texts.get(content, content) if isinstance(content, str) else content
