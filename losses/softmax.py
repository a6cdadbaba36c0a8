"""The softmax loss: the plain equation, and two passes over tiles.

CLIP, arXiv 2103.00020, section 2.3: the baseline of every comparison.

    B  pairs                          z_ij  logit_scale * <image_i, text_j>
    D  embedding dimension            L     sum_i (log sum_j exp z_ij + log sum_j exp z_ji - 2 z_ii) / 2B

A softmax needs its normalisers before any gradient is known. It takes two passes over the tiles and four matrix
products per tile; the sigmoid takes three. The first pass computes the log-sum-exp of rows and columns, the second one
the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sigray.losses.sigmoid import LossResult
from sigray.losses.tiles import accumulate, sum_dtype, tiles


def softmax_loss_plain(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The equation with its B x B logits. For reading and for tests.

    Args:
        image_features, text_features: (B, D), unit norm; row i of both is a pair.
        logit_scale: scalar, already exponentiated.

    Returns:
        Scalar: the mean of both cross entropies.
    """
    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits), device=logits.device)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


class SoftmaxPass:
    """The loss and gradients of some images: `normalise` with all texts, then `visit`.

    Args:
        image: (B, D) features.
        scale: scalar, already exponentiated.
        bias: scalar without effect (a softmax is invariant to it); it keeps the interface of the sigmoid.
        first_image: index of the first image in the global batch.
        tile_size: edge of a tile of logits.
    """

    def __init__(self, image: Tensor, scale: Tensor, bias: Tensor, *, first_image: int, tile_size: int | None) -> None:
        self._image, self._first_image, self._tile_size = image, first_image, tile_size
        self._sums = sum_dtype(image)
        self._scale, self._bias = scale.to(self._sums), bias.to(self._sums)
        self._row_normalisers = image.new_full((len(image),), -torch.inf, dtype=self._sums)
        self._row_loss, self._row_grad_scale = image.new_zeros(2, len(image), dtype=self._sums)
        self._grad_image = torch.zeros_like(image, dtype=self._sums)

    def normalise(self, text_features: Tensor, first_text: int) -> Tensor:
        """(M, 1): log sum_i exp z_ij over these images.

        The part of these texts in the images' normalisers is added to the pass.
        """
        columns = text_features.new_full((len(text_features), 1), -torch.inf, dtype=self._sums)
        for tile in tiles(self._image, text_features, self._tile_size):
            z = self._scale * tile.x.to(self._sums)
            rows = self._row_normalisers[tile.rows]
            rows.copy_(torch.logaddexp(rows, z.logsumexp(dim=1)))
            part = columns[tile.columns, 0]
            part.copy_(torch.logaddexp(part, z.logsumexp(dim=0)))
        return columns

    def visit(self, text_features: Tensor, first_text: int, normalisers: Tensor) -> Tensor:
        """Add the gradients of all images against these texts; `normalise` must be done.

        Args:
            text_features: (M, D).
            first_text: index of the first one in the global batch.
            normalisers: (M, 1), log sum_i exp z_ij over the images of all ranks.

        Returns:
            (M, D): sum_i dL/dz_ij image_i; times logit_scale it is the texts' part of the gradient.
        """
        grad_text = torch.zeros_like(text_features, dtype=self._sums)
        offset = self._first_image - first_text
        for tile in tiles(self._image, text_features, self._tile_size):
            cosine = tile.x.to(self._sums)
            z = self._scale * cosine
            dz = (z - self._row_normalisers[tile.rows, None]).exp_()
            dz = (dz + (z - normalisers[tile.columns].T).exp_()) / 2
            rows, columns = tile.pair_slices(offset)
            if rows.start < rows.stop:
                both_normalisers = self._row_normalisers[tile.rows][rows] + normalisers[tile.columns][columns][:, 0]
                shift = columns.start - rows.start
                self._row_loss[tile.rows][rows] += both_normalisers / 2 - z.diagonal(shift)
                dz.diagonal(shift).sub_(1)
            self._row_grad_scale[tile.rows] += (cosine * dz).sum(dim=1)
            tile.x.copy_(dz)
            accumulate(self._grad_image[tile.rows], tile.x, tile.text)
            accumulate(grad_text[tile.columns], tile.x.T, tile.image)
        return grad_text

    def finish(self, grad_text: Tensor) -> LossResult:
        """The sums over all visits, divided by the number of images.

        Args:
            grad_text: (M, D), the sum of what the visits returned for these texts.
        """
        loss, grad_scale = self._row_loss.sum() / len(self._image), self._row_grad_scale.sum() / len(self._image)
        factor = self._scale / len(self._image)
        return LossResult(loss, self._grad_image, grad_text, factor, grad_scale, torch.zeros_like(self._bias))
