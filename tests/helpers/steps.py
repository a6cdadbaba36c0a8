"""One global batch, its parts, and a trainer of the small towers."""

import numpy as np
import torch

from sigray.workers.config import LossConfig, ModelConfig, OptimConfig
from sigray.workers.data.loader import Batch
from sigray.workers.device import check_collectives, open_device
from sigray.workers.model.tokenizer import CaptionEnds
from sigray.workers.training.phases import Schedule
from sigray.workers.training.step import Trainer
from tests.helpers.data import TOWERS

NUM_PAIRS, SEED = 48, 3
MODEL = ModelConfig(towers=TOWERS)


WITH_DROPOUT = ModelConfig(towers=TOWERS | {"vision_cfg": TOWERS["vision_cfg"] | {"patch_dropout": 0.5}})


def global_batch():
    random = np.random.RandomState(0)
    images = torch.from_numpy(random.randint(0, 256, (NUM_PAIRS, 16, 16, 3)).astype(np.uint8))
    return images, torch.from_numpy(random.randint(1, 400, (NUM_PAIRS, 8)).astype(np.int32))


def make_trainer(
    world_size,
    *,
    model=MODEL,
    loss=LossConfig(),  # noqa: B008
    micro_batch_size=None,
    precision="fp32",
    activation_checkpointing=False,
    compile_blocks=False,
    accelerator="cpu",
    splits_weights=False,
):
    device = open_device(accelerator, 0, precision, splits_weights=splits_weights)
    check_collectives(device, NUM_PAIRS // world_size)
    return Trainer(
        model,
        OptimConfig(grad_clip_norm=None, schedule="constant"),
        loss,
        device,
        schedule=Schedule(NUM_PAIRS),
        global_batch_size=NUM_PAIRS,
        micro_batch_size=micro_batch_size,
        seed=SEED,
        activation_checkpointing=activation_checkpointing,
        compile_blocks=compile_blocks,
        caption_ends=CaptionEnds(0, 0),
    )


def samples():
    """Places in the stream, (pairs, 3)."""
    return np.stack([np.zeros(NUM_PAIRS), np.arange(NUM_PAIRS) % 3, np.arange(NUM_PAIRS)], axis=1).astype(np.int64)


def part_of(rank, world_size):
    images, tokens = global_batch()
    part = slice(rank * NUM_PAIRS // world_size, (rank + 1) * NUM_PAIRS // world_size)
    size = len(images[part])
    origin = {"samples": np.zeros((size, 3), np.int64), "keys": [""] * size, "replaced": np.zeros(size, bool)}
    return Batch(0, images[part], tokens[part], **origin)


def check_gradients(actual, expected):
    # float32 towers against float64: relative 2**-24 per operation over some hundred operations deep.
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, want in expected.items():
        close = torch.isclose(actual[name].double(), want, rtol=2e-4, atol=largest * 2e-6)
        assert close.all(), f"{name}: {actual[name]} instead of {want}"
    assert {"logit_scale", "logit_bias"} <= expected.keys()
