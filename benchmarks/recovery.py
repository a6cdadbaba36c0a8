"""How long from the death of a training worker to the next step?

Two training workers on this machine, one killed with SIGKILL in the middle of the run; the time is that until a step
which was not done before is done. Alternating:

    sigray   `sigray train` on synthetic images: our driver decides, Ray Train starts a new group, weights come back
             from the newest checkpoint, data-shard workers give the batches again
    ray      Ray Train alone, which restarts the group by itself (max_failures): the same imports in the training
             workers, a gloo group, an all-reduce instead of a step, nothing to load

    seconds_over_ray     the difference of the medians
    ratio_to_ray         their ratio
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import ROOT, report
from sigray.orchestrator.run.ray_session import LEAN_RAY
from tests.helpers.data import TOWERS, write_dataset
from tests.helpers.processes import descendants_named

KILL_AT, TIMEOUT_S = 30, 300


def sigray_command(folder: Path) -> tuple[list[str], Callable[[], int]]:
    """A run, and how many steps it has logged."""
    write_dataset(folder / "train", [100, 100])
    config: dict[str, Any] = {
        "run": {"name": "recovery", "dir": str(folder / "runs")},
        "data": {"shards": str(folder / "train"), "block_size": 16, "shuffle_window": 64},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 10**6, "global_batch_size": 24, "log_every_steps": 1},
        "cluster": {"num_workers": 2},
        "checkpoint": {"save_every_steps": 10},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    metrics = folder / "runs" / "recovery" / "metrics.jsonl"
    command = [str(Path(sys.executable).parent / "sigray"), "train", str(folder / "run.yaml")]

    def steps_done() -> int:
        lines = metrics.read_bytes().splitlines() if metrics.exists() else []
        return json.loads(lines[-1])["step"] if lines and lines[-1].endswith(b"}") else 0

    return command, steps_done


def ray_command(folder: Path) -> tuple[list[str], Callable[[], int]]:
    path = folder / "steps"

    def steps_done() -> int:
        return int(path.read_text() or 0) if path.exists() else 0

    return [sys.executable, "-m", "benchmarks.recovery", "--ray", str(folder)], steps_done


def run_ray(folder: Path) -> None:
    """Ray Train alone: counts steps in a file, goes on from it."""
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    def train_worker(_: dict[str, Any]) -> None:
        import torch
        import torch.distributed as dist

        import sigray.workers.training.train  # noqa: F401

        path = folder / "steps"
        step = int(path.read_text()) if path.exists() else 0
        while True:
            step += 1
            dist.all_reduce(torch.zeros(1))
            time.sleep(0.05)
            if dist.get_rank() == 0:
                temporary = path.with_suffix(".tmp")
                temporary.write_text(str(step))
                temporary.rename(path)

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    TorchTrainer(
        train_worker,
        train_loop_config={},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(
            storage_path=str(folder / "ray"), failure_config=ray.train.FailureConfig(max_failures=1)
        ),
    ).fit()


def seconds_to_recover(make: Callable[[Path], tuple[list[str], Callable[[], int]]]) -> float:
    with tempfile.TemporaryDirectory() as name:
        command, steps_done = make(Path(name))
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | LEAN_RAY
        with Path(name, "log").open("w") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        processes: list[int] = []
        try:
            wait_until(lambda: steps_done() >= KILL_AT, process)
            done = steps_done()
            os.kill(descendants_named(process.pid, "ray::RayTrainWorker")[0], signal.SIGKILL)
            begin = time.monotonic()
            time.sleep(1)  # for steps not yet written to the file
            done = max(done, steps_done())
            wait_until(lambda: steps_done() > done, process)
            return time.monotonic() - begin
        finally:
            processes = descendants_named(process.pid, "")
            process.kill()
            process.wait()
            for pid in processes:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the run ended, or does not get on")
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    parser.add_argument("--ray", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ray:
        run_ray(options.ray)
        return
    repetitions = []
    for number in range(options.repetitions):
        contestants = {"sigray": sigray_command, "ray": ray_command}
        names = list(contestants)[:: 1 if number % 2 else -1]
        found = {f"{name}_s": seconds_to_recover(contestants[name]) for name in names}
        print(" ".join(f"{key}={value:.1f}" for key, value in found.items()), flush=True)
        repetitions.append(found)
    sigray, ray = (statistics.median(found[key] for found in repetitions) for key in ("sigray_s", "ray_s"))
    figures = {"sigray_s": sigray, "ray_s": ray, "ratio_to_ray": sigray / ray, "seconds_over_ray": sigray - ray}
    report("recovery", repetitions, figures, options.save)


if __name__ == "__main__":
    main()
