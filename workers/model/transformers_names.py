"""Renames tensors between open_clip's `CustomTextCLIP` and transformers.

Their classes are `SiglipModel`, `Siglip2Model` and `CLIPModel`.
One table serves both directions. A row gives our names and theirs of equal parts along dimension 0, in order: "q kv kv"
and "in in in" say that q is the first third of `in` and kv the other two. `{i}` stands for the number of a block, `{p}`
for weight and bias.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_Row = tuple[str, str]
_Shape = Callable[[Tensor], Tensor]

_BLOCK, _TEXT_BLOCK = "vision_model.encoder.layers.{i}.", "text_model.encoder.layers.{i}."


def _block(ours: str, names: str, theirs: str) -> list[_Row]:
    """Return the rows of a block.

    Args:
        names: ours for norm, qkv, its projection, norm and the two layers of the MLP.
    """
    norm1, qkv, out, norm2, fc1, fc2 = names.split()
    attention = theirs + "self_attn."
    return [
        (f"{ours}{norm1}.{{p}}", f"{theirs}layer_norm1.{{p}}"),
        (" ".join([ours + qkv] * 3), " ".join(f"{attention}{name}_proj.{{p}}" for name in "qkv")),
        (f"{ours}{out}.{{p}}", f"{attention}out_proj.{{p}}"),
        (f"{ours}{norm2}.{{p}}", f"{theirs}layer_norm2.{{p}}"),
        (f"{ours}{fc1}.{{p}}", f"{theirs}mlp.fc1.{{p}}"),
        (f"{ours}{fc2}.{{p}}", f"{theirs}mlp.fc2.{{p}}"),
    ]


_OPEN_CLIP_BLOCK = "ln_1 attn.in_proj_{p} attn.out_proj ln_2 mlp.c_fc mlp.c_proj"
_EITHER = [
    ("logit_scale", "logit_scale"),
    ("logit_bias", "logit_bias"),
    ("text.token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("text.positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *_block("text.transformer.resblocks.{i}.", _OPEN_CLIP_BLOCK, _TEXT_BLOCK),
    ("text.ln_final.{p}", "text_model.final_layer_norm.{p}"),
]
_TRUNK, _POOL, _HEAD = "visual.trunk.", "visual.trunk.attn_pool.", "vision_model.head."
SIGLIP = [
    *_EITHER,
    ("text.text_projection.{p}", "text_model.head.{p}"),
    (_TRUNK + "patch_embed.proj.{p}", "vision_model.embeddings.patch_embedding.{p}"),
    (_TRUNK + "pos_embed", "vision_model.embeddings.position_embedding.weight"),
    *_block(_TRUNK + "blocks.{i}.", "norm1 attn.qkv.{p} attn.proj norm2 mlp.fc1 mlp.fc2", _BLOCK),
    (_TRUNK + "norm.{p}", "vision_model.post_layernorm.{p}"),
    (_POOL + "latent", _HEAD + "probe"),
    (f"{_POOL}q.{{p}} {_POOL}kv.{{p}} {_POOL}kv.{{p}}", " ".join([_HEAD + "attention.in_proj_{p}"] * 3)),
    (_POOL + "proj.{p}", _HEAD + "attention.out_proj.{p}"),
    (_POOL + "norm.{p}", _HEAD + "layernorm.{p}"),
    (_POOL + "mlp.fc1.{p}", _HEAD + "mlp.fc1.{p}"),
    (_POOL + "mlp.fc2.{p}", _HEAD + "mlp.fc2.{p}"),
]
"""A timm ViT with MAP pooling and a text tower whose projection is a linear layer."""
CLIP = [
    *_EITHER,
    ("text.text_projection", "text_projection.weight"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.{p}", "vision_model.pre_layrnorm.{p}"),  # their spelling
    *_block("visual.transformer.resblocks.{i}.", _OPEN_CLIP_BLOCK, _BLOCK),
    ("visual.ln_post.{p}", "vision_model.post_layernorm.{p}"),
    ("visual.proj", "visual_projection.weight"),
]
"""open_clip's own ViT, with a class token."""

# By our name: how the other side's shape becomes ours, and back.
_SHAPES: dict[str, tuple[_Shape, _Shape]] = {
    "logit_scale": (lambda tensor: tensor.reshape(()), lambda tensor: tensor.reshape(1)),
    "logit_bias": (lambda tensor: tensor.reshape(()), lambda tensor: tensor.reshape(1)),
    _TRUNK + "pos_embed": (lambda tensor: tensor[None], lambda tensor: tensor[0]),
    _TRUNK + "patch_embed.proj.weight": (lambda tensor: _convolution(tensor), lambda tensor: tensor),
    "text.text_projection": (lambda tensor: tensor.T, lambda tensor: tensor.T),
    "visual.proj": (lambda tensor: tensor.T, lambda tensor: tensor.T),
}


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by our names; those that no row has keep their names."""
    table = CLIP if "vision_model.embeddings.class_embedding" in state or "text_projection.weight" in state else SIGLIP
    # Buffers of transformers before 4.31.
    state = {name: tensor for name, tensor in state.items() if not name.endswith(".position_ids")}
    renamed = _rename(state, [(theirs, ours) for ours, theirs in table])
    return {name: _SHAPES[name][0](tensor) if name in _SHAPES else tensor for name, tensor in renamed.items()}


def to_transformers(state: dict[str, Tensor], table: list[_Row]) -> dict[str, Tensor]:
    """Return tensors by transformers' names; those that no row has keep their names.

    Args:
        table: SIGLIP or CLIP.
    """
    is_clip = table is CLIP  # its logit_scale is a scalar, too
    shaped = {
        name: _SHAPES[name][1](tensor) if name in _SHAPES and not (is_clip and name == "logit_scale") else tensor
        for name, tensor in state.items()
    }
    return _rename(shaped, table)


def _rename(state: dict[str, Tensor], rows: list[_Row]) -> dict[str, Tensor]:
    numbers = sorted(set(re.findall(r"\.(\d+)\.", " ".join(state))))
    renamed: dict[str, Tensor] = {}
    rest = dict(state)
    for given, wanted in _expand(rows, numbers):
        counts = Counter(given)
        if not counts.keys() <= rest.keys():
            continue
        parts: list[Tensor] = []
        for name, count in counts.items():
            tensor = rest.pop(name)
            parts += tensor.tensor_split(count) if count > 1 else [tensor]  # a scalar cannot be split
        for name in dict.fromkeys(wanted):
            own = [part for part, target in zip(parts, wanted, strict=True) if target == name]
            renamed[name] = torch.cat(own) if len(own) > 1 else own[0]
    return renamed | rest


def _expand(rows: list[_Row], numbers: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    for row in rows:
        for number in numbers if "{i}" in row[0] else [""]:
            for kind in ("weight", "bias") if "{p}" in row[0] else ("",):
                given, wanted = (names.replace("{i}", number).replace("{p}", kind).split() for names in row)
                yield given, wanted


def _convolution(weight: Tensor) -> Tensor:
    """Return a patch embedding as a convolution.

    `Siglip2Model` has a linear layer of (row, column, channel).
    """
    if weight.ndim != 2:
        return weight
    size = round((weight.shape[1] / 3) ** 0.5)
    return weight.reshape(-1, size, size, 3).permute(0, 3, 1, 2)
