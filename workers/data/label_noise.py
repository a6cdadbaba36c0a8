"""Corrupt training pairs as section 4.8 of the paper does (arXiv 2303.15343).

    B  pairs in the global batch     b  pairs of this rank     S  image size     T  context length

    image       with probability p an image is replaced by uniform noise, and so are its views
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
from sigray.workers.data.sample_hash import Purpose, are_drawn, place_hash

_KINDS = {
    "image": (Purpose.NOISE_IMAGE,),
    "text": (Purpose.NOISE_TEXT,),
    "alignment": (Purpose.NOISE_ALIGNMENT,),
    "image_text": (Purpose.NOISE_IMAGE, Purpose.NOISE_TEXT),
    "all": (Purpose.NOISE_IMAGE, Purpose.NOISE_TEXT, Purpose.NOISE_ALIGNMENT),
}


class Noise:
    """The corruption of one run.

    Args:
        config: train.label_noise.
        seed: of the run.
        vocab_size: tokens are drawn from 1 to vocab_size - 1.
        pad: the token that fills captions.

    Attributes:
        moves_captions: whether a pair's caption may come from anywhere in the global batch.
    """

    def __init__(self, config: LabelNoise, seed: int, vocab_size: int, pad: int) -> None:
        self._fraction = config.fraction
        self._seed = seed
        self._vocab_size = vocab_size
        self._pad = pad
        self._kinds = _KINDS[config.kind]
        self.moves_captions = Purpose.NOISE_ALIGNMENT in self._kinds

    def caption_rows(self, samples: np.ndarray) -> np.ndarray:
        """Return (B,): for each pair of the global batch, the pair whose caption it gets.

        Args:
            samples: (B, 3) of the global batch: epoch, shard, index.
        """
        rows = np.arange(len(samples))
        if self.moves_captions:
            chosen = np.flatnonzero(self._is_chosen(samples, Purpose.NOISE_ALIGNMENT))
            # In a random order each pair takes the next one's caption, so only a single pair keeps its own.
            order = chosen[np.argsort(place_hash(samples[chosen], self._seed, Purpose.NOISE_ORDER), kind="stable")]
            rows[order] = np.roll(order, -1)
        return rows

    def corrupt(self, samples: np.ndarray, images: np.ndarray, tokens: np.ndarray) -> None:
        """Replace images and captions in place.

        Args:
            samples: (b, 3).
            images: (b, S, S, 3) uint8; with views (b, num_bytes), whose images become what they become without.
            tokens: (b, T) int32, already those of `caption_rows`.
        """
        if Purpose.NOISE_IMAGE in self._kinds:
            for row in np.flatnonzero(self._is_chosen(samples, Purpose.NOISE_IMAGE)):
                random = self._random(samples[row], Purpose.NOISE_IMAGE)
                images[row] = np.frombuffer(random.bytes(images[row].size), np.uint8).reshape(images[row].shape)
        if Purpose.NOISE_TEXT in self._kinds:
            for row in np.flatnonzero(self._is_chosen(samples, Purpose.NOISE_TEXT)):
                random = self._random(samples[row], Purpose.NOISE_TEXT)
                length = random.randint(1, tokens.shape[1] + 1)
                tokens[row] = self._pad
                tokens[row, :length] = random.randint(1, self._vocab_size, size=length)

    def _is_chosen(self, samples: np.ndarray, purpose: Purpose) -> np.ndarray:
        return are_drawn(samples, self._seed, purpose, self._fraction)

    def _random(self, sample: np.ndarray, purpose: Purpose) -> np.random.RandomState:
        # RandomState: its streams are frozen, see workers/data/order.py.
        return np.random.RandomState(int(place_hash(sample[None], self._seed, purpose)[0] & np.uint64(0xFFFFFFFF)))
