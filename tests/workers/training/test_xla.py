"""Training under torch-xla on its CPU client, as a TPU host trains: several devices in one program.

All runs share one process, not that of the tests: the number of devices is fixed when torch_xla is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sigray.orchestrator.config import load_config
from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.storage import Storage
from tests.helpers.bare import train_bare
from tests.helpers.data import write_small_run
from tests.helpers.ranks import run_on_ranks
from tests.helpers.xla import BATCH, NUM_STEPS

VIEWS = [
    "train.micro_batch_size=8",
    "train.ema=64",
    "model.towers.vision_cfg={timm_model_name: siglip_vit_w32_d1_h2_m64_p8_s16, timm_pool: map, timm_proj: linear, "
    "image_size: 16}",
    "model.heads={hidden: 24, bottleneck: 12, prototypes: 20}",
    "loss.distill={num_local_views: 2}",
]
VARIANTS = {
    "whole": [],
    "micro": ["train.micro_batch_size=8"],
    "random": ["train.micro_batch_size=4", "loss.negatives=random", "loss.negatives_fraction=0.5"],
    "softmax": ["train.micro_batch_size=8", "loss.name=softmax"],
    "bfloat16": ["train.precision=bf16"],
    "checkpointed": ["train.micro_batch_size=8", "train.activation_checkpointing=true"],
    "lion": ["optim.name=lion", "optim.lr=3e-4"],
    "adafactor": ["optim.name=adafactor"],
    "captions": ["train.micro_batch_size=8", "model.decoder={}", "loss.caption_weight=1"],
    "views": VIEWS,
    "sinkhorn": [*VIEWS, "loss.distill.balance=sinkhorn"],
    "split": ["train.micro_batch_size=8", "sharding.weights=split"],
}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xla")
    return write_small_run(
        folder,
        train={"num_samples": NUM_STEPS * BATCH, "global_batch_size": BATCH, "log_every_steps": 1},
        optim={"lr": 3e-3, "num_warmup_samples": 32},
        checkpoint={"save_every_steps": 5},
    )


def train_on_xla(config_file: Path, runs: dict[str, tuple[list[str], int]], *looks: str) -> dict[str, Any]:
    """Lines of metrics of each run, given as overrides and last step by name; and other looks by name."""
    command = [sys.executable, "-c", "from tests.helpers.xla import main; main()", str(config_file)]
    # Compiled without optimization: the tests compile far more than they compute.
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run([*command, json.dumps(runs), *looks], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def losses(lines: list[dict[str, float]]) -> dict[int, float]:
    return {int(line["step"]): line["train/loss"] for line in lines}


def train_on_cpu(config_file: Path, *overrides: str, last_step: int = NUM_STEPS) -> dict[int, float]:
    return losses(lines_on_cpu(config_file, *overrides, last_step=last_step))


def lines_on_cpu(config_file: Path, *overrides: str, last_step: int = NUM_STEPS) -> list[dict[str, float]]:
    return run_on_ranks(1, train_bare, load_config(config_file, overrides), last_step)[0]["lines"]


@pytest.fixture(scope="module")
def micro_on_xla(torch_xla, config_file):
    """One variant, for the short tier: most of the time is the compiler's."""
    return train_on_xla(config_file, {"micro": (VARIANTS["micro"], NUM_STEPS)})


@pytest.fixture(scope="module")
def on_xla(torch_xla, minutes, config_file):
    train_on_cpu(config_file, "run.name=back", last_step=5)
    runs = {name: (overrides, NUM_STEPS) for name, overrides in VARIANTS.items()}
    return train_on_xla(config_file, runs | {"there": ([], 5), "back": ([], NUM_STEPS)}, "parts", "checkpoint")


def test_the_losses_with_micro_batches_are_those_of_the_cpu(config_file, micro_on_xla):
    check_losses(config_file, micro_on_xla, "micro", 10)
    check_compiled_programs(micro_on_xla["micro"])


@pytest.mark.parametrize(
    ("name", "num_steps"),
    [
        ("whole", 10),
        ("random", 3),
        ("softmax", 10),
        ("checkpointed", 10),
        ("lion", 5),
        ("adafactor", 3),
        ("captions", 10),
        ("views", 10),
        ("sinkhorn", 10),
        ("split", 10),
    ],
)
def test_the_losses_are_those_of_the_cpu(config_file, on_xla, name, num_steps):
    check_losses(config_file, on_xla, name, num_steps)


def check_losses(config_file: Path, on_xla: dict[str, Any], name: str, num_steps: int) -> None:
    """Ten steps of AdamW from the same weights on the same batches; float32, other order of additions.

    With random negatives, which are others in each step, the losses part sooner: AdamW divides gradients that are
    nothing but rounding by themselves. So they do with Adafactor, whose momentum is bfloat16.
    """
    overrides = [text for text in VARIANTS[name] if not text.startswith(("sharding", "train.activation"))]
    lines = lines_on_cpu(config_file, *overrides, f"run.name={name}-cpu")
    expected = losses(lines)
    for key in ("train/positive_logit_mean", "train/negative_logit_mean"):
        found = [line[key] for line in on_xla[name][:num_steps]]
        # Cosines within 1e-5, times a scale of 10.
        assert found == pytest.approx([line[key] for line in lines[:num_steps]], abs=1e-3), key
    first = {step: loss for step, loss in expected.items() if step <= num_steps}
    assert {step: losses(on_xla[name])[step] for step in first} == pytest.approx(first, rel=1e-4)
    assert expected[NUM_STEPS] < 0.9 * expected[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_compiled_after_the_second_step(on_xla, name):
    check_compiled_programs(on_xla[name])


def check_compiled_programs(lines: list[dict[str, float]]) -> None:
    """The first step makes the optimizer's state, the second is the program of all others."""
    programs = [line["compile/num_programs"] for line in lines]
    assert programs[0] > 0
    assert set(programs[1:]) == {programs[1]}, programs


def test_a_run_goes_on_on_another_kind_of_device(config_file, on_xla):
    """Five steps on XLA, five on a CPU from its checkpoint, and the other way round: as if all were on one."""
    expected = losses(on_xla["whole"])
    rest = train_on_cpu(config_file, "run.name=there")
    assert min(rest) == 6
    assert losses(on_xla["there"]) | rest == pytest.approx(expected, rel=1e-4)
    rest = losses(on_xla["back"])
    assert min(rest) == 6
    assert rest == pytest.approx({step: expected[step] for step in rest}, rel=1e-4)
    for name in ("there", "back"):
        storage = Storage(load_config(config_file, [f"run.name={name}"]).storage_uri)
        assert [info.step for info in list_checkpoints(storage)] == [5, 10]


def test_checkpointed_blocks_are_computed_again_with_equal_draws(on_xla):
    found = on_xla["checkpoint"]
    assert found["equal"]
    assert 0.4 < found["kept"] < 0.6
    assert found["has_barrier"]
    # Two forward, one of them again (the last one's result is not needed), two gradients each.
    assert found["num_products"] in (7, 8)


def test_a_profile_counts_the_program_and_compiles_no_other(config_file, on_xla):
    """Two steps, and one with the checkpoint; the losses are those of the run without the profiler."""
    programs = [line["compile/num_programs"] for line in on_xla["there"]]
    assert set(programs[1:]) == {programs[1]}
    assert losses(on_xla["there"]) == {step: losses(on_xla["whole"])[step] for step in range(1, 6)}
    storage = Storage(load_config(config_file, ["run.name=there"]).storage_uri)
    steps = json.loads(storage.read("profile/rank-0000-steps.json"))["steps"]
    assert len(steps) == 3
    assert all(step["device program"] > 0 for step in steps)
    assert [step["checkpoint"] > 0 for step in steps] == [False, False, True]
    assert "Counter: UncachedCompile" in storage.read("profile/rank-0000-xla.txt").decode()


def test_split_weights_lie_in_parts(on_xla):
    """Every matrix of the towers and of AdamW's two averages has half of itself on each of two devices."""
    assert len(on_xla["parts"]) > 30
    assert set(on_xla["parts"]) <= {"{devices=[2,1]0,1}", "{devices=[1,2]0,1}"}


def test_bfloat16_keeps_the_loss(on_xla):
    # 8 bits: as in tests/workers/training/test_step.py.
    assert losses(on_xla["bfloat16"]) == pytest.approx(losses(on_xla["whole"]), rel=3e-2)
    assert losses(on_xla["bfloat16"]) != pytest.approx(losses(on_xla["whole"]), rel=1e-5)
