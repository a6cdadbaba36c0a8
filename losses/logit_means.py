"""Mean logits of a global batch's pairs and negatives, from means of features.

    B  pairs in the global batch              D  embedding dimension              z_ij  logit_scale * x_ij + logit_bias

The mean of all B * B cosines x_ij is <sum_i image_i, sum_j text_j> / B^2. The pairs' cosines are row-wise products.
Both take O(B D), from means that each rank computes over its own rows. That is negligible beside the loss, so it is
part of every step's program. The 2 D + 1 numbers are summed over the ranks only when metrics are logged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sigray.losses.tiles import sum_dtype


def feature_means(image_features: Tensor, text_features: Tensor) -> Tensor:
    """The means over one rank's rows that `mean_logits` needs.

    If all ranks have the same number of rows, the mean over ranks is that over all rows.

    Args:
        image_features, text_features: (..., D), under XLA the slices of several devices; row i of both is a pair.

    Returns:
        (2 D + 1,) without a graph, in the dtype of the loss's sums: mean image, mean text, mean cosine of the pairs.
    """
    image, text = image_features.detach(), text_features.detach()
    sums = sum_dtype(image)
    rows = tuple(range(image.ndim - 1))
    cosines = (image.to(sums) * text.to(sums)).sum(dim=-1)
    return torch.cat([image.mean(rows, dtype=sums), text.mean(rows, dtype=sums), cosines.mean()[None]])


def mean_logits(
    means: Sequence[float], num_pairs: int, logit_scale: float, logit_bias: float
) -> tuple[float, float | None]:
    """Mean z over the B pairs, and over the B (B - 1) negatives (None for B = 1).

    Args:
        means: 2 D + 1 numbers of `feature_means`, averaged over the ranks.
        num_pairs: B.
        logit_scale: already exponentiated.
        logit_bias: 0 for a loss without one.
    """
    dim = len(means) // 2
    positive = means[-1]
    positive_mean = logit_scale * positive + logit_bias
    if num_pairs == 1:
        return positive_mean, None
    everything = sum(image * text for image, text in zip(means[:dim], means[dim:-1], strict=True))
    return positive_mean, logit_scale * (num_pairs * everything - positive) / (num_pairs - 1) + logit_bias
