"""The captioning loss of a step, micro-batch by micro-batch.

b  captions of this rank      T  context length      P  image tokens
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sigray.losses import token_loss
from sigray.workers.config import LossConfig
from sigray.workers.data.loader import Batch
from sigray.workers.data.sample_hash import Purpose, are_drawn
from sigray.workers.model.decoder import ImageTokens
from sigray.workers.model.tokenizer import CaptionEnds


class Captioner:
    """The decoder of a model in training.

    Args:
        module: the model, with a decoder.
        is_recorded: whether the device compiles what it records: then shapes must not depend on the captions.
    """

    def __init__(self, module: nn.Module, loss: LossConfig, ends: CaptionEnds, seed: int, *, is_recorded: bool) -> None:
        self._decoder: Any = module.get_submodule("decoder")
        self._image_tokens = ImageTokens(module.get_submodule("visual"))
        self._parallel = loss.caption_parallel
        self._ends, self._seed, self._is_recorded = ends, seed, is_recorded

    def targets(self, batch: Batch, rows: slice) -> list[Tensor]:
        """Host tensors of a micro-batch, for `encode`.

        (rows,) bool: predicted in parallel; (rows, T) weights of positions; and, unless the device records, the places
        of the positions that count.
        """
        weights = torch.from_numpy(self._ends.weights(batch.tokens[rows].numpy()))
        is_parallel = are_drawn(batch.samples[rows], self._seed, Purpose.PARALLEL_CAPTION, self._parallel)
        places = [] if self._is_recorded else [weights.flatten().nonzero()[:, 0]]
        return [torch.from_numpy(is_parallel), weights, *places]

    def encode(
        self,
        tokens: Tensor,
        is_parallel: Tensor,
        weights: Tensor,
        places: Tensor | None = None,
        *,
        loss: Callable[..., Tensor] = token_loss,
    ) -> dict[str, Tensor]:
        """The term of a micro-batch: the mean over its captions.

        To be called right after the image tower has run.

        Args:
            tokens: (rows, T) on the device; the next three are those of `targets`, there too.
            loss: as of `Decoder.forward`.
        """
        found = self._decoder(self._image_tokens.take(), tokens, is_parallel, weights, self._ends.pad, places, loss)
        return {"caption_loss": found / len(tokens)}
