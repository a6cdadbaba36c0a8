"""`sigray data inspect`: what shards hold, and what training would refuse in them.

`inspect_data` reads the tars themselves, not the counts that sidecars claim. It uses the reader and the decoder of
training: a sample counts as broken exactly if training would refuse it. A shard that cannot be used becomes an entry of
`Inspection.problems` and does not end the inspection. Every opened shard is read front to back: only that finds all
damage and counts the samples. Of its samples an even selection is decoded, or all of them. `inspect_sheet.py` prints
the result and writes it as HTML.

Figures are arrays of numbers, about 50 bytes per sample, so that `--all` can read a hundred million samples. The few
captions that are shown are read again.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import threading
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from PIL import Image

from sigray.orchestrator.config import ConfigError, RunConfig, load_config, parse_config
from sigray.orchestrator.formatting import NBSP, TIMES
from sigray.orchestrator.tables import printable
from sigray.workers.config import DataConfig, Patterns
from sigray.workers.data.decode import Decoder, Refused, captions_at, decode_pixels, sample_random
from sigray.workers.data.manifest import is_mark, is_pair, scan_shards, shard_count
from sigray.workers.data.shard_list import ShardFile, list_shards, reason_of
from sigray.workers.data.tar import ByteSource, DataError, LocalFile, Tally, TarSample, read_tar
from sigray.workers.urls import is_remote

NUM_SAMPLES = 2000
"""Samples to decode by default."""
MAX_S = 30.0
"""Seconds after which a default inspection stops reading."""
NUM_PICTURES = 48
PICTURE_PX = 224
"""Size to which the sheet's images are decoded: the inspection knows no model."""
BROKEN_PER_REASON = 6
"""Broken samples that the sheet shows for each reason."""
KEYS_PER_REASON = 3

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total)"""

_MAGIC = {rb"\xff\xd8\xff": "JPEG", rb"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", rb"II\*\0|MM\0\*": "TIFF"}
_MAGIC |= {b"RIFF....WEBP": "WebP", rb"\s*<": "HTML, XML or SVG"}
_OVERRIDE = re.compile(rf"({'|'.join(RunConfig.model_fields)})(\.[A-Za-z0-9_\-]+)+=")


def data_section(words: list[str]) -> DataConfig:
    """Return the data section that a command line names.

    Args:
        words: patterns, or the CONFIG.yaml of one run, and overrides as data.image_keys=[jpg].

    Raises:
        ConfigError: if they make no data section.
    """
    overrides = [word for word in words if _OVERRIDE.match(word)]
    named = [word for word in words if word not in overrides]
    if len(named) == 1 and named[0].endswith((".yaml", ".yml")):
        return load_config(named[0], overrides).data
    if foreign := [word for word in overrides if not word.startswith("data.")]:
        raise ConfigError(f"{foreign[0]!r}: only keys of the data section, as data.image_keys=[jpg]")
    if not named:
        raise ConfigError("give the shards: a path, a glob, a brace pattern, a folder, or s3://bucket/prefix")
    # A whole config gives the checks and their messages; its other sections do not matter.
    content = {"run": {"name": "inspect"}, "data": {"shards": named}, "model": {"name": "ViT-B-16-SigLIP"}}
    content |= {"train": {"num_samples": 1, "global_batch_size": 1}}
    return parse_config(content, " ".join(["sigray data", *words]), overrides).data


def patterns(data: DataConfig) -> list[str]:
    """Return the patterns of all data sets."""
    named: list[Patterns]
    named = [part.shards for part in data.shards.values()] if isinstance(data.shards, dict) else [data.shards]
    return [pattern for part in named for pattern in ([part] if isinstance(part, str) else part)]


@dataclass
class Captions:
    """The texts of one source of data.captions; a sample may have several."""

    num_present: int = 0  # samples with a usable text
    num_lined: int = 0  # of these, samples with a text of several lines
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
    jpeg_base64: str  # empty if the image cannot be decoded
    size: str  # of the upright image in px; else the format and bytes of what cannot be decoded
    captions: list[tuple[str, str]]  # (source, text); training would draw the first


@dataclass
class ShardFindings:
    """What one shard holds."""

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
    keys: bytes = b""  # compressed: most are consecutive numbers
    tally: Tally = field(default_factory=Tally)
    refused_by_reader: dict[str, list[str]] = field(default_factory=dict)  # keys by reason
    # Of the decoded samples.
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

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass
class Inspection:
    """What all shards hold.

    Attributes:
        shards: in the order of the patterns.
        problems: with the data, as (shard or pattern, problem).
        seconds: duration of the inspection.
        is_over_time: whether the time limit came before the end of the data.
    """

    data: DataConfig
    shards: list[ShardFindings]
    problems: list[tuple[str, str]]
    seconds: float
    is_over_time: bool

    @property
    def whole(self) -> list[ShardFindings]:
        return [shard for shard in self.shards if shard.is_whole]

    @property
    def num_samples(self) -> int:
        """Samples read."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_decoded(self) -> int:
        return sum(shard.num_decoded for shard in self.shards)

    def refused(self) -> tuple[Counter[str], dict[str, list[str]]]:
        """Return the samples that training would refuse.

        Returns:
            Counts by reason; the first samples of each reason as "shard key".
        """
        counts: Counter[str] = Counter()
        keys: dict[str, list[str]] = {}
        for shard in self.shards:
            counts.update(shard.refused)
            for reason, found in shard.refused_keys.items():
                keys[reason] = (keys.get(reason, []) + found)[:KEYS_PER_REASON]
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
        num_samples: approximate number of samples to decode, the same from each shard; None: all.
        max_s: seconds after which reading stops; None: no limit. The shards opened so far are always spread over all
            of them.
        num_pictures: samples to decode for the sheet, besides some broken ones; 0: no pictures.
        progress: called a few times a second, with numbers of shards.

    Raises:
        DataError: if no pattern names a shard.
    """
    begin = time.monotonic()
    problems: list[tuple[str, str]] = []
    urls = _list_all(data, problems)
    order = _spread(len(urls))
    shards = [ShardFindings(url, number) for number, url in enumerate(urls)]
    stop = threading.Event()
    decoder = Decoder(data, PICTURE_PX)

    def read(rank: int) -> None:
        if not stop.is_set():
            wanted = None if num_samples is None else _share(num_samples, rank, len(urls))
            pictures = _share(num_pictures, rank, len(urls))
            _ShardReader(shards[order[rank]], data, decoder, stop, wanted, pictures, num_pictures > 0).read()

    def report() -> None:
        progress("shards", sum(shard.is_whole or bool(shard.problem) for shard in shards), len(shards))

    report()
    is_over_time = False
    with ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 1))) as pool:
        reads = [pool.submit(read, rank) for rank in range(len(urls))]
        try:
            while wait(reads, timeout=0.2).not_done:
                report()
                if max_s is not None and time.monotonic() - begin > max_s and not stop.is_set():
                    is_over_time = True
                    stop.set()
        finally:
            stop.set()
    report()
    for done in reads:
        done.result()
    problems += [(shard.url, shard.problem) for shard in shards if shard.problem]
    result = Inspection(data, shards, problems, time.monotonic() - begin, is_over_time)
    problems += _training_problems(result)
    return result


def _list_all(data: DataConfig, problems: list[tuple[str, str]]) -> list[str]:
    """Return the shards of all patterns once; report patterns without shards."""
    found: Counter[str] = Counter()
    errors = []
    for pattern in patterns(data):
        try:
            found.update(list_shards(pattern, data.stores).keys())
        except DataError as error:
            errors.append(error)
            problems.append((pattern, str(error)))
    if not found:
        raise errors[0]
    problems += [(url, f"named {count} times by the patterns") for url, count in found.items() if count > 1]
    return list(found)


def _spread(count: int) -> list[int]:
    """Return the numbers below `count`; each start of the list is spread evenly.

    Of 8: 0, 4, 2, 6, 1, 5, 3, 7.
    """
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: f"{number:0{bits}b}"[::-1])


def _share(total: int, rank: int, count: int) -> int:
    return total // count + (rank < total % count)


class _Stopped(Exception):
    """The time is up."""


class _Stoppable:
    """A source whose `read` raises `_Stopped` when the time is up.

    A tar may have gigabytes of headers before its next sample.
    """

    def __init__(self, source: ByteSource, stop: threading.Event) -> None:
        self._source = source
        self._stop = stop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, count: int) -> bytes | memoryview:
        if self._stop.is_set():
            raise _Stopped
        return self._source.read(count)


def open_url(url: str, data: DataConfig, start: int = 0) -> ByteSource:
    """Open a shard at a byte; no manifest exists yet that could say what it should be."""
    if is_remote(url):
        from sigray.workers.data.store_stream import StoreStream
        from sigray.workers.stores import stat

        return StoreStream(stat(url, data.stores), data.stores, start)
    return LocalFile(url, start)


@dataclass
class _ShardReader:
    """Reads one shard.

    Attributes:
        found: receives the findings.
        stop: set when the time is up.
        num_samples: to decode; None: all.
        num_pictures: for the sheet.
        keep_broken: whether broken samples are kept for the sheet too.
    """

    found: ShardFindings
    data: DataConfig
    decoder: Decoder
    stop: threading.Event
    num_samples: int | None
    num_pictures: int
    keep_broken: bool

    def read(self) -> None:
        """Read front to back, until the end, damage or the stop."""
        found = self.found
        found.captions = {source: Captions() for source in self.data.captions}
        keys: list[str] = []
        try:
            with contextlib.closing(open_url(found.url, self.data)) as source:
                found.is_opened = True
                found.num_bytes = source.num_bytes
                stoppable = cast(ByteSource, _Stoppable(source, self.stop))
                unclosed = self.data.allow_unclosed
                for sample in read_tar(stoppable, allow_unclosed=unclosed, tally=found.tally):
                    keys.append(sample.key)
                    self._count(sample)
                    if self._is_due(sample, self.num_samples, found.num_decoded):
                        self._decode(sample)
                    found.num_bytes_read = source.position
                found.is_whole = True
                found.num_bytes_read = found.num_bytes
        except _Stopped:
            pass
        except (DataError, OSError) as error:
            found.problem = reason_of(error, found.url)
        del found.tally.key_hashes[len(keys) :]  # of a sample that the end of a damaged shard cut off
        found.keys = zlib.compress("\0".join(keys).encode())

    def _is_due(self, sample: TarSample, wanted: int | None, num_had: int) -> bool:
        """Return whether the file's next of `wanted` evenly spaced places is reached."""
        return wanted is None or (num_had < wanted and sample.position * wanted >= num_had * self.found.num_bytes)

    def _count(self, sample: TarSample) -> None:
        found = self.found
        if is_mark(sample.index):
            found.marks.append(sample.position)
        found.num_samples += 1
        found.num_pairs += is_pair(sample, self.data)
        found.endings.update(sample.members.keys())
        if sample.refusal:
            found.refused_by_reader.setdefault(sample.refusal, []).append(sample.key)

    def _decode(self, sample: TarSample) -> None:
        found = self.found
        found.num_decoded += 1
        is_captioned = self._count_captions(sample)
        # In the order in which a data-shard worker would find them.
        reasons = [sample.refusal] if sample.refusal else []
        if not is_captioned:
            try:
                self.decoder.captions(sample.members)
            except Refused as refused:
                reasons.append(str(refused))
        ending = next((ending for ending in self.data.image_keys if ending in sample.members), None)
        if ending is None:
            reasons.append("no image")
            size = "no image"
        else:
            content = sample.members[ending]
            kind = _format(bytes(content[:16]))
            found.formats[kind, ending] += 1
            found.image_bytes.append(len(content))
            try:
                height, width = decode_pixels(content, self.data.max_image_pixels).shape[:2]
            except Refused as refused:
                reasons.append(str(refused))
                size = f"{kind}, {len(content):,} bytes"
            else:
                found.heights.append(height)
                found.widths.append(width)
                size = f"{width}{NBSP}{TIMES}{NBSP}{height}{NBSP}px"
        for reason in reasons[:1]:
            found.refused[reason] += 1
            first = found.refused_keys.setdefault(reason, [])
            if len(first) < KEYS_PER_REASON:
                first.append(f"{found.name} {sample.key}")
            if self.keep_broken and found.refused[reason] <= BROKEN_PER_REASON:
                found.broken.append(self._picture(sample, reason, size))
        if not reasons and self._is_due(sample, self.num_pictures, len(found.pictures)):
            found.pictures.append(self._picture(sample, "", size))

    def _count_captions(self, sample: TarSample) -> bool:
        """Count the captions of a sample; return whether any source has one."""
        is_captioned = False
        for source, captions in self.found.captions.items():
            try:
                texts = captions_at(source, sample.members)
            except Refused as refused:
                captions.reasons[str(refused)] += 1
                continue
            is_captioned = True
            captions.num_present += 1
            captions.num_lined += any("\n" in text for text in texts)
            captions.num_characters.extend(map(len, texts))
            captions.num_words.extend(len(text.split()) for text in texts)
            captions.hashes.extend(map(hash, texts))
            captions.places.extend(sample.position for _ in texts)
        return is_captioned

    def _picture(self, sample: TarSample, reason: str, size: str) -> Picture:
        random = sample_random(0, 0, self.found.number, sample.index)
        pixels = np.empty((PICTURE_PX, PICTURE_PX, 3), np.uint8)
        try:
            self.decoder.decode_image(sample.members, pixels, random)
        except Refused:
            jpeg = ""
        else:
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "JPEG", quality=88)
            jpeg = base64.b64encode(content.getvalue()).decode()
        captions = []
        for source in self.data.captions:
            with contextlib.suppress(Refused):
                captions += [(source, printable(text, 400)) for text in captions_at(source, sample.members)[:4]]
        if captions:
            drawn = printable(self.decoder.choose_caption(sample.members, random), 400)
            captions.sort(key=lambda caption: caption[1] != drawn)
        return Picture(self.found.name, sample.key, reason, jpeg, size, captions)


def _format(begin: bytes) -> str:
    """Return the format that an image's first bytes name."""
    if begin[4:8] == b"ftyp":
        return begin[8:12].decode("ascii", "replace").upper()  # AVIF, HEIC
    found = (name for magic, name in _MAGIC.items() if re.match(magic, begin, re.DOTALL))
    return next(found, "unknown" if begin else "empty")


def _training_problems(found: Inspection) -> list[tuple[str, str]]:
    """Return problems of all shards: wrong sidecars, no pair, too many broken samples."""
    problems = []
    if all(shard.is_whole or shard.problem for shard in found.shards) and found.whole:
        by_url = {shard.url: shard for shard in found.whole}

        def counts(header_pass: Callable[[Any], Any], files: list[ShardFile]) -> Iterator[Any]:
            """Answer header passes with what has been read already."""
            for file in files:
                shard = by_url[file.url]
                known = shard_count(shard.num_samples, shard.marks, shard.num_pairs, shard.endings, shard.tally)
                yield known if file.num_bytes == shard.num_bytes else header_pass(file)

        try:
            manifest = scan_shards(list(by_url), found.data, parallel_map=counts)
        except DataError as error:
            problems.append(("all shards", str(error)))
        else:
            for shard in manifest.shards:
                num_samples = by_url[shard.url].num_samples
                if shard.num_samples != num_samples:
                    problem = f"holds {num_samples:,} samples, but a sidecar beside it (index.json, sizes.json or "
                    problem += f"_stats.json) says {shard.num_samples:,}: training believes the sidecar; delete it"
                    problems.append((shard.url, problem))
    num_refused = found.refused()[0].total()
    most = found.data.max_bad_fraction
    # The same base as the training side's (workers/data/loader.py).
    if num_refused > most * max(found.num_decoded, 1024):
        problem = f"{num_refused:,} of {found.num_decoded:,} decoded samples are broken, more than "
        problem += f"data.max_bad_fraction={most}: training would stop; the table of broken samples has the reasons"
        problems.append(("all shards", problem))
    return problems
