"""Corrupt training pairs as section 4.8 of the paper does (arXiv 2303.15343).

    B  pairs in the global batch     b  pairs of this rank     S  image size     T  context length

    image       with probability p an image is replaced by uniform noise
    text        with probability p a caption is replaced by random tokens, of a random length
    alignment   the captions of a fraction p of the batch are permuted among these pairs
    image_text  image and text, each with its own p
    all         all three, each with its own p

The corruption of a pair is a function of the seed and the pair's position in the stream. So every run of a seed
corrupts a pair alike, whatever its batch size, loss or number of workers. A larger p corrupts the pairs of a smaller p
and more. Only the receiver of a permuted caption depends on the batch. The loader corrupts, not the data-shard workers,
so runs with different noise share one stream.
"""

from __future__ import annotations

import numpy as np

from sigray.workers.config import LabelNoise

_IMAGE, _TEXT, _ALIGNMENT, _ORDER = range(4)  # what a hash is for
_KINDS = {
    "image": (_IMAGE,),
    "text": (_TEXT,),
    "alignment": (_ALIGNMENT,),
    "image_text": (_IMAGE, _TEXT),
    "all": (_IMAGE, _TEXT, _ALIGNMENT),
}


class Noise:
    """The corruption of one run.

    Args:
        config: train.label_noise.
        seed: of the run.
        vocab_size: tokens are drawn from 1 to vocab_size - 1.

    Attributes:
        moves_captions: whether a pair's caption may come from anywhere in the global batch.
    """

    def __init__(self, config: LabelNoise, seed: int, vocab_size: int) -> None:
        self._fraction = config.fraction
        self._seed = seed
        self._vocab_size = vocab_size
        self._kinds = _KINDS[config.kind]
        self.moves_captions = _ALIGNMENT in self._kinds

    def caption_rows(self, samples: np.ndarray) -> np.ndarray:
        """Return (B,): for each pair of the global batch, the pair whose caption it gets.

        Args:
            samples: (B, 3) of the global batch: epoch, shard, index.
        """
        rows = np.arange(len(samples))
        if self.moves_captions:
            chosen = np.flatnonzero(self._is_chosen(samples, _ALIGNMENT))
            # In a random order each pair takes the next one's caption, so only a single pair keeps its own.
            order = chosen[np.argsort(place_hash(samples[chosen], self._seed, _ORDER), kind="stable")]
            rows[order] = np.roll(order, -1)
        return rows

    def corrupt(self, samples: np.ndarray, images: np.ndarray, tokens: np.ndarray) -> None:
        """Replace images and captions in place.

        Args:
            samples: (b, 3).
            images: (b, S, S, 3) uint8.
            tokens: (b, T) int32, already those of `caption_rows`.
        """
        if _IMAGE in self._kinds:
            for row in np.flatnonzero(self._is_chosen(samples, _IMAGE)):
                random = self._random(samples[row], _IMAGE)
                images[row] = np.frombuffer(random.bytes(images[row].size), np.uint8).reshape(images[row].shape)
        if _TEXT in self._kinds:
            for row in np.flatnonzero(self._is_chosen(samples, _TEXT)):
                random = self._random(samples[row], _TEXT)
                length = random.randint(1, tokens.shape[1] + 1)
                tokens[row] = 0
                tokens[row, :length] = random.randint(1, self._vocab_size, size=length)

    def _is_chosen(self, samples: np.ndarray, purpose: int) -> np.ndarray:
        return (place_hash(samples, self._seed, purpose) >> np.uint64(11)) * 2.0**-53 < self._fraction

    def _random(self, sample: np.ndarray, purpose: int) -> np.random.RandomState:
        # RandomState: its streams are frozen, see workers/data/order.py.
        return np.random.RandomState(int(place_hash(sample[None], self._seed, purpose)[0] & np.uint64(0xFFFFFFFF)))


def place_hash(samples: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """Return (n,) uint64 hashes of (n, 3) epoch, shard, index: splitmix64's finaliser."""
    h = np.full(len(samples), seed * 16 + purpose, np.uint64)
    for column in samples.T.astype(np.uint64):
        h = h * np.uint64(0x9E3779B97F4A7C15) + column + np.uint64(1)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h
