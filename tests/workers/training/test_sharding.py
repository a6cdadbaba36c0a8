"""Weights in parts on several ranks (FSDP2 over gloo): the same run, half the memory, and checkpoints that fit both."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from sigray.orchestrator.config import load_config
from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.checkpoint.writer import load_weights
from sigray.workers.config import LossConfig, ModelConfig, OptimConfig
from sigray.workers.device import open_device
from sigray.workers.model.towers import build_model
from sigray.workers.storage import Storage
from sigray.workers.training.phases import Schedule
from sigray.workers.training.step import Trainer
from tests.helpers.bare import train_bare
from tests.helpers.data import TOWERS, write_small_run
from tests.helpers.ranks import run_on_ranks

NUM_STEPS, BATCH = 10, 16


@pytest.fixture
def config_file(tmp_path):
    return write_small_run(
        tmp_path,
        train={
            "num_samples": NUM_STEPS * BATCH,
            "global_batch_size": BATCH,
            "micro_batch_size": 4,
            "log_every_steps": 1,
        },
        optim={
            "lr": 3e-3,
            "num_warmup_samples": 32,
            "schedule": "rsqrt",
            "num_timescale_samples": 64,
            "num_cooldown_samples": 48,
            "weight_decay_on": "kernels",
            "layer_decay": {"text": 0.9},
        },
        checkpoint={"save_every_steps": 5},
        cluster={"num_workers": 2},
    )


def train(config_file, name, *overrides, last_step=NUM_STEPS):
    """Losses by step, and the weights of the newest checkpoint."""
    config = load_config(config_file, [f"run.name={name}", *overrides])
    losses = run_on_ranks(2, train_bare, config, last_step)[0]["losses"]
    storage, module = Storage(config.storage_uri), build_model(config.model)
    load_weights(storage, list_checkpoints(storage)[-1], module)
    return losses, module.state_dict()


@pytest.mark.parametrize("overrides", [[], ["train.micro_batch_size=null"], ["model.locked=[visual]"]])
def test_the_run_is_the_same(config_file, overrides):
    """Float32; gradients are summed in pieces and not in one flat buffer."""
    expected, weights = train(config_file, "whole", *overrides)
    losses, split_weights = train(config_file, "split", "sharding.weights=split", *overrides)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert expected[NUM_STEPS] < 0.9 * expected[1]
    assert weights.keys() == split_weights.keys()
    for name, tensor in weights.items():
        if name.endswith("in_proj_bias"):
            continue  # a key's bias changes no attention: its gradient is rounding, which AdamW divides by itself
        torch.testing.assert_close(split_weights[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_goes_on_with_the_other_kind(config_file):
    expected, _ = train(config_file, "whole")
    for name, first, second in (("apart", "whole", "split"), ("together", "split", "whole")):
        begun, _ = train(config_file, name, f"sharding.weights={first}", last_step=5)
        rest, _ = train(config_file, name, f"sharding.weights={second}")
        assert (max(begun), min(rest)) == (5, 6)
        assert begun | rest == pytest.approx(expected, rel=1e-5)


def parts_on_rank(rank, world_size):
    """Elements that this rank holds, of all; kinds of tensors in the optimizer's groups."""
    trainer = Trainer(
        ModelConfig(towers=TOWERS),
        OptimConfig(),
        LossConfig(),
        open_device("cpu", 0, "fp32", splits_weights=True),
        schedule=Schedule(8),
        global_batch_size=8,
        micro_batch_size=None,
        seed=0,
    )
    parameters = list(trainer.module.parameters())
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    kinds = [{isinstance(p, DTensor) for p in group["params"]} for group in trainer.optimizer.param_groups]
    return held, sum(p.numel() for p in parameters), kinds


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_rank_holds_its_part(world_size):
    for held, total, kinds in run_on_ranks(world_size, parts_on_rank):
        assert held < total / world_size * 1.02
        assert all(len(kind) == 1 for kind in kinds)
