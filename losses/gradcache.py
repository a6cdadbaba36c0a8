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
    encode: Callable[[int], tuple[Tensor, ...]], num_micro_batches: int, loss: Callable[..., Tensor]
) -> Tensor:
    """Add the gradients of a loss over all micro-batches to the parameters that `encode` and `loss` use.

    With one micro-batch nothing is computed twice.

    Args:
        encode: features of micro-batch i, each (rows, D). Must return the same when called again, so it sets the
            random state (dropout, patch dropout) and enters autocast itself. Layers that count their calls, such as
            batch norm's running statistics, see every micro-batch twice.
        num_micro_batches: at least 1.
        loss: scalar of the features of all micro-batches, each kind concatenated to (B, D).

    Returns:
        The loss, without a graph.
    """
    if num_micro_batches == 1:
        value = loss(*encode(0))
        value.backward()
        return value.detach()
    with torch.no_grad():
        micro_batches = [encode(number) for number in range(num_micro_batches)]
    features = [torch.cat(parts).requires_grad_() for parts in zip(*micro_batches, strict=True)]
    num_rows = [len(parts[0]) for parts in micro_batches]
    del micro_batches
    value = loss(*features)
    value.backward()
    gradients = [tensor.grad.split(num_rows) for tensor in features if tensor.grad is not None]
    assert len(gradients) == len(features), "the loss does not depend on all features"
    for number in range(num_micro_batches):
        torch.autograd.backward(encode(number), [parts[number] for parts in gradients])
    return value.detach()
