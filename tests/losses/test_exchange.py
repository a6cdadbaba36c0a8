"""The ring on 1, 2 and 3 gloo ranks against one process that sees the whole batch."""

import pytest
import torch
import torch.distributed as dist

from losses import ring_sigmoid_loss, sigmoid_loss_plain
from tests.ranks import run_on_ranks
from tests.reference import random_features

NUM_PAIRS, DIM = 12, 5


def inputs():
    features = random_features(NUM_PAIRS, DIM, seed=0), random_features(NUM_PAIRS, DIM, seed=1)
    return [*features, torch.tensor(10.0, dtype=torch.float64), torch.tensor(-8.0, dtype=torch.float64)]


def ring_on_rank(rank, world_size):
    image, text, scale, bias = inputs()
    part = slice(rank * NUM_PAIRS // world_size, (rank + 1) * NUM_PAIRS // world_size)
    leaves = [image[part].clone(), text[part].clone(), scale, bias]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    loss = ring_sigmoid_loss(*leaves, tile_size=3)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_mean_over_ranks_is_the_loss_of_the_global_batch(world_size):
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    loss = sigmoid_loss_plain(*leaves)
    expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    ranks = run_on_ranks(world_size, ring_on_rank)
    actual = [
        torch.stack([results[0] for results in ranks]).mean(),
        torch.cat([results[1] for results in ranks]) / world_size,
        torch.cat([results[2] for results in ranks]) / world_size,
        torch.stack([results[3] for results in ranks]).mean(),
        torch.stack([results[4] for results in ranks]).mean(),
    ]
    for want, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)  # float64, other order of additions


def ring_in_subgroup(rank, world_size):
    """Ranks 1 and 2 of three form the ring: group ranks are not world ranks."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    image, text, scale, bias = inputs()
    part = slice((rank - 1) * 6, rank * 6)
    return ring_sigmoid_loss(image[part], text[part], scale, bias, group=group)


def test_ring_in_a_subgroup():
    _, first, second = run_on_ranks(3, ring_in_subgroup)
    torch.testing.assert_close((first + second) / 2, sigmoid_loss_plain(*inputs()), rtol=1e-12, atol=0)


def test_more_images_than_texts_is_refused():
    image, text, scale, bias = inputs()
    with pytest.raises(ValueError, match="12 images and 11 texts"):
        ring_sigmoid_loss(image, text[:-1], scale, bias)
