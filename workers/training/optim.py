"""Optimizer and learning-rate schedule.

The schedule counts samples seen, so runs with different batch sizes compare fairly.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from sigray.workers.config import OptimConfig


def learning_rate(optim: OptimConfig, samples_seen: int, num_samples: int) -> float:
    """Learning rate of the step that begins after `samples_seen` samples.

    Warm-up is linear from the first step on. The cosine ends at zero after `num_samples` (SGDR, arXiv 1608.03983,
    one cycle).
    """
    if samples_seen < optim.num_warmup_samples:
        return optim.lr * (samples_seen + 1) / (optim.num_warmup_samples + 1)
    if optim.schedule == "constant":
        return optim.lr
    decay = (samples_seen - optim.num_warmup_samples) / max(1, num_samples - optim.num_warmup_samples)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, decay)))


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters, as torch's optimizers take them.

    Weight decay applies to matrices only: never to biases, norms, `logit_scale` and `logit_bias`. An entry of
    `optim.groups` adds its `lr_scale` to torch's own keys.

    Raises:
        ValueError: if an entry of optim.groups is the first match of no trainable parameter.
    """
    by_kind: dict[tuple[int | None, int], list[nn.Parameter]] = {}  # (entry of optim.groups or None, dimensions)
    patterns = [re.compile(group.match) for group in optim.groups]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name in names:
        parameter = model.get_parameter(name)
        entry = next((number for number, pattern in enumerate(patterns) if pattern.fullmatch(name)), None)
        by_kind.setdefault((entry, min(parameter.ndim, 2)), []).append(parameter)

    def groups_of(entry: int | None, decay: float, **settings: float) -> list[dict[str, Any]]:
        # Scalars get their own group: they are never split, and split weights are another type of tensor.
        return [
            {"params": parameters, "weight_decay": decay if dimensions == 2 else 0.0, **settings}
            for dimensions in (2, 1, 0)
            if (parameters := by_kind.get((entry, dimensions)))
        ]

    groups = groups_of(None, optim.weight_decay)
    for number, group in enumerate(optim.groups):
        decay = optim.weight_decay if group.weight_decay is None else group.weight_decay
        own = groups_of(number, decay, lr_scale=group.lr_scale)
        if not own:
            shown = ", ".join(names[:: max(1, len(names) // 8)])
            raise ValueError(
                f"optim.groups[{number}].match={group.match!r} is the first match of no parameter that trains; their "
                f"names are such as {shown}"
            )
        groups += own
    return groups


def build_optimizer(model: nn.Module, optim: OptimConfig, options: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW, Lion or Adafactor over the trainable parameters.

    Raises as `parameter_groups`.

    Args:
        options: implementation of AdamW, see `Device.optimizer_options`.
    """
    groups = parameter_groups(model, optim)
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
