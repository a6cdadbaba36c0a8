"""Reads checkpoints of other programs by the names of `CustomTextCLIP`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from sigray.workers.checkpoint.index import EMA_FILE
from sigray.workers.model.big_vision_names import from_big_vision, is_big_vision
from sigray.workers.model.transformers_names import from_transformers
from sigray.workers.model.untrusted import read_tensors
from sigray.workers.model.weights_source import WeightsSource
from sigray.workers.texts import first_ten

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys of a training program's file.
The first one counts: averaged weights go first, as in timm."""
_COMPILED = "_orig_mod."  # torch.compile's
_TOWERS = ("visual.trunk.", "visual.")  # a tower alone is the trunk of a timm model, or model.image_tower
_OPENAI = ("input_resolution", "context_length", "vocab_size")  # numbers that its files have as tensors


@dataclass(frozen=True)
class Weights:
    """Tensors by our names.

    Attributes:
        origin: format, and which part of the file was taken; for a message.
    """

    tensors: dict[str, Tensor]
    origin: str


def read_weights(source: WeightsSource, own: Iterable[str]) -> Weights:
    """Read the files of a source.

    Args:
        own: names of the model's tensors: they tell what a tower that stands alone is.

    Raises:
        ValueError: if a file cannot be read, or holds no tensors.
    """
    from open_clip.model import convert_to_custom_text_state_dict

    state: dict[str, Tensor] = {}
    notes: list[str] = []
    for file in source.files:
        if file.name == EMA_FILE:
            notes.append("the average of its weights")
        try:
            content = read_tensors(str(file))
        except ValueError as error:
            raise ValueError(f"model.init_from: {error}") from error
        content = _unwrap(content, notes)
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
        ):
            raise ValueError(f"model.init_from: {file} holds no mapping of names to tensors")
        state |= content
    if lacking := sorted(source.tensors - state.keys()):
        raise ValueError(
            f"model.init_from: the files of {source.place} lack {first_ten(lacking)}, which their index names"
        )
    state = _without_prefixes(state, notes)
    if is_big_vision(state):
        notes.insert(0, "big_vision")
        state = from_big_vision(state)
    if any(name.startswith(("vision_model.", "text_model.")) for name in state):
        notes = notes or ["transformers"]
        state = from_transformers(state)
    elif "positional_embedding" in state:  # open_clip's CLIP class has the text tower's parts at the top
        state = {name: tensor for name, tensor in state.items() if name not in _OPENAI}
        state = dict(convert_to_custom_text_state_dict(state))
    state.pop("text.transformer.embeddings.position_ids", None)  # a buffer of older transformers
    state = _as_tower(state, set(own), notes)
    return Weights(state, f" ({', '.join(notes)})" if notes else "")


def _unwrap(content: object, notes: list[str]) -> object:
    while isinstance(content, dict):
        found = [key for key in _WRAPPERS if isinstance(content.get(key), dict)]
        if not found:
            break
        left = f", not {' or '.join(found[1:])}" if found[1:] else ""
        notes.append(f"its {found[0]}{left}")
        content = content[found[0]]
    return content


def _without_prefixes(state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Return tensors without the prefixes of wrapping modules.

    If half of the names begin with `ema.`, the others are left out.
    """
    if any(_COMPILED in name for name in state):  # also before a block
        notes.append(f"names without {_COMPILED}")
        state = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items()}
    for prefix in ("ema.", "module.", "ema."):
        named = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
        if not named or 2 * len(named) < len(state):
            continue
        others = (
            "" if prefix == "module." or len(named) == len(state) else f", not the {len(state) - len(named)} others"
        )
        notes.append(f"names without {prefix}{others}")
        state = {name.removeprefix(prefix): tensor for name, tensor in (named if others else state).items()}
    return state


def _as_tower(state: dict[str, Tensor], own: set[str], notes: list[str]) -> dict[str, Tensor]:
    """Return the tensors of an image tower alone as a part of the model."""
    if own & state.keys():
        return state
    prefix = max(_TOWERS, key=lambda prefix: sum(prefix + name in own for name in state))
    if not any(prefix + name in own for name in state):
        return state
    notes.append(f"a tower alone, for {prefix.rstrip('.')}")
    return {prefix + name: tensor for name, tensor in state.items()}
