"""The pairwise sigmoid loss (SigLIP, arXiv 2303.15343, section 3.2): once plainly, and in one pass over tiles.

    B  images in the block            x_ij  cosine of image i and text j
    M  texts in the block             z_ij  logit_scale * x_ij + logit_bias
    D  embedding dimension            L     sum_ij softplus(-y_ij z_ij) / B,  y_ij = +1 for a pair, else -1

The sigmoid needs no normaliser, so dL/dz_ij = sigmoid(z_ij) - [i, j is a pair] is known the moment z_ij is: value
and every gradient come from one visit to each tile, three matrix products per tile, and nothing of size B x M is
ever kept. `SigmoidPass` is that pass, `one_pass` hands its result to autograd; `losses/ring.py` runs the same
pass over the chunks of the ring. docs/numerics.md has the algebra and what is summed in which precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sigray.losses.fused import block_, negative_terms_, pair_terms_, row_dots, scaled
from sigray.losses.negatives import ALL_NEGATIVES, NUM_BINS, Mask, Negatives, count_cosines_, make_mask
from sigray.losses.tiles import Tile, accumulate, check_features, default_tile_size, sum_dtype, tiles


def sigmoid_loss_plain(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """The equation as the paper prints it (Algorithm 1), B x B logits and all. For reading and for tests.

    Args:
        image_features: (B, D), unit norm.
        text_features: (B, D), unit norm; row i belongs to image i.
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
    """The sigmoid loss of B images against M texts, differentiable once in all four arguments.

    Same convention as open_clip's `SigLipLoss`: the sum over pairs divided by the number of images.

    Args:
        image_features: (B, D), unit norm, any floating dtype.
        text_features: (M, D), unit norm, same dtype.
        logit_scale: scalar, already exponentiated.
        logit_bias: scalar.
        positive_offset: image i pairs with text i + positive_offset where there is one; None: no pair in the block.
        negatives: which of the other pairs count.
        tile_size: edge of a tile of logits, by default what was fastest on such a device; changes memory and speed,
            not the result.

    Returns:
        Scalar, float64 for float64 features, else float32.

    Raises:
        ValueError: where the shapes or dtypes of the features do not fit each other.
        RuntimeError: in a backward pass with create_graph=True (the gradients are numbers without a graph), and in a
            second backward pass (the first one takes the gradients along instead of copying them).
    """
    check_features(image_features, text_features)
    # Images numbered from behind the last text: no pair in the block.
    first_image = len(text_features) if positive_offset is None else positive_offset

    def block(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> LossBlock:
        size = tile_size or default_tile_size(image.device)

        def count(high: int | None) -> Tensor:
            histogram = torch.zeros(NUM_BINS, dtype=torch.int64, device=image.device)
            count_tiles_(histogram, image, text, high, offset=first_image, tile_size=size)
            return histogram

        num_pairs = max(0, min(len(image), len(text) - first_image) - max(0, -first_image))
        mask = make_mask(negatives, len(image) * len(text) - num_pairs, count)
        loss = SigmoidPass(image, scale, bias, first_image=first_image, tile_size=size, mask=mask)
        return loss.finish(loss.visit(text, first_text=0))

    return one_pass(block, image_features, text_features, logit_scale, logit_bias)


@dataclass
class LossBlock:
    """The loss of a block of images against texts, per image, with all its gradients."""

    loss: Tensor  # scalar
    image_part: Tensor  # (B, D): sum_j dL/dz_ij text_j; times feature_factor it is the gradient
    text_part: Tensor  # (M, D)
    feature_factor: Tensor  # scalar: logit_scale / B, applied in the backward pass, where grad_loss is known too
    grad_scale: Tensor  # scalar
    grad_bias: Tensor  # scalar


class SigmoidPass:
    """One block of images that meets text blocks, one after another, and gathers loss and gradients on the way.

    Images and texts are numbered in the global batch; those with the same number are a pair. Products are taken in
    the dtype of the features (float32 for float16, and for bfloat16 where the machine has no such instructions); all
    sums over tiles are float32, float64 for float64 features.

    Args:
        image_features: (B, D).
        logit_scale: scalar, already exponentiated.
        logit_bias: scalar.
        first_image: number of the first image.
        tile_size: edge of a tile of logits.
        mask: marks the negatives that do not count; None: all count.
    """

    def __init__(
        self,
        image_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        *,
        first_image: int,
        tile_size: int,
        mask: Mask | None,
    ) -> None:
        self._image, self._first_image, self._tile_size, self._mask = image_features, first_image, tile_size, mask
        self._sums = sum_dtype(image_features)
        self._scale, self._bias = logit_scale.to(self._sums), logit_bias.to(self._sums)
        # Per image: the loss, and its gradients by bias and scale.
        self._row_sums = image_features.new_zeros(3, len(image_features), dtype=self._sums)
        self._grad_image: Tensor | None = None

    def visit(self, text_features: Tensor, first_text: int) -> Tensor:
        """All images against these texts.

        Args:
            text_features: (M, D).
            first_text: number of the first one.

        Returns:
            (M, D): sum_i dL/dz_ij image_i, which times logit_scale is the texts' part of the gradient.
        """
        first_visit, grad_text = self._grad_image is None, torch.empty_like(text_features, dtype=self._sums)
        if self._grad_image is None:
            self._grad_image = torch.empty_like(self._image, dtype=self._sums)
        offset = self._first_image - first_text
        if self._mask is None and block_(
            self._image,
            text_features,
            self._scale,
            self._bias,
            self._row_sums,
            self._grad_image,
            grad_text,
            offset=offset,
            tile_size=self._tile_size,
            overwrite_image=first_visit,
        ):
            return grad_text
        for tile in tiles(self._image, text_features, self._tile_size):
            diagonal = tile.pairs(offset)
            if diagonal is not None:
                pairs = tile.pair_slices(offset)
                cosines = self._pair_cosines(tile, diagonal, *pairs)
                diagonal.fill_(-torch.inf)
            if self._mask is not None:
                self._mask(tile.x, self._first_image + tile.rows.start, first_text + tile.columns.start)
            negative_terms_(tile.x, self._scale, self._bias, self._row_sums[:, tile.rows])
            if diagonal is not None:
                sums = self._row_sums[:, tile.rows.start + pairs[0].start : tile.rows.start + pairs[0].stop]
                pair_terms_(diagonal, cosines, self._scale, self._bias, sums)
            set_image, set_text = first_visit and tile.columns.start == 0, tile.rows.start == 0
            accumulate(self._grad_image[tile.rows], tile.x, tile.text, overwrite=set_image)
            accumulate(grad_text[tile.columns], tile.x.T, tile.image, overwrite=set_text)
        return grad_text

    def _pair_cosines(self, tile: Tile, diagonal: Tensor, rows: slice, columns: slice) -> Tensor:
        """In the dtype of the sums: the few terms of the pairs weigh as much as those of all negatives."""
        if tile.x.dtype == self._sums:
            return diagonal.clone()
        return row_dots(tile.image[rows], tile.text[columns])

    def finish(self, grad_text: Tensor) -> LossBlock:
        """Everything that was visited, divided by the number of images.

        Args:
            grad_text: (M, D), the sum of what the visits returned for these texts.
        """
        assert self._grad_image is not None
        loss, grad_bias, grad_scale = self._row_sums.sum(dim=1) / len(self._image)
        return LossBlock(loss, self._grad_image, grad_text, self._scale / len(self._image), grad_scale, grad_bias)


def count_tiles_(
    histogram: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    high: int | None,
    *,
    offset: int,
    tile_size: int,
) -> None:
    """Add the cosines of all negatives of a block to a histogram (`sigray.losses.negatives.count_cosines_`).

    Image i and text i + offset of the block are a pair.
    """
    for tile in tiles(image_features, text_features, tile_size):
        if (diagonal := tile.pairs(offset)) is not None:
            diagonal.fill_(torch.nan)
        count_cosines_(histogram, tile.x[~tile.x.isnan()], high)


BlockFunction = Callable[[Tensor, Tensor, Tensor, Tensor], LossBlock]


def one_pass(
    block: BlockFunction,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
) -> Tensor:
    """Run `block`, which computes the loss and its gradients together, and give the loss to autograd."""
    return _OnePass.apply(block, image_features, text_features, logit_scale, logit_bias)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: BlockFunction, *tensors: Tensor) -> Tensor:
        result = block(*tensors)
        # Not save_for_backward: the only reference must go to whoever receives them, or autograd copies them.
        ctx.result = result
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return result.loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the one-pass loss cannot be differentiated twice: its gradients are numbers without a graph. "
                "Use the plain equation where a second derivative is needed"
            )
        if ctx.result is None:
            raise RuntimeError(
                "a second backward pass through the same one-pass loss: the first one took its gradients along. "
                "Compute the loss again"
            )
        result, ctx.result = ctx.result, None
        factor = result.feature_factor * grad_loss
        image, text, scale, bias = ctx.dtypes
        return (
            None,
            scaled(result.image_part, factor, image),
            scaled(result.text_part, factor, text),
            (result.grad_scale * grad_loss).to(scale),
            (result.grad_bias * grad_loss).to(bias),
        )
