"""Formulas for the memory and the traffic of the losses, which loop over tiles.

    b  pairs on one device       D  embedding dimension      R  devices      f  bytes of a feature's number
    p  bytes of a number in the products                     e  edge of a tile of logits

tests/orchestrator/planning/test_plan.py compares them with real losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sigray.losses.distillation import DistillationResult, Teacher
from sigray.losses.negatives import NUM_BINS
from sigray.losses.sigmoid import OnePass
from sigray.losses.tiles import default_tile_size, has_bfloat16_products, positions_per_tile
from sigray.losses.tokens import TokenResult
from sigray.orchestrator.device_kinds import CPU
from sigray.workers.config import LossConfig, Precision

_FLOAT32 = 4


class HasFlops(Protocol):
    """Counts floating-point operations."""

    flops: float


def loop_edge(accelerator: str) -> int:
    """Return the edge of a tile of logits, unless a config gives it."""
    return default_tile_size(torch.device(accelerator if accelerator == "cuda" else CPU))


def product_bytes(precision: Precision, accelerator: str) -> int:
    """Return the bytes of a number in the loss's products (`product_dtype`)."""
    has_bf16 = precision == "bf16" and (accelerator != CPU or has_bfloat16_products(torch.device(CPU)))
    return 2 if has_bf16 else _FLOAT32


def loss_bytes(
    loss: LossConfig, num_pairs: int, dim: int, num_devices: int, feature_bytes: int, product_bytes: int, tile_size: int
) -> int:
    """Return the peak memory of the loss beyond the features: sums, a tile, the ring.

    Args:
        num_pairs: b.
        feature_bytes: f.
        product_bytes: of a number in the products.
        tile_size: edge of a tile.
    """
    rows = num_pairs * dim
    edge = min(tile_size, num_pairs)
    tile = edge * edge * product_bytes
    if product_bytes != feature_bytes:  # rows and columns of the tile, converted
        tile += 2 * edge * dim * product_bytes
    # In units of b D: texts that arrive while others are used; sums of their gradients, one hop later.
    texts, sums = {1: (0, 0), 2: (1, 3)}.get(num_devices, (2, 5))
    counting = 0
    if loss.negatives != "all" and loss.negatives_fraction < 1:
        if loss.negatives in ("hardest", "easiest"):  # before the loss: a tile's numbers as keys, and two histograms
            counting = rows * texts * feature_bytes + tile + 16 * edge * edge + 2 * NUM_BINS * 8
        tile += (12 if loss.negatives == "random" else 5) * edge * edge  # which of a tile count
    if product_bytes != _FLOAT32:  # a product, before it is added to the float32 sums
        tile += edge * dim * product_bytes
    if loss.name == "softmax":  # cosines if they are not float32 yet, and four steps from them to dL/dz
        tile += (4 + (product_bytes != _FLOAT32)) * edge * edge * _FLOAT32
    gradients = 2 * rows * _FLOAT32 + 3 * num_pairs * _FLOAT32  # of images and texts; sums of rows
    ring = rows * (texts * feature_bytes + sums * _FLOAT32)
    converted = 2 * rows * feature_bytes if feature_bytes != _FLOAT32 else 0  # the gradients that the loss returns
    return max(counting, gradients + max(ring + tile, converted))


def wire_bytes(
    loss: LossConfig, num_pairs: int, dim: int, num_devices: int, feature_bytes: int, gradient_bytes: int
) -> dict[str, int]:
    """Return the bytes that one device sends in a step (docs/numerics.md).

    Args:
        num_pairs: b.
        feature_bytes: f.
        gradient_bytes: of the gradients of all weights, which a ring reduces in two rounds of parts.
    """
    hops = num_devices - 1
    rows = num_pairs * dim
    features = hops * rows * feature_bytes
    sums = hops * rows * _FLOAT32
    if loss.name == "softmax":  # a first round for the normalisers, which return and then go to all devices
        features *= 2
        sums += 2 * hops * num_pairs * _FLOAT32
    elif loss.negatives in ("hardest", "easiest") and loss.negatives_fraction < 1:  # two rounds that count
        features *= 3
    return {
        "features of texts": features,
        "gradients of texts": sums,
        "gradients of weights": 2 * hops * gradient_bytes // num_devices,
    }


@dataclass(frozen=True)
class LogitLoops:
    """What stands in a plan for the losses that loop over chunks of logits.

    Each adds what the loop takes to a counter, and returns a loss with gradients of the right sizes.

    Attributes:
        product_bytes: p.
        edge: e.
    """

    product_bytes: int
    edge: int

    def token_loss(
        self, counter: HasFlops, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, _weights: Tensor
    ) -> Tensor:
        """Stand for `losses.token_loss`."""

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor) -> TokenResult:
            found = TokenResult(
                _sum(), *(torch.empty_like(each, dtype=torch.float32) for each in (hidden, weight, bias))
            )
            rows, positions, width = hidden.shape
            self._hold(token_loss_bytes(rows, positions, width, len(weight), self.product_bytes, self.edge))
            return found

        counter.flops += 6 * targets.numel() * weight.numel()
        return OnePass.apply(compute, hidden, weight, bias)

    def distillation_loss(
        self, counter: HasFlops, student: Tensor, table: Tensor, teacher: Teacher, _temperature: float
    ) -> Tensor:
        """Stand for `losses.distillation_loss`."""
        is_shared = teacher.states.shape[1] == 1

        def compute(student: Tensor, table: Tensor) -> DistillationResult:
            found = DistillationResult(
                _sum(), *(torch.empty_like(each, dtype=torch.float32) for each in (student, table))
            )
            images, each, width = student.shape
            sizes = images, each, width, len(table)
            self._hold(distillation_loss_bytes(*sizes, self.product_bytes, self.edge, is_shared=is_shared))
            return found

        counter.flops += 2 * table.numel() * (3 * student[..., 0].numel() + teacher.states[..., 0].numel())
        return OnePass.apply(compute, student, table)

    @staticmethod
    def _hold(num_bytes: int) -> None:
        torch.empty(num_bytes, dtype=torch.uint8)


def _sum() -> Tensor:
    return torch.empty(())


def token_loss_bytes(rows: int, positions: int, width: int, vocab_size: int, product_bytes: int, edge: int) -> int:
    """Return the peak memory of `token_loss`, inputs and gradients apart.

    Args:
        rows, positions: G and N of losses/tokens.py; and so on.
    """
    chunk = rows * min(positions, positions_per_tile(edge, rows, vocab_size))
    narrow = product_bytes if product_bytes != _FLOAT32 else 0
    table = width * vocab_size * narrow
    logits = chunk * vocab_size * (_FLOAT32 + narrow)  # a product and its sum; later dL/dlogits and the same, rounded
    last = max(chunk * width * (_FLOAT32 + narrow), table)  # gradients of the chunk; of the table, before they add up
    return table + max(logits + last, rows * positions * width * _FLOAT32)  # or all parts of a gradient, put together


def distillation_loss_bytes(
    images: int, each: int, width: int, prototypes: int, product_bytes: int, edge: int, *, is_shared: bool
) -> int:
    """Return the peak memory of `distillation_loss`, inputs and gradients apart.

    Args:
        images, each: G and N of losses/distillation.py; and so on.
        is_shared: whether all N of an image have one target.
    """
    columns = min(each, positions_per_tile(edge, images, prototypes))
    chunk = images * columns
    narrow = product_bytes if product_bytes != _FLOAT32 else 0
    row = prototypes * _FLOAT32
    targets = images * row if is_shared else 0
    own = 0 if is_shared and columns == 1 else chunk * row  # else a view of the targets
    last = max(chunk * width * (_FLOAT32 + narrow), width * prototypes * narrow)
    # Logits, and their products with the targets, or their slopes as products take them.
    logits = chunk * row + max(chunk * row, chunk * prototypes * narrow + last)
    return targets + max(own + logits, images * each * width * _FLOAT32, targets)
