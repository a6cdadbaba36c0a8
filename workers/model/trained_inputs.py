"""Finds the inputs that weights were trained with.

    transformers    preprocessor_config.json or processor_config.json, tokenizer.json, tokenizer_config.json
    open_clip       preprocess_cfg and text_cfg of open_clip_config.json, tokenizer.json
    sigray          config.json of an export; config.yaml of a run, for a file in its checkpoints/
    timm            pretrained_cfg of config.json
    big_vision      what open_clip's SigLIP weights expect; openai: what its CLIP weights expect
    model.name      without any of these, what open_clip's pretrained weights of that name expect

A model that sees other inputs works, only worse, and nothing tells. So `take_inputs` puts these values into the config
of a run at its start. The run's config.yaml then holds what the model expects, for every later command.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sigray.workers.config import ModelConfig
from sigray.workers.model.image_processors import read_image_processor
from sigray.workers.model.inputs import OPEN_CLIP, inputs_of, tokenizer_file, tower_config
from sigray.workers.model.tokenizer import TOKENIZER, load_tokenizer_file, tokenizer_sha256
from sigray.workers.model.untrusted import read_json
from sigray.workers.model.weights_source import WeightsSource, find_weights, run_section
from sigray.workers.model.weights_towers import with_towers

_PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>")
_TIMM_CROP = {"center": "shortest", "squash": "squash", "border": "longest"}
_NO_TOWERS: dict[str, Any] = {"embed_dim": 1, "vision_cfg": {}, "text_cfg": {}}
_BEFORE = inputs_of(ModelConfig(towers=_NO_TOWERS))


def take_inputs(model: ModelConfig, kept: dict[str, Any]) -> tuple[ModelConfig, list[str]]:
    """Return a config with the inputs that the model expects, and remarks.

    A key of the config counts first, then what is kept, then the weights. A config without towers gets those of its
    weights.

    Args:
        kept: inputs of a run that goes on, or of the store of embeddings that a run reads: they stay, whatever the
            weights say.

    Raises:
        ValueError: the weights' files are missing or damaged, or expect inputs or towers that sigray cannot make.
        StoreError: a URL's store cannot be reached or refuses.
    """
    model = with_towers(model)
    trained: dict[str, Any] = {}
    if kept.keys() != _BEFORE.keys():
        trained = _checked(model, _trained_inputs(model))
    elif model.init_from is None or Path(model.init_from).exists():
        # A run that goes on needs its initial weights no more: they are not fetched, and may be damaged.
        with contextlib.suppress(ValueError, OSError):
            trained = _checked(model, _trained_inputs(model))
    given = {name: getattr(model, name) for name in _BEFORE if getattr(model, name) is not None}
    taken = _BEFORE | trained | kept | given
    remarks = []
    if kept.keys() == _BEFORE.keys() and tokenizer_file(model) is not None and taken["tokenizer_sha256"] is None:
        remarks.append(f"the run recorded no hash of {taken['tokenizer']}: the file counts as it is now")
    for name, value in trained.items():
        if name == "tokenizer_sha256":  # the reader of the file compares it
            continue
        if name in given and taken[name] != value:
            remarks.append(f"model.{name}={_shown(taken[name])}, though the weights were trained with {_shown(value)}")
        elif taken[name] != value:
            remarks.append(
                f"model.{name}={_shown(taken[name])} is kept, as the run or its store of embeddings began with it, "
                f"though the weights were trained with {_shown(value)}"
            )
    return model.model_copy(update=taken), remarks


def _shown(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)


def _checked(model: ModelConfig, trained: dict[str, Any]) -> dict[str, Any]:
    """Return inputs that another program wrote, each of its key's type and range."""
    taken = {name: value for name, value in trained.items() if getattr(model, name) is None}
    try:
        ModelConfig(towers=_NO_TOWERS, **taken)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = str(wrong["loc"][0])
        raise ValueError(
            f"model.{name}: the files of {model.init_from or model.name or model.tokenizer} say "
            f"{_shown(taken.get(name)):.80}: {wrong['msg']}. Set model.{name}, or repair the files"
        ) from None
    return trained


def _trained_inputs(model: ModelConfig) -> dict[str, Any]:
    """Return what is known of the inputs; the keys are those of the config."""
    source = find_weights(model.init_from) if model.init_from is not None else None
    given = [name for name in _BEFORE if getattr(model, name) is not None]
    found = _of_name(model.name) if model.name is not None else {}
    if source is not None:
        found |= {
            "transformers": lambda source: _of_transformers(source, given),
            "open_clip": _of_open_clip,
            "sigray": _of_export,
            "timm": _of_timm,
            "big_vision": lambda _: _of_open_clips("ViT-B-16-SigLIP"),
            "openai": lambda _: _of_open_clips("ViT-B-32"),
            "tensors": _of_run,
        }[source.format](source)
    if model.tokenizer is None and source is not None and "tokenizer" not in found:
        _refuse_sentencepiece(source)
    tokenizer = found.get("tokenizer", OPEN_CLIP) if model.tokenizer is None else model.tokenizer
    if tokenizer == OPEN_CLIP:
        return {name: value for name, value in found.items() if not name.startswith(("text_", "tokenizer_"))}
    trained = found.get("tokenizer", tokenizer)
    own = tokenizer_sha256(tokenizer)  # None: the tokenizer's own check names what is missing
    recorded = found.get("tokenizer_sha256") or (None if trained == OPEN_CLIP else tokenizer_sha256(trained))
    if own == recorded:
        found["tokenizer"] = tokenizer  # perhaps a copy of it
    elif model.tokenizer in (None, trained):
        own = recorded  # `build_tokenizer` refuses the file
    else:
        found.pop("text_clean", None)
    return _of_tokenizer(tokenizer) | found | {"tokenizer_sha256": own}


def _of_name(name: str) -> dict[str, Any]:
    options = tower_config(ModelConfig(name=name))["text_cfg"].get("tokenizer_kwargs") or {}
    return _of_open_clips(name) | ({"text_clean": options["clean"]} if "clean" in options else {})


def _of_open_clips(name: str) -> dict[str, Any]:
    """Return the pixels of open_clip's first weights of a name."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(name)
    return _of_preprocess_cfg(get_pretrained_cfg(name, tags[0]) if tags else {})


def _of_preprocess_cfg(config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of the config that open_clip's `preprocess_cfg` stands for."""
    if not config:
        return {}
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    merged = merge_preprocess_dict(PreprocessCfg(), config)
    return {
        "image_mean": tuple(merged["mean"]),
        "image_std": tuple(merged["std"]),
        "image_resize": merged["resize_mode"],
        "image_interpolation": merged["interpolation"],
        "image_fill": merged["fill_color"],
    }


def _of_open_clip(source: WeightsSource) -> dict[str, Any]:
    text = (source.config.get("model_cfg") or {}).get("text_cfg") or {}
    found = _of_preprocess_cfg(source.config.get("preprocess_cfg") or {})
    if text.get("hf_tokenizer_name"):
        found |= _tokenizer_beside(source.folder)
        # The default of open_clip's HFTokenizer; `sigray export` writes what the model was trained with.
        found["text_clean"] = (text.get("tokenizer_kwargs") or {}).get("clean", "whitespace")
    return found


def _of_export(source: WeightsSource) -> dict[str, Any]:
    found = _of_preprocess_cfg(source.config["preprocessing"]) | _tokenizer_beside(source.folder)
    section = source.config["model"]
    return found | _without_none(**{name: section.get(name) for name in ("text_clean", "tokenizer_sha256")})


def _of_timm(source: WeightsSource) -> dict[str, Any]:
    config = source.config.get("pretrained_cfg") or {}
    return _without_none(
        image_mean=_triple(config.get("mean")),
        image_std=_triple(config.get("std")),
        image_resize=_TIMM_CROP.get(config.get("crop_mode", "center"), "shortest"),
        image_interpolation=config.get("interpolation"),
    )


def _of_run(source: WeightsSource) -> dict[str, Any]:
    """Return the inputs of the run whose checkpoint this is, if it is one."""
    section = run_section(source)
    if not section:
        return {}
    return inputs_of(ModelConfig(towers=_NO_TOWERS, **{name: section[name] for name in _BEFORE if name in section}))


def _of_transformers(source: WeightsSource, given: Collection[str]) -> dict[str, Any]:
    found = _tokenizer_beside(source.folder)
    if "tokenizer" in found:
        found["text_clean"] = _clean_of_transformers(source)
    images = read_json(source.folder / "preprocessor_config.json")
    if images is None:
        images = (read_json(source.folder / "processor_config.json") or {}).get("image_processor")
    kind = str(source.config.get("model_type"))
    if images is None and kind.endswith("_text_model"):
        return found
    if not isinstance(images, dict | None):
        raise ValueError(f"{source.place}: image_processor in processor_config.json is no mapping")
    return found | read_image_processor(images or {}, kind, source.place, given)


def _clean_of_transformers(source: WeightsSource) -> str:
    """Return the cleaning of SigLIP's tokenizers that tokenizer.json lacks."""
    if not str(source.config.get("model_type")).startswith("siglip"):
        return "none"
    config = read_json(source.folder / "tokenizer_config.json") or {}
    normalizer = load_tokenizer_file(str(source.folder / TOKENIZER)).normalizer
    cleaned = normalizer.normalize_str("A!") if normalizer is not None else "A!"
    kind = str(config.get("tokenizer_class"))
    if kind.startswith(("TokenizersBackend", "PreTrainedTokenizer")):  # `sigray export`: the file cleans by itself
        return "none"
    if kind.startswith("SiglipTokenizer"):  # SigLIP of 2023
        return "none" if "!" not in cleaned else "canonicalize"
    return "none" if "A" not in cleaned else "lower"


def _tokenizer_beside(folder: Path) -> dict[str, Any]:
    file = folder / TOKENIZER
    return {"tokenizer": str(file)} if file.is_file() else {}


def _refuse_sentencepiece(source: WeightsSource) -> None:
    if any((source.folder / name).is_file() for name in ("spiece.model", "tokenizer.model")):
        raise ValueError(
            f"model.init_from: {source.place} has its tokenizer as a SentencePiece file only: write tokenizer.json "
            "beside it (AutoTokenizer of transformers, save_pretrained), or set model.tokenizer"
        )


def _of_tokenizer(path: str) -> dict[str, Any]:
    """Return how a tokenizer file fills short captions."""
    tokenizer = load_tokenizer_file(path)
    config = read_json(Path(path).with_name("tokenizer_config.json")) if Path(path).is_file() else None
    config = config or {}
    padding, truncation = tokenizer.padding or {}, tokenizer.truncation or {}
    if "left" in (str(truncation.get("direction")).lower(), config.get("truncation_side")):
        raise ValueError(
            f"model.tokenizer: {path} or the tokenizer_config.json beside it cuts long captions on the left, and "
            "sigray cuts them on the right: set truncation_side and the truncation's direction there to right"
        )
    name = config.get("pad_token")
    name = name.get("content") if isinstance(name, dict) else name
    ids = [padding.get("pad_id"), *(tokenizer.token_to_id(each) for each in (str(name), *_PAD_NAMES))]
    side = padding.get("direction") or config.get("padding_side") or "right"
    return {
        "text_pad_id": next((number for number in ids if number is not None), 0),
        "text_pad_side": side,
    }


def _without_none(**found: Any) -> dict[str, Any]:
    return {name: value for name, value in found.items() if value is not None}


def _triple(values: Any) -> tuple[float, ...] | None:
    return tuple(map(float, values)) if values is not None else None
