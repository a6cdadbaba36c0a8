"""Finding shards and knowing them: patterns to URLs, counts to a manifest, a shard's bytes to its samples.

The manifest (url, bytes, sample count, fingerprint of every shard) is what a run's order is computed from, so it is
made once, before anything is spent, and saved with the run; a shard that changed since is an error that names it.

Counts come from where they are cheapest: this machine's memory of an earlier pass over the same bytes, a sidecar
beside the tars (a wids index, img2dataset's `_stats.json`, a `sizes.json`), else one pass over the tar's headers, which
also finds damage and notes where every 256th sample begins, so that reading can start there.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sigray.workers.config import DataConfig, Patterns, S3Config, WeightedShards
from sigray.workers.data.tar import BLOCK, ByteSource, DataError, MappedFile, TarSample, cut_short, read_tar

_MARK_EVERY = 256
_LOOK_AT = 64  # samples of the first shard that are looked at where sidecars tell the counts
_WIDS_INDEX = ("index.json", "shardindex.json", "wids-meta.json")


@dataclass(frozen=True)
class Shard:
    """One tar. `fingerprint` changes when its content does: the ETag in S3, else the modification time in ns."""

    url: str
    num_bytes: int
    num_samples: int
    fingerprint: str
    dataset: str = ""
    marks: tuple[int, ...] = ()  # first bytes of samples 256, 512, ...; empty where a sidecar told the count


@dataclass(frozen=True)
class Manifest:
    """All shards of a run, dataset by dataset, in the order of the patterns and, within each, by name."""

    shards: tuple[Shard, ...]
    store: dict[str, Any] | None = None  # where the shards are those of an embedding store: its StoreFormat

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    def datasets(self) -> dict[str, list[Shard]]:
        """The shards of each dataset."""
        found: dict[str, list[Shard]] = {}
        for shard in self.shards:
            found.setdefault(shard.dataset, []).append(shard)
        return found

    def to_json(self) -> dict[str, Any]:
        # Not `asdict`, which copies every mark by itself: 11 s for 100,000 shards of 10,000 samples.
        shards = [{**vars(shard), "marks": list(shard.marks)} for shard in self.shards]
        return {"shards": shards, "store": self.store}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Manifest:
        shards = tuple(Shard(**{**shard, "marks": tuple(shard["marks"])}) for shard in content["shards"])
        return cls(shards, content["store"])

    def differences(self, now: Manifest) -> list[str]:
        """What changed in the shards since this manifest was made, one line each."""
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
    """What a pass over a shard's headers finds."""

    num_samples: int
    marks: tuple[int, ...] = ()
    num_pairs: int = 0  # samples with an image and a caption member
    endings: tuple[str, ...] = ()


def list_shards(patterns: Patterns, s3: S3Config) -> list[str]:
    """The URLs of all tars that the patterns name: absolute paths and s3:// URLs.

    Args:
        patterns: each a path, a glob, a brace pattern (`train-{000000..000127}.tar`), a folder, or an s3:// prefix.
        s3: how s3:// is reached.

    Raises:
        DataError: where a pattern names nothing, or two patterns name the same shard.
    """
    return [url for url, _ in _list(patterns, s3)]


def _list(patterns: Patterns, s3: S3Config) -> list[tuple[str, ShardFile | None]]:
    """URLs, and what a listing already tells of them."""
    import braceexpand

    found: list[tuple[str, ShardFile | None]] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        of_pattern: list[tuple[str, ShardFile | None]] = []
        for name in braceexpand.braceexpand(pattern):
            if name.startswith("s3://") and not name.endswith(".tar"):
                of_pattern += [(file.url, file) for file in _list_s3(name, s3)]
            elif name.startswith("s3://"):
                of_pattern.append((name, None))
            else:
                if os.path.isdir(name):
                    names = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
                else:
                    names = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
                of_pattern += [(os.path.abspath(path), None) for path in names]
        if not of_pattern:
            raise DataError(f"no shards: {pattern!r} names no .tar file; {_where(pattern)}")
        found += of_pattern
    urls = [url for url, _ in found]
    doubles = sorted({url for url in urls if urls.count(url) > 1}) if len(set(urls)) < len(urls) else []
    if doubles:
        raise DataError(f"{doubles[0]} is named twice by the patterns {patterns}: every shard must be named once")
    return found


ParallelMap = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]
"""(function, items) -> results in the items' order."""


def in_threads(function: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    """A `ParallelMap` of this process."""
    with ThreadPoolExecutor(min(16, len(items) or 1)) as pool:
        yield from pool.map(function, items)


def scan_shards(
    patterns: Patterns | dict[str, WeightedShards],
    data: DataConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
    parallel_map: ParallelMap = in_threads,
) -> Manifest:
    """The manifest of the shards that the patterns name, read as a data section says.

    Args:
        patterns: of one dataset, or of several by name.
        data: image and caption keys, S3.
        progress: called as progress(done, total) before the first header pass and after each; total counts only
            shards whose samples nobody has counted yet.
        parallel_map: runs the header passes.

    Raises:
        DataError: as `list_shards`; for shards that are missing, unreadable, damaged or cut short, all of them named in
            one message; and where no sample of a dataset has both an image and a caption.
    """
    datasets = {name: part.shards for name, part in patterns.items()} if isinstance(patterns, dict) else {"": patterns}
    broken: list[str] = []
    files = {name: _find(part, data.s3, broken) for name, part in datasets.items()}
    everything = [file for part in files.values() for file in part]
    times_named = Counter(file.url for file in everything)
    if (twice := times_named.most_common(1)) and twice[0][1] > 1:
        raise DataError(f"{twice[0][0]} is in two datasets of data.shards: every shard must be named once")
    counts = _Counts(data, everything)
    missing = [file for file in everything if file not in counts.known]
    if missing:
        progress(0, len(missing))
        scanned = parallel_map(_HeaderPass(data), missing)
        for done, (file, result) in enumerate(zip(missing, scanned, strict=True), start=1):
            if isinstance(result, str):
                broken.append(f"{file.url}: {result}")
            else:
                counts.known[file] = result
            progress(done, len(missing))
    from_sidecars = [file for file in everything if not counts.known.get(file, _SCANNED).endings]
    for file, problem in zip(from_sidecars, in_threads(lambda f: _check_end(f, data), from_sidecars), strict=True):
        broken += [f"{file.url}: {problem}"] if problem else []
    if broken:
        raise _unreadable(broken)
    for name, part in files.items():
        _check_pairs(name, part, counts, data)
    counts.remember()
    return Manifest(
        tuple(
            Shard(
                file.url,
                file.num_bytes,
                counts.known[file].num_samples,
                file.fingerprint,
                name,
                counts.known[file].marks,
            )
            for name, part in files.items()
            for file in part
        )
    )


def read_samples(shard: Shard, data: DataConfig, *, start: int = 0) -> Iterator[TarSample]:
    """The samples of a shard from number `start` on.

    Raises:
        DataError: where the shard is not the one of the manifest any more, is damaged, or yields another number of
            samples than the manifest names.
    """
    mark = min(start // _MARK_EVERY, len(shard.marks))
    position, index = (shard.marks[mark - 1], mark * _MARK_EVERY) if mark else (0, 0)
    source = open_shard(shard, data, position)
    try:
        sample = None
        for sample in read_tar(source, first_index=index):
            if sample.index >= start:
                yield sample
    except DataError as error:
        message = str(error)
        raise error if message.startswith(shard.url) else DataError(f"{shard.url}: {message}") from error
    finally:
        source.close()
    num_read = sample.index + 1 if sample is not None else index
    if num_read != shard.num_samples:
        raise DataError(
            f"{shard.url}: {num_read} samples read, {shard.num_samples} in the manifest: the sidecar that told the "
            "count (index.json, sizes.json or _stats.json beside the tar) is wrong; delete it and start again"
        )


def open_shard(shard: Shard | ShardFile, data: DataConfig, start: int = 0) -> ByteSource:
    """A shard's bytes from `start` on.

    Raises:
        DataError: where it is missing, or not the shard that the manifest names any more.
    """
    if shard.url.startswith("s3://"):
        from sigray.workers.data.s3 import ObjectInfo, S3Stream, ShardCache

        info = ObjectInfo(shard.url, shard.num_bytes, shard.fingerprint.removeprefix("etag-"))
        if data.shard_cache is None:
            return S3Stream(info, data.s3, start)
        cache = ShardCache(data.shard_cache, int(data.shard_cache_gib * 2**30))
        while True:
            with contextlib.suppress(FileNotFoundError):  # another process needed the room before it was opened
                return MappedFile(cache.path_of(info, data.s3), start)
    try:
        status = os.stat(shard.url)
        source = MappedFile(shard.url, start)
    except OSError as error:
        raise DataError(f"{shard.url}: {_reason(error)}, though it was there when the run began") from error
    now = status.st_size, _local_fingerprint(status)
    if now != (shard.num_bytes, shard.fingerprint):
        raise DataError(
            f"{shard.url} changed since the run's manifest was made ({shard.num_bytes} bytes, {shard.fingerprint}; now "
            f"{now[0]} bytes, {now[1]}): put the old shard back, or start a new run on the new data"
        )
    return source


class _HeaderPass:
    """Reads every header of a shard once. A class and not a closure: it travels to other machines."""

    def __init__(self, data: DataConfig) -> None:
        self._data = data

    def __call__(self, file: ShardFile) -> ShardCount | str:
        """The count, or what is wrong with the shard."""
        data = self._data
        marks, endings, num_samples, num_pairs = [], set[str](), 0, 0
        try:
            source = open_shard(file, data)
            try:
                for sample in read_tar(source, headers_only=True):
                    if sample.index and sample.index % _MARK_EVERY == 0:
                        marks.append(sample.position)
                    num_pairs += is_pair(sample, data)
                    endings.update(sample.members)
                    num_samples += 1
            finally:
                source.close()
        except (DataError, OSError) as error:
            return _reason(error).removeprefix(f"{file.url}: ")
        return ShardCount(num_samples, tuple(marks), num_pairs, tuple(sorted(endings)))


_SCANNED = ShardCount(0, endings=("",))


def _check_end(file: ShardFile, data: DataConfig) -> str | None:
    """What a tar's last bytes say is wrong with it: all that is looked at where a sidecar tells the count."""
    size = 2 * BLOCK
    if file.num_bytes < size or file.num_bytes % BLOCK:
        return f"cut short: {file.num_bytes} bytes are not a whole tar"
    try:
        source = open_shard(file, data, file.num_bytes - size)
        try:
            return None if bytes(source.read(size)) == bytes(size) else str(cut_short(file.num_bytes))
        finally:
            source.close()
    except (DataError, OSError) as error:
        return _reason(error).removeprefix(f"{file.url}: ")


def is_pair(sample: TarSample, data: DataConfig) -> bool:
    """Whether a sample has an image member and a caption member, by their endings."""
    has_image = any(ending in sample.members for ending in data.image_keys)
    return has_image and any(caption_member(source) in sample.members for source in data.captions)


def caption_member(source: str) -> str:
    """The ending of the member that a caption source stands in: that of `json:captions.en` is `json`."""
    return source.partition(":")[0]


@dataclass
class _Counts:
    """What is known of shards without reading them, and a memory of it on this machine."""

    data: DataConfig
    files: list[ShardFile]
    known: dict[ShardFile, ShardCount] = field(default_factory=dict)

    def __post_init__(self) -> None:
        by_folder: dict[str, list[ShardFile]] = {}
        for file in self.files:
            by_folder.setdefault(file.url.rpartition("/")[0], []).append(file)
        self._memory = {folder: _memory_path(folder, self.data) for folder in by_folder}
        self._saved: dict[str, dict[str, Any]] = {}  # what the memory of a folder held
        for folder, files in by_folder.items():
            self._recall(folder, files)
            unknown = [file for file in files if file not in self.known]
            if unknown:
                self.known |= _sidecar_counts(folder, unknown, self.data.s3)

    def _recall(self, folder: str, files: list[ShardFile]) -> None:
        self._saved[folder] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            self._saved[folder] |= json.loads(self._memory[folder].read_text())
            for file in files:
                entry = self._saved[folder].get(f"{file.url} {file.num_bytes} {file.fingerprint}")
                if entry is not None:
                    self.known[file] = ShardCount(
                        entry["num_samples"], tuple(entry["marks"]), entry["num_pairs"], tuple(entry["endings"])
                    )

    def remember(self) -> None:
        """Keep what header passes found; a machine that cannot is no reason to fail."""
        for folder, path in self._memory.items():
            entries = {
                f"{file.url} {file.num_bytes} {file.fingerprint}": asdict(count)
                for file, count in self.known.items()
                if file.url.rpartition("/")[0] == folder and count.endings
            }
            if not entries.keys() - self._saved[folder].keys():
                continue
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
                temporary.write_text(json.dumps(self._saved[folder] | entries))
                temporary.replace(path)


def _memory_path(folder: str, data: DataConfig) -> Path:
    """Where the counts of a folder's shards are kept. They depend on which members make a pair."""
    what = json.dumps([folder, data.image_keys, [caption_member(source) for source in data.captions]])
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "sigray", "shards", f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.json")


def _sidecar_counts(folder: str, files: list[ShardFile], s3: S3Config) -> dict[ShardFile, ShardCount]:
    """Counts that somebody wrote beside the tars: a wids index, sizes.json, img2dataset's NAME_stats.json."""
    counts: dict[str, int] = {}
    for name in _WIDS_INDEX:
        index = _read_json(f"{folder}/{name}", s3)
        if isinstance(index, dict) and isinstance(index.get("shardlist"), list):
            for entry in index["shardlist"]:
                if isinstance(entry, dict) and isinstance(entry.get("nsamples"), int):
                    counts[str(entry.get("url", "")).rpartition("/")[2]] = entry["nsamples"]
    sizes = _read_json(f"{folder}/sizes.json", s3)
    if isinstance(sizes, dict):
        counts |= {name: size for name, size in sizes.items() if isinstance(size, int)}
    found = {}
    unknown = [file for file in files if file.url.rpartition("/")[2] not in counts]
    # img2dataset writes one for each tar: where the first has none, none has.
    stats = _read_json(_stats_url(unknown[0]), s3) if unknown else None
    if isinstance(stats, dict) and "successes" in stats:
        for file, content in zip(unknown, in_threads(lambda f: _read_json(_stats_url(f), s3), unknown), strict=True):
            if isinstance(content, dict) and isinstance(content.get("successes"), int):
                counts[file.url.rpartition("/")[2]] = content["successes"]
    for file in files:
        if (count := counts.get(file.url.rpartition("/")[2])) is not None:
            found[file] = ShardCount(count)
    return found


def _stats_url(file: ShardFile) -> str:
    return f"{file.url.removesuffix('.tar')}_stats.json"


def _read_json(url: str, s3: S3Config) -> Any:
    """A small JSON file, None where there is none or it is something else."""
    try:
        if url.startswith("s3://"):
            from sigray.workers.data.s3 import read_object

            return json.loads(read_object(url, s3))
        return json.loads(Path(url).read_bytes())
    except (OSError, ValueError):
        return None


def _check_pairs(name: str, files: list[ShardFile], counts: _Counts, data: DataConfig) -> None:
    """Refuse a dataset without a usable pair. Where only sidecars told the counts, its first shard is looked into."""
    passes = [counts.known[file] for file in files]
    if any(count.num_pairs for count in passes):
        return
    endings = {ending for count in passes for ending in count.endings}
    if not all(count.endings for count in passes if count.num_samples):
        first = next(file for file in files if not counts.known[file].endings)
        source = open_shard(first, data)
        try:
            for sample in read_tar(source, headers_only=True):
                if is_pair(sample, data):
                    return
                endings.update(sample.members)
                if sample.index == _LOOK_AT:
                    break
        except DataError as error:
            raise _unreadable([f"{first.url}: {error}"]) from error
        finally:
            source.close()
    of_dataset = f"of data.shards.{name} " if name else ""
    raise DataError(
        f"no usable pair in {len(files)} shards {of_dataset}({files[0].url} first): a sample needs an image member "
        f"({', '.join(data.image_keys)}) and a caption member ({', '.join(map(caption_member, data.captions))}); "
        f"members found end in {', '.join(sorted(endings)) or 'nothing'}. Set data.image_keys and data.captions"
    )


def _find(patterns: Patterns, s3: S3Config, broken: list[str]) -> list[ShardFile]:
    """The tars that patterns name, with size and fingerprint; those that are not there go to `broken`, with reasons."""
    found = _list(patterns, s3)
    unknown = [url for url, file in found if file is None]
    files = {url: file for url, file in found if file is not None}
    for url, result in zip(unknown, in_threads(lambda url: _stat(url, s3), unknown), strict=True):
        if isinstance(result, str):
            broken.append(f"{url}: {result}")
        else:
            files[url] = result
    return [files[url] for url, _ in found if url in files]


def _stat(url: str, s3: S3Config) -> ShardFile | str:
    try:
        if url.startswith("s3://"):
            from sigray.workers.data.s3 import stat

            info = stat(url, s3)
            return ShardFile(url, info.num_bytes, f"etag-{info.etag}")
        status = os.stat(url)
        return ShardFile(url, status.st_size, _local_fingerprint(status))
    except (DataError, OSError) as error:
        return _reason(error).removeprefix(f"{url}: ")


def _local_fingerprint(status: os.stat_result) -> str:
    return f"mtime-{status.st_mtime_ns}"


def _list_s3(url: str, s3: S3Config) -> list[ShardFile]:
    from sigray.workers.data.s3 import list_objects

    infos = list_objects(url, s3)
    return [ShardFile(info.url, info.num_bytes, f"etag-{info.etag}") for info in infos if info.url.endswith(".tar")]


def _unreadable(broken: list[str]) -> DataError:
    shown = "\n  ".join(broken[:20]) + (f"\n  and {len(broken) - 20} more" if len(broken) > 20 else "")
    return DataError(f"shards that cannot be read, {len(broken)}:\n  {shown}")


def _reason(error: Exception) -> str:
    return f"{error.strerror.lower()}" if isinstance(error, OSError) and error.strerror else str(error)


def _where(pattern: str) -> str:
    """What there is at the fixed front part of a pattern that names nothing."""
    if pattern.startswith("s3://"):
        return "no object's key begins with that prefix and ends in .tar"
    fixed = re.split(r"[*?\[{]", pattern)[0]
    folder = Path(fixed if fixed.endswith("/") or os.path.isdir(fixed) else os.path.dirname(fixed)).absolute()
    return f"the folder {folder} {'exists' if folder.is_dir() else 'does not exist'}"
