"""Inputs that weights were trained with: found beside the weights, and made as their own library makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sigray.workers.config import DataConfig, ModelConfig
from sigray.workers.data.decode import Decoder
from sigray.workers.model import trained_inputs
from sigray.workers.model.inputs import ImageInputs, image_inputs, inputs_of
from sigray.workers.model.tokenizer import _CLEANERS, build_tokenizer
from sigray.workers.model.towers import normalize_pixels
from sigray.workers.model.trained_inputs import take_inputs
from tests.helpers.data import TOWERS, encode_image

SIZE = 32
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
NASTY = ["A_b, C!", "  don't\tstop ", "caf\u00c3\u00a9 &amp;amp; tea", "\uff21\u3002", "", "...", "\u00e9\u0301 \u2019"]


def photo(height: int, width: int) -> np.ndarray:
    """Smooth colours with edges."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(9 * x + 3 * y), np.cos(7 * y - 2 * x), np.sign(np.sin(20 * x * y))]
    return np.stack([127 + 120 * wave for wave in waves], axis=-1).astype(np.uint8)


def weights(folder: Path, **files: Any) -> str:
    """Write a folder with a file of weights and these files of JSON; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"logit_scale": torch.zeros(())}, folder / "model.safetensors")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def word_tokenizer(path: Path, pad: tuple[int, str] | None, names: tuple[str, ...], side: str = "right") -> str:
    """Write a tokenizers file of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {name: number for number, name in enumerate((*names, "a", "cat", "A"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=names[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if pad is not None:
        tokenizer.enable_padding(length=16, pad_id=pad[0], pad_token=pad[1], direction=side)
    tokenizer.save(str(path))
    return str(path)


def own_pixels(model: ModelConfig, image: np.ndarray) -> np.ndarray:
    """(3, S, S) of a whole image, as the image tower gets it."""
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    decoder = Decoder(DataConfig(shards="x"), SIZE, image_inputs(model))
    decoder.decode_image({"png": encode_image(image)}, out, None)
    return normalize_pixels(torch.from_numpy(out)[None], model)[0].numpy()


def in_levels(pixels: np.ndarray, model: ModelConfig) -> np.ndarray:
    return pixels * 255 * np.array(image_inputs(model).image_std)[:, None, None]


def of_open_clip(config: dict[str, Any]) -> Any:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(**config, size=SIZE), is_train=False)
    return lambda image: transform(Image.fromarray(image)).numpy()


@pytest.mark.parametrize("shape", [(30, 90), (64, 64), (120, 60)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
def test_pixels_are_open_clips(tmp_path, resize, interpolation, shape):
    config = {"mean": list(CLIP_MEAN), "std": [0.2, 0.3, 0.25], "interpolation": interpolation, "resize_mode": resize}
    place = weights(tmp_path, open_clip_config={"model_cfg": {}, "preprocess_cfg": config | {"fill_color": 40}})
    model, remarks = take_inputs(ModelConfig(towers=TOWERS, init_from=place), {})
    assert remarks == []
    theirs = of_open_clip(config | {"fill_color": 40})(photo(*shape))
    difference = np.abs(in_levels(own_pixels(model, photo(*shape)) - theirs, model)).mean()
    assert difference <= 1
    others = {"shortest", "squash", "longest"} - {resize}
    for other in others if shape[0] != shape[1] else ():
        wrong = own_pixels(model.model_copy(update={"image_resize": other}), photo(*shape))
        assert difference * 10 < np.abs(in_levels(wrong - theirs, model)).mean()


@pytest.mark.parametrize("shape", [(30, 90), (64, 64), (120, 60)])
@pytest.mark.parametrize("kind", ["siglip", "siglip2", "clip"])
def test_pixels_are_transformers(tmp_path, kind, shape):
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    square = {"height": SIZE, "width": SIZE}
    processor = {
        "siglip": lambda: SiglipImageProcessor(size=square),
        "siglip2": lambda: SiglipImageProcessor(size=square, resample=2),  # as in Google's files of fixed resolution
        "clip": lambda: CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=square),
    }[kind]()
    place = weights(tmp_path, config={"model_type": "clip" if kind == "clip" else "siglip"})
    processor.save_pretrained(place)
    model, _ = take_inputs(ModelConfig(towers=TOWERS, init_from=place), {})
    theirs = np.asarray(processor(Image.fromarray(photo(*shape)), return_tensors="np")["pixel_values"][0])
    assert np.abs(in_levels(own_pixels(model, photo(*shape)) - theirs, model)).mean() <= 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B-16-SigLIP", ("squash", "bicubic", (0.5, 0.5, 0.5))),
        ("ViT-B-32", ("shortest", "bicubic", CLIP_MEAN)),
        ("ViT-L-16-CLIPA", None),
        ("ViT-L-14-CLIPA", ("squash", "bilinear", (0.485, 0.456, 0.406))),
        ("ViT-S-32", ("shortest", "bicubic", (0.5, 0.5, 0.5))),  # open_clip has no weights of this name
    ],
)
def test_a_name_brings_the_inputs_of_its_weights(name, expected):
    if expected is None:
        with pytest.raises(ValueError, match="no model of this name|not a model|ViT-L-16-CLIPA"):
            take_inputs(ModelConfig(name=name), {})
        return
    model, _ = take_inputs(ModelConfig(name=name), {})
    assert (model.image_resize, model.image_interpolation, model.image_mean) == expected


def test_towers_without_weights_keep_the_plain_inputs():
    model, remarks = take_inputs(ModelConfig(towers=TOWERS), {})
    assert image_inputs(model) == ImageInputs()
    assert (model.tokenizer, remarks) == ("open_clip", [])


def test_the_config_counts_before_the_weights_and_that_is_said(tmp_path):
    place = weights(tmp_path, open_clip_config={"model_cfg": {}, "preprocess_cfg": {"resize_mode": "squash"}})
    model, remarks = take_inputs(ModelConfig(towers=TOWERS, init_from=place, image_resize="shortest"), {})
    assert model.image_resize == "shortest"
    assert remarks == ["model.image_resize=shortest, though the weights were trained with squash"]
    assert model.image_mean == CLIP_MEAN


def test_a_run_that_goes_on_keeps_its_inputs(tmp_path):
    before = inputs_of(ModelConfig(towers=TOWERS))  # of a run without these keys
    place = weights(tmp_path, open_clip_config={"model_cfg": {}, "preprocess_cfg": {"resize_mode": "squash"}})
    config = ModelConfig(towers=TOWERS, init_from=place)
    model, remarks = take_inputs(config, before)
    assert image_inputs(model) == ImageInputs()
    assert any("model.image_resize=shortest is kept" in remark and "squash" in remark for remark in remarks)
    (tmp_path / "model.safetensors").unlink()
    assert take_inputs(config, before) == (model, [])  # its initial weights are not needed any more
    with pytest.raises(ValueError, match="no weights"):
        take_inputs(config, {})


def test_a_run_that_goes_on_fetches_no_weights(monkeypatch):
    fetched = []
    monkeypatch.setattr(trained_inputs, "find_weights", fetched.append)
    config = ModelConfig(towers=TOWERS, init_from="s3://bucket/model")
    model, remarks = take_inputs(config, inputs_of(ModelConfig(towers=TOWERS)))
    assert (image_inputs(model), remarks, fetched) == (ImageInputs(), [], [])


@pytest.mark.parametrize(
    ("pad", "names", "config", "expected"),
    [
        ((1, "</s>"), ("<pad>", "</s>", "<unk>"), None, (1, "right")),  # SigLIP
        ((1, "<pad>"), ("<s>", "<pad>", "</s>", "<unk>"), None, (1, "right")),  # XLM-R
        (None, ("<s>", "<pad>", "<unk>"), None, (1, "right")),
        (None, ("<s>", "[PAD]", "<unk>"), None, (1, "right")),
        (None, ("<s>", "</s>", "<unk>"), {"pad_token": "</s>", "padding_side": "left"}, (1, "left")),
        (None, ("<s>", "</s>", "<unk>"), {"pad_token": {"content": "<unk>"}}, (2, "right")),
        (None, ("<s>", "</s>", "<unk>"), None, (0, "right")),
    ],
)
def test_a_short_caption_is_filled_as_the_tokenizer_says(tmp_path, pad, names, config, expected):
    path = word_tokenizer(tmp_path / "tokenizer.json", pad, names)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    model, _ = take_inputs(ModelConfig(towers=TOWERS, tokenizer=path), {})
    assert (model.text_pad_id, model.text_pad_side) == expected
    cat = len(names) + 1
    filled = [cat, *[expected[0]] * 3] if expected[1] == "right" else [*[expected[0]] * 3, cat]
    assert build_tokenizer(model, 4, 64)(["cat"]).tolist() == [filled]
    before = ModelConfig(towers=TOWERS, tokenizer=path)  # a run of before goes on with 0 or [PAD]
    assert build_tokenizer(before, 4, 64)(["cat"])[0][3] == (1 if "[PAD]" in names else 0)


def test_a_pad_that_is_no_token_is_refused(tmp_path):
    path = word_tokenizer(tmp_path / "tokenizer.json", None, ("<unk>",))
    with pytest.raises(ValueError, match=r"model.text_pad_id=99: .*tokenizer.json has no token 99"):
        build_tokenizer(ModelConfig(towers=TOWERS, tokenizer=path, text_pad_id=99), 4, 64)


@pytest.mark.parametrize("clean", ["lower", "canonicalize", "whitespace"])
def test_captions_are_cleaned_as_by_open_clip(clean):
    from open_clip.tokenizer import get_clean_fn

    assert list(map(_CLEANERS[clean], NASTY)) == list(map(get_clean_fn(clean), NASTY))


@pytest.mark.parametrize(
    ("config", "tokenizer_class", "expected"),
    [
        ({"model_type": "siglip"}, "SiglipTokenizer", "canonicalize"),
        ({"model_type": "siglip"}, "GemmaTokenizer", "lower"),  # SigLIP 2 of a fixed resolution
        ({"model_type": "siglip2"}, "Siglip2Tokenizer", "lower"),
        ({"model_type": "siglip"}, "TokenizersBackend", "none"),  # `sigray export`, whose file cleans by itself
        ({"model_type": "clip"}, "CLIPTokenizer", "none"),
    ],
)
def test_the_tokenizer_beside_the_weights_and_its_cleaning_are_taken(tmp_path, config, tokenizer_class, expected):
    place = weights(tmp_path, config=config, tokenizer_config={"tokenizer_class": tokenizer_class})
    path = word_tokenizer(tmp_path / "tokenizer.json", (1, "</s>"), ("<pad>", "</s>", "<unk>"))
    model, _ = take_inputs(ModelConfig(towers=TOWERS, init_from=place), {})
    assert (model.tokenizer, model.text_pad_id, model.text_clean) == (path, 1, expected)
    tokens = build_tokenizer(model, 2, 64)(["A"])[0].tolist()
    assert tokens == ([5, 1] if expected == "none" else [3, 1])
    # A copy of the file is the same tokenizer; another one is not cleaned for, and said.
    copy = tmp_path / "copy.json"
    copy.write_bytes((tmp_path / "tokenizer.json").read_bytes())
    model, remarks = take_inputs(ModelConfig(towers=TOWERS, init_from=place, tokenizer=str(copy)), {})
    assert (model.text_clean, remarks) == (expected, [])
    other = word_tokenizer(tmp_path / "other.json", None, ("[PAD]", "<unk>"))
    model, remarks = take_inputs(ModelConfig(towers=TOWERS, init_from=place, tokenizer=other), {})
    assert (model.text_clean, model.text_pad_id) == ("none", 0)
    assert remarks == [f"model.tokenizer={other}, though the weights were trained with {path}"]


def test_a_checkpoint_of_a_run_brings_the_runs_inputs(tmp_path):
    place = weights(tmp_path / "run" / "checkpoints" / "step-0000000004")
    section = {"image_resize": "squash", "image_mean": [0.1, 0.2, 0.3], "tokenizer": "open_clip"}
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"model": section | {"towers": {"embed_dim": 1}}}))
    model, _ = take_inputs(ModelConfig(towers=TOWERS, init_from=f"{place}/model.safetensors"), {})
    assert (model.image_resize, model.image_mean) == ("squash", (0.1, 0.2, 0.3))


@pytest.mark.parametrize(
    ("processor", "match"),
    [
        ({"resample": 0, "size": {"height": 8, "width": 8}}, "resample=0"),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, "crop_size"),
    ],
)
def test_pixels_that_cannot_be_made_are_refused(tmp_path, processor, match):
    place = weights(tmp_path, config={"model_type": "clip"}, preprocessor_config=processor)
    with pytest.raises(ValueError, match=match):
        take_inputs(ModelConfig(towers=TOWERS, init_from=place), {})


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path):
    place = weights(tmp_path, config={"model_type": "siglip"})
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(ValueError, match="SentencePiece file only: write tokenizer.json"):
        take_inputs(ModelConfig(towers=TOWERS, init_from=place), {})
    model, _ = take_inputs(ModelConfig(towers=TOWERS, init_from=place, tokenizer="open_clip"), {})
    assert model.tokenizer == "open_clip"


@pytest.mark.parametrize("where", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_cuts_on_the_left_is_refused(tmp_path, where):
    path = word_tokenizer(tmp_path / "tokenizer.json", None, ("<unk>",))
    if where == "tokenizer.json":
        content = json.loads((tmp_path / where).read_text())
        cut = {"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        (tmp_path / where).write_text(json.dumps(content | {"truncation": cut}))
    else:
        (tmp_path / where).write_text(json.dumps({"truncation_side": "left"}))
    with pytest.raises(ValueError, match="cuts long captions on the left"):
        take_inputs(ModelConfig(towers=TOWERS, tokenizer=path), {})


@pytest.mark.parametrize(
    ("files", "key"),
    [
        ({"open_clip_config": {"model_cfg": {}, "preprocess_cfg": {"resize_mode": "crop"}}}, "image_resize"),
        ({"open_clip_config": {"model_cfg": {}, "preprocess_cfg": {"interpolation": "random"}}}, "image_interpolation"),
        ({"open_clip_config": {"model_cfg": {}, "preprocess_cfg": {"fill_color": 300}}}, "image_fill"),
        ({"config": {"architecture": "vit", "pretrained_cfg": {"interpolation": "lanczos"}}}, "image_interpolation"),
        ({"config": {"architecture": "vit", "pretrained_cfg": {"std": [0.1, 0.1]}}}, "image_std"),
    ],
)
def test_a_value_that_no_key_has_is_named(tmp_path, files, key):
    with pytest.raises(ValueError, match=rf"model\.{key}: the files of .* say"):
        take_inputs(ModelConfig(towers=TOWERS, init_from=weights(tmp_path, **files)), {})
