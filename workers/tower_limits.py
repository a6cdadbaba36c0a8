"""Limits of an open_clip config: sizes, and no names of files or code.

Another person may have written the config: as `model.towers`, or in the folder of `model.name: local-dir:FOLDER`.
open_clip itself checks the names of its keys when it builds the towers.
"""

from __future__ import annotations

from typing import Any

from sigray.workers.siglip_vits import siglip_vit

# Larger ones are mistakes; some would fill the memory before the plan of a run refuses them.
_LARGEST = {"layers": 1000, "vocab_size": 2**31 - 1, "image_size": 2**13, "patch_size": 2**13} | dict.fromkeys(
    ("embed_dim", "width", "head_width", "heads", "attn_pooler_queries", "attn_pooler_heads", "context_length"), 2**14
)
_LENGTHS = {"layers": 4, "image_size": 2, "patch_size": 2}  # of those that may be lists
_MAX_PATCHES = 2**14
_MAX_MLP_RATIO = 1000.0
_TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "language", "additional_special_tokens"}
"""Keys of text_cfg.tokenizer_kwargs.
The other keys that open_clip passes on name code or files, or cut texts at random."""


def check_towers(towers: dict[str, Any]) -> None:
    """Check the values of an open_clip config.

    Raises:
        ValueError: names key, value and what is expected.
    """
    if "multimodal_cfg" in towers:
        raise ValueError(
            "multimodal_cfg: a CoCa model has a decoder that writes captions, and no loss here trains it: take a model "
            "of two towers, such as ViT-B-32 or ViT-L-14"
        )
    for key in ("vision_cfg", "text_cfg"):
        if not isinstance(towers.get(key), dict):
            raise ValueError(f"{key}={towers.get(key)!r:.80}: a mapping expected")
    vision, text = towers["vision_cfg"], towers["text_cfg"]
    _check_sizes("", {"embed_dim": towers.get("embed_dim")})
    _check_sizes("vision_cfg.", vision)
    _check_sizes("text_cfg.", text)
    timm_name = str(vision.get("timm_model_name") or "")
    if any(sign in timm_name for sign in "/:\\"):
        raise ValueError(
            f"vision_cfg.timm_model_name={timm_name!r:.200} names a folder or a repository: give the name of a model "
            "that timm itself has"
        )
    if timm_name.startswith("siglip_vit"):
        _check_siglip_vit(timm_name, vision)
    elif not timm_name and not isinstance(vision.get("layers"), list | tuple):
        _check_patches(vision)
    options = text.get("tokenizer_kwargs") or {}
    if not isinstance(options, dict):
        raise ValueError(f"text_cfg.tokenizer_kwargs={options!r:.80}: a mapping expected")
    refused = sorted(map(str, options.keys() - _TOKENIZER_OPTIONS))
    if refused:
        raise ValueError(
            f"text_cfg.tokenizer_kwargs names {refused[0]!r:.80}, and no code or file that comes with a model is used: "
            f"allowed are {', '.join(sorted(_TOKENIZER_OPTIONS))}"
        )


def _check_sizes(section: str, content: dict[str, Any]) -> None:
    for key, largest in _LARGEST.items():
        if key not in content or (key == "patch_size" and content[key] is None):  # null in open_clip's ResNets
            continue
        value = content[key]
        numbers = value if isinstance(value, list | tuple) and len(value) == _LENGTHS.get(key) else [value]
        if not all(type(number) is int and 1 <= number <= largest for number in numbers):
            raise ValueError(f"{section}{key}={value!r:.80}: a whole number from 1 to {largest} expected")
    ratio = content.get("mlp_ratio", 1)
    if type(ratio) not in (int, float) or not 0 < ratio <= _MAX_MLP_RATIO:
        raise ValueError(f"{section}mlp_ratio={ratio!r:.80}: a number above 0, at most {_MAX_MLP_RATIO:g}, expected")


def _check_siglip_vit(timm_name: str, vision: dict[str, Any]) -> None:
    key = "vision_cfg.timm_model_name"
    try:
        shape = siglip_vit(timm_name)
    except ValueError as error:
        raise ValueError(f"{key}={error}") from None
    if shape is None:
        return
    sizes = {"width": shape.width, "layers": shape.depth, "heads": shape.heads, "patch_size": shape.patch_size}
    _check_sizes(f"{key}={timm_name}: ", sizes | {"image_size": shape.image_size})
    _check_patches({"image_size": shape.image_size, "patch_size": shape.patch_size})
    if shape.width % shape.heads:
        raise ValueError(f"{key}={timm_name}: its width {shape.width} is no multiple of its {shape.heads} heads")
    if not 0 < shape.mlp <= _MAX_MLP_RATIO * shape.width:
        raise ValueError(f"{key}={timm_name}: its MLP needs 1 to {_MAX_MLP_RATIO * shape.width:g} units")
    if vision.get("image_size", 224) != shape.image_size:
        raise ValueError(
            f"vision_cfg.image_size={vision.get('image_size', 224)}, and {key}={timm_name} has images of "
            f"{shape.image_size} pixels: give both the same size"
        )


def _check_patches(vision: dict[str, Any]) -> None:
    size, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
    sizes, patches = ([value] if isinstance(value, int) else value or [1] for value in (size, patch))
    if min(sizes) < max(patches):
        raise ValueError(f"vision_cfg.patch_size={patch} is larger than image_size={size}")
    num_patches = (max(sizes) // min(patches)) ** 2
    if num_patches > _MAX_PATCHES:
        raise ValueError(
            f"vision_cfg.patch_size={patch} cuts image_size={size} into {num_patches} patches, at most {_MAX_PATCHES} "
            "are supported: take larger patches or smaller images"
        )
