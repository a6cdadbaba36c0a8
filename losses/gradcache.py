"""A loss over all micro-batches of a step at once, in the memory of one (GradCache, arXiv 2101.06983).

Features are small and activations large. So every micro-batch is first embedded without a graph, the loss is taken on
all features together, and then each micro-batch is embedded again, with a graph, to push its features' gradients
through the towers. Unlike accumulating the losses of micro-batches, this sees every pair of the batch, and parameters
that only the loss reads (`logit_scale`, `logit_bias`) receive their gradient once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def cached_backward(
    encode: Callable[[slice], tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
    *,
    num_rows: int,
    micro_batch_size: int,
) -> Tensor:
    """Add the gradients of a loss over all rows of a batch to the parameters that `encode` and `loss` use.

    With one micro-batch nothing is computed twice.

    Args:
        encode: features of some rows, each kind (rows, D). Must return the same when called again, so it sets the
            random state (dropout, patch dropout) and enters autocast itself. Layers that count their calls, such as
            batch norm's running statistics, see every row twice.
        loss: scalar of the features of all rows, each kind (num_rows, D).
        num_rows: of the batch on this rank.
        micro_batch_size: rows that are encoded at once; the last ones may be fewer.

    Returns:
        The loss, without a graph.
    """
    if micro_batch_size >= num_rows:
        value = loss(*encode(slice(0, num_rows)))
        value.backward()
        return value.detach()
    micro_batches = [
        slice(start, min(start + micro_batch_size, num_rows)) for start in range(0, num_rows, micro_batch_size)
    ]
    features: list[Tensor] = []
    with torch.no_grad():
        for rows in micro_batches:
            parts = encode(rows)
            # Straight into their place: small blocks kept between large freed ones would make the heap grow.
            features = features or [part.new_empty(num_rows, *part.shape[1:]) for part in parts]
            for whole, part in zip(features, parts, strict=True):
                whole[rows] = part
    del parts, part
    value = loss(*(whole.requires_grad_() for whole in features))
    value.backward()
    gradients = [whole.grad for whole in features]
    assert all(gradient is not None for gradient in gradients), "the loss does not depend on all features"
    del features
    for rows in micro_batches:
        torch.autograd.backward(encode(rows), [gradient[rows] for gradient in gradients if gradient is not None])
    return value.detach()
