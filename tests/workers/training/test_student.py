"""The self-distillation terms against a twin in float64: timm's own towers, DINO's equation, one view at a time."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import timm
import torch
from torch.nn.functional import normalize

from sigray.losses import sigmoid_loss_plain
from sigray.workers.config import DistillConfig, LossConfig, ModelConfig, OptimConfig
from sigray.workers.device import open_device
from sigray.workers.model.towers import build_model, normalize_pixels
from sigray.workers.training.optim import update_ema
from sigray.workers.training.phases import Schedule
from sigray.workers.training.step import Trainer
from sigray.workers.training.student import drawn_patches, num_masked
from tests.helpers.data import TOWERS
from tests.helpers.sinkhorn import sinkhorn
from tests.helpers.steps import NUM_PAIRS, SEED, check_gradients, global_batch, part_of, samples

SIZE, PATCH, LOCAL, NUM_LOCAL = 32, 8, 16, 3
MODEL = ModelConfig(
    towers={
        "embed_dim": 32,
        "vision_cfg": {
            "timm_model_name": f"siglip_vit_w32_d2_h2_m64_p{PATCH}_s{SIZE}",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
            "image_size": SIZE,
        },
        "text_cfg": TOWERS["text_cfg"] | {"vocab_size": 400, "width": 32},
    },
    heads={"hidden": 24, "bottleneck": 12, "prototypes": 20},
)
DISTILL = {"local_weight": 0.5, "masked_weight": 0.7, "num_local_views": NUM_LOCAL, "local_size": LOCAL}
MASKED = 8  # half of 16 patches


def rows_of_bytes():
    """(pairs, bytes): image, global view, local views."""
    num_bytes = 3 * (2 * SIZE**2 + NUM_LOCAL * LOCAL**2)
    return torch.from_numpy(np.random.RandomState(5).randint(0, 256, (NUM_PAIRS, num_bytes)).astype(np.uint8))


def make_trainer(world_size, num_micro_batches=1, ema=64, precision="fp32", **settings):
    trainer = Trainer(
        MODEL,
        OptimConfig(grad_clip_norm=None, schedule="constant"),
        LossConfig(distill=DistillConfig(**DISTILL | settings)),
        open_device("cpu", 0, precision),
        schedule=Schedule(NUM_PAIRS),
        global_batch_size=NUM_PAIRS,
        micro_batch_size=NUM_PAIRS // world_size // num_micro_batches,
        seed=SEED,
        ema=ema,
    )
    fill(trainer.module)
    return trainer


def fill(module):
    """Centers that are not zero, as after some steps."""
    generator = torch.Generator().manual_seed(2)
    for head in ("local", "masked"):
        center = module.distiller.get_buffer(f"{head}_center")
        center.copy_(0.2 * torch.randn(center.shape, generator=generator))


def batch_of(rank, world_size):
    part = slice(rank * NUM_PAIRS // world_size, (rank + 1) * NUM_PAIRS // world_size)
    return dataclasses.replace(part_of(rank, world_size), images=rows_of_bytes()[part], samples=samples()[part])


def set_averages(trainer):
    """A teacher that is not the student: averages with noise, as after some updates."""
    for parameter in trainer.module.parameters():
        trainer.optimizer.state[parameter] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter)}
        trainer.optimizer.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
    update_ema(trainer.optimizer, 0.5)
    generator = torch.Generator().manual_seed(3)
    for state in trainer.optimizer.state.values():
        state["ema"] += 0.05 * torch.randn(state["ema"].shape, generator=generator)


def step_on_rank(rank, world_size, num_micro_batches=1, has_average=True, **settings):
    trainer = make_trainer(world_size, num_micro_batches, **settings)
    if has_average:
        set_averages(trainer)
    batch = batch_of(rank, world_size)
    batch.images = batch.images[:, : trainer.pixels.num_bytes]  # without local views, if no term needs them
    result = trainer.step(batch)
    gradients = {name: parameter.grad for name, parameter in trainer.module.named_parameters()}
    terms = {name: float(value) for name, value in result.terms.items()}
    centers = [trainer.module.distiller.get_buffer(f"{head}_center") for head in ("local", "masked")]
    return float(result.loss), gradients, terms, centers


def tower_of(module):
    """timm's own tower that takes images of any size, with the weights of a model."""
    trunk = timm.create_model(
        MODEL.towers["vision_cfg"]["timm_model_name"], dynamic_img_size=True, global_pool="map", num_classes=0
    ).double()
    trunk.load_state_dict(module.visual.trunk.state_dict())
    return trunk


def logits_of(head, features):
    return normalize(head.mlp(features), dim=-1) @ normalize(head.prototypes, dim=-1).T


@functools.cache
def expected_step(predicts="masked", teacher="all", has_average=True, balance="center"):
    """Terms, gradients and new centers: one process, float64."""
    trainer = make_trainer(1)
    if has_average:
        set_averages(trainer)
    student = copy.deepcopy(trainer.module).double()
    other = copy.deepcopy(trainer.module).double()
    own = dict(trainer.module.named_parameters())
    for name, parameter in other.named_parameters():
        if has_average and (teacher == "all" or name.startswith("distiller.")):
            parameter.data.copy_(trainer.optimizer.state[own[name]]["ema"])
    rows = rows_of_bytes()
    edges = np.cumsum([3 * SIZE**2, 3 * SIZE**2])
    images, large, small = (rows[:, : edges[0]], rows[:, edges[0] : edges[1]], rows[:, edges[1] :])
    output = student(normalize_pixels(images.view(-1, SIZE, SIZE, 3), MODEL).double(), global_batch()[1])
    contrastive = sigmoid_loss_plain(
        *(output[name] for name in ("image_features", "text_features", "logit_scale", "logit_bias"))
    )
    large = normalize_pixels(large.reshape(-1, SIZE, SIZE, 3), MODEL).double()
    small = small.reshape(NUM_PAIRS, NUM_LOCAL, LOCAL, LOCAL, 3)
    trunk = tower_of(other)
    patches = trunk.forward_features(large).detach()
    pooled = trunk.forward_head(patches).detach()
    # The student's tower has its own weights; gradients are read from the copy and added to the student's.
    learner = tower_of(student)
    centers = {}

    def cross_entropy(head, found, wanted):
        center = student.distiller.get_buffer(f"{head}_center")
        p = torch.softmax((wanted - center) / 0.04, dim=-1) if balance == "center" else sinkhorn(wanted, 0.04)
        return -(p * torch.log_softmax(found / 0.1, dim=-1)).sum(dim=-1).mean()

    wanted = logits_of(other.distiller.local_head, pooled).detach()
    local = torch.zeros((), dtype=torch.float64)
    for view in range(NUM_LOCAL):
        pixels = normalize_pixels(small[:, view], MODEL).double()
        found = logits_of(student.distiller.local_head, learner(pixels))
        local = local + cross_entropy("local", found, wanted) / NUM_LOCAL
    centers["local"] = 0.9 * student.distiller.local_center + 0.1 * wanted.mean(dim=0)
    masked = torch.from_numpy(drawn_patches(samples(), SEED, 16, MASKED))
    handle = learner.patch_embed.register_forward_hook(
        lambda _, __, grid: torch.where(masked.view(-1, 4, 4, 1), student.distiller.mask_token, grid)
    )
    seen = learner.forward_features(large)
    handle.remove()
    reads = torch.ones_like(masked) if predicts == "all" else masked
    wanted = logits_of(other.distiller.masked_head, patches[reads]).detach()
    prediction = cross_entropy("masked", logits_of(student.distiller.masked_head, seen[reads]), wanted)
    centers["masked"] = 0.9 * student.distiller.masked_center + 0.1 * wanted.mean(dim=0)
    if balance == "sinkhorn":
        centers = {head: student.distiller.get_buffer(f"{head}_center") for head in centers}
    (contrastive + 0.5 * local + 0.7 * prediction).backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    for name, parameter in learner.named_parameters():
        gradients[f"visual.trunk.{name}"] = gradients[f"visual.trunk.{name}"] + parameter.grad
    terms = {"contrastive_loss": contrastive, "local_loss": local, "masked_loss": prediction}
    return {name: value.item() for name, value in terms.items()}, gradients, list(centers.values())


def check(ranks, terms, gradients, centers):
    for name, want in terms.items():
        assert np.mean([found[name] for _, _, found, _ in ranks]) == pytest.approx(want, rel=1e-5)
    total = terms["contrastive_loss"] + 0.5 * terms["local_loss"] + 0.7 * terms["masked_loss"]
    assert np.mean([loss for loss, *_ in ranks]) == pytest.approx(total, rel=1e-5)
    for _, found, _, own in ranks:
        check_gradients(found, gradients)
        for center, want in zip(own, centers, strict=True):
            assert (center - want).abs().max() < 1e-6
    assert all(
        torch.equal(center, other) for _, _, _, own in ranks for center, other in zip(own, ranks[0][3], strict=True)
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_loss_and_every_gradient_equal_the_twin(rank_groups, world_size, num_micro_batches):
    expected = expected_step()
    assert all(float(gradient.abs().max()) > 0 for gradient in expected[1].values())
    check(rank_groups(world_size).run(step_on_rank, num_micro_batches), *expected)


@pytest.mark.parametrize(("world_size", "num_micro_batches"), [(1, 1), (1, 4), (2, 3), (3, 1)])
def test_sinkhorn_balances_the_whole_batch(rank_groups, world_size, num_micro_batches):
    expected = expected_step(balance="sinkhorn")
    run = functools.partial(step_on_rank, balance="sinkhorn")
    check(rank_groups(world_size).run(run, num_micro_batches), *expected)
    assert abs(expected[0]["local_loss"] - expected_step()[0]["local_loss"]) > 0.01


@pytest.mark.parametrize("settings", [{"predicts": "all"}, {"teacher": "heads"}, {"has_average": False}], ids=str)
def test_other_targets_and_teachers(settings):
    check([step_on_rank(0, 1, 2, **settings)], *expected_step(**settings))
    assert expected_step(**settings)[0] != expected_step()[0]


@pytest.mark.parametrize("term", ["local", "masked"])
def test_a_term_of_weight_zero_is_not_computed(term):
    _, gradients, terms, _ = step_on_rank(0, 1, **{f"{term}_weight": 0.0})
    assert f"{term}_loss" not in terms
    assert {name.split(".")[1] for name, each in gradients.items() if each is None} >= {f"{term}_head"}


@pytest.mark.parametrize("teacher", ["all", "heads"])
@pytest.mark.parametrize("has_average", [False, True])
def test_autocast_leaves_the_student_its_gradients(has_average, teacher):
    """Autocast keeps the weights that it casts. The teacher, which runs first and without a graph, must not fill it."""
    settings = {"has_average": has_average, "teacher": teacher}
    expected, found = step_on_rank(0, 1, **settings)[1], step_on_rank(0, 1, precision="bf16", **settings)[1]
    for name, gradient in found.items():
        assert gradient is not None, name
        assert (gradient - expected[name]).norm() < 0.1 * expected[name].norm() + 1e-6, name


def test_the_masked_patches_of_a_sample_are_its_own():
    places = np.stack([np.zeros(100), np.zeros(100), np.arange(100)], axis=1).astype(np.int64)
    masked = drawn_patches(places, 5, 16, 8)
    assert set(masked.sum(axis=1)) == {MASKED}
    assert np.array_equal(drawn_patches(places[40:60], 5, 16, 8), masked[40:60])
    assert len({row.tobytes() for row in masked}) > 95
    assert 0.3 < masked.mean(axis=0).min() <= masked.mean(axis=0).max() < 0.7
    assert num_masked(16, DistillConfig(mask_fraction=0.001)) == 1


def test_the_tower_is_in_training_mode_after_the_teacher_ran():
    trainer = make_trainer(1)
    trainer.step(batch_of(0, 1))
    assert all(part.training for part in trainer.module.modules())
    assert build_model(MODEL).training


def test_patches_must_divide_a_small_crop():
    with pytest.raises(ValueError, match="local_size=20 does not divide by the patches of 8 pixels"):
        make_trainer(1, local_size=20)
