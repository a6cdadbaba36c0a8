"""Sizes of a model and open_clip's config of its towers, from the config alone.

Without torch, and without building the model.
"""

from __future__ import annotations

import copy
from typing import Any

from sigray.workers.config import ModelConfig
from sigray.workers.model.untrusted import read_open_clip_config
from sigray.workers.tower_limits import check_towers

# Keys of open_clip's config files that choose a class, not a shape; the class is always CustomTextCLIP here.
_CLASS_KEYS = {"custom_text", "init_logit_scale", "init_logit_bias"}


def tower_config(model: ModelConfig) -> dict[str, Any]:
    """The open_clip config of a model.

    Keys: embed_dim, vision_cfg, text_cfg and perhaps quick_gelu.

    Raises:
        ValueError: if there is no model of that name, or its towers cannot be used.
    """
    if model.towers is not None:
        return copy.deepcopy(model.towers)
    assert model.name is not None
    config = {key: value for key, value in read_open_clip_config(model.name).items() if key not in _CLASS_KEYS}
    try:
        check_towers(config)
    except ValueError as error:
        raise ValueError(f"model.name={model.name}: {error}") from None
    return config


def shapes(model: ModelConfig) -> tuple[int, int, int]:
    """Image size S, context length T and vocabulary size of a model.

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
    return size, text.get("context_length", 77), text.get("vocab_size", 49408)
