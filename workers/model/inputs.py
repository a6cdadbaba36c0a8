"""Inputs and sizes of a model, and open_clip's config of its towers.

From the config alone, without torch and without building the model.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from sigray.workers.config import ModelConfig
from sigray.workers.model.untrusted import read_open_clip_config
from sigray.workers.siglip_vits import resized
from sigray.workers.tower_limits import check_towers

# Keys of open_clip's config files that choose a class, not a shape; the class is always CustomTextCLIP here.
CLASS_KEYS = {"custom_text", "init_logit_scale", "init_logit_bias"}


CLIP_VOCAB_SIZE = 49408

OPEN_CLIP = "open_clip"
"""Value of `model.tokenizer`: the tokenizer that open_clip has for the model."""


@dataclass(frozen=True)
class ImageInputs:
    """How an image becomes the input of the image tower: keys of `model`.

    The defaults are those of towers without weights, and of runs that began until November 2026.
    """

    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_resize: Literal["shortest", "squash", "longest"] = "shortest"
    image_interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    image_fill: int = 0


@dataclass(frozen=True)
class TextInputs:
    """How a caption becomes tokens, if `model.tokenizer` is a file; as `ImageInputs`."""

    text_clean: Literal["none", "lower", "canonicalize", "whitespace"] = "none"
    text_pad_id: int | None = None
    """None: the token [PAD], else 0."""
    text_pad_side: Literal["right", "left"] = "right"


def image_inputs(model: ModelConfig) -> ImageInputs:
    return ImageInputs(**_given(model, ImageInputs))


def text_inputs(model: ModelConfig) -> TextInputs:
    return TextInputs(**_given(model, TextInputs))


def inputs_of(model: ModelConfig) -> dict[str, Any]:
    """Return the value of each input key; of a key without one, that of older runs."""
    given = dataclasses.asdict(image_inputs(model)) | dataclasses.asdict(text_inputs(model))
    return given | {"tokenizer": model.tokenizer or OPEN_CLIP, "tokenizer_sha256": model.tokenizer_sha256}


def tokenizer_file(model: ModelConfig) -> str | None:
    """Return path or URL of the tokenizer's file; None for open_clip's own."""
    return None if model.tokenizer in (None, OPEN_CLIP) else model.tokenizer


def _given(model: ModelConfig, kind: type) -> dict[str, Any]:
    values = {each.name: getattr(model, each.name) for each in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def tower_config(model: ModelConfig) -> dict[str, Any]:
    """The open_clip config of a model.

    Keys: embed_dim, vision_cfg, text_cfg and perhaps quick_gelu.

    Raises:
        ValueError: if there is no model of that name, or its towers cannot be used.
    """
    if model.towers is not None:
        return _with_image_size(copy.deepcopy(model.towers), model)
    assert model.name is not None, "init_from alone: take_inputs puts the towers in"
    config = {key: value for key, value in read_open_clip_config(model.name).items() if key not in CLASS_KEYS}
    try:
        check_towers(config)
    except ValueError as error:
        raise ValueError(f"model.name={model.name}: {error}") from None
    return _with_image_size(config, model)


def _with_image_size(config: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    if model.image_size is None:
        return config
    vision = config["vision_cfg"]
    vision["image_size"] = model.image_size
    if vision.get("timm_model_name"):  # open_clip passes timm no size
        vision["timm_model_name"] = resized(vision["timm_model_name"], model.image_size)
    try:
        check_towers(config)
    except ValueError as error:
        raise ValueError(f"model.image_size={model.image_size}: {error}") from None
    return config


def shapes(model: ModelConfig) -> tuple[int, int, int | None]:
    """Image size S, context length T and vocabulary size of a model.

    The vocabulary size of a text tower of transformers is None: only that model's own config has it.

    Raises:
        ValueError: for images that are not square.
    """
    config = tower_config(model)
    size = config["vision_cfg"].get("image_size", 224)
    if isinstance(size, list | tuple):
        if size[0] != size[1]:
            raise ValueError(f"model: image_size {size} is not square, and only square images are supported")
        size = size[0]
    text = config["text_cfg"]
    vocab_size = None if text.get("hf_model_name") else text.get("vocab_size", CLIP_VOCAB_SIZE)
    return size, text.get("context_length", 77), vocab_size
