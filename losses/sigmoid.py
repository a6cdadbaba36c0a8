"""The pairwise sigmoid loss (SigLIP, arXiv 2303.15343, section 3.2): once plainly, and in one pass over tiles.

    B  images in the block            x_ij  cosine of image i and text j
    M  texts in the block             z_ij  logit_scale * x_ij + logit_bias
    D  embedding dimension            L     sum_ij softplus(-y_ij z_ij) / B,  y_ij = +1 for a pair, else -1

The sigmoid needs no normaliser, so dL/dz_ij = sigmoid(z_ij) - [i, j is a pair] is known the moment z_ij is: value
and every gradient come from one visit to each tile, three matrix products per tile, and nothing of size B x M is
ever kept. `sigmoid_block` is that pass, `one_pass` hands its result to autograd; `losses/exchange.py` runs the same
pass once per chunk of the ring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

# A float32 tile of this edge is 16 MiB: the products run at full speed and the elementwise part stays near the cache.
DEFAULT_TILE_SIZE = 2048


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
    tile_size: int = DEFAULT_TILE_SIZE,
) -> Tensor:
    """The sigmoid loss of B images against M texts, differentiable once in all four arguments.

    Same convention as open_clip's `SigLipLoss`: the sum over pairs divided by the number of images.

    Args:
        image_features: (B, D), unit norm, any floating dtype.
        text_features: (M, D), unit norm, same dtype.
        logit_scale: scalar, already exponentiated.
        logit_bias: scalar.
        positive_offset: image i pairs with text i + positive_offset where there is one; None: no pair in the block.
        tile_size: edge of a tile of logits; changes memory and speed, not the result.

    Returns:
        Scalar, float64 for float64 features, else float32.

    Raises:
        RuntimeError: in a backward pass with create_graph=True; the gradients are numbers without a graph.
    """
    block = partial(sigmoid_block, positive_offset=positive_offset, tile_size=tile_size)
    return one_pass(block, image_features, text_features, logit_scale, logit_bias)


@dataclass
class LossBlock:
    """The loss of a block of images against texts with all its gradients: sums over pairs, not yet divided by B."""

    loss: Tensor  # scalar
    grad_image: Tensor  # (B, D)
    grad_text: Tensor  # (M, D)
    grad_scale: Tensor  # scalar
    grad_bias: Tensor  # scalar


BlockFunction = Callable[[Tensor, Tensor, Tensor, Tensor], LossBlock]


@torch.no_grad()
def sigmoid_block(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    positive_offset: int | None = 0,
    tile_size: int = DEFAULT_TILE_SIZE,
) -> LossBlock:
    """Value and gradients of one block, outside autograd; arguments as in `sigmoid_loss`.

    Accumulates in float64 for float64 features and in float32 for every other dtype.
    """
    dtype = torch.float64 if image_features.dtype == torch.float64 else torch.float32
    image, text = image_features.to(dtype), text_features.to(dtype)
    scale, bias = logit_scale.to(dtype), logit_bias.to(dtype)
    loss, grad_bias = torch.zeros_like(scale), torch.zeros_like(bias)
    grad_image, grad_text = torch.zeros_like(image), torch.zeros_like(text)
    for top in range(0, len(image), tile_size):
        rows = slice(top, top + tile_size)
        for left in range(0, len(text), tile_size):
            columns = slice(left, left + tile_size)
            z = (image[rows] @ text[columns].T).mul_(scale).add_(bias)
            # softplus and sigmoid share e = exp(-|z|), which cannot overflow.
            e = z.abs().neg_().exp_()
            loss += z.clamp(min=0).add_(e.log1p()).sum()
            dz = torch.where(z >= 0, 1.0, e).div_(e.add_(1))
            if positive_offset is not None:
                diagonal = top + positive_offset - left
                if -len(z) < diagonal < z.shape[1]:
                    # softplus(-z) = softplus(z) - z: a pair differs from a non-pair by -z, its gradient by -1.
                    loss -= z.diagonal(diagonal).sum()
                    dz.diagonal(diagonal).sub_(1)
            grad_bias += dz.sum()
            grad_image[rows].addmm_(dz, text[columns])
            grad_text[columns].addmm_(dz.T, image[rows])
    # sum_ij x_ij dL/dz_ij = sum_i <image_i, sum_j dL/dz_ij text_j>: the scale's gradient needs no logits.
    grad_scale = (grad_image * image).sum()
    return LossBlock(loss, grad_image.mul_(scale), grad_text.mul_(scale), grad_scale, grad_bias)


def one_pass(
    block: BlockFunction,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
) -> Tensor:
    """Run `block`, which computes loss and gradients together, and give autograd the loss per image."""
    return _OnePass.apply(block, image_features, text_features, logit_scale, logit_bias)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: BlockFunction, *tensors: Tensor) -> Tensor:
        result = block(*tensors)
        gradients = (result.grad_image, result.grad_text, result.grad_scale, result.grad_bias)
        num_images = len(tensors[0])
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.save_for_backward(*(gradient.div_(num_images) for gradient in gradients))
        return result.loss / num_images

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the one-pass loss cannot be differentiated twice: its gradients are numbers without a graph. "
                "Use sigmoid_loss_plain where a second derivative is needed"
            )
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, *(gradient.mul(grad_loss).to(dtype) for gradient, dtype in gradients)
