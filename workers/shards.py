"""Finding shards and knowing them: patterns to URLs, one header pass to a manifest, bytes back to samples.

The manifest (url, bytes, sample count, fingerprint of every shard) is what a run's order is computed from, so it is
made once, before anything is spent, and saved with the run; a shard that changed since is an error that names it.

Reading streams through webdataset's own tar iterator and grouping. What webdataset does not notice is checked here: a
tar that ends early, or whose header is damaged, makes `tarfile` (and all that is built on it) stop without a word.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from workers.config import DataConfig

_BLOCK = 512
_FILE_TYPES = b"0\0"


class DataError(ValueError):
    """Something in the user's data that the run cannot go on with; the message names the shard and the remedy."""


@dataclass(frozen=True)
class Shard:
    """One tar. `fingerprint` changes when its content does: the ETag in S3, else the modification time in ns."""

    url: str
    num_bytes: int
    num_samples: int
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """All shards of one data set, in the order of the patterns and, within each, by name."""

    shards: tuple[Shard, ...]

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        return {"shards": [asdict(shard) for shard in self.shards]}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Manifest:
        return cls(tuple(Shard(**shard) for shard in content["shards"]))

    def differences(self, now: Manifest) -> list[str]:
        """What changed in the shards since this manifest was made, one line each."""
        before, after = ({shard.url: shard for shard in manifest.shards} for manifest in (self, now))
        lines = [f"{url}: gone" for url in before if url not in after]
        lines += [f"{url}: new" for url in after if url not in before]
        lines += [f"{url}: content changed" for url in before if url in after and before[url] != after[url]]
        return lines


def list_shards(patterns: str | list[str], *, s3_endpoint: str | None = None) -> list[str]:
    """The URLs of all tars that the patterns name: absolute paths and s3:// URLs.

    Args:
        patterns: each a path, a glob, a brace pattern (`train-{000000..000127}.tar`), a folder, or an s3:// prefix.
        s3_endpoint: of an S3-compatible store; None: what boto3 finds in the environment.

    Raises:
        DataError: where a pattern names nothing, or two patterns name the same shard.
    """
    import braceexpand

    urls: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found: list[str] = []
        for name in braceexpand.braceexpand(pattern):
            if name.startswith("s3://"):
                found += [name] if name.endswith(".tar") else _list_s3(name, s3_endpoint)
            elif os.path.isdir(name):
                found += sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
            elif glob.has_magic(name):
                found += sorted(glob.glob(name))
            else:
                found.append(name)
        if not found:
            raise DataError(f"no shards: {pattern!r} names no .tar file; {_where(pattern)}")
        urls += [url if url.startswith("s3://") else os.path.abspath(url) for url in found]
    doubles = sorted({url for url in urls if urls.count(url) > 1}) if len(set(urls)) < len(urls) else []
    if doubles:
        raise DataError(f"{doubles[0]} is named twice by the patterns {patterns}: every shard must be named once")
    return urls


def scan_shards(
    patterns: str | list[str], data: DataConfig, progress: Callable[[int, int], None] = lambda done, total: None
) -> Manifest:
    """The manifest of the shards that the patterns name, read as a data section says.

    `progress(done, total)` is called before the first shard and after each.

    Raises:
        DataError: as `list_shards` and `build_manifest`.
    """
    return build_manifest(
        list_shards(patterns, s3_endpoint=data.s3_endpoint),
        image_keys=data.image_keys,
        caption_keys=data.caption_keys,
        s3_endpoint=data.s3_endpoint,
        progress=progress,
    )


def build_manifest(
    urls: Iterable[str],
    *,
    image_keys: list[str],
    caption_keys: list[str],
    s3_endpoint: str | None = None,
    num_threads: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Read every header of every shard once.

    Raises:
        DataError: for a shard that is missing, unreadable, damaged or cut short, all of them named in one message;
            and where no sample of the whole set has both an image and a caption.
    """
    urls = list(urls)
    shards: list[Shard] = []
    broken: list[str] = []
    num_pairs = 0
    endings_seen: set[str] = set()

    def scan(url: str) -> tuple[Shard, int, set[str]] | str:
        try:
            stream, num_bytes, fingerprint = open_shard(url, s3_endpoint=s3_endpoint)
            with stream:
                groups = [endings for _, endings in _group(read_headers(stream, num_bytes))]
        except (DataError, OSError) as error:
            return f"{url}: {_reason(error)}"
        pairs = sum(1 for e in groups if e.intersection(image_keys) and e.intersection(caption_keys))
        return Shard(url, num_bytes, len(groups), fingerprint), pairs, set().union(*groups)

    progress(0, len(urls))
    with ThreadPoolExecutor(num_threads) as pool:
        for done, result in enumerate(pool.map(scan, urls), start=1):
            if isinstance(result, str):
                broken.append(result)
            else:
                shards.append(result[0])
                num_pairs += result[1]
                endings_seen |= result[2]
            progress(done, len(urls))
    if broken:
        shown = "\n  ".join(broken[:20]) + (f"\n  and {len(broken) - 20} more" if len(broken) > 20 else "")
        raise DataError(f"{len(broken)} of {len(urls)} shards cannot be read:\n  {shown}")
    if not num_pairs:
        raise DataError(
            f"no usable pair in {len(urls)} shards ({urls[0]} first): a sample needs an image member "
            f"({', '.join(image_keys)}) and a caption member ({', '.join(caption_keys)}); members found end in "
            f"{', '.join(sorted(endings_seen)) or 'nothing'}. Set data.image_keys and data.caption_keys"
        )
    return Manifest(tuple(shards))


def open_shard(url: str, *, s3_endpoint: str | None = None) -> tuple[IO[bytes], int, str]:
    """A shard as (binary stream, bytes, fingerprint).

    Raises:
        OSError: where it cannot be opened, with the store's own reason.
    """
    if not url.startswith("s3://"):
        stream = open(url, "rb")  # noqa: SIM115 - the caller closes it
        status = os.fstat(stream.fileno())
        return stream, status.st_size, f"mtime-{status.st_mtime_ns}"
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split_s3_url(url)
    try:
        answer = s3_client(s3_endpoint).get_object(Bucket=bucket, Key=key)
    except (BotoCoreError, ClientError) as error:
        raise OSError(f"S3 says: {error}") from error
    return answer["Body"], answer["ContentLength"], f"etag-{answer['ETag'].strip(chr(34))}"


def read_samples(shard: Shard, *, start: int = 0, s3_endpoint: str | None = None) -> Iterator[dict[str, Any]]:
    """The samples of a shard from number `start` on, as webdataset gives them: `__key__` and bytes by ending.

    Raises:
        DataError: where the shard is not the one of the manifest any more, or yields fewer samples than it names.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        stream, num_bytes, fingerprint = open_shard(shard.url, s3_endpoint=s3_endpoint)
    except OSError as error:
        raise DataError(f"{shard.url}: {_reason(error)}, though it was there when the run began") from error
    with stream:
        if (num_bytes, fingerprint) != (shard.num_bytes, shard.fingerprint):
            raise DataError(
                f"{shard.url} changed since the run's manifest was made ({shard.num_bytes} bytes, {shard.fingerprint}; "
                f"now {num_bytes} bytes, {fingerprint}): put the old shard back, or start a new run on the new data"
            )
        first = 0
        if start and stream.seekable():
            # Headers alone are ten times cheaper than webdataset's reading, and a tar cut at a header is a tar.
            first = start
            positions = (position for position, _ in _group(read_headers(stream, num_bytes)))
            stream.seek(next(itertools.islice(positions, start, None), num_bytes))
        files = tar_file_expander([{"url": shard.url, "stream": stream}])
        number = first - 1
        for number, sample in enumerate(group_by_keys(files), start=first):
            if number >= start:
                yield sample
    if number + 1 != shard.num_samples:
        raise DataError(f"{shard.url}: {number + 1} samples read, {shard.num_samples} in the manifest")


def read_headers(stream: IO[bytes], num_bytes: int) -> Iterator[tuple[int, str]]:
    """(first byte, name) of the regular members of a tar; every header's checksum and the archive's end are checked.

    Understands ustar, GNU long names and pax paths. Seeks over the data where the stream can.

    Raises:
        DataError: for a damaged header, and for a tar that ends before its two closing blocks.
    """
    position, first, long_name = 0, 0, None
    while True:
        header = _read_exactly(stream, _BLOCK, position)
        if header == bytes(_BLOCK):
            if _read_exactly(stream, _BLOCK, position + _BLOCK) != bytes(_BLOCK):
                raise DataError(f"damaged: one closing block instead of two at byte {position}")
            return
        try:
            stored, size = _number(header[148:156]), _number(header[124:136])
        except ValueError:
            stored, size = -1, 0
        if stored != sum(header) - sum(header[148:156]) + 8 * 0x20:
            raise DataError(f"damaged: no valid tar header at byte {position} of {num_bytes}")
        kind, padded = header[156:157], -(-size // _BLOCK) * _BLOCK
        position += _BLOCK
        if position + padded > num_bytes:
            raise DataError(f"cut short: a member of {size} bytes begins at byte {position} of {num_bytes}")
        if kind in b"Lx":
            extra = _read_exactly(stream, padded, position)[:size]
            if kind == b"L":
                long_name = extra.rstrip(b"\0").decode()
            else:
                path = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", extra)
                long_name = path.group(1).decode() if path else long_name
        else:
            if stream.seekable():
                stream.seek(padded, os.SEEK_CUR)
            else:
                _read_exactly(stream, padded, position)
            if kind in _FILE_TYPES:
                name, prefix = (part.rstrip(b"\0").split(b"\0")[0] for part in (header[:100], header[345:500]))
                is_ustar = header[257:263] == b"ustar\0"
                yield first, long_name or (prefix + b"/" + name if is_ustar and prefix else name).decode()
            long_name = None
            first = position + padded
        position += padded


def s3_client(endpoint: str | None) -> Any:
    """A boto3 client; path-style addresses where an endpoint is given, since stand-alone stores know no other."""
    import boto3
    from botocore.config import Config

    style = "path" if endpoint or os.environ.get("AWS_ENDPOINT_URL") else "auto"
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        config=Config(s3={"addressing_style": style}, retries={"max_attempts": 5, "mode": "standard"}),
    )


def split_s3_url(url: str) -> tuple[str, str]:
    """Bucket and key (or prefix) of an s3:// URL."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise DataError(f"{url!r} names no bucket: s3://BUCKET/PREFIX expected")
    return bucket, key


def _list_s3(url: str, endpoint: str | None) -> list[str]:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, prefix = split_s3_url(url)
    pages = s3_client(endpoint).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    try:
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
    except (BotoCoreError, ClientError) as error:
        raise DataError(f"{url} cannot be listed: {error}") from error
    return [f"s3://{bucket}/{key}" for key in sorted(keys) if key.endswith(".tar")]


def _group(members: Iterable[tuple[int, str]]) -> Iterator[tuple[int, set[str]]]:
    """Members grouped as webdataset groups them: neighbours with one key are a sample. Yields (first byte, endings)."""
    from webdataset.tariterators import base_plus_ext

    key, first, endings = None, 0, set[str]()
    for position, name in members:
        if re.match(r"__[^/]*__($|/)", name):
            continue
        prefix, ending = base_plus_ext(name)
        if prefix is None:
            continue
        if prefix != key:
            if key is not None:
                yield first, endings
            key, first, endings = prefix, position, set()
        endings.add(ending.lower())
    if key is not None:
        yield first, endings


def _read_exactly(stream: IO[bytes], count: int, position: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise DataError(f"cut short: ends at byte {position + len(content)} without a tar's closing blocks")
    return content


def _number(field: bytes) -> int:
    """A tar header's number: octal text, or base 256 where the first bit is set (GNU, sizes from 8 GiB on)."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
    return int(field.rstrip(b"\0 ") or b"0", 8)


def _reason(error: Exception) -> str:
    return f"{error.strerror.lower()}" if isinstance(error, OSError) and error.strerror else str(error)


def _where(pattern: str) -> str:
    """What there is at the fixed front part of a pattern that names nothing."""
    if pattern.startswith("s3://"):
        return "no object's key begins with that prefix and ends in .tar"
    folder = Path(re.split(r"[*?\[{]", pattern)[0]).absolute()
    folder = folder if folder.is_dir() else folder.parent
    return f"the folder {folder} {'exists' if folder.is_dir() else 'does not exist'}"
