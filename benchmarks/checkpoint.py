"""What does a checkpoint every 30 seconds cost?

One process trains ViT-S-32 towers (AdamW's state included 0.7 GB) on random pixels with all cores. Windows of some
steps alternate: a checkpoint begins at the start of one, which lasts until it is durable, none is written in the next.
A window of 30 s would hide a second among the steps' own differences.

    throughput_cost      seconds that a window with a checkpoint takes longer than as many steps of its neighbours, over
                         30; median
    blocking_fraction    time that `save` holds training up, over the time that its thread then writes; median
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch

from benchmarks.common import report
from sigray.workers.checkpoint.writer import CheckpointWriter
from sigray.workers.config import CheckpointConfig, LossConfig, ModelConfig, OptimConfig
from sigray.workers.data.loader import Batch
from sigray.workers.device import open_device
from sigray.workers.storage import Storage
from sigray.workers.training.phases import Schedule
from sigray.workers.training.step import Trainer

MODEL, BATCH = ModelConfig(name="ViT-S-32"), 8
SAVE_EVERY_S = 30
WARM_UP_CHECKPOINTS = 8


def random_batch(step: int) -> Batch:
    draws = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (BATCH, 224, 224, 3), generator=draws, dtype=torch.uint8)
    tokens = torch.randint(1, 49000, (BATCH, 77), generator=draws, dtype=torch.int32)
    tokens[:, -1] = 49407  # the end of text, at which the tower pools
    return Batch(step, images, tokens, np.zeros((BATCH, 3), np.int64), [""] * BATCH, np.zeros(BATCH, bool))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=16, help="windows with one, each between two without")
    parser.add_argument("--steps", type=int, default=8, help="of a window, at least")
    parser.add_argument(
        "--storage", help="where checkpoints go: a folder or s3://bucket/prefix (default: a temporary one)"
    )
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = open_device("cpu", 0, "fp32")
    trainer = Trainer(
        MODEL,
        OptimConfig(),
        LossConfig(),
        device,
        schedule=Schedule(10**9),
        global_batch_size=BATCH,
        micro_batch_size=None,
        seed=0,
    )
    steps, repetitions = 0, []
    with tempfile.TemporaryDirectory() as folder:
        config = CheckpointConfig(keep_newest=2)
        model = MODEL.model_dump(mode="json")
        storage = Storage(options.storage or folder)
        saver = CheckpointWriter(storage, trainer.module, trainer.optimizer, config, model, warn=print)

        def window(with_checkpoint: bool) -> tuple[int, float]:
            """Steps, and seconds."""
            nonlocal steps
            begin, first = time.perf_counter(), steps
            is_durable = not with_checkpoint
            if with_checkpoint:
                saver.save(steps, steps * BATCH)
            while steps - first < options.steps or not is_durable:
                trainer.step(random_batch(steps))
                steps += 1
                is_durable = is_durable or bool(saver.take_committed())
            return steps - first, time.perf_counter() - begin

        # The first checkpoint takes its memory. On a virtual machine the first ones also fill pages of the file cache
        # that its host has never given it, at several times the cost of filling them again.
        for _ in range(WARM_UP_CHECKPOINTS):
            trainer.step(random_batch(steps))
            steps += 1
            saver.save(steps, steps * BATCH)
            while not saver.take_committed():
                time.sleep(0.1)
        before, before_s = window(with_checkpoint=False)
        for _ in range(options.checkpoints):
            blocked_s, written_s = saver.blocked_s, saver.written_s
            count, seconds = window(with_checkpoint=True)
            after, after_s = window(with_checkpoint=False)
            step_s = (before_s / before + after_s / after) / 2
            found: dict[str, Any] = {
                "step_s": step_s,
                "lost_s": seconds - count * step_s,
                "throughput_cost": (seconds - count * step_s) / SAVE_EVERY_S,
                "blocked_s": saver.blocked_s - blocked_s,
                "written_s": saver.written_s - written_s,
            }
            before, before_s = after, after_s
            found["blocking_fraction"] = found["blocked_s"] / found["written_s"]
            repetitions.append(found)
            print(" ".join(f"{key}={value:.4g}" for key, value in found.items()), flush=True)
        saver.close()
    figures = {
        key: statistics.median(found[key] for found in repetitions) for key in ("throughput_cost", "blocking_fraction")
    }
    report("checkpoint", repetitions, figures, options.save)


if __name__ == "__main__":
    main()
