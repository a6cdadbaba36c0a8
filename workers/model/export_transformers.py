"""Exports a model as `SiglipModel` or `CLIPModel` of transformers.

    S  image size      T  context length

`AutoModel`, `AutoProcessor` and `pipeline("zero-shot-image-classification")` load the folder without sigray. What these
classes cannot hold is refused by name. The pipeline fills SigLIP's texts to 64 tokens, whatever the model says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from sigray.workers.config import ModelConfig
from sigray.workers.model.bottleneck import fold_bottleneck
from sigray.workers.model.inputs import CLIP_VOCAB_SIZE, image_inputs, shapes, text_inputs, tokenizer_file
from sigray.workers.model.tokenizer import (
    clip_vocabulary,
    fit_tokenizer,
    is_plain,
    load_tokenizer_file,
)
from sigray.workers.model.tower_traits import activation_of
from sigray.workers.model.transformers_names import CLIP, SIGLIP, to_transformers

_PUNCTUATION = r"[!-/:-@\[-\^`{-~]"  # ASCII's, without the underscore, which becomes a space


def export_transformers(module: nn.Module, model: ModelConfig, folder: Path) -> None:
    """Write the folder.

    Args:
        folder: exists.

    Raises:
        ValueError: `SiglipModel` and `CLIPModel` cannot hold the model, or a tokenizer's file is missing.
        RuntimeError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError(f"{error}; --format transformers needs the extra: pip install 'sigray[export]'") from error
    visual: Any = module.get_submodule("visual")
    text: Any = module.get_submodule("text")
    is_siglip = hasattr(visual, "trunk")
    check = _check_siglip if is_siglip else _check_clip
    if problems := [problem for problem, holds in check(module, visual, text).items() if not holds]:
        name = "SiglipModel" if is_siglip else "CLIPModel"
        raise ValueError(f"transformers' {name} cannot hold this model: {'; '.join(problems)}")
    vision: Any = visual.trunk if is_siglip else visual
    size, context_length, vocab_size = shapes(model)
    tokenizer = _tokenizer(model, context_length, vocab_size)
    texts = _tower(text.transformer.resblocks) | {
        "vocab_size": vocab_size,
        "max_position_embeddings": context_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    patches = vision.patch_embed.proj if is_siglip else vision.conv1
    images = _tower(vision.blocks if is_siglip else vision.transformer.resblocks)
    images |= {"image_size": size, "patch_size": patches.kernel_size[0]}
    weights = fold_bottleneck(module)
    if is_siglip:
        texts["projection_size"] = text.text_projection.out_features
        exported: Any = transformers.SiglipModel(transformers.SiglipConfig(text_config=texts, vision_config=images))
    else:
        # 2 stands for "the highest token", as open_clip reads a text.
        texts["eos_token_id"] = text.eos_id if text.pool_type == "eos" else 2
        config = transformers.CLIPConfig(text_config=texts, vision_config=images, projection_dim=visual.output_dim)
        exported = transformers.CLIPModel(config)
    exported.load_state_dict(to_transformers(weights, SIGLIP if is_siglip else CLIP))
    exported.eval().save_pretrained(folder)
    kind = transformers.SiglipProcessor if is_siglip else transformers.CLIPProcessor
    kind(image_processor=_image_processor(model, size), tokenizer=tokenizer).save_pretrained(folder)


def load_transformers(folder: Path) -> tuple[Any, Any, Any]:
    """Load a folder; returns image encoder, text encoder and tokenizer."""
    import transformers

    exported = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoProcessor.from_pretrained(folder).tokenizer

    def tokenize(texts: list[str]) -> Any:
        return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]

    return (
        lambda pixels: exported.get_image_features(pixel_values=pixels).pooler_output,
        lambda tokens: exported.get_text_features(input_ids=tokens.long()).pooler_output,
        tokenize,
    )


def _check_siglip(module: nn.Module, visual: Any, text: Any) -> dict[str, bool]:
    trunk = visual.trunk
    return {
        "its image tower is no ViT of timm with one attention pool (timm_pool: map, timm_proj: none)": (
            type(trunk).__name__ == "VisionTransformer"
            and type(getattr(trunk, "attn_pool", None)).__name__ == "AttentionPoolLatent"
            and getattr(trunk, "cls_token", None) is None
            and not list(visual.head.parameters())
        ),
        "it has no logit_bias, so it is of the softmax": getattr(module, "logit_bias", None) is not None,
        "its text tower is not pooled at the last token": getattr(text, "pool_type", None) == "last",
        "its text tower has a causal mask": getattr(text, "attn_mask", None) is None,
        "its text tower has no projection with a bias": isinstance(getattr(text, "text_projection", None), nn.Linear),
    }


def _check_clip(module: nn.Module, visual: Any, text: Any) -> dict[str, bool]:
    return {
        "its image tower is none of open_clip's ViTs with a class token": (
            type(visual).__name__ == "VisionTransformer"
            and getattr(visual, "attn_pool", None) is None
            and getattr(visual, "pool_type", None) == "tok"
            and not isinstance(visual.ln_pre, nn.Identity)
            and isinstance(visual.proj, nn.Parameter)
        ),
        "it has a logit_bias, so it is of the sigmoid": getattr(module, "logit_bias", None) is None,
        "its text tower is not pooled at its highest token or end": getattr(text, "pool_type", None)
        in ("argmax", "eos"),
        "its text tower has no causal mask": getattr(text, "attn_mask", None) is not None,
        "its text projection has a bias": isinstance(getattr(text, "text_projection", None), nn.Parameter),
    }


def _tower(blocks: Any) -> dict[str, Any]:
    """Return the keys of a config that the blocks of a tower decide."""
    block = blocks[0]
    is_timm = hasattr(block, "norm1")
    norm, inside, gelu = (
        (block.norm1, block.mlp.fc1, block.mlp.act) if is_timm else (block.ln_1, block.mlp.c_fc, block.mlp.gelu)
    )
    act = activation_of(gelu)
    if act is None:
        raise ValueError(f"transformers' SiglipModel and CLIPModel have no activation {type(gelu).__name__}")
    return {
        "hidden_size": norm.normalized_shape[0],
        "intermediate_size": inside.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": act,  # transformers' default is another one for SigLIP
        "layer_norm_eps": norm.eps,
    }


def _image_processor(model: ModelConfig, size: int) -> Any:
    import transformers

    inputs = image_inputs(model)
    square = {"height": size, "width": size}
    options: dict[str, Any] = {
        "resample": Image.Resampling[inputs.image_interpolation.upper()].value,
        "image_mean": list(inputs.image_mean),
        "image_std": list(inputs.image_std),
    }
    if inputs.image_resize == "squash":
        return transformers.SiglipImageProcessor(size=square, **options)
    if inputs.image_resize == "shortest":
        return transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square, **options)
    raise ValueError("transformers' processors of SigLIP and CLIP cannot fill an image (model.image_resize=longest)")


def _tokenizer(model: ModelConfig, context_length: int, vocab_size: int | None) -> Any:
    import transformers

    path = tokenizer_file(model)
    if path is None:
        if not is_plain(model) or vocab_size != CLIP_VOCAB_SIZE:
            raise ValueError("the tokenizer of this model name is one of the hub: take --format open_clip")
        vocabulary, merges = clip_vocabulary()
        first = next(iter(vocabulary))  # token 0, with which open_clip fills
        options: Any = {"vocab": vocabulary, "merges": merges, "pad_token": first}
        names = {"bos_token": "<start_of_text>", "eos_token": "<end_of_text>", "unk_token": "<end_of_text>"}
        return transformers.CLIPTokenizer(**options, **names, model_max_length=context_length)
    file = load_tokenizer_file(path)
    fit_tokenizer(file, model, context_length)
    _clean_by(file, text_inputs(model).text_clean)
    padding = file.padding or {}
    usual = {"unk_token": ("[UNK]", "<unk>"), "eos_token": ("[EOS]", "</s>", "<eos>"), "bos_token": ("<s>", "<bos>")}
    known = {key: next((n for n in some if file.token_to_id(n) is not None), None) for key, some in usual.items()}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=file,
        model_max_length=context_length,
        padding_side=padding["direction"],
        pad_token=padding["pad_token"],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids"],
        **{key: name for key, name in known.items() if name is not None},
    )


def _clean_by(file: Any, clean: str) -> None:
    """Let a tokenizer clean a text itself; it cannot correct encodings and HTML."""
    from tokenizers import Regex, normalizers

    if clean == "none":
        return
    steps: list[Any] = []
    if clean == "canonicalize":
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(_PUNCTUATION), "")]
    if clean != "whitespace":
        steps.append(normalizers.Lowercase())
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    own = [file.normalizer] if file.normalizer is not None else []
    file.normalizer = normalizers.Sequence([*steps, *own])
