"""Means of all pairs' logits from means of features, against the matrix they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sigray.losses import feature_means, mean_logits
from tests.helpers.reference import random_features


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_means_equal_those_of_the_matrix(num_ranks, num_rows, dim, seed):
    """However the rows are dealt to ranks; float64, so that only the order of additions differs."""
    num_pairs = num_ranks * num_rows
    image, text = random_features(num_pairs, dim, seed=seed), random_features(num_pairs, dim, seed=seed + 100)
    scale, bias = 7.0, -3.0
    z = scale * image @ text.T + bias
    is_pair = torch.eye(num_pairs, dtype=torch.bool)
    parts = [feature_means(*part) for part in zip(image.chunk(num_ranks), text.chunk(num_ranks), strict=True)]
    positive, negative = mean_logits(torch.stack(parts).mean(dim=0).tolist(), num_pairs, scale, bias)
    assert positive == pytest.approx(float(z[is_pair].mean()), abs=1e-12)
    if num_pairs == 1:
        assert negative is None
    else:
        assert negative == pytest.approx(float(z[~is_pair].mean()), abs=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_not_taken_in_the_features_dtype(dtype):
    """And rows may lie in slices, as under XLA; no graph is kept."""
    image, text = (random_features(4096, 8, seed=seed, dtype=dtype).requires_grad_() for seed in (0, 1))
    found = feature_means(image.view(4, 1024, 8), text.view(4, 1024, 8))
    assert (found.dtype, found.requires_grad) == (torch.float32, False)
    expected = feature_means(image.detach().double(), text.detach().double())
    # Rounded features, exact products in float32: only the additions round.
    assert torch.allclose(found.double(), expected, atol=1e-6)
