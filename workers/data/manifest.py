"""Count the samples of shards into a manifest, read their samples.

    scan_shards    patterns -> manifest: url, bytes, sample count and fingerprint of every shard
    read_samples   a shard of the manifest -> its samples

The order of a run is computed from its manifest. The manifest is made once, before training workers start, and saved
with the run. A shard that changed since then is an error that names the shard.

Sample counts come from the cheapest source that has them: this machine's cache of an earlier pass over the same bytes;
a sidecar beside the tars (`shard_counts.py`); one pass over the tar's headers. The pass also finds damage and notes the
first byte of every 256th sample, so that reading can start there.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

from sigray.workers.config import DataConfig, Patterns, WeightedShards, caption_member
from sigray.workers.data.shard_counts import ShardCount, cache_counts, known_counts
from sigray.workers.data.shard_list import ParallelMap, ShardFile, find_shards, in_threads, reason_of, stat_local
from sigray.workers.data.tar import (
    BLOCK,
    IF_WHOLE,
    WHY_UNUSABLE,
    ByteSource,
    DataError,
    LocalFile,
    Tally,
    TarSample,
    cut_short,
    read_tar,
)
from sigray.workers.parse import as_type
from sigray.workers.texts import first_ten, ten_lines
from sigray.workers.urls import is_remote

RULES = 2
"""How tars are read: of 1, until November 2026, is `read_tar(is_old=True)`."""
_LINE_S = 10.0  # between two lines of progress
_MARK_EVERY = 256
_MAX_ENDINGS = 1000  # of a shard that are kept for a message
_NUM_CHECKED = 64  # samples of the first shard that are searched for a pair if the counts come from sidecars


@dataclass(frozen=True)
class Shard:
    """One tar. `fingerprint` is the ETag in S3, else the modification time in ns."""

    url: str
    num_bytes: int
    num_samples: int
    fingerprint: str
    dataset: str = ""
    marks: tuple[int, ...] = ()  # first bytes of samples 256, 512, ...; empty if the count comes from a sidecar
    links: tuple[tuple[int, int, int], ...] | None = None  # as `ShardCount.links`
    unusable: dict[str, int] = field(default_factory=dict, hash=False)  # members and samples by reason
    rules: int = RULES


@dataclass(frozen=True)
class Manifest:
    """All shards of a run: by dataset, then by pattern, then by name."""

    shards: tuple[Shard, ...]
    store: dict[str, Any] | None = None  # StoreFormat of the embedding store, if the shards are one's

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    def unusable(self) -> Counter[str]:
        """Return the number of members and samples that cannot be used, by reason."""
        return sum((Counter(shard.unusable) for shard in self.shards), Counter())

    @property
    def is_old(self) -> bool:
        """Whether the counts are those of November's reader."""
        return any(shard.rules < RULES for shard in self.shards)

    def datasets(self) -> dict[str, list[Shard]]:
        """Return the shards of each dataset."""
        names = dict.fromkeys(shard.dataset for shard in self.shards)
        return {name: [shard for shard in self.shards if shard.dataset == name] for name in names}

    def to_json(self) -> dict[str, Any]:
        # Not `asdict`, which copies every mark by itself: 11 s for 100,000 shards of 10,000 samples.
        shards = [{name: value for name, value in vars(shard).items() if value != {}} for shard in self.shards]
        return {"shards": shards, "store": self.store}

    @classmethod
    def from_json(cls, content: Any) -> Manifest:
        """Return a saved manifest; raise ParseError for another content."""
        saved = as_type(dict[str, Any], content)
        shards = as_type(list[dict[str, Any]], saved.get("shards"))
        return as_type(cls, saved | {"shards": [{"rules": 1, **shard} for shard in shards]})

    def differences(self, now: Manifest) -> list[str]:
        """Return what changed in the shards since this manifest was made, one line each."""
        before, after = ({shard.url: shard for shard in manifest.shards} for manifest in (self, now))
        lines = [] if self.store == now.store else [f"embeddings: {self.store} before, {now.store} now"]
        lines += [f"{url}: gone" for url in before if url not in after]
        lines += [f"{url}: new" for url in after if url not in before]
        lines += [
            f"{url}: content changed"
            for url, shard in before.items()
            if url in after and (shard.num_bytes, shard.fingerprint) != (after[url].num_bytes, after[url].fingerprint)
        ]
        if lines:
            return lines
        # The order of samples is computed from these: another count, dataset or order is another stream.
        lines = [
            f"{url}: {shard.num_samples} samples before, {after[url].num_samples} now"
            for url, shard in before.items()
            if shard.num_samples != after[url].num_samples
        ]
        if [shard.dataset for shard in self.shards] != [shard.dataset for shard in now.shards]:
            names = [", ".join(manifest.datasets()) for manifest in (self, now)]
            lines.append(f"data.shards: the datasets were {names[0]}, now {names[1]}")
        elif list(before) != list(after):
            lines.append("data.shards: the same shards in another order")
        return lines


def lines_of_progress(say: Callable[[str], None]) -> Callable[[int, int], None]:
    """Return a progress for `scan_shards` that says a line every ten seconds."""
    said_at = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said_at
        if time.monotonic() - said_at > _LINE_S:
            said_at = time.monotonic()
            say(f"read the headers of {done:,} of {total:,} shards")

    return progress


def scan_shards(
    patterns: Patterns | dict[str, WeightedShards],
    data: DataConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
    parallel_map: ParallelMap = in_threads,
    *,
    key: str = "data.shards",
    is_old: bool = False,
) -> Manifest:
    """Return the manifest of the shards that the patterns name.

    Args:
        patterns: of one dataset, or of several by name.
        data: image and caption keys, S3.
        progress: called as progress(done, total) before the first header pass and after each; total counts only
            shards without a known count.
        parallel_map: runs the header passes.
        key: of the patterns in the config, for errors.
        is_old: count by the rules of a run that began until November 2026.

    Raises:
        DataError: as `list_shards`; shards are missing, unreadable, damaged or cut short, all named in one message; no
            sample of a dataset has both an image and a caption.
    """
    datasets = {name: part.shards for name, part in patterns.items()} if isinstance(patterns, dict) else {"": patterns}
    broken: list[str] = []
    keys = {name: f"{key}.{name}" if name else key for name in datasets}
    files = {name: find_shards(part, data.stores, keys[name], broken) for name, part in datasets.items()}
    everything = [file for part in files.values() for file in part]
    for url, count in Counter(file.url for file in everything).items():
        if count > 1:
            raise DataError(f"{url} is in two datasets of data.shards: every shard must be named once")
    rules = 1 if is_old else RULES
    counts = known_counts(everything, data, rules)
    missing = [file for file in everything if file not in counts]
    from_sidecars = [file for file in everything if file in counts and not counts[file].endings]
    if missing:
        progress(0, len(missing))
        scanned = parallel_map(functools.partial(_read_headers, data=data, is_old=is_old), missing)
        for done, (file, result) in enumerate(zip(missing, scanned, strict=True), start=1):
            if isinstance(result, str):
                broken.append(f"{file.url}: {result}")
            else:
                counts[file] = result
            progress(done, len(missing))
    for file, problem in zip(from_sidecars, in_threads(lambda f: _check_end(f, data), from_sidecars), strict=True):
        broken += [f"{file.url}: {problem}"] if problem else []
    if broken:
        raise unreadable(key, broken)
    for name, part in files.items():
        _check_pairs(keys[name], part, counts, data, is_old)
    cache_counts(counts, data, rules)
    shards = []
    for name, part in files.items():
        for file in part:
            known = counts[file]
            found = (known.marks, known.links, known.unusable)
            shards.append(Shard(file.url, file.num_bytes, known.num_samples, file.fingerprint, name, *found, rules))
    return Manifest(tuple(shards))


def read_samples(shard: Shard, data: DataConfig, *, start: int = 0) -> Iterator[TarSample]:
    """Yield the samples of a shard from number `start` on.

    Raises:
        DataError: the shard changed since the manifest was made, is damaged, or holds another number of samples than
            the manifest names.
    """
    mark = min(start // _MARK_EVERY, len(shard.marks))
    position, index = (shard.marks[mark - 1], mark * _MARK_EVERY) if mark else (0, 0)
    num_read = index
    with closing(open_shard(shard, data, position)) as source:
        try:
            links = None if shard.links is None else {link[0]: link[1:] for link in shard.links}
            is_old = shard.rules < RULES
            unclosed = data.allow_unclosed
            for sample in read_tar(source, first_index=index, allow_unclosed=unclosed, links=links, is_old=is_old):
                num_read = sample.index + 1
                if sample.index >= start:
                    yield sample
        except DataError as error:
            message = str(error)
            raise error if message.startswith(shard.url) else DataError(f"{shard.url}: {message}") from error
    if num_read != shard.num_samples:
        raise DataError(
            f"{shard.url}: {num_read} samples read, {shard.num_samples} in the manifest: the sidecar with the count "
            "(index.json, sizes.json or _stats.json beside the tar) is wrong; delete it and start again"
        )


def open_shard(shard: Shard | ShardFile, data: DataConfig, start: int = 0) -> ByteSource:
    """Open a shard's bytes from `start` on.

    Raises:
        DataError: the shard is missing, or changed since the manifest was made.
    """
    if is_remote(shard.url):
        from sigray.workers.data.shard_cache import ShardCache
        from sigray.workers.data.store_stream import StoreStream
        from sigray.workers.stores import ObjectInfo

        info = ObjectInfo(shard.url, shard.num_bytes, shard.fingerprint.removeprefix("etag-"))
        if data.shard_cache is None:
            return StoreStream(info, data.stores, start)
        cache = ShardCache(data.shard_cache, int(data.shard_cache_gib * 2**30))
        while True:
            with suppress(FileNotFoundError):  # another process evicted the copy before it was opened
                return LocalFile(cache.path_of(info, data.stores), start)
    try:
        now = stat_local(shard.url)
        source = LocalFile(shard.url, start)
    except OSError as error:
        reason = reason_of(error, shard.url)
        raise DataError(f"{shard.url}: {reason}, though it was there when the run began") from error
    if (now.num_bytes, now.fingerprint) != (shard.num_bytes, shard.fingerprint):
        raise DataError(
            f"{shard.url} changed since the run's manifest was made ({shard.num_bytes} bytes, {shard.fingerprint}; now "
            f"{now.num_bytes} bytes, {now.fingerprint}): put the old shard back, or start a new run on the new data"
        )
    return source


def _read_headers(file: ShardFile, data: DataConfig, *, is_old: bool = False) -> ShardCount | str:
    """Count the samples of a shard by its headers; a text says what is damaged."""
    tally = Tally()
    marks: list[int] = []
    endings: set[str] = set()
    num_samples = num_pairs = 0
    unclosed = data.allow_unclosed
    try:
        with closing(open_shard(file, data)) as source:
            for sample in read_tar(source, headers_only=True, allow_unclosed=unclosed, tally=tally, is_old=is_old):
                if is_mark(sample.index):
                    marks.append(sample.position)
                num_pairs += is_pair(sample, data)
                endings.update(sample.members)
                num_samples += 1
    except (DataError, OSError) as error:
        return reason_of(error, file.url)
    return shard_count(num_samples, marks, num_pairs, endings, tally)


def is_mark(index: int) -> bool:
    """Return whether a manifest notes the first byte of a sample."""
    return index > 0 and index % _MARK_EVERY == 0


def shard_count(
    num_samples: int, marks: Sequence[int], num_pairs: int, endings: Iterable[str], tally: Tally
) -> ShardCount:
    """Return the count of a shard that was read from front to back."""
    links = tuple((header, *place) for header, place in tally.links.items())
    seekable = tuple(marks) if tally.is_seekable else ()
    return ShardCount(num_samples, seekable, num_pairs, tuple(sorted(endings)[:_MAX_ENDINGS]), links, tally.unusable())


def _check_end(file: ShardFile, data: DataConfig) -> str | None:
    """Return what is wrong with a tar's end: the only check of a tar with a sidecar."""
    size = 2 * BLOCK
    if file.num_bytes < size or file.num_bytes % BLOCK:
        return f"cut short: {file.num_bytes} bytes are not a whole tar"
    try:
        with closing(open_shard(file, data, file.num_bytes - size)) as source:
            is_closed = data.allow_unclosed or bytes(source.read(size)) == bytes(size)
            return None if is_closed else f"{cut_short(file.num_bytes)}{IF_WHOLE}"
    except (DataError, OSError) as error:
        return reason_of(error, file.url)


def is_pair(sample: TarSample, data: DataConfig) -> bool:
    """Return whether a sample has an image member and a caption member."""
    has_image = any(ending in sample.members for ending in data.image_keys)
    return has_image and any(caption_member(source) in sample.members for source in data.captions)


def _check_pairs(
    key: str, files: list[ShardFile], counts: dict[ShardFile, ShardCount], data: DataConfig, is_old: bool
) -> None:
    """Refuse a dataset without a usable pair; search a shard if no pass found endings."""
    passes = [counts[file] for file in files]
    if any(count.num_pairs for count in passes):
        return
    endings = {ending for count in passes for ending in count.endings}
    read = [file for file in files if counts[file].num_samples]
    example = ""  # of a key
    if read:
        first = min(read, key=lambda file: bool(counts[file].endings))
        try:
            with closing(open_shard(first, data)) as source:
                unclosed = data.allow_unclosed
                for sample in read_tar(source, headers_only=True, allow_unclosed=unclosed, is_old=is_old):
                    if is_pair(sample, data):
                        return
                    endings.update(sample.members)
                    example = example or sample.key
                    if sample.index == _NUM_CHECKED:
                        break
        except DataError as error:
            raise unreadable(key, [f"{first.url}: {reason_of(error, first.url)}"]) from error
    unusable = sum((Counter(count.unusable) for count in passes), Counter[str]())
    members = first_ten(list(dict.fromkeys(map(caption_member, data.captions))))
    raise DataError(
        f"no usable pair in {len(files)} shards of {key} ({files[0].url} first): a sample needs an image member "
        f"({first_ten(data.image_keys)}) and a caption member ({members}); "
        f"{_what_is_there(sorted(endings), unusable, example, data)}"
    )


def _what_is_there(endings: list[str], unusable: Counter[str], example: str, data: DataConfig) -> str:
    """Describe the members of shards without a pair, and the remedy."""
    lost = f"not used: {listed(unusable)}" if unusable else ""
    if not endings:
        reasons = [f"{what}: {WHY_UNUSABLE[what]}" for what, _ in unusable.most_common(1) if what in WHY_UNUSABLE]
        return "; ".join([lost or "the shards hold no members", *reasons])
    wanted = {*data.image_keys, *map(caption_member, data.captions)}
    has_dots = any(ending.rpartition(".")[2] in wanted - {ending} for ending in endings)
    hint = f"; a key ends at its first dot: {example[:100]}" if has_dots else ""
    found = f"members found end in {first_ten(endings)}{f' ({lost})' if lost else ''}"
    return f"{found}. Set data.image_keys and data.captions{hint}"


def listed(unusable: Counter[str]) -> str:
    """Return counts as a text: 80 symbolic links, 40 samples without a usable member."""
    return ", ".join(f"{count:,} {what}" for what, count in unusable.most_common())


def unreadable(key: str, broken: list[str]) -> DataError:
    """Return the error that names shards and what is wrong with each, ten at most."""
    return DataError(f"{key}: shards that cannot be read, {len(broken)}:\n  {ten_lines(broken)}")
