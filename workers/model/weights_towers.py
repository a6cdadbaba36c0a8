"""Derives the towers of a model from the config beside its weights.

    transformers    config.json of SiglipModel, Siglip2Model of one resolution, CLIPModel
    open_clip       model_cfg of open_clip_config.json
    sigray          config.json of an export; config.yaml of a run, for a file in its checkpoints/

So `model.init_from` alone makes a model that computes what the weights computed. What towers here cannot express is an
error that names file, field and value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from sigray.workers.config import ModelConfig, Tower
from sigray.workers.model.inputs import CLASS_KEYS, CLIP_VOCAB_SIZE, tower_config
from sigray.workers.model.tokenizer import TOKENIZER
from sigray.workers.model.weights_source import WeightsSource, find_weights, run_section
from sigray.workers.siglip_vits import ACTIVATIONS, SiglipVit

_BOTH: tuple[Tower, ...] = ("visual", "text")
_Side = Literal["vision", "text"]
SIDES: dict[Tower, _Side] = {"visual": "vision", "text": "text"}
_SIGLIP_EPSILON = 1e-6  # of the norms of timm's ViTs
_OPEN_CLIP_EPSILON = 1e-5
_LEGACY_EOS = 2  # in a config of CLIP: the text is read at its highest token

# transformers writes no field that has its default, and is not needed to read its files.
_SIGLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_CLIP_DEFAULTS = {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP_TEXT = _SIGLIP_DEFAULTS | {"vocab_size": 32000, "max_position_embeddings": 64, "projection_size": None}
_SIGLIP_VISION = _SIGLIP_DEFAULTS | {"num_channels": 3, "patch_size": 16, "vision_use_head": True}
DEFAULTS: dict[tuple[str, _Side], dict[str, Any]] = {
    ("siglip", "vision"): _SIGLIP_VISION | {"image_size": 224},
    ("siglip", "text"): _SIGLIP_TEXT,
    ("siglip2", "vision"): _SIGLIP_VISION | {"num_patches": 256},
    ("siglip2", "text"): _SIGLIP_TEXT,
    ("clip", "vision"): _CLIP_DEFAULTS
    | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    | {"num_channels": 3, "image_size": 224, "patch_size": 32},
    ("clip", "text"): _CLIP_DEFAULTS
    | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    | {"vocab_size": CLIP_VOCAB_SIZE, "max_position_embeddings": 77, "eos_token_id": 49407},
}
"""By family and tower: the fields that are read, with transformers' defaults."""
SMALL: dict[Tower, dict[str, Any]] = {
    "visual": {"image_size": 32, "patch_size": 32, "width": 32, "head_width": 32, "layers": 1},
    "text": {"context_length": 2, "vocab_size": 2, "width": 32, "heads": 1, "layers": 1},
}
"""In the place of a tower that is not asked for."""


def with_towers(model: ModelConfig) -> ModelConfig:
    """Return a config with the towers of its weights; one that has towers stays.

    The sizes of a decoder are those of the weights' decoder, if they have one and the config gives none.

    Raises:
        ValueError: nothing beside the weights says their towers, or towers here cannot express them.
        StoreError: as `find_weights`.
    """
    if model.name is not None or model.towers is not None:
        return model
    assert model.init_from is not None
    source = find_weights(model.init_from)
    found = weights_model(source)
    if found is None:
        raise ValueError(
            f"model.init_from={source.place} alone does not say its towers (format {source.format}): give a folder of "
            "transformers, open_clip or `sigray export` with its config, or set model.name or model.towers"
        )
    if found.image_tower is not None and model.image_tower != found.image_tower:
        raise ValueError(
            f"model.init_from: {source.place} was trained with model.image_tower={found.image_tower}, and no code that "
            "comes with a model is used: set model.image_tower to it"
        )
    if model.tokenizer is None and _has_own_tokenizer(source, found) and not (source.folder / TOKENIZER).is_file():
        raise ValueError(
            f"model.init_from: {source.place} has no {TOKENIZER}, and its model has another tokenizer than CLIP's: "
            "write it beside the weights (AutoTokenizer of transformers, save_pretrained), or set model.tokenizer"
        )
    taken: dict[str, Any] = {"name": found.name, "towers": found.towers}
    for key in ("token_bottleneck", "image_size"):
        if getattr(model, key) is None:
            taken[key] = getattr(found, key)
    if model.decoder is not None:
        taken["decoder"] = model.decoder.filled_from(found.decoder)
    return model.model_copy(update=taken)


def weights_model(source: WeightsSource, towers: Iterable[Tower] = _BOTH) -> ModelConfig | None:
    """Return name or towers of weights; None if nothing beside them says it.

    Args:
        towers: those that are asked for; another one may be of any kind.

    Raises:
        ValueError: towers here cannot express what the config says.
    """
    if source.format == "transformers":
        return _checked(source, {"towers": _of_transformers(source, set(towers))})
    if source.format == "open_clip":
        content = source.config.get("model_cfg", source.config)
        if not isinstance(content, dict):
            raise ValueError(f"model.init_from: {source.place}: model_cfg in open_clip_config.json is no mapping")
        return _checked(source, {"towers": {key: value for key, value in content.items() if key not in CLASS_KEYS}})
    section = source.config["model"] if source.format == "sigray" else run_section(source)
    if not section or (section.get("name") is None and section.get("towers") is None):
        return None
    keys = ("name", "towers", "image_size", "token_bottleneck", "image_tower", "locked", "decoder")
    return _checked(source, {key: section[key] for key in keys if key in section})


def _checked(source: WeightsSource, section: dict[str, Any]) -> ModelConfig:
    """Return a checked config whose weights all come from the source."""
    towers = section.get("towers")
    try:
        if isinstance(towers, dict) and all(isinstance(towers.get(key), dict) for key in ("vision_cfg", "text_cfg")):
            text = {key: value for key, value in towers["text_cfg"].items() if key not in _TOKENIZER_KEYS}
            if text.get("hf_model_name"):
                text["hf_model_pretrained"] = False
            vision = towers["vision_cfg"]
            if vision.get("timm_model_pretrained"):
                vision = vision | {"timm_model_pretrained": False}
            section = section | {"towers": towers | {"vision_cfg": vision, "text_cfg": text}}
        return ModelConfig(**section)
    except ValueError as error:
        reasons = [str(each["msg"]).removeprefix("Value error, ") for each in error.errors()]  # type: ignore[attr-defined]
        raise ValueError(
            f"model.init_from: the config beside {source.place} describes no towers that can be used: {reasons[0]}"
        ) from error


_TOKENIZER_KEYS = {"hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode"}
"""Of text_cfg; `take_inputs` reads the file beside the weights."""


def _has_own_tokenizer(source: WeightsSource, found: ModelConfig) -> bool:
    """Return whether a model was trained with another tokenizer than CLIP's."""
    if source.format == "open_clip":
        text = source.config.get("model_cfg", source.config)["text_cfg"]
        return bool(text.get("hf_tokenizer_name") or text.get("tokenizer_kwargs"))
    if source.format != "transformers":
        return False
    return source.config["model_type"] != "clip" or tower_config(found)["text_cfg"]["vocab_size"] != CLIP_VOCAB_SIZE


class _Fields:
    """The config of one tower in config.json, with transformers' defaults."""

    def __init__(self, source: WeightsSource, side: _Side) -> None:
        kind = str(source.config["model_type"])
        self.family, _, own_side = kind.partition("_")
        self._where = f"model.init_from: {source.folder}/config.json: "
        if own_side and not own_side.startswith(side):
            raise ValueError(f"{self._where}model_type={kind} has no {side} tower: set model.name or model.towers")
        content = source.config
        if not own_side:
            self._where += f"{side}_config."
            # Files of 2022 have a second mapping, which counts before the first.
            parts = [content.get(f"{side}_config{ending}") or {} for ending in ("", "_dict")]
            if not all(isinstance(part, dict) for part in parts):
                raise ValueError(f"{self._where[:-1]} is no mapping")
            content = parts[0] | parts[1]
        self.values = DEFAULTS[self.family, side] | content

    def refuse(self, field: str, why: str) -> ValueError:
        return ValueError(f"{self._where}{field}={self.values.get(field)!r:.100}: {why}")

    def whole(self, field: str) -> int:
        value = self.values[field]
        if type(value) is not int or value < 1:
            raise self.refuse(field, "a whole number above 0 expected")
        return value

    def act(self) -> str:
        """Return timm's name of the activation."""
        act = self.values["hidden_act"]
        if act not in ACTIVATIONS:
            raise self.refuse("hidden_act", f"towers here have one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[act]

    def epsilon(self) -> float:
        value = self.values["layer_norm_eps"]
        if type(value) not in (int, float) or not 0 < value < 1:
            raise self.refuse("layer_norm_eps", "a number above 0 expected")
        return float(value)

    def expect(self, field: str, value: Any) -> None:
        if self.values[field] != value:
            raise self.refuse(field, f"image towers here have {value}: no towers compute what these weights computed")

    def blocks(self) -> dict[str, Any]:
        """Return open_clip's keys of the blocks, without heads."""
        width, inside = self.whole("hidden_size"), self.whole("intermediate_size")
        if width % self.whole("num_attention_heads"):
            raise self.refuse("num_attention_heads", f"hidden_size={width} is no multiple of it")
        # open_clip rounds the product down. Few digits, as in its own configs, if they give the number.
        ratios = (math.ceil(inside / width * 10**digits) / 10**digits for digits in range(1, 17))
        ratio = next(ratio for ratio in (*ratios, (inside + 0.5) / width) if int(width * ratio) == inside)
        keys: dict[str, Any] = {"width": width, "layers": self.whole("num_hidden_layers"), "mlp_ratio": ratio}
        if self.epsilon() != _OPEN_CLIP_EPSILON:
            keys["norm_kwargs"] = {"eps": self.epsilon()}
        if self.act() == "gelu_tanh":
            keys["act_kwargs"] = {"approximate": "tanh"}
        return keys


def _of_transformers(source: WeightsSource, wanted: set[Tower]) -> dict[str, Any]:
    """Return open_clip's config of the wanted towers."""
    parts = {tower: _Fields(source, side) for tower, side in SIDES.items() if tower in wanted}
    is_clip = next(iter(parts.values())).family == "clip"
    make = {"visual": _clip_vision if is_clip else _siglip_vision, "text": _clip_text if is_clip else _siglip_text}
    made = {tower: make[tower](parts[tower]) if tower in parts else SMALL[tower] for tower in _BOTH}
    acts = {part.act() for part in parts.values()}
    if is_clip:
        dim = source.config.get("projection_dim", 512)
        if "quick_gelu" in acts and len(acts) > 1:
            raise parts["text"].refuse("hidden_act", "towers of CLIP have quick_gelu both or neither, as in open_clip")
    elif "visual" in parts:
        dim = parts["visual"].whole("hidden_size")
        if "text" in parts and (parts["text"].values["projection_size"] or parts["text"].whole("hidden_size")) != dim:
            raise parts["text"].refuse("projection_size", f"the image tower gives {dim} numbers")
    else:
        dim = parts["text"].values["projection_size"] or parts["text"].whole("hidden_size")
    quick = "quick_gelu" in acts if is_clip else "text" in parts and parts["text"].act() == "quick_gelu"
    return {"embed_dim": dim, "vision_cfg": made["visual"], "text_cfg": made["text"]} | (
        {"quick_gelu": True} if quick else {}
    )


def _siglip_vision(fields: _Fields) -> dict[str, Any]:
    fields.expect("vision_use_head", True)
    fields.expect("num_channels", 3)
    fields.expect("layer_norm_eps", _SIGLIP_EPSILON)
    blocks = fields.blocks()
    patch = fields.whole("patch_size")
    if "image_size" in fields.values:
        size = fields.whole("image_size")
    else:  # siglip2
        edge = round(fields.whole("num_patches") ** 0.5)
        if edge * edge != fields.values["num_patches"]:
            raise fields.refuse("num_patches", "no square, and only square images of one size are supported")
        size = edge * patch
    heads, inside = fields.whole("num_attention_heads"), fields.whole("intermediate_size")
    shape = SiglipVit(blocks["width"], blocks["layers"], heads, inside, patch, size, fields.act())
    return {"image_size": size, "timm_model_name": shape.name, "timm_pool": "map", "timm_proj": "none"}


def _siglip_text(fields: _Fields) -> dict[str, Any]:
    return _text(fields) | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}


def _text(fields: _Fields) -> dict[str, Any]:
    sizes = {"context_length": fields.whole("max_position_embeddings"), "vocab_size": fields.whole("vocab_size")}
    return sizes | fields.blocks() | {"heads": fields.whole("num_attention_heads")}


def _clip_vision(fields: _Fields) -> dict[str, Any]:
    fields.expect("num_channels", 3)
    blocks = fields.blocks()
    head_width = blocks["width"] // fields.whole("num_attention_heads")
    sizes = {"image_size": fields.whole("image_size"), "patch_size": fields.whole("patch_size")}
    return sizes | blocks | {"head_width": head_width}


def _clip_text(fields: _Fields) -> dict[str, Any]:
    text = _text(fields)
    end = fields.values["eos_token_id"]
    if end in (_LEGACY_EOS, text["vocab_size"] - 1):
        return text
    return text | {"pool_type": "eos", "eos_id": fields.whole("eos_token_id")}
