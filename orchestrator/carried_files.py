"""Files that a job carries and its run keeps, each below the hash of its content.

A config names such a file by its place in the job's folder, which Ray deletes after the job. The storage of a run or
sweep keeps a copy, so its config can be used again from any machine.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
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

    def keep(text: str, name: str) -> str:
        if Path(text).is_file() and not storage.exists(name):
            storage.write(name, Path(text).read_bytes())
        return text

    _replace_carried(content, keep)


def find_carried(content: Any, open_storage: Callable[[], Storage]) -> Any:
    """Return a config that names each carried file by a place on this machine.

    A job's own folder comes first, so a resubmission names the same paths. A file of the storage is cached.
    """

    def find(text: str, name: str) -> str:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "sigray", name)
        places = [Path(name).absolute(), Path(text), cache]
        if not any(place.exists() for place in places) and (storage := open_storage()).exists(name):
            data = storage.read(name)
            if carried_name(data, cache.name) != name:
                raise ValueError(f"{storage.uri}/{name} has another content than its name says: it was replaced")
            from sigray.workers.storage import Storage

            Storage(cache.parent).write(cache.name, data)
        return next((str(place) for place in places if place.exists()), text)

    return _replace_carried(content, find)


def _replace_carried(content: Any, act: Callable[[str, str], str]) -> Any:
    """Return a config with act(text, name) for each text that names a carried file."""
    if isinstance(content, dict):
        return {key: _replace_carried(value, act) for key, value in content.items()}
    if isinstance(content, list):
        return [_replace_carried(value, act) for value in content]
    match = _CARRIED.search(content) if isinstance(content, str) else None
    return act(content, match[1]) if match else content
