"""What does the system around a training step cost?

The same `workers/training/step.py` on the same batches, in the same number of processes, alternating:

    bare     a plain gloo process group, no Ray; all batches decoded beforehand and held in memory
    sigray   `sigray train`: Ray Train, data-shard workers that read and decode meanwhile, metrics, display

Both end with the same loss, bit for bit, or the benchmark fails. Process starts are not counted, the first
`WARM_UP_STEPS` neither. `first_epoch_ratio` is the part in which every sample is still read and decoded; later epochs
of a set this small come from the data-shard workers' caches (`data.cache_mib`).

With two workers on two cores nothing is left for Ray's own processes and the decoding, which then take their time from
the trainers. `--workers 1` leaves them a core, as a host with accelerators does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.common import ROOT, ensure_emoji, report
from sigray.orchestrator.config import RunConfig, load_config
from sigray.workers.data.loader import Loader
from sigray.workers.data.manifest import scan_shards
from sigray.workers.data.worker import DataWorker, build_order, image_kind
from sigray.workers.device import open_device
from sigray.workers.training.phases import Schedule
from sigray.workers.training.step import Trainer
from tests.helpers.bare import OneWorker
from tests.helpers.ranks import run_on_ranks

WARM_UP_STEPS, WINDOW_STEPS = 20, 10


def bare_rank(rank: int, world_size: int, config: RunConfig, num_steps: int) -> tuple[list[float], float]:
    """Seconds of each window of steps, and the last loss."""
    torch.set_num_threads(config.cluster.cpus_per_worker)
    data, batch_size = config.data, config.train.global_batch_size
    manifest = scan_shards(data.shards, data)
    loader = Loader(
        build_order(manifest, data, config.run.seed),
        OneWorker(DataWorker(manifest, data, config.model, seed=config.run.seed)),
        data,
        image_kind=image_kind(manifest, config.model),
        global_batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        first_step=0,
        last_step=num_steps,
    )
    batches = list(loader)
    trainer = Trainer(
        config.model,
        config.optim,
        config.loss,
        open_device("cpu", 0, config.train.precision),
        schedule=Schedule(num_steps * batch_size),
        global_batch_size=batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seed=config.run.seed,
    )
    dist.barrier()
    windows, begin = [], time.perf_counter()
    for batch in batches:
        result = trainer.step(batch)
        if (batch.step + 1) % WINDOW_STEPS == 0:
            loss = result.loss.clone()
            dist.all_reduce(loss)
            windows.append(time.perf_counter() - begin)
            begin = time.perf_counter()
    return windows, float(loss) / world_size


def sigray_windows(config_path: Path, overrides: list[str], folder: Path) -> tuple[list[float], float]:
    """The same from a run's metrics.jsonl."""
    command = [str(Path(sys.executable).parent / "sigray"), "train", str(config_path), "--overwrite", *overrides]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "overhead" / "metrics.jsonl").read_text().splitlines()]
    batch_size = lines[0]["samples_seen"] / lines[0]["step"]
    windows = [WINDOW_STEPS * batch_size / line["throughput/samples_per_s"] for line in lines]
    return windows, lines[-1]["train/loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--workers", type=int, default=2, help="training workers, one thread each")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    ensure_emoji()
    config_path = ROOT / "examples" / "emoji_cpu.yaml"
    repetitions = []
    with tempfile.TemporaryDirectory() as folder:
        batch_size = load_config(config_path).train.global_batch_size
        overrides = [f"run.dir={folder}", "run.name=overhead", f"train.num_samples={options.steps * batch_size}"]
        overrides += [f"train.log_every_steps={WINDOW_STEPS}", "checkpoint.save_every_steps=1000000"]
        overrides += [
            f"cluster.num_workers={options.workers}",
            "eval.sets={}",
            "eval.pixel_baseline=false",
            "optim.num_warmup_samples=1280",
        ]
        config = load_config(config_path, overrides)
        first_epoch = -(-epoch_steps(config) // WINDOW_STEPS)
        for _ in range(options.repetitions):
            under_ray, loss_under_ray = sigray_windows(config_path, overrides, Path(folder))
            ranks = run_on_ranks(config.cluster.worker_range[0], bare_rank, config, options.steps)
            bare, bare_loss = ranks[0]
            if bare_loss != loss_under_ray:
                raise SystemExit(f"not the same batches: last loss {bare_loss} bare, {loss_under_ray} under sigray")
            skip = WARM_UP_STEPS // WINDOW_STEPS
            repetitions.append(
                {
                    "sigray_samples_per_s": rate(under_ray[skip:], batch_size),
                    "bare_samples_per_s": rate(bare[skip:], batch_size),
                    "step_rate_ratio": sum(bare[skip:]) / sum(under_ray[skip:]),
                    "first_epoch_ratio": sum(bare[skip:first_epoch]) / sum(under_ray[skip:first_epoch]),
                }
            )
            print(repetitions[-1], flush=True)
    figures = {
        key: statistics.median([repetition[key] for repetition in repetitions]) for key in reversed(repetitions[0])
    }
    last = figures.pop("step_rate_ratio")
    name = "overhead" if options.workers == 2 else f"overhead-{options.workers}-worker"
    report(name, repetitions, figures | {"step_rate_ratio": last}, options.save)


def epoch_steps(config: RunConfig) -> int:
    """Steps in which every sample is seen once, rounded up."""
    manifest = scan_shards(config.data.shards, config.data)
    return -(-manifest.num_samples // config.train.global_batch_size)


def rate(windows: list[float], batch_size: int) -> float:
    return len(windows) * WINDOW_STEPS * batch_size / sum(windows)


if __name__ == "__main__":
    main()
