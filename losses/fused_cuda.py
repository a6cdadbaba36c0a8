"""`fused.c` for CUDA, as a Triton kernel: one row of a tile per program, so a row's sums are one thread block's.

Triton's interpreter runs it on a CPU, and its compiler makes code for GPUs that are not there:
tests/losses/test_fused.py does both. It has not run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns at a time
NUM_WARPS = 4


@triton.jit
def tile_kernel(x, scale, bias, sums, columns, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cosines in, dL/dlogits out, sums of a row on the way; as `losses.fused.negative_terms_`.

    Args:
        x: (R, C), contiguous, float32 or bfloat16.
        scale, bias: float32 scalars on the device: the host does not wait for them.
        sums: (3, R) float32 with `stride` between its rows.
    """
    row = tl.program_id(0).to(tl.int64)
    t, b = tl.load(scale), tl.load(bias)
    loss = tl.zeros([BLOCK], tl.float32)
    grad_bias = tl.zeros([BLOCK], tl.float32)
    grad_scale = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < columns:
        place = start + tl.arange(0, BLOCK)
        inside = place < columns
        cosine = tl.load(x + row * columns + place, mask=inside, other=-float("inf")).to(tl.float32)
        counts = cosine != -float("inf")
        cosine = tl.where(counts, cosine, 0.0)
        z = tl.where(counts, t * cosine + b, -float("inf"))
        e = tl.exp(-tl.abs(z))
        u = 1.0 + e
        # log(1 + e) to float32's precision: the rounding of u is undone by what it is divided by (Kahan's form).
        log1p = tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))
        # Both comparisons are false for NaN, which must stay one.
        sigmoid = tl.where(z < 0.0, e, 1.0) / u
        loss += tl.where(z < 0.0, 0.0, z) + log1p
        grad_bias += sigmoid
        grad_scale += cosine * sigmoid
        tl.store(x + row * columns + place, sigmoid.to(x.dtype.element_ty), mask=inside)
        start += BLOCK
    # Reads behind writes of nobody else: the row is this program's.
    tl.store(sums + row, tl.load(sums + row) + tl.sum(loss))
    tl.store(sums + stride + row, tl.load(sums + stride + row) + tl.sum(grad_bias))
    tl.store(sums + 2 * stride + row, tl.load(sums + 2 * stride + row) + tl.sum(grad_scale))


def negative_terms_cuda_(x: Tensor, scale: Tensor, bias: Tensor, sums: Tensor) -> None:
    """`losses.fused.negative_terms_` for float32 sums on a CUDA device."""
    tile_kernel[(len(x),)](x, scale, bias, sums, x.shape[1], sums.stride(0), BLOCK=BLOCK, num_warps=NUM_WARPS)
