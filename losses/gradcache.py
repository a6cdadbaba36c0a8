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

from sigray.losses.spans import span


def cached_backward(
    encode: Callable[[slice], tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
    *,
    num_rows: int,
    micro_batch_size: int,
    encode_again: Callable[[slice], tuple[Tensor | None, ...]] | None = None,
    settle: Callable[[], None] | None = None,
) -> Tensor:
    """Add the gradients of a loss over all rows of a batch to the parameters that `encode` and `loss` use.

    With one micro-batch nothing is computed twice.

    Args:
        encode: features of some rows, each kind (..., rows, D). Must return the same when called again, so it sets the
            random state (dropout, patch dropout) and enters autocast itself. Layers that count their calls, such as
            batch norm's running statistics, see every row twice.
        loss: scalar of the features of all rows, each kind (..., num_rows, D), micro-batches one after another.
        num_rows: of the batch on this rank.
        micro_batch_size: rows that are encoded at once; the last ones may be fewer.
        encode_again: as `encode`, for the second time: None in the place of features that no parameter waits for, such
            as those of a locked tower. By default `encode`.
        settle: for devices that record operations and run them later: called behind each micro-batch and behind the
            loss, so that every micro-batch is the same program.

    Returns:
        The loss, without a graph.
    """
    if micro_batch_size >= num_rows:
        value = loss(*encode(slice(0, num_rows)))
        with span("backward"):
            value.backward()
        return value.detach()
    micro_batches = [
        slice(start, min(start + micro_batch_size, num_rows)) for start in range(0, num_rows, micro_batch_size)
    ]
    with torch.no_grad():
        features, sizes = _all_features(encode, micro_batches, num_rows, settle)
    value = loss(*(whole.requires_grad_() for whole in features))
    with span("backward"):
        value.backward()
    value = value.detach()  # its graph would hold the features
    gradients = [whole.grad for whole in features]
    assert all(gradient is not None for gradient in gradients), "the loss does not depend on all features"
    kinds = [gradient.split(sizes, dim=-2) for gradient in gradients if gradient is not None]
    del features
    if settle is not None:
        settle()
    for rows, parts in zip(micro_batches, zip(*kinds, strict=True), strict=True):
        again: tuple[Tensor | None, ...] = (encode_again or encode)(rows)
        taught = [(kind, part) for kind, part in zip(again, parts, strict=True) if kind is not None]
        with span("backward"):
            torch.autograd.backward([kind for kind, _ in taught], [part for _, part in taught])
        del again, taught
        if settle is not None:
            settle()
    return value


def _all_features(
    encode: Callable[[slice], tuple[Tensor, ...]],
    micro_batches: list[slice],
    num_rows: int,
    settle: Callable[[], None] | None,
) -> tuple[list[Tensor], list[int]]:
    """Each kind's features, and how many rows of them each micro-batch has."""
    if settle is not None:
        embedded = []
        for rows in micro_batches:
            embedded.append(encode(rows))
            settle()
        # Together here: a write into its own place would make every micro-batch another program.
        together = [torch.cat(kind, dim=-2) for kind in zip(*embedded, strict=True)]
        return together, [parts[0].shape[-2] for parts in embedded]
    features: list[Tensor] = []
    for rows in micro_batches:
        parts = encode(rows)
        # Straight into their place: small blocks kept between large freed ones would make the heap grow.
        features = features or [part.new_empty(num_rows, *part.shape[1:]) for part in parts]
        for whole, part in zip(features, parts, strict=True):
            whole[rows] = part
    return features, [rows.stop - rows.start for rows in micro_batches]
