"""Figures of a held-out set by language: retrieval and zero-shot classification.

    n  images of the set that have a caption in the language      U  distinct captions      D  embedding dimension

The captions come from `eval.sets.NAME.language_captions`, with the language in place of {language}; of a list, the
first one counts. In classification the captions of a class's images name the class. So the source must hold names,
as emoji36's json:captions.{language}.name, and not sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sigray.workers.config import EvalSet
from sigray.workers.data.decode import Members, Refused, captions_at


def translations(members: Members, spec: EvalSet) -> list[str | None]:
    """A sample's caption in each language of the set; None for an unusable caption."""
    found: list[str | None] = []
    for language in spec.languages:
        try:
            found.append(captions_at(spec.language_captions.replace("{language}", language), members)[0])
        except Refused:
            found.append(None)
    return found


def figures_by_language(
    features: Tensor,
    captions: Sequence[Sequence[str | None]],
    class_ids: Sequence[str],
    spec: EvalSet,
    encode: Callable[[list[str]], Tensor],
    retrieval_recall: Callable[[Tensor, Tensor], dict[str, float]],
    zero_shot_accuracy: Callable[[Tensor, Tensor], dict[str, float]],
) -> dict[str, dict[str, Any]]:
    """Figures of each language in which any image has a caption.

    Args:
        features: (images, D) of unit norm.
        captions: of each image, by language, from `translations`.
        class_ids: of each image.
        encode: texts to (texts, D) of unit norm.

    Returns:
        language -> {"retrieval": ..., "zero_shot": ...}
    """
    result: dict[str, dict[str, Any]] = {}
    for number, language in enumerate(spec.languages):
        rows = [row for row, by_language in enumerate(captions) if by_language[number] is not None]
        if not rows:
            continue
        texts = [str(captions[row][number]) for row in rows]
        distinct = {text: place for place, text in enumerate(sorted(set(texts)))}
        encoded = encode(list(distinct))
        similarity = features[rows] @ encoded.T
        result[language] = {"retrieval": retrieval_recall(similarity, torch.tensor([distinct[text] for text in texts]))}
        if spec.classes:
            names: dict[str, str] = {}
            for row, text in zip(rows, texts, strict=True):
                names.setdefault(class_ids[row], text)
            order = {class_id: place for place, class_id in enumerate(sorted(names))}
            of_classes = encoded[[distinct[names[class_id]] for class_id in order]]
            labels = torch.tensor([order[class_ids[row]] for row in rows])
            result[language]["zero_shot"] = zero_shot_accuracy(features[rows] @ of_classes.T, labels)
    return result


def mean_over_languages(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Mean of each retrieval rate over the languages.

    As the paper reports XM3600 (section 4.3). Also `num_languages`, and the smallest `num_images` and `num_captions` of
    any language.

    Args:
        figures: of at least one language, from `figures_by_language`.
    """
    retrieval = [of_language["retrieval"] for of_language in figures.values()]
    counts = ("num_images", "num_captions")
    means = {key: sum(of[key] for of in retrieval) / len(retrieval) for key in retrieval[0] if key not in counts}
    return means | {key: min(of[key] for of in retrieval) for key in counts} | {"num_languages": len(retrieval)}
