"""Whole runs against `tests/helpers/plain_run.py`, a loop in plain torch that imports nothing of the product.

Each config goes through `load_config`, `train_job` and `train_loop_per_worker`; loss, norm of the gradients, learning
rate and scale of each step and the weights in the checkpoint at the end must be those of the plain loop, on any cut of
the global batch into ranks and micro-batches.
"""

from __future__ import annotations

import ast
import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from sigray.orchestrator.config import RunConfig, load_config
from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.storage import Storage
from tests.golden import definition
from tests.helpers import plain_run
from tests.helpers.bare import train_bare
from tests.helpers.data import TOWERS, encode_image, write_tar
from tests.helpers.plain_run import PlainRun, run_plainly
from tests.helpers.ranks import run_on_ranks

BATCH, NUM_STEPS = 12, 12
WORDS = ["red", "green", "blue", "cat", "dog", "boat", "tree", "on", "under", "near", "two", "three", "old", "new"]


def write_samples(folder: Path, shard_sizes: list[int], size: tuple[int, int], seed: int) -> None:
    """Tars of smooth random images, with a caption, a second one and a list of them."""
    random, number = np.random.RandomState(seed), 0
    for shard, length in enumerate(shard_sizes):
        samples: list[dict[str, bytes | str]] = []
        for _ in range(length):
            coarse = random.randint(0, 256, (4, 4, 3)).astype(np.uint8)
            pixels = np.kron(coarse, np.ones((8, 8, 1), np.uint8))[: size[0], : size[1]]
            texts = [" ".join(random.choice(WORDS, 5)) for _ in range(4)]
            other = json.dumps({"long": texts[1], "names": texts[2:]})
            samples.append({"__key__": f"{number:04d}", "png": encode_image(pixels), "txt": texts[0], "json": other})
            number += 1
        write_tar(folder / f"{shard:03d}.tar", samples)


# Where the product has a default, nearly all of these differ from it. eps is large enough to act on each entry, and to
# keep AdamW from making steps of full length out of rounding errors where a gradient is zero in exact arithmetic.
BASE: dict[str, Any] = {
    "run": {"seed": 11},
    "data": {
        "captions": {"txt": 1.0},
        "num_lanes": 3,
        "shuffle_window": 7,
        "block_size": 4,
        "crop": "center",
    },
    "model": {
        "towers": TOWERS,
        "init_logit_scale": 1.7,
        "init_logit_bias": -3.0,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    },
    # The last step is one pair that the run's length asks for, and eleven that it is rounded up by.
    "train": {"num_samples": BATCH * (NUM_STEPS - 1) + 1, "global_batch_size": BATCH, "log_every_steps": 1},
    "loss": {"name": "sigmoid"},
    "optim": {
        "name": "adamw",
        "lr": 0.01,
        "beta1": 0.8,
        "beta2": 0.9,
        "eps": 1e-2,
        "weight_decay": 0.5,
        "grad_clip_norm": 6.0,
        "schedule": "cosine",
        "num_warmup_samples": 40,
        "groups": [
            {"match": r"visual\..*", "lr_scale": 0.4, "weight_decay": 0.2},
            {"match": r"text\.transformer\..*", "lr_scale": 2.0},
        ],
    },
}
ADAFACTOR = {"name": "adafactor", "lr": 0.003, "beta1": 0.7, "beta2": 0.6}
BY_LAYER = {
    "weight_decay_on": "kernels",
    "layer_decay": {"visual": 0.6, "text": 0.8},
    "schedule": "rsqrt",
    "num_timescale_samples": 30,
    "num_cooldown_samples": 50,
}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "adamw_sigmoid": {},
    # Lines of metrics after steps 5, 10 and 12.
    "adamw_softmax": {
        "loss": {"name": "softmax"},
        "optim": {"schedule": "constant", "num_cooldown_samples": 30, "weight_decay_on": "timm"},
        "run": {"seed": 12},
        "train": {"log_every_steps": 5},
    },
    "adafactor_sigmoid": {"optim": ADAFACTOR},
    "adafactor_softmax": {"optim": ADAFACTOR | BY_LAYER, "loss": {"name": "softmax"}},
    # All that is random.
    "draws": {
        "data": {
            "captions": {"txt": 1.0, "json:names": 2.0, "json:long": 0.5},
            "crop": "random",
            "crop_scale": [0.3, 0.8],
            "crop_ratio": [0.5, 1.5],
        },
        "model": {"towers": TOWERS | {"vision_cfg": TOWERS["vision_cfg"] | {"patch_dropout": 0.5}}},
        "train": {"label_noise": {"kind": "all", "fraction": 0.3}},
        "loss": {"negatives": "random", "negatives_fraction": 0.4},
        "optim": BY_LAYER,
    },
}
CONFIGS = list(CHANGES)


class Tolerance(NamedTuple):
    loss: float  # relative
    grad_norm: float  # relative
    logits: float  # both
    weights: float


TOLERANCES = {
    # float32 towers against float64: 1e-7 an operation, and what twelve steps make of it; up to 5e-6 was seen.
    "adamw": Tolerance(loss=1e-5, grad_norm=5e-5, logits=2e-5, weights=2e-5),
    # A momentum that float32 rounds to the other of two neighbouring bfloat16 is 2**-7 off: for a weight, times 0.003,
    # the largest lr_scale and twelve steps is 6e-4. A sixth of these or less was seen. A norm near a minimum changes by
    # more than the loss. beta1, beta2 and the decay's exponent each change a loss by 4e-3 and more.
    "adafactor": Tolerance(loss=2e-4, grad_norm=4e-3, logits=1.5e-3, weights=1e-3),
}


class Cut(NamedTuple):
    world_size: int
    micro_batch_size: int | None


class Run(NamedTuple):
    lines: list[dict[str, float]]
    weights: dict[str, Tensor]


def train_all(rank: int, world_size: int, configs: list[RunConfig]) -> list[list[dict[str, float]]]:
    return [train_bare(rank, world_size, config)["lines"] for config in configs]


def final_weights(config: RunConfig) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    newest = list_checkpoints(Storage(config.storage_uri))[-1]
    return load_file(Path(config.storage_uri) / "checkpoints" / newest.name / "model.safetensors")


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """The YAML's content by config."""
    folder = tmp_path_factory.mktemp("independent")
    write_samples(folder / "square", [13, 9, 11], (16, 16), seed=0)
    write_samples(folder / "wide", [10, 12], (20, 28), seed=1)
    write_samples(folder / "tall", [5, 4], (30, 18), seed=2)
    mix = {
        "wide": {"shards": str(folder / "wide"), "weight": 2.5},
        "tall": {"shards": str(folder / "tall"), "weight": 1},
    }
    made = {}
    for name, changes in CHANGES.items():
        content = copy.deepcopy(BASE)
        for section, values in changes.items():
            content[section] |= values
        content["run"] |= {"name": name, "dir": str(folder / "runs")}
        content["data"]["shards"] = mix if name == "draws" else str(folder / "square")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        made[name] = yaml.safe_load((folder / f"{name}.yaml").read_text())
    return made


@pytest.fixture(scope="module")
def plain(sections) -> Callable[[str, Cut], PlainRun]:
    @functools.cache
    def run(name: str, cut: Cut) -> PlainRun:
        return run_plainly(sections[name], *cut)

    # Without dropout the cut decides nothing.
    return lambda name, cut: run(name, cut if name == "draws" else Cut(1, None))


@pytest.fixture(scope="module")
def product(sections) -> Callable[[str, Cut], Run]:
    def config_of(name: str, cut: Cut) -> RunConfig:
        folder = Path(sections[name]["run"]["dir"]).parent
        size = "null" if cut.micro_batch_size is None else cut.micro_batch_size
        overrides = [
            f"run.name={name}-{cut.world_size}-{size}",
            f"cluster.num_workers={cut.world_size}",
            f"train.micro_batch_size={size}",
        ]
        return load_config(folder / f"{name}.yaml", overrides)

    @functools.cache
    def run(name: str, cut: Cut) -> Run:
        config = config_of(name, cut)
        if cut.world_size == 1:
            return Run(train_bare(0, 1, config)["lines"], final_weights(config))
        return all_on_ranks(cut)[name]

    @functools.cache
    def all_on_ranks(cut: Cut) -> dict[str, Run]:
        """All configs in one group of processes: to start one takes longer than a run."""
        configs = [config_of(name, cut) for name in CONFIGS]
        lines, *_ = run_on_ranks(cut.world_size, train_all, configs)
        return {name: Run(*found) for name, *found in zip(CONFIGS, lines, map(final_weights, configs), strict=True)}

    return run


@pytest.mark.parametrize(
    "cut", [Cut(1, None), Cut(1, 4), Cut(2, None), Cut(2, 3)], ids=lambda cut: f"{cut[0]}-{cut[1]}"
)
@pytest.mark.parametrize("name", CONFIGS)
def test_run_is_the_plain_loops(name, cut, plain, product):
    expected, found = plain(name, cut), product(name, cut)
    tolerance = TOLERANCES["adafactor" if name.startswith("adafactor") else "adamw"]
    steps = [5, 10, 12] if name == "adamw_softmax" else list(range(1, NUM_STEPS + 1))
    assert [(line["step"], line["samples_seen"]) for line in found.lines] == [(step, BATCH * step) for step in steps]
    for number, line in zip(steps, found.lines, strict=True):
        want = expected.steps[number - 1]
        assert line["train/learning_rate"] == pytest.approx(want.learning_rate, rel=1e-12), f"step {number}"
        assert line["train/loss"] == pytest.approx(want.loss, rel=tolerance.loss), f"step {number}"
        assert line["train/grad_norm"] == pytest.approx(want.grad_norm, rel=tolerance.grad_norm), f"step {number}"
        for key in ("logit_scale", "logit_bias", "positive_logit_mean", "negative_logit_mean"):
            assert line[f"train/{key}"] == pytest.approx(getattr(want, key), rel=tolerance.logits, abs=tolerance.logits)
    assert found.weights.keys() == expected.weights.keys()
    for weight_name, want in expected.weights.items():
        error = (found.weights[weight_name].double() - want).abs()
        if weight_name.endswith("attn.in_proj_bias"):
            # A softmax over keys does not change with their bias, whose gradient is rounding errors alone.
            query, _, value = error.chunk(3)
            error = torch.cat([query, value])
        assert float(error.max()) < tolerance.weights, weight_name


def test_the_plain_loop_imports_nothing_of_the_product():
    for module in (plain_run, definition):
        names: set[str] = set()
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module))
        assert "numpy" in names
        ours = {
            name
            for name in names
            if name.split(".")[0] in ("losses", "workers", "orchestrator", "tuning", "sigray", "tests")
        }
        assert ours <= {"tests.golden", "tests.golden.definition"}


def test_the_configs_reach_what_they_are_for(plain, sections):
    """Clipping acts in some steps and not in others, and the last step is one that only rounding up makes whole."""
    for name in CONFIGS:
        norms = [step.grad_norm for step in plain(name, Cut(1, None)).steps]
        assert min(norms) < BASE["optim"]["grad_clip_norm"] < max(norms), name
    assert BASE["train"]["num_samples"] % BATCH == 1
