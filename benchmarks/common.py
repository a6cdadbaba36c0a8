"""What the benchmarks share: demo data, closing line, kept result. Ranks come from `tests/helpers/ranks.py`."""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch

from examples.emoji36.build import build_emoji
from sigray.orchestrator.config import RunConfig
from sigray.orchestrator.run.summary import environment
from sigray.workers.config import ModelConfig
from sigray.workers.data.loader import Batch
from sigray.workers.data.views import Pixels
from sigray.workers.device import Device
from sigray.workers.model.inputs import CLIP_VOCAB_SIZE, shapes
from sigray.workers.model.tokenizer import CaptionEnds
from sigray.workers.training.phases import Schedule
from sigray.workers.training.step import Trainer

ROOT = Path(__file__).resolve().parent.parent
EMOJI = ROOT / "data" / "emoji36"


def ensure_emoji() -> None:
    """Build the demo data where `examples/` expects it, unless it is there."""
    build_emoji(EMOJI, progress=lambda stage, done, total: print(f"{stage}: {done} of {total}", end="\r"))
    print()


def trainer_of(config: RunConfig, device: Device, *, compile_blocks: bool = False) -> Trainer:
    """The step that a run of this config would take on one device."""
    return Trainer(
        config.model,
        config.optim,
        config.loss,
        device,
        schedule=Schedule(config.train.num_samples),
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=0,
        activation_checkpointing=config.train.activation_checkpointing,
        compile_blocks=compile_blocks,
        caption_ends=CaptionEnds(0, 0),
        ema=config.train.ema,
    )


def random_batch(
    num_pairs: int, model: ModelConfig, *, pixels: Pixels | None = None, pin_memory: bool = False
) -> Batch:
    """Noise in the shapes that a model takes; images with views as `pixels` says."""
    edge, length, vocabulary = shapes(model)
    generator = torch.Generator().manual_seed(1)
    shape = (num_pairs, *(pixels or Pixels(edge)).shape)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, vocabulary or CLIP_VOCAB_SIZE, (num_pairs, length), generator=generator).int()
    if pin_memory:
        images, tokens = images.pin_memory(), tokens.pin_memory()
    return Batch(
        0,
        images,
        tokens,
        samples=np.zeros((num_pairs, 3), np.int64),
        keys=[""] * num_pairs,
        replaced=np.zeros(num_pairs, bool),
    )


def peak_growth_mib(run: Callable[[], object]) -> float:
    """By how much the resident set of this process grows, at most, while `run` runs (Linux, glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work left free would hide what this takes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = status_mib("VmRSS")
    run()
    return status_mib("VmHWM") - before


def cuda_growth_mib(run: Callable[[], object]) -> float:
    """By how much the memory that this process has allocated on the CUDA device grows, at most, while `run` runs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def status_mib(key: str) -> float:
    """A figure of /proc/self/status, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def report(name: str, repetitions: list[dict[str, float]], figures: dict[str, float], save: bool) -> None:
    """Print each repetition and, last, the figures; keep them under benchmarks/results/ where asked to."""
    for number, repetition in enumerate(repetitions, start=1):
        print(f"repetition {number}: " + " ".join(f"{key}={value:.4g}" for key, value in repetition.items()))
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    content = {"benchmark": name, **environment(), **gpu, "figures": figures, "repetitions": repetitions}
    if save:
        path = ROOT / "benchmarks" / "results" / f"{date.today().isoformat()}-{name}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"kept in {path.relative_to(ROOT)}")
    print(" ".join(f"{key}={value:.4g}" for key, value in figures.items()))
