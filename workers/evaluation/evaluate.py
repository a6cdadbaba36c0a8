"""Evaluation of one checkpoint: zero-shot, retrieval, linear probe, baselines.

    n  images of a set       C  classes       T  captions       D  embedding dimension

Every figure has its chance level beside it. The driver runs `evaluate_checkpoint` as a Ray task beside training.
Features come from one or more workers (`workers/evaluation/features.py`); the figures are computed once from all of
them.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sigray.workers.config import DataConfig, EvalConfig, EvalSet
from sigray.workers.evaluation.datasets import LoadedSet, check_classes, classes_of, load_set, probe_set
from sigray.workers.evaluation.features import EvaluationJob, SetFeatures, WorkerGroup
from sigray.workers.evaluation.linear_probe import linear_probe

WAYS = ("image_to_text", "text_to_image", "merged_image_to_text", "merged_text_to_image")
TOP = (1, 5, 10)
_MAX_SIMILARITIES = 1 << 24  # in one chunk; with its copy by caption, 128 MiB
_PIXEL_BASELINE_SIZE = 16
_MAX_CAPTIONS = 5  # of an image on a sheet


def evaluate_checkpoint(job: EvaluationJob) -> dict[str, Any]:
    """All figures of one checkpoint; of both weights, if it has an average of them.

    The figures are those of the weights that `sigray export` writes: the average, if the checkpoint has one. Then the
    figures of the last weights are the value of `without_ema`, without sheets.

    With an embedding store, the image features come from the store. On machines of one kind the figures are the same,
    bit for bit, with any `eval.num_workers`. More than 1 worker needs a Ray cluster around this process.

    Returns:
        {"step", "samples_seen", "zero_shot": {set: ...}, "retrieval": {set: ...}, "linear_probe": {set: ...},
        "languages": {set: {language: ...}}, "multilingual": {set: ...}, "sheets": {set: [...]}}; rates are
        fractions. `multilingual` is the mean over the languages; `sheets` are those of `_sheet`.
    """
    if not job.info.has_ema:
        return _figures(job)
    figures = _figures(replace(job, ema=True))
    no_sheets = job.evaluation.model_copy(update={"num_sheet_images": 0})
    without = _figures(replace(job, evaluation=no_sheets, captions=False))
    return figures | {
        "without_ema": {
            key: figures for key, figures in without.items() if key not in ("step", "samples_seen", "sheets")
        }
    }


def _figures(job: EvaluationJob) -> dict[str, Any]:
    evaluation = job.evaluation
    kinds = ("zero_shot", "retrieval", "linear_probe", "languages", "multilingual", "sheets")
    result: dict[str, Any] = {"step": job.info.step, "samples_seen": job.info.samples_seen, **{k: {} for k in kinds}}
    with WorkerGroup(job) as workers:
        for name, spec in evaluation.sets.items():
            has_sheet = bool(spec.classes) or job.captions
            found = workers.images(name, spec, evaluation.num_sheet_images if has_sheet else 0)
            features = found.features
            if has_sheet:
                result["sheets"][name] = _sheet(found)
            if spec.classes:
                classes = classes_of(spec)
                labels = class_labels(found.class_ids, classes, name)
                logits = features @ workers.prompts([entry["name"] for entry in classes], spec.templates).T
                result["zero_shot"][name] = zero_shot_accuracy(logits, labels) | {"num_refused": found.refused.total()}
                _add_names(result["sheets"][name], logits[list(found.shown)], labels[list(found.shown)], classes)
            if spec.retrieval:
                numbers, image, text = numbered_captions(found.captions)
                recall = retrieval_recall(features, workers.texts(list(numbers)), image, text)
                result["retrieval"][name] = recall | {"num_refused": found.refused.total()}
            if spec.linear_probe is not None:
                fit = workers.images(name, probe_set(spec))
                result["linear_probe"][name] = linear_probe(fit.features, fit.class_ids, features, found.class_ids)
            if spec.languages:
                figures = figures_by_language(features, found.translations, found.class_ids, spec, workers.texts)
                result["languages"][name] = figures
                if figures:
                    result["multilingual"][name] = mean_over_languages(figures)
    return result


def class_labels(class_ids: list[str], classes: list[dict[str, str]], set_name: str) -> Tensor:
    """(n,) int64: the number of each image's class.

    Raises:
        DataError: for an image whose class is not among the classes.
    """
    numbers = {entry["id"]: number for number, entry in enumerate(classes)}
    check_classes(set(class_ids), classes, set_name)
    return torch.tensor([numbers[class_id] for class_id in class_ids])


def zero_shot_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy of (n, C) similarities, with chance levels."""
    num_classes = logits.shape[1]
    rank = _rank_of(logits, labels)
    return {
        "top1": float((rank < 1).double().mean()),
        "top5": float((rank < 5).double().mean()),
        "chance1": 1 / num_classes,
        "chance5": min(5, num_classes) / num_classes,
        "num_classes": num_classes,
        "num_images": len(labels),
    }


def retrieval_recall(features: Tensor, texts: Tensor, image: Tensor, text: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions, with chance levels.

    As CLIP_benchmark counts, each caption of each image is a text of its own. An image is found if any of its captions
    is among the k nearest texts. A caption is found if its image is among the k nearest images. An equal caption of
    another image is a wrong answer. In the figures `merged_...`, equal captions are one text, right for each of its
    images.

    Args:
        features: (n, D) of images, of unit norm; each has a caption.
        texts: (U, D) of the distinct captions, of unit norm.
        image, text: (T,) int64, the image and the distinct caption of each caption, from `numbered_captions`.

    Returns:
        num_images, num_captions, num_distinct_captions; {way}_r{k} and {way}_chance{k} for the `WAYS`.
    """
    every = torch.arange(len(text))
    # Equal captions of one image count once if they are merged.
    merged_image, merged_text = torch.stack([image, text]).unique(dim=1)
    nearest_captions = _nearest(features, texts, text)
    nearest_texts = _nearest(features, texts)
    nearest_images = _nearest(texts, features)
    # way -> who is asked, the row of what is found, the right answer, and between how many; by pair of both
    ways = {
        "image_to_text": (image, nearest_captions, image, every, len(text)),
        "text_to_image": (every, nearest_images, text, image, len(features)),
        "merged_image_to_text": (merged_image, nearest_texts, merged_image, merged_text, len(texts)),
        "merged_text_to_image": (merged_text, nearest_images, merged_text, merged_image, len(features)),
    }
    result: dict[str, float] = {
        "num_images": len(features),
        "num_captions": len(text),
        "num_distinct_captions": len(texts),
    }
    for way, (asked, nearest, row, answer, num_candidates) in ways.items():
        num_answers = torch.bincount(asked)
        for k in TOP:
            is_found = torch.zeros(len(num_answers), dtype=torch.bool)
            is_found[asked[(nearest[k][row] == answer[:, None]).any(dim=1)]] = True
            result[f"{way}_r{k}"] = float(is_found.double().mean())
            result[f"{way}_chance{k}"] = _chance(Counter(num_answers.tolist()), num_candidates, k)
    return result


def numbered_captions(captions: Sequence[Sequence[str]]) -> tuple[dict[str, int], Tensor, Tensor]:
    """Number the distinct captions.

    Returns:
        The numbers; of each caption its image and its number, (T,) int64.
    """
    numbers, text = _numbered([caption for own in captions for caption in own])
    return numbers, torch.tensor([number for number, own in enumerate(captions) for _ in own]), text


def _nearest(queries: Tensor, candidates: Tensor, columns: Tensor | None = None) -> dict[int, Tensor]:
    """{k: (queries, k)} the nearest candidates, in chunks of bounded memory.

    `torch.topk` decides between equals, as in CLIP_benchmark. If all features are equal, each query finds the same
    candidates, so that recall is at its chance level.

    Args:
        columns: (T,) candidate of each column; None: one column for each candidate.
    """
    num_columns = len(candidates) if columns is None else len(columns)
    nearest: dict[int, list[Tensor]] = {k: [] for k in TOP}
    for rows in queries.split(max(1, _MAX_SIMILARITIES // num_columns)):
        similarity = rows @ candidates.T
        similarity = similarity if columns is None else similarity[:, columns]
        for k in TOP:
            nearest[k].append(similarity.topk(min(k, num_columns), dim=1).indices)
    return {k: torch.cat(parts) for k, parts in nearest.items()}


def _chance(num_answers: Counter[int], num_candidates: int, k: int) -> float:
    """Rate at which k blind draws of all candidates hold a right answer.

    Args:
        num_answers: number of right answers -> number of queries.
    """
    ways = math.comb(num_candidates, min(k, num_candidates))
    hits = sum(
        count * ((ways - math.comb(num_candidates - right, min(k, num_candidates))) / ways)
        for right, count in num_answers.items()
    )
    return hits / num_answers.total()


def _numbered(names: Sequence[str]) -> tuple[dict[str, int], Tensor]:
    """Number the distinct names; returns the numbers by name, and (n,) int64."""
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    return numbers, torch.tensor([numbers[name] for name in names])


def figures_by_language(
    features: Tensor,
    captions: Sequence[Sequence[Sequence[str]]],
    class_ids: Sequence[str],
    spec: EvalSet,
    encode: Callable[[list[str]], Tensor],
) -> dict[str, dict[str, Any]]:
    """Figures of each language in which any image has a caption.

    In classification, the captions of a class's images name the class. So the source of the captions must hold names,
    as emoji36's json:captions.{language}.name, and not sentences.

    Args:
        features: (images, D) of unit norm.
        captions: of each image, by language, from `datasets.translations`.
        encode: texts to (texts, D) of unit norm.

    Returns:
        language -> {"retrieval": ..., "zero_shot": ...}
    """
    result: dict[str, dict[str, Any]] = {}
    for number, language in enumerate(spec.languages):
        rows = [row for row, by_language in enumerate(captions) if by_language[number]]
        if not rows:
            continue
        distinct, image, text = numbered_captions([captions[row][number] for row in rows])
        texts = encode(list(distinct))
        result[language] = {"retrieval": retrieval_recall(features[rows], texts, image, text)}
        if spec.classes:
            classes, labels = _numbered([class_ids[row] for row in rows])
            # The first image of a class names it, by its first caption.
            names = {class_ids[row]: captions[row][number][0] for row in reversed(rows)}
            of_classes = texts[[distinct[names[class_id]] for class_id in classes]]
            result[language]["zero_shot"] = zero_shot_accuracy(features[rows] @ of_classes.T, labels)
    return result


def mean_over_languages(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Mean of each retrieval rate over the languages.

    As the paper reports XM3600 (section 4.3). Also `num_languages`, and the smallest of each count of any language.

    Args:
        figures: of at least one language, from `figures_by_language`.
    """
    retrieval = [of_language["retrieval"] for of_language in figures.values()]
    counts = [key for key in retrieval[0] if key.startswith("num_")]
    means = {key: sum(of[key] for of in retrieval) / len(retrieval) for key in retrieval[0] if key not in counts}
    return means | {key: min(of[key] for of in retrieval) for key in counts} | {"num_languages": len(retrieval)}


def pixel_baseline(data: DataConfig, evaluation: EvalConfig) -> dict[str, float]:
    """Top-1 of the nearest training image in raw 16 x 16 pixels, by set.

    A held-out drawing of a known object often looks like another drawing of it. So a model must beat this rate, and
    not chance alone. Classes without a training image get 0 by construction.
    """
    result: dict[str, float] = {}
    train_by_field: dict[str, LoadedSet] = {}
    for name, spec in evaluation.sets.items():
        if not spec.classes:
            continue
        if spec.class_field not in train_by_field:
            train_spec = spec.model_copy(update={"shards": data.shards})
            train_by_field[spec.class_field] = load_set(train_spec, data, _PIXEL_BASELINE_SIZE)
        train = train_by_field[spec.class_field]
        held_out = load_set(spec, data, _PIXEL_BASELINE_SIZE)
        known, queries = (torch.from_numpy(s.images).float().flatten(1) for s in (train, held_out))
        nearest = torch.cat([torch.cdist(part, known).argmin(dim=1) for part in queries.split(512)]).tolist()
        hits = [train.class_ids[n] == truth for n, truth in zip(nearest, held_out.class_ids, strict=True)]
        result[name] = sum(hits) / len(hits)
    return result


def _rank_of(scores: Tensor, truth: Tensor) -> Tensor:
    """(n,) number of columns that score higher than the true one; ties count half."""
    own = scores.gather(1, truth[:, None])
    return (scores > own).sum(dim=1) + ((scores == own).sum(dim=1) - 1) / 2


def _sheet(found: SetFeatures) -> list[dict[str, Any]]:
    """Images for the report, as base64 PNG, with their own captions.

    `caption` is what the decoder wrote, if it did.
    """
    sheet = []
    for number, image in found.shown.items():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        entry: dict[str, Any] = {"png_base64": base64.b64encode(buffer.getvalue()).decode()}
        if number in found.written:
            entry |= {"captions": found.captions[number][:_MAX_CAPTIONS], "caption": found.written[number]}
        sheet.append(entry)
    return sheet


def _add_names(sheet: list[dict[str, Any]], logits: Tensor, labels: Tensor, classes: list[dict[str, str]]) -> None:
    """Add the true class and the five best class names to each image.

    Args:
        logits, labels: of the sheet's images.
    """
    for entry, row, truth in zip(sheet, logits, labels.tolist(), strict=True):
        top = row.topk(min(5, len(classes)))
        entry["truth"] = classes[truth]["name"]
        entry["best"] = [
            {"name": classes[c]["name"], "cosine": round(s, 4), "right": c == truth}
            for c, s in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
