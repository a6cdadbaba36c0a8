"""The pairwise sigmoid loss: the plain equation, and one pass over tiles.

SigLIP, arXiv 2303.15343, section 3.2.

    B  images                         x_ij  cosine of image i and text j
    M  texts                          z_ij  logit_scale * x_ij + logit_bias
    D  embedding dimension            L     sum_ij softplus(-y_ij z_ij) / B,  y_ij = +1 for a pair, else -1

The sigmoid needs no normaliser, so dL/dz_ij = sigmoid(z_ij) - [i, j is a pair] is known as soon as z_ij is. The value
and every gradient come from one visit to each tile. A tile takes three matrix products, and nothing of size B x M is
kept. `SigmoidPass` is that pass, `OnePass` hands its result to autograd. `losses/ring.py` runs the same pass over the
chunks of the ring. docs/numerics.md has the algebra and the precision of each sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sigray.losses.fused import negative_terms_, pair_terms_, row_dots
from sigray.losses.negatives import ALL_NEGATIVES, NUM_BINS, Mask, Negatives, count_cosines_, make_mask
from sigray.losses.tiles import accumulate, check_features, sum_dtype, tiles


def sigmoid_loss_plain(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """The equation as the paper prints it (Algorithm 1), with its B x B logits.

    For reading and for tests.

    Args:
        image_features, text_features: (B, D), unit norm; row i of both is a pair.
        logit_scale: scalar, already exponentiated (the paper's t, not t').
        logit_bias: scalar, the paper's b.

    Returns:
        Scalar: the sum over all B * B pairs, divided by the number of images.
    """
    logits = logit_scale * image_features @ text_features.T + logit_bias
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -torch.nn.functional.logsigmoid(labels * logits).sum() / len(logits)


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    positive_offset: int | None = 0,
    negatives: Negatives = ALL_NEGATIVES,
    tile_size: int | None = None,
) -> Tensor:
    """The sigmoid loss of B images against M texts, in one pass over tiles.

    It is differentiable once in all four arguments. As in open_clip's `SigLipLoss`, the sum over pairs is divided by
    the number of images.

    Args:
        image_features: (B, D), unit norm, any floating dtype.
        text_features: (M, D), unit norm, same dtype.
        logit_scale, logit_bias: scalars; the scale is already exponentiated.
        positive_offset: image i pairs with text i + positive_offset if that text exists; None: there is no pair.
        negatives: which of the other pairs count.
        tile_size: edge of a tile of logits, by default the fastest one measured on such a device; changes memory and
            speed, not the result.

    Returns:
        Scalar, float64 for float64 features, else float32.

    Raises:
        ValueError: the shapes or dtypes of the features do not fit each other.
        RuntimeError: in a backward pass with create_graph=True (the gradients are numbers without a graph), and in a
            second backward pass (the first one takes the gradients and does not copy them).
    """
    check_features(image_features, text_features)
    # Without a pair images get indices above those of all texts.
    first_image = len(text_features) if positive_offset is None else positive_offset

    def compute(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> LossResult:
        def count(high: int | None) -> Tensor:
            histogram = torch.zeros(NUM_BINS, dtype=torch.int64, device=image.device)
            count_tiles_(histogram, image, text, high, offset=first_image, tile_size=tile_size)
            return histogram

        num_pairs = max(0, min(len(image), len(text) - first_image) - max(0, -first_image))
        mask = make_mask(negatives, len(image) * len(text) - num_pairs, count)
        loss = SigmoidPass(image, scale, bias, first_image=first_image, tile_size=tile_size, mask=mask)
        return loss.finish(loss.visit(text, first_text=0))

    return OnePass.apply(compute, image_features, text_features, logit_scale, logit_bias)


@dataclass
class LossResult:
    """The loss of B images against M texts, per image, and all its gradients."""

    loss: Tensor  # scalar
    image_part: Tensor  # (B, D): sum_j dL/dz_ij text_j; times feature_factor it is the gradient
    text_part: Tensor  # (M, D)
    feature_factor: Tensor  # scalar: logit_scale / B, applied in the backward pass, where grad_loss is known too
    grad_scale: Tensor  # scalar
    grad_bias: Tensor  # scalar

    def gradients(self, grad_loss: Tensor) -> tuple[Tensor, ...]:
        """Gradients of images, texts, scale and bias; to be taken once."""
        factor = self.feature_factor * grad_loss
        features = self.image_part.mul_(factor), self.text_part.mul_(factor)
        return *features, self.grad_scale * grad_loss, self.grad_bias * grad_loss


class SigmoidPass:
    """The loss and gradients of some images, summed over sets of texts.

    Images and texts have indices in the global batch; an image and a text of one index are a pair. Products are taken
    in the features' dtype (float32 for float16, and for bfloat16 if the machine lacks the instructions). All sums over
    tiles are float32, float64 for float64 features.

    Args:
        image: (B, D) features.
        scale, bias: scalars; the scale is already exponentiated.
        first_image: index of the first image.
        tile_size: edge of a tile of logits.
        mask: marks the negatives that do not count; None: all count.
    """

    def __init__(
        self, image: Tensor, scale: Tensor, bias: Tensor, *, first_image: int, tile_size: int | None, mask: Mask | None
    ) -> None:
        self._image, self._first_image, self._tile_size, self._mask = image, first_image, tile_size, mask
        self._sums = sum_dtype(image)
        self._scale, self._bias = scale.to(self._sums), bias.to(self._sums)
        # Per image: the loss, and its gradients by bias and scale.
        self._row_sums = image.new_zeros(3, len(image), dtype=self._sums)
        self._grad_image: Tensor | None = None

    def visit(self, text_features: Tensor, first_text: int) -> Tensor:
        """Add the terms of all images against these texts.

        Args:
            text_features: (M, D).
            first_text: index of the first one.

        Returns:
            (M, D): sum_i dL/dz_ij image_i; times logit_scale it is the texts' part of the gradient.
        """
        grad_text = torch.empty_like(text_features, dtype=self._sums)
        first_visit = self._grad_image is None
        if self._grad_image is None:
            self._grad_image = torch.empty_like(self._image, dtype=self._sums)
        offset = self._first_image - first_text
        for tile in tiles(self._image, text_features, self._tile_size):
            diagonal = tile.pairs(offset)
            if diagonal is not None:
                pairs = tile.pair_slices(offset)
                # Unrounded: the few terms of the pairs weigh as much as those of all negatives.
                is_exact = tile.x.dtype == self._sums
                cosines = diagonal.clone() if is_exact else row_dots(tile.image[pairs[0]], tile.text[pairs[1]])
                diagonal.fill_(-torch.inf)
            if self._mask is not None:
                first = self._first_image + tile.rows.start, first_text + tile.columns.start
                tile.x.masked_fill_(self._mask(tile.x, *first), -torch.inf)  # without a name, the mask is free at once
            negative_terms_(tile.x, self._scale, self._bias, self._row_sums[:, tile.rows])
            if diagonal is not None:
                sums = self._row_sums[:, tile.rows.start + pairs[0].start : tile.rows.start + pairs[0].stop]
                pair_terms_(diagonal, cosines, self._scale, self._bias, sums)
            is_first_row = tile.rows.start == 0
            is_first_column = tile.columns.start == 0
            accumulate(self._grad_image[tile.rows], tile.x, tile.text, overwrite=first_visit and is_first_column)
            accumulate(grad_text[tile.columns], tile.x.T, tile.image, overwrite=is_first_row)
        return grad_text

    def finish(self, grad_text: Tensor) -> LossResult:
        """The sums over all visits, divided by the number of images.

        Args:
            grad_text: (M, D), the sum of what the visits returned for these texts.
        """
        assert self._grad_image is not None
        loss, grad_bias, grad_scale = self._row_sums.sum(dim=1) / len(self._image)
        return LossResult(loss, self._grad_image, grad_text, self._scale / len(self._image), grad_scale, grad_bias)


def count_tiles_(
    histogram: Tensor, image: Tensor, text: Tensor, high: int | None, *, offset: int, tile_size: int | None
) -> None:
    """Add the cosines of all negatives to a histogram (`count_cosines_`).

    Image i and text i + offset are a pair.
    """
    for tile in tiles(image, text, tile_size):
        if (diagonal := tile.pairs(offset)) is not None:
            diagonal.fill_(torch.nan)
        count_cosines_(histogram, tile.x[~tile.x.isnan()], high)


class Result(Protocol):
    """A loss, and a way to the gradients of the tensors that it was computed from."""

    @property
    def loss(self) -> Tensor: ...
    def gradients(self, grad_loss: Tensor) -> tuple[Tensor, ...]: ...


class OnePass(torch.autograd.Function):
    """Runs a function that returns loss and gradients, and gives the loss to autograd."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Result], *tensors: Tensor) -> Tensor:
        # Not save_for_backward: autograd copies gradients that something else refers to.
        ctx.result = compute(*tensors)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return ctx.result.loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the one-pass loss cannot be differentiated twice: its gradients are numbers without a graph. "
                "Use the plain equation if you need a second derivative"
            )
        if ctx.result is None:
            raise RuntimeError(
                "a second backward pass through the same one-pass loss: the first one took its gradients. "
                "Compute the loss again"
            )
        result, ctx.result = ctx.result, None
        gradients = result.gradients(grad_loss)
        return None, *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
