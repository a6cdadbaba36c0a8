"""The ring on 1 to 8 gloo ranks against one process that sees the whole batch; its bytes; what it refuses."""

import functools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from sigray.losses import Negatives, NonFiniteFeatures, ring_sigmoid_loss, ring_softmax_loss, sigmoid_loss_plain
from sigray.losses.softmax import softmax_loss_plain
from tests.helpers.losses import sorted_twin
from tests.helpers.ranks import run_on_ranks
from tests.helpers.reference import random_features

DIM = 5


def inputs(num_pairs, dtype=torch.float64):
    features = [random_features(num_pairs, DIM, seed=seed, dtype=dtype) for seed in (0, 1)]
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    return [*features, torch.tensor(10.0, dtype=scalar), torch.tensor(-8.0, dtype=scalar)]


def ring_on_rank(rank, world_size, cases, loss=ring_sigmoid_loss):
    """For each case (pairs per rank, dtype, tile size): value, gradients, bytes sent, messages sent."""
    results = []
    for num_pairs, dtype, tile_size in cases:
        image, text, scale, bias = inputs(num_pairs * world_size, dtype)
        part = slice(rank * num_pairs, (rank + 1) * num_pairs)
        leaves = [leaf.clone().requires_grad_() for leaf in (image[part], text[part], scale, bias)]
        sent = []
        batch = dist.batch_isend_irecv

        def counted(messages, batch=batch, sent=sent):
            sent.extend(op.tensor.nbytes for op in messages if op.op is dist.isend)
            return batch(messages)

        dist.batch_isend_irecv = counted
        value = loss(*leaves, tile_size=tile_size)
        dist.batch_isend_irecv = batch
        results.append(([value.detach(), *torch.autograd.grad(value, leaves)], sum(sent), len(sent)))
    return results


def whole(ranks):
    """Mean of values and scalar gradients, features' gradients laid side by side: those of the global batch."""
    world_size = len(ranks)
    values, images, texts, scales, biases = zip(*ranks, strict=True)
    return [
        torch.stack(values).mean(),
        torch.cat(images) / world_size,
        torch.cat(texts) / world_size,
        torch.stack(scales).mean(),
        torch.stack(biases).mean(),
    ]


def oracle(plain, num_pairs, dtype):
    leaves = [leaf.double().requires_grad_() for leaf in inputs(num_pairs, dtype)]
    value = plain(*leaves)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros(()) if g is None else g for g in gradients)]


CASES = [(1, torch.float64, 2), (2, torch.float64, 100), (7, torch.float64, 3), (12, torch.float32, 5)]
CASES += [(9, torch.bfloat16, 4), (4, torch.float16, 100)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_mean_over_ranks_is_the_loss_of_the_global_batch(rank_groups, world_size, name):
    ring, plain = {
        "sigmoid": (ring_sigmoid_loss, sigmoid_loss_plain),
        "softmax": (ring_softmax_loss, lambda image, text, scale, bias: softmax_loss_plain(image, text, scale)),
    }[name]
    ranks = rank_groups(world_size).run(functools.partial(ring_on_rank, loss=ring), CASES)
    for number, (num_pairs, dtype, _) in enumerate(CASES):
        actual = whole([rank[number][0] for rank in ranks])
        for want, got in zip(oracle(plain, num_pairs * world_size, dtype), actual, strict=True):
            # float64: other order of additions. Others: the inputs are the same numbers; sums are float32, feature
            # gradients are rounded once to their own dtype (the softmax multiplies dL/dz in that dtype, too).
            eps = max(torch.finfo(dtype).eps, 1e-12)
            tolerance = 1e-11 if dtype == torch.float64 else max(4 * eps, 1e-5)
            torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)
        if name == "sigmoid":
            size, sums = torch.finfo(dtype).bits // 8, 8 if dtype == torch.float64 else 4
            for rank in ranks:
                # (R - 1) b D features and the same number of sums of gradients: nothing is sent twice.
                assert rank[number][1] == (world_size - 1) * num_pairs * DIM * (size + sums)
                assert rank[number][2] == 2 * (world_size - 1) * min(num_pairs, 2)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@settings(max_examples=20)
@given(
    num_pairs=st.integers(1, 9),
    tile_size=st.integers(1, 12),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_cut(rank_groups, world_size, num_pairs, tile_size, dtype):
    ranks = rank_groups(world_size).run(ring_on_rank, [(num_pairs, dtype, tile_size)])
    actual = whole([rank[0][0] for rank in ranks])
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for want, got in zip(oracle(sigmoid_loss_plain, num_pairs * world_size, dtype), actual, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("keep", ["hardest", "easiest"])
def test_threshold_is_that_of_the_global_batch(rank_groups, keep):
    negatives = Negatives(keep, 0.25)
    ring = functools.partial(ring_sigmoid_loss, negatives=negatives)
    ranks = rank_groups(4).run(functools.partial(ring_on_rank, loss=ring), [(5, torch.float64, 3)])
    expected = oracle(lambda *x: sorted_twin(*x, 0, negatives), 20, torch.float64)
    for want, got in zip(expected, whole([rank[0][0] for rank in ranks]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def ring_in_subgroup(rank, world_size):
    """Ranks 1 and 2 of three form the ring: group ranks are not world ranks."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    image, text, scale, bias = inputs(12)
    part = slice((rank - 1) * 6, rank * 6)
    return ring_sigmoid_loss(image[part], text[part], scale, bias, group=group)


def test_ring_in_a_subgroup():
    _, first, second = run_on_ranks(3, ring_in_subgroup)
    torch.testing.assert_close((first + second) / 2, sigmoid_loss_plain(*inputs(12)), rtol=1e-12, atol=0)


def refused(rank, world_size, spoil):
    image, text, scale, bias = inputs(8)
    image, text, scale, bias = spoil(rank, image, text, scale, bias)
    try:
        ring_sigmoid_loss(image, text, scale, bias)
    except (ValueError, NonFiniteFeatures) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def uneven(rank, image, text, scale, bias):
    return image[: 8 - rank], text[: 8 - rank], scale, bias


def unpaired(rank, image, text, scale, bias):
    return image, text[: 8 - (rank == 2)], scale, bias


def poisoned_image(rank, image, text, scale, bias):
    return image.index_fill(0, torch.tensor([3]), torch.inf) if rank == 1 else image, text, scale, bias


def poisoned_scale(rank, image, text, scale, bias):
    return image, text, scale * (torch.nan if rank == 2 else 1), bias


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (uneven, "ValueError: the ranks hold unequal batches (8, 7, 6 pairs"),
        (unpaired, "ValueError: rank 2 holds 8 images and 7 texts"),
        (poisoned_image, "NonFiniteFeatures: NaN or infinity in image_features of rank 1, row 3"),
        (poisoned_scale, "NonFiniteFeatures: NaN or infinity in logit_scale of rank 2, row 0"),
    ],
)
def test_every_rank_refuses_with_the_same_message(rank_groups, spoil, message):
    messages = rank_groups(3).run(refused, spoil)
    assert messages[0].startswith(message)
    assert messages == [messages[0]] * 3


def test_more_images_than_texts_is_refused_on_one_process():
    image, text, scale, bias = inputs(12)
    with pytest.raises(ValueError, match="12 images and 11 texts"):
        ring_sigmoid_loss(image, text[:-1], scale, bias)
