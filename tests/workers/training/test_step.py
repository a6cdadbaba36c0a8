"""One step, however the global batch is cut, against one process that sees all of it: loss and every gradient."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from sigray.losses import mean_logits, sigmoid_loss_plain
from sigray.workers.config import LossConfig, ModelConfig, OptimConfig
from sigray.workers.device import Device, check_collectives
from sigray.workers.model.towers import normalize_pixels
from sigray.workers.training.optim import build_optimizer, learning_rate
from sigray.workers.training.step import Trainer
from tests.helpers.data import TOWERS
from tests.helpers.ranks import run_on_ranks
from tests.helpers.reference import step_gradients
from tests.helpers.steps import (
    MODEL,
    NUM_PAIRS,
    SEED,
    WITH_DROPOUT,
    check_gradients,
    global_batch,
    make_trainer,
    part_of,
)


def step_on_rank(rank, world_size, num_micro_batches=1, **settings):
    """Loss, gradients and new weights of one step, and what the mean logits come from."""
    size = NUM_PAIRS // world_size // num_micro_batches
    trainer = make_trainer(world_size, micro_batch_size=size, **settings)
    batch = part_of(rank, world_size)
    result = trainer.step(batch)
    gradients = {name: parameter.grad for name, parameter in trainer.module.named_parameters()}
    figures = result.feature_means.tolist(), float(result.logit_scale), float(result.logit_bias)
    return float(result.loss), gradients, trainer.module.state_dict(), figures


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_loss_and_every_gradient_equal_the_oracle(rank_groups, world_size, num_micro_batches):
    expected_loss, expected, module = step_gradients(MODEL, SEED, *global_batch())
    ranks = rank_groups(world_size).run(step_on_rank, num_micro_batches)
    assert sum(rank[0] for rank in ranks) / world_size == pytest.approx(expected_loss, rel=1e-5)
    for _, gradients, _, _ in ranks:
        check_gradients(gradients, expected)
    for name, tensor in ranks[0][2].items():
        assert all(torch.equal(tensor, rank[2][name]) for rank in ranks), name
    check_mean_logits([rank[3] for rank in ranks], module)


def check_mean_logits(figures, module):
    """Against every entry of the float64 matrix of logits."""
    images, tokens = global_batch()
    with torch.no_grad():
        output = module(normalize_pixels(images, MODEL).double(), tokens)
        z = output["logit_scale"] * output["image_features"] @ output["text_features"].T + output["logit_bias"]
    is_pair = torch.eye(NUM_PAIRS, dtype=torch.bool)
    means = np.mean([means for means, _, _ in figures], axis=0)
    positive, negative = mean_logits(means.tolist(), NUM_PAIRS, *figures[0][1:])
    # Cosines differ by some 1e-6 (float32 towers), times a scale of 10; the two means must be told apart.
    assert positive == pytest.approx(float(z[is_pair].mean()), abs=3e-5)
    assert negative == pytest.approx(float(z[~is_pair].mean()), abs=3e-5)
    assert abs(float(z[is_pair].mean() - z[~is_pair].mean())) > 1e-3


def dropout_step(rank, world_size, num_micro_batches):
    """A step with dropout, and its slow twin on this rank: the same draws, one graph over all micro-batches, float64.

    The twin needs the other ranks' features: it gathers them with autograd of its own.
    """
    size = NUM_PAIRS // world_size // num_micro_batches
    twin = make_trainer(world_size, model=WITH_DROPOUT, micro_batch_size=size)
    twin.module.double()
    batch = part_of(rank, world_size)
    twin._device = Float64(torch.device("cpu"), "fp32")
    twin.module.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), inputs[1]))
    parts = [twin._encode(batch, slice(n * size, (n + 1) * size), n) for n in range(num_micro_batches)]
    image, text = (torch.cat(kind) for kind in zip(*parts, strict=True))
    if world_size > 1:
        from torch.distributed.nn.functional import all_gather

        image, text = torch.cat(all_gather(image)), torch.cat(all_gather(text))
    scale, bias = twin.module.logit_scale.exp(), twin.module.logit_bias
    loss = sigmoid_loss_plain(image, text, scale, bias)
    loss.backward()
    expected = {name: parameter.grad for name, parameter in twin.module.named_parameters()}
    for gradient in expected.values():
        if world_size > 1:
            # all_gather's backward sums the ranks' losses, which are equal; the scale and bias are in each of them.
            torch.distributed.all_reduce(gradient)
            gradient /= world_size
    actual_loss, gradients, *_ = step_on_rank(rank, world_size, num_micro_batches, model=WITH_DROPOUT)
    return float(loss.detach()), expected, actual_loss, gradients


class Float64(Device):
    product_dtype = torch.float64


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_micro_batches", [1, 4, 16])
def test_dropout_is_replayed_in_the_second_pass(rank_groups, world_size, num_micro_batches):
    if NUM_PAIRS // world_size % num_micro_batches:
        num_micro_batches = NUM_PAIRS // world_size  # one pair each
    ranks = rank_groups(world_size).run(dropout_step, num_micro_batches)
    assert sum(rank[2] for rank in ranks) / world_size == pytest.approx(ranks[0][0], rel=1e-5)
    for _, expected, _, gradients in ranks:
        check_gradients(gradients, expected)


def test_dropout_is_on_in_the_test_above():
    with_dropout, without = step_on_rank(0, 1, model=WITH_DROPOUT), step_on_rank(0, 1)
    assert with_dropout[0] != without[0]


def test_without_a_bias_all_else_is_as_with_one_of_zero():
    with_one, without = (
        step_on_rank(0, 1, model=ModelConfig(towers=TOWERS, init_logit_bias=bias)) for bias in (0.0, None)
    )
    assert without[0] == with_one[0]
    assert with_one[1].keys() - without[1].keys() == {"logit_bias"}
    assert all(torch.equal(with_one[1][name], gradient) for name, gradient in without[1].items())


@pytest.mark.parametrize("num_micro_batches", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_checkpointing_changes_no_bit(num_micro_batches, precision):
    """With patch dropout before the blocks and dropout inside them: draws are the same in both passes."""
    results = []
    for on in (False, True):
        trainer = make_trainer(
            1,
            model=WITH_DROPOUT,
            micro_batch_size=NUM_PAIRS // num_micro_batches,
            precision=precision,
            activation_checkpointing=on,
        )
        for tower in (trainer.module.visual.transformer, trainer.module.text.transformer):
            for block in tower.resblocks:
                block.mlp.append(nn.Dropout(0.5))
        loss = float(trainer.step(part_of(0, 1)).loss)
        results.append((loss, {name: parameter.grad for name, parameter in trainer.module.named_parameters()}))
    (loss, gradients), (same_loss, same) = results
    assert same_loss == loss
    assert same.keys() == gradients.keys()
    assert all(torch.equal(same[name], gradient) for name, gradient in gradients.items())


def test_compiled_blocks_give_the_same_step(minutes):
    """With micro-batches and checkpointing: passes with and without gradients, and the same block called again."""
    expected_loss, expected, _ = step_gradients(MODEL, SEED, *global_batch())
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["frames"]["ok"]
    loss, gradients, weights, _ = step_on_rank(0, 1, 4, activation_checkpointing=True, compile_blocks=True)
    assert torch._dynamo.utils.counters["frames"]["ok"] > before, "nothing was compiled"
    assert weights.keys() == make_trainer(1).module.state_dict().keys()
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    check_gradients(gradients, expected)


def test_activation_checkpointing_keeps_the_inputs_of_blocks_alone():
    """Of what autograd saves between the passes, the blocks' share falls to one input for each block."""

    def saved(**settings):
        trainer, batch, sizes = make_trainer(1, **settings), part_of(0, 1), {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {parameter.data_ptr() for parameter in trainer.module.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = trainer._encode(batch, slice(0, NUM_PAIRS), 0)
        assert all(part.requires_grad for part in features)
        return sum(size for address, size in sizes.items() if address not in weights)

    assert saved(activation_checkpointing=True) < 0.4 * saved()


def test_bfloat16_steps_keep_the_loss_and_the_direction():
    _, expected, _ = step_gradients(MODEL, SEED, *global_batch())
    loss, gradients, *_ = step_on_rank(0, 1, num_micro_batches=4, precision="bf16")
    again, whole, *_ = step_on_rank(0, 1, precision="bf16")
    # bfloat16 has 8 bits: 2**-8 per operation in towers of depth 2, which do not add up in one direction.
    assert loss == pytest.approx(step_gradients(MODEL, SEED, *global_batch())[0], rel=1e-2)
    assert loss == pytest.approx(again, rel=1e-6)
    for name, want in expected.items():
        for got in (gradients[name], whole[name]):
            if want.norm() > 0:
                assert nn.functional.cosine_similarity(got.double().flatten(), want.flatten(), dim=0) > 0.98, name
                assert got.double().norm() == pytest.approx(float(want.norm()), rel=0.1), name


def test_one_micro_batch_embeds_once(monkeypatch):
    calls = []
    encode = Trainer._encode
    monkeypatch.setattr(Trainer, "_encode", lambda *arguments: calls.append(arguments[3]) or encode(*arguments))
    step_on_rank(0, 1)
    assert calls == [0]
    calls.clear()
    step_on_rank(0, 1, num_micro_batches=2)
    assert calls == [0, 1, 0, 1]


def poisoned_step(rank, world_size):
    trainer = make_trainer(world_size, micro_batch_size=4)
    before = {name: tensor.clone() for name, tensor in trainer.module.state_dict().items()}
    if rank == 1:
        encode = trainer._encode

        def poisoned(batch, rows, micro_batch):
            image, text = encode(batch, rows, micro_batch)
            return image, text.index_fill(0, torch.tensor([2]), float("nan")) if micro_batch == 3 else text

        trainer._encode = poisoned
    with pytest.raises(FloatingPointError) as caught:
        trainer.step(part_of(rank, world_size))
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.module.state_dict().items())
    return str(caught.value)


def test_nan_in_features_is_named_on_every_rank_before_the_weights_change(rank_groups):
    for message in rank_groups(2).run(poisoned_step):
        assert message.startswith("step 1: NaN or infinity in text_features of rank 1, micro-batch 3 (pair 2 of it)")


@pytest.mark.parametrize("keep", ["random", "hardest", "easiest"])
def test_chosen_negatives_do_not_depend_on_the_cut(rank_groups, keep):
    loss = LossConfig(negatives=keep, negatives_fraction=0.3)
    whole = step_on_rank(0, 1, loss=loss)
    ranks = rank_groups(3).run(functools.partial(step_on_rank, num_micro_batches=2, loss=loss))
    assert sum(rank[0] for rank in ranks) / 3 == pytest.approx(whole[0], rel=1e-5)
    assert whole[0] != step_on_rank(0, 1)[0]
    check_gradients(ranks[0][1], {name: gradient.double() for name, gradient in whole[1].items()})


def test_softmax_steps(rank_groups):
    loss = LossConfig(name="softmax")
    whole = step_on_rank(0, 1, loss=loss)
    ranks = rank_groups(2).run(functools.partial(step_on_rank, num_micro_batches=2, loss=loss))
    assert sum(rank[0] for rank in ranks) / 2 == pytest.approx(whole[0], rel=1e-5)
    check_gradients(ranks[0][1], {name: gradient.double() for name, gradient in whole[1].items()})
    assert float(whole[1]["logit_bias"]) == 0


def unequal_parts(rank, world_size):
    check_collectives(Device(torch.device("cpu"), "fp32"), 4 + rank)


def test_ranks_with_different_numbers_of_pairs_are_refused():
    with pytest.raises(RuntimeError, match="pairs per step, others hold another number"):
        run_on_ranks(2, unequal_parts)


def test_weight_decay_spares_biases_norms_scale_and_bias():
    torch.manual_seed(0)
    from sigray.workers.model.towers import build_model

    module = build_model(MODEL)
    decayed, *plain = build_optimizer(module, OptimConfig(weight_decay=0.1), {}).param_groups
    assert decayed["weight_decay"] == 0.1
    assert {group["weight_decay"] for group in plain} == {0.0}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    plain_names = {names[id(parameter)] for group in plain for parameter in group["params"]}
    assert {"logit_scale", "logit_bias"} <= plain_names
    for name in names.values():
        assert (name in plain_names) == (name.endswith(("bias", "logit_scale", "class_embedding")) or "ln_" in name), (
            name
        )
    assert len(decayed["params"]) + len(plain_names) == len(names)


def test_initial_scale_and_bias_are_the_papers():
    from sigray.workers.model.towers import build_model

    module = build_model(MODEL)
    assert module.logit_scale.item() == pytest.approx(np.log(10))
    assert module.logit_bias.item() == -10
    other = build_model(MODEL.model_copy(update={"init_logit_scale": 0.0, "init_logit_bias": -3.0}))
    assert (other.logit_scale.item(), other.logit_bias.item()) == (0, -3)


def test_learning_rate_counts_in_samples():
    optim = OptimConfig(lr=1.0, num_warmup_samples=100)
    assert learning_rate(optim, 0, 1000) == pytest.approx(1 / 101)
    assert learning_rate(optim, 49, 1000) == pytest.approx(50 / 101)
    assert learning_rate(optim, 100, 1000) == 1
    assert learning_rate(optim, 550, 1000) == pytest.approx(0.5)
    assert learning_rate(optim, 1000, 1000) == pytest.approx(0)
    assert learning_rate(OptimConfig(lr=1.0, schedule="constant"), 999, 1000) == 1


def rate_of_big_vision(step, *, decay_type, total_steps, warmup_steps, cooldown_steps, timescale):
    """Its `create_learning_rate_schedule` after the warm-up, in float64."""
    lr = 1.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    if decay_type == "cosine":
        lr *= 0.5 * (1 + math.cos(math.pi * progress))
    elif decay_type == "rsqrt":
        lr /= math.sqrt(1 + (step - warmup_steps) / timescale)
    return lr * min(1.0, (total_steps - step) / cooldown_steps) if cooldown_steps else lr


@pytest.mark.parametrize("cooldown", [0, 3, 50])
@pytest.mark.parametrize("schedule", ["cosine", "constant", "rsqrt"])
def test_schedules_are_those_of_big_vision(schedule, cooldown):
    batch, steps, warmup, timescale = 24, 60, 10, 7
    optim = OptimConfig(
        lr=1.0,
        schedule=schedule,
        num_warmup_samples=batch * warmup,
        num_timescale_samples=batch * timescale if schedule == "rsqrt" else None,
        num_cooldown_samples=batch * cooldown,
    )
    given = {"decay_type": schedule, "total_steps": steps, "warmup_steps": warmup, "timescale": timescale}
    for step in range(warmup, steps + 1):
        want = rate_of_big_vision(step, **given, cooldown_steps=cooldown)
        assert learning_rate(optim, batch * step, batch * steps) == pytest.approx(want, rel=1e-15, abs=1e-15), step


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"schedule": "rsqrt"}, "schedule=rsqrt with num_timescale_samples=None: set it"),
        ({"num_timescale_samples": 9}, "schedule=cosine with num_timescale_samples=9: only rsqrt has one"),
        ({"layer_decay": {"visual": 1.1}}, "layer_decay.visual"),
    ],
)
def test_schedules_and_layers_that_cannot_be(optim, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**optim)
