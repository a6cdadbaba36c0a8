"""Resize uint8 images by an antialiased bicubic or bilinear filter, in C or torch.

    h, w  size of the image        H, W  size after resizing        S, S'  size of the part that is written

The C code needs a compiler and AVX2. Its pixels are torch's, and so torchvision's: the same integers, rounded in the
same places (`resize.c`). So a sample is the same on a machine with a compiler and on one without.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Literal

import numpy as np

from sigray.native import compiled, cpu_flags

Interpolation = Literal["bicubic", "bilinear"]

_REACH = {"bicubic": 2, "bilinear": 1}  # of the filter, in pixels
_SOURCE = Path(__file__).with_name("resize.c")
_NARROW = "-mno-avx512vbmi"  # as for a processor with AVX2 only
# A multiplication and an addition are rounded separately: the same weights on every machine.
_FLAGS = ["-ffp-contract=off"]


def resize(
    pixels: np.ndarray,
    out: np.ndarray,
    *,
    size: tuple[int, int],
    corner: tuple[int, int] = (0, 0),
    interpolation: Interpolation = "bicubic",
) -> None:
    """Resize an image and write a part of the result to `out`.

    Args:
        pixels: (h, w, 3) uint8, any strides.
        out: (S, S', 3) uint8, C-contiguous; overwritten.
        size: (H, W).
        corner: row and column of the resized image that (0, 0) of `out` is.

    Raises:
        MemoryError: the working memory, a few times the image's, is missing.
    """
    assert pixels.dtype == out.dtype == np.uint8
    assert out.flags.c_contiguous
    assert all(
        begin >= 0 and begin + part <= whole for begin, part, whole in zip(corner, out.shape, size, strict=False)
    )
    if pixels.strides[1:] != (3, 1):  # mirrored or turned by its EXIF orientation, or grey
        pixels = np.ascontiguousarray(pixels)
    library = _library()
    if library is None:
        _resize_by_torch(pixels, out, size, corner, interpolation)
    else:
        _resize_by_library(library, pixels, out, size, corner, interpolation)


def _resize_by_library(
    library: ctypes.CDLL,
    pixels: np.ndarray,
    out: np.ndarray,
    size: tuple[int, int],
    corner: tuple[int, int],
    interpolation: Interpolation,
) -> None:
    image = pixels.ctypes.data, pixels.strides[0], *pixels.shape[:2]
    if library.resize_rgb(*image, *size, *corner, out.ctypes.data, *out.shape[:2], _REACH[interpolation]):
        raise MemoryError(f"no memory to resize {pixels.shape[0]} x {pixels.shape[1]} pixels")


def _resize_by_torch(
    pixels: np.ndarray, out: np.ndarray, size: tuple[int, int], corner: tuple[int, int], interpolation: Interpolation
) -> None:
    import torch

    if not pixels.flags.carray:  # torch takes no negative strides, and warns about read-only arrays
        pixels = pixels.copy()
    whole = out if size == out.shape[:2] else np.empty((*size, 3), np.uint8)
    tensors = (torch.from_numpy(array).permute(2, 0, 1).unsqueeze(0) for array in (pixels, whole))
    upsample = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa")
    upsample.out(next(tensors), size, False, None, None, out=next(tensors))
    if whole is not out:
        top, left = corner
        height, width = out.shape[:2]
        out[:] = whole[top : top + height, left : left + width]


@functools.cache
def _library(*flags: str) -> ctypes.CDLL | None:
    """Compile the C source for this processor; None without AVX2 or a compiler."""
    if "avx2" not in cpu_flags():
        return None
    without = "images are resized by torch, which takes twice as long"
    library = compiled(_SOURCE, flags=[*_FLAGS, *flags], without=without)
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.resize_rgb.argtypes = [pointer, *[number] * 7, pointer, number, number, ctypes.c_int]
    return library
