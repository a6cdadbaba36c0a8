"""The captioning loss against its slow twin, however the batch is cut, and runs that use it."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from sigray.losses import sigmoid_loss_plain, token_loss_plain
from sigray.orchestrator.config import ConfigError, load_config
from sigray.workers.config import LossConfig, ModelConfig
from sigray.workers.data.sample_hash import Purpose, are_drawn
from sigray.workers.model.decoder import ImageTokens, last_norm
from sigray.workers.model.tokenizer import CaptionEnds, build_tokenizer, find_caption_ends
from sigray.workers.model.towers import build_model, check_model, checkpoint_activations, named_parts, normalize_pixels
from tests.helpers.bare import train_bare
from tests.helpers.data import TOWERS, write_small_run
from tests.helpers.ranks import run_on_ranks
from tests.helpers.steps import NUM_PAIRS, SEED, check_gradients, global_batch, make_trainer, part_of, samples

SIGLIP = {
    "embed_dim": 32,
    "vision_cfg": {
        "timm_model_name": "siglip_vit_w32_d2_h2_m64_p8_s16",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
        "image_size": 16,
    },
    "text_cfg": TOWERS["text_cfg"],
}
SMALL = {"layers": 2, "width": 24, "heads": 2}
VOCABULARY = 400
MODEL = ModelConfig(
    towers=TOWERS | {"text_cfg": TOWERS["text_cfg"] | {"vocab_size": VOCABULARY}}, decoder={**SMALL, "bias": True}
)
MODELS = {
    "open_clip": MODEL,
    "timm": MODEL.model_copy(update={"towers": {**SIGLIP, "text_cfg": MODEL.towers["text_cfg"]}}),
}
LOSS = LossConfig(caption_weight=0.7, caption_parallel=0.4)


def captions():
    """Of every length from none to the whole context."""
    tokens = global_batch()[1]
    for row in range(NUM_PAIRS):
        tokens[row, row % (tokens.shape[1] + 1) :] = 0
    return tokens


def batch_of(rank, world_size):
    part = slice(rank * NUM_PAIRS // world_size, (rank + 1) * NUM_PAIRS // world_size)
    return dataclasses.replace(part_of(rank, world_size), tokens=captions()[part], samples=samples()[part])


def fill_head(module):
    """Weights for the decoder's head, which begins at zero: then no gradient goes further."""
    for parameter in (module.decoder.head.weight, module.decoder.head.bias):
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        parameter.data.copy_(values)


def step_on_rank(rank, world_size, num_micro_batches=1, model=MODEL, loss=LOSS, **settings):
    size = NUM_PAIRS // world_size // num_micro_batches
    trainer = make_trainer(world_size, model=model, loss=loss, micro_batch_size=size, **settings)
    fill_head(trainer.module)
    result = trainer.step(batch_of(rank, world_size))
    gradients = {name: parameter.grad for name, parameter in trainer.module.named_parameters()}
    return float(result.loss), gradients, {name: float(term) for name, term in result.terms.items()}


@functools.cache
def expected_step(towers="open_clip"):
    """Both terms and every gradient: one process, float64, caption by caption."""
    model, loss = MODELS[towers], LOSS
    torch.manual_seed(SEED)
    module = build_model(model)
    fill_head(module)
    module.double()
    images, tokens = global_batch()[0], captions()
    image_tokens = ImageTokens(module.visual)
    output = module(normalize_pixels(images, model).double(), tokens)
    scale, bias = output["logit_scale"], output["logit_bias"]
    contrastive = sigmoid_loss_plain(output["image_features"], output["text_features"], scale, bias)
    seen = image_tokens.take()
    is_parallel = are_drawn(samples(), SEED, Purpose.PARALLEL_CAPTION, loss.caption_parallel)
    assert 0 < is_parallel.sum() < NUM_PAIRS
    total = torch.zeros((), dtype=torch.float64)
    for row, caption in enumerate(tokens.tolist()):
        length = len(caption)
        while length and caption[length - 1] == 0:
            length -= 1
        length = min(length + 1, len(caption))  # the first pad ends a caption
        read = [VOCABULARY] * len(caption) if is_parallel[row] else [0, *caption[:-1]]
        causal = torch.ones(len(caption), len(caption)).tril().bool()
        may_see = causal | bool(is_parallel[row])
        states = module.decoder.read(seen[row : row + 1], torch.tensor([read]), may_see[None, None])
        targets = torch.tensor([caption[:length]])
        weights = torch.full((1, length), 1 / length, dtype=torch.float64)
        total = total + token_loss_plain(
            states[:, :length], module.decoder.head.weight, module.decoder.head.bias, targets, weights
        )
    (contrastive + loss.caption_weight * total / NUM_PAIRS).backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return contrastive.item(), total.item() / NUM_PAIRS, gradients


def check(ranks, contrastive, caption, expected, loss=LOSS):
    for name, want in {"contrastive_loss": contrastive, "caption_loss": caption}.items():
        assert np.mean([terms[name] for _, _, terms in ranks]) == pytest.approx(want, rel=1e-5)
    total = np.mean([value for value, _, _ in ranks])
    assert total == pytest.approx(contrastive + loss.caption_weight * caption, rel=1e-5)
    for _, gradients, _ in ranks:
        check_gradients(gradients, expected)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_loss_and_every_gradient_equal_the_twin(rank_groups, world_size, num_micro_batches):
    contrastive, caption, expected = expected_step()
    assert all(float(gradient.abs().max()) > 0 for gradient in expected.values())
    check(rank_groups(world_size).run(step_on_rank, num_micro_batches), contrastive, caption, expected)


@pytest.mark.parametrize("towers", list(MODELS))
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_other_towers_and_checkpointed_blocks(towers, num_micro_batches):
    model = MODELS[towers]
    found = step_on_rank(0, 1, num_micro_batches, model=model, activation_checkpointing=True)
    check([found], *expected_step(towers))


@pytest.mark.parametrize("tower", ["visual", "text"])
@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_a_locked_tower_gets_no_gradient(tower, num_micro_batches):
    model = MODEL.model_copy(update={"locked": [tower]})
    loss, gradients, terms = step_on_rank(0, 1, num_micro_batches, model=model)
    contrastive, caption, expected = expected_step()
    assert all(gradient is None for name, gradient in gradients.items() if name.startswith(tower))
    rest = {name: gradient for name, gradient in expected.items() if not name.startswith(tower)}
    check([(loss, gradients, terms)], contrastive, caption, rest)


def test_the_decoder_is_split_compiled_and_checkpointed():
    """All three go by `named_parts`."""
    module = build_model(MODEL)
    assert [name for name, _ in named_parts(module)] == ["visual", "text", "decoder"]
    before = [block.forward for block in module.decoder.blocks]
    checkpoint_activations(module, MODEL, lambda function, *inputs: function(*inputs))
    assert all(block.forward != plain for block, plain in zip(module.decoder.blocks, before, strict=True))


def test_image_tokens_are_those_of_the_towers_own_pass():
    """Parts of the tower that run alone, as views do, leave nothing here."""
    visual = build_model(MODEL).visual
    image_tokens = ImageTokens(visual)
    visual(torch.randn(2, 3, 16, 16))
    kept = image_tokens.take()
    assert kept.requires_grad
    last_norm(visual)[0](torch.randn(2, 4, 32))
    with pytest.raises(AssertionError):
        image_tokens.take()
    with torch.no_grad():
        visual(torch.randn(2, 3, 16, 16))
    with pytest.raises(AssertionError):
        image_tokens.take()


def test_without_a_weight_the_decoder_is_not_run():
    loss, gradients, terms = step_on_rank(0, 1, loss=LossConfig())
    assert terms == {}
    assert {name.split(".")[0] for name, gradient in gradients.items() if gradient is None} == {"decoder"}
    assert loss == pytest.approx(expected_step()[0], rel=1e-5)


def test_the_towers_draw_the_weights_that_they_have_without_a_decoder():
    torch.manual_seed(SEED)
    with_one = build_model(MODEL).state_dict()
    torch.manual_seed(SEED)
    without = build_model(MODEL.model_copy(update={"decoder": None})).state_dict()
    assert all(torch.equal(with_one[name], tensor) for name, tensor in without.items())
    assert all(name.startswith("decoder.") for name in with_one.keys() - without.keys())


@pytest.mark.parametrize(
    ("ends", "caption", "expected"),
    [
        (CaptionEnds(0, 0), [5, 6, 0, 0], 3),  # no token ends a caption
        (CaptionEnds(0, 1), [5, 1, 0, 0], 2),  # token 1 does
        (CaptionEnds(1, 1), [5, 1, 1, 1], 2),  # SigLIP: the pad is </s>
        (CaptionEnds(0, 1), [0, 5, 0, 1], 4),  # CLIP: 0 is a word too
        (CaptionEnds(0, 0), [5, 6, 7, 8], 4),
        (CaptionEnds(0, 0), [0, 0, 0, 0], 1),
        (CaptionEnds(0, 1), [0, 0, 0, 0], 0),
    ],
)
def test_the_tokens_that_count(ends, caption, expected):
    weights = ends.weights(np.array([caption], dtype=np.int32))[0]
    assert weights.tolist() == pytest.approx([1 / expected if expected else 0] * expected + [0] * (4 - expected))


def test_clips_tokenizer_has_an_end_of_its_own():
    model = ModelConfig(towers=TOWERS)
    assert find_caption_ends(model, build_tokenizer(model, 8, 49408)) == CaptionEnds(0, 49407)


@pytest.mark.parametrize(
    ("begin", "end", "pad", "expected"),
    [([], [2], 0, 2), ([1], [2], 0, 2), ([], [], 0, 0), ([1], [], 0, 0), ([1], [2], 2, 2), ([], [1], 1, 1)],
    ids=["end", "begin and end", "neither", "begin", "the end fills", "the end alone fills"],
)
def test_the_token_that_ends_a_caption(begin, end, pad, expected):
    def tokenize(captions):
        rows = [begin + [7] * bool(caption) + end for caption in captions]
        return np.array([row + [pad] * (8 - len(row)) for row in rows], dtype=np.int32)

    assert find_caption_ends(ModelConfig(towers=TOWERS), tokenize) == CaptionEnds(pad, expected)


@pytest.mark.parametrize("end", [[], [3]])
def test_captions_that_are_filled_on_the_left_are_refused(end):
    def tokenize(captions):
        rows = [[7] * bool(caption) + end for caption in captions]
        return np.array([[0] * (8 - len(row)) + row for row in rows], dtype=np.int32)

    with pytest.raises(ValueError, match=r"text_pad_side=right"):
        find_caption_ends(ModelConfig(towers=TOWERS, text_pad_side="left" if end else None), tokenize)


NUM_STEPS, BATCH = 12, 16
CAPTIONS = ["model.decoder={layers: 1, bias: true}", "loss.caption_weight=1", "optim.lr=3e-3"]
LATE = ["model.decoder={}", "train.ema=64", "phases=[{start: 0.5, loss: {caption_weight: 0.5}}]"]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return write_small_run(
        tmp_path_factory.mktemp("captions"),
        train={"num_samples": NUM_STEPS * BATCH, "global_batch_size": BATCH, "log_every_steps": 1},
        checkpoint={"save_every_steps": 3, "keep_newest": 10},
    )


def train(config_file, name, *overrides, world_size=1, last_step=None):
    config = load_config(config_file, [f"run.name={name}", *overrides])
    (found, *_) = run_on_ranks(world_size, train_bare, config, last_step)
    return found


def caption_losses(found):
    return {line["step"]: line["train/caption_loss"] for line in found["lines"] if "train/caption_loss" in line}


def test_a_run_learns_to_caption_and_says_so(config_file):
    found = train(config_file, "learns", *CAPTIONS, "optim.lr=0.03")
    losses = caption_losses(found)
    assert list(losses) == [*range(1, NUM_STEPS + 1)]
    assert losses[1] == pytest.approx(np.log(49408), rel=1e-6)  # the head begins at zero
    assert losses[NUM_STEPS] < 0.6 * losses[1]
    for line in found["lines"]:
        assert line["train/loss"] == pytest.approx(line["train/contrastive_loss"] + line["train/caption_loss"])


@pytest.mark.parametrize("overrides", [CAPTIONS, LATE], ids=["from the start", "from the middle"])
def test_a_stopped_run_goes_on_with_the_same_bits(config_file, overrides):
    name = f"run{len(overrides[0])}"
    whole = train(config_file, f"{name}-whole", *overrides)
    for last_step in (6, 9) if overrides is LATE else (5,):
        train(config_file, f"{name}-{last_step}", *overrides, last_step=last_step)
        rest = train(config_file, f"{name}-{last_step}", *overrides)
        assert rest["files"] == whole["files"]
    assert min(caption_losses(whole)) == (7 if overrides is LATE else 1)


@pytest.mark.parametrize("sharding", ["whole", "split"])
def test_ranks_and_split_weights_train_alike(config_file, sharding):
    alone = caption_losses(train(config_file, f"alone-{sharding}", *CAPTIONS))
    two = train(config_file, f"two-{sharding}", *CAPTIONS, f"sharding.weights={sharding}", world_size=2)
    assert caption_losses(two) == pytest.approx(alone, rel=1e-4)


def test_split_weights_with_captions_from_the_middle(config_file):
    """Before its phase the decoder is not run, and has no gradients."""
    overrides = [*LATE, "train.micro_batch_size=4"]
    whole = train(config_file, "late-whole", *overrides, world_size=2)
    split = train(config_file, "late-split", *overrides, "sharding.weights=split", world_size=2)
    assert split["losses"] == pytest.approx(whole["losses"], rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.caption_weight=1"], "loss.caption_weight=1 needs a decoder: set model.decoder"),
        (["phases=[{start: 0.5, loss: {caption_weight: 2}}]"], r"phases.0.loss.caption_weight=2 needs a decoder"),
        (["model.decoder={}"], "model.decoder is never trained: set loss.caption_weight=1"),
        (
            ["model.decoder={width: 2, heads: 1}", "loss.caption_weight=1", "model.towers.text_cfg.mlp_ratio=0.25"],
            "width=2 times",
        ),
        (["model.decoder={heads: 3}", "loss.caption_weight=1"], "width=16 does not divide by heads=3"),
        (
            ["model.towers.vision_cfg.layers=[1, 1, 1, 1]", "model.decoder={}", "loss.caption_weight=1"],
            "has no features before pooling",
        ),
        (
            ["model.towers.vision_cfg.final_ln_after_pool=true", "model.decoder={}", "loss.caption_weight=1"],
            "has no features before pooling",
        ),
        (
            [
                "model.decoder={}",
                "loss.caption_weight=1",
                "model.locked=[visual]",
                "embeddings.store=/tmp/none",
                "model.init_from=/tmp/none.pt",
            ],
            "model.decoder reads the image tower, which embeddings.store=/tmp/none replaces",
        ),
        (
            ["model.image_tower=/tmp/tower.pt", "model.locked=[visual]", "model.decoder={}", "loss.caption_weight=1"],
            "whose features a decoder cannot read",
        ),
    ],
)
def test_what_cannot_be_captioned_is_refused_by_name(config_file, overrides, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        check_model(load_config(config_file, overrides).model)
