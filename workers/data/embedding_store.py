"""Store a locked image tower's outputs, computed once, as WebDataset tars.

    n  samples of a shard       V  views of an image       D  embedding dimension

For each tar of images there is one tar with the same samples in the same order. In the place of the image it has
`embedding.safetensors`, a (V, D) tensor of unit rows named `embedding`, beside the members with captions and classes.
So a store is streamed like any other data, in the same order, from disk or S3, and webdataset and safetensors read it.
A sample with a refused image has `refused.txt` with the reason instead; training counts and replaces the sample as it
would without a store.

    STORE/store.json                 what made it: the key, the format; written first
    STORE/train/NAME-HASH.tar        embeddings of NAME.tar; HASH is of the URL and content of that shard
    STORE/train/NAME-HASH.json       written when the tar is complete: source, counts
    STORE/eval/...                   the same for the held-out sets, always of the centre of the image
    STORE/history/00000.json         what each `sigray embed` did

A replaced shard gets another hash, so a store grows with its data and never mixes old with new.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, FiniteFloat

from sigray.workers.config import DataConfig, EmbeddingsConfig, ModelConfig, Precision, caption_member
from sigray.workers.data.decode import IMAGE_REASONS, Refused
from sigray.workers.data.manifest import Manifest, Shard, read_samples, scan_shards
from sigray.workers.data.shard_list import ParallelMap, ShardFile, in_threads
from sigray.workers.data.tar import DataError, TarSample
from sigray.workers.model.inputs import ImageInputs, image_inputs, shapes
from sigray.workers.parse import Count, ParseError, Record, as_type, parse_json
from sigray.workers.storage import Storage
from sigray.workers.texts import ten_lines

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING = "embedding.safetensors"
REFUSED = "refused.txt"
VERSION = 1
_INDEX = "store.json"
_HISTORY = "history"
_TORCH = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_SAFETENSORS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_NUMPY = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}  # numpy knows no bfloat16

Part = Literal["train", "eval"]
_Size = Annotated[int, Field(gt=0, lt=2**20)]


class StoreError(DataError):
    """A store that does not fit the run; the message has store, reason and remedy."""


@dataclass(frozen=True)
class StoreFormat:
    """Format of a store's embeddings: V views of D numbers."""

    dtype: Literal["bf16", "fp16", "fp32"]
    dim: _Size
    num_views: _Size

    @property
    def numpy_dtype(self) -> Any:
        return _NUMPY[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of an embedding's numbers."""
        return self.num_views * self.dim * np.dtype(self.numpy_dtype).itemsize

    def prefix(self) -> bytes:
        """Return safetensors' header, with which every member of this format begins."""
        place = {"dtype": _SAFETENSORS[self.dtype], "shape": [self.num_views, self.dim]}
        header = json.dumps({"embedding": {**place, "data_offsets": [0, self.num_bytes]}}, separators=(",", ":"))
        header += " " * (-len(header) % 8)
        return struct.pack("<Q", len(header)) + header.encode()


class EmbeddingReader:
    """Reads a view of an embedding from a sample's members."""

    def __init__(self, store_format: StoreFormat) -> None:
        self._format = store_format
        self._prefix = store_format.prefix()
        self._num_bytes = len(self._prefix) + store_format.num_bytes

    def read(self, members: Mapping[str, Any], view: int) -> np.ndarray:
        """Return a view, (D,) of the format's numpy type.

        Raises:
            Refused: the reason of the image's refusal, "no embedding" or "unreadable embedding".
        """
        content = members.get(EMBEDDING)
        if content is None:
            reason = members.get(REFUSED)
            if reason is None:
                raise Refused("no embedding")
            # Only what `sigray embed` writes: each further text would be a reason, and a metric, of its own.
            text = str(reason[:64], "utf-8", "replace")
            raise Refused(text if text in IMAGE_REASONS else "unreadable embedding")
        if len(content) != self._num_bytes or content[: len(self._prefix)] != self._prefix:
            raise Refused("unreadable embedding")
        dim = self._format.dim
        start = len(self._prefix) + view * (self._format.num_bytes // self._format.num_views)
        return np.frombuffer(content, self._format.numpy_dtype, count=dim, offset=start)


@dataclass(frozen=True)
class StoredShard:
    """A complete tar of a store: the content of its JSON file."""

    part: Part
    source: str
    source_bytes: Count
    source_fingerprint: str
    num_samples: Count
    num_refused: Count
    num_bytes: Count
    refused: dict[str, Count] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class _Index:
    key: dict[str, Any]
    format: StoreFormat


@dataclass(frozen=True)
class HistoryEntry:
    """What one `sigray embed` did."""

    num_images: Count
    seconds: FiniteFloat


def store_key(
    model: ModelConfig, data: DataConfig, embeddings: EmbeddingsConfig, *, sha256: str, precision: Precision
) -> dict[str, Any]:
    """Return what an embedding depends on, except the image and the kind of device.

    Stores with equal keys made on one kind of device hold equal numbers.

    Args:
        sha256: of the tower, see `sigray.workers.model.image_towers.tower_sha256`.
        precision: of the tower, the same as in training.
    """
    crop: dict[str, Any] = {"crop": data.crop}
    if data.crop == "random":
        crop |= {"crop_scale": list(data.crop_scale), "crop_ratio": list(data.crop_ratio)}
    return {
        "tower_sha256": sha256,
        "precision": precision,
        "image_size": shapes(model)[0],
        **_image_key(model),
        **crop,
        "max_image_pixels": data.max_image_pixels,
        "image_keys": data.image_keys,
        "members": kept_members(data),
        "dtype": embeddings.dtype,
        "num_views": embeddings.num_views,
    }


def _image_key(model: ModelConfig) -> dict[str, Any]:
    """Return how images are prepared, without what older stores lack and meant."""
    found = dataclasses.asdict(image_inputs(model))
    before = dataclasses.asdict(ImageInputs())
    kept = {name for name in found if name in ("image_mean", "image_std") or found[name] != before[name]}
    return {name: list(found[name]) if isinstance(found[name], tuple) else found[name] for name in sorted(kept)}


def kept_members(data: DataConfig) -> list[str]:
    """Return the endings of members that a store copies: captions, JSON for classes."""
    return sorted({caption_member(source) for source in data.captions} | {"json"})


class EmbeddingStore:
    """The files of one store.

    Args:
        uri: its folder or s3:// prefix.
    """

    def __init__(self, uri: str) -> None:
        self.storage = Storage(uri)
        self.uri = self.storage.uri

    def begin(self, key: dict[str, Any], store_format: StoreFormat) -> None:
        """Make the store, or continue it.

        Raises:
            StoreError: the folder holds a store of another key; the message has the differences.
            StorageError: the store cannot be written.
        """
        self.storage.check_writable()
        if self.storage.exists(_INDEX):
            self.check(key)
            return
        content = {"version": VERSION, "key": key, "format": asdict(store_format)}
        self.storage.write(_INDEX, json.dumps(content, indent=1).encode())

    def check(self, key: dict[str, Any]) -> None:
        """Refuse a store of another key.

        Raises:
            StoreError: the keys differ; the message has the differences.
        """
        saved = self._index().key
        members = saved.get("members")
        members = set(map(str, members)) if isinstance(members, list) else set()
        lines = [
            f"{name}: the store has {saved.get(name)!r:.200}, this config {key.get(name)!r:.200}"
            for name in sorted(saved.keys() | key.keys())
            # A store may have more members than this config needs.
            if (not set(key[name]) <= members if name == "members" else saved.get(name) != key.get(name))
        ]
        if lines:
            raise StoreError(
                f"embeddings.store={self.uri} was made by another tower or preprocessing:\n  {ten_lines(lines)}\n"
                "Set these as they were, or give another embeddings.store and run `sigray embed` again"
            )

    def format(self) -> StoreFormat:
        return self._index().format

    def image_inputs(self) -> dict[str, Any]:
        """Return how the images of the store were prepared; empty without a store."""
        if not self.storage.exists(_INDEX):
            return {}
        key = self._index().key
        before = dataclasses.asdict(ImageInputs())
        found = {name: key.get(name, before[name]) for name in before}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}

    def _index(self) -> _Index:
        try:
            version = self._read(dict[str, Any], _INDEX).get("version")
        except FileNotFoundError:
            raise StoreError(
                f"embeddings.store={self.uri} holds no store yet: make it with `sigray embed` and this config"
            ) from None
        if version != VERSION:
            raise StoreError(
                f"embeddings.store={self.uri} is of version {version!r:.20}, this sigray reads {VERSION}: "
                "make it again in another folder"
            )
        return self._read(_Index, _INDEX)

    def _read(self, kind: type[Record], path: str) -> Record:
        content = self.storage.read(path)
        try:
            return as_type(kind, parse_json(content))
        except ParseError as error:
            raise StoreError(f"{self.uri}/{path} is damaged: {error}") from None

    def complete(self, part: Part) -> dict[str, StoredShard]:
        """Return the complete tars of a part, by name without ending."""
        names = [name.removesuffix(".json") for name in self.storage.list(part) if name.endswith(".json")]
        shards = in_threads(lambda name: self._read(StoredShard, f"{part}/{name}.json"), names)
        return dict(zip(names, shards, strict=True))

    def write(self, name: str, shard: StoredShard, content: bytes) -> None:
        """Add one complete tar."""
        self.storage.write(f"{shard.part}/{name}.tar", content)
        self.storage.write(f"{shard.part}/{name}.json", json.dumps(asdict(shard)).encode())

    def add_history(self, entry: dict[str, Any]) -> None:
        """Keep what one `sigray embed` did: {"num_images", "seconds", ...}."""
        self.storage.write(f"{_HISTORY}/{len(self.storage.list(_HISTORY)):05d}.json", json.dumps(entry).encode())

    def history(self) -> list[HistoryEntry]:
        """Return what each complete `sigray embed` did, in order."""
        names = self.storage.list(_HISTORY)
        return [self._read(HistoryEntry, f"{_HISTORY}/{name}") for name in names if name.endswith(".json")]

    def url(self, part: Part, name: str) -> str:
        return f"{self.uri}/{part}/{name}.tar"

    def manifest(self, source: Manifest, data: DataConfig, parallel_map: ParallelMap = in_threads) -> Manifest:
        """Return the manifest of a run that trains from the store instead of the source.

        The shards and samples of both match one to one.

        Raises:
            StoreError: shards of the source are not in the store, or have another number of samples there.
            DataError: tars of the store are missing or damaged.
        """
        stored = self.complete("train")
        names = [stored_name(shard) for shard in source.shards]
        missing = [shard.url for shard, name in zip(source.shards, names, strict=True) if name not in stored]
        if missing:
            raise StoreError(
                f"embeddings.store={self.uri} lacks {len(missing)} of {len(names)} shards, {missing[0]} first: "
                "they are new or have changed, or embedding was interrupted. Run `sigray embed` with this config again"
            )
        as_stored = data.model_copy(update={"image_keys": [EMBEDDING]})
        found = scan_shards([self.url("train", name) for name in names], as_stored, parallel_map=parallel_map)
        shards = []
        for own, other in zip(source.shards, found.shards, strict=True):
            if own.num_samples != other.num_samples:
                raise StoreError(
                    f"{other.url} holds {other.num_samples} samples, {own.url} {own.num_samples}: delete both files of "
                    "that name from the store and run `sigray embed` again"
                )
            shards.append(dataclasses.replace(other, dataset=own.dataset))
        return Manifest(tuple(shards), store=asdict(self.format()))


def stored_name(source: Shard | ShardFile) -> str:
    """Return the name, without ending, of the tar with a shard's embeddings."""
    stem = source.url.rpartition("/")[2].removesuffix(".tar")
    what = f"{source.url} {source.num_bytes} {source.fingerprint}"
    return f"{stem}-{hashlib.sha256(what.encode()).hexdigest()[:10]}"


def write_tar(
    samples: Iterable[tuple[TarSample, Tensor | str]], store_format: StoreFormat, members: list[str]
) -> bytes:
    """Return the bytes of a store's tar, a function of the samples.

    Args:
        samples: each with its (V, D) embedding, or the reason of its refusal.
        members: endings of the members to keep.
    """
    import torch  # here, not above: data-shard workers read stores without it

    prefix = store_format.prefix()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for sample, result in samples:
            contents: list[tuple[str, Any]]
            if isinstance(result, str):
                contents = [(REFUSED, result.encode())]
            else:
                rows = result.to(getattr(torch, _TORCH[store_format.dtype])).contiguous()
                assert rows.shape == (store_format.num_views, store_format.dim)
                contents = [(EMBEDDING, prefix + rows.view(torch.uint8).numpy().tobytes())]
            contents += [(ending, sample.members[ending]) for ending in members if ending in sample.members]
            for ending, content in contents:
                info = tarfile.TarInfo(f"{sample.key}.{ending}")
                info.size = len(content)
                info.mode = 0o644
                tar.addfile(info, io.BytesIO(bytes(content)))
    return buffer.getvalue()


def read_embeddings(
    store: EmbeddingStore, source: Shard, data: DataConfig, start: int = 0
) -> Iterator[np.ndarray | None]:
    """Yield the embedding of each sample of a held-out shard from number `start` on.

    Yields (D,) float32, or None for a refused image.

    Raises:
        StoreError: the shard is not in the store.
        DataError: the shard's tar is damaged.
    """
    name = stored_name(source)
    # Held-out images have one view, whatever number training images have.
    store_format = dataclasses.replace(store.format(), num_views=1)
    # A sample of a set without captions may have an embedding only.
    as_stored = data.model_copy(update={"image_keys": [EMBEDDING], "captions": {EMBEDDING: 1.0}})
    try:
        (shard,) = scan_shards(store.url("eval", name), as_stored).shards
    except DataError as error:
        raise StoreError(
            f"embeddings.store={store.uri} lacks the held-out shard {source.url}: run `sigray embed` with this config "
            f"again ({error})"
        ) from error
    reader = EmbeddingReader(store_format)
    for sample in read_samples(shard, as_stored, start=start):
        try:
            row = reader.read(sample.members, 0)
        except Refused:
            yield None
            continue
        # bfloat16 is the upper half of float32.
        yield (row.astype(np.uint32) << 16).view(np.float32) if row.dtype == np.uint16 else row.astype(np.float32)
