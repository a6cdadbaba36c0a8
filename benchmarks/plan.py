"""Compare the predictions of `sigray plan` with measurements and with the paper.

`memory_error_max`: predicted and measured memory of a training step on this CPU, for five configurations. Each runs the
real `sigray.workers.training.step.Trainer` in a fresh process. Measured are the largest growth of the resident set
during a step that begins without gradients, and its size then; the larger error of the two counts. As in
benchmarks/step.py the allocator returns freed blocks, so only live memory counts. The growth with glibc's own settings
is printed beside it.

`paper_days_error_max`: predicted days of the five runs of the paper's table 1 (arXiv 2303.15343 v4), from the configs
in examples/, and the paper's. If the paper gives only a bound, a prediction below the bound has no error. All rows rest
on one assumption about the TPU v4, `UTILISATION` in orchestrator/device_kinds.py. The utilisation that would make a
row exact is printed beside it.

`paper_batch_ratio`: the largest global batch that the plan fits on four TPU v4 in one piece, over the paper's 4,096
(section 4.2). It uses no micro-batches, and activation checkpointing as the example does.
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import subprocess
import sys

import torch

from benchmarks.common import ROOT, peak_growth_mib, random_batch, report, status_mib, trainer_of
from sigray.orchestrator.config import RunConfig, load_config
from sigray.orchestrator.device_kinds import DEVICES, GIB
from sigray.orchestrator.planning.plan import Plan, default_num_devices, plan, run_device
from sigray.orchestrator.planning.this_machine import this_cpu

MIB = 2**20
PAPER_BATCH = 4096
EMOJI = ROOT / "examples" / "emoji_cpu.yaml"
TEXT = "text_cfg: {context_length: 32, vocab_size: 8192, width: 256, heads: 4, layers: 6}}"
MIDDLE = (
    "model.towers={embed_dim: 256, vision_cfg: {image_size: 96, patch_size: 8, width: 256, head_width: 64, layers: 8}, "
    + TEXT
)
RECIPE = (
    "model.towers={embed_dim: 256, vision_cfg: {image_size: 96, timm_model_name: siglip_vit_w256_d8_h4_m1024_p8_s96, "
    "timm_pool: map, timm_proj: none}, " + TEXT
)
CONFIGS = {
    "emoji towers, 2,048 in micro-batches of 256": [
        "train.global_batch_size=2048",
        "train.micro_batch_size=256",
        "train.num_samples=204800",
    ],
    "256 wide, 8 + 6 layers, 96 in one piece, bf16": [
        MIDDLE,
        "train.global_batch_size=96",
        "train.precision=bf16",
    ],
    "the same with activation checkpointing, float32": [
        MIDDLE,
        "train.global_batch_size=96",
        "train.activation_checkpointing=true",
    ],
    "SigLIP 2's losses, 256 wide, 48 in micro-batches of 16, bf16": [
        RECIPE,
        "model.decoder={}",
        "model.heads={hidden: 512, bottleneck: 128, prototypes: 8192}",
        "loss={caption_weight: 1, distill: {}}",
        "train.ema=5120",
        "train.global_batch_size=48",
        "train.micro_batch_size=16",
        "train.precision=bf16",
    ],
    "ViT-B-16-SigLIP, 16 in micro-batches of 8": [
        "model.name=ViT-B-16-SigLIP",
        "model.towers=null",
        "train.global_batch_size=16",
        "train.micro_batch_size=8",
    ],
}
# Example, days of table 1, whether they are a bound.
PAPER = [
    ("siglit_b8_4xtpu_v4", 1.0, True),
    ("siglit_g14_4xtpu_v4", 2.0, True),
    ("siglip_b16_finetune_16xtpu_v4", 3.0, False),
    ("siglip_b16_2days_32xtpu_v4", 2.0, False),
    ("siglip_b16_5days_32xtpu_v4", 5.0, False),
]


def cpu_config(name: str) -> RunConfig:
    one_worker = ["cluster.num_workers=1", "eval={}", "optim.num_warmup_samples=0"]
    return load_config(EMOJI, [*one_worker, *CONFIGS[name]])


def measure(name: str) -> dict[str, float]:
    """In a process of its own: MiB by which a step grows the resident set at most, and MiB that are resident then."""
    import ray.train.torch  # noqa: F401 - as a training worker does

    from sigray.workers.device import open_device

    config = cpu_config(name)
    size = config.train.global_batch_size
    trainer = trainer_of(config, open_device("cpu", 0, config.train.precision))
    batch = random_batch(size, config.model, pixels=trainer.pixels)
    trainer.step(batch)  # makes the optimizer's state
    trainer.optimizer.zero_grad(set_to_none=True)
    growth = peak_growth_mib(lambda: trainer.step(batch))
    return {"growth_mib": growth, "process_mib": status_mib("VmHWM")}


def measure_apart(name: str, **environment: str) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.plan", "--measure", name]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare_memory(name: str) -> dict[str, float]:
    """Predicted and measured, MiB, and both errors."""
    config = cpu_config(name)
    found = plan(config, this_cpu(1, torch.get_num_threads()))
    standing = ("weights", "optimizer state", "average of the weights", "framework")
    rest = ("input batches", "checkpoint copy")  # there is one batch here, and no checkpoint
    growth = max(
        sum(size for item, size in part.items.items() if item not in (*standing, *rest)) for part in found.parts
    )
    items = found.parts[0].items
    process = growth + sum(items.get(item, 0) for item in standing) + items["input batches"] / 4
    given_back = measure_apart(name, MALLOC_MMAP_THRESHOLD_=str(2**20))
    kept = measure_apart(name)
    return {
        "predicted_growth_mib": growth / MIB,
        "growth_mib": given_back["growth_mib"],
        "growth_mib_default_malloc": kept["growth_mib"],
        "predicted_process_mib": process / MIB,
        "process_mib": given_back["process_mib"],
        "growth_error": abs(growth / MIB / given_back["growth_mib"] - 1),
        "process_error": abs(process / MIB / given_back["process_mib"] - 1),
    }


def compare_days(example: str, days: float, is_bound: bool) -> dict[str, float]:
    """Predicted days, their error, and the utilisation that would make them the paper's."""
    config = load_config(ROOT / "examples" / f"{example}.yaml")
    device = run_device(config)
    assert device is not None
    found = plan(config, device, default_num_devices(config, device))
    assert found.fits, example
    error = found.days / days - 1
    return {
        "days": found.days,
        "paper_days": days,
        "is_bound": is_bound,
        "error": max(0.0, error) if is_bound else abs(error),
        "utilisation_of_the_paper": found.device.utilisation
        * found.compute_s
        / (days * 86_400 / found.num_steps - found.wire_s),
        "peak_gib": found.peak.total / GIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    repetitions = []
    for name in CONFIGS:
        print(name, flush=True)
        repetitions.append(compare_memory(name))
    memory_error = max(max(found["growth_error"], found["process_error"]) for found in repetitions)
    rows = []
    for example, days, is_bound in PAPER:
        print(example, flush=True)
        rows.append(compare_days(example, days, is_bound))
    base = load_config(ROOT / "examples" / "siglip_b16_5days_32xtpu_v4.yaml")

    def paper_plan(batch: int) -> Plan:
        train = base.train.model_copy(update={"global_batch_size": batch})
        return plan(base.model_copy(update={"train": train}), DEVICES["tpu-v4"], 4)

    batches = range(256, 16 * PAPER_BATCH, 256)
    in_one_piece = batches[bisect.bisect_left(batches, True, key=lambda batch: not paper_plan(batch).fits) - 1]
    found = paper_plan(PAPER_BATCH)
    print(
        f"four TPU v4: {PAPER_BATCH:,} {'fit' if found.fits else 'do not fit'} in one piece "
        f"({found.peak.total / GIB:.1f} GiB on each chip), {in_one_piece:,} at most"
    )
    figures = {
        "paper_batch_ratio": in_one_piece / PAPER_BATCH,
        "memory_error_max": memory_error,
        "paper_days_error_max": max(row["error"] for row in rows),
    }
    report("plan", [*repetitions, *rows], figures, options.save)


if __name__ == "__main__":
    main()
