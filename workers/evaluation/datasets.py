"""Held-out sets: their samples, from tars or a folder of images, cut into parts.

    n  images of a set       C  classes      S  image size

A set is WebDataset tars, or a folder with a subfolder of images for each class. It is cut into parts of at most a
batch, in the order of shards or files. The parts follow from the set and `eval.batch_size` alone. So the results for
each part are the same with any number of workers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sigray.workers.config import SUBFOLDERS, DataConfig, EvalSet
from sigray.workers.data.decode import Decoder, Members, Refused, captions_at, read_json
from sigray.workers.data.manifest import Manifest, Shard, read_samples, scan_shards
from sigray.workers.data.tar import DataError, LocalFile, TarSample
from sigray.workers.model.inputs import ImageInputs
from sigray.workers.parse import as_type, parse_json
from sigray.workers.storage import local_copy
from sigray.workers.urls import is_remote

CLASS = "cls"
"""Member with the class, as in webdataset's own classification sets.
Samples of an image folder have it too."""


@dataclass(frozen=True)
class ImageFile:
    """An image of a folder."""

    path: str
    class_id: str  # name of the subfolder


@dataclass(frozen=True)
class Part:
    """Neighbouring samples of a set: numbers `start` to `stop` of a shard or folder."""

    source: Shard | tuple[ImageFile, ...]
    start: int
    stop: int
    shown: tuple[int, ...] = ()  # numbers, in the shard or folder, of samples whose image the sheet shows

    def samples(self, data: DataConfig) -> Iterator[TarSample]:
        """Read the samples.

        Raises:
            DataError: as `read_samples`; for a file that is gone.
        """
        if isinstance(self.source, Shard):
            samples = read_samples(self.source, data, start=self.start)
            yield from islice(samples, self.stop - self.start)
            if self.stop == self.source.num_samples:
                yield from samples  # to the end: there the shard's count is checked
            return
        for number, file in enumerate(self.source, start=self.start):
            try:
                content = Path(file.path).read_bytes()
            except OSError as error:
                raise DataError(f"{file.path}: {error.strerror}, though it was listed before") from error
            yield TarSample(file.path, number, 0, {_ending(file.path): content, CLASS: file.class_id.encode()})


@dataclass
class LoadedSet:
    """Decoded samples; unusable samples are left out and counted."""

    images: np.ndarray  # (n, S, S, 3) uint8
    captions: list[list[str]]  # n; of an image, all its captions; none if the set needs no captions
    places: list[int]  # n; numbers in their shard, or in the folder
    class_ids: list[str]  # n; empty strings if the set has no classes
    refused: Counter[str]  # by reason
    translations: list[list[list[str]]] = field(default_factory=list)  # n; by language of the set, as `translations`


def cut(
    name: str, spec: EvalSet, data: DataConfig, batch_size: int, *, num_shown: int = 0, is_stored: bool = False
) -> list[Part]:
    """The parts of a set, in order.

    Args:
        batch_size: samples of a part.
        num_shown: number of samples, evenly spread, for the sheet.
        is_stored: whether the set's embeddings come from a store.

    Raises:
        DataError: as `check_set`, and if shards are missing or damaged.
    """
    files = check_set(name, spec, data, is_stored=is_stored)
    parts: list[Part] = []
    if files is not None:
        for start in range(0, len(files), batch_size):
            some = tuple(files[start : start + batch_size])
            parts.append(Part(some, start, start + len(some)))
    else:
        for shard in scan_set(name, spec, data).shards:
            # A stream without marks can only be read from its start, so its shards stay whole.
            step = batch_size if shard.marks or not is_remote(shard.url) else shard.num_samples
            parts += [
                Part(shard, start, min(start + step, shard.num_samples)) for start in range(0, shard.num_samples, step)
            ]
    return _show(parts, num_shown)


def _show(parts: list[Part], num_shown: int) -> list[Part]:
    """Give each part its share of the samples for the sheet."""
    total = sum(part.stop - part.start for part in parts)
    count = min(num_shown, total)
    wanted = [index * total // count for index in range(count)]
    result = []
    first = 0
    for part in parts:
        last = first + part.stop - part.start
        shown = tuple(number - first + part.start for number in wanted if first <= number < last)
        result.append(replace(part, shown=shown))
        first = last
    return result


def load(
    samples: Iterable[TarSample], spec: EvalSet, data: DataConfig, image_size: int, inputs: ImageInputs | None = None
) -> LoadedSet:
    """Decode samples of a set.

    Args:
        inputs: how an image becomes a square; None: by its centre.
    """
    decoder = Decoder(data, image_size, inputs)
    images: list[np.ndarray] = []
    loaded = LoadedSet(np.empty((0, image_size, image_size, 3), np.uint8), [], [], [], Counter())
    for sample in samples:
        try:
            captions = decoder.captions(sample.members) if spec.retrieval else []
            own_class = class_id(sample.members, spec) if spec.classes else ""
            image = np.empty((image_size, image_size, 3), np.uint8)
            decoder.decode_image(sample.members, image, None)
        except Refused as reason:
            loaded.refused[str(reason)] += 1
            continue
        images.append(image)
        loaded.captions.append(captions)
        loaded.places.append(sample.index)
        loaded.class_ids.append(own_class)
        loaded.translations.append(translations(sample.members, spec))
    if images:
        loaded.images = np.stack(images)
    return loaded


def translations(members: Members, spec: EvalSet) -> list[list[str]]:
    """A sample's captions in each language of the set; empty lists if none is usable."""
    found: list[list[str]] = []
    for language in spec.languages:
        try:
            found.append(captions_at(spec.language_captions.replace("{language}", language), members))
        except Refused:
            found.append([])
    return found


def load_set(spec: EvalSet, data: DataConfig, image_size: int, name: str = "NAME") -> LoadedSet:
    """Read and decode a whole set, in memory.

    Raises:
        DataError: if shards are missing or no sample is usable.
    """
    parts = cut(name, spec, data, batch_size=1 << 30)
    loaded = load((sample for part in parts for sample in part.samples(data)), spec, data, image_size)
    check_usable(spec, len(loaded.captions), loaded.refused)
    return loaded


def check_usable(spec: EvalSet, num_usable: int, refused: Counter[str]) -> None:
    """Raise a DataError with the reasons if no sample of a set is usable."""
    if not num_usable:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in refused.most_common())
        raise DataError(f"{spec.shards}: none of {refused.total()} samples is usable ({reasons or 'there are none'})")


def probe_set(spec: EvalSet) -> EvalSet:
    """The set on which a linear probe of `spec` is fitted."""
    change = {"shards": spec.linear_probe, "languages": [], "retrieval": False, "linear_probe": None}
    return spec.model_copy(update=change)


def scan_set(name: str, spec: EvalSet, data: DataConfig) -> Manifest:
    """The tars of a set. Captions are required only if the set measures retrieval.

    Raises:
        DataError: as `scan_shards`.
    """
    return scan_shards(spec.shards, set_data(spec, data), key=f"eval.sets.{name}")


def set_data(spec: EvalSet, data: DataConfig) -> DataConfig:
    """The config with the members of which a sample of the set needs one."""
    is_without_captions = spec.classes is not None and not spec.retrieval
    return data.model_copy(update={"captions": {"json": 1.0, CLASS: 1.0}}) if is_without_captions else data


def check_set(name: str, spec: EvalSet, data: DataConfig, *, is_stored: bool = False) -> list[ImageFile] | None:
    """The files of a set that is an image folder; None: the set is tars.

    Args:
        is_stored: whether the set's embeddings come from a store.

    Raises:
        DataError: if the folder does not support what the set measures; says what to set.
    """
    folder = image_folder(spec.shards)
    if folder is None:
        return None
    if is_stored:
        raise DataError(
            f"eval.sets.{name}: embeddings.store holds tars, and {folder} is a folder of images: pack it into tars"
        )
    if spec.classes is None:
        raise DataError(
            f"eval.sets.{name}: {folder} has folders of images and no tars: set classes={SUBFOLDERS}, or to a JSON "
            "list of {id, name} whose ids are the subfolders' names"
        )
    if spec.retrieval or spec.languages:
        key = "retrieval=false" if spec.retrieval else "languages=[]"
        raise DataError(f"eval.sets.{name}: {folder} is a folder of images, which has no captions: set {key}")
    return list_images(folder, data)


def image_folder(patterns: Any) -> str | None:
    """The folder that the patterns name, if it has subfolders and no tars.

    Raises:
        DataError: for such a folder among other patterns.
    """
    listed = [patterns] if isinstance(patterns, str) else patterns if isinstance(patterns, list) else []
    folders = [path for path in listed if _subfolders(path) and not any(Path(path).glob("*.tar"))]
    if folders and len(listed) > 1:
        raise DataError(f"{folders[0]} is a folder of images: it must be the only pattern of its set")
    return folders[0] if folders else None


def list_images(folder: str, data: DataConfig) -> list[ImageFile]:
    """The images of a folder, by class, then by path.

    Nested subfolders belong to the class.

    Raises:
        DataError: for a subfolder without an image.
    """
    found = []
    for class_id in _subfolders(folder):
        paths = sorted(
            os.path.join(parent, name)
            for parent, _, names in os.walk(os.path.join(folder, class_id), followlinks=True)
            for name in names
            if _ending(name) in data.image_keys
        )
        if not paths:
            raise DataError(
                f"{folder}: no file of the subfolder {class_id} ends in {', '.join(data.image_keys)}: remove the "
                "subfolder, or set data.image_keys"
            )
        found += [ImageFile(path, class_id) for path in paths]
    return found


def classes_of(spec: EvalSet) -> list[dict[str, str]]:
    """The classes of a zero-shot set.

    Raises:
        DataError: as `read_classes`; if the set is no folder with subfolders.
    """
    assert spec.classes is not None
    if spec.classes != SUBFOLDERS:
        return read_classes(spec.classes)
    folder = image_folder(spec.shards)
    if folder is None:
        raise DataError(
            f"classes={SUBFOLDERS} needs a folder with a subfolder of images for each class, and {spec.shards} is "
            "none: for tars, classes is a file"
        )
    return [{"id": name, "name": name.replace("_", " ")} for name in _subfolders(folder)]


def check_classes(class_ids: set[str], classes: list[dict[str, str]], set_name: str) -> None:
    """Raise a DataError for a class of a sample that is not among the classes."""
    unknown = sorted(class_ids - {entry["id"] for entry in classes})
    if unknown:
        raise DataError(
            f"eval.sets.{set_name}: class {unknown[0]!r} of a sample is not in the classes file, nor are "
            f"{len(unknown) - 1} other classes. The file's {len(classes)} ids begin with {classes[0]['id']!r}. Check "
            "classes and class_field"
        )


@dataclass(frozen=True)
class _Class:
    id: str | int
    name: str


def read_classes(path: str) -> list[dict[str, str]]:
    """The classes of a file: JSON, or a .txt with a name in each line.

    The ids of a .txt are the line numbers from 0 on.

    Raises:
        DataError: if the file is missing or is not a list of {id, name}.
    """
    try:
        copy = local_copy(path)
        file = LocalFile(str(copy))  # refuses a FIFO, for which a read would wait
        content = bytes(file.read(file.num_bytes))
        if copy.suffix == ".txt":
            lines = content.decode().splitlines()
            return [{"id": str(number), "name": line.strip()} for number, line in enumerate(lines)]
        classes = as_type(list[_Class], parse_json(content))
    except (OSError, ValueError) as error:
        raise DataError(f"eval classes {path}: {error}") from error
    if not classes:
        raise DataError(f"eval classes {path}: a non-empty list of {{id, name}} expected")
    return [{"id": str(one.id), "name": one.name} for one in classes]


def _subfolders(folder: str) -> list[str]:
    with suppress(OSError), os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return []


def _ending(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def class_id(members: Members, spec: EvalSet) -> str:
    """Return a sample's class; raise Refused without one."""
    if "json" in members:
        with suppress(KeyError, TypeError, Refused):
            return str(read_json(members["json"])[spec.class_field])
    if CLASS in members:
        return str(members[CLASS], "utf-8", "replace").strip()
    raise Refused("no class")
