"""Exports for transformers: loaded by its own classes, compared, read back, refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sigray.workers.config import DataConfig, ModelConfig
from sigray.workers.data.decode import Decoder
from sigray.workers.model.export import compare
from sigray.workers.model.export_transformers import export_transformers
from sigray.workers.model.init_weights import load_initial_weights
from sigray.workers.model.inputs import image_inputs
from sigray.workers.model.tokenizer import build_tokenizer
from sigray.workers.model.towers import build_model, normalize_pixels
from sigray.workers.model.trained_inputs import take_inputs
from tests.helpers import pretrained
from tests.helpers.data import encode_image

WORDS = ["[PAD]", "[UNK]", "[EOS]", "a", "cat", "dog", "don", "t"]
TEXTS = ["a cat", "A_dog, a cat!", "  don't ", "a " * 30, ""]


def tokenizer(path: Path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    made.save(str(path))
    return str(path)


def siglip(path: Path, **keys: Any) -> ModelConfig:
    keys = {"towers": pretrained.SIGLIP, "tokenizer": tokenizer(path), "text_clean": "canonicalize"} | keys
    return ModelConfig(image_resize="squash", image_mean=(0.4, 0.5, 0.6), **keys)


def clip(path: Path, **keys: Any) -> ModelConfig:
    towers = copy.deepcopy(pretrained.CLIP)
    towers["text_cfg"] = towers["text_cfg"] | {"vocab_size": 49408}
    return ModelConfig(**{"towers": towers, "init_logit_bias": None} | keys)


def exported(make: Any, folder: Path, **keys: Any) -> tuple[nn.Module, ModelConfig]:
    model = make(folder / "words.json", **keys)
    module = pretrained.randomize(build_model(model))
    (folder / "out").mkdir()
    export_transformers(module, model, folder / "out")
    return module, model


@pytest.mark.parametrize("make", [siglip, clip])
def test_features_and_tokens_are_the_same_and_the_weights_come_back(tmp_path, make):
    module, model = exported(make, tmp_path)
    found = compare("transformers", tmp_path / "out", module, model, TEXTS)
    assert max(found.image_difference, found.text_difference) <= 1e-6
    assert found.other_tokens == ()
    again = build_model(model)
    load_initial_weights(again, model.model_copy(update={"init_from": str(tmp_path / "out")}))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())
    taken, remarks = take_inputs(ModelConfig(towers=model.towers, init_from=str(tmp_path / "out")), {})
    assert image_inputs(taken) == image_inputs(model)
    assert remarks == []


@pytest.mark.parametrize("make", [siglip, clip])
def test_its_processor_prepares_images_as_sigray_does(tmp_path, make):
    import transformers

    _, model = exported(make, tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (6, 12, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    own = np.empty((pretrained.SIZE, pretrained.SIZE, 3), np.uint8)
    decoder = Decoder(DataConfig(shards="x"), pretrained.SIZE, image_inputs(model))
    decoder.decode_image({"png": encode_image(pixels)}, own, None)
    theirs = processor(images=Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    difference = np.abs(normalize_pixels(torch.from_numpy(own)[None], model)[0].numpy() - theirs)
    assert difference.mean() * 255 * min(image_inputs(model).image_std) <= 1


@pytest.mark.parametrize("make", [siglip, clip])
def test_the_pipeline_gives_the_probabilities_of_the_model(tmp_path, make):
    """With 64 tokens, to which the pipeline fills SigLIP's texts."""
    import transformers

    towers = copy.deepcopy(pretrained.SIGLIP if make is siglip else pretrained.CLIP)
    towers["text_cfg"] = towers["text_cfg"] | {"context_length": 64, "vocab_size": 49408}
    module, model = exported(make, tmp_path, towers=towers)
    image = Image.fromarray(np.full((40, 40, 3), 90, np.uint8))
    classify = transformers.pipeline("zero-shot-image-classification", model=str(tmp_path / "out"))
    answers = {each["label"]: each["score"] for each in classify(image, candidate_labels=["a cat", "a dog"])}
    own = np.empty((pretrained.SIZE, pretrained.SIZE, 3), np.uint8)
    decoder = Decoder(DataConfig(shards="x"), pretrained.SIZE, image_inputs(model))
    decoder.decode_image({"png": encode_image(np.asarray(image))}, own, None)
    prompts = [f"This is a photo of {label}." for label in ("a cat", "a dog")]
    tokens = torch.from_numpy(build_tokenizer(model, 64, 49408)(prompts))
    with torch.inference_mode():
        found = module(normalize_pixels(torch.from_numpy(own)[None], model), tokens)
    logits = (found["image_features"] @ found["text_features"].T * found["logit_scale"])[0]
    expected = (logits + found["logit_bias"]).sigmoid() if make is siglip else logits.softmax(dim=0)
    assert [answers[label] for label in ("a cat", "a dog")] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("act", "name"), [({}, "gelu"), ({"act_kwargs": {"approximate": "tanh"}}, "gelu_pytorch_tanh")]
)
def test_the_activation_of_the_towers_is_written(tmp_path, act, name):
    towers = copy.deepcopy(pretrained.SIGLIP)
    towers["text_cfg"] = towers["text_cfg"] | act
    exported(siglip, tmp_path, towers=towers)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["hidden_act"] == name
    assert config["vision_config"]["hidden_act"] == "gelu"


def without(section: str, **changes: Any) -> Any:
    towers = copy.deepcopy(pretrained.SIGLIP)
    towers[section] = towers[section] | changes
    return {"towers": towers}


@pytest.mark.parametrize(
    ("make", "keys", "match"),
    [
        (siglip, {"init_logit_bias": None}, "SiglipModel cannot hold this model: it has no logit_bias"),
        (siglip, without("text_cfg", no_causal_mask=False), "causal mask"),
        (siglip, without("text_cfg", pool_type="first"), "not pooled at the last token"),
        (siglip, without("vision_cfg", timm_model_name="resnet10t", timm_pool="avg"), "no ViT of timm"),
        (clip, {"init_logit_bias": -10.0}, "CLIPModel cannot hold this model: it has a logit_bias"),
        (siglip, {"image_resize": "longest"}, "image_resize=longest"),
    ],
)
def test_what_transformers_cannot_hold_is_refused_by_name(tmp_path, make, keys, match):
    resize = {"image_resize": keys.pop("image_resize")} if "image_resize" in keys else {}
    model = make(tmp_path / "words.json", **keys).model_copy(update=resize)
    with pytest.raises(ValueError, match=match):
        export_transformers(build_model(model), model, tmp_path)
