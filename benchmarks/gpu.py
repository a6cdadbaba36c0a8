"""What does a training step cost on one GPU, beside open_clip's own, and how near does `sigray plan` come?

ViT-B-16-SigLIP in bf16 with AdamW, on batches of noise that lie in page-locked memory, as the loader hands them over:

    one_piece       256 pairs, one forward and backward pass
    micro_batches   4,096 pairs in micro-batches of 256: every pair is seen by the loss, the towers run forward twice
    checkpointing   4,096 pairs in micro-batches of 1,024 with activation checkpointing
    ..._compiled    the same with train.compile_blocks

open_clip's side of the first two is its own `train_one_epoch` (amp_bfloat16, accum_freq 1 and 16), which embeds twice
as well. `speedup_open_clip` is the smaller of the two ratios, `compile_speedup` that of compiled blocks to sigray
without, medians over alternating repetitions. `utilisation` is of the vendor's peak, over the operations that a plan
counts; `memory_error_max` is the plan's error of what a step holds.

    python -m benchmarks.gpu --save
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable

import torch
from open_clip.loss import SigLipLoss
from open_clip_train.train import train_one_epoch

from benchmarks.common import ROOT, cuda_growth_mib, random_batch, report, trainer_of
from benchmarks.step import epoch_arguments, epoch_data
from sigray.orchestrator.config import RunConfig, load_config
from sigray.orchestrator.device_kinds import DEVICES, DeviceKind
from sigray.orchestrator.planning.plan import plan
from sigray.workers.data.loader import Batch
from sigray.workers.device import open_device
from sigray.workers.model.towers import build_model, normalize_pixels
from sigray.workers.training.step import Trainer

MIB = 2**20
CASES: dict[str, dict[str, object]] = {
    "one_piece": {"global_batch_size": 256, "micro_batch_size": "null"},
    "micro_batches": {"global_batch_size": 4096, "micro_batch_size": 256},
    "checkpointing": {"global_batch_size": 4096, "micro_batch_size": 1024, "activation_checkpointing": "true"},
}
PAIRS_PER_REPETITION = 4096
PEER_BATCH = 256


def gpu_config(name: str) -> RunConfig:
    overrides = [f"train.{key}={value}" for key, value in CASES[name].items()]
    return load_config(
        ROOT / "examples" / "siglip_b16_5days_32xtpu_v4.yaml",
        [
            "cluster={accelerator: cuda, num_workers: 1}",
            "optim.name=adamw",
            "train.activation_checkpointing=false",
            *overrides,
        ],
    )


def sigray_steps(trainer: Trainer, batch: Batch) -> Callable[[], None]:
    def run() -> None:
        for step in range(PAIRS_PER_REPETITION // len(batch.images)):
            trainer.step(dataclasses.replace(batch, step=step))

    return run


def open_clip_steps(config: RunConfig, batch: Batch) -> Callable[[], None]:
    """As many optimizer steps of open_clip_train over the same pairs; its images are floats on the host."""
    torch.manual_seed(0)
    module = build_model(config.model).cuda()
    accum_freq = len(batch.images) // PEER_BATCH
    micro_batches = [
        (normalize_pixels(images, config.model).pin_memory(), tokens.pin_memory())
        for images, tokens in zip(batch.images.split(PEER_BATCH), batch.tokens.split(PEER_BATCH), strict=True)
    ]
    data = epoch_data(micro_batches * (PAIRS_PER_REPETITION // len(batch.images)))
    arguments = epoch_arguments(accum_freq, PEER_BATCH, device="cuda", precision="amp_bfloat16")
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    return lambda: train_one_epoch(module, data, SigLipLoss(), 0, optimizer, None, None, None, arguments)


def peak_mib(trainer: Trainer, batch: Batch) -> float:
    """The most that is allocated during a step that begins without gradients."""
    trainer.optimizer.zero_grad(set_to_none=True)
    gc.collect()  # objects of the previous case
    held = torch.cuda.memory_allocated() / MIB
    return held + cuda_growth_mib(lambda: trainer.step(batch))


def measure(name: str, kind: DeviceKind, num_repetitions: int) -> dict[str, float]:
    """One case: samples/s of all contestants, memory and utilisation beside the plan's."""
    config = gpu_config(name)
    device = open_device("cuda", 0, config.train.precision)
    found = plan(config, kind, 1)
    batch = random_batch(config.train.global_batch_size, config.model, pin_memory=True)
    trainer = trainer_of(config, device)
    trainer.step(batch)  # makes the optimizer's state, loads the kernels
    peak = peak_mib(trainer, batch)
    # The batch here lies on the host; its copies go to the device a micro-batch at a time.
    items = found.peak.items.items()
    predicted = sum(count for item, count in items if item not in ("framework", "input batches")) / MIB
    runs = {"sigray": sigray_steps(trainer, batch)}
    if name != "checkpointing":
        runs["open_clip"] = open_clip_steps(config, batch)
    runs["compiled"] = sigray_steps(trainer_of(config, device, compile_blocks=True), batch)
    seconds: dict[str, list[float]] = {contestant: [] for contestant in runs}
    for number in range(num_repetitions + 1):
        for contestant in list(runs) if number % 2 else reversed(list(runs)):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            runs[contestant]()
            torch.cuda.synchronize()
            if number:  # the first one warms up, and compiles
                seconds[contestant].append(time.perf_counter() - begin)

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

    rates = {contestant: PAIRS_PER_REPETITION / statistics.median(times) for contestant, times in seconds.items()}
    flops, top = sum(found.flops_per_sample.values()), kind.peaks[config.train.precision]
    result = {
        **{f"{contestant}_samples_per_s": rate for contestant, rate in rates.items()},
        "utilisation": rates["sigray"] * flops / top,
        "compiled_utilisation": rates["compiled"] * flops / top,
        "compile_speedup": ratio("sigray", "compiled"),
        "peak_mib": peak,
        "predicted_peak_mib": predicted,
        "memory_error": abs(predicted / peak - 1),
    }
    if "open_clip" in runs:
        result["speedup_open_clip"] = ratio("open_clip", "sigray")
    return {f"{name}_{key}": value for key, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = [name for name, kind in DEVICES.items() if "cuda" in kind.accelerators]
    parser.add_argument("--device", choices=kinds, default="h100", help="what the card is (default: h100)")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    rows: dict[str, float] = {}
    for name in CASES:
        found = measure(name, DEVICES[options.device], options.repetitions)
        torch.cuda.empty_cache()
        print(", ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
        rows |= found
    worst = {"speedup_open_clip": min, "compile_speedup": min, "utilisation": min, "memory_error": max}
    figures = {
        key: pick(value for name, value in rows.items() if name in [f"{case}_{key}" for case in CASES])
        for key, pick in worst.items()
    }
    figures["memory_error_max"] = figures.pop("memory_error")
    report("gpu", [rows], figures, options.save)


if __name__ == "__main__":
    main()
