"""Exports a trained model for programs without sigray.

    b  rows      S  image size      T  context length      D  embedding dimension

    open_clip      open_clip_config.json, open_clip_model.safetensors, tokenizer: for open_clip's `local-dir:FOLDER`
    safetensors    model.safetensors by open_clip's names, config.json (the model section), tokenizer.json; also
                   the captioning decoder, if the module has one
    transformers   config.json, model.safetensors, processor: for AutoModel and AutoProcessor (export_transformers.py)
    onnx           image.onnx: (b, 3, S, S) float32 normalised pixels -> (b, D) of unit norm
                   text.onnx: (b, T) int64 tokens -> (b, D) of unit norm
                   config.json: mean, std, size, logit_scale (already exponentiated), logit_bias; tokenizer.json

open_clip cleans a text before a tokenizers file sees it (ftfy, HTML entities, spaces), sigray does not. So the two
may tokenize a text with, say, a curly apostrophe differently. `compare` counts such texts. tokenizer.json
itself, with its padding and truncation, gives the tokens of the training.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sigray.workers.config import ModelConfig
from sigray.workers.model.bottleneck import fold_bottleneck
from sigray.workers.model.export_transformers import export_transformers, load_transformers
from sigray.workers.model.inputs import image_inputs, shapes, text_inputs, tokenizer_file, tower_config
from sigray.workers.model.tokenizer import (
    TOKENIZER,
    build_open_clip_tokenizer,
    build_tokenizer,
    fit_tokenizer,
    is_plain,
    load_tokenizer_file,
    tokenizer_sha256,
)
from sigray.workers.siglip_vits import siglip_vit

Format = Literal["open_clip", "transformers", "safetensors", "onnx"]

Encoder = Callable[[Tensor], Tensor]
CONFIG = "config.json"
_MAX_ONNX_BYTES = 2**31 - 2**26  # of weights inside a protobuf file; larger weights go into a second file


@dataclass(frozen=True)
class Comparison:
    """Differences between an exported model and the trained one."""

    image_difference: float  # largest absolute difference of an image feature
    text_difference: float  # largest absolute difference of a text feature, from the same tokens
    num_texts: int
    other_tokens: tuple[str, ...] | None
    """Texts that the exported tokenizer turns into other tokens.
    None: the tokenizer could not be loaded here."""


def export_open_clip(module: nn.Module, model: ModelConfig, folder: Path) -> None:
    """Write a folder that plain open_clip loads by its `local-dir:` schema.

    Args:
        folder: exists.

    Raises:
        ValueError: if open_clip has no such image tower, or the tokenizer's file is missing.
    """
    towers = tower_config(model)
    timm_name = towers["vision_cfg"].get("timm_model_name") or ""
    if siglip_vit(timm_name):
        raise ValueError(
            f"plain open_clip knows no image tower {timm_name}, a name of sigray's: take --format transformers, "
            "onnx or safetensors"
        )
    towers["vision_cfg"].pop("timm_model_pretrained", None)
    towers["text_cfg"] |= _save_tokenizer(model, folder)
    towers["text_cfg"] = {key: value for key, value in towers["text_cfg"].items() if value is not None}
    initial = {"init_logit_scale": model.init_logit_scale, "init_logit_bias": model.init_logit_bias}
    config = {"model_cfg": {**towers, "custom_text": True, **initial}, "preprocess_cfg": preprocessing(model)}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    _save_weights(module, folder / "open_clip_model.safetensors")


def export_safetensors(module: nn.Module, model: ModelConfig, folder: Path) -> None:
    """As `export_open_clip`: the weights by open_clip's names, and the model section."""
    _save_tokenizer(model, folder)
    other = {"init_from", "init_fresh", "token_bottleneck", "decoder", "heads"}
    section = model.model_dump(mode="json", exclude=other)
    if model.decoder is not None:
        decoder: Any = module.get_submodule("decoder")
        section["decoder"] = decoder.sizes().model_dump()
    section |= _tokenizer_of(folder)
    content = {"model": section, "preprocessing": preprocessing(model)}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    _save_weights(module, folder / "model.safetensors")


def export_onnx(module: nn.Module, model: ModelConfig, folder: Path) -> None:
    """Write both towers for ONNX runtimes, for batches of any size.

    Arguments as `export_open_clip`.

    Raises:
        RuntimeError: if onnx or onnxscript is not installed, or torch cannot express a tower.
    """
    try:
        import onnxscript  # noqa: F401  torch.onnx imports it, but late
    except ImportError as error:
        raise RuntimeError(f"{error}; ONNX needs the extra: pip install 'sigray[export]'") from error
    # It warns about torchvision's operators, which no tower uses.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    size, context_length, _ = shapes(model)
    _save_tokenizer(model, folder)
    texts = torch.zeros(2, context_length, dtype=torch.int64)
    inputs = {"image": ("visual", "pixels", torch.zeros(2, 3, size, size)), "text": ("text", "tokens", texts)}
    for name, (tower_name, input_name, example) in inputs.items():
        tower = _UnitNorm(module.get_submodule(tower_name))
        num_bytes = sum(tensor.nbytes for tensor in tower.state_dict().values())
        torch.onnx.export(
            tower.eval(),
            (example,),
            folder / f"{name}.onnx",
            input_names=[input_name],
            output_names=["features"],
            # torch.export specialises on size 1; the exported graph accepts 1 as well.
            dynamic_shapes=({0: torch.export.Dim("batch", min=2)},),
            external_data=num_bytes > _MAX_ONNX_BYTES,
            dynamo=True,
            verbose=False,
        )
    content = {
        "preprocessing": preprocessing(model),
        "context_length": context_length,
        "logit_scale": float(module.get_parameter("logit_scale").detach().exp()),
        "logit_bias": float(module.logit_bias.detach()) if isinstance(module.logit_bias, torch.Tensor) else 0.0,
        **_tokenizer_of(folder),
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


EXPORTERS = {
    "open_clip": export_open_clip,
    "transformers": export_transformers,
    "safetensors": export_safetensors,
    "onnx": export_onnx,
}


def preprocessing(model: ModelConfig) -> dict[str, Any]:
    """Return the image tower's inputs by the keys of open_clip's `preprocess_cfg`."""
    inputs = image_inputs(model)
    return {
        "size": shapes(model)[0],
        "mean": list(inputs.image_mean),
        "std": list(inputs.image_std),
        "interpolation": inputs.image_interpolation,
        "resize_mode": inputs.image_resize,
        "fill_color": inputs.image_fill,
    }


def load_open_clip(folder: Path) -> tuple[Encoder, Encoder, Callable[[list[str]], Tensor] | None]:
    """Load a folder with plain open_clip; no tokenizer without transformers."""
    import open_clip

    exported = open_clip.create_model(f"local-dir:{folder}").eval()
    encoders = exported.encode_image, exported.encode_text
    try:
        return *encoders, open_clip.get_tokenizer(f"local-dir:{folder}")
    except ImportError:
        return *encoders, None


LOADERS = {"open_clip": load_open_clip, "transformers": load_transformers}
"""By format: load a folder; returns image encoder, text encoder and tokenizer."""


def compare(
    form: str, folder: Path, module: nn.Module, model: ModelConfig, texts: Sequence[str], *, num_images: int = 8
) -> Comparison:
    """Load an exported folder by its own library and compare it.

    Args:
        form: one of `LOADERS`.
        texts: whose tokens and features are compared.
        num_images: number of images of random pixels.
    """
    encode_image, encode_text, tokenizer = LOADERS[form](folder)
    size, context_length, vocab_size = shapes(model)
    pixels = torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(0))
    tokens = torch.from_numpy(build_tokenizer(model, context_length, vocab_size)(list(texts)))
    other_tokens: tuple[str, ...] | None = None
    if tokenizer is not None:
        is_same = (tokenizer(list(texts)) == tokens).all(dim=1).tolist()
        other_tokens = tuple(text for text, same in zip(texts, is_same, strict=True) if not same)
    with torch.inference_mode():
        own: Any = module.eval()
        image = _distance([(encode_image(pixels), own.encode_image(pixels))])
        text = _distance((encode_text(part), own.encode_text(part)) for part in tokens.split(256))
    return Comparison(image, text, len(texts), other_tokens)


def _distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the largest difference of features of unit norm."""
    normalize = torch.nn.functional.normalize
    return max(float((normalize(a, dim=-1) - normalize(b, dim=-1)).abs().max()) for a, b in pairs)


class _UnitNorm(nn.Module):
    """A tower whose features have unit norm."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, rows: Tensor) -> Tensor:
        return nn.functional.normalize(self.tower(rows), dim=-1)


def _save_weights(module: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in fold_bottleneck(module).items()}
    path.touch()
    mode = path.stat().st_mode  # the user's; safetensors leaves a file that only its owner can read
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(mode)


def _tokenizer_of(folder: Path) -> dict[str, str | None]:
    sha256 = tokenizer_sha256(str(folder / TOKENIZER))
    return {"tokenizer": TOKENIZER if sha256 else "open_clip", "tokenizer_sha256": sha256}


def _save_tokenizer(model: ModelConfig, folder: Path) -> dict[str, Any]:
    """Write the tokenizer's files, if it has any.

    Returns:
        Keys of open_clip's text_cfg that name the tokenizer; None as a value: no such key.
    """
    _, context_length, vocab_size = shapes(model)
    no_file = {"hf_tokenizer_name": None, "tokenizer_kwargs": None, "tokenizer_mode": None}
    path = tokenizer_file(model)
    if path is None:
        if model.name is None:
            return no_file  # its BPE, for any towers
        if not is_plain(model):
            tokenizer = build_open_clip_tokenizer(model, context_length)
            if hasattr(tokenizer, "save_pretrained"):
                tokenizer.save_pretrained(str(folder))
        return {}
    build_tokenizer(model, context_length, vocab_size)  # checks the file
    file = load_tokenizer_file(path)
    fit_tokenizer(file, model, context_length)
    padding = file.padding
    assert padding is not None
    file.save(str(folder / TOKENIZER))
    names = {"unk_token": "[UNK]", "eos_token": "[EOS]"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "padding_side": padding["direction"],
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "pad_token": padding["pad_token"],
        **{key: name for key, name in names.items() if file.token_to_id(name) is not None},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    clean = text_inputs(model).text_clean
    options = {"clean": clean} if clean != "none" else None
    return no_file | {"hf_tokenizer_name": TOKENIZER, "tokenizer_kwargs": options}
