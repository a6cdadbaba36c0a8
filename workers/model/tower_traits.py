"""Names what changes a tower's features without changing a tensor.

Activation, norm epsilon, pooling and causal mask.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def activation_of(module: nn.Module) -> str | None:
    """Return transformers' name of an activation; None for another module."""
    kind = type(module).__name__  # timm and open_clip have classes of their own
    if kind == "GELU":
        return "gelu" if getattr(module, "approximate", "none") == "none" else "gelu_pytorch_tanh"
    return {"GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}.get(kind)


def tower_traits(tower: nn.Module) -> dict[str, str]:
    """Return the traits of a tower, by words for a message."""
    modules = list(tower.modules())
    acts = sorted({name for module in modules if (name := activation_of(module))})
    epsilons = sorted({float(module.eps) for module in modules if isinstance(module, nn.LayerNorm)})
    inner: Any = getattr(tower, "trunk", tower)
    pooling = getattr(inner, "global_pool", None) or getattr(inner, "pool_type", None)
    return {
        "activation": ", ".join(acts),
        "norm epsilon": ", ".join(f"{epsilon:g}" for epsilon in epsilons),
        "pooling": str(pooling or ""),
        "causal mask": "none" if getattr(tower, "attn_mask", None) is None else "one",
    }
