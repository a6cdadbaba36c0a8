"""Runs on torch-xla's CPU client, in a process of its own: `python -c "from tests.helpers.xla import main; main()"`."""

from __future__ import annotations

import json
import sys

import numpy as np
import torch

from sigray.orchestrator.config import RunConfig, load_config
from sigray.workers.data.loader import Batch
from sigray.workers.device import open_device
from sigray.workers.training.phases import Schedule
from sigray.workers.training.profile import Profile
from sigray.workers.training.step import Trainer
from tests.helpers.bare import train_bare

NUM_STEPS, BATCH = 10, 16
ON_XLA = ["cluster.accelerator=xla_cpu", "cluster.devices_per_worker=2"]


def main() -> None:
    """In a process of its own: runs on XLA, one after another, and what they reported."""
    path, runs, looks = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
    found = {}
    for name, (overrides, last_step) in runs.items():
        config = load_config(path, [*ON_XLA, f"run.name={name}", *overrides])
        profile = Profile(warm_up=2, steps=2) if name == "there" else None  # five steps
        found[name] = train_bare(0, 1, config, last_step, profile)["lines"]
    if "parts" in looks:
        found["parts"] = split_parts(load_config(path, ON_XLA))
    if "checkpoint" in looks:
        found["checkpoint"] = checkpointed_product()
    print(json.dumps(found))


def split_parts(config: RunConfig) -> list[str]:
    """How XLA has laid out the weights and the optimizer's state after two steps with split weights."""
    import torch_xla

    trainer = Trainer(
        config.model,
        config.optim,
        config.loss,
        open_device("xla_cpu", 0, "fp32", 2, splits_weights=True),
        schedule=Schedule(BATCH),
        global_batch_size=BATCH,
        micro_batch_size=None,
        seed=0,
    )
    images, tokens = torch.zeros(BATCH, 16, 16, 3, dtype=torch.uint8), torch.ones(BATCH, 8, dtype=torch.int32)
    origin = {"samples": np.zeros((BATCH, 3), np.int64), "keys": [""] * BATCH, "replaced": np.zeros(BATCH, bool)}
    for step in range(2):
        trainer.step(Batch(step, images, tokens, **origin))
    states = [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    matrices = [tensor for tensor in [*trainer.module.parameters(), *states] if tensor.ndim == 2]
    return [torch_xla._XLAC._get_xla_sharding_spec(matrix) for matrix in matrices]


def checkpointed_product() -> dict[str, float]:
    """Dropout and two products, checkpointed: does the second pass happen, and does it draw what the first drew?"""
    import torch_xla

    device = open_device("xla_cpu", 0, "fp32", 2)
    device.seed(5)
    x = torch.ones(64, 32, device=device.torch_device, requires_grad=True)
    weight = torch.eye(32, device=device.torch_device, requires_grad=True)

    def block(x, *, weight):
        return torch.nn.functional.dropout(x, 0.5) @ weight @ weight

    output = device.checkpoint(block, x, weight=weight)
    output.sum().backward()
    program = torch_xla._XLAC._get_xla_tensors_hlo([output, x.grad, weight.grad])
    torch_xla.sync()
    return {
        "equal": bool(torch.equal(output.cpu(), x.grad.cpu())),  # dropout's mask twice, as the weight is one
        "kept": float((output != 0).float().mean()),
        "num_products": program.count(" dot("),
        "has_barrier": "opt-barrier" in program,
    }
