"""Resizing against its equation in integers, written out, and against torch; without a compiler; in both widths."""

import functools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sigray.native import cpu_flags
from sigray.workers.data import resize as module
from sigray.workers.data.resize import resize
from tests.helpers.images import image, resize_by_torch, resized

needs_avx2 = pytest.mark.skipif("avx2" not in cpu_flags(), reason="no AVX2: torch resizes here")


def cubic(x: float) -> float:
    """Keys, "Cubic convolution interpolation for digital image processing" (1981), a = -1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def matrix(source: int, target: int) -> tuple[np.ndarray, int]:
    """(target, source) weights of an axis as integers, and their fractional bits."""
    scale = source / target
    stretch = max(scale, 1.0)
    weights = np.zeros((target, source))
    for i in range(target):
        center = (i + 0.5) * scale
        for j in range(max(0, int(center - 2 * stretch + 0.5)), min(source, int(center + 2 * stretch + 0.5))):
            weights[i, j] = cubic((j + 0.5 - center) / stretch)
    weights /= weights.sum(axis=1, keepdims=True)
    bits = 0
    while bits < 22 and int(weights.max() * 2 ** (bits + 1) + 0.5) < 2**15:
        bits += 1
    return np.trunc(weights * 2**bits + np.copysign(0.5, weights)).astype(np.int64), bits


def resize_written_out(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Rows first, rounded to bytes, then columns."""
    (down, down_bits), (across, across_bits) = matrix(pixels.shape[0], size[0]), matrix(pixels.shape[1], size[1])

    def rounded(sums: np.ndarray, bits: int) -> np.ndarray:
        return np.clip((sums + (1 << bits >> 1)) >> bits, 0, 255)

    rows = rounded(np.einsum("ij,yjc->yic", across, pixels.astype(np.int64)), across_bits)
    return rounded(np.einsum("ij,jxc->ixc", down, rows), down_bits).astype(np.uint8)


def test_the_compiled_library_is_what_is_tested_here():
    assert "avx2" not in cpu_flags() or module._library() is not None, "no C compiler: these tests would test torch"


@settings(max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.integers(1, 60))
@example(1, 1, 1, 1)
@example(1, 90, 60, 1)
@example(90, 1, 1, 60)
@example(33, 49, 33, 49)  # of the same size: nothing happens
def test_pixels_are_the_equations(height, width, to_height, to_width):
    pixels = image(
        height, width, "black and white" if (height + width) % 2 else "noise"
    )  # overshoots, if anything does
    np.testing.assert_array_equal(
        resized(pixels, (to_height, to_width)), resize_written_out(pixels, (to_height, to_width))
    )


@settings(max_examples=150)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 300), st.integers(1, 300), st.booleans())
@example(1, 2500, 224, 224, True)
@example(3000, 17, 10, 224, False)
@example(417, 407, 224, 224, True)
@example(224, 224, 224, 224, True)
def test_pixels_are_torchs(height, width, to_height, to_width, is_noise):
    pixels = image(height, width, "noise" if is_noise else "black and white")
    size = to_height, to_width
    np.testing.assert_array_equal(resized(pixels, size), resize_by_torch(pixels, size))


@settings(max_examples=100)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 80), st.integers(1, 80), st.data())
def test_a_part_is_that_part_of_the_whole(height, width, to_height, to_width, data):
    pixels, size = image(height, width), (to_height, to_width)
    corner = tuple(data.draw(st.integers(0, whole - 1)) for whole in size)
    part = tuple(data.draw(st.integers(1, whole - begin)) for whole, begin in zip(size, corner, strict=True))
    out = np.full((part[0] + 1, part[1], 3), 77, np.uint8)  # a row more: nothing is written after the end
    resize(pixels, out[:-1], size=size, corner=corner)
    whole = resized(pixels, size)
    np.testing.assert_array_equal(out[:-1], whole[corner[0] : corner[0] + part[0], corner[1] : corner[1] + part[1]])
    assert (out[-1] == 77).all()


def test_a_part_by_torch_is_that_part_of_the_whole(monkeypatch):
    monkeypatch.setattr(module, "_library", lambda: None)
    out = np.empty((5, 7, 3), np.uint8)
    resize(image(40, 30), out, size=(16, 12), corner=(9, 4))
    np.testing.assert_array_equal(out, resize_by_torch(image(40, 30), (16, 12))[9:14, 4:11])


@pytest.mark.parametrize(
    "view",
    [
        lambda pixels: pixels[5:-7, 3:-2],
        lambda pixels: pixels[::-1],
        lambda pixels: pixels[:, ::-1],
        lambda pixels: pixels.swapaxes(0, 1),
        lambda pixels: np.broadcast_to(pixels[:, :, :1], pixels.shape),
        lambda pixels: pixels[10:11],
        lambda pixels: pixels[:, 10:11],
    ],
    ids=["box", "upside down", "mirrored", "turned", "grey", "one row", "one column"],
)
@pytest.mark.parametrize("is_read_only", [False, True])
@pytest.mark.parametrize("has_library", [False, True])
def test_views_are_resized_as_their_copies(view, is_read_only, has_library, monkeypatch):
    if not has_library:
        monkeypatch.setattr(module, "_library", lambda: None)
    pixels = image(61, 75)
    pixels.flags.writeable = not is_read_only
    pixels = view(pixels)
    np.testing.assert_array_equal(resized(pixels, (32, 40)), resize_by_torch(pixels, (32, 40)))


AT_THE_END_OF_MEMORY = """
import ctypes, mmap
import numpy as np
from tests.helpers.images import image, resize_by_torch, resized

memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
pages = np.frombuffer(memory, np.uint8)
libc = ctypes.CDLL(None)
assert libc.mprotect(ctypes.c_void_p(pages.ctypes.data + mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
for width in range(1, 60):
    height = mmap.PAGESIZE // (3 * width)
    pixels = pages[mmap.PAGESIZE - 3 * width * height : mmap.PAGESIZE].reshape(height, width, 3)
    pixels[:] = image(height, width)
    assert (resized(pixels, (20, 20)) == resize_by_torch(image(height, width), (20, 20))).all()
print("read no further")
"""


def test_nothing_is_read_behind_an_image():
    """A read after the end hits a protected page; rows end inside a vector that is read at once."""
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END_OF_MEMORY], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "read no further\n", (done.returncode, done.stderr)


@needs_avx2
def test_narrow_vectors_give_the_same_pixels(monkeypatch):
    """Where AVX-512 is, the kernel for processors without it."""
    narrow = module._library(module._NARROW)
    assert narrow is not None
    expected = {}
    shapes = [(417, 407, 224, 224), (1, 1, 3, 5), (50, 1000, 7, 33), (224, 224, 256, 256), (640, 480, 299, 224)]
    for shape in shapes:
        expected[shape] = resized(image(*shape[:2]), shape[2:])
    monkeypatch.setattr(module, "_library", lambda: narrow)
    for shape in shapes:
        np.testing.assert_array_equal(resized(image(*shape[:2]), shape[2:]), expected[shape])


@pytest.mark.parametrize("corner", [(-1, 0), (0, 3), (3, 0)])
def test_a_part_outside_is_refused(corner):
    with pytest.raises(AssertionError):
        resize(image(9, 9), np.empty((4, 4, 3), np.uint8), size=(6, 6), corner=corner)


def test_without_a_compiler_torch_resizes_and_that_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "/nowhere/cc")
    monkeypatch.setattr(module, "_library", functools.cache(module._library.__wrapped__))
    monkeypatch.setattr(module, "cpu_flags", lambda: frozenset({"avx2"}))
    with pytest.warns(UserWarning, match="images are resized by torch, .*/nowhere/cc failed"):
        out = resized(image(30, 40), (16, 16))
    np.testing.assert_array_equal(out, resize_by_torch(image(30, 40), (16, 16)))
