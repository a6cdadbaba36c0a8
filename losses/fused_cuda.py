"""The Triton form of `fused.c`: one program per row of a tile.

Arithmetic decides its time and not memory (docs/numerics.md), so there is one special function per element, exp. The
logarithm is the polynomial of `fused.c`. tests/losses/test_fused.py runs the kernel on a CPU, by Triton's interpreter,
and compiles it for GPUs that are not there; tests/gpu runs it on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns at a time; on an H100 no other pair was clearly faster (dev/log.md)
NUM_WARPS = 4


@triton.jit
def tile_kernel(x, scale, bias, sums, columns, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """`sigray.losses.fused.negative_terms_` for one row.

    Args:
        x: (R, C), contiguous, float32 or bfloat16.
        scale, bias: float32 scalars on the device, so that the host does not wait for them.
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
        # log(1 + e) for 0 <= e <= 1, relative error 4e-7.
        p = -0.008574675768613815 * e + 0.044214192777872086
        p = p * e - 0.10785368084907532
        p = p * e + 0.17757023870944977
        p = p * e - 0.2449961155653
        p = p * e + 0.3327617645263672
        p = p * e - 0.49997448921203613
        p = p * e + 0.9999998211860657
        # Both comparisons are false for NaN, so NaN stays NaN.
        sigmoid = tl.where(z < 0.0, e, 1.0) / (1.0 + e)
        loss += tl.where(z < 0.0, 0.0, z) + p * e
        grad_bias += sigmoid
        grad_scale += cosine * sigmoid
        tl.store(x + row * columns + place, sigmoid.to(x.dtype.element_ty), mask=inside)
        start += BLOCK
    # No other program writes to this row.
    tl.store(sums + row, tl.load(sums + row) + tl.sum(loss))
    tl.store(sums + stride + row, tl.load(sums + stride + row) + tl.sum(grad_bias))
    tl.store(sums + 2 * stride + row, tl.load(sums + 2 * stride + row) + tl.sum(grad_scale))


def negative_terms_cuda_(x: Tensor, scale: Tensor, bias: Tensor, sums: Tensor) -> None:
    """`sigray.losses.fused.negative_terms_` for float32 sums on a CUDA device."""
    tile_kernel[(len(x),)](x, scale, bias, sums, x.shape[1], sums.stride(0), BLOCK=BLOCK, num_warps=NUM_WARPS)
