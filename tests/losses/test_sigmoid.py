"""The one-pass loss against the pair-by-pair twin: value and the gradient of every input."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigray.losses import sigmoid_loss, sigmoid_loss_plain
from tests.helpers.losses import scalars, value_and_gradients
from tests.helpers.reference import pair_loss, random_features


def matrix_loss(image, text, scale, bias, positive_offset):
    """`pair_loss` with all logits at once, for larger blocks."""
    z = scale * image @ text.T + bias
    columns = torch.arange(len(text))[None, :] - torch.arange(len(image))[:, None]
    is_pair = columns == positive_offset if positive_offset is not None else torch.zeros_like(columns, dtype=torch.bool)
    return torch.nn.functional.softplus(torch.where(is_pair, -z, z)).sum() / len(image)


@settings(max_examples=60)
@given(
    num_images=st.integers(1, 9),
    num_texts=st.integers(1, 9),
    dim=st.integers(1, 6),
    positive_offset=st.one_of(st.none(), st.integers(-10, 10)),
    tile_size=st.integers(1, 11),
    scale=st.sampled_from([1e-3, 1.0, 10.0, 1e4]),
    bias=st.sampled_from([-10.0, 0.0, 3.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_sum_over_pairs(num_images, num_texts, dim, positive_offset, tile_size, scale, bias, seed):
    inputs = random_features(num_images, dim, seed=seed), random_features(num_texts, dim, seed=seed + 1)
    inputs += scalars(scale, bias)
    expected = value_and_gradients(lambda *x: pair_loss(*x, positive_offset), *inputs)
    actual = value_and_gradients(
        lambda *x: sigmoid_loss(*x, positive_offset=positive_offset, tile_size=tile_size), *inputs
    )
    for want, got in zip(expected, actual, strict=True):
        # Both float64; they differ by the order of at most 81 additions of numbers up to 1e4.
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_plain_equation_is_the_same_loss():
    inputs = (random_features(7, 5, seed=0), random_features(7, 5, seed=1), *scalars(10.0, -10.0))
    for want, got in zip(
        value_and_gradients(lambda *x: pair_loss(*x, 0), *inputs),
        value_and_gradients(sigmoid_loss_plain, *inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@settings(max_examples=60)
@given(
    num_images=st.integers(1, 40),
    num_texts=st.integers(1, 40),
    positive_offset=st.one_of(st.none(), st.integers(-41, 41)),
    tile_size=st.one_of(st.none(), st.integers(1, 50)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bfloat16_products=st.booleans(),
    scale=st.sampled_from([1.0, 10.0, 100.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_in_any_dtype(
    num_images, num_texts, positive_offset, tile_size, dtype, bfloat16_products, scale, seed
):
    image, text = random_features(num_images, 8, seed=seed, dtype=dtype), random_features(num_texts, 8, seed=seed + 1)
    inputs = image, text.to(dtype), *scalars(scale, -10.0, torch.float32)
    expected = value_and_gradients(lambda *x: matrix_loss(*x, positive_offset), *(tensor.double() for tensor in inputs))
    with mock.patch("sigray.losses.tiles.has_bfloat16_products", return_value=bfloat16_products):
        actual = value_and_gradients(
            lambda *x: sigmoid_loss(*x, positive_offset=positive_offset, tile_size=tile_size), *inputs
        )
    # Products in bfloat16 round every x and dL/dz by 2**-8: z is wrong by scale * 2**-8 at most (|x| <= 1), and a
    # term of the loss, and dL/dz, by as much relative to itself.
    rough = dtype == torch.bfloat16 and bfloat16_products
    relative = scale * 2**-8 + 2**-7 if rough else 2e-5
    for want, got in zip(expected, actual, strict=True):
        relative_here = relative + 2 * torch.finfo(got.dtype).eps
        torch.testing.assert_close(
            got.double(), want, rtol=relative_here, atol=relative_here * float(want.abs().max()) + 1e-7
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_features_are_accumulated_in_float32(dtype):
    image, text = random_features(64, 32, seed=0, dtype=dtype), random_features(64, 32, seed=1, dtype=dtype)
    scale, bias = scalars(10.0, -10.0, torch.float32)
    expected = value_and_gradients(sigmoid_loss_plain, image.double(), text.double(), scale.double(), bias.double())
    # Products in bfloat16, if a processor has them, round x and dL/dz too; test_any_shape_in_any_dtype bounds that.
    with mock.patch("sigray.losses.tiles.has_bfloat16_products", return_value=False):
        actual = value_and_gradients(lambda *x: sigmoid_loss(*x, tile_size=20), image, text, scale, bias)
    assert actual[0].dtype == torch.float32
    assert [tensor.dtype for tensor in actual[1:]] == [dtype, dtype, torch.float32, torch.float32]
    # The features are the same numbers in both, so the value is exact to float32; feature gradients are rounded once
    # to the features' own dtype (relative 2**-8 for bfloat16).
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-5, atol=0)
    for want, got in zip(expected[1:3], actual[1:3], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    for want, got in zip(expected[3:], actual[3:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_equals_open_clip():
    from open_clip.loss import SigLipLoss

    inputs = (random_features(32, 16, seed=0), random_features(32, 16, seed=1), *scalars(10.0, -10.0))
    for want, got in zip(
        value_and_gradients(SigLipLoss(), *inputs), value_and_gradients(sigmoid_loss, *inputs), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_no_overflow_far_beyond_exp():
    image = random_features(4, 3, seed=0, dtype=torch.float32)
    results = value_and_gradients(sigmoid_loss, image, image, *scalars(1e6, -10.0, torch.float32))
    assert all(torch.isfinite(result).all() for result in results)


def test_second_differentiation_is_refused():
    inputs = [random_features(3, 2, seed=0).requires_grad_(), random_features(3, 2, seed=1), *scalars(10.0, -10.0)]
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(sigmoid_loss(*inputs), inputs[:1], create_graph=True)


def test_second_backward_pass_is_refused():
    inputs = [random_features(3, 2, seed=0).requires_grad_(), random_features(3, 2, seed=1), *scalars(10.0, -10.0)]
    loss = sigmoid_loss(*inputs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Compute the loss again"):
        loss.backward()


def test_gradients_follow_the_factor_before_the_loss():
    inputs = (random_features(5, 3, seed=0), random_features(5, 3, seed=1), *scalars(10.0, -10.0))
    for want, got in zip(
        value_and_gradients(lambda *x: 3 * sigmoid_loss_plain(*x) ** 2, *inputs),
        value_and_gradients(lambda *x: 3 * sigmoid_loss(*x) ** 2, *inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 5)),
        (torch.zeros(3, 4), torch.zeros(3, 4).bfloat16()),
        (torch.zeros(0, 4), torch.zeros(3, 4)),
        (torch.zeros(3, 4, dtype=torch.int32), torch.zeros(3, 4, dtype=torch.int32)),
        (torch.zeros(4), torch.zeros(4)),
    ],
)
def test_features_that_do_not_fit_are_refused(image, text):
    with pytest.raises(ValueError, match="image_features .* and text_features .*: expected"):
        sigmoid_loss(image, text, *scalars(10.0, -10.0))


def test_memory_is_one_tile_and_what_it_returns():
    """Torch's own allocations, counted: a tile, the three things that grow with B, and vectors."""
    size, dim, tile = 1024, 16, 128
    inputs = [random_features(size, dim, seed=seed, dtype=torch.float32) for seed in (0, 1)]
    inputs = [tensor.requires_grad_() for tensor in (*inputs, *scalars(10.0, -10.0, torch.float32))]
    sigmoid_loss(*inputs, tile_size=tile).backward()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        sigmoid_loss(*inputs, tile_size=tile).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= tile * tile * 4 + 2 * size * dim * 4 + 64 * size
    assert largest < size * size  # a quarter of a B x B matrix


XLA_PROGRAM = """
import torch_xla

device = torch_xla.device()  # before any backward pass: torch counts its devices at the first one

from sigray.losses import sigmoid_loss, sigmoid_loss_plain
from tests.helpers.losses import scalars, value_and_gradients
from tests.helpers.reference import random_features
import torch

inputs = random_features(12, 8, seed=0), random_features(12, 8, seed=1), *scalars(10.0, -10.0)
inputs = [tensor.float() for tensor in inputs]
expected = value_and_gradients(sigmoid_loss_plain, *(tensor.double() for tensor in inputs))
actual = value_and_gradients(sigmoid_loss, *(tensor.to(device) for tensor in inputs))
for want, got in zip(expected, actual, strict=True):
    assert got.device.type == "xla", got.device
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-6)
print("equal on", device)
"""


def test_runs_on_an_xla_device(torch_xla, minutes):
    done = subprocess.run(
        [sys.executable, "-c", XLA_PROGRAM], env=os.environ | {"PJRT_DEVICE": "CPU"}, capture_output=True, text=True
    )
    assert "equal on xla" in done.stdout, done.stderr
