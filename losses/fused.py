"""The elementwise part of a tile, fused: cosines to dL/dlogits and row sums.

    R  rows of the tile (images)      C  columns of the tile (texts)

Callers use `negative_terms_`; `eager_terms_` is the same in torch. On CPU `negative_terms_` runs `fused.c`, which the C
compiler of the machine compiles once. On CUDA it runs the Triton kernel of `fused_cuda.py`. For float64, and on other
devices, it runs the eager form. XLA fuses `negative_terms` by itself (`losses/sharded.py`).

`pair_terms_` and `row_dots` are one call each on CPU: a small batch spends its time on launching operations.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sigray.native import compiled

_SOURCE = Path(__file__).with_name("fused.c")


def negative_terms_(x: Tensor, scale: Tensor, bias: Tensor, sums: Tensor) -> None:
    """Replace each cosine by dL/dz of a negative pair; add its terms to the row sums.

    Args:
        x: (R, C) cosines, contiguous, bfloat16, float32 or float64; -inf marks an element that does not count.
            Overwritten with sigmoid(z), z = scale * x + bias.
        scale, bias: scalars, of the dtype of the sums.
        sums: (3, R) float32 or float64, rows contiguous. Softplus(z), sigmoid(z) and x * sigmoid(z) are added: the loss
            and its gradients by bias and scale.
    """
    on_cpu = x.device.type == "cpu" and sums.dtype == torch.float32
    if on_cpu and (scale_value := scale.item()) > 0 and (library := _library()) is not None:
        function = library.tile_float32 if x.dtype == torch.float32 else library.tile_bfloat16
        function(x.data_ptr(), *x.shape, scale_value, bias.item(), sums.data_ptr(), sums.stride(0))
    elif x.device.type == "cuda" and sums.dtype == torch.float32:
        from sigray.losses.fused_cuda import negative_terms_cuda_  # torch brings Triton with CUDA only

        negative_terms_cuda_(x, scale, bias, sums)
    else:
        eager_terms_(x, scale, bias, sums)


def negative_terms(x: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The terms of negative pairs, in plain torch operations and without a sum.

    Args:
        x: cosines, in the dtype of the sums; -inf marks an element that does not count.
        scale, bias: scalars.

    Returns:
        sigmoid(z), softplus(z), sigmoid(z) again and x * sigmoid(z) for z = scale * x + bias, shaped like x: dL/dz, the
        loss, and its gradients by bias and scale.
    """
    # Compare with a tensor: XLA would widen the whole tile to compare it with a Python number. Cosines are above -2.
    counts = x > x.new_full((), -2.0)
    cosine = torch.where(counts, x, 0.0)
    z = torch.where(counts, scale * cosine + bias, -torch.inf)
    e = torch.exp(-z.abs())  # softplus and sigmoid share it; it cannot overflow
    sigmoid = torch.where(z >= 0, 1.0, e) / (1 + e)
    return sigmoid, z.clamp(min=0) + torch.log1p(e), sigmoid, cosine * sigmoid


def eager_terms_(x: Tensor, scale: Tensor, bias: Tensor, sums: Tensor) -> None:
    """`negative_terms_` in plain torch operations."""
    dz, *terms = negative_terms(x.to(sums.dtype), scale, bias)
    sums += torch.stack([term.sum(dim=1) for term in terms])
    x.copy_(dz)


def pair_terms_(x: Tensor, cosines: Tensor, scale: Tensor, bias: Tensor, sums: Tensor) -> None:
    """Write the terms of the positive pairs of a tile, after `negative_terms_`.

    `negative_terms_` must have seen -inf in the place of these pairs.

    Args:
        x: (n,), the pairs' elements of the tile, a view of its diagonal; overwritten with dL/dz = -sigmoid(-z).
        cosines: (n,), cosines of the pairs, in the dtype of the sums.
        scale, bias: scalars, of the dtype of the sums.
        sums: (3, n) float32 or float64, rows contiguous; softplus(-z), dL/dz and cosine * dL/dz are added.
    """
    if x.device.type == "cpu" and sums.dtype == torch.float32 and (library := _library()) is not None:
        function = library.pairs_float32 if x.dtype == torch.float32 else library.pairs_bfloat16
        tile = x.data_ptr(), len(x), x.stride(0), cosines.data_ptr()
        function(*tile, scale.item(), bias.item(), sums.data_ptr(), sums.stride(0))
        return
    z = scale * cosines + bias
    dz = torch.sigmoid(-z).neg_()
    sums += torch.stack([softplus(-z), dz, dz * cosines])
    x.copy_(dz)


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """(n,) float32 dot products of the rows of two (n, D) bfloat16 tensors, unrounded."""
    is_plain = left.device.type == "cpu" and left.is_contiguous() and right.is_contiguous()
    if is_plain and (library := _library()) is not None:
        dots = left.new_empty(len(left), dtype=torch.float32)
        library.dots_bfloat16(left.data_ptr(), right.data_ptr(), *left.shape, dots.data_ptr())
        return dots
    return (left.float() * right.float()).sum(dim=1)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled C source; None without a compiler."""
    library = compiled(_SOURCE, flags=["-fopenmp"], without="the loss runs unfused (about a third slower)")
    if library is not None:
        tensor, size, scalar = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        for dtype in ("float32", "bfloat16"):
            getattr(library, f"tile_{dtype}").argtypes = [tensor, size, size, scalar, scalar, tensor, size]
            getattr(library, f"pairs_{dtype}").argtypes = [tensor, size, size, tensor, scalar, scalar, tensor, size]
        library.dots_bfloat16.argtypes = [tensor, tensor, size, size, tensor]
    return library
