"""List shards, count their samples into a manifest, read their samples.

    list_shards    patterns -> URLs
    scan_shards    patterns -> manifest: url, bytes, sample count and fingerprint of every shard
    read_samples   a shard of the manifest -> its samples

The order of a run is computed from its manifest. The manifest is made once, before training workers start, and saved
with the run. A shard that changed since then is an error that names the shard.

Sample counts come from the cheapest source that has them: this machine's cache of an earlier pass over the same bytes;
a sidecar beside the tars (wids index, img2dataset's `_stats.json`, `sizes.json`); one pass over the tar's headers. The
pass also finds damage and notes the first byte of every 256th sample, so that reading can start there.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sigray.workers.config import DataConfig, Patterns, S3Config, WeightedShards
from sigray.workers.data.tar import BLOCK, ByteSource, DataError, MappedFile, TarSample, cut_short, read_tar

_MARK_EVERY = 256
_NUM_CHECKED = 64  # samples of the first shard that are searched for a pair if the counts come from sidecars
_WIDS_INDEX = ("index.json", "shardindex.json", "wids-meta.json")


@dataclass(frozen=True)
class Shard:
    """One tar. `fingerprint` is the ETag in S3, else the modification time in ns."""

    url: str
    num_bytes: int
    num_samples: int
    fingerprint: str
    dataset: str = ""
    marks: tuple[int, ...] = ()  # first bytes of samples 256, 512, ...; empty if the count comes from a sidecar


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

    def datasets(self) -> dict[str, list[Shard]]:
        """Return the shards of each dataset."""
        names = dict.fromkeys(shard.dataset for shard in self.shards)
        return {name: [shard for shard in self.shards if shard.dataset == name] for name in names}

    def to_json(self) -> dict[str, Any]:
        # Not `asdict`, which copies every mark by itself: 11 s for 100,000 shards of 10,000 samples.
        shards = [{**vars(shard), "marks": list(shard.marks)} for shard in self.shards]
        return {"shards": shards, "store": self.store}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Manifest:
        shards = tuple(Shard(**{**shard, "marks": tuple(shard["marks"])}) for shard in content["shards"])
        return cls(shards, content["store"])

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


@dataclass(frozen=True)
class ShardFile:
    """A tar that exists, not yet counted."""

    url: str
    num_bytes: int
    fingerprint: str


@dataclass(frozen=True)
class ShardCount:
    """Result of a pass over a shard's headers; a sidecar gives `num_samples` only."""

    num_samples: int
    marks: tuple[int, ...] = ()
    num_pairs: int = 0  # samples with an image and a caption member
    endings: tuple[str, ...] = ()


def list_shards(patterns: Patterns, s3: S3Config) -> dict[str, ShardFile | None]:
    """Return the absolute paths and s3:// URLs of all tars that the patterns name.

    With each its file, None if no listing has named its size.

    Args:
        patterns: each a path, a glob, a brace pattern (`train-{000000..000127}.tar`), a folder, or an s3:// prefix.
        s3: settings for s3:// URLs.

    Raises:
        DataError: a pattern names nothing, or two patterns name the same shard.
    """
    import braceexpand

    found: dict[str, ShardFile | None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        of_pattern: list[tuple[str, ShardFile | None]] = []
        for name in braceexpand.braceexpand(pattern):
            if name.startswith("s3://") and not name.endswith(".tar"):
                from sigray.workers.data.s3 import list_objects

                tars = [info for info in list_objects(name, s3) if info.url.endswith(".tar")]
                of_pattern += [(i.url, ShardFile(i.url, i.num_bytes, f"etag-{i.etag}")) for i in tars]
            elif name.startswith("s3://"):
                of_pattern.append((name, None))
            else:
                if os.path.isdir(name):
                    names = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
                else:
                    names = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
                of_pattern += [(os.path.abspath(path), None) for path in names]
        if not of_pattern:
            raise DataError(f"no shards: {pattern!r} names no .tar file; {_what_exists(pattern)}")
        for url, file in of_pattern:
            if url in found:
                raise DataError(f"{url} is named twice by the patterns {patterns}: every shard must be named once")
            found[url] = file
    return found


ParallelMap = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]
"""(function, items) -> results in the items' order."""


def in_threads(function: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    """Map in threads of this process, as a `ParallelMap`."""
    with ThreadPoolExecutor(min(16, len(items) or 1)) as pool:
        yield from pool.map(function, items)


def scan_shards(
    patterns: Patterns | dict[str, WeightedShards],
    data: DataConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
    parallel_map: ParallelMap = in_threads,
) -> Manifest:
    """Return the manifest of the shards that the patterns name.

    Args:
        patterns: of one dataset, or of several by name.
        data: image and caption keys, S3.
        progress: called as progress(done, total) before the first header pass and after each; total counts only
            shards without a known count.
        parallel_map: runs the header passes.

    Raises:
        DataError: as `list_shards`; shards are missing, unreadable, damaged or cut short, all named in one message; no
            sample of a dataset has both an image and a caption.
    """
    datasets = {name: part.shards for name, part in patterns.items()} if isinstance(patterns, dict) else {"": patterns}
    broken: list[str] = []
    files = {name: _find(part, data.s3, broken) for name, part in datasets.items()}
    everything = [file for part in files.values() for file in part]
    for url, count in Counter(file.url for file in everything).items():
        if count > 1:
            raise DataError(f"{url} is in two datasets of data.shards: every shard must be named once")
    counts = _known_counts(everything, data)
    missing = [file for file in everything if file not in counts]
    from_sidecars = [file for file in everything if file in counts and not counts[file].endings]
    if missing:
        progress(0, len(missing))
        scanned = parallel_map(functools.partial(_read_headers, data=data), missing)
        for done, (file, result) in enumerate(zip(missing, scanned, strict=True), start=1):
            if isinstance(result, str):
                broken.append(f"{file.url}: {result}")
            else:
                counts[file] = result
            progress(done, len(missing))
    for file, problem in zip(from_sidecars, in_threads(lambda f: _check_end(f, data), from_sidecars), strict=True):
        broken += [f"{file.url}: {problem}"] if problem else []
    if broken:
        raise _unreadable(broken)
    for name, part in files.items():
        _check_pairs(name, part, counts, data)
    _cache_counts(counts, data)
    return Manifest(
        tuple(
            Shard(file.url, file.num_bytes, counts[file].num_samples, file.fingerprint, name, counts[file].marks)
            for name, part in files.items()
            for file in part
        )
    )


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
            for sample in read_tar(source, first_index=index):
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
    if shard.url.startswith("s3://"):
        from sigray.workers.data.s3 import ObjectInfo, S3Stream, ShardCache

        info = ObjectInfo(shard.url, shard.num_bytes, shard.fingerprint.removeprefix("etag-"))
        if data.shard_cache is None:
            return S3Stream(info, data.s3, start)
        cache = ShardCache(data.shard_cache, int(data.shard_cache_gib * 2**30))
        while True:
            with suppress(FileNotFoundError):  # another process evicted the copy before it was opened
                return MappedFile(cache.path_of(info, data.s3), start)
    try:
        now = _stat_local(shard.url)
        source = MappedFile(shard.url, start)
    except OSError as error:
        reason = _reason(error, shard.url)
        raise DataError(f"{shard.url}: {reason}, though it was there when the run began") from error
    if (now.num_bytes, now.fingerprint) != (shard.num_bytes, shard.fingerprint):
        raise DataError(
            f"{shard.url} changed since the run's manifest was made ({shard.num_bytes} bytes, {shard.fingerprint}; now "
            f"{now.num_bytes} bytes, {now.fingerprint}): put the old shard back, or start a new run on the new data"
        )
    return source


def _read_headers(file: ShardFile, data: DataConfig) -> ShardCount | str:
    """Count the samples of a shard by its headers; a text says what is damaged."""
    marks: list[int] = []
    endings: set[str] = set()
    num_samples = num_pairs = 0
    try:
        with closing(open_shard(file, data)) as source:
            for sample in read_tar(source, headers_only=True):
                if sample.index and sample.index % _MARK_EVERY == 0:
                    marks.append(sample.position)
                num_pairs += is_pair(sample, data)
                endings.update(sample.members)
                num_samples += 1
    except (DataError, OSError) as error:
        return _reason(error, file.url)
    return ShardCount(num_samples, tuple(marks), num_pairs, tuple(sorted(endings)))


def _check_end(file: ShardFile, data: DataConfig) -> str | None:
    """Return what is wrong with a tar's end: the only check of a tar with a sidecar."""
    size = 2 * BLOCK
    if file.num_bytes < size or file.num_bytes % BLOCK:
        return f"cut short: {file.num_bytes} bytes are not a whole tar"
    try:
        with closing(open_shard(file, data, file.num_bytes - size)) as source:
            return None if bytes(source.read(size)) == bytes(size) else str(cut_short(file.num_bytes))
    except (DataError, OSError) as error:
        return _reason(error, file.url)


def is_pair(sample: TarSample, data: DataConfig) -> bool:
    """Return whether a sample has an image member and a caption member."""
    has_image = any(ending in sample.members for ending in data.image_keys)
    return has_image and any(caption_member(source) in sample.members for source in data.captions)


def caption_member(source: str) -> str:
    """Return the ending of a caption source's member: `json` for `json:captions.en`."""
    return source.partition(":")[0]


def _known_counts(files: list[ShardFile], data: DataConfig) -> dict[ShardFile, ShardCount]:
    """Return the counts from this machine's cache, else from sidecars."""
    known: dict[ShardFile, ShardCount] = {}
    for folder, in_folder in _by_folder(files).items():
        known |= _cached_counts(in_folder, _read_json(str(_cache_path(folder, data)), data.s3))
        if unknown := [file for file in in_folder if file not in known]:
            known |= _sidecar_counts(folder, unknown, data.s3)
    return known


def _by_folder(files: Iterable[ShardFile]) -> dict[str, list[ShardFile]]:
    folders: dict[str, list[ShardFile]] = {}
    for file in files:
        folders.setdefault(file.url.rpartition("/")[0], []).append(file)
    return folders


def _cache_path(folder: str, data: DataConfig) -> Path:
    """Return the cache file of a folder and of the members that make a pair."""
    what = json.dumps([folder, data.image_keys, [caption_member(source) for source in data.captions]])
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "sigray", "shards", f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.json")


def _cache_key(file: ShardFile) -> str:
    return f"{file.url} {file.num_bytes} {file.fingerprint}"


def _cached_counts(files: list[ShardFile], cache: dict[str, Any]) -> dict[ShardFile, ShardCount]:
    found = {}
    with suppress(TypeError, KeyError):  # a damaged cache: the rest is counted again
        for file in files:
            if (entry := cache.get(_cache_key(file))) is not None:
                lists = {"marks": tuple(entry["marks"]), "endings": tuple(entry["endings"])}
                found[file] = ShardCount(**{**entry, **lists})
    return found


def _cache_counts(counts: dict[ShardFile, ShardCount], data: DataConfig) -> None:
    """Cache the results of header passes; an unwritable cache is not an error."""
    for folder, files in _by_folder(counts).items():
        path = _cache_path(folder, data)
        saved = _read_json(str(path), data.s3)
        entries = {_cache_key(file): asdict(counts[file]) for file in files if counts[file].endings}
        if entries.keys() <= saved.keys():
            continue
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
            temporary.write_text(json.dumps(saved | entries))
            temporary.replace(path)


def _sidecar_counts(folder: str, files: list[ShardFile], s3: S3Config) -> dict[ShardFile, ShardCount]:
    """Return counts from sidecars: wids index, sizes.json, NAME_stats.json."""
    counts: dict[str, int] = {}
    for name in _WIDS_INDEX:
        entries = _read_json(f"{folder}/{name}", s3).get("shardlist")
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("nsamples"), int):
                counts[str(entry.get("url", "")).rpartition("/")[2]] = entry["nsamples"]
    counts |= {name: size for name, size in _read_json(f"{folder}/sizes.json", s3).items() if isinstance(size, int)}
    names = {file: file.url.rpartition("/")[2] for file in files}
    unknown = {
        name: file.url.removesuffix(".tar") + "_stats.json" for file, name in names.items() if name not in counts
    }
    # img2dataset writes a file for each tar: if the first tar has none, no tar has one.
    if unknown and "successes" in _read_json(next(iter(unknown.values())), s3):
        contents = in_threads(lambda url: _read_json(url, s3), list(unknown.values()))
        for name, content in zip(unknown, contents, strict=True):
            if isinstance(content.get("successes"), int):
                counts[name] = content["successes"]
    return {file: ShardCount(counts[name]) for file, name in names.items() if name in counts}


def _read_json(url: str, s3: S3Config) -> dict[str, Any]:
    """Read a small JSON object; {} if it is missing or damaged."""
    with suppress(OSError, ValueError):
        if url.startswith("s3://"):
            from sigray.workers.data.s3 import read_object

            content = json.loads(read_object(url, s3))
        else:
            content = json.loads(Path(url).read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def _check_pairs(name: str, files: list[ShardFile], counts: dict[ShardFile, ShardCount], data: DataConfig) -> None:
    """Refuse a dataset without a usable pair; search a shard if no pass found endings."""
    passes = [counts[file] for file in files]
    if any(count.num_pairs for count in passes):
        return
    endings = {ending for count in passes for ending in count.endings}
    if not all(count.endings for count in passes if count.num_samples):
        first = next(file for file in files if not counts[file].endings)
        try:
            with closing(open_shard(first, data)) as source:
                for sample in read_tar(source, headers_only=True):
                    if is_pair(sample, data):
                        return
                    endings.update(sample.members)
                    if sample.index == _NUM_CHECKED:
                        break
        except DataError as error:
            raise _unreadable([f"{first.url}: {error}"]) from error
    of_dataset = f"of data.shards.{name} " if name else ""
    raise DataError(
        f"no usable pair in {len(files)} shards {of_dataset}({files[0].url} first): a sample needs an image member "
        f"({', '.join(data.image_keys)}) and a caption member ({', '.join(map(caption_member, data.captions))}); "
        f"members found end in {', '.join(sorted(endings)) or 'nothing'}. Set data.image_keys and data.captions"
    )


def _find(patterns: Patterns, s3: S3Config, broken: list[str]) -> list[ShardFile]:
    """Return the tars that patterns name; append what is missing to `broken`."""
    found = list_shards(patterns, s3)
    unknown = [url for url, file in found.items() if file is None]
    for url, result in zip(unknown, in_threads(lambda url: _stat(url, s3), unknown), strict=True):
        if isinstance(result, str):
            broken.append(f"{url}: {result}")
        else:
            found[url] = result
    return [file for file in found.values() if file is not None]


def _stat(url: str, s3: S3Config) -> ShardFile | str:
    try:
        if url.startswith("s3://"):
            from sigray.workers.data.s3 import stat

            info = stat(url, s3)
            return ShardFile(url, info.num_bytes, f"etag-{info.etag}")
        return _stat_local(url)
    except (DataError, OSError) as error:
        return _reason(error, url)


def _stat_local(url: str) -> ShardFile:
    status = os.stat(url)
    return ShardFile(url, status.st_size, f"mtime-{status.st_mtime_ns}")


def _unreadable(broken: list[str]) -> DataError:
    shown = "\n  ".join(broken[:20]) + (f"\n  and {len(broken) - 20} more" if len(broken) > 20 else "")
    return DataError(f"shards that cannot be read, {len(broken)}:\n  {shown}")


def _reason(error: Exception, url: str) -> str:
    text = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
    return text.removeprefix(f"{url}: ")


def _what_exists(pattern: str) -> str:
    """Describe the fixed front part of a pattern that names nothing."""
    if pattern.startswith("s3://"):
        return "no object's key begins with that prefix and ends in .tar"
    fixed = re.split(r"[*?\[{]", pattern)[0]
    folder = Path(fixed if fixed.endswith("/") or os.path.isdir(fixed) else os.path.dirname(fixed)).absolute()
    return f"the folder {folder} {'exists' if folder.is_dir() else 'does not exist'}"
