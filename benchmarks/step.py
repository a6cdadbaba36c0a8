"""What do micro-batches cost: in the gradients, in memory, in time?

`accum_grad_error`: the largest relative error (of a parameter's gradient, in the Euclidean norm) of a training step
cut into 1, 4 and 16 micro-batches, against one float64 graph over the whole batch with the plain equation.
`open_clip_accum_grad_error`: the same of open_clip_train's own `train_one_epoch` with `accum_freq` 4 and 16.
`memory_ratio_16k_256`: peak memory of a step at global batch 16,384 in micro-batches of 256, less the features and
their gradients, over that of a step at 256. Memory is what the resident set grows by during a step, with an allocator
that gives freed blocks back.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from types import SimpleNamespace

import torch
from open_clip.loss import SigLipLoss
from open_clip_train.train import train_one_epoch

from benchmarks.common import ROOT, peak_growth_mib, random_batch, report
from sigray.orchestrator.config import load_config
from sigray.workers.config import LossConfig, ModelConfig, OptimConfig
from sigray.workers.data.loader import Batch
from sigray.workers.device import open_device
from sigray.workers.model.towers import build_model, normalize_pixels
from sigray.workers.training.phases import Schedule
from sigray.workers.training.step import Trainer
from tests.helpers.reference import step_gradients

SEED = 0


def make_trainer(model: ModelConfig, num_pairs: int, micro_batch_size: int) -> Trainer:
    return Trainer(
        model,
        OptimConfig(grad_clip_norm=None, schedule="constant"),
        LossConfig(),
        open_device("cpu", 0, "fp32"),
        schedule=Schedule(num_pairs),
        global_batch_size=num_pairs,
        micro_batch_size=micro_batch_size,
        seed=SEED,
    )


def epoch_data(micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, SimpleNamespace]:
    """What open_clip's `train_one_epoch` reads."""

    class Loader(list):
        num_batches, num_samples = len(micro_batches), sum(len(images) for images, _ in micro_batches)

    return {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=Loader(micro_batches))}


def epoch_arguments(accum_freq: int, batch_size: int, device: str, precision: str) -> SimpleNamespace:
    """Its arguments."""
    return SimpleNamespace(
        device=device,
        precision=precision,
        distill=False,
        accum_freq=accum_freq,
        skip_scheduler=True,
        grad_clip_norm=None,
        horovod=False,
        rank=0,
        local_rank=0,
        distributed=False,
        log_every_n_steps=10**9,
        log_local=False,
        world_size=1,
        batch_size=batch_size,
        wandb=False,
    )


def open_clip_gradients(model: ModelConfig, batch: Batch, accum_freq: int) -> dict[str, torch.Tensor]:
    """Of one optimizer step of open_clip_train; the learning rate is zero, the gradients stay on the parameters."""
    torch.manual_seed(SEED)
    module = build_model(model)
    images = normalize_pixels(batch.images, model)
    micro_batches = list(zip(images.chunk(accum_freq), batch.tokens.chunk(accum_freq), strict=True))
    arguments = epoch_arguments(accum_freq, len(micro_batches[0][0]), "cpu", "fp32")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    train_one_epoch(module, epoch_data(micro_batches), SigLipLoss(), 0, optimizer, None, None, None, arguments)
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {
        name: float((actual[name].double() - want).norm() / want.norm())
        for name, want in expected.items()
        if want.any()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        # Freed blocks of 1 MiB or more go back to the system: what counts is what is held, not what glibc's heap keeps.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.step", *sys.argv[1:]])
    model = load_config(ROOT / "examples" / "emoji_cpu.yaml").model

    batch = random_batch(256, model)
    _, expected, _ = step_gradients(model, SEED, batch.images, batch.tokens)
    ours, theirs = [], []
    for cut in (1, 4, 16):
        trainer = make_trainer(model, 256, 256 // cut)
        trainer.step(batch)
        found = errors({name: p.grad for name, p in trainer.module.named_parameters() if p.grad is not None}, expected)
        ours.append(max(found.values()))
        shown = "logit_scale {logit_scale:.2g}, logit_bias {logit_bias:.2g}"
        print(f"1/{cut}: sigray: largest error {ours[-1]:.2g}, {shown.format(**found)}", flush=True)
        if cut > 1:
            gradients = open_clip_gradients(model, batch, cut)
            found = errors(gradients, expected)
            theirs.append(max(found.values()))
            factors = {name: float(gradients[name] / expected[name]) for name in ("logit_scale", "logit_bias")}
            print(
                f"1/{cut}: open_clip: largest error {theirs[-1]:.2g}, {shown.format(**found)}; "
                "factors: logit_scale {logit_scale:.4f}, logit_bias {logit_bias:.4f}".format(**factors)
            )

    repetitions = []
    batches = {size: random_batch(size, model) for size in (256, 16384)}
    trainers = {size: make_trainer(model, size, 256) for size in batches}
    peak_growth_mib(lambda: trainers[256].step(batches[256]))  # the warm-up
    for _ in range(options.repetitions):
        repetition = {}
        for size in batches:
            begin = time.perf_counter()
            peak = peak_growth_mib(lambda size=size: trainers[size].step(batches[size]))  # type: ignore[misc]
            repetition[f"samples_per_s_{size}"] = size / (time.perf_counter() - begin)
            repetition[f"peak_mib_{size}"] = peak
        assert model.towers is not None
        features = 2 * 2 * 16384 * model.towers["embed_dim"] * 4 / 2**20
        repetition["features_and_gradients_mib"] = features
        repetition["memory_ratio"] = (repetition["peak_mib_16384"] - features) / repetition["peak_mib_256"]
        repetitions.append(repetition)
    figures = {
        "accum_grad_error": max(ours),
        "open_clip_accum_grad_error": max(theirs),
        "memory_ratio_16k_256": statistics.median(repetition["memory_ratio"] for repetition in repetitions),
    }
    report("step", repetitions, figures, options.save)


if __name__ == "__main__":
    main()
