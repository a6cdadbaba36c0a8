"""Optimizer and learning-rate schedule. Progress is counted in samples seen, so batch sizes compare fairly."""

from __future__ import annotations

import math

import torch
from torch import nn

from workers.config import OptimConfig


def learning_rate(optim: OptimConfig, samples_seen: int, num_samples: int) -> float:
    """The rate of the step that begins after `samples_seen` samples of a run of `num_samples`.

    Warm-up is linear from the first step on; the cosine ends at zero with the run (SGDR, arXiv 1608.03983, one
    cycle).
    """
    if samples_seen < optim.num_warmup_samples:
        return optim.lr * (samples_seen + 1) / (optim.num_warmup_samples + 1)
    if optim.schedule == "constant":
        return optim.lr
    decay = (samples_seen - optim.num_warmup_samples) / max(1, num_samples - optim.num_warmup_samples)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, decay)))


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only: never on biases, norms, `logit_scale` and `logit_bias`."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for _, parameter in named if parameter.ndim >= 2]
    plain = [parameter for _, parameter in named if parameter.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
