"""Initial weights (`model.init_from`): which tensors of a file the model takes.

Every tensor of the model and of the file is accounted for: matched, resized, fresh, unused, or of another shape.
Another shape is an error with two exceptions. `model.init_fresh` asks for fresh weights. And position embeddings are
resized as in open_clip and timm, patch embeddings by pseudo-inverse (FlexiViT, arXiv 2212.08013).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sigray.workers.checkpoint.index import CheckpointInfo
from sigray.workers.checkpoint.writer import load_weights
from sigray.workers.config import ModelConfig, Tower
from sigray.workers.model.inputs import tower_config
from sigray.workers.model.tower_traits import tower_traits
from sigray.workers.model.towers import TOWERS, build_bare_model, build_meta_model, build_model
from sigray.workers.model.weights_files import read_weights
from sigray.workers.model.weights_source import WeightsSource, find_weights
from sigray.workers.model.weights_towers import SIDES, SMALL, weights_model
from sigray.workers.sharding import shard_like
from sigray.workers.storage import Storage
from sigray.workers.texts import first_ten, ten_lines

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class InitialWeights:
    """Result for each tensor; names are those of the model."""

    path: str
    origin: str  # format of the file, and which part of it
    matched: list[str] = field(default_factory=list)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Position and patch embeddings: shape in the file, shape in the model."""
    asked_fresh: list[str] = field(default_factory=list)  # because of model.init_fresh
    missing: list[str] = field(default_factory=list)  # fresh because the file lacks them
    unused: list[str] = field(default_factory=list)  # in the file, not in the model
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Shape in the file, shape in the model."""

    def text(self) -> str:
        """One line for each non-empty kind."""
        total = len(self.matched) + len(self.resized) + len(self.asked_fresh) + len(self.missing)
        lines = [f"weights from {self.path}{self.origin}: {len(self.matched)} of {total} tensors match"]
        lines += [f"  resized: {name} {list(old)} -> {list(new)}" for name, (old, new) in self.resized.items()]
        for title, names in (
            ("fresh, by model.init_fresh", self.asked_fresh),
            ("fresh, not in the file", self.missing),
            ("in the file, not in the model", self.unused),
        ):
            if names:
                lines.append(f"  {title}: {first_ten(names)}")
        return "\n".join(lines)


def check_initial_weights(model: ModelConfig) -> InitialWeights:
    """As `load_initial_weights`, without memory for the model.

    Raises:
        ValueError: also if a tower takes weights and differs in activation, norm epsilon, pooling or mask from what the
            config beside them says.
    """
    module = build_meta_model(model)
    assert model.init_from is not None
    source = find_weights(model.init_from)
    found, tensors = _match(module, model, source)
    for name in TOWERS:
        if any(key.startswith(f"{name}.") for key in tensors) and not (name == "visual" and model.image_tower):
            _check_traits(module, model, source, name)
    return found


def _check_traits(module: nn.Module, model: ModelConfig, source: WeightsSource, name: Tower) -> None:
    try:
        trained = weights_model(source, [name])
    except ValueError:
        if source.format == "transformers":
            raise
        return  # such as CoCa's: towers of a model that sigray does not build as a whole
    if trained is None or (trained.name, trained.towers) == (model.name, model.towers):
        return
    others = {f"{SIDES[other]}_cfg": SMALL[other] for other in TOWERS if other != name}  # may need the network
    with torch.device("meta"):
        alone = build_bare_model(ModelConfig(towers=tower_config(trained) | others))
    theirs = tower_traits(alone.get_submodule(name))
    ours = tower_traits(module.get_submodule(name))
    key = f"model.name={model.name}" if model.name else "model.towers"
    for trait, value in theirs.items():
        if ours[trait] != value:
            raise ValueError(
                f"model.init_from={source.place}: the config beside the weights says {trait} {value!r} of the {name} "
                f"tower, and {key} has {ours[trait]!r}: leave out model.name and model.towers, or give towers with the "
                "weights' own"
            )


def build_initial_model(model: ModelConfig) -> nn.Module:
    """Build the model and load its initial weights; raises as these two do."""
    module = build_model(model)
    if model.init_from is not None:
        load_initial_weights(module, model)
    return module


def load_initial_weights(module: nn.Module, model: ModelConfig) -> InitialWeights:
    """Load the weights of `model.init_from`, the same on every rank.

    Raises:
        ValueError: if the file is missing or unreadable, if none of its tensors fits, or if a tensor has another
            shape; the message lists all of them with a remedy.
    """
    assert model.init_from is not None
    found, tensors = _match(module, model, find_weights(model.init_from))
    own = module.state_dict()
    module.load_state_dict({name: shard_like(tensor, own[name]) for name, tensor in tensors.items()}, strict=False)
    return found


def build_trained_model(storage: Storage, info: CheckpointInfo, model: ModelConfig, *, ema: bool = False) -> nn.Module:
    """The whole model of a checkpoint.

    If the run read embeddings from a store, its checkpoints lack the locked image tower. The tower then comes from
    model.image_tower or model.init_from, as it did for the store.

    Args:
        ema: take the average of the weights, which the checkpoint has; else the last ones.

    Raises:
        DamagedCheckpoint, CheckpointError: as `load_weights`.
        ValueError: if model.image_tower or model.init_from is needed and missing.
    """
    module = build_bare_model(model)
    is_initial = model.init_from is not None
    load_weights(storage, info, module, lambda: load_initial_weights(module, model) if is_initial else None, ema=ema)
    return module


def _match(module: nn.Module, model: ModelConfig, source: WeightsSource) -> tuple[InitialWeights, dict[str, Tensor]]:
    own = module.state_dict()
    weights = read_weights(source, own)
    state = weights.tensors
    found = InitialWeights(source.place, weights.origin)
    fresh = [re.compile(pattern) for pattern in model.init_fresh]
    for name in [name for name in own if any(pattern.fullmatch(name) for pattern in fresh)]:
        found.asked_fresh.append(name)
        state.pop(name, None)
    unmatched = [p.pattern for p in fresh if not any(p.fullmatch(name) for name in own)]
    if unmatched:
        raise ValueError(
            f"model.init_fresh={unmatched[0]!r} matches no parameter; their names are such as {_some(own)}"
        )
    taken: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if name in found.asked_fresh:
            continue
        theirs = state.get(name)
        if theirs is None:
            found.missing.append(name)
            continue
        if problem := _problem(theirs, tensor):
            raise ValueError(f"model.init_from={model.init_from}: {name} {problem}")
        if theirs.numel() == tensor.numel() == 1:  # logit_scale and logit_bias are () here, (1,) in some checkpoints
            theirs = theirs.reshape(tensor.shape)
        old, new = tuple(theirs.shape), tuple(tensor.shape)
        if old != new:
            theirs = resize(name, theirs, tensor, module)
        if tuple(theirs.shape) != new:
            found.other_shape[name] = old, new
            continue
        taken[name] = theirs
        if old == new:
            found.matched.append(name)
        else:
            found.resized[name] = old, new
    found.unused = [name for name in state if name not in own]
    if found.other_shape:
        lines = [f"{name}: {list(old)} in the file, {list(new)} here" for name, (old, new) in found.other_shape.items()]
        patterns = [*model.init_fresh, *_fresh_patterns(list(found.other_shape), taken)]
        shown = "', '".join(patterns)
        remedy = f", or start these with fresh weights: model.init_fresh=['{shown}']" if len(patterns) <= 10 else ""
        raise ValueError(
            f"model.init_from={model.init_from}: {len(lines)} tensors have another shape:\n  {ten_lines(lines)}\n"
            f"Take towers of the checkpoint's shape{remedy}"
        )
    if not any(name.startswith(("visual.", "text.")) for name in taken):
        raise ValueError(
            f"model.init_from={model.init_from}: none of its {len(state)} tensors is one of the model's: "
            f"{_some(state) or 'nothing'} there, {_some(own)} here"
        )
    for tower in TOWERS:
        there, here, used = (
            [name for name in names if name.startswith(f"{tower}.")]
            for names in (found.unused, found.missing, [*taken, *found.asked_fresh])
        )
        if there and here and not used:
            raise ValueError(
                f"model.init_from={model.init_from}: its {tower} tower is of another kind: {_some(there)} there, "
                f"{_some(here)} here. Take towers of its kind (docs/models.md), or start this one with fresh weights: "
                rf"model.init_fresh=['{tower}\..*']"
            )
    return found, taken


def _problem(theirs: Tensor, own: Tensor) -> str | None:
    """Return why a tensor of a file is no weight; None: it is one."""
    if own.is_floating_point() and theirs.dtype not in _FLOATS:
        return f"is {str(theirs.dtype).removeprefix('torch.')}, quantized perhaps: give weights of 16 bits or more"
    if not theirs.isfinite().all():
        return "holds NaN or infinity"
    return None


def resize(name: str, theirs: Tensor, own: Tensor, module: nn.Module) -> Tensor:
    """Return position or patch embeddings in the model's size.

    Any other tensor stays as it is.

    Args:
        theirs: of a file or checkpoint.
        own: of the model, for its shape.
    """
    from open_clip.model import resize_pos_embed, resize_text_pos_embed
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    parent = module.get_submodule(name.rpartition(".")[0])
    by_open_clip = {"text.positional_embedding": resize_text_pos_embed, "visual.positional_embedding": resize_pos_embed}
    is_resizable = name.startswith("text.") or (theirs.ndim > 0 and _is_square(theirs.shape[0] - 1))
    if name in by_open_clip and theirs.shape[1:] == own.shape[1:] and is_resizable:
        state = {name: theirs.float()}
        by_open_clip[name](state, module)
        return state[name]
    if name.endswith(".pos_embed") and theirs.ndim == 3 and hasattr(parent, "patch_embed"):
        num_prefix = 0 if getattr(parent, "no_embed_class", False) else getattr(parent, "num_prefix_tokens", 0)
        if theirs.shape[::2] == own.shape[::2] and _is_square(theirs.shape[1] - num_prefix):
            size: Any = parent.get_submodule("patch_embed").grid_size
            return resample_abs_pos_embed(theirs.float(), list(size), num_prefix_tokens=num_prefix)
    is_patches = isinstance(parent, nn.Conv2d) and parent.kernel_size == parent.stride
    if is_patches and theirs.ndim == 4 and theirs.shape[:2] == own.shape[:2]:
        return resample_patch_embed(theirs.float(), list(own.shape[2:]))
    return theirs


def _is_square(number: int) -> bool:
    return number > 0 and round(number**0.5) ** 2 == number


def _fresh_patterns(wrong: Sequence[str], fitting: Iterable[str]) -> list[str]:
    """Return patterns of the wrong tensors alone, by modules if possible."""

    def numbered(name: str) -> list[str]:
        return re.sub(r"\.\d+(?=\.)", ".#", name).split(".")

    kept = {tuple(numbered(name)[:depth]) for name in fitting for depth in range(1, name.count(".") + 2)}
    patterns = []
    for name in wrong:
        parts = numbered(name)
        depth = next((depth for depth in range(1, len(parts) + 1) if tuple(parts[:depth]) not in kept), None)
        pattern = r"\.".join(parts[:depth]).replace("#", r"\d+") if depth else re.escape(name)
        patterns.append(pattern + (r"\..*" if depth and depth < len(parts) else ""))
    return list(dict.fromkeys(patterns))


def _some(names: Iterable[str]) -> str:
    chosen = list(names)
    return ", ".join(chosen[:: max(1, len(chosen) // 4)][:4])
