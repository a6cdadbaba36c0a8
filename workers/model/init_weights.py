"""Initial weights (`model.init_from`): which tensors of a file the model takes.

Every tensor of the model and of the file is accounted for: matched, resized, fresh, unused, or of another shape.
Another shape is an error with two exceptions. Positional embeddings are resized as in open_clip (`resize_pos_embed`
and `resize_text_pos_embed`), and `model.init_fresh` asks for fresh weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import Tensor, nn

from sigray.workers.checkpoint.index import CheckpointInfo
from sigray.workers.checkpoint.writer import load_weights
from sigray.workers.config import ModelConfig
from sigray.workers.model.towers import TOWERS, build_bare_model, build_meta_model, build_model
from sigray.workers.model.transformers_names import from_transformers
from sigray.workers.model.untrusted import read_tensors
from sigray.workers.model.weights_source import WeightsSource, find_weights
from sigray.workers.sharding import shard_like
from sigray.workers.storage import Storage
from sigray.workers.texts import first_ten, ten_lines

_POSITIONS = ("visual.positional_embedding", "text.positional_embedding")


@dataclass
class InitialWeights:
    """Result for each tensor; names are those of the model."""

    path: str
    matched: list[str] = field(default_factory=list)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Positional embeddings: shape in the file, shape in the model."""
    asked_fresh: list[str] = field(default_factory=list)  # because of model.init_fresh
    missing: list[str] = field(default_factory=list)  # fresh because the file lacks them
    unused: list[str] = field(default_factory=list)  # in the file, not in the model
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Shape in the file, shape in the model."""

    def text(self) -> str:
        """One line for each non-empty kind."""
        total = len(self.matched) + len(self.resized) + len(self.asked_fresh) + len(self.missing)
        lines = [f"weights from {self.path}: {len(self.matched)} of {total} tensors match"]
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
    """As `load_initial_weights`, without memory for the model."""
    return _match(build_meta_model(model), model)[0]


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
    found, tensors = _match(module, model)
    own = module.state_dict()
    module.load_state_dict({name: shard_like(tensor, own[name]) for name, tensor in tensors.items()}, strict=False)
    return found


def build_trained_model(storage: Storage, info: CheckpointInfo, model: ModelConfig) -> nn.Module:
    """The whole model of a checkpoint.

    If the run read embeddings from a store, its checkpoints lack the locked image tower. The tower then comes from
    model.image_tower or model.init_from, as it did for the store.

    Raises:
        DamagedCheckpoint, CheckpointError: as `load_weights`.
        ValueError: if model.image_tower or model.init_from is needed and missing.
    """
    module = build_bare_model(model)
    is_initial = model.init_from is not None
    load_weights(storage, info, module, lambda: load_initial_weights(module, model) if is_initial else None)
    return module


def _match(module: nn.Module, model: ModelConfig) -> tuple[InitialWeights, dict[str, Tensor]]:
    assert model.init_from is not None
    state = _read(find_weights(model.init_from))
    found = InitialWeights(model.init_from)
    own = module.state_dict()
    fresh = [re.compile(pattern) for pattern in model.init_fresh]
    for name in [name for name in own if any(pattern.fullmatch(name) for pattern in fresh)]:
        found.asked_fresh.append(name)
        state.pop(name, None)
    unmatched = [p.pattern for p in fresh if not any(p.fullmatch(name) for name in own)]
    if unmatched:
        raise ValueError(
            f"model.init_fresh={unmatched[0]!r} matches no parameter; their names are such as {_some(own)}"
        )
    _resize_positions(state, module, found)
    taken: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if name in found.asked_fresh:
            continue
        theirs = state.get(name)
        if theirs is None:
            found.missing.append(name)
            continue
        if theirs.numel() == tensor.numel() == 1:  # logit_scale and logit_bias are () here, (1,) in some checkpoints
            theirs = theirs.reshape(tensor.shape)
        if theirs.shape != tensor.shape:
            found.other_shape[name] = tuple(theirs.shape), tuple(tensor.shape)
            continue
        taken[name] = theirs
        if name not in found.resized:
            found.matched.append(name)
    found.unused = [name for name in state if name not in own]
    if found.other_shape:
        lines = [f"{name}: {list(old)} in the file, {list(new)} here" for name, (old, new) in found.other_shape.items()]
        parts = sorted({name.partition(".")[0] for name in found.other_shape})
        shown = "', '".join(rf"{part}\..*" if part in TOWERS else part for part in parts)
        raise ValueError(
            f"model.init_from={model.init_from}: {len(lines)} tensors have another shape:\n  {ten_lines(lines)}\n"
            f"Take towers of the checkpoint's shape, or start with fresh weights: model.init_fresh=['{shown}']"
        )
    if not any(name.startswith(("visual.", "text.")) for name in taken):
        raise ValueError(
            f"model.init_from={model.init_from}: none of its {len(state)} tensors is one of the model's: "
            f"{_some(state) or 'nothing'} there, {_some(own)} here"
        )
    return found, taken


def _read(source: WeightsSource) -> dict[str, Tensor]:
    """Tensors by CustomTextCLIP's names."""
    from open_clip.model import convert_to_custom_text_state_dict

    state: dict[str, Tensor] = {}
    for file in source.files:
        try:
            content = read_tensors(str(file))
        except ValueError as error:
            raise ValueError(f"model.init_from: {error}") from error
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):  # of open_clip's own training
            content = content["state_dict"]
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
        ):
            raise ValueError(f"model.init_from: {file} holds no mapping of names to tensors")
        state |= {name.removeprefix("module."): tensor for name, tensor in content.items()}
    if any(name.startswith(("vision_model.", "text_model.")) for name in state):
        return from_transformers(state)
    if "positional_embedding" in state:  # open_clip's CLIP class has the text tower's parts at the top
        state = dict(convert_to_custom_text_state_dict(state))
    state.pop("text.transformer.embeddings.position_ids", None)  # a buffer of older transformers
    return state


def _resize_positions(state: dict[str, Tensor], module: nn.Module, found: InitialWeights) -> None:
    """Resize positional embeddings to the model's length, if their width allows it."""
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    own = module.state_dict()
    for name, resize in zip(_POSITIONS, (resize_pos_embed, resize_text_pos_embed), strict=True):
        if name not in state or name not in own or state[name].shape == own[name].shape:
            continue
        old = tuple(state[name].shape)
        is_square = name.startswith("text") or round((old[0] - 1) ** 0.5) ** 2 == old[0] - 1
        if old[1:] == tuple(own[name].shape[1:]) and is_square:
            resize(state, module)
            found.resized[name] = old, tuple(own[name].shape)


def _some(names: dict[str, Tensor]) -> str:
    chosen = list(names)
    return ", ".join(chosen[:: max(1, len(chosen) // 4)][:4])
