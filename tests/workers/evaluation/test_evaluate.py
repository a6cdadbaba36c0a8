"""Figures against small cases that can be counted by hand."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch

from sigray.workers.config import DataConfig, EvalConfig, EvalSet
from sigray.workers.data.tar import DataError
from sigray.workers.evaluation import evaluate
from sigray.workers.evaluation.datasets import load_set, read_classes
from sigray.workers.evaluation.evaluate import (
    WAYS,
    class_labels,
    numbered_captions,
    pixel_baseline,
    retrieval_recall,
    zero_shot_accuracy,
)
from tests.helpers.data import drawn_sample, write_dataset, write_tar


def test_zero_shot_counts_ranks():
    logits = torch.tensor([[9, 1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5], [1, 9, 8, 7, 6, 5.0]])
    figures = zero_shot_accuracy(logits, torch.tensor([0, 2, 0]))
    assert figures["top1"] == pytest.approx(1 / 3)
    assert figures["top5"] == pytest.approx(2 / 3)
    assert (figures["chance1"], figures["chance5"]) == (1 / 6, 5 / 6)


def test_a_collapsed_model_is_not_rewarded():
    """Equal similarities everywhere: a tie counts half of its competitors, so top-1 is not 100 %."""
    assert zero_shot_accuracy(torch.zeros(10, 100), torch.zeros(10, dtype=torch.long))["top5"] == 0
    figures = retrieval_recall(torch.ones(20, 1), torch.ones(20, 1), torch.arange(20), torch.arange(20))
    for way in WAYS:
        assert figures[f"{way}_r5"] == figures[f"{way}_chance5"] == 5 / 20


def unit(rows) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.asarray(rows)).float(), dim=-1)


def five_captions(num_equal: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """40 images with five captions near them, of which so many are equal to captions of other images."""
    random = np.random.RandomState(7)
    images, noise = random.randn(40, 12), random.randn(200, 12)
    captions = [[f"equal {i % 9}" if j < num_equal else f"{i} {j}" for j in range(5)] for i in range(40)]
    numbers, image, text = numbered_captions(captions)
    texts = {int(text[row]): images[image[row]] + 1.5 * noise[row] for row in reversed(range(200))}
    return unit(images), unit([texts[number] for number in range(len(numbers))]), image, text


def recall_slowly(features, texts, image, text, k) -> dict[str, float]:
    """By the definition, one query at a time, in float64 with all similarities at once."""
    similarity = features.double() @ texts.double().T
    by_caption = similarity[:, text]
    own = [
        {(int(i), int(t)) for i, t in zip(image, text, strict=True) if i == number} for number in range(len(features))
    ]
    pairs = set().union(*own)
    hits = {
        "image_to_text": [
            any(int(image[row]) == i for row in by_caption[i].topk(k).indices) for i in range(len(features))
        ],
        "text_to_image": [
            int(image[row]) in similarity[:, text[row]].topk(k).indices.tolist() for row in range(len(text))
        ],
        "merged_image_to_text": [
            any((i, int(t)) in pairs for t in similarity[i].topk(k).indices) for i in range(len(features))
        ],
        "merged_text_to_image": [
            any((int(i), t) in pairs for i in similarity[:, t].topk(k).indices) for t in range(len(texts))
        ],
    }
    return {way: sum(found) / len(found) for way, found in hits.items()}


# By CLIP_benchmark's own evaluate() on the features of `five_captions`, in float32: image to text, text to image.
OF_CLIP_BENCHMARK = {
    0: {1: (0.65, 0.44), 5: (0.95, 0.82), 10: (1.0, 0.92)},
    2: {1: (0.575, 0.32), 5: (0.875, 0.58), 10: (0.95, 0.73)},
}


@pytest.mark.parametrize("max_similarities", [1 << 24, 450, 1])
@pytest.mark.parametrize("num_equal", [0, 2])
def test_recall_is_that_of_clip_benchmark(num_equal, max_similarities, monkeypatch):
    """In any chunks; with equal captions, `topk` decides between them there and here."""
    monkeypatch.setattr(evaluate, "_MAX_SIMILARITIES", max_similarities)
    given = five_captions(num_equal)
    figures = retrieval_recall(*given)
    num_distinct = {0: 200, 2: 40 * 3 + 9}[num_equal]
    assert [figures[f"num_{each}"] for each in ("images", "captions", "distinct_captions")] == [40, 200, num_distinct]
    for k, expected in OF_CLIP_BENCHMARK[num_equal].items():
        assert (figures[f"image_to_text_r{k}"], figures[f"text_to_image_r{k}"]) == expected
        slow = recall_slowly(*given, k)
        assert {way: figures[f"{way}_r{k}"] for way in WAYS} == pytest.approx(slow, rel=1e-15)
        if not num_equal:
            assert (slow["merged_image_to_text"], slow["merged_text_to_image"]) == expected


def test_equal_captions_are_wrong_answers_unless_they_are_merged():
    """Three images of one caption, and one of another."""
    numbers, image, text = numbered_captions([["a dog"], ["a dog"], ["a dog", "a dog"], ["a cat"]])
    assert numbers == {"a cat": 0, "a dog": 1}
    features = unit([[1, 0.1], [1, 0.2], [1, 0.0], [0, 1]])
    figures = retrieval_recall(features, unit([[0, 1], [1, 0]]), image, text)
    assert (figures["num_captions"], figures["num_distinct_captions"]) == (5, 2)
    assert figures["merged_image_to_text_r1"] == figures["merged_text_to_image_r1"] == 1
    assert figures["text_to_image_r1"] == 3 / 5  # image 2 is the nearest of all dogs: its own two, and the cat
    assert figures["image_to_text_r1"] in (0.5, 0.75)  # one of four equal texts is found: of image 0, 1 or 2


@pytest.mark.parametrize("k", [1, 5, 10])
def test_chance_of_retrieval_is_that_of_a_blind_draw(k):
    image = torch.arange(13).clamp(max=11)  # the last image has two captions
    text = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 4, 2])
    figures = retrieval_recall(unit(np.random.RandomState(0).randn(12, 5)), unit(np.eye(5)), image, text)

    def chance(right: list[set[int]], num_candidates: int) -> float:
        draws = list(combinations(range(num_candidates), min(k, num_candidates)))
        return float(np.mean([np.mean([bool(answers & set(draw)) for draw in draws]) for answers in right]))

    images, pairs = range(12), list(zip(image.tolist(), text.tolist(), strict=True))
    by_hand = {
        "image_to_text": chance([{row for row, (i, _) in enumerate(pairs) if i == own} for own in images], 13),
        "text_to_image": chance([{i} for i, _ in pairs], 12),
        "merged_image_to_text": chance([{t for i, t in pairs if i == own} for own in images], 5),
        "merged_text_to_image": chance([{i for i, t in pairs if t == own} for own in range(5)], 12),
    }
    assert {way: figures[f"{way}_chance{k}"] for way in WAYS} == pytest.approx(by_hand)


def test_all_captions_of_a_list_are_read(tmp_path):
    lists = [["a", "b", None, "c"], ["d"], [7], ["a", "e", "f", "g", "h"]]
    samples = [drawn_sample(n) | {"json": json.dumps({"captions": texts})} for n, texts in enumerate(lists)]
    write_tar(tmp_path / "0.tar", samples)
    loaded = load_set(EvalSet(shards=str(tmp_path)), DataConfig(shards="none", captions={"json:captions": 1}), 8)
    assert loaded.captions == [["a", "b", "c"], ["d"], ["a", "e", "f", "g", "h"]]
    assert loaded.refused == {"unreadable json caption": 1}


def eval_set(tmp_path, **change) -> EvalSet:
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps([{"id": name, "name": name} for name in ("red", "green", "blue", "black")]))
    return EvalSet(shards=str(tmp_path / "held_out"), classes=str(classes), **change)


def test_sets_and_the_pixel_baseline(tmp_path):
    write_dataset(tmp_path / "train", [20])
    write_dataset(tmp_path / "held_out", [5, 3])
    spec, data = eval_set(tmp_path), DataConfig(shards=str(tmp_path / "train"))
    loaded = load_set(spec, data, 8)
    assert loaded.images.shape == (8, 8, 8, 3)
    assert class_labels(loaded.class_ids, read_classes(spec.classes), "a").tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert pixel_baseline(data, EvalConfig(sets={"a": spec})) == {"a": 1.0}


def test_what_is_wrong_with_a_set_is_named(tmp_path):
    write_dataset(tmp_path / "held_out", [4])
    spec, data = eval_set(tmp_path), DataConfig(shards=str(tmp_path))
    loaded = load_set(spec, data, 8)
    with pytest.raises(DataError, match="eval.sets.a: class 'black' of a sample is not in the classes file"):
        class_labels(loaded.class_ids, read_classes(spec.classes)[:3], "a")
    with pytest.raises(DataError, match=r"none of 4 samples is usable \(4 x no class\)"):
        load_set(eval_set(tmp_path, class_field="kind"), data, 8)
    with pytest.raises(DataError, match="none of 4 samples is usable \\(4 x no caption\\)"):
        load_set(eval_set(tmp_path), data.model_copy(update={"captions": {"json:y": 1.0}}), 8)
    (tmp_path / "classes.json").write_text("{}")
    with pytest.raises(DataError, match="classes.json: input should be a valid list"):
        read_classes(spec.classes)
