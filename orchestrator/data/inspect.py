"""Looking at data: what the shards hold, whether a run used each sample once, a tokenizer from the captions.

`inspect_data` reads the tars themselves and not what sidecars say of them, through the reader and the decoder of
training, so that what it calls broken is what training would refuse. A shard that cannot be used is a row of
`Inspection.problems` and never the end of the inspection. Every shard that is opened is read front to back: that alone
finds all damage and counts the samples; of its samples an even selection is decoded, or all of them.

`audit_table` shows `workers/training/ledger.py`'s proof. `train_caption_tokenizer` feeds `workers/model/tokenizer.py`.

Figures are kept as arrays of numbers, about 50 bytes per sample, so that `--all` can read a hundred million; the few
captions and keys that are shown are looked up again.
"""

from __future__ import annotations

import base64
import bisect
import importlib.resources
import io
import os
import re
import statistics
import threading
import time
import uuid
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sigray.orchestrator.config import ConfigError, RunConfig, load_config, override
from sigray.orchestrator.run.folder import RunFolder
from sigray.workers.config import DataConfig, ModelConfig, Patterns, TrainConfig
from sigray.workers.data.decode import Decoder, Refused, SampleRandom, captions_at, decode_pixels, sample_random
from sigray.workers.data.manifest import (
    ShardCount,
    ShardFile,
    caption_member,
    in_threads,
    is_pair,
    list_shards,
    read_samples,
    scan_shards,
)
from sigray.workers.data.order import StreamOrder
from sigray.workers.data.tar import ByteSource, DataError, MappedFile, TarSample, read_tar
from sigray.workers.data.worker import build_order
from sigray.workers.model.tokenizer import train_tokenizer
from sigray.workers.training.ledger import Audit, EpochAudit, audit

NUM_SAMPLES, MAX_S = 2000, 30.0
"""What is decoded, and how long it may take, where the user says nothing else."""
NUM_PICTURES = 48
PICTURE_PX = 224
"""Size that the sheet's images are decoded to: the inspection knows no model."""

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total)"""

_BROKEN_PER_REASON = 6  # in the sheet
_KEYS_PER_REASON = 3
_MARK_EVERY = 256
_MAX_ROWS = 20
_NBSP, _TIMES = "\u00a0", "\u00d7"
_MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
_OVERRIDE = re.compile(rf"({'|'.join(RunConfig.model_fields)})(\.[A-Za-z0-9_\-]+)+=")


# ---------------------------------------------------------------------------------------------- the data section


def data_section(words: list[str]) -> DataConfig:
    """The data section that a command line names.

    Args:
        words: patterns, or one run's CONFIG.yaml, and overrides as data.image_keys=[jpg].

    Raises:
        ConfigError: where they make no data section.
    """
    overrides = [word for word in words if _OVERRIDE.match(word)]
    patterns = [word for word in words if word not in overrides]
    if len(patterns) == 1 and patterns[0].endswith((".yaml", ".yml")):
        return load_config(patterns[0], overrides).data
    if foreign := [word for word in overrides if not word.startswith("data.")]:
        raise ConfigError(f"{foreign[0]!r}: only keys of the data section, as data.image_keys=[jpg]")
    if not patterns:
        raise ConfigError("give the shards: a path, a glob, a brace pattern, a folder, or s3://bucket/prefix")
    # The checks, and their messages, are those of a whole config; its other sections are of no account.
    whole = RunConfig.model_validate(
        {
            "run": {"name": "inspect"},
            "data": DataConfig(shards=patterns),
            "model": ModelConfig(name="ViT-B-16-SigLIP"),
            "train": TrainConfig(num_samples=1, global_batch_size=1),
        }
    )
    return override(whole, overrides, " ".join(["sigray data", *words])).data


def _patterns(data: DataConfig) -> list[str]:
    named: list[Patterns]
    named = [part.shards for part in data.shards.values()] if isinstance(data.shards, dict) else [data.shards]
    return [pattern for part in named for pattern in ([part] if isinstance(part, str) else part)]


# --------------------------------------------------------------------------------------------------------- look


@dataclass
class Captions:
    """What one source of data.captions holds; a sample may have several texts there."""

    num_present: int = 0  # samples with a usable text
    reasons: Counter[str] = field(default_factory=Counter)  # samples without, by reason
    num_characters: array[int] = field(default_factory=lambda: array("I"))  # per text
    num_words: array[int] = field(default_factory=lambda: array("I"))
    hashes: array[int] = field(default_factory=lambda: array("q"))
    places: array[int] = field(default_factory=lambda: array("q"))  # first byte of the sample


@dataclass
class Picture:
    """A sample in the sheet."""

    shard: str
    key: str
    reason: str  # why training refuses it, or empty
    jpeg_base64: str  # empty where the image cannot be decoded
    size: str  # of the image, in px, upright; of one that cannot be decoded, what it looks like
    captions: list[tuple[str, str]]  # source, text; what training would draw first


@dataclass
class ShardLook:
    """What was found in one shard."""

    url: str
    number: int  # in the order of the patterns
    num_bytes: int = 0
    num_bytes_read: int = 0
    problem: str = ""
    is_opened: bool = False
    is_whole: bool = False  # read to its end
    # Of all samples read.
    num_samples: int = 0
    num_pairs: int = 0
    marks: list[int] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)
    keys: bytes = b""  # compressed: they are nearly always numbers in a row
    key_hashes: array[int] = field(default_factory=lambda: array("q"))
    double_members: list[str] = field(default_factory=list)  # keys of samples with two members of one name
    # Of those that were decoded.
    num_decoded: int = 0
    formats: Counter[tuple[str, str]] = field(default_factory=Counter)  # (format, ending)
    heights: array[int] = field(default_factory=lambda: array("I"))
    widths: array[int] = field(default_factory=lambda: array("I"))
    image_bytes: array[int] = field(default_factory=lambda: array("I"))
    captions: dict[str, Captions] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    refused_keys: dict[str, list[str]] = field(default_factory=dict)  # the first of each reason
    pictures: list[Picture] = field(default_factory=list)
    broken: list[Picture] = field(default_factory=list)


@dataclass
class Inspection:
    """What was found in all shards.

    Attributes:
        problems: what is wrong with the data, as (shard or pattern, problem).
        seconds: that it took.
        is_over_time: the time was up before everything that was asked for had been read.
    """

    data: DataConfig
    looks: list[ShardLook]  # in the order of the patterns
    problems: list[tuple[str, str]]
    seconds: float
    is_over_time: bool

    @property
    def whole(self) -> list[ShardLook]:
        return [look for look in self.looks if look.is_whole]

    @property
    def num_samples(self) -> int:
        """Samples read."""
        return sum(look.num_samples for look in self.looks)

    @property
    def num_decoded(self) -> int:
        return sum(look.num_decoded for look in self.looks)

    def refused(self) -> tuple[Counter[str], dict[str, list[str]]]:
        """Samples that training would refuse by reason, and the first of each as (shard's name key)."""
        counts: Counter[str] = Counter()
        keys: dict[str, list[str]] = {}
        for look in self.looks:
            counts.update(look.refused)
            for reason, found in look.refused_keys.items():
                keys[reason] = (keys.get(reason, []) + found)[:_KEYS_PER_REASON]
        return counts, keys


def inspect_data(
    data: DataConfig,
    *,
    num_samples: int | None = NUM_SAMPLES,
    max_s: float | None = None,
    num_pictures: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> Inspection:
    """Read the shards of a data section and decode an even selection of their samples.

    Args:
        data: shards, keys, captions, crop, S3.
        num_samples: to decode, about, the same number from each shard; None: all.
        max_s: seconds after which reading stops; shards are opened in an order that is spread over all of them at any
            moment. None: it goes on to the end.
        num_pictures: samples that are decoded for the sheet, and some broken ones besides; 0: none at all.
        progress: called a few times a second, in shards, or in MB where everything is decoded.

    Raises:
        DataError: where no pattern names a shard.
    """
    begin = time.monotonic()
    problems: list[tuple[str, str]] = []
    urls = _list_all(data, problems)
    order = _spread(len(urls))
    looks = [ShardLook(url, number) for number, url in enumerate(urls)]
    if num_samples is None:
        for look, size in zip(looks, in_threads(lambda url: _size(url, data), urls), strict=True):
            look.num_bytes = size
    stop = threading.Event()
    decoder = Decoder(data, PICTURE_PX)

    def visit(rank: int) -> None:
        if not stop.is_set():
            wanted = None if num_samples is None else _share(num_samples, rank, len(urls))
            visitor = _Visitor(looks[order[rank]], data, decoder, stop, wanted, _share(num_pictures, rank, len(urls)))
            visitor.read(keep_broken=num_pictures > 0)

    def report() -> None:
        if num_samples is None:
            done, total = (sum(getattr(look, name) for look in looks) for name in ("num_bytes_read", "num_bytes"))
            progress("reading, MB", int(done / 1e6), max(1, int(total / 1e6)))
        else:
            progress("shards", sum(look.is_whole or bool(look.problem) for look in looks), len(looks))

    report()
    is_over_time = False
    with ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 1))) as pool:
        visits = [pool.submit(visit, rank) for rank in range(len(urls))]
        try:
            while wait(visits, timeout=0.2).not_done:
                report()
                if max_s is not None and time.monotonic() - begin > max_s and not stop.is_set():
                    is_over_time = True
                    stop.set()
        finally:
            stop.set()
    report()
    for visited in visits:
        visited.result()
    problems += [(look.url, look.problem) for look in looks if look.problem]
    result = Inspection(data, looks, problems, time.monotonic() - begin, is_over_time)
    problems += _what_training_says(result)
    return result


def _list_all(data: DataConfig, problems: list[tuple[str, str]]) -> list[str]:
    """The shards of all patterns, each once; patterns that name none go to `problems`."""
    found: Counter[str] = Counter()
    errors = []
    for pattern in _patterns(data):
        try:
            found.update(list_shards(pattern, data.s3))
        except DataError as error:
            errors.append(error)
            problems.append((pattern, str(error)))
    if not found:
        raise errors[0]
    problems += [(url, f"named {count} times by the patterns") for url, count in found.items() if count > 1]
    return list(found)


def _spread(count: int) -> list[int]:
    """The numbers below `count`, so ordered that each beginning of the list is spread evenly: 0, 4, 2, 6, 1, ..."""
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: f"{number:0{bits}b}"[::-1])


def _share(total: int, rank: int, count: int) -> int:
    return total // count + (rank < total % count)


def _open(url: str, data: DataConfig) -> ByteSource:
    if url.startswith("s3://"):
        from sigray.workers.data.s3 import S3Stream, stat

        return S3Stream(stat(url, data.s3), data.s3)
    return MappedFile(url)


def _size(url: str, data: DataConfig) -> int:
    """Bytes of a shard; 0 where it is not there, which is told when it is opened."""
    try:
        if url.startswith("s3://"):
            from sigray.workers.data.s3 import stat

            return stat(url, data.s3).num_bytes
        return os.path.getsize(url)
    except (DataError, OSError):
        return 0


class _Visitor:
    """Reads one shard.

    Args:
        look: where findings go.
        data, decoder: of the inspection.
        stop: the time is up.
        num_samples: to decode; None: all.
        num_pictures: for the sheet.
    """

    def __init__(
        self,
        look: ShardLook,
        data: DataConfig,
        decoder: Decoder,
        stop: threading.Event,
        num_samples: int | None,
        num_pictures: int,
    ) -> None:
        self._look, self._data, self._decoder, self._stop = look, data, decoder, stop
        self._num_samples, self._num_pictures = num_samples, num_pictures
        self._keep_broken = False
        look.captions = {source: Captions() for source in data.captions}

    def read(self, *, keep_broken: bool) -> None:
        """Front to back, until the end, a fault or the stop."""
        look, self._keep_broken = self._look, keep_broken
        keys: list[str] = []
        try:
            source = _open(look.url, self._data)
            try:
                look.is_opened, look.num_bytes = True, source.num_bytes
                for sample in read_tar(source):
                    if self._stop.is_set():
                        break
                    keys.append(sample.key)
                    self._count(sample)
                    if self._is_due(sample, self._num_samples, look.num_decoded):
                        self._decode(sample)
                    look.num_bytes_read = source.position
                else:
                    look.is_whole, look.num_bytes_read = True, look.num_bytes
            finally:
                source.close()
        except UnicodeDecodeError:
            look.problem = "damaged: a member's name is not UTF-8"
        except (DataError, OSError) as error:
            reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
            look.problem = reason.removeprefix(f"{look.url}: ")
        look.keys = zlib.compress("\0".join(keys).encode())

    def _is_due(self, sample: TarSample, wanted: int | None, num_had: int) -> bool:
        """Whether the next of `wanted` evenly spaced places in the file has been reached."""
        return wanted is None or (num_had < wanted and sample.position * wanted >= num_had * self._look.num_bytes)

    def _count(self, sample: TarSample) -> None:
        look = self._look
        if sample.index and sample.index % _MARK_EVERY == 0:
            look.marks.append(sample.position)
        look.num_samples += 1
        look.num_pairs += is_pair(sample, self._data)
        look.endings.update(sample.members.keys())
        look.key_hashes.append(hash(sample.key))
        if sample.has_duplicates:
            look.double_members.append(sample.key)

    def _decode(self, sample: TarSample) -> None:
        look = self._look
        look.num_decoded += 1
        is_captioned = self._count_captions(sample)
        # In the order in which a data-shard worker would meet them.
        reasons = ["duplicate key"] if sample.has_duplicates else []
        if not is_captioned:
            try:
                self._decoder.choose_caption(sample.members, None)
            except Refused as refused:
                reasons.append(str(refused))
        ending = next((ending for ending in self._data.image_keys if ending in sample.members), None)
        if ending is None:
            reasons.append("no image")
            size = "no image"
        else:
            content = sample.members[ending]
            kind = _format(bytes(content[:16]))
            look.formats[kind, ending] += 1
            look.image_bytes.append(len(content))
            try:
                height, width = decode_pixels(content, self._data.max_image_pixels).shape[:2]
            except Refused as refused:
                reasons.append(str(refused))
                size = f"{kind}, {len(content):,} bytes"
            else:
                look.heights.append(height)
                look.widths.append(width)
                size = f"{width}{_NBSP}{_TIMES}{_NBSP}{height}{_NBSP}px"
        for reason in reasons[:1]:
            look.refused[reason] += 1
            first = look.refused_keys.setdefault(reason, [])
            if len(first) < _KEYS_PER_REASON:
                first.append(f"{_name(look.url)} {sample.key}")
            if self._keep_broken and look.refused[reason] <= _BROKEN_PER_REASON:
                look.broken.append(self._picture(sample, reason, size))
        if not reasons and self._is_due(sample, self._num_pictures, len(look.pictures)):
            look.pictures.append(self._picture(sample, "", size))

    def _count_captions(self, sample: TarSample) -> bool:
        """Whether any source has one."""
        is_captioned = False
        for source, captions in self._look.captions.items():
            try:
                texts = captions_at(source, sample.members)
            except Refused as refused:
                captions.reasons[str(refused)] += 1
                continue
            is_captioned = True
            captions.num_present += 1
            for text in texts:
                captions.num_characters.append(len(text))
                captions.num_words.append(len(text.split()))
                captions.hashes.append(hash(text))
                captions.places.append(sample.position)
        return is_captioned

    def _picture(self, sample: TarSample, reason: str, size: str) -> Picture:
        random = sample_random(0, 0, self._look.number, sample.index)
        try:
            jpeg = _thumbnail(self._decoder, sample, random)
        except Refused:
            jpeg = ""
        captions = []
        for source in self._data.captions:
            try:
                captions += [(source, _shown(text, 400)) for text in captions_at(source, sample.members)[:4]]
            except Refused:
                continue
        if captions:
            drawn = _shown(self._decoder.choose_caption(sample.members, random), 400)
            captions.sort(key=lambda caption: caption[1] != drawn)
        return Picture(_name(self._look.url), sample.key, reason, jpeg, size, captions)


def _thumbnail(decoder: Decoder, sample: TarSample, random: SampleRandom) -> str:
    pixels = np.empty((PICTURE_PX, PICTURE_PX, 3), np.uint8)
    decoder.decode_image(sample.members, pixels, random)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=88)
    return base64.b64encode(content.getvalue()).decode()


def _format(begin: bytes) -> str:
    """What an image's first bytes say that it is."""
    for magic, name in _MAGIC.items():
        if begin.startswith(magic):
            return name
    if begin[:4] == b"RIFF" and begin[8:12] == b"WEBP":
        return "WebP"
    if begin[4:8] == b"ftyp":
        return begin[8:12].decode("ascii", "replace").upper()  # AVIF, HEIC
    if begin.lstrip()[:1] == b"<":
        return "HTML, XML or SVG"
    return "empty" if not begin else "unknown"


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def _shown(text: str, length: int) -> str:
    """A text of somebody else's as one printable line."""
    line = "".join(character if character.isprintable() else " " for character in text[: 4 * length])
    line = " ".join(line.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _what_training_says(found: Inspection) -> list[tuple[str, str]]:
    """Faults that are those of no single shard's bytes: wrong sidecars, no pair at all, too many broken samples."""
    problems = []
    if all(look.is_whole or look.problem for look in found.looks) and found.whole:
        by_url = {look.url: look for look in found.whole}

        def answers(header_pass: Callable[[Any], Any], files: list[ShardFile]) -> Iterator[Any]:
            # Every header has been read already.
            for file in files:
                look = by_url[file.url]
                is_known = file.num_bytes == look.num_bytes
                yield (
                    ShardCount(look.num_samples, tuple(look.marks), look.num_pairs, tuple(sorted(look.endings)))
                    if is_known
                    else header_pass(file)
                )

        try:
            manifest = scan_shards(list(by_url), found.data, parallel_map=answers)
        except DataError as error:
            problems.append(("all shards", str(error)))
        else:
            problems += [
                (
                    shard.url,
                    f"holds {by_url[shard.url].num_samples:,} samples, but a sidecar beside it (index.json, sizes.json "
                    f"or _stats.json) says {shard.num_samples:,}: training believes the sidecar; delete it",
                )
                for shard in manifest.shards
                if shard.num_samples != by_url[shard.url].num_samples
            ]
    num_refused = found.refused()[0].total()
    # The same base as the training side's (workers/data/loader.py).
    if num_refused > found.data.max_bad_fraction * max(found.num_decoded, 1024):
        problems.append(
            (
                "all shards",
                f"{num_refused:,} of {found.num_decoded:,} decoded samples are broken, more than "
                f"data.max_bad_fraction={found.data.max_bad_fraction}: training would stop",
            )
        )
    return problems


# --------------------------------------------------------------------------------------------------------- show


def inspection_tables(found: Inspection) -> Group:
    """All that was found, for a terminal of 80 columns; the problems last."""
    parts: list[Text | Table] = []
    for title, table in _tables(found).items():
        parts += [Text(title, style="bold"), table, Text()]
    return Group(*parts)


def _tables(found: Inspection) -> dict[str, Table]:
    tables = {"shards": _rows_table(_overview(found).items())}
    if found.num_samples:
        tables["keys, of all samples read"] = _keys_table(found)
    if found.num_decoded:
        tables |= {"images": _formats_table(found), "image sizes": _sizes_table(found), **_captions_tables(found)}
    tables |= {
        "captions that come most often": _repeated_captions_table(found),
        "duplicate keys": _duplicates_table(found),
        "broken samples, of those decoded": _broken_table(found),
        f"problems, {len(found.problems)}": _problems_table(found),
    }
    return {title: table for title, table in tables.items() if table.row_count}


def _overview(found: Inspection) -> dict[str, str]:
    """The first table, and the sheet's facts."""
    looks, whole = found.looks, found.whole
    num_bad = sum(bool(look.problem) for look in looks)
    num_part = sum(look.is_opened and not look.is_whole and not look.problem for look in looks)
    num_closed = len(looks) - len(whole) - num_bad - num_part
    parts = [f"{len(whole):,} read whole"]
    parts += [f"{num_part:,} in part"] if num_part else []
    parts += [f"{num_closed:,} not opened"] if num_closed else []
    parts += [f"{num_bad:,} that cannot be read to the end"] if num_bad else []
    rows = {"shards": f"{len(looks):,}: {', '.join(parts)}"}
    rows["samples"] = f"{found.num_samples:,}"
    num_bytes = sum(look.num_bytes_read if not look.is_whole else look.num_bytes for look in looks if look.is_opened)
    rows["bytes"] = _bytes(num_bytes)
    if whole:
        sizes = [look.num_samples for look in whole]
        rows["samples per shard"] = (
            f"{min(sizes):,} least, {statistics.median(sizes):,g} median, {max(sizes):,} most"
            if len(sizes) > 1
            else f"{sizes[0]:,}"
        )
        if num_part + num_closed:
            share = len(whole) / (len(looks) - num_bad)
            rows["estimate for all"] = (
                f"{sum(sizes) / share:,.0f} samples, {_bytes(sum(look.num_bytes for look in whole) / share)}"
            )
    if found.num_samples:
        num_pairs = sum(look.num_pairs for look in looks)
        rows["pairs"] = (
            f"{num_pairs:,} samples ({_percent(num_pairs, found.num_samples)}) have an image and a caption member"
        )
    rows["decoded"] = _extent(found)
    return rows


def _extent(found: Inspection) -> str:
    if found.num_decoded == found.num_samples and not found.is_over_time:
        return f"every sample, in {found.seconds:.1f} s"
    text = f"{found.num_decoded:,} samples, spread evenly over what was read, in {found.seconds:.1f} s"
    if found.is_over_time:
        text += ", then the time was up"
    return f"{text}; --all reads and decodes everything"


def _keys_table(found: Inspection) -> Table:
    endings: Counter[str] = Counter()
    for look in found.looks:
        endings.update(look.endings)
    table = _table(("ending", "left"), ("samples", "right"), ("share", "right"), ("used as", "left"))
    sources: dict[str, list[str]] = {}
    for source in found.data.captions:
        sources.setdefault(caption_member(source), []).append(source)
    for ending, count in endings.most_common(_MAX_ROWS):
        use = "image" if ending in found.data.image_keys else f"caption {', '.join(sources.get(ending, []))}"
        _add(table, ending, f"{count:,}", _percent(count, found.num_samples), use if use != "caption " else "")
    if len(endings) > _MAX_ROWS:
        _add(table, f"and {len(endings) - _MAX_ROWS:,} more", "", "", "a key ends at its first dot")
    return table


def _formats_table(found: Inspection) -> Table:
    table = _table(("format", "left"), ("in", "left"), ("samples", "right"), ("share", "right"))
    formats: Counter[tuple[str, str]] = Counter()
    for look in found.looks:
        formats.update(look.formats)
    for (kind, ending), count in formats.most_common(_MAX_ROWS):
        _add(table, kind, f".{ending}", f"{count:,}", _percent(count, formats.total()))
    return table


def _sizes_table(found: Inspection) -> Table:
    table = _quantiles_table("px, upright")
    heights, widths, sizes = (
        _joined(getattr(look, name) for look in found.looks) for name in ("heights", "widths", "image_bytes")
    )
    if len(heights):
        _add_quantiles(table, "width", widths)
        _add_quantiles(table, "height", heights)
        _add_quantiles(table, "shorter side", np.minimum(widths, heights))
        _add_quantiles(table, "width / height", widths / heights, "{:.2f}")
        _add_quantiles(table, "file, kB", sizes / 1e3, "{:,.1f}")
    return table


def _captions_tables(found: Inspection) -> dict[str, Table]:
    table = _table(
        ("source", "left"), ("weight", "right"), ("samples", "right"), ("share", "right"), ("texts", "right"),
        ("different", "right"), ("samples without", "left"),
    )  # fmt: skip
    lengths = _quantiles_table("per text")
    total_weight = sum(found.data.captions.values())
    for source, weight in found.data.captions.items():
        parts = [look.captions[source] for look in found.looks if look.captions]
        num_present = sum(part.num_present for part in parts)
        hashes = _joined(part.hashes for part in parts)
        reasons: Counter[str] = Counter()
        for part in parts:
            reasons.update(part.reasons)
        _add(
            table,
            source,
            _percent(weight, total_weight),
            f"{num_present:,}",
            _percent(num_present, found.num_decoded),
            f"{len(hashes):,}",
            f"{len(np.unique(hashes)):,}",
            ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common()),
        )
        if len(hashes):
            _add_quantiles(lengths, f"{source}, characters", _joined(part.num_characters for part in parts))
            _add_quantiles(lengths, f"{source}, words", _joined(part.num_words for part in parts))
    return {"captions": table, "caption lengths": lengths}


def _repeated_captions_table(found: Inspection) -> Table:
    table = _table(("times", "right"), ("source", "left"), ("caption", "left"))
    for source in found.data.captions:
        looks = [look for look in found.looks if look.captions]
        hashes = _joined(look.captions[source].hashes for look in looks)
        if not len(hashes):
            continue
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        ends = np.cumsum([len(look.captions[source].hashes) for look in looks])
        for chosen in np.lexsort((first, -counts))[:5].tolist():
            if counts[chosen] > 1:
                number = int(np.searchsorted(ends, first[chosen], side="right"))
                place = looks[number].captions[source].places[int(first[chosen] - (ends[number - 1] if number else 0))]
                text = _caption_again(looks[number].url, place, source, int(hashes[first[chosen]]), found.data)
                _add(table, f"{counts[chosen]:,}", source, _shown(text, 200))
    return table


def _caption_again(url: str, place: int, source: str, hashed: int, data: DataConfig) -> str:
    """The caption with a hash in the sample that begins at a byte of a shard."""
    try:
        tar: ByteSource
        if url.startswith("s3://"):
            from sigray.workers.data.s3 import S3Stream, stat

            tar = S3Stream(stat(url, data.s3), data.s3, place)
        else:
            tar = MappedFile(url, place)
        try:
            texts = captions_at(source, next(read_tar(tar)).members)
        finally:
            tar.close()
    except (ValueError, OSError, StopIteration, Refused):
        return "(could not be read again)"
    return next((text for text in texts if hash(text) == hashed), "(changed meanwhile)")


def _duplicates_table(found: Inspection) -> Table:
    table = _table(("", "left"), ("samples", "right"), ("first", "left"))
    doubles = [f"{_name(look.url)} {key}" for look in found.looks for key in look.double_members]
    if doubles:
        _add(table, "two members of one name: training refuses them", f"{len(doubles):,}", ", ".join(doubles[:3]))
    looks = [look for look in found.looks if look.key_hashes]
    hashes = _joined(look.key_hashes for look in looks)
    if not len(hashes):
        return table
    sizes = [len(look.key_hashes) for look in looks]
    shards = np.repeat(np.arange(len(looks)), sizes)
    order = np.argsort(hashes, kind="stable")  # so those of one shard stand together
    is_again = hashes[order][1:] == hashes[order][:-1]
    is_same_shard = shards[order][1:] == shards[order][:-1]
    for title, chosen in (
        ("key comes again in its shard", is_again & is_same_shard),
        ("key comes again in another shard", is_again & ~is_same_shard),
    ):
        numbers = np.sort(order[1:][chosen])
        if len(numbers):
            first = []
            for number in numbers[:_KEYS_PER_REASON].tolist():
                look = looks[int(shards[number])]
                keys = zlib.decompress(look.keys).decode().split("\0")
                first.append(f"{_name(look.url)} {keys[number - sum(sizes[: int(shards[number])])]}")
            _add(table, title, f"{len(numbers):,}", ", ".join(first))
    return table


def _broken_table(found: Inspection) -> Table:
    table = _table(("reason", "left"), ("samples", "right"), ("share", "right"), ("first", "left"))
    counts, keys = found.refused()
    for reason, count in counts.most_common():
        _add(table, reason, f"{count:,}", _percent(count, found.num_decoded), ", ".join(keys[reason]))
    return table


def _problems_table(found: Inspection) -> Table:
    table = _table(("where", "left"), ("what", "left"))
    for where, what in found.problems[:200]:
        _add(table, where, what)
    if len(found.problems) > 200:
        _add(table, f"and {len(found.problems) - 200:,} more", "")
    return table


_QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}


def _joined(parts: Iterable[array[int]]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *(np.array(part, np.int64) for part in parts)])


def _add_quantiles(table: Table, title: str, values: np.ndarray, form: str = "{:,.0f}") -> None:
    _add(table, title, *(form.format(value) for value in np.quantile(values, list(_QUANTILES.values()))))


_Column = tuple[str, Literal["left", "right"]]


def _table(*columns: _Column) -> Table:
    table = Table(box=None, padding=(0, 0, 0, 2), show_header=any(name for name, _ in columns))
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold", no_wrap=justify == "right")
    return table


def _quantiles_table(title: str) -> Table:
    return _table((title, "left"), *((name, "right") for name in _QUANTILES))


def _rows_table(rows: Iterable[tuple[str, str]]) -> Table:
    table = _table(("", "left"), ("", "left"))
    for title, text in rows:
        _add(table, title, text)
    return table


def _add(table: Table, *cells: str) -> None:
    # Text and not str: rich would read "[red]" in somebody's caption as markup.
    table.add_row(*(Text(_shown(cell, 2000)) for cell in cells))


def _percent(count: float, total: float) -> str:
    """(1, 3) -> '33.3 %', (2, 100000) -> '0.002 %'."""
    share = 100 * count / total
    return f"{share:.1f} %" if share >= 0.1 or not count else f"{share:.1g} %"


def _bytes(count: float) -> str:
    for unit, size in {"TB": 1e12, "GB": 1e9, "MB": 1e6}.items():
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def write_sheet(found: Inspection, path: Path) -> None:
    """Write the sheet: one HTML file with pictures inside.

    Raises:
        OSError: where it cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    template = (
        importlib.resources.files("sigray.orchestrator.data").joinpath("inspect.html.j2").read_text(encoding="utf-8")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    counts, _ = found.refused()
    broken: dict[str, list[Picture]] = {reason: [] for reason, _ in counts.most_common()}
    for picture in (picture for look in found.looks for picture in look.broken):
        if len(broken[picture.reason]) < _BROKEN_PER_REASON:
            broken[picture.reason].append(picture)
    page = environment.from_string(template).render(
        patterns=_patterns(found.data),
        overview=_overview(found),
        problems=found.problems,
        pictures=[picture for look in found.looks for picture in look.pictures],
        broken=[picture for pictures in broken.values() for picture in pictures],
        counts=counts,
        num_decoded=found.num_decoded,
        crop=found.data.crop,
        px=PICTURE_PX,
    )
    _replace(path, page)


def _replace(path: Path, text: str) -> None:
    """Write a file at once: nobody sees a part of it."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------- audit


@dataclass
class RunAudit:
    """The audit of a run's ledger, with what is needed to tell it."""

    audit: Audit
    order: StreamOrder
    datasets: list[str]
    global_batch_size: int

    def steps_of(self, epoch: EpochAudit) -> range:
        """The steps, counted from 0, in which samples of an epoch come."""
        dataset = self.datasets.index(epoch.dataset)

        def step_after(num_samples: int) -> int:
            """Steps until the dataset has given so many."""
            return bisect.bisect_left(
                range(self.audit.num_steps),
                num_samples,
                key=lambda step: self.order.num_of_dataset(dataset, step * self.global_batch_size),
            )

        first = step_after(epoch.epoch * epoch.num_samples + 1) - 1
        return range(max(first, 0), step_after((epoch.epoch + 1) * epoch.num_samples))

    @property
    def verdict(self) -> str:
        """One sentence: exact, or what is not."""
        found, batch = self.audit, self.global_batch_size
        if found.is_exact:
            num_over = sum(epoch.is_over for epoch in found.epochs)
            once = f"; every sample of {_counted(num_over, 'complete epoch')} was used exactly once" if num_over else ""
            return f"exact: each of {_counted(found.num_steps, 'step')} has its {batch:,} pairs, none twice{once}"
        parts = []
        for name in ("missing", "doubled"):
            if count := sum(getattr(epoch, f"num_{name}") for epoch in found.epochs):
                parts.append(f"{_counted(count, 'sample')} {name}")
        if found.wrong_steps:
            parts.append(f"{_counted(len(found.wrong_steps), 'step')} without exactly {batch:,} pairs")
        return f"the ledger is not exact: {', '.join(parts)}"


def audit_run(config: RunConfig) -> RunAudit:
    """Audit the ledger of a run.

    Raises:
        DataError: where there is no ledger, or it is not of this run's data.
        OSError: from the storage.
    """
    folder = RunFolder(config)
    manifest = folder.manifest()
    order = build_order(manifest, config.data, config.run.seed)
    result = audit(folder.storage, manifest, order, config.train.global_batch_size)
    return RunAudit(result, order, list(manifest.datasets()), config.train.global_batch_size)


def audit_table(run: RunAudit) -> Group:
    """A row per dataset and epoch, and the first that are missing or doubled. Epochs and steps count from 1."""
    names = ("samples", "used", "missing", "doubled", "replaced", "steps")
    # One dataset that is not one of several has no name.
    has_names = run.datasets != [""]
    columns: list[_Column] = [("dataset", "left")] if has_names else []
    columns += [("epoch", "right"), *((name, "right") for name in names), ("", "left")]
    table = _table(*columns)
    details: list[Text] = []
    for epoch in run.audit.epochs:
        steps = run.steps_of(epoch)
        is_wrong = epoch.num_missing or epoch.num_doubled
        state = "complete" if epoch.is_over else "under way"
        counts = [f"{count:,}" for count in (epoch.num_doubled, epoch.num_replaced)]
        _add(
            table,
            *([epoch.dataset] if has_names else []),
            f"{epoch.epoch + 1}",
            f"{epoch.num_samples:,}",
            f"{epoch.num_used:,}",
            f"{epoch.num_missing:,}" if epoch.is_over else "-",
            *counts,
            f"{steps.start + 1:,}-{steps.stop:,}",
            f"{state}, not exact" if is_wrong else state,
        )
        for name, count, first in (
            ("missing", epoch.num_missing, epoch.missing),
            ("doubled", epoch.num_doubled, epoch.doubled),
        ):
            if count:
                of = f"{epoch.dataset}, epoch" if has_names else "epoch"
                details.append(Text(f"{of} {epoch.epoch + 1}, {name}:{_first(first, count)}"))
    if run.audit.left_out:
        steps_left_out = ", ".join(f"{step:,}" for step in run.audit.left_out)
        details.append(Text(f"left out after a bad loss, their pairs changed no weights: steps {steps_left_out}"))
    if run.audit.wrong_steps:
        details.append(Text(f"steps:{_first(run.audit.wrong_steps[:10], len(run.audit.wrong_steps))}"))
    return Group(table, *details)


def _first(lines: list[str], count: int) -> str:
    more = [f"and {count - len(lines):,} more"] if count > len(lines) else []
    return "".join(f"\n  {line}" for line in [*lines, *more])


def _counted(count: int, one: str) -> str:
    return f"{count:,} {one}{'' if count == 1 else 's'}"


# ---------------------------------------------------------------------------------------------------- tokenizer


@dataclass
class TrainedTokenizer:
    """A tokenizer that was written, and how it fits its captions."""

    path: Path
    vocab_size: int
    num_captions: int
    num_unusable: int  # samples without a caption
    tokens_median: float  # per caption, [EOS] included
    tokens_95_pct: float

    @property
    def yaml(self) -> str:
        """The lines that name it in a run's YAML."""
        return (
            "model:\n"
            f"  tokenizer: {self.path}\n"
            "  towers:\n"
            "    text_cfg:\n"
            f"      vocab_size: {self.vocab_size}  # and a context_length of {self.tokens_95_pct:.0f} or more tokens"
        )


def train_caption_tokenizer(
    data: DataConfig,
    path: Path,
    *,
    vocab_size: int,
    kind: Literal["bpe", "unigram"],
    lower_case: bool,
    progress: Progress = lambda stage, done, total: None,
) -> TrainedTokenizer:
    """Train a tokenizer on every caption of the shards, of all sources, and write it as a tokenizer.json.

    All captions are held in memory: of large data some shards are enough.

    Raises:
        DataError: from the shards, which must all be sound.
        ValueError: where there is nothing to train from, or the vocabulary is too small for it.
        OSError: where the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest = scan_shards(data.shards, data, lambda done, total: progress("headers", done, total))
    captions: list[str] = []
    num_unusable = 0
    for done, shard in enumerate(manifest.shards):
        progress("shards", done, len(manifest.shards))
        for sample in read_samples(shard, data):
            texts = list(_all_captions(sample, data))
            captions += texts
            num_unusable += not texts
    progress("shards", len(manifest.shards), len(manifest.shards))
    progress("training", 0, 1)
    tokenizer = train_tokenizer(captions, vocab_size=vocab_size, kind=kind, lower_case=lower_case)
    progress("training", 1, 1)
    _replace(path, tokenizer.to_str(pretty=True))
    some = captions[:: -(-len(captions) // 100_000)]
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(some)]
    median, upper = np.quantile(lengths, [0.5, 0.95], method="higher").tolist()
    return TrainedTokenizer(path, tokenizer.get_vocab_size(), len(captions), num_unusable, median, upper)


def _all_captions(sample: TarSample, data: DataConfig) -> Iterator[str]:
    for source in data.captions:
        try:
            yield from captions_at(source, sample.members)
        except Refused:
            continue
