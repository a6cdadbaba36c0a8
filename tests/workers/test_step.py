"""One step on 1, 2 and 3 ranks against a float64 process that sees the whole batch: loss and every gradient."""

import numpy as np
import pytest
import torch

from tests.conftest import TOWERS
from tests.ranks import run_on_ranks
from tests.reference import step_gradients
from workers.config import ModelConfig, OptimConfig
from workers.device import Device, check_collectives, open_device
from workers.feed import Batch
from workers.optim import build_optimizer, learning_rate
from workers.step import Trainer

MODEL, NUM_PAIRS, SEED = ModelConfig(towers=TOWERS), 12, 3


def global_batch():
    random = np.random.RandomState(0)
    images = torch.from_numpy(random.randint(0, 256, (NUM_PAIRS, 16, 16, 3)).astype(np.uint8))
    return images, torch.from_numpy(random.randint(1, 400, (NUM_PAIRS, 8)).astype(np.int32))


def step_on_rank(rank, world_size):
    images, tokens = global_batch()
    part = slice(rank * NUM_PAIRS // world_size, (rank + 1) * NUM_PAIRS // world_size)
    device = open_device("cpu", 0, "fp32")
    check_collectives(device, NUM_PAIRS // world_size)
    trainer = Trainer(
        MODEL,
        OptimConfig(grad_clip_norm=None, schedule="constant"),
        device,
        num_samples=NUM_PAIRS,
        global_batch_size=NUM_PAIRS,
        seed=SEED,
    )
    result = trainer.step(Batch(0, images[part], tokens[part]))
    gradients = {name: parameter.grad for name, parameter in trainer.module.named_parameters()}
    return float(result.loss), gradients, trainer.module.state_dict()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loss_and_every_gradient_equal_the_oracle(world_size):
    expected_loss, expected, module = step_gradients(MODEL, SEED, *global_batch())
    ranks = run_on_ranks(world_size, step_on_rank)
    # float32 towers against float64: relative 2**-24 per operation over some hundred operations deep.
    assert sum(loss for loss, _, _ in ranks) / world_size == pytest.approx(expected_loss, rel=1e-5)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, _ in module.named_parameters():
        for _, gradients, _ in ranks:
            close = torch.isclose(gradients[name].double(), expected[name], rtol=2e-4, atol=float(largest) * 2e-6)
            assert close.all(), f"{name}: {gradients[name]} instead of {expected[name]}"
    assert {"logit_scale", "logit_bias"} <= expected.keys()
    for name, tensor in ranks[0][2].items():
        assert all(torch.equal(tensor, state[name]) for _, _, state in ranks), name


def unequal_parts(rank, world_size):
    check_collectives(Device(torch.device("cpu"), "fp32"), 4 + rank)


def test_ranks_with_different_numbers_of_pairs_are_refused():
    with pytest.raises(Exception, match="pairs per step, others hold another number"):
        run_on_ranks(2, unequal_parts)


def test_weight_decay_spares_biases_norms_scale_and_bias():
    torch.manual_seed(0)
    from workers.towers import build_model

    module = build_model(MODEL)
    decayed, plain = build_optimizer(module, OptimConfig(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    plain_names = {names[id(parameter)] for parameter in plain["params"]}
    assert {"logit_scale", "logit_bias"} <= plain_names
    for name in names.values():
        assert (name in plain_names) == (name.endswith(("bias", "logit_scale", "class_embedding")) or "ln_" in name), (
            name
        )
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_initial_scale_and_bias_are_the_papers():
    from workers.towers import build_model

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
