"""Corrupted pairs: which, how, and that neither ranks nor batch sizes change any of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sigray.workers.config import LabelNoise
from sigray.workers.data.label_noise import Noise
from sigray.workers.data.loader import Batch, Loader
from sigray.workers.data.manifest import scan_shards
from sigray.workers.data.sample_hash import place_hash
from sigray.workers.data.worker import DataWorker, build_order, image_kind
from sigray.workers.model.tokenizer import CaptionEnds
from tests.helpers.bare import OneWorker

N, VOCAB = 4000, 1000


def places(count: int = N) -> np.ndarray:
    numbers = np.arange(count)
    return np.stack([numbers // 500, numbers % 7, numbers], axis=1).astype(np.int64)


def corrupted(kind: str, fraction: float, seed: int = 0, count: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which images, which captions changed, and the rows that captions come from."""
    noise, samples = Noise(LabelNoise(kind=kind, fraction=fraction), seed, VOCAB, 0), places(count)
    images = np.zeros((count, 4, 4, 3), np.uint8)
    tokens = np.zeros((count, 6), np.int32)
    rows = noise.caption_rows(samples)
    noise.corrupt(samples, images, tokens)
    return images.any(axis=(1, 2, 3)), tokens.any(axis=1), rows


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("image", (True, False, False)),
        ("text", (False, True, False)),
        ("alignment", (False, False, True)),
        ("image_text", (True, True, False)),
        ("all", (True, True, True)),
    ],
)
def test_each_kind_corrupts_its_fraction_of_what_it_names(kind, changes):
    images, texts, rows = corrupted(kind, 0.3)
    for changed, expected in zip((images, texts, rows != np.arange(N)), changes, strict=True):
        # 4.5 standard deviations of 4,000 draws at 0.3
        assert changed.mean() == pytest.approx(0.3, abs=0.033) if expected else not changed.any()


def test_images_and_captions_are_chosen_independently():
    images, texts, _ = corrupted("image_text", 0.3)
    assert (images & texts).mean() == pytest.approx(0.09, abs=0.02)


def test_more_noise_corrupts_the_same_pairs_and_more():
    few, many = corrupted("text", 0.1)[1], corrupted("text", 0.4)[1]
    assert few.sum() < many.sum()
    assert not (few & ~many).any()


def test_captions_are_dealt_out_among_the_chosen_and_nobody_keeps_theirs():
    rows = corrupted("alignment", 0.2)[2]
    assert sorted(rows) == list(range(N))
    moved = np.flatnonzero(rows != np.arange(N))
    assert set(rows[moved]) == set(moved)
    again = corrupted("alignment", 0.2)[2]
    assert (rows == again).all()
    assert (corrupted("alignment", 0.2, seed=1)[2] != rows).any()
    assert corrupted("alignment", 1.0, count=1)[2].tolist() == [0]


@pytest.mark.parametrize("pad", [0, 1, VOCAB + 3])
def test_a_caption_of_noise_ends_with_pads(pad):
    noise, samples = Noise(LabelNoise(kind="text", fraction=1), 3, VOCAB, pad), places(600)
    tokens = np.full((600, 6), -1, np.int32)
    noise.corrupt(samples, np.zeros((600, 8, 8, 3), np.uint8), tokens)
    ends = CaptionEnds(pad, pad)
    lengths = (ends.weights(tokens) > 0).sum(axis=1)
    assert set(lengths) == set(range(2, 7))  # of one to six tokens and the first pad, if there is one
    assert {int(token) for token in tokens[:, -1]} > {pad}


def test_noise_covers_its_range():
    noise, samples = Noise(LabelNoise(kind="image_text", fraction=1), 3, VOCAB, 0), places(600)
    images, tokens = np.zeros((600, 8, 8, 3), np.uint8), np.full((600, 6), -1, np.int32)
    noise.corrupt(samples, images, tokens)
    assert images.mean() == pytest.approx(127.5, abs=1)
    assert (images.min(), images.max()) == (0, 255)
    lengths = (tokens > 0).sum(axis=1)
    assert set(lengths) == set(range(1, 7))
    assert all(
        (row[length:] == 0).all() and (row[:length] > 0).all() for row, length in zip(tokens, lengths, strict=True)
    )
    assert 1 <= tokens[tokens > 0].min() < 20
    assert VOCAB - 20 < tokens.max() < VOCAB


def test_hashes_of_neighbours_and_purposes_have_nothing_in_common():
    hashes = np.concatenate([place_hash(places(1000), seed, purpose) for seed in range(3) for purpose in range(4)])
    assert len(set(hashes.tolist())) == 12_000
    bits = np.unpackbits(hashes.view(np.uint8)).reshape(12_000, 64)
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.025  # 5.5 standard deviations


def batches(data, model, noise: Noise | None, batch: int, rank: int, world_size: int, steps: int) -> list[Batch]:
    manifest = scan_shards(data.shards, data)
    loader = Loader(
        build_order(manifest, data, 5),
        OneWorker(DataWorker(manifest, data, model, seed=5), shares_memory=True),
        data.model_copy(update={"prefetch_batches": 1, "max_bad_fraction": 0.0}),
        image_kind=image_kind(manifest, model),
        global_batch_size=batch,
        rank=rank,
        world_size=world_size,
        first_step=0,
        last_step=steps,
        noise=noise,
    )
    return list(loader)


@pytest.mark.parametrize("kind", ["alignment", "all"])
def test_ranks_do_not_change_the_corruption(kind, data_config, model_config):
    noise = Noise(LabelNoise(kind=kind, fraction=0.5), 5, 49408, 0)
    (whole,) = batches(data_config, model_config, noise, 24, 0, 1, 1)
    parts = [batches(data_config, model_config, noise, 24, rank, 3, 1)[0] for rank in range(3)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    (clean,) = batches(data_config, model_config, None, 24, 0, 1, 1)
    assert not torch.equal(clean.tokens, whole.tokens)
    if kind == "alignment":
        assert torch.equal(clean.images, whole.images)
        assert sorted(map(tuple, clean.tokens.tolist())) == sorted(map(tuple, whole.tokens.tolist()))


def test_a_batch_size_does_not_change_which_pairs_are_corrupted(data_config, model_config):
    noise = Noise(LabelNoise(kind="image_text", fraction=0.5), 5, 49408, 0)

    def by_place(batch: int, steps: int) -> dict:
        made = batches(data_config, model_config, noise, batch, 0, 1, steps)
        return {
            tuple(place): (image.numpy().tobytes(), tokens.numpy().tobytes())
            for one in made
            for place, image, tokens in zip(one.samples.tolist(), one.images, one.tokens, strict=True)
        }

    assert by_place(6, 8) == by_place(24, 2)
