"""The captioning loss of a step, micro-batch by micro-batch.

    b  captions of this rank      T  context length      P  image tokens

The loss is a sum over captions. So each micro-batch adds its part in the pass that carries gradients back
(`losses/gradcache.py`), and the image tower runs once for both losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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
        self._loss, self._ends, self._seed, self._is_recorded = loss, ends, seed, is_recorded
        self._sum: Tensor | None = None  # of the captions of a micro-batch, with its graph
        self._parts: list[Tensor] = []

    def targets(self, batch: Batch, rows: slice) -> list[Tensor]:
        """Host tensors of a micro-batch, for `encode`.

        (rows,) bool: predicted in parallel; (rows, T) weights of positions; and, unless the device records, the places
        of the positions that count.
        """
        weights = torch.from_numpy(self._ends.weights(batch.tokens[rows].numpy()))
        is_parallel = are_drawn(batch.samples[rows], self._seed, Purpose.PARALLEL_CAPTION, self._loss.caption_parallel)
        places = [] if self._is_recorded else [weights.flatten().nonzero()[:, 0]]
        return [torch.from_numpy(is_parallel), weights, *places]

    def encode(self, tokens: Tensor, is_parallel: Tensor, weights: Tensor, places: Tensor | None = None) -> None:
        """Predict the captions of a micro-batch, right after the image tower has run.

        Args:
            tokens: (rows, T) on the device; the others are those of `targets`, there too.
        """
        found = self._decoder(self._image_tokens.take(), tokens, is_parallel, weights, self._ends.pad, places)
        self._sum = found / len(tokens)

    def loss(self, rows: slice, num_rows: int) -> Tensor:
        """The micro-batch's part of the weighted loss of this rank.

        Args:
            rows: of the micro-batch, of `num_rows`.
        """
        assert self._sum is not None
        part = self._sum * ((rows.stop - rows.start) / num_rows)
        self._sum = None
        self._parts.append(part.detach())
        return self._loss.caption_weight * part

    def terms(self, total: Tensor) -> dict[str, Tensor]:
        """Both terms of a step's loss, without weights.

        Args:
            total: the loss of the step.
        """
        caption_loss = torch.stack(self._parts).sum()
        self._parts = []
        return {"contrastive_loss": total - self._loss.caption_weight * caption_loss, "caption_loss": caption_loss}
