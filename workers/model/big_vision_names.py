"""Renames tensors of google-research/big_vision to those of `SiglipModel`.

The model is `models/proj/image_text/two_towers.py`. flax has kernels as (inputs, outputs), and heads as a dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HEAD = "vision_model.head."
_ATTENTION = "MultiHeadDotProductAttention_0/"
_NAMES = {  # replaced in this order
    "img/embedding/": "vision_model.embeddings.patch_embedding.",
    "img/pos_embedding": "vision_model.embeddings.position_embedding.weight",
    "img/Transformer/encoderblock_": "vision_model.encoder.layers.",
    "img/Transformer/encoder_norm/": "vision_model.post_layernorm.",
    f"img/MAPHead_0/{_ATTENTION}out/": _HEAD + "attention.out_proj.",
    f"img/MAPHead_0/{_ATTENTION}": _HEAD + "attention.",
    "img/MAPHead_0/LayerNorm_0/": _HEAD + "layernorm.",
    "img/MAPHead_0/": _HEAD,
    "txt/Embed_0/embedding": "text_model.embeddings.token_embedding.weight",
    "txt/pos_embedding": "text_model.embeddings.position_embedding.weight",
    "txt/Encoder_0/encoderblock_": "text_model.encoder.layers.",
    "txt/Encoder_0/encoder_norm/": "text_model.final_layer_norm.",
    "txt/head/": "text_model.head.",
    "LayerNorm_0/": "layer_norm1.",
    "LayerNorm_1/": "layer_norm2.",
    "MlpBlock_0/Dense_0/": "mlp.fc1.",
    "MlpBlock_0/Dense_1/": "mlp.fc2.",
    f"{_ATTENTION}query/": "self_attn.q_proj.",
    f"{_ATTENTION}key/": "self_attn.k_proj.",
    f"{_ATTENTION}value/": "self_attn.v_proj.",
    f"{_ATTENTION}out/": "self_attn.out_proj.",
    "/": ".",
    ".kernel": ".weight",
    ".scale": ".weight",
}


def is_big_vision(state: dict[str, Tensor]) -> bool:
    """Return whether the tensors have big_vision's names."""
    return any(name.removeprefix("params/").startswith(("img/", "txt/")) for name in state)


def from_big_vision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by new names; unknown ones keep theirs."""
    renamed = {}
    for name, tensor in _unstacked(state).items():
        new = {"t": "logit_scale", "b": "logit_bias"}.get(name, name)
        for old, replacement in _NAMES.items():
            new = new.replace(old, replacement)
        renamed[new] = _torch_shape(name, tensor)
    for kind in ("weight", "bias"):
        parts = [f"{_HEAD}attention.{part}.{kind}" for part in ("query", "key", "value")]
        if all(part in renamed for part in parts):
            renamed[f"{_HEAD}attention.in_proj_{kind}"] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def _unstacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters; blocks of a `scan` stand in one tensor."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("opt/"):  # the optimizer's state
            continue
        name = name.removeprefix("params/")
        if "/encoderblock/" in name:
            found |= {name.replace("block/", f"block_{number}/"): part for number, part in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def _torch_shape(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in torch's shape."""
    layer, _, leaf = name.rpartition("/")
    if leaf == "pos_embedding":
        return tensor[0]
    if leaf == "kernel" and tensor.ndim == 4:  # (row, column, channel, outputs)
        return tensor.permute(3, 2, 0, 1)
    if leaf == "kernel":
        inputs = tensor.flatten(0, 1) if layer.endswith("/out") else tensor.flatten(1)
        return inputs.T
    return tensor.flatten() if leaf == "bias" else tensor
