"""The places that a config may name: local paths and s3:// URLs.

Every other kind of URL is refused by its name, before anything waits for it.
"""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

_KIND = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::|:/?)")
_MAX_SHOWN = 200  # characters of a place in a message


def local_or_s3(text: str) -> str:
    """Return a place as an absolute path or an s3:// URL.

    A relative path is made absolute at once: Ray starts its workers in another folder, and so may a resume.

    Raises:
        ValueError: the place is of another kind, is empty, or cannot be a name.
    """
    return _place(text, allows_s3=True)


def local_path(text: str) -> str:
    """Return a place as an absolute path; raises as `local_or_s3`, also for s3://."""
    return _place(text, allows_s3=False)


def _place(text: str, *, allows_s3: bool) -> str:
    expected = "a local path or s3://BUCKET/KEY" if allows_s3 else "a local path"
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
    scheme = kind[1].lower() + kind[2]
    rest = text[kind.end() :]
    if scheme == "s3://" and allows_s3:
        return f"s3://{rest}"
    host, slash, path = rest.partition("/")
    if scheme == "file://" and slash and host in ("", "localhost"):
        return os.path.abspath(unquote(f"/{path}"))
    local = "" if kind[2] == "://" else f"; a local file of that name is ./{text[:_MAX_SHOWN]}"
    raise ValueError(f"{shown}: {kind[0]} is not read here: give {expected}{local}")


def is_utf8(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair, which UTF-8 cannot hold."""
    return re.search("[\ud800-\udfff]", text) is None
