"""Check held-out sets before anything starts, by a few of their samples.

An evaluation would find the same problems at the first checkpoint, after hours of training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress

import numpy as np

from sigray.workers.config import DataConfig, EvalConfig, EvalSet
from sigray.workers.data.decode import Decoder, Members, Refused, read_json
from sigray.workers.data.embedding_store import EmbeddingStore, StoreError, stored_name
from sigray.workers.data.manifest import listed, open_shard, unreadable
from sigray.workers.data.shard_list import ShardFile, find_shards, reason_of
from sigray.workers.data.tar import DataError, TarSample, read_tar
from sigray.workers.evaluation import datasets
from sigray.workers.texts import first_ten

_NUM_SAMPLES = 32  # of a set, at most
_NUM_SHARDS = 4  # evenly spread: a set may be packed class by class
_NUM_BYTES = 1 << 22  # of a shard: no sample begins after them


def check_sets(evaluation: EvalConfig, data: DataConfig, store: str | None = None, *, only_here: bool = False) -> None:
    """Check the first samples of each set, and of the set of its linear probe.

    Args:
        store: must hold the embeddings of the sets; None: images come from the tars.
        only_here: leave out sets in S3, and sets that do not exist.

    Raises:
        DataError: names the key of the config, and what the samples have.
        StoreError: if the store lacks a shard.
    """
    for name, spec in evaluation.sets.items():
        class_ids = _check_set(name, spec, data, store, only_here)
        if spec.linear_probe is not None:
            _check_set(name, datasets.probe_set(spec), data, store, only_here)
        if class_ids:
            datasets.check_classes(class_ids, datasets.classes_of(spec), name)


def _check_set(name: str, spec: EvalSet, data: DataConfig, store: str | None, only_here: bool) -> set[str]:
    """Check a set; return the classes of its first samples, none if it is left out."""
    key = f"eval.sets.{name}"
    files = datasets.check_set(name, spec, data, is_stored=store is not None)
    if files is not None:
        images = tuple(files[:: -(-len(files) // _NUM_SAMPLES)])
        _check_samples(key, spec, data, str(spec.shards), datasets.Part(images, 0, len(images)).samples(data))
        return {file.class_id for file in files}
    broken: list[str] = []
    try:
        if only_here and "://" in str(spec.shards):
            return set()
        shards = find_shards(spec.shards, data.stores, key, broken)
        if broken:
            raise unreadable(key, broken)
    except DataError:
        if only_here:
            return set()
        raise
    if store is not None:
        stored = EmbeddingStore(store).storage.list("eval")
        lacking = [shard.url for shard in shards if f"{stored_name(shard)}.json" not in stored]
        if lacking:
            raise StoreError(f"embeddings.store={store} lacks {first_ten(lacking)} of {key}: run `sigray embed` again")
    some = shards[:: -(-len(shards) // _NUM_SHARDS)]
    where = " and ".join([some[0].url, *([f"{len(some) - 1} other shards"] if some[1:] else [])])
    return _check_samples(key, spec, data, where, _first_samples(key, some, data))


def _first_samples(key: str, shards: list[ShardFile], data: DataConfig) -> Iterator[TarSample]:
    """Yield the first samples of shards, without a copy of the shards in the cache."""
    data = data.model_copy(update={"shard_cache": None})
    for shard in shards:
        try:
            with closing(open_shard(shard, data)) as source:
                for sample in read_tar(source, allow_unclosed=data.allow_unclosed):
                    yield sample
                    if sample.index + 1 >= _NUM_SAMPLES // len(shards) or source.position >= _NUM_BYTES:
                        break
        except (DataError, OSError) as error:
            raise unreadable(key, [f"{shard.url}: {reason_of(error, shard.url)}"]) from error


def _check_samples(key: str, spec: EvalSet, data: DataConfig, where: str, samples: Iterable[TarSample]) -> set[str]:
    """Check that a sample has all that its set needs; return the classes found."""
    decoder = Decoder(datasets.set_data(spec, data), 8)
    image = np.empty((8, 8, 3), np.uint8)
    class_ids: set[str] = set()

    def find_class(members: Members) -> None:
        class_ids.add(datasets.class_id(members, spec))

    def find_language(members: Members) -> None:
        if not any(datasets.translations(members, spec)):
            raise Refused("no caption")

    # key=value of the config -> what a sample needs for it, remedy
    needs: dict[str, tuple[Callable[[Members], object], str]] = {}
    needs[f"data.image_keys={','.join(data.image_keys)}"] = (
        lambda members: decoder.decode_image(members, image, None),
        "set data.image_keys, or pack images that can be read",
    )
    if spec.retrieval or not spec.classes:
        needs[f"data.captions={','.join(data.captions)}"] = (
            decoder.captions,
            f"set data.captions, or {key}.classes and {key}.retrieval=false",
        )
    if spec.classes:
        needs[f"{key}.class_field={spec.class_field}"] = (find_class, "name a key of the .json, or pack a .cls member")
    if spec.languages:
        needs[f"{key}.language_captions={spec.language_captions}"] = (find_language, f"set it, or {key}.languages=[]")
    reasons: dict[str, Counter[str]] = {need: Counter() for need in needs}
    there: dict[str, None] = {}  # members and keys of JSON, in order
    num_read = 0
    samples = iter(samples)
    for sample in samples:
        num_read += 1
        is_usable = True
        for need, (use, _) in needs.items():
            try:
                use(sample.members)
            except Refused as reason:
                reasons[need][str(reason)] += 1
                is_usable = False
        if is_usable:
            if spec.classes:
                for other in samples:
                    with suppress(Refused):
                        find_class(other.members)
            return class_ids
        for ending in sample.members:
            there |= dict.fromkeys([ending, *(_json_keys(sample.members["json"]) if ending == "json" else [])])
    found = f"the first {num_read} samples of {where}; samples have: {first_ten(list(there)) or 'nothing'}"
    for need, (_, remedy) in needs.items():
        if 0 < num_read == reasons[need].total():
            raise DataError(f"{need}: {', '.join(reasons[need])} in {found}. Remedy: {remedy}")
    lacking = listed(sum(reasons.values(), Counter())) or "no sample is there"
    raise DataError(f"{key}: no usable sample among {found}. Each lacks something: {lacking}")


def _json_keys(content: bytes | memoryview) -> list[str]:
    """Return the keys of a JSON member, as `json:KEY`."""
    with suppress(Refused):
        value = read_json(content)
        return [f"json:{key}" for key in value] if isinstance(value, dict) else []
    return []
