"""Locked towers, parameter groups and Lion: what they change, and that nothing else changes."""

import io
from typing import ClassVar

import numpy as np
import pytest
import torch
from timm.optim._param_groups import param_groups_layer_decay

from sigray.workers.config import ModelConfig, OptimConfig
from sigray.workers.device import open_device
from sigray.workers.model.towers import build_model, check_model, layer_scales, lock_towers
from sigray.workers.training.optim import build_optimizer, decayed_names, parameter_groups
from sigray.workers.training.phases import Schedule
from sigray.workers.training.step import Trainer
from tests.helpers.data import TOWERS
from tests.helpers.steps import global_batch, make_trainer, part_of

LOCKED = ModelConfig(towers=TOWERS, locked=["visual"])


def gradients(trainer):
    return {name: parameter.grad for name, parameter in trainer.module.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("tower", ["visual", "text"])
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_a_locked_tower_keeps_its_weights_and_changes_no_other_gradient(tower, num_micro_batches):
    size = len(global_batch()[0]) // num_micro_batches
    free, locked = (
        make_trainer(1, model=ModelConfig(towers=TOWERS, locked=towers), micro_batch_size=size)
        for towers in ([], [tower])
    )
    before = {name: tensor.clone() for name, tensor in locked.module.state_dict().items()}
    losses = [trainer.step(part_of(0, 1)).loss for trainer in (free, locked)]
    assert losses[0] == losses[1]
    all_gradients, left = gradients(free), gradients(locked)
    assert left.keys() == {name for name in all_gradients if not name.startswith(f"{tower}.")}
    assert {"logit_scale", "logit_bias"} <= left.keys()
    for name, gradient in left.items():
        torch.testing.assert_close(gradient, all_gradients[name], msg=name)
    for name, tensor in locked.module.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith(f"{tower}."), name
    in_optimizer = {id(parameter) for group in locked.optimizer.param_groups for parameter in group["params"]}
    for name, parameter in locked.module.named_parameters():
        assert (id(parameter) in in_optimizer) != name.startswith(f"{tower}."), name


DEEP = TOWERS | {
    "vision_cfg": TOWERS["vision_cfg"] | {"layers": 3},
    "text_cfg": TOWERS["text_cfg"] | {"layers": 3},
}


@pytest.mark.parametrize(
    ("towers", "tower", "num_trained", "trained"),
    [
        (DEEP, "visual", 1, {"transformer.resblocks.2", "ln_post", "proj"}),
        (DEEP, "visual", 2, {"transformer.resblocks.1", "transformer.resblocks.2", "ln_post", "proj"}),
        (DEEP, "text", 2, {"transformer.resblocks.1", "transformer.resblocks.2", "ln_final", "text_projection"}),
    ],
)
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_the_last_blocks_of_a_tower_are_trained(towers, tower, num_trained, trained, num_micro_batches):
    size = len(global_batch()[0]) // num_micro_batches
    # What is locked drops nothing.
    dropping = towers | {"vision_cfg": towers["vision_cfg"] | ({"patch_dropout": 0.5} if tower == "visual" else {})}
    free = make_trainer(1, model=ModelConfig(towers=towers), micro_batch_size=size)
    partly = make_trainer(
        1, model=ModelConfig(towers=dropping, trained_blocks={tower: num_trained}), micro_batch_size=size
    )
    before = {name: tensor.clone() for name, tensor in partly.module.state_dict().items()}
    losses = [trainer.step(part_of(0, 1)).loss for trainer in (free, partly)]
    torch.testing.assert_close(losses[1], losses[0])
    all_gradients, left = gradients(free), gradients(partly)
    fixed = {
        name
        for name in all_gradients
        if name.startswith(f"{tower}.")
        and not any(f"{name.removeprefix(f'{tower}.')}.".startswith(f"{part}.") for part in trained)
    }
    assert fixed
    assert left.keys() == all_gradients.keys() - fixed
    for name, gradient in left.items():
        torch.testing.assert_close(gradient, all_gradients[name], msg=name)
    for name, tensor in partly.module.state_dict().items():
        if name in all_gradients:
            assert torch.equal(tensor, before[name]) == (name in fixed), name


def test_the_last_block_of_a_tower_of_timm():
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 224}
    module = check_model(ModelConfig(towers=TOWERS | {"vision_cfg": vision}, trained_blocks={"visual": 1}))
    trained = {name for name, value in module.get_submodule("visual").named_parameters() if value.requires_grad}
    assert {name.rpartition(".")[0] for name in trained if "blocks" not in name} == {"trunk.norm", "head.proj"}
    assert {name.split(".")[2] for name in trained if "blocks" in name} == {"11"}


def test_more_trained_blocks_than_there_are():
    with pytest.raises(ValueError, match="trained_blocks: the text tower has 3 blocks, not 4"):
        check_model(ModelConfig(towers=DEEP, trained_blocks={"text": 4}))
    with pytest.raises(ValueError, match="visual is in locked and in trained_blocks"):
        ModelConfig(towers=DEEP, trained_blocks={"visual": 1}, locked=["visual"])


@pytest.mark.parametrize(("num_micro_batches", "image_passes", "text_passes"), [(1, 1, 1), (4, 4, 8)])
def test_a_locked_tower_runs_once_and_keeps_no_graph(num_micro_batches, image_passes, text_passes):
    trainer = make_trainer(1, model=LOCKED, micro_batch_size=48 // num_micro_batches)
    calls = {"visual": [], "text": []}
    for name, made in calls.items():
        trainer.module.get_submodule(name).register_forward_hook(lambda _, __, out, made=made: made.append(out))
    trainer.step(part_of(0, 1))
    assert (len(calls["visual"]), len(calls["text"])) == (image_passes, text_passes)
    assert not any(features.requires_grad for features in calls["visual"])


def test_a_locked_tower_has_no_dropout():
    dropout = TOWERS | {"vision_cfg": TOWERS["vision_cfg"] | {"patch_dropout": 0.5}}
    with_dropout = make_trainer(1, model=ModelConfig(towers=dropout, locked=["visual"]))
    without = make_trainer(1, model=LOCKED)
    assert with_dropout.step(part_of(0, 1)).loss == without.step(part_of(0, 1)).loss
    assert (
        make_trainer(1, model=ModelConfig(towers=dropout)).step(part_of(0, 1)).loss != without.step(part_of(0, 1)).loss
    )


def test_both_towers_locked_is_refused():
    with pytest.raises(ValueError, match=r"locked=\['visual', 'text'\]: one of visual and text at most"):
        ModelConfig(towers=TOWERS, locked=["visual", "text"])


def test_without_groups_the_optimizer_is_what_it_was():
    module = build_model(ModelConfig(towers=TOWERS))
    optimizer = build_optimizer(module, OptimConfig(lr=0.5, weight_decay=0.1), {"fused": True})
    assert type(optimizer) is torch.optim.AdamW
    named = list(module.named_parameters())
    expected = torch.optim.AdamW(
        [
            {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0},
            {"params": [p for _, p in named if p.ndim == 0], "weight_decay": 0.0},
        ],
        lr=0.5,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    assert optimizer.state_dict() == expected.state_dict()


def groups_of(optim, model=None):
    module = build_model(model or ModelConfig(towers=TOWERS))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    lock_towers(module, model or ModelConfig(towers=TOWERS))
    return [
        ({names[id(parameter)] for parameter in group["params"]}, group["weight_decay"], group.get("lr_scale"))
        for group in parameter_groups(module, optim)
    ]


def test_the_first_group_that_matches_counts_and_biases_never_decay():
    optim = OptimConfig(
        weight_decay=0.1,
        groups=[
            {"match": r"visual\.conv1\..*", "weight_decay": 0.3},
            {"match": r"visual\..*", "lr_scale": 0.1, "weight_decay": 0},
        ],
    )
    matrices, plain, scalars, conv, image_matrices, image_plain = groups_of(optim)
    assert (conv[0], conv[1], conv[2]) == ({"visual.conv1.weight"}, 0.3, 1.0)
    assert image_matrices[1:] == (0.0, 0.1)
    assert image_plain[1:] == (0.0, 0.1)
    assert matrices[1:] == (0.1, None)
    assert plain[1:] == (0.0, None)
    assert scalars == ({"logit_scale", "logit_bias"}, 0.0, None)
    everything = [matrices[0], plain[0], scalars[0], conv[0], image_matrices[0], image_plain[0]]
    assert sum(map(len, everything)) == len(set().union(*everything))
    assert all(name.startswith("visual.") for name in image_matrices[0] | image_plain[0])
    assert not any(name.startswith("visual.") for name in matrices[0] | plain[0])
    assert "visual.ln_post.bias" in image_plain[0]


def test_a_group_keeps_the_decay_of_the_run_unless_it_names_one():
    groups = groups_of(OptimConfig(weight_decay=0.2, groups=[{"match": "text.*", "lr_scale": 2}]))
    assert groups[3][1:] == (0.2, 2.0)


@pytest.mark.parametrize(
    ("match", "model"),
    [(r"vision\..*", ModelConfig(towers=TOWERS)), ("conv1", ModelConfig(towers=TOWERS)), (r"visual\..*", LOCKED)],
)
def test_a_pattern_that_matches_nothing_that_trains_is_an_error_with_names(match, model):
    optim = OptimConfig(groups=[{"match": match}])
    with pytest.raises(ValueError, match=r"optim\.groups\[0\]\.match=.* no parameter that trains; .* text\."):
        parameter_groups(check_model(model), optim)


def test_a_pattern_hidden_by_those_before_it_is_an_error():
    optim = OptimConfig(groups=[{"match": ".*"}, {"match": "logit_bias"}])
    with pytest.raises(ValueError, match=r"optim\.groups\[1\]\.match='logit_bias' is the first match of no parameter"):
        groups_of(optim)


def test_what_is_no_regular_expression_is_an_error_of_the_config():
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression: missing \)"):
        OptimConfig(groups=[{"match": "("}])


class ArraysOfBigVision(dict[str, np.ndarray]):
    """Weights of a SigLIP of big_vision by name, for width 64 and two heads: kernels are ones, the others zeros."""

    SHAPES: ClassVar[dict[str, tuple[int, ...]]] = {
        "img/embedding/kernel": (16, 16, 3, 64),
        "img/pos_embedding": (1, 101, 64),
        "txt/pos_embedding": (1, 8, 64),
        "txt/Embed_0/embedding": (100, 64),
        "img/cls": (1, 1, 64),
        "probe": (1, 1, 64),
        "out/kernel": (2, 32, 64),
        "Dense_0/kernel": (64, 192),
        "Dense_0/bias": (192,),
        "Dense_1/kernel": (192, 64),
        "head/kernel": (64, 64),
        "kernel": (64, 2, 32),
        "b": (1,),
        "t": (1,),
    }

    def __missing__(self, name: str) -> np.ndarray:
        shape = next((shape for ending, shape in self.SHAPES.items() if name.endswith(ending)), (64,))
        return np.full(shape, float(name.endswith("/kernel")), np.float32)


SIGLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2, "mlp_ratio": 3}
    | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
}


def test_kernels_are_what_big_vision_calls_so(monkeypatch):
    """Each parameter, by the name of what open_clip's converter puts into it."""
    from open_clip.convert import load_big_vision_weights

    module = build_model(ModelConfig(towers=SIGLIP))
    monkeypatch.setattr(np, "load", lambda _: ArraysOfBigVision())
    load_big_vision_weights(module, "siglip.npz")
    kernels = {name for name, parameter in module.named_parameters() if parameter.ne(0).all()}
    assert decayed_names(module, "kernels") == kernels
    spared = decayed_names(module, "matrices") - kernels
    assert {name.rpartition(".")[2] for name in spared} == {
        *("cls_token", "pos_embed", "latent", "positional_embedding"),
        "weight",  # of the token embedding
    }


def test_bare_projections_of_clip_are_kernels():
    module = build_model(ModelConfig(towers=TOWERS))
    spared = {"text.positional_embedding", "text.token_embedding.weight", "visual.positional_embedding"}
    assert decayed_names(module, "matrices") - decayed_names(module, "kernels") == spared


def test_decay_and_rates_by_layer_are_those_of_timm():
    """Only the norm after the blocks is part of the last block in timm, and of what follows it in BEiT and here."""
    model = ModelConfig(towers=SIGLIP)
    module = build_model(model)
    trunk = module.visual.trunk
    names = {id(parameter): f"visual.trunk.{name}" for name, parameter in trunk.named_parameters()}
    expected = [
        (names[id(parameter)], group["weight_decay"], group["lr_scale"])
        for group in param_groups_layer_decay(trunk, 0.1, trunk.no_weight_decay(), layer_decay=0.7)
        for parameter in group["params"]
    ]
    decayed, scales = decayed_names(module, "timm"), layer_scales(module, model, {"visual": 0.7})
    assert {name for name, decay, _ in expected if decay} == {name for name in decayed if name.startswith("visual.")}
    norm = {"visual.trunk.norm.weight": 1.0, "visual.trunk.norm.bias": 1.0}
    assert scales == pytest.approx({name: scale for name, _, scale in expected} | norm)
    assert min(scales.values()) == pytest.approx(0.7**7)  # six blocks


def test_layers_and_groups_multiply():
    optim = OptimConfig(layer_decay={"text": 0.5}, groups=[{"match": ".*positional_embedding", "lr_scale": 3.0}])
    module, model = build_model(ModelConfig(towers=TOWERS)), ModelConfig(towers=TOWERS)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    scales = {
        names[id(parameter)]: group.get("lr_scale", 1.0)
        for group in parameter_groups(module, optim, layer_scales(module, model, optim.layer_decay))
        for parameter in group["params"]
    }
    assert (scales["text.positional_embedding"], scales["visual.positional_embedding"]) == (0.75, 3.0)
    assert (scales["text.token_embedding.weight"], scales["text.text_projection"], scales["logit_scale"]) == (
        0.25,
        1,
        1,
    )


def trainer_of(optim):
    return Trainer(
        ModelConfig(towers=TOWERS),
        optim,
        make_trainer(1)._loss,
        open_device("cpu", 0, "fp32"),
        schedule=Schedule(480),
        global_batch_size=48,
        micro_batch_size=None,
        seed=3,
    )


def test_a_scaled_rate_scales_the_step():
    """SGD-like check: AdamW's first step is lr * sign-like, so the change scales with the rate."""
    plain, scaled = (
        trainer_of(OptimConfig(schedule="constant", weight_decay=0, groups=groups))
        for groups in ([], [{"match": r"visual\..*", "lr_scale": 0.1}])
    )
    before = {name: tensor.clone() for name, tensor in plain.module.state_dict().items()}
    rates = [trainer.step(part_of(0, 1)).learning_rate for trainer in (plain, scaled)]
    assert rates[0] == rates[1] == 1e-3
    for name, tensor in plain.module.state_dict().items():
        change, other = tensor - before[name], scaled.module.state_dict()[name] - before[name]
        factor = 0.1 if name.startswith("visual.") else 1.0
        torch.testing.assert_close(other, factor * change, rtol=1e-3, atol=1e-7, msg=name)


def test_lion_does_what_its_paper_says():
    optim = OptimConfig(name="lion", lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.5)
    module = build_model(ModelConfig(towers=TOWERS))
    optimizer = build_optimizer(module, optim, {})
    name = "visual.conv1.weight"
    parameter = module.get_parameter(name)
    weights, momentum = parameter.detach().double(), torch.zeros_like(parameter).double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.step()
        # Algorithm 2 of arXiv 2302.06675.
        update = (0.9 * momentum + 0.1 * gradient.double()).sign()
        weights = weights - 0.1 * (update + 0.5 * weights)
        momentum = 0.99 * momentum + 0.01 * gradient.double()
    torch.testing.assert_close(parameter.detach().double(), weights, rtol=1e-5, atol=1e-6)


def adafactor_of_big_vision(weights, gradients, *, lr, cap, decay):
    """Its chain in float64, step by step: optax's factored RMS scaling, its average, rate and decay.

    The average is stored in bfloat16 between steps and used unrounded, as optax.ema does.
    """
    factored = weights.ndim >= 2 and sorted(weights.shape)[-2] >= 32
    rows = columns = second = torch.zeros(())
    momentum = torch.zeros_like(weights)
    for step, gradient in enumerate(gradients, start=1):
        gradient = gradient.double()
        beta2 = min(cap, 1 - step**-0.8)
        square = gradient**2 + 1e-30
        if factored:
            row_axis, column_axis = sorted(range(weights.ndim), key=lambda axis: weights.shape[axis])[-2:]
            rows = beta2 * rows + (1 - beta2) * square.mean(dim=column_axis, keepdim=True)
            columns = beta2 * columns + (1 - beta2) * square.mean(dim=row_axis, keepdim=True)
            update = gradient * (rows / rows.mean(dim=row_axis, keepdim=True)) ** -0.5 * columns**-0.5
        else:
            second = beta2 * second + (1 - beta2) * square
            update = gradient * second**-0.5
        average = 0.9 * momentum + 0.1 * update
        momentum = average.bfloat16().double()
        weights = weights - lr * (average + decay * weights)
    return weights


@pytest.mark.parametrize("shape", [(48, 64), (96, 40), (40, 3, 8, 64), (48, 16), (64,), ()])
def test_adafactor_is_that_of_big_vision(shape):
    """Also past the step from which the cap of beta2 holds: 1 - t**-0.8 is 0.95 at step 42."""
    optim = OptimConfig(name="adafactor", lr=0.01, beta1=0.9, beta2=0.95, weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    start = torch.randn(shape, generator=generator)
    module.weight = torch.nn.Parameter(start.clone())
    optimizer = build_optimizer(module, optim, {})
    # Gradients shrink late: how fast the second moment forgets the large ones is what the cap decides.
    gradients = [torch.randn(shape, generator=generator) * (10 if step < 150 else 1) for step in range(200)]
    for gradient in gradients:
        module.weight.grad = gradient.clone()
        optimizer.step()
    decay = 0.05 if len(shape) >= 2 else 0.0
    expected = adafactor_of_big_vision(start.double(), gradients, lr=0.01, cap=0.95, decay=decay)
    uncapped = adafactor_of_big_vision(start.double(), gradients, lr=0.01, cap=0.999, decay=decay)
    change = (expected - start).norm()
    # timm rounds to bfloat16 what optax uses unrounded: up to 2**-9 of each update.
    assert (module.weight.detach() - expected).norm() < 0.01 * change
    assert (uncapped - expected).norm() > 0.02 * change, "the cap must be seen"


def test_adafactor_keeps_a_quarter_of_the_state():
    sizes = {}
    for name in ("adamw", "adafactor"):
        module = torch.nn.Linear(256, 512, bias=False)
        optimizer = build_optimizer(module, OptimConfig(name=name), {})
        module.weight.grad = torch.ones_like(module.weight)
        optimizer.step()
        state = optimizer.state[module.weight].values()
        sizes[name] = sum(tensor.numel() * tensor.element_size() for tensor in state)
    assert sizes["adafactor"] / sizes["adamw"] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_a_resumed_run_with_groups_goes_on_as_the_unbroken_one(name):
    groups = [{"match": r"visual\..*", "lr_scale": 0.1, "weight_decay": 0}]
    optim = OptimConfig(name=name, groups=groups, weight_decay_on="kernels", layer_decay={"visual": 0.5, "text": 0.9})
    unbroken = trainer_of(optim)
    unbroken.step(part_of(0, 1))
    file = io.BytesIO()
    torch.save(unbroken.optimizer.state_dict(), file)
    weights = {key: tensor.clone() for key, tensor in unbroken.module.state_dict().items()}
    resumed = trainer_of(optim)
    resumed.module.load_state_dict(weights)
    file.seek(0)
    resumed.optimizer.load_state_dict(torch.load(file, weights_only=True))
    for trainer in (unbroken, resumed):
        trainer.step(part_of(0, 1))
    for key, tensor in unbroken.module.state_dict().items():
        assert torch.equal(tensor, resumed.module.state_dict()[key]), key
