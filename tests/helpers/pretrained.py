"""Tiny models of other libraries with random weights, and our towers of the same shape."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

SIZE, PATCH, LENGTH, WORDS = 32, 8, 8, 60  # pixels, pixels, tokens of a text, ids
_WIDTH, _HEADS, _LAYERS = 32, 2, 2


_TEXT = {"context_length": LENGTH, "vocab_size": WORDS, "width": _WIDTH, "heads": _HEADS, "layers": _LAYERS}
_LAST = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}


def towers(name: str, **options: Any) -> dict[str, Any]:
    """Towers of SigLIP's architecture, as small as they get.

    Args:
        name: what timm calls the image tower from now on.
        options: of the image tower.
    """
    shape = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": _WIDTH, "depth": _LAYERS, "num_heads": _HEADS}
    shape |= {"class_token": False, "global_pool": "map", **options}

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        return build_model_with_cfg(VisionTransformer, name, pretrained, **{**shape, **options})

    build.__name__, build.__module__ = name, __name__
    register_model(build)
    vision = {"image_size": shape["img_size"], "timm_model_name": name, "timm_pool": "map", "timm_proj": "none"}
    return {"embed_dim": _WIDTH, "vision_cfg": vision, "text_cfg": _TEXT | _LAST}


SIGLIP = towers("tiny_siglip")


def image_tower() -> nn.Module:
    return timm.create_model("tiny_siglip", num_classes=0)


CLIP = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIZE, "patch_size": PATCH, "width": _WIDTH, "head_width": 16, "layers": _LAYERS},
    "text_cfg": _TEXT,
}


def transformers_model(kind: str) -> nn.Module:
    """A `SiglipModel`, `Siglip2Model` or `CLIPModel` with random weights, biases and norms included."""
    import transformers

    shape = {"hidden_size": _WIDTH, "intermediate_size": 4 * _WIDTH, "num_hidden_layers": _LAYERS}
    shape |= {"num_attention_heads": _HEADS}
    text = shape | {"vocab_size": WORDS, "max_position_embeddings": LENGTH}
    vision = shape | {"image_size": SIZE, "patch_size": PATCH}
    act = {"hidden_act": "gelu"}
    if kind == "clip":
        text |= {"eos_token_id": WORDS - 1, "bos_token_id": 0}
        config: Any = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model: nn.Module = transformers.CLIPModel(config)
    elif kind == "siglip":
        config = transformers.SiglipConfig(text_config=text | act, vision_config=vision | act)
        model = transformers.SiglipModel(config)
    else:
        vision = shape | act | {"patch_size": PATCH, "num_patches": (SIZE // PATCH) ** 2}
        model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text | act, vision_config=vision))
    return randomize(model)


def randomize(module: nn.Module) -> nn.Module:
    """Give every tensor random values, so that no two can be exchanged unseen."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()
