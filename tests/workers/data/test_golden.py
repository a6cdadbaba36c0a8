"""What is random in a run against golden values, which `tests/golden/make.py` writes by the docs' definitions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sigray.losses.negatives import random_drop
from sigray.workers.config import DataConfig, LabelNoise, LossConfig, ModelConfig, OptimConfig
from sigray.workers.data.decode import Decoder, random_box, sample_random
from sigray.workers.data.label_noise import Noise
from sigray.workers.data.loader import Batch
from sigray.workers.data.order import StreamOrder
from sigray.workers.device import open_device
from sigray.workers.training.phases import Schedule
from sigray.workers.training.step import Trainer
from tests.golden.make import FILE, text
from tests.helpers.data import TOWERS
from tests.helpers.ranks import run_on_ranks

GOLDEN = json.loads(FILE.read_text())


def test_the_file_is_what_the_script_makes():
    assert FILE.read_text() == text()


@pytest.mark.parametrize("asked", GOLDEN["order"], ids=lambda asked: f"seed{asked['seed']}lanes{asked['num_lanes']}")
def test_golden_order(asked):
    order = StreamOrder(
        asked["datasets"],
        asked["weights"],
        seed=asked["seed"],
        num_lanes=asked["num_lanes"],
        shuffle_window=asked["shuffle_window"],
    )
    for step, batch in enumerate(asked["batches"]):
        pieces = order.rank_part(step, asked["global_batch_size"], 0, 1)
        assert np.concatenate([order.places(piece) for piece in pieces]).tolist() == batch


def test_golden_crops():
    for asked in GOLDEN["crop"]:
        random = sample_random(asked["seed"], *asked["place"])
        assert list(random_box(*asked["image"], random.uniforms("crop"))) == asked["box"]


def test_golden_captions():
    for asked in GOLDEN["caption"]:
        decoder = Decoder(DataConfig(shards="/none", captions=asked["sources"]), 16)
        texts = dict(asked["captions"])
        members = {"txt": texts.pop("txt")[0].encode()}
        members["json"] = json.dumps({source.removeprefix("json:"): found for source, found in texts.items()}).encode()
        assert decoder.choose_caption(members, sample_random(asked["seed"], *asked["place"])) == asked["chosen"]


@pytest.mark.parametrize("asked", GOLDEN["noise"], ids=lambda asked: f"seed{asked['seed']}")
def test_golden_label_noise(asked):
    places, fraction = np.array(asked["places"]), asked["fraction"]
    images, tokens = np.zeros((len(places), 2, 2, 3), np.uint8), np.full((len(places), 5), -1, np.int32)
    noise = Noise(LabelNoise(kind="all", fraction=fraction), asked["seed"], 1000, 0)
    assert noise.caption_rows(places).tolist() == asked["caption_rows"]
    noise.corrupt(places, images, tokens)
    for row in range(len(places)):
        assert images[row].flatten().tolist() == asked["images"].get(str(row), [0] * 12)
        assert tokens[row].tolist() == asked["captions"].get(str(row), [-1] * 5)


def make_trainer(seed: int, loss: LossConfig, micro_batch_size: int | None = None) -> Trainer:
    return Trainer(
        ModelConfig(towers=TOWERS, init_logit_bias=0.0),
        OptimConfig(),
        loss,
        open_device("cpu", 0, "fp32"),
        schedule=Schedule(8),
        global_batch_size=8,
        micro_batch_size=micro_batch_size,
        seed=seed,
    )


@pytest.mark.parametrize("asked", GOLDEN["negatives"], ids=lambda asked: f"seed{asked['seed']}step{asked['step']}")
def test_golden_random_negatives(asked):
    """By the gradient of the image features: with orthogonal texts, its entry j is there for a text that counts."""
    trainer = make_trainer(asked["seed"], LossConfig(negatives="random", negatives_fraction=asked["fraction"]))
    images = torch.zeros(8, 16, requires_grad=True)
    texts = torch.eye(8, 16)
    trainer._global_loss(images, texts, asked["step"], 8, []).backward()
    assert images.grad is not None
    # What does not count leaves e^-87 (docs/numerics.md), what counts a sigmoid of 0 in eight.
    counts = (images.grad[:, :8] > 1e-3) | torch.eye(8, dtype=torch.bool)
    assert counts.tolist() == (torch.tensor(asked["kept"]) | torch.eye(8, dtype=torch.bool)).tolist()


def test_golden_random_negatives_of_large_numbers():
    """The hash on numbers past 16 bits, where products wrap."""
    from tests.golden.definition import is_kept

    images, texts = torch.tensor([0, 77_777, 2**20 + 3]), torch.tensor([5, 1_000_000])
    dropped = random_drop(images, texts, 4_000_000_000, 0.5)
    kept = [[is_kept(image, text, 4_000_000_000, 0.5) for text in texts.tolist()] for image in images.tolist()]
    assert (~dropped).tolist() == kept


def seeds_of_towers(rank: int, world_size: int) -> dict[tuple[int, int, int], list[int]]:
    """(seed, step, rank) -> torch's seed in each forward pass of a step of three micro-batches."""
    found = {}
    for seed in (0, 3):
        trainer = make_trainer(seed, LossConfig(), micro_batch_size=1)
        seen: list[int] = []
        trainer.module.register_forward_pre_hook(lambda *_, seen=seen: seen.append(torch.initial_seed()))
        for step in (0, 1):
            seen.clear()
            origin = {"samples": np.zeros((3, 3), np.int64), "keys": [""] * 3, "replaced": np.zeros(3, bool)}
            images, tokens = torch.zeros(3, 16, 16, 3, dtype=torch.uint8), torch.ones(3, 8, dtype=torch.int32)
            trainer.step(Batch(step, images, tokens, **origin))
            found[seed, step, rank] = list(seen)
    return found


def test_golden_draws_of_the_towers():
    """Both passes over a micro-batch begin with the random state of (seed, step, rank, micro-batch)."""
    by_rank = run_on_ranks(2, seeds_of_towers)
    for asked in GOLDEN["tower_draws"]:
        seen = by_rank[asked["rank"]][asked["seed"], asked["step"], asked["rank"]]
        assert len(seen) == 6
        assert seen[asked["micro_batch"] :: 3] == [asked["draws"]] * 2
