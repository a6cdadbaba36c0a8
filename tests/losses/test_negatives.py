"""Selected negatives against a twin that holds all cosines and sorts them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigray.losses import Negatives, sigmoid_loss
from sigray.losses.negatives import _random_mask
from tests.helpers.losses import scalars, sorted_twin, value_and_gradients
from tests.helpers.reference import random_features


@settings(max_examples=60)
@given(
    num_images=st.integers(1, 9),
    num_texts=st.integers(1, 9),
    positive_offset=st.integers(-3, 3),
    keep=st.sampled_from(["hardest", "easiest"]),
    fraction=st.sampled_from([1e-6, 0.1, 0.5, 0.99]),
    tile_size=st.integers(1, 11),
    seed=st.integers(0, 1000),
)
def test_hardest_and_easiest_equal_the_sorted_twin(
    num_images, num_texts, positive_offset, keep, fraction, tile_size, seed
):
    inputs = (random_features(num_images, 4, seed=seed), random_features(num_texts, 4, seed=seed + 1))
    inputs += scalars(10.0, -3.0)
    negatives = Negatives(keep, fraction)
    expected = value_and_gradients(lambda *x: sorted_twin(*x, positive_offset, negatives), *inputs)
    actual = value_and_gradients(
        lambda *x: sigmoid_loss(*x, positive_offset=positive_offset, negatives=negatives, tile_size=tile_size), *inputs
    )
    for want, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def random_kept(num_images, num_texts, fraction, seed):
    x = torch.zeros(num_images, num_texts)
    return ~_random_mask(seed, fraction)(x, 0, 0)


def test_random_negatives_are_as_many_as_asked_and_independent():
    kept = random_kept(1500, 1400, 0.2, seed=5).double()
    # Four standard deviations of a binomial draw; rows, columns and neighbours must not hang together.
    assert float(kept.mean()) == pytest.approx(0.2, abs=4 * (0.16 / kept.numel()) ** 0.5)
    for dim in (0, 1):
        deviation = (0.16 / kept.shape[dim]) ** 0.5
        assert float(kept.mean(dim=dim).std()) == pytest.approx(deviation, rel=0.1)
    other = random_kept(1500, 1400, 0.2, seed=6).double()
    for first, second in ((kept, other), (kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1])):
        both = float((first * second).mean())
        assert both == pytest.approx(0.04, abs=5 * (0.04 / first.numel()) ** 0.5)


def test_random_negatives_do_not_depend_on_tiles():
    inputs = (random_features(13, 4, seed=0), random_features(17, 4, seed=1), *scalars(10.0, -3.0))
    negatives = Negatives("random", 0.4, seed=9)
    values = {
        tile_size: value_and_gradients(lambda *x: sigmoid_loss(*x, negatives=negatives, tile_size=tile_size), *inputs)  # noqa: B023
        for tile_size in (3, 5, 100)
    }
    for tile_size in (3, 5):
        for want, got in zip(values[100], values[tile_size], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    twin_kept = random_kept(13, 17, 0.4, seed=9) | torch.eye(13, 17, dtype=torch.bool)
    z = 10 * inputs[0] @ inputs[1].T - 3
    terms = torch.nn.functional.softplus(torch.where(torch.eye(13, 17, dtype=torch.bool), -z, z))
    torch.testing.assert_close(values[100][0], terms[twin_kept].sum() / 13, rtol=1e-12, atol=0)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        Negatives("random", fraction)
