"""The average of the weights (`train.ema`), against its closed form in float64, through kills and other numbers of
ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import sigray.workers.training.train
from sigray.orchestrator.config import RunConfig, load_config
from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.checkpoint.writer import EMA, load_checkpoint, load_newest
from sigray.workers.config import OptimConfig
from sigray.workers.data.loader import Batch
from sigray.workers.model.init_weights import load_initial_weights
from sigray.workers.model.towers import build_model
from sigray.workers.storage import Storage
from sigray.workers.training.optim import build_optimizer, update_ema
from sigray.workers.training.step import StepResult, Trainer
from tests.helpers.bare import train_bare
from tests.helpers.data import write_small_run
from tests.helpers.ranks import run_on_ranks

BATCH, NUM_STEPS, HALF_LIFE = 8, 6, 20


def averaged(history: list[np.ndarray], decay: float) -> np.ndarray:
    """d^(n - 1) w_1 + sum over t = 2 to n of (1 - d) d^(n - t) w_t, in float64."""
    n = len(history)
    factors = [decay ** (n - 1), *((1 - decay) * decay ** (n - t) for t in range(2, n + 1))]
    return sum(factor * weights.astype(np.float64) for factor, weights in zip(factors, history, strict=True))


def averages(config: RunConfig) -> dict[str, np.ndarray]:
    """Of the newest checkpoint, by name."""
    info = list_checkpoints(Storage(config.storage_uri))[-1]
    assert info.has_ema
    return load_file(Path(config.storage_uri, "checkpoints", info.name, "ema.safetensors"))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return write_small_run(
        tmp_path,
        train={"num_samples": NUM_STEPS * BATCH, "global_batch_size": BATCH, "log_every_steps": 1, "ema": HALF_LIFE},
        optim={"lr": 3e-2},
        checkpoint={"save_every_steps": 1, "keep_newest": 100},
        cluster={"num_workers": 2},
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_the_average_is_its_closed_form(name: str) -> None:
    torch.manual_seed(0)
    module, unused = nn.Linear(40, 33), nn.Parameter(torch.ones(2))
    module.register_parameter("unused", unused)  # it never has a gradient, so it never moves
    optimizer = build_optimizer(module, OptimConfig(name=name, lr=0.1), {})
    history = []
    for _ in range(12):
        optimizer.zero_grad()
        module(torch.randn(5, 40)).square().sum().backward()
        optimizer.step()
        update_ema(optimizer, 0.8)
        history.append(module.weight.detach().numpy().copy())
    expected = averaged(history, 0.8)
    assert np.abs(expected - history[-1]).max() > 0.01, "an average that says nothing"
    np.testing.assert_allclose(optimizer.state[module.weight][EMA].numpy(), expected, atol=1e-6)
    assert not optimizer.state[unused]


@pytest.mark.parametrize("locked", [[], ["visual"]])
def test_a_checkpoint_holds_the_average_of_what_trains(
    config_file: Path, locked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    history: list[dict[str, np.ndarray]] = []

    class Watched(Trainer):
        def step(self, batch: Batch) -> StepResult:
            result = super().step(batch)
            history.append({name: value.detach().numpy().copy() for name, value in self.module.named_parameters()})
            return result

    monkeypatch.setattr(sigray.workers.training.train, "Trainer", Watched)
    config = load_config(config_file, [f"model.locked={locked}"])
    train_bare(0, 1, config)
    ema = averages(config)
    moved = {name for name, first in history[0].items() if not np.array_equal(first, history[-1][name])}
    assert moved <= ema.keys()
    assert len(history) == NUM_STEPS
    assert any(name.startswith("visual.") for name in ema) == (not locked)
    for name, average in ema.items():
        expected = averaged([weights[name] for weights in history], 0.5 ** (BATCH / HALF_LIFE))
        np.testing.assert_allclose(average, expected, atol=2e-6, err_msg=name)


def test_a_run_that_begins_from_a_checkpoint_takes_the_average(config_file: Path) -> None:
    config = load_config(config_file)
    train_bare(0, 1, config, 2)
    folder = Path(config.storage_uri, "checkpoints", "step-0000000002")
    last = load_file(folder / "model.safetensors")
    for place, expected in ((folder, last | averages(config)), (folder / "model.safetensors", last)):
        model = config.model.model_copy(update={"init_from": str(place)})
        module = build_model(model)
        said = load_initial_weights(module, model).text()
        assert ("the average of its weights" in said) == (place == folder)
        for name, value in module.state_dict().items():
            np.testing.assert_array_equal(value.numpy(), expected[name], err_msg=name)


def test_a_killed_and_resized_run_ends_with_the_same_bits(config_file: Path) -> None:
    """Two ranks with split weights for four steps, then one rank; with stops in both parts and without."""
    files = {}
    for name, stops in {"straight": ((4,), (6,)), "stopped": ((2, 4), (5, 6))}.items():
        config = load_config(config_file, [f"run.name={name}"])
        split = load_config(config_file, [f"run.name={name}", "sharding.weights=split"])
        for step in stops[0]:
            run_on_ranks(2, train_bare, split, step)
        for step in stops[1]:
            files[name] = train_bare(0, 1, config, step)["files"]
    assert files["straight"] == files["stopped"]
    assert "ema.safetensors" in files["straight"]


def test_split_weights_have_the_same_average(config_file: Path) -> None:
    found = {}
    for kind in ("whole", "split"):
        config = load_config(config_file, [f"run.name={kind}", f"sharding.weights={kind}"])
        run_on_ranks(2, train_bare, config)
        found[kind] = averages(config)
    assert found["whole"].keys() == found["split"].keys()
    for name, average in found["whole"].items():
        if not name.endswith("in_proj_bias"):  # a key's bias changes no attention: its gradient is rounding
            np.testing.assert_allclose(found["split"][name], average, rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_checkpoint_whose_average_is_damaged_is_passed_over(config_file: Path) -> None:
    config = load_config(config_file)
    train_bare(0, 1, config, 1)
    train_bare(0, 1, config, 2)
    storage = Storage(config.storage_uri)
    before, newest = list_checkpoints(storage)
    storage.write(f"checkpoints/{newest.name}/ema.safetensors", b"damaged")
    warnings: list[str] = []
    module = build_model(config.model)
    optimizer = build_optimizer(module, config.optim, {})
    newest = load_newest(storage, lambda info: load_checkpoint(storage, info, module, optimizer), warnings.append)
    assert newest == before
    assert len(warnings) == 1
    assert "ema.safetensors is damaged" in warnings[0]
