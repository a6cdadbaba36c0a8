"""Image processors of transformers: sigray makes their pixels, or says which field it cannot follow."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sigray.workers.config import DataConfig, ModelConfig
from sigray.workers.data.decode import Decoder
from sigray.workers.model.image_processors import read_image_processor
from sigray.workers.model.inputs import image_inputs
from sigray.workers.model.towers import normalize_pixels
from sigray.workers.model.trained_inputs import take_inputs
from tests.helpers.data import TOWERS, encode_image

SIZE = 16  # of TOWERS
SQUARE = {"height": SIZE, "width": SIZE}
SIGLIP: dict[str, Any] = {"image_processor_type": "SiglipImageProcessor", "size": SQUARE}
CLIP: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIZE},
    "crop_size": SQUARE,
}


def folder(path: Any, processor: dict[str, Any] | None, model_type: str = "siglip") -> str:
    save_file({"logit_scale": torch.zeros(())}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if processor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(path)


@pytest.mark.parametrize(
    "processor",
    [
        SIGLIP,
        CLIP,
        {**CLIP, "size": SIZE, "crop_size": SIZE},  # OpenAI's own files
        {**SIGLIP, "do_normalize": False},
        {**CLIP, "do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 61.0, 62.0]},
        {**SIGLIP, "rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
        {name: value for name, value in CLIP.items() if name != "image_processor_type"},  # the model's type counts
    ],
)
def test_pixels_are_the_processors(tmp_path, processor):
    import transformers

    is_clip = "crop_size" in processor
    place = folder(tmp_path, processor, "clip" if is_clip else "siglip")
    model, _ = take_inputs(ModelConfig(towers=TOWERS, init_from=place), {})
    kind = transformers.CLIPImageProcessor if is_clip else transformers.SiglipImageProcessor
    y, x = np.mgrid[:24, :48] / 48
    photo = np.stack([127 + 120 * np.sin(9 * x + 3 * y), 255 * y, 200 * x], axis=-1).astype(np.uint8)
    theirs = np.asarray(kind.from_pretrained(place)(Image.fromarray(photo), return_tensors="np")["pixel_values"][0])
    own = np.empty((SIZE, SIZE, 3), np.uint8)
    Decoder(DataConfig(shards="x"), SIZE, image_inputs(model)).decode_image({"png": encode_image(photo)}, own, None)
    pixels = normalize_pixels(torch.from_numpy(own)[None], model)[0].numpy()
    levels = (pixels - theirs) * 255 * np.array(image_inputs(model).image_std)[:, None, None]
    assert np.abs(levels).mean() <= 1


@pytest.mark.parametrize(("kind", "resize"), [("siglip", "squash"), ("siglip2", "squash"), ("clip", "shortest")])
@pytest.mark.parametrize("processor", [None, {}])
def test_without_a_file_the_classes_defaults_count(tmp_path, kind, resize, processor):
    model, _ = take_inputs(ModelConfig(towers=TOWERS, init_from=folder(tmp_path, processor, kind)), {})
    assert (model.image_resize, model.image_interpolation) == (resize, "bicubic")
    assert model.image_mean == ((0.48145466, 0.4578275, 0.40821073) if kind == "clip" else (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("processor", "key"),
    [
        ({**SIGLIP, "do_resize": False}, "image_resize"),
        ({**SIGLIP, "size": {"height": 16, "width": 24}}, "image_resize"),
        ({**SIGLIP, "size": {"longest_edge": 16}}, "image_resize"),
        ({**SIGLIP, "size": {"shortest_edge": 16, "longest_edge": 32}}, "image_resize"),
        ({**SIGLIP, "size": {}}, "image_resize"),
        ({**SIGLIP, "size": 16}, "image_resize"),  # no square: of the shortest edge, and uncut
        ({**SIGLIP, "size": [16, 16]}, "image_resize"),
        ({**SIGLIP, "size": {"height": 20, "width": 20}, "do_center_crop": True, "crop_size": SQUARE}, "image_resize"),
        ({**CLIP, "size": {"shortest_edge": 20}}, "image_resize"),
        ({**CLIP, "do_center_crop": False}, "image_resize"),
        ({**SIGLIP, "resample": 0}, "image_interpolation"),
        ({**SIGLIP, "resample": None}, "image_interpolation"),
        ({**SIGLIP, "resample": [3]}, "image_interpolation"),
        ({**SIGLIP, "image_mean": [0.5]}, "image_mean"),
        ({**SIGLIP, "image_mean": ["a", "b", "c"]}, "image_mean"),
        ({**SIGLIP, "image_std": [0, 1, 1]}, "image_std"),
        ({**SIGLIP, "rescale_factor": 0}, "rescale_factor"),
        ({**SIGLIP, "rescale_factor": "1/255"}, "rescale_factor"),
    ],
)
def test_what_cannot_be_followed_is_refused_unless_the_key_is_set(tmp_path, processor, key):
    place = folder(tmp_path, processor)
    with pytest.raises(ValueError, match=key):
        take_inputs(ModelConfig(towers=TOWERS, init_from=place), {})
    set_keys: dict[str, Any] = {"image_resize": "squash", "image_interpolation": "bilinear"}
    set_keys |= {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.4, 0.5, 0.6)}
    model, _ = take_inputs(ModelConfig(towers=TOWERS, init_from=place, **set_keys), {})
    assert (model.image_resize, model.image_std) == ("squash", (0.4, 0.5, 0.6))


def test_a_crop_of_the_same_square_leaves_it():
    processor = {**SIGLIP, "do_center_crop": True, "crop_size": SIZE}
    assert read_image_processor(processor, "siglip", "here", ())["image_resize"] == "squash"
