"""Which negatives count: all, or a fraction.

SigLIP, arXiv 2303.15343, section 4.7, compares them.

The choice is over the whole global batch and does not depend on how the batch is cut. `random` draws each pair from a
hash of (seed, image, text). `hardest` and `easiest` keep the pairs beyond a threshold. Two visits to the tiles find the
threshold by counting, without sorting or keeping the cosines.
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
    """The user's choice of negatives.

    Attributes:
        keep: all, or which of them.
        fraction: of all negatives of the global batch, in (0, 1]; ignored for `all`.
        seed: for `random`; another one each step.

    Raises:
        ValueError: the fraction is outside (0, 1].
    """

    keep: Literal["all", "random", "hardest", "easiest"] = "all"
    fraction: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction of negatives must be in (0, 1], not {self.fraction}")


ALL_NEGATIVES = Negatives()

# Which elements of a tile of cosines do not count: (tile, index of its first image, index of its first text) -> bools.
Mask = Callable[[Tensor, int, int], Tensor]
# Histogram over all tiles of the global batch without the pairs; argument: `high` of `count_cosines_`.
Count = Callable[[int | None], Tensor]


def make_mask(negatives: Negatives, num_negatives: int, count: Count) -> Mask | None:
    """The mask of one global batch; None if all negatives count.

    Args:
        negatives: what to keep.
        num_negatives: in the global batch.
        count: called twice for a threshold; its histograms must cover the global batch.
    """
    if negatives.keep == "all" or negatives.fraction == 1 or num_negatives == 0:
        return None
    if negatives.keep == "random":
        return _random_mask(negatives.seed, negatives.fraction)
    num_kept = max(1, round(negatives.fraction * num_negatives))
    rank = num_negatives - num_kept if negatives.keep == "hardest" else num_kept - 1  # in ascending order
    high, before = _find_bin(count(None), rank)
    low, _ = _find_bin(count(high), rank - before)
    threshold = float(_key(torch.tensor((high << 16 | low) - (1 << 31)).to(torch.int32)).view(torch.float32))
    if negatives.keep == "hardest":
        return lambda x, first_image, first_text: x.float() < threshold
    return lambda x, first_image, first_text: x.float() > threshold


def count_cosines_(histogram: Tensor, x: Tensor, high: int | None) -> None:
    """Add cosines to a histogram of their float32 bits, in ascending order.

    Args:
        histogram: (65,536,) int64.
        x: any number of cosines.
        high: None: count by the upper 16 bits of the key. Else count by the lower 16 bits the keys whose upper bits are
            `high`.
    """
    keys = _key(x.float().flatten().view(torch.int32))
    if high is not None:
        keys = keys[(keys >> 16) + (NUM_BINS // 2) == high] & (NUM_BINS - 1)
    else:
        keys = (keys >> 16) + NUM_BINS // 2
    histogram += torch.bincount(keys, minlength=NUM_BINS)


def _key(bits: Tensor) -> Tensor:
    """int32 keys, ordered as the float32 numbers of these bits; of keys the bits."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the sign bit reverses the order of the other bits


def _find_bin(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the element of this rank, and the number of elements before it."""
    cumulated = histogram.cumsum(0)
    found = int(torch.searchsorted(cumulated, rank, right=True))
    return found, int(cumulated[found - 1]) if found else 0


def _random_mask(seed: int, fraction: float) -> Mask:
    def mask(x: Tensor, first_image: int, first_text: int) -> Tensor:
        num_images, num_texts = x.shape
        images = torch.arange(first_image, first_image + num_images, device=x.device)
        texts = torch.arange(first_text, first_text + num_texts, device=x.device)
        return random_drop(images, texts, seed, fraction)

    return mask


def random_drop(images: Tensor, texts: Tensor, seed: int, fraction: float) -> Tensor:
    """Which pairs random negatives leave out, by seed and global indices alone.

    Args:
        images, texts: (..., R) and (..., C) indices.
        fraction: of the pairs that stay.

    Returns:
        (..., R, C) bool.
    """
    limit = min(round(fraction * 2**31), 2**31 - 1)
    # Two rounds of multiply and shift on wrapping int32: a row or a column alone decides nothing.
    h = _mix(images, 2 * seed).to(torch.int32)[..., :, None] ^ _mix(texts, 2 * seed + 1).to(torch.int32)[..., None, :]
    for factor in (0x2C1B3C6D, 0x297A2D39):
        h = h * factor
        h = h ^ ((h >> 15) & 0x1FFFF)
    return (h & 0x7FFFFFFF) >= limit


def _mix(index: Tensor, seed: int) -> Tensor:
    """A well mixed hash of 31 bits: splitmix-like rounds that do not overflow int64."""
    h = (index.to(torch.int64) + (seed % 2**20) * 0x9E3779B1) & 0xFFFFFFFF
    for factor in (0x5BD1E995, 0x2C9277B5):
        h = ((h ^ (h >> 15)) * (factor & 0x7FFFFFFF)) & 0x7FFFFFFF
    return h ^ (h >> 13)
