"""Which negatives count: all, or a fraction of them as in the paper's section 4.7 (SigLIP, arXiv 2303.15343).

The choice is over the whole global batch and does not depend on how it is cut: `random` draws each pair from a hash
of (seed, image, text), `hardest` and `easiest` keep the pairs beyond a threshold that is found by counting, in two
visits to the tiles and without sorting or keeping them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NUM_BINS = 1 << 16


@dataclass(frozen=True)
class Negatives:
    """What the user asks for.

    Attributes:
        keep: all, or which ones of them.
        fraction: of all negatives of the global batch, in (0, 1]; ignored for `all`.
        seed: of `random`; another one each step.

    Raises:
        ValueError: where the fraction is outside (0, 1].
    """

    keep: Literal["all", "random", "hardest", "easiest"] = "all"
    fraction: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction of negatives must be in (0, 1], not {self.fraction}")


ALL_NEGATIVES = Negatives()

# Marks what does not count in a tile of cosines; arguments: the tile, the indices of its first image and first text.
Mask = Callable[[Tensor, int, int], None]
# Histogram over all tiles of the global batch, positives left out; argument: as `count_cosines_`'s `high`.
Count = Callable[[int | None], Tensor]


def make_mask(negatives: Negatives, num_negatives: int, count: Count) -> Mask | None:
    """The mask of one global batch; None where all negatives count.

    Args:
        negatives: what to keep.
        num_negatives: in the global batch.
        count: called twice where a threshold is needed; its histograms must cover the global batch.
    """
    if negatives.keep == "all" or negatives.fraction == 1 or num_negatives == 0:
        return None
    if negatives.keep == "random":
        return _random_mask(negatives.seed, negatives.fraction)
    num_kept = max(1, round(negatives.fraction * num_negatives))
    rank = num_negatives - num_kept if negatives.keep == "hardest" else num_kept - 1  # in ascending order
    high, before = _find(count(None), rank)
    low, _ = _find(count(high), rank - before)
    threshold = _cosine_of_key((high << 16 | low) - (1 << 31))
    if negatives.keep == "hardest":
        return lambda x, first_image, first_text: _fill_(x, x.float() < threshold)
    return lambda x, first_image, first_text: _fill_(x, x.float() > threshold)


def count_cosines_(histogram: Tensor, x: Tensor, high: int | None) -> None:
    """Add a tile's cosines to a histogram of their float32 bits, in an order that is the order of the numbers.

    Args:
        histogram: (65,536,) int64.
        x: any number of cosines.
        high: None to count by the upper 16 bits of the key, else count the lower 16 of those whose upper are `high`.
    """
    keys = _key(x.float().flatten())
    if high is not None:
        keys = keys[(keys >> 16) + (NUM_BINS // 2) == high] & (NUM_BINS - 1)
    else:
        keys = (keys >> 16) + NUM_BINS // 2
    histogram += torch.bincount(keys, minlength=NUM_BINS)


def _key(x: Tensor) -> Tensor:
    """int32 that compare as the float32 do (the sign bit turns the order of the rest round)."""
    bits = x.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _cosine_of_key(key: int) -> float:
    bits = torch.tensor(key, dtype=torch.int64).to(torch.int32)
    return float((bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32))


def _find(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the element of this rank, and how many lie in the bins before it."""
    cumulated = histogram.cumsum(0)
    found = int(torch.searchsorted(cumulated, rank, right=True))
    return found, int(cumulated[found - 1]) if found else 0


def _random_mask(seed: int, fraction: float) -> Mask:
    def mask(x: Tensor, first_image: int, first_text: int) -> None:
        num_images, num_texts = x.shape
        images = torch.arange(first_image, first_image + num_images, device=x.device)
        texts = torch.arange(first_text, first_text + num_texts, device=x.device)
        _fill_(x, random_drop(images, texts, seed, fraction))

    return mask


def random_drop(images: Tensor, texts: Tensor, seed: int, fraction: float) -> Tensor:
    """Which pairs a random choice leaves out, by their numbers in the global batch alone.

    Args:
        images: (..., R) numbers.
        texts: (..., C) numbers.
        seed: another one draws others.
        fraction: of the pairs that stay.

    Returns:
        (..., R, C) bool.
    """
    limit = min(round(fraction * 2**31), 2**31 - 1)
    # Two rounds of multiply and shift on wrapping int32; a row or a column alone decides nothing.
    h = _mix(images, 2 * seed).to(torch.int32)[..., :, None] ^ _mix(texts, 2 * seed + 1).to(torch.int32)[..., None, :]
    for factor in (0x2C1B3C6D, 0x297A2D39):
        h = h * factor
        h = h ^ ((h >> 15) & 0x1FFFF)
    return (h & 0x7FFFFFFF) >= limit


def _mix(index: Tensor, seed: int) -> Tensor:
    """int64 in 31 bits, well mixed: splitmix-like rounds that fit into int64 without overflow."""
    h = (index.to(torch.int64) + (seed % 2**20) * 0x9E3779B1) & 0xFFFFFFFF
    for factor in (0x5BD1E995, 0x2C9277B5):
        h = ((h ^ (h >> 15)) * (factor & 0x7FFFFFFF)) & 0x7FFFFFFF
    return h ^ (h >> 13)


def _fill_(x: Tensor, dropped: Tensor) -> None:
    x.masked_fill_(dropped, -torch.inf)
