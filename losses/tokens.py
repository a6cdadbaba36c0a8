"""The loss of predicted tokens, in one pass over chunks of positions.

    G  rows of positions      N  positions of a row      W  width of the decoder      V  vocabulary

    z_gn  weight @ hidden_gn + bias, V logits        L  sum_gn position_weight_gn (logsumexp z_gn - z_gn[target_gn])

With a vocabulary of 256,000, the logits of one caption of 64 tokens take 64 MiB, and autograd would keep those of all
captions. The logits of a position give dL/dz at once. So this pass keeps the logits of one chunk, as
`losses/sigmoid.py` keeps a tile. It takes three matrix products, as autograd does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sigray.losses.sigmoid import OnePass
from sigray.losses.spans import span
from sigray.losses.tiles import accumulate, default_tile_size, positions_per_tile, product_dtype, ranges, sum_dtype


def token_loss_plain(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, position_weights: Tensor) -> Tensor:
    """The equation with all of its logits, for reading and for tests; as `token_loss`."""
    logits = hidden @ weight.T + bias
    terms = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), reduction="none")
    return (terms * position_weights.flatten()).sum()


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    position_weights: Tensor,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """The weighted sum of the cross entropies of all positions.

    It is differentiable once in the first three arguments.

    Args:
        hidden: (G, N, W), any floating dtype, which is that of the products.
        weight, bias: (V, W) and (V,).
        targets: (G, N) ints.
        position_weights: (G, N); 0 for a position without a target.
        chunk_size: positions of each row whose logits are held at once; None: as many as `default_tile_size` holds.
            XLA splits the rows over devices, so chunks cut the positions. It does not change the result.

    Returns:
        Scalar, float64 for float64 inputs, else float32.

    Raises:
        RuntimeError: as `sigmoid_loss`.
    """
    chunk_size = chunk_size or positions_per_tile(default_tile_size(hidden.device), hidden.shape[0], len(weight))

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor) -> TokenResult:
        with span("loss: tokens"):
            return _one_pass(hidden, weight, bias, targets, position_weights, chunk_size)

    return OnePass.apply(compute, hidden, weight, bias)


@dataclass
class TokenResult:
    """The loss of tokens, and its gradients."""

    loss: Tensor  # scalar
    grad_hidden: Tensor  # (G, N, W)
    grad_weight: Tensor  # (V, W)
    grad_bias: Tensor  # (V,)

    def gradients(self, grad_loss: Tensor) -> tuple[Tensor, ...]:
        """Gradients of hidden, weight and bias; to be taken once."""
        return self.grad_hidden.mul_(grad_loss), self.grad_weight.mul_(grad_loss), self.grad_bias.mul_(grad_loss)


def _one_pass(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, position_weights: Tensor, chunk_size: int
) -> TokenResult:
    sums, products = sum_dtype(hidden), product_dtype(hidden)
    table, bias = weight.to(products), bias.to(sums)
    grad_weight = torch.zeros_like(weight, dtype=sums)
    grad_bias = torch.zeros_like(bias)
    loss = bias.new_zeros(())
    parts = []

    def visit(columns: slice) -> Tensor:  # a function, so that a chunk is freed before the next
        states = hidden[:, columns].to(products)
        flat = states.flatten(0, 1)
        target = targets[:, columns].flatten().long()[:, None]
        share = position_weights[:, columns].flatten().to(sums)[:, None]
        logits = (flat @ table.T).to(sums).add_(bias)
        normaliser = logits.logsumexp(dim=1, keepdim=True)
        value = (share * (normaliser - logits.gather(1, target))).sum()
        slope = logits.sub_(normaliser).exp_().mul_(share).scatter_add_(1, target, -share)  # dL/dlogits
        grad_bias.add_(slope.sum(dim=0))
        slope = slope.to(products)
        parts.append((slope @ table).view_as(states).to(sums))
        accumulate(grad_weight, slope.T, flat)
        return value

    for columns in ranges(hidden.shape[1], chunk_size):
        loss = loss + visit(columns)
    grad_hidden = torch.cat(parts, dim=1) if parts else torch.zeros_like(hidden, dtype=sums)  # no position counts
    return TokenResult(loss, grad_hidden, grad_weight, grad_bias)
