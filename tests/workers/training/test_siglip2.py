"""A toy run of SigLIP 2's whole recipe: captions, self-distillation from 80 %, larger images from 95 %."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from sigray.orchestrator.config import ConfigError, load_config
from sigray.orchestrator.run.preflight import check_model_config
from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.checkpoint.writer import load_weights
from sigray.workers.model.towers import build_model
from sigray.workers.storage import Storage
from tests.helpers.bare import train_bare
from tests.helpers.data import TOWERS, write_small_run
from tests.helpers.ranks import run_on_ranks

NUM_STEPS, BATCH = 20, 16
FIRST, SECOND = 16, 19  # the borders
DISTILL = {"local_weight": 0.25, "masked_weight": 0.0625, "num_local_views": 2}
MODEL = {
    "towers": TOWERS
    | {
        "vision_cfg": {
            "timm_model_name": "siglip_vit_w16_d1_h2_m32_p8_s16",
            "timm_pool": "map",
            "timm_proj": "none",
            "image_size": 16,
        }
    },
    "decoder": {},
    "heads": {"hidden": 24, "bottleneck": 12, "prototypes": 20},
}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return write_small_run(
        tmp_path_factory.mktemp("siglip2"),
        model=MODEL,
        train={"num_samples": NUM_STEPS * BATCH, "global_batch_size": BATCH, "log_every_steps": 1, "ema": 64},
        loss={"caption_weight": 1.0},
        optim={"lr": 3e-3},
        phases=[{"start": 0.8, "loss": {"distill": DISTILL}}, {"start": 0.95, "image_size": 24}],
        checkpoint={"save_every_steps": 5, "keep_newest": 20},
    )


def train(config_file, name, *overrides, world_size=1, last_step=None):
    config = load_config(config_file, [f"run.name={name}", *overrides])
    (found, *_) = run_on_ranks(world_size, train_bare, config, last_step)
    return found


@pytest.fixture(scope="module")
def undisturbed(config_file):
    return train(config_file, "undisturbed")


def test_each_phase_has_its_terms(undisturbed):
    assert undisturbed["phases"] == [(1, FIRST), (2, SECOND)]
    for line in undisturbed["lines"]:
        weights = {"contrastive": 1, "caption": 1.0}
        weights |= {"local": 0.25, "masked": 0.0625} if line["step"] > FIRST else {}
        names = {name for name in line if name.startswith("train/") and name.endswith("_loss")}
        assert names == {f"train/{name}_loss" for name in weights}
        total = sum(weight * line[f"train/{name}_loss"] for name, weight in weights.items())
        assert line["train/loss"] == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("last_step", [8, FIRST, 17, SECOND])
def test_a_killed_run_has_the_same_bits(config_file, undisturbed, last_step):
    name = f"killed-{last_step}"
    train(config_file, name, last_step=last_step)
    rest = train(config_file, name)
    assert rest["files"] == undisturbed["files"]
    assert {step: undisturbed["losses"][step] for step in rest["losses"]} == rest["losses"]


def test_a_resized_run_has_the_same_bits(config_file, tmp_path):
    """One worker before the first border, two after it; killed in the middle, and not."""
    train(config_file, "resized", last_step=10)
    runs = load_config(config_file, ["run.name=resized"]).folder
    shutil.copytree(runs, runs.with_name("resized-killed"))
    whole = train(config_file, "resized", world_size=2)
    train(config_file, "resized-killed", world_size=2, last_step=17)
    assert train(config_file, "resized-killed", world_size=2)["files"] == whole["files"]


def test_the_teacher_begins_as_the_student(config_file):
    """In the first step of its phase; the average of the steps before is another one."""
    whole = train(config_file, "teacher")
    config = load_config(config_file, ["run.name=teacher"])
    storage = Storage(config.storage_uri)
    border = next(info for info in list_checkpoints(storage) if info.step == FIRST)
    module = build_model(config.model)
    load_weights(storage, border, module)
    student = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    load_weights(storage, border, module, ema=True)
    assert not torch.equal(student["visual.trunk.norm.weight"], module.state_dict()["visual.trunk.norm.weight"])
    (trained,) = (line for line in whole["lines"] if line["step"] == FIRST + 1)
    other = train(config_file, "other", "train.ema=1000000")  # another average, and the same teacher at first
    (found,) = (line for line in other["lines"] if line["step"] == FIRST + 1)
    assert found["train/local_loss"] == trained["train/local_loss"]
    assert found["train/masked_loss"] == trained["train/masked_loss"]


@pytest.mark.parametrize(
    ("between", "zero"),
    [
        ({"loss": {"distill": None}}, ["local", "masked"]),
        ({"init_fresh": [r"distiller\..*"]}, ["local", "masked"]),
        ({"init_fresh": [r"distiller\.masked_head\.prototypes"]}, ["masked"]),
        ({"init_fresh": ["text.*"]}, []),
    ],
    ids=str,
)
def test_a_center_begins_with_the_logits_that_it_is_of(config_file, between, zero):
    """The last phase's momentum keeps the center where the phase began."""
    last = {"start": 12 * BATCH, "loss": {"distill": DISTILL | {"center_momentum": 1.0}}}
    if "init_fresh" in between:
        last |= between
    phases = [{"start": 4 * BATCH, "loss": {"distill": DISTILL}}, {"start": 8 * BATCH, "optim": {"lr": 1e-3}}, last]
    if "loss" in between:
        phases[1] |= between
    name = "-".join(["centers", *between, *zero])
    files = train(config_file, name, f"phases={json.dumps(phases)}", last_step=14)["files"]
    assert files
    config = load_config(config_file, [f"run.name={name}", f"phases={json.dumps(phases)}"])
    storage = Storage(config.storage_uri)
    module = build_model(config.model)
    load_weights(storage, list_checkpoints(storage)[-1], module)
    found = [head for head in ("local", "masked") if not module.distiller.get_buffer(f"{head}_center").any()]
    assert found == zero


def test_micro_batches_change_rounding_alone(config_file, undisturbed):
    found = train(config_file, "micro", "train.micro_batch_size=4", "train.activation_checkpointing=true")
    first = {step: loss for step, loss in undisturbed["losses"].items() if step <= FIRST + 2}
    assert {step: found["losses"][step] for step in first} == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.heads=null"], r"loss.distill needs heads: set model.heads=\{\}"),
        (["train.ema=null"], "loss.distill needs a teacher: set train.ema"),
        (["phases=[{start: 0.9, image_size: 24}]"], r"model.heads is never trained: set loss.distill=\{\}"),
        (["model.locked=[visual]"], "leave visual out of model.locked"),
        (["model.trained_blocks={visual: 1}"], "leave visual out of model.locked"),
        (["sharding.weights=split"], "loss.distill cannot run with sharding.weights=split"),
        (["loss.distill={local_weight: 0, masked_weight: 0}"], "local_weight and masked_weight are 0"),
        (["loss.distill={local_scale: [0.5, 0.1]}"], r"local_scale=\[0.5, 0.1\]: \[smallest, largest\]"),
        (["loss.distill={num_local_views: 1000}"], "num_local_views=1000: .*less than or equal to 64"),
        (["loss.distill={local_size: 1000000}"], "local_size=1000000: .*less than or equal to"),
        (["loss.distill={teacher_temperature: 1.0e-9}"], "teacher_temperature=1e-09: .*greater than or equal to"),
        (["model.heads={prototypes: 1}"], "model.heads.prototypes=1: .*greater than or equal to 2"),
        (["model.heads={prototypes: 1000000000}"], "model.heads.prototypes=1000000000: .*less than or equal to"),
        (["model.heads={hidden: 1000000000}"], "model.heads.hidden=1000000000: .*less than or equal to"),
        (["model.heads={bottleneck: 1000000000}"], "model.heads.bottleneck=1000000000: .*less than or equal to"),
        (["loss.distill={local_size: 12}"], "local_size=12 does not divide by the patches of 8 pixels"),
        *(
            (
                [
                    f"model.towers.vision_cfg={{timm_model_name: {name}, image_size: 224}}",
                    "model.decoder=null",
                    "loss.caption_weight=0",
                ],
                "needs a ViT of timm without class token",
            )
            for name in ("samvit_base_patch16_224", "hiera_tiny_224", "vitamin_small_224", "mixer_s32_224", "resnet18")
        ),
        (
            ["model.towers.vision_cfg={image_size: 16, patch_size: 8, width: 32, head_width: 16, layers: 1}"],
            "ViT of timm without class",
        ),
        (
            ["model.towers.vision_cfg.timm_model_name=resnet18", "model.towers.vision_cfg.timm_pool=''"],
            "has no features before pooling",
        ),
    ],
)
def test_what_cannot_be_distilled_is_refused_by_name(config_file, overrides, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        check_model_config(load_config(config_file, overrides))
