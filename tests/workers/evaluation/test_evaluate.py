"""Figures against small cases that can be counted by hand."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch

from sigray.workers.config import DataConfig, EvalConfig, EvalSet
from sigray.workers.data.tar import DataError
from sigray.workers.evaluation.datasets import load_set, read_classes
from sigray.workers.evaluation.evaluate import class_labels, pixel_baseline, retrieval_recall, zero_shot_accuracy
from tests.helpers.data import write_dataset


def test_zero_shot_counts_ranks():
    logits = torch.tensor([[9, 1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5], [1, 9, 8, 7, 6, 5.0]])
    figures = zero_shot_accuracy(logits, torch.tensor([0, 2, 0]))
    assert figures["top1"] == pytest.approx(1 / 3)
    assert figures["top5"] == pytest.approx(2 / 3)
    assert (figures["chance1"], figures["chance5"]) == (1 / 6, 5 / 6)


def test_a_collapsed_model_is_not_rewarded():
    """Equal similarities everywhere: a tie counts half of its competitors, so top-1 is not 100 %."""
    assert zero_shot_accuracy(torch.zeros(10, 100), torch.zeros(10, dtype=torch.long))["top5"] == 0
    figures = retrieval_recall(torch.zeros(20, 20), torch.arange(20))
    assert figures["image_to_text_r1"] == figures["text_to_image_r5"] == 0


def test_retrieval_with_several_images_per_caption():
    #                caption 0, caption 1
    similarity = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.4], [0.95, 0.5]])
    figures = retrieval_recall(similarity, torch.tensor([0, 0, 1, 1]))
    assert figures["image_to_text_r1"] == 0.5  # images 0 and 2
    assert figures["text_to_image_r1"] == 0  # caption 0 finds image 3, caption 1 finds image 1
    assert figures["text_to_image_r5"] == figures["image_to_text_r5"] == 1


def test_a_caption_finds_any_of_its_images():
    """The second image of caption 0 is its nearest; the first is not."""
    similarity = torch.tensor([[0.1, 0.0], [0.9, 0.0], [0.5, 0.8]])
    assert retrieval_recall(similarity, torch.tensor([0, 0, 1]))["text_to_image_r1"] == 1


@pytest.mark.parametrize("k", [1, 5, 10])
def test_chance_of_retrieval_is_that_of_a_blind_draw(k):
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, 4])
    figures = retrieval_recall(torch.rand(12, 5), owner)
    draws = list(combinations(range(12), k))
    by_hand = np.mean([np.mean([any(owner[i] == c for i in draw) for draw in draws]) for c in range(5)])
    assert figures[f"text_to_image_chance{k}"] == pytest.approx(by_hand)
    assert figures[f"image_to_text_chance{k}"] == min(1, k / 5)


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
