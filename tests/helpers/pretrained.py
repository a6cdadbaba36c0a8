"""Tiny models of other libraries with random weights, and our towers of the same shape."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from sigray.workers.model.timm_vits import register_siglip_vit
from sigray.workers.siglip_vits import SiglipVit

SIZE, PATCH, LENGTH, WORDS = 32, 8, 8, 60  # pixels, pixels, tokens of a text, ids
_WIDTH, _HEADS, _LAYERS = 32, 2, 2


_TEXT = {"context_length": LENGTH, "vocab_size": WORDS, "width": _WIDTH, "heads": _HEADS, "layers": _LAYERS}
_LAST = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}


def towers(act: str = "gelu", **sizes: int) -> dict[str, Any]:
    """Towers of SigLIP's architecture, as small as they get.

    Args:
        act: timm's name of the image tower's activation.
        sizes: image_size and patch_size of another image tower.
    """
    shape = {"patch_size": PATCH, "image_size": SIZE} | sizes
    vit = SiglipVit(_WIDTH, _LAYERS, _HEADS, 4 * _WIDTH, act=act, **shape)
    vision = {"image_size": vit.image_size, "timm_model_name": vit.name, "timm_pool": "map", "timm_proj": "none"}
    return {"embed_dim": _WIDTH, "vision_cfg": vision, "text_cfg": _TEXT | _LAST}


SIGLIP = towers()
IMAGE_TOWER = SIGLIP["vision_cfg"]["timm_model_name"]


def image_tower() -> nn.Module:
    register_siglip_vit(IMAGE_TOWER)
    return timm.create_model(IMAGE_TOWER, num_classes=0)


CLIP = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIZE, "patch_size": PATCH, "width": _WIDTH, "head_width": 16, "layers": _LAYERS},
    "text_cfg": _TEXT,
}


def transformers_model(kind: str, act: str | None = None) -> nn.Module:
    """A `SiglipModel`, `Siglip2Model` or `CLIPModel` with random weights, biases and norms included.

    Args:
        act: hidden_act of both towers; None: quick_gelu for CLIP, gelu for the others.
    """
    import transformers

    shape = {"hidden_size": _WIDTH, "intermediate_size": 4 * _WIDTH, "num_hidden_layers": _LAYERS}
    shape |= {"num_attention_heads": _HEADS}
    text = shape | {"vocab_size": WORDS, "max_position_embeddings": LENGTH}
    vision = shape | {"image_size": SIZE, "patch_size": PATCH}
    both = {"hidden_act": act or ("quick_gelu" if kind == "clip" else "gelu")}
    text |= both
    vision |= both
    if kind == "clip":
        text |= {"eos_token_id": WORDS - 1, "bos_token_id": 0}
        config: Any = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model: nn.Module = transformers.CLIPModel(config)
    elif kind == "siglip":
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        model = transformers.SiglipModel(config)
    else:
        vision = shape | both | {"patch_size": PATCH, "num_patches": (SIZE // PATCH) ** 2}
        model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))
    return randomize(model)


def randomize(module: nn.Module) -> nn.Module:
    """Give every tensor random values, so that no two can be exchanged unseen."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def their_features(theirs: Any, kind: str, tokens: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of `transformers_model(kind)`, images first; Siglip2 takes an image as a list of patches."""
    if kind != "siglip2":
        output = theirs(input_ids=tokens, pixel_values=pixels)
        return output.image_embeds, output.text_embeds
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    patches = torch.stack([torch.from_numpy(convert_image_to_patches(x.numpy(), PATCH)) for x in pixels])
    grids = torch.tensor([[SIZE // PATCH] * 2] * len(pixels))
    output = theirs(tokens, patches, torch.ones(patches.shape[:2], dtype=torch.int64), grids)
    return output.image_embeds, output.text_embeds
