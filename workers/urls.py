"""The places that a config may name: local paths and URLs of stores.

Every other kind of URL is refused by its name, before anything waits for it.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

STORES = ("s3", "gs", "az")
"""Schemes of stores that list, read and write."""
READ_ONLY = ("https", "http", "hf")
"""Schemes of stores that only read."""
URL = "s3://, gs:// or az://BUCKET/KEY"
_KIND = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::|:/?)")
_UNREADABLE = re.compile(r"^/|//|(^|/)\.\.?(/|$)|[\x00-\x1f]")
_NO_KEY = "a key with an empty part, '.', '..' or a control character is not read here: rename the object"
_MAX_SHOWN = 200  # characters of a place in a message


def is_remote(place: str) -> bool:
    """Return whether a checked place is a URL; a path is absolute by then."""
    return "://" in place and not place.startswith("/")


def local_or_url(text: str) -> str:
    """Return a place as an absolute path, or as a URL of a store that can be written.

    A relative path is made absolute at once: Ray starts its workers in another folder, and so may a resume.

    Raises:
        ValueError: the place is of another kind, is empty, or cannot be a name.
    """
    return _place(text, STORES)


def readable(text: str) -> str:
    """Return a place to read from: as `local_or_url`, and https:// and hf:// too."""
    return _place(text, (*STORES, *READ_ONLY))


def local_path(text: str) -> str:
    """Return a place as an absolute path; raises as `local_or_url`, also for s3://."""
    return _place(text, ())


def _place(text: str, schemes: tuple[str, ...]) -> str:
    expected = " or ".join(
        ["a local path", *([URL] if schemes else []), *(["https:// or hf://"] if "hf" in schemes else [])]
    )
    shown = repr(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}...")
    if not text:
        raise ValueError(f"is empty: give {expected}")
    if "\0" in text:
        raise ValueError(f"{shown} cannot be a name: it holds a NUL")
    if not is_utf8(text):
        raise ValueError(f"{shown} cannot be a name: it holds bytes that are no UTF-8")
    kind = _KIND.match(text)
    if kind is None or os.path.lexists(text):
        return os.path.abspath(text)
    rest = text[kind.end() :]
    if kind[2] == "://" and kind[1].lower() in schemes:
        if kind[1].lower() in STORES and _UNREADABLE.search(rest.partition("/")[2].rstrip("/")):
            raise ValueError(f"{shown}: {_NO_KEY}")
        return f"{kind[1].lower()}://{rest}"
    host, slash, path = rest.partition("/")
    if kind[0].lower() == "file://" and slash and host in ("", "localhost"):
        return os.path.abspath(unquote(f"/{path}"))
    local = "" if kind[2] == "://" else f"; a local file of that name is ./{text[:_MAX_SHOWN]}"
    raise ValueError(f"{shown}: {kind[0]} is not read here: give {expected}{local}")


def is_utf8(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair, which UTF-8 cannot hold."""
    return re.search("[\ud800-\udfff]", text) is None
