"""Registers SigLIP's image towers with timm, by the names of `siglip_vits`."""

from __future__ import annotations

from typing import Any

from torch import nn

from sigray.workers.siglip_vits import siglip_vit


def register_siglip_vit(timm_name: str) -> None:
    """Let timm, and so open_clip, build the tower of one of our names.

    A name of timm's own stays as it is.
    """
    from timm.models import build_model_with_cfg, is_model, register_model
    from timm.models.vision_transformer import VisionTransformer

    shape = siglip_vit(timm_name)
    if shape is None or is_model(timm_name):
        return
    options: dict[str, Any] = {
        "img_size": shape.image_size,
        "patch_size": shape.patch_size,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_ratio": (shape.mlp + 0.5) / shape.width,  # timm rounds the product down
        "class_token": False,
        "global_pool": "map",
        "act_layer": shape.act,
    }

    def build(pretrained: bool = False, **others: Any) -> nn.Module:
        others["pretrained_cfg"] = {"architecture": timm_name}  # without one, timm warns that none is registered
        return build_model_with_cfg(VisionTransformer, timm_name, pretrained=False, **{**options, **others})

    build.__name__ = timm_name
    register_model(build)
