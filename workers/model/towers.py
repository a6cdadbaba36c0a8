"""The model: image tower, text tower, `logit_scale` (a log), `logit_bias`.

    b  pairs on this rank      S  image size      T  context length      D  embedding dimension

Every model is an open_clip `CustomTextCLIP`, so the weights of a checkpoint load in plain open_clip under the same
names.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from sigray.workers.config import ModelConfig, Tower
from sigray.workers.model.bottleneck import use_bottleneck
from sigray.workers.model.decoder import ImageTokens, build_decoder
from sigray.workers.model.distiller import build_distiller
from sigray.workers.model.image_towers import StoredTower, load_image_tower
from sigray.workers.model.inputs import image_inputs, shapes, tower_config
from sigray.workers.model.timm_vits import register_siglip_vit
from sigray.workers.model.untrusted import read_tensors, reason, refuse_code

TOWERS: tuple[Tower, ...] = ("visual", "text")
TRAINING_PARTS = ("decoder", "distiller")
"""Parts of a model beside its towers. The features of images and texts do without."""


def build_model(model: ModelConfig, *, stored_embeddings: bool = False) -> nn.Module:
    """Towers with fresh weights from torch's current random state.

    `model.image_tower` keeps its own weights. The model's forward takes (b, 3, S, S) float images and (b, T) int tokens
    and returns a dict: `image_features` and `text_features`, both (b, D) of unit norm, `logit_scale` (already
    exponentiated) and, if it has one, `logit_bias`.

    Args:
        stored_embeddings: leave the image tower out: forward takes its embeddings, (b, D), in place of images.

    Raises:
        ValueError: if open_clip cannot build the configured towers, or `model.image_tower` cannot be loaded.
    """
    from open_clip.model import CustomTextCLIP

    config = tower_config(model)
    register_siglip_vit(config["vision_cfg"].get("timm_model_name") or "")
    if stored_embeddings or model.image_tower is not None:
        # A small tower, replaced below: open_clip cannot leave it out.
        size = config["vision_cfg"].get("image_size", 224)
        config["vision_cfg"] = {"image_size": size, "patch_size": size, "width": 64, "head_width": 64, "layers": 1}
    if config["text_cfg"].get("hf_model_name"):
        refuse_code(str(config["text_cfg"]["hf_model_name"]))
    try:
        module = CustomTextCLIP(
            **config, init_logit_scale=model.init_logit_scale, init_logit_bias=model.init_logit_bias, output_dict=True
        )
    except Exception as error:  # open_clip, timm and transformers raise one of a dozen types
        key = f"model.name={model.name}" if model.name else "model.towers"
        raise ValueError(f"{key}: open_clip cannot build this model: {reason(error)}") from error
    if stored_embeddings:
        module.visual = StoredTower()
    elif model.image_tower is not None:
        module.visual = load_image_tower(model.image_tower)
    if model.token_bottleneck is not None:
        use_bottleneck(module, model.token_bottleneck)
    if model.decoder is not None:  # last, so that the towers draw the weights that they have without it
        module.decoder = build_decoder(model, module.visual, module.text)
    if model.heads is not None:
        module.distiller = build_distiller(model.heads, module.visual, int(config["embed_dim"]))
    return module


def build_bare_model(model: ModelConfig) -> nn.Module:
    """As `build_model`, without fetching pretrained weights, which are loaded later."""
    config = tower_config(model)
    config["vision_cfg"]["timm_model_pretrained"] = config["text_cfg"]["hf_model_pretrained"] = False
    return build_model(model.model_copy(update={"name": None, "towers": config}))


def named_parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the parts of a model that have blocks: towers, decoder and distiller."""
    return [(name, part) for name, part in module.named_children() if name in (*TOWERS, *TRAINING_PARTS)]


def lock_towers(module: nn.Module, model: ModelConfig) -> None:
    """Set a model to training mode, except its locked parts.

    Locked parts have no gradients and no dropout from now on.

    Raises:
        ValueError: for more `trained_blocks` than a tower has.
    """
    module.train()
    for name in model.locked:
        module.get_submodule(name).requires_grad_(False).eval()
    for name, num_trained in model.trained_blocks.items():
        tower = module.get_submodule(name).eval()
        blocks = _block_chain(tower)
        if num_trained > len(blocks):
            raise ValueError(f"model.trained_blocks: the {name} tower has {len(blocks)} blocks, not {num_trained}")
        trained = _last_names(model, name, num_trained)
        for parameter_name, parameter in tower.named_parameters():
            parameter.requires_grad_(parameter_name in trained)
        for block in blocks[-num_trained:]:
            block.train()


def layer_scales(module: nn.Module, model: ModelConfig, layer_decay: Mapping[Tower, float]) -> dict[str, float]:
    """Factors on the learning rate by parameter name.

    1 after the blocks, the decay in the last block, decay ** (blocks + 1) before the first, as in BEiT and timm.

    Raises:
        ValueError: for a tower without blocks.
    """
    scales = {}
    for name, decay in layer_decay.items():
        tower = module.get_submodule(name)
        blocks = _block_chain(tower)
        if not blocks:
            raise ValueError(f"optim.layer_decay: the {name} tower has no chain of blocks: leave {name} out")
        block_of = {id(parameter): number for number, block in enumerate(blocks) for parameter in block.parameters()}
        last = _last_names(model, name, len(blocks))
        for path, parameter in tower.named_parameters():
            layer = block_of.get(id(parameter), len(blocks) if path in last else -1)
            scales[f"{name}.{path}"] = decay ** (len(blocks) - layer)
    return scales


def _last_names(model: ModelConfig, name: Tower, num_blocks: int) -> set[str]:
    """Names of a tower's parameters in its last blocks and after them.

    Found by a backward pass on the meta device, without memory: the input of the first of these blocks is detached, so
    the parameters before it get no gradient. This works for any tower, whatever its modules are called.
    """
    size, context_length, _ = shapes(model)
    with torch.device("meta"):
        tower = build_bare_model(model).get_submodule(name)
    with _without_memory(model) as device:
        tower = tower.to_empty(device=device)
        block = _block_chain(tower)[-num_blocks]
        block.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(), *inputs[1:]))
        text = torch.zeros(2, context_length, dtype=torch.int32)
        output = tower(text if name == "text" else torch.zeros(2, 3, size, size))
        (output[0] if isinstance(output, tuple) else output).sum().backward()
    return {path for path, parameter in tower.named_parameters() if parameter.grad is not None}


def _block_chain(tower: nn.Module) -> list[nn.Module]:
    """Blocks of a tower in order: the modules of one class with the most weights."""
    chains = [list(part.children()) for part in tower.modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
    uniform = [chain for chain in chains if len({type(member) for member in chain}) == 1]
    return max(uniform, key=lambda chain: sum(map(num_parameters, chain)), default=[])


def build_meta_model(model: ModelConfig) -> nn.Module:
    """Towers on torch's meta device (no memory), locked as in training.

    Fetches no pretrained weights.

    Raises:
        ValueError: if open_clip cannot build them.
    """
    with torch.device("meta"):
        module = build_bare_model(model)
    lock_towers(module, model)
    return module


def check_model(model: ModelConfig) -> nn.Module:
    """Run two pairs through the model on the meta device; returns the model.

    The model is that of `build_meta_model`.

    Raises:
        ValueError: if open_clip cannot build it, or its towers do not give one vector per image and per text, or
            vectors of two lengths.
    """
    size, context_length, _ = shapes(model)
    module = build_meta_model(model)
    image_tokens = ImageTokens(module.get_submodule("visual")) if model.decoder is not None else None
    _check_text_weights(tower_config(model)["text_cfg"])
    try:
        with _without_memory(model) as device:
            pairs = torch.empty(2, 3, size, size), torch.zeros(2, context_length, dtype=torch.int32)
            tensors = chain(module.named_parameters(), module.named_buffers()) if device == "cpu" else ()
            output = functional_call(
                module, {name: torch.empty_like(each, device=device) for name, each in tensors}, pairs
            )
    except Exception as error:  # a tower may fail in any way
        raise ValueError(f"model: the towers cannot run on {size} x {size} pixel images: {reason(error)}") from error
    for key in ("image_features", "text_features"):
        shape = tuple(output[key].shape)
        if len(shape) != 2:
            raise ValueError(f"model: {key} of two pairs have shape {shape}, (2, embed_dim) expected; check pool_type")
    image_dim, text_dim = (output[key].shape[1] for key in ("image_features", "text_features"))
    if image_dim != text_dim:
        raise ValueError(
            f"model: the image tower gives {image_dim} numbers for an image, the text tower {text_dim} for a text: set "
            f"model.towers.embed_dim={image_dim}"
        )
    if image_tokens is not None and (found := image_tokens.take()).ndim != 3:
        raise ValueError(
            f"model.decoder: the image tower gives {tuple(found.shape)} for two images before pooling, (2, P, width) "
            "expected: take another image tower, or leave model.decoder out"
        )
    return module


@contextlib.contextmanager
def _without_memory(model: ModelConfig) -> Iterator[str]:
    """Make tensors without memory; gives the device on which a module's belong."""
    if tower_config(model)["text_cfg"].get("hf_model_name"):
        # transformers reads a value of its mask, unless the mask is fake.
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield "cpu"
    else:
        with torch.device("meta"):
            yield "meta"


def masked_token(text_tower: nn.Module) -> int | None:
    """Return the token that a text tower's attention leaves out; None: none."""
    config: Any = getattr(text_tower, "config", None)  # of transformers
    if config is not None:
        return config.pad_token_id
    has_mask = getattr(text_tower, "cls_emb", None) is not None
    return cast(int, text_tower.pad_id) if has_mask else None


def _check_text_weights(text: dict[str, Any]) -> None:
    """Read a folder's .bin files now: training workers would refuse them later."""
    folder = Path(str(text.get("hf_model_name") or ""))
    if text.get("hf_model_name") and text.get("hf_model_pretrained", True) and not any(folder.glob("*.safetensors")):
        for path in sorted(folder.glob("*.bin")):
            read_tensors(str(path))


def normalize_pixels(images: Tensor, model: ModelConfig) -> Tensor:
    """(b, S, S, 3) uint8 pixels -> (b, 3, S, S) float32 input of the image tower.

    Runs on the device, so a quarter of the bytes cross to it.
    """
    inputs = image_inputs(model)
    mean, std = (
        # Filled on the device: to copy numbers to a GPU, the host would wait for all queued work.
        torch.stack([torch.full((), float(np.float32(v) * 255), device=images.device) for v in values])
        for values in (inputs.image_mean, inputs.image_std)
    )
    return images.float().sub_(mean).div_(std).permute(0, 3, 1, 2)


def tower_blocks(tower: nn.Module) -> list[nn.Module]:
    """Repeated modules in a list (open_clip) or chain (timm), inner ones first."""
    blocks: list[nn.Module] = []
    for part in reversed(list(tower.modules())):
        members = list(part.children()) if isinstance(part, nn.ModuleList | nn.Sequential) else []
        if len({type(member) for member in members}) == 1 and num_parameters(members[0]):
            blocks += members
    return blocks


def checkpoint_activations(module: nn.Module, model: ModelConfig, checkpoint: Callable[..., Any]) -> None:
    """Make each block of the trainable parts keep only its input.

    The backward pass runs the block again. Parameter names stay.

    Args:
        checkpoint: function and its arguments -> its result; `sigray.workers.device.Device.checkpoint`.
    """
    for name, part in named_parts(module):
        if name not in model.locked:
            for block in _outer_blocks(part):
                block.forward = functools.partial(checkpoint, block.forward)


def compile_tower_blocks(module: nn.Module) -> None:
    """Compile the blocks of all parts with torch.compile at their first run.

    Blocks and not whole towers: all blocks of a tower share one compiled form, and compiling takes seconds.
    Parameter names stay.
    """
    for _, part in named_parts(module):
        for block in _outer_blocks(part):
            block.forward = torch.compile(block.forward)


def _outer_blocks(tower: nn.Module) -> list[nn.Module]:
    """`tower_blocks` without the blocks inside another block."""
    blocks = tower_blocks(tower)
    inner = {id(part) for block in blocks for part in list(block.modules())[1:]}
    return [block for block in blocks if id(block) not in inner]


def num_parameters(module: nn.Module) -> int:
    """Number of parameters, trainable and locked together."""
    return sum(parameter.numel() for parameter in module.parameters())
