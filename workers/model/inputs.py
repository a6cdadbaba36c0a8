"""Sizes of a model and open_clip's config of its towers, from the config alone.

Without torch, and without building the model.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

from sigray.workers.config import ModelConfig

# Keys of open_clip's config files that choose a class, not a shape; the class is always CustomTextCLIP here.
_CLASS_KEYS = {"custom_text", "multimodal_cfg", "init_logit_scale", "init_logit_bias"}


def tower_config(model: ModelConfig) -> dict[str, Any]:
    """The open_clip config of a model.

    Keys: embed_dim, vision_cfg, text_cfg and perhaps quick_gelu.

    Raises:
        ValueError: if open_clip knows no model of that name.
    """
    if model.towers is not None:
        return copy.deepcopy(model.towers)
    path = open_clip_folder() / "model_configs" / f"{model.name}.json"
    if path.is_file():
        config = json.loads(path.read_text())
    else:
        import open_clip

        config = open_clip.get_model_config(model.name)
        if config is None:
            near = [name for name in open_clip.list_models() if name.split("-")[0] == str(model.name).split("-")[0]]
            raise ValueError(f"model.name: open_clip knows no model {model.name!r}; near it: {', '.join(near[:12])}")
    return {key: value for key, value in config.items() if key not in _CLASS_KEYS}


def open_clip_folder() -> Path:
    """Folder of open_clip's files, without importing open_clip.

    The import loads transformers, timm and torch._dynamo: 3 s and 0.1 GB of a process.

    Raises:
        ImportError: if open_clip is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ImportError("open_clip is not installed: pip install open-clip-torch")
    return Path(spec.origin).parent


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
