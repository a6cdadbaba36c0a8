"""A loss over all micro-batches of a step at once (GradCache, arXiv 2101.06983).

It takes the memory of one micro-batch: features are small and activations large. First every micro-batch is encoded
without a graph. Then the loss is computed on all features together. Then each micro-batch is encoded again with a
graph, which carries its features' gradients back through the towers. The loss sees every pair of the batch, which a sum
of the losses of micro-batches does not. Parameters of the loss (`logit_scale`, `logit_bias`) get their gradient once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sigray.losses.spans import span
from sigray.losses.tiles import ranges


def cached_backward(
    encode: Callable[[slice], tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
    *,
    num_rows: int,
    micro_batch_size: int,
    encode_again: Callable[[slice], tuple[Tensor | None, ...]] | None = None,
    row_loss: Callable[[slice], Tensor] | None = None,
    sync: Callable[[], None] | None = None,
) -> Tensor:
    """Add the gradients of a loss over all rows of a batch to the parameters.

    With one micro-batch nothing is computed twice.

    Args:
        encode: features of some rows, each kind (..., rows, D). It must return the same when called again, so it sets
            the random state (dropout, patch dropout) and enters autocast itself. Layers that count their calls, such as
            batch norm's running statistics, see every row twice.
        loss: scalar of the features of all rows, each kind (..., num_rows, D), one micro-batch after another.
        num_rows: of the batch on this rank.
        micro_batch_size: rows that are encoded at once; the last micro-batch may have fewer.
        encode_again: as `encode`, for the second time: None instead of features that no parameter needs, such as those
            of a locked tower. By default `encode`.
        row_loss: a scalar to add, which is a sum over rows, so that no cache is needed: that of some rows. It is called
            once for each micro-batch, after the pass with a graph, and may use what that pass left.
        sync: for devices that record operations and run them later: called after each micro-batch and after the loss,
            so that every micro-batch is the same program.

    Returns:
        The loss, without a graph.
    """
    if micro_batch_size >= num_rows:
        rows = slice(0, num_rows)
        value = loss(*encode(rows))
        if row_loss is not None:
            value = value + row_loss(rows)
        with span("backward"):
            value.backward()
        return value.detach()
    micro_batches = list(ranges(num_rows, micro_batch_size))
    with torch.no_grad():
        features = _all_features(encode, micro_batches, sync)
    size = features[0].shape[-2] * micro_batch_size // num_rows  # under XLA a device's part of the rows
    value = loss(*(whole.requires_grad_() for whole in features))
    with span("backward"):
        value.backward()
    value = value.detach()  # its graph would hold the features
    kinds = [whole.grad.split(size, dim=-2) for whole in features if whole.grad is not None]
    assert len(kinds) == len(features), "the loss does not depend on all features"
    del features
    if sync is not None:
        sync()
    for rows, parts in zip(micro_batches, zip(*kinds, strict=True), strict=True):
        again: tuple[Tensor | None, ...] = (encode_again or encode)(rows)
        trained = [kind for kind in again if kind is not None]
        gradients = [part for kind, part in zip(again, parts, strict=True) if kind is not None]
        if row_loss is not None:
            own = row_loss(rows)
            trained.append(own)
            gradients.append(torch.ones_like(own))
            value = value + own.detach()
            del own
        with span("backward"):
            torch.autograd.backward(trained, gradients)
        del again, trained
        if sync is not None:
            sync()
    return value


def _all_features(
    encode: Callable[[slice], tuple[Tensor, ...]], micro_batches: list[slice], sync: Callable[[], None] | None
) -> list[Tensor]:
    """The features of each kind."""
    if sync is not None:
        encoded = []
        for rows in micro_batches:
            encoded.append(encode(rows))
            sync()
        # Concatenated here: writes at different offsets would make every micro-batch another program.
        return [torch.cat(kind, dim=-2) for kind in zip(*encoded, strict=True)]
    features: list[Tensor] = []
    for rows in micro_batches:
        parts = encode(rows)
        # Written in place: small tensors kept between large freed ones would make the heap grow.
        features = features or [part.new_empty(micro_batches[-1].stop, *part.shape[1:]) for part in parts]
        for whole, part in zip(features, parts, strict=True):
            whole[rows] = part
    return features
