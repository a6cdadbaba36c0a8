"""The elementwise part of a tile, fused: cosines in, dL/dlogits out, row sums on the way.

    R  rows of the tile (images)      C  columns of the tile (texts)

`negative_terms_` is what callers use; `eager_terms_` says in torch what it computes. On CPU it runs `fused.c`, compiled
once per machine with the C compiler that is found, on CUDA the Triton kernel of `fused_cuda.py`, elsewhere, and for
float64, the eager form itself. XLA fuses `negative_terms` by its own means (`losses/sharded.py`). The other functions
do small things around it in one call on CPU, where a small batch's time is that of asking for operations. `block_` does
all tiles in one call, products included, where the processor has a unit for them (`amx_bfloat16.c`, `amx_float32.c`).
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sigray.native import compiled, cpu_flags

_SOURCES = [Path(__file__).with_name(name) for name in ("fused.c", "amx_bfloat16.c", "amx_float32.c")]
_HEADERS = [Path(__file__).with_name(name) for name in ("terms.h", "amx.h")]
_BLOCKS = {torch.bfloat16: "block_bfloat16", torch.float32: "block_float32"}
_MAX_BLOCK_DIM = 32768  # of what block_float32 adds up in 32 bits


def negative_terms_(x: Tensor, scale: Tensor, bias: Tensor, sums: Tensor) -> None:
    """Treat every element as a negative pair: replace its cosine by dL/dz, add its terms to the row sums.

    Args:
        x: (R, C) cosines, contiguous, bfloat16, float32 or float64; -inf marks an element that does not count.
            Overwritten with sigmoid(z), z = scale * x + bias.
        scale: scalar, of the dtype of the sums.
        bias: scalar, of the dtype of the sums.
        sums: (3, R) float32 or float64, rows contiguous; softplus(z), sigmoid(z) and x * sigmoid(z), which are the
            loss and its gradients by bias and scale, are added.
    """
    on_cpu = x.device.type == "cpu" and sums.dtype == torch.float32
    if on_cpu and (scale_value := scale.item()) > 0 and (library := _library()) is not None:
        function = library.tile_float32 if x.dtype == torch.float32 else library.tile_bfloat16
        function(x.data_ptr(), *x.shape, scale_value, bias.item(), sums.data_ptr(), sums.stride(0))
    elif x.device.type == "cuda" and sums.dtype == torch.float32:
        from sigray.losses.fused_cuda import negative_terms_cuda_  # Triton is there where CUDA is

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
    # Against a tensor: XLA would widen the whole tile to compare it with a number of Python's. Cosines are above -2.
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
    """The terms of the pairs of a tile, behind `negative_terms_`, of which they were marked as no part.

    Args:
        x: (n,), the tile's elements that are pairs, a view of its diagonal; overwritten with dL/dz = -sigmoid(-z).
        cosines: (n,), of these, in the dtype of the sums.
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


def block_(
    image_features: Tensor,
    text_features: Tensor,
    scale: Tensor,
    bias: Tensor,
    sums: Tensor,
    grad_image: Tensor,
    grad_text: Tensor,
    *,
    offset: int,
    tile_size: int,
    overwrite_image: bool,
) -> bool:
    """A block of pairs whole, if this machine can: dz = dL/dz of all of them never leaves the processor's caches.

    Cosines and all sums are float32. With bfloat16 features dz is rounded to bfloat16; with float32 ones products are
    made of integers of 24 bits, each row or column at a scale of its own (docs/numerics.md).

    Args:
        image_features: (B, D) bfloat16 or float32.
        text_features: (M, D), the same.
        scale, bias: scalars, float32.
        sums: (3, B) float32, rows contiguous; the loss and its gradients by bias and scale are added.
        grad_image: (B, D) float32, contiguous; dz @ text_features is added.
        grad_text: (M, D) float32, contiguous; becomes dz.T @ image_features.
        offset: image i and text i + offset are a pair.
        tile_size: edge of what is worked on at once, at the most.
        overwrite_image: whether nothing is in grad_image yet.

    Returns:
        Whether it was done; if not, nothing was touched.

    Raises:
        MemoryError: where some MiB for packed features are missing.
    """
    name, on_cpu = _BLOCKS.get(image_features.dtype), image_features.device.type == "cpu"
    if name is None or not on_cpu or image_features.shape[1] > _MAX_BLOCK_DIM:
        return False
    if (scale_value := scale.item()) <= 0 or not has_amx():
        return False
    image, text = image_features.contiguous(), text_features.contiguous()
    shape = len(image), *text.shape
    pointers = sums.data_ptr(), sums.stride(0), grad_image.data_ptr(), overwrite_image, grad_text.data_ptr()
    values = scale_value, bias.item(), offset, tile_size
    if getattr(_library(), name)(image.data_ptr(), text.data_ptr(), *shape, *values, *pointers):
        raise MemoryError("no memory to pack the features of a block of the loss")
    return True


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """(n, D) and (n, D) of bfloat16 -> (n,) float32: products and sums of rows without a rounding between."""
    is_plain = left.device.type == "cpu" and left.is_contiguous() and right.is_contiguous()
    if is_plain and (library := _library()) is not None:
        dots = left.new_empty(len(left), dtype=torch.float32)
        library.dots_bfloat16(left.data_ptr(), right.data_ptr(), *left.shape, dots.data_ptr())
        return dots
    return (left.float() * right.float()).sum(dim=1)


def add_(total: Tensor, addend: Tensor) -> None:
    """total += addend, both contiguous; a float32 total of bfloat16 addends without a float32 copy of them on CPU."""
    mixed = total.dtype == torch.float32 and addend.dtype == torch.bfloat16
    if mixed and total.device.type == "cpu" and (library := _library()) is not None:
        library.add_bfloat16(total.data_ptr(), addend.data_ptr(), total.numel())
    else:
        total.add_(addend)


def scaled(part: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """part * factor in another dtype; `factor` is a scalar. `part`, dense in memory, may be overwritten."""
    narrows = part.dtype == torch.float32 and dtype == torch.bfloat16
    if narrows and part.device.type == "cpu" and (library := _library()) is not None:
        out = torch.empty_like(part, dtype=dtype)
        library.scale_to_bfloat16(part.data_ptr(), part.numel(), factor.item(), out.data_ptr())
        return out
    return part.mul_(factor).to(dtype)


def has_bfloat16_products(device: torch.device) -> bool:
    """Whether matrix products of bfloat16 run at full speed.

    On a CPU without the instructions torch multiplies bfloat16 matrices 5 to 70 times slower than float32
    (docs/numerics.md); products are then taken in float32. A fact of the machine, not a timing: the same weights must
    come out of every run.
    """
    return device.type != "cpu" or bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


@functools.cache
def has_amx() -> bool:
    """Whether `block_` works here: the processor has AMX, the compiler knows it, the kernel lets us use it."""
    library = _library() if {"amx_bf16", "amx_int8"} <= cpu_flags() else None
    if library is None or not all(hasattr(library, name) for name in _BLOCKS.values()):
        return False
    return bool(library.amx_is_there())


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The C sources for this processor; None without a compiler."""
    without = "the loss runs unfused (about a third slower)"
    library = compiled(_SOURCES, headers=_HEADERS, flags=["-fopenmp"], without=without)
    if library is None:
        return None
    tensor, size, scalar = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    tile = [tensor, size, size, scalar, scalar, tensor, size]
    pairs = [tensor, size, size, tensor, scalar, scalar, tensor, size]
    for name, arguments in {
        "tile_float32": tile,
        "tile_bfloat16": tile,
        "pairs_float32": pairs,
        "pairs_bfloat16": pairs,
        "dots_bfloat16": [tensor, tensor, size, size, tensor],
        "scale_to_bfloat16": [tensor, size, scalar, tensor],
        "add_bfloat16": [tensor, tensor, size],
    }.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    features, gradients = (tensor, tensor, size, size, size), (tensor, ctypes.c_int, tensor)
    for name in _BLOCKS.values():
        if hasattr(library, name):
            getattr(library, name).argtypes = [*features, scalar, scalar, size, size, tensor, size, *gradients]
    return library
