"""Evaluation of one checkpoint: zero-shot classification, retrieval, and what a model must beat.

    n  images of a set       C  classes       U  distinct captions       D  embedding dimension

Every figure stands beside its chance level. `evaluate_checkpoint` is a plain function of a checkpoint; the driver
runs it as a Ray task, beside training and not in its way.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from workers.checkpoint import load_weights
from workers.committed import CheckpointInfo
from workers.config import DataConfig, EmbeddingsConfig, EvalConfig, EvalSet, ModelConfig, Patterns
from workers.decode import Decoder, Refused
from workers.initial import build_trained_model
from workers.languages import figures_by_language, translations
from workers.probe import linear_probe
from workers.shards import Manifest, read_samples, scan_shards
from workers.storage import Storage
from workers.store import EmbeddingStore, read_embeddings
from workers.tar import DataError, TarSample
from workers.tokenizer import Tokenizer, build_tokenizer
from workers.towers import build_model, normalize_pixels, shapes

_PIXEL_BASELINE_SIZE = 16


@dataclass
class LoadedSet:
    """A held-out set in memory: unusable samples are left out and counted."""

    images: np.ndarray  # (n, S, S, 3) uint8
    captions: list[str]  # n
    places: list[tuple[int, int]]  # n; shard in the set's manifest, index in the shard
    class_ids: list[str]  # n; empty strings where the set has no classes
    num_refused: int
    translations: list[list[str | None]] = field(default_factory=list)  # n; by language of the set


def evaluate_checkpoint(
    storage_uri: str,
    info: CheckpointInfo,
    model: ModelConfig,
    data: DataConfig,
    evaluation: EvalConfig,
    embeddings: EmbeddingsConfig,
) -> dict[str, Any]:
    """All figures of one checkpoint; with a store the image features come from there.

    Returns:
        {"step", "samples_seen", "zero_shot": {set: ...}, "retrieval": {set: ...}, "linear_probe": {set: ...},
        "languages": {set: {language: ...}}, "sheets": {set: [...]}}; rates are fractions. `sheets` holds images as
        base64 PNG with their five best captions.
    """
    image_size, context_length, vocab_size = shapes(model)
    store = EmbeddingStore(embeddings.store) if embeddings.store is not None else None
    if store is None:
        module = build_trained_model(Storage(storage_uri), info, model)
    else:
        module = build_model(model, stored_embeddings=True)
        load_weights(Storage(storage_uri), info, module)
    encoder = Encoder(module, model, build_tokenizer(model, context_length, vocab_size), evaluation.batch_size)

    def features_of(shards: Patterns, loaded: LoadedSet) -> Tensor:
        return encoder.images(loaded.images) if store is None else _stored_features(store, shards, data, loaded)

    result: dict[str, Any] = {"step": info.step, "samples_seen": info.samples_seen}
    result |= {"zero_shot": {}, "retrieval": {}, "linear_probe": {}, "languages": {}, "sheets": {}}
    for name, spec in evaluation.sets.items():
        loaded = load_set(spec, data, image_size)
        features = features_of(spec.shards, loaded)
        if spec.classes:
            classes = read_classes(spec.classes)
            labels = class_labels(loaded, classes, name)
            text = encoder.prompts([entry["name"] for entry in classes], spec.templates)
            logits = features @ text.T
            result["zero_shot"][name] = zero_shot_accuracy(logits, labels) | {"num_refused": loaded.num_refused}
            result["sheets"][name] = _sheet(loaded, logits, labels, classes, evaluation.num_sheet_images)
        if spec.retrieval:
            captions = sorted(set(loaded.captions))
            owner = torch.tensor([captions.index(caption) for caption in loaded.captions])
            result["retrieval"][name] = retrieval_recall(features @ encoder.texts(captions).T, owner)
        if spec.linear_probe is not None:
            fit = load_set(spec.model_copy(update={"shards": spec.linear_probe, "languages": []}), data, image_size)
            fit_features = features_of(spec.linear_probe, fit)
            result["linear_probe"][name] = linear_probe(fit_features, fit.class_ids, features, loaded.class_ids)
        if spec.languages:
            result["languages"][name] = figures_by_language(
                features,
                loaded.translations,
                loaded.class_ids,
                spec,
                encoder.texts,
                retrieval_recall,
                zero_shot_accuracy,
            )
    return result


def _stored_features(store: EmbeddingStore, shards: Patterns, data: DataConfig, loaded: LoadedSet) -> Tensor:
    """(n, D) of unit norm.

    Raises:
        StoreError: where the store lacks a shard of the set.
        DataError: where the store refused an image that is usable now.
    """
    rows = [list(read_embeddings(store, shard, data)) for shard in scan_shards(shards, data).shards]
    found = [row for shard, index in loaded.places if (row := rows[shard][index]) is not None]
    if len(found) < len(loaded.places):
        raise DataError(
            f"{store.uri} lacks the embeddings of {len(loaded.places) - len(found)} images of {shards} "
            "that can be read now: delete its eval folder and run `sigray embed` again"
        )
    return torch.nn.functional.normalize(torch.from_numpy(np.stack(found)), dim=-1)


class Encoder:
    """Features from a model, batch by batch, without a graph."""

    def __init__(self, module: Any, model: ModelConfig, tokenizer: Tokenizer, batch_size: int) -> None:
        self._module, self._model = module.eval(), model
        self._tokenizer, self._batch_size = tokenizer, batch_size

    @torch.inference_mode()
    def images(self, images: np.ndarray) -> Tensor:
        """(n, S, S, 3) uint8 -> (n, D), unit norm."""
        batches = torch.from_numpy(images).split(self._batch_size)
        return torch.cat([self._module.encode_image(normalize_pixels(b, self._model), normalize=True) for b in batches])

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Tensor:
        """n strings -> (n, D), unit norm."""
        batches = torch.from_numpy(self._tokenizer(texts)).split(self._batch_size)
        return torch.cat([self._module.encode_text(b, normalize=True) for b in batches])

    def prompts(self, names: list[str], templates: list[str]) -> Tensor:
        """C class names -> (C, D): the mean of each name's prompt features, normalised (CLIP, section 3.1.4)."""
        prompts = [self.texts([template.replace("{}", name) for name in names]) for template in templates]
        return torch.nn.functional.normalize(torch.stack(prompts).sum(dim=0), dim=-1)


def load_set(spec: EvalSet, data: DataConfig, image_size: int) -> LoadedSet:
    """Read and decode a whole held-out set.

    Raises:
        DataError: where shards are missing or nothing in them is usable.
    """
    decoder = Decoder(data, image_size)
    images, captions, places, class_ids, num_refused = [], [], [], [], 0
    by_language = []
    for place, sample in _all_samples(scan_shards(spec.shards, data), data):
        try:
            caption = decoder.choose_caption(sample.members, None)
            class_id = _class_id(sample, spec) if spec.classes else ""
            image = np.empty((image_size, image_size, 3), np.uint8)
            decoder.decode_image(sample.members, image, None)
        except Refused:
            num_refused += 1
            continue
        images.append(image)
        captions.append(caption)
        places.append(place)
        class_ids.append(class_id)
        by_language.append(translations(sample.members, spec))
    if not images:
        raise DataError(f"{spec.shards}: none of {num_refused} samples is usable")
    return LoadedSet(np.stack(images), captions, places, class_ids, num_refused, by_language)


def read_classes(path: str) -> list[dict[str, str]]:
    """The classes of a zero-shot set.

    Raises:
        DataError: where the file is missing or is not a list of {id, name}.
    """
    try:
        classes = json.loads(Path(path).read_text())
        if not classes or not all({"id", "name"} <= entry.keys() for entry in classes):
            raise ValueError("a non-empty list of {id, name} expected")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"eval classes {path}: {error}") from error
    return classes


def class_labels(loaded: LoadedSet, classes: list[dict[str, str]], set_name: str) -> Tensor:
    """(n,) int64, the number of each image's class.

    Raises:
        DataError: for an image whose class is not among the classes.
    """
    numbers = {entry["id"]: number for number, entry in enumerate(classes)}
    unknown = sorted(set(loaded.class_ids) - numbers.keys())
    if unknown:
        raise DataError(f"eval.sets.{set_name}: class {unknown[0]!r} of a sample is not in the classes file")
    return torch.tensor([numbers[class_id] for class_id in loaded.class_ids])


def zero_shot_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy of (n, C) similarities, with the rates of a blind guess."""
    num_classes = logits.shape[1]
    rank = _rank_of(logits, labels)
    return {
        "top1": float((rank < 1).float().mean()),
        "top5": float((rank < 5).float().mean()),
        "chance1": 1 / num_classes,
        "chance5": min(5, num_classes) / num_classes,
        "num_classes": num_classes,
        "num_images": len(labels),
    }


def retrieval_recall(similarity: Tensor, owner: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 both ways, with chance levels.

    Args:
        similarity: (n, U), images against distinct captions.
        owner: (n,) int64, the caption of each image; several images may share one.

    Returns:
        image_to_text: is the image's caption among the k nearest captions; text_to_image: is any image of the
        caption among its k nearest images.
    """
    num_images, num_captions = similarity.shape
    image_rank = _rank_of(similarity, owner)
    text_rank = torch.empty(num_captions)
    for caption in range(num_captions):
        own, others = similarity[owner == caption, caption].max(), similarity[owner != caption, caption]
        text_rank[caption] = (others > own).sum() + (others == own).sum() / 2
    counts = torch.bincount(owner, minlength=num_captions).tolist()
    result: dict[str, float] = {"num_images": num_images, "num_captions": num_captions}
    for k in (1, 5, 10):
        result[f"image_to_text_r{k}"] = float((image_rank < k).float().mean())
        result[f"image_to_text_chance{k}"] = min(1.0, k / num_captions)
        result[f"text_to_image_r{k}"] = float((text_rank < k).float().mean())
        misses = [math.comb(num_images - m, min(k, num_images)) for m in counts]
        ways = math.comb(num_images, min(k, num_images))
        result[f"text_to_image_chance{k}"] = sum(1 - miss / ways for miss in misses) / num_captions
    return result


def pixel_baseline(data: DataConfig, evaluation: EvalConfig) -> dict[str, float]:
    """Top-1 of the nearest training image in raw 16 x 16 pixels, by set: what no learning at all reaches.

    A held-out drawing of a known thing often looks like another drawing of it, so this, and not chance alone, is what
    a model has to beat. Classes that were never trained on get 0 by construction.
    """
    result = {}
    train_by_field: dict[str, LoadedSet] = {}
    for name, spec in evaluation.sets.items():
        if not spec.classes:
            continue
        if spec.class_field not in train_by_field:
            train_spec = spec.model_copy(update={"shards": data.shards})
            train_by_field[spec.class_field] = load_set(train_spec, data, _PIXEL_BASELINE_SIZE)
        train = train_by_field[spec.class_field]
        held_out = load_set(spec, data, _PIXEL_BASELINE_SIZE)
        known, asked = (torch.from_numpy(s.images).float().flatten(1) for s in (train, held_out))
        nearest = torch.cat([torch.cdist(part, known).argmin(dim=1) for part in asked.split(512)]).tolist()
        hits = [train.class_ids[n] == truth for n, truth in zip(nearest, held_out.class_ids, strict=True)]
        result[name] = sum(hits) / len(hits)
    return result


def _rank_of(scores: Tensor, truth: Tensor) -> Tensor:
    """(n,) how many columns score higher than the true one; ties count against the model, half of them."""
    own = scores.gather(1, truth[:, None])
    return (scores > own).sum(dim=1) + ((scores == own).sum(dim=1) - 1) / 2


def _all_samples(manifest: Manifest, data: DataConfig) -> Iterator[tuple[tuple[int, int], TarSample]]:
    for number, shard in enumerate(manifest.shards):
        for sample in read_samples(shard, data):
            yield (number, sample.index), sample


def _class_id(sample: TarSample, spec: EvalSet) -> str:
    try:
        return str(json.loads(bytes(sample.members["json"]))[spec.class_field])
    except (KeyError, ValueError) as error:
        raise Refused("no class") from error


def _sheet(
    loaded: LoadedSet, logits: Tensor, labels: Tensor, classes: list[dict[str, str]], num_images: int
) -> list[dict[str, Any]]:
    """Evenly spread images with their truth and their five best class names, for the report."""
    count = min(num_images, len(labels))
    sheet = []
    for number in [index * len(labels) // count for index in range(count)]:
        top = logits[number].topk(min(5, len(classes)))
        buffer = io.BytesIO()
        Image.fromarray(loaded.images[number]).save(buffer, "PNG")
        sheet.append(
            {
                "png_base64": base64.b64encode(buffer.getvalue()).decode(),
                "truth": classes[int(labels[number])]["name"],
                "best": [
                    {"name": classes[c]["name"], "cosine": round(s, 4), "right": c == int(labels[number])}
                    for c, s in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                ],
            }
        )
    return sheet
