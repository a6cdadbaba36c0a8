"""Random draws by a sample's place in the stream.

No batch size, number of ranks or resume changes them.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a draw is for; draws for two purposes are independent."""

    NOISE_IMAGE = 0
    NOISE_TEXT = 1
    NOISE_ALIGNMENT = 2
    NOISE_ORDER = 3
    PARALLEL_CAPTION = 4
    MASKED_PATCHES = 5


def are_drawn(samples: np.ndarray, seed: int, purpose: Purpose, fraction: float) -> np.ndarray:
    """Return (n,) bool: is a sample among the drawn fraction.

    A larger fraction draws those of a smaller one and more.

    Args:
        samples: (n, 3) epoch, shard, index.
    """
    return (place_hash(samples, seed, purpose) >> np.uint64(11)) * 2.0**-53 < fraction


def place_hash(samples: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """Return (n,) uint64 hashes of (n, 3) epoch, shard, index: splitmix64's finaliser."""
    h = np.full(len(samples), seed * 16 + purpose, np.uint64)
    for column in samples.T.astype(np.uint64):
        h = h * np.uint64(0x9E3779B97F4A7C15) + column + np.uint64(1)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h
