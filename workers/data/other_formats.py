"""Call what is named .tar, and is no tar, what it is."""

from __future__ import annotations

import re
import shlex

# First bytes -> name, ending, command to unpack.
_COMPRESSED = {b"\x1f\x8b": ("gzip", "gz", "gunzip"), b"\x28\xb5\x2f\xfd": ("zstd", "zst", "zstd -d --rm")}
_COMPRESSED |= {b"BZh": ("bzip2", "bz2", "bunzip2"), b"\xfd7zXZ": ("xz", "xz", "unxz")}
_COMPRESSED |= {b"\x04\x22\x4d\x18": ("lz4", "lz4", "lz4 -d --rm")}
_OTHERS = {rb"version https://git-lfs": "a git-LFS pointer: run `git lfs pull`", rb"PK\x03\x04": "a zip archive"}
_OTHERS |= {rb"PAR1": "a Parquet file", rb"\s*<(!doctype )?html": "an HTML page: a download that was answered by one"}
_OTHERS |= {rb"\s*<": "XML: a download that was answered by a message?", rb"\s*[\[{][\s\"\[{\]}\d-]": "JSON"}
_OTHERS |= {rb"[\t\n\r -~\x80-\xff]+\Z": "plain text"}


def other_format(block: bytes, url: str) -> str | None:
    """Return what a file is by its first bytes, with the remedy; None: unknown."""
    name = shlex.quote(url.rpartition("/")[2])
    for magic, (kind, ending, command) in _COMPRESSED.items():
        if block.startswith(magic):
            return f"compressed with {kind}: unpack it with `mv {name} {name}.{ending} && {command} {name}.{ending}`"
    return next(
        (f"no tar but {kind}" for start, kind in _OTHERS.items() if re.match(start, block, re.IGNORECASE)), None
    )
