"""Mean logits of the pairs and of the negatives of a global batch, without a logit of its own.

    B  pairs in the global batch              D  embedding dimension              z_ij  logit_scale * x_ij + logit_bias

The mean of all B * B cosines x_ij is <sum_i image_i, sum_j text_j> / B^2, and the pairs' are row-wise products: O(B D),
from means that each rank takes of its own rows. They cost nothing beside the loss, so they belong to every step's
program; only who wants the two numbers reads them, and sums 2 D + 1 numbers over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sigray.losses.tiles import sum_dtype


def feature_means(image_features: Tensor, text_features: Tensor) -> Tensor:
    """What `mean_logits` needs of one rank's rows. Its mean over ranks with as many rows is that of all rows.

    Args:
        image_features: (..., D); under XLA the slices of several devices.
        text_features: (..., D); row i belongs to image i.

    Returns:
        (2 D + 1,) without a graph, in the dtype of the loss's sums: mean image, mean text, mean cosine of the pairs.
    """
    image, text = image_features.detach(), text_features.detach()
    sums, rows = sum_dtype(image), tuple(range(image.ndim - 1))
    cosines = (image.to(sums) * text.to(sums)).sum(dim=-1)
    return torch.cat([image.mean(rows, dtype=sums), text.mean(rows, dtype=sums), cosines.mean()[None]])


def mean_logits(
    means: Sequence[float], num_pairs: int, logit_scale: float, logit_bias: float
) -> tuple[float, float | None]:
    """Mean z over the B pairs, and over the B (B - 1) negatives; None where there are none.

    Args:
        means: 2 D + 1 numbers of `feature_means`, averaged over the ranks.
        num_pairs: B.
        logit_scale: already exponentiated.
        logit_bias: 0 for a loss without one.
    """
    dim = len(means) // 2
    images, texts, positive = means[:dim], means[dim:-1], means[-1]
    positive_mean = logit_scale * positive + logit_bias
    if num_pairs == 1:
        return positive_mean, None
    everything = sum(image * text for image, text in zip(images, texts, strict=True))
    return positive_mean, logit_scale * (num_pairs * everything - positive) / (num_pairs - 1) + logit_bias
