"""Optimizer and learning-rate schedule.

The schedule counts samples seen, so runs with different batch sizes compare fairly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from sigray.workers.checkpoint.writer import EMA
from sigray.workers.config import OptimConfig, ParameterGroup


def learning_rate(optim: OptimConfig, samples_seen: float, num_samples: float) -> float:
    """Learning rate of the step that begins after `samples_seen` samples.

    Both numbers are places of the schedule (`phases.Schedule`): in a run without phases, samples of the run.

    Warm-up is linear from the first step on. The cosine ends at zero after `num_samples` (SGDR, arXiv 1608.03983,
    one cycle). rsqrt and the cooldown are those of big_vision's `create_learning_rate_schedule`.
    """
    if samples_seen < optim.num_warmup_samples:
        return optim.lr * (samples_seen + 1) / (optim.num_warmup_samples + 1)
    since_warmup = samples_seen - optim.num_warmup_samples
    lr = optim.lr
    if optim.num_timescale_samples is not None:
        lr /= math.sqrt(1 + since_warmup / optim.num_timescale_samples)
    elif optim.schedule == "cosine":
        decay = since_warmup / max(1, num_samples - optim.num_warmup_samples)
        lr *= 0.5 * (1 + math.cos(math.pi * min(1.0, decay)))
    if optim.num_cooldown_samples:
        lr *= max(0.0, min(1.0, (num_samples - samples_seen) / optim.num_cooldown_samples))
    return lr


@torch.no_grad()
def update_ema(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Move the exponential moving average of each trained parameter.

    average = decay average + (1 - decay) parameter. The averages lie in the optimizer's state under `EMA`, so what
    saves, loads, moves or splits the state does so with them. The first call sets them to the parameters. To be called
    after a step of the optimizer: torch's optimizers take a parameter that has a state for one that has all of theirs.
    """
    for parameter, state in optimizer.state.items():
        if EMA in state:
            state[EMA].lerp_(parameter, 1 - decay)
        else:
            state[EMA] = parameter.detach().clone()


def decayed_names(model: nn.Module, choice: str) -> set[str]:
    """Names of the parameters to which weight decay applies.

    Args:
        choice: `optim.weight_decay_on`.
    """
    names = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    if choice == "kernels":
        # big_vision's `.*/kernel$`. Its `head/kernel` may be a bare parameter here, CLIP's `proj` or `text_projection`.
        return {
            name
            for name in names
            if name.endswith(("weight", "proj", "projection"))
            and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
        }
    if choice == "timm":
        # Of each part: open_clip's model does not ask a timm tower that it wraps.
        spared = [
            f"{path}.{pattern}" if path else pattern
            for path, part in model.named_modules()
            if hasattr(part, "no_weight_decay")
            for pattern in part.no_weight_decay()
        ]
        return {name for name in names if not any(fnmatchcase(name, pattern) for pattern in spared)}
    return names


def parameter_groups(
    model: nn.Module, optim: OptimConfig, layer_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters, as torch's optimizers take them.

    Weight decay applies to `decayed_names`. An entry of `optim.groups`, or a layer's scale, adds `lr_scale` to torch's
    own keys.

    Args:
        layer_scales: factors on the learning rate by parameter name, from `towers.layer_scales`.

    Raises:
        ValueError: if an entry of optim.groups is the first match of no trainable parameter.
    """
    # Scalars get their own group: they are never split, and split weights are another type of tensor.
    decayed, plain, scalars = range(3)
    by_kind: dict[tuple[int, float, int], list[nn.Parameter]] = {}  # (entry of optim.groups or -1, scale, kind)
    patterns = [re.compile(group.match) for group in optim.groups]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    decaying = decayed_names(model, optim.weight_decay_on)
    for name in names:
        parameter = model.get_parameter(name)
        entry = next((number for number, pattern in enumerate(patterns) if pattern.fullmatch(name)), -1)
        kind = decayed if name in decaying else plain if parameter.ndim else scalars
        by_kind.setdefault((entry, (layer_scales or {}).get(name, 1.0), kind), []).append(parameter)
    for number, group in enumerate(optim.groups):
        if not any(entry == number for entry, *_ in by_kind):
            shown = ", ".join(names[:: max(1, len(names) // 8)])
            raise ValueError(
                f"optim.groups[{number}].match={group.match!r} is the first match of no parameter that trains; their "
                f"names are such as {shown}"
            )
    groups = []
    for (entry, scale, kind), parameters in sorted(by_kind.items(), key=lambda item: item[0]):
        own = ParameterGroup(match="") if entry < 0 else optim.groups[entry]
        decay = optim.weight_decay if own.weight_decay is None else own.weight_decay
        settings = {} if entry < 0 and scale == 1 else {"lr_scale": own.lr_scale * scale}
        groups.append({"params": parameters, "weight_decay": decay if kind == decayed else 0.0, **settings})
    return groups


def build_optimizer(
    model: nn.Module, optim: OptimConfig, options: dict[str, Any], layer_scales: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """AdamW, Lion or Adafactor over the trainable parameters.

    Arguments and errors as `parameter_groups`.

    Args:
        options: implementation of AdamW, see `Device.optimizer_options`.
    """
    groups = parameter_groups(model, optim, layer_scales)
    betas = (optim.beta1, optim.beta2)
    if optim.name == "lion":
        from timm.optim import Lion

        return Lion(groups, lr=optim.lr, betas=betas)
    if optim.name == "adafactor":
        from timm.optim import AdafactorBigVision

        # big_vision's defaults (optax.py, scale_by_adafactor), except the cap of beta2, which is the config's. Weight
        # decay is times the whole learning rate, as AdamW's here; big_vision's is times the schedule alone.
        return AdafactorBigVision(
            groups, lr=optim.lr, momentum=optim.beta1, beta2_cap=optim.beta2, decay_rate=0.8, min_dim_size_to_factor=32,
            momentum_dtype=torch.bfloat16, clipping_threshold=None, unscaled_wd=False,
        )  # fmt: skip
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, **options)
