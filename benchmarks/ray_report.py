"""What does a report of each checkpoint to Ray Train cost?

    python -m benchmarks.ray_report             about 10 minutes on two cores
    python -m benchmarks.ray_report --save      keep the result in benchmarks/results/

A run on the demo data, with a checkpoint every `SAVE_STEPS` steps. The run reports every second checkpoint. A window is
the `WINDOW_STEPS` steps after a checkpoint became durable, with a report and without, in turn. In a window with one,
all ranks call `ray.train.report` from their threads. The last line has the median over repetitions of

    window_ratio        step time with a report over that without (medians of each run); 1.005 is half a percent
    ms_per_checkpoint   what a report adds to its window
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, ensure_emoji, report
from sigray.orchestrator.config import load_config
from sigray.orchestrator.run import worker_group
from sigray.orchestrator.run.monitor import RayHooks
from sigray.workers.checkpoint.index import CheckpointInfo
from sigray.workers.training.job import Request

WARM_UP_STEPS, WINDOW_STEPS, SAVE_STEPS = 40, 10, 20
KEY = "benchmark/told"  # of a line: 1 after a report, 0 after a checkpoint without one, -1 otherwise
CHILD = "import sys; from benchmarks.ray_report import run; run(sys.argv[1:])"


class Alternating(RayHooks):
    """Hooks that tell Ray Train of every second checkpoint."""

    _num_shared = 0
    _told = -1.0

    def record(self, metrics: dict[str, float]) -> Request:
        told, self._told = self._told, -1.0
        return super().record(metrics | {KEY: told})

    def share(self, info: CheckpointInfo | None) -> None:
        self._num_shared += 1
        self._told = float(self._num_shared % 2)
        if self._told:
            super().share(info)


def run(overrides: list[str]) -> None:
    """Train with these hooks; in a process of its own."""
    from sigray.orchestrator.run.driver import train

    worker_group.RayHooks = Alternating  # type: ignore[misc]
    train(load_config(ROOT / "examples" / "emoji_cpu.yaml", overrides))


def step_times(folder: Path, batch_size: int) -> dict[float, list[float]]:
    """Seconds of a step in each window, by the kind of the window."""
    found: dict[float, list[float]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["step"] > WARM_UP_STEPS:
            found.setdefault(line[KEY], []).append(batch_size / line["throughput/samples_per_s"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--workers", type=int, default=2, help="training workers, one thread each")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    ensure_emoji()
    batch_size = load_config(ROOT / "examples" / "emoji_cpu.yaml").train.global_batch_size
    repetitions = []
    for _ in range(options.repetitions):
        with tempfile.TemporaryDirectory() as folder:
            overrides = [
                f"run.dir={folder}", "run.name=told", f"train.num_samples={options.steps * batch_size}",
                f"train.log_every_steps={WINDOW_STEPS}", f"checkpoint.save_every_steps={SAVE_STEPS}",
                f"cluster.num_workers={options.workers}", "eval.sets={}", "eval.pixel_baseline=false",
            ]  # fmt: skip
            command = [sys.executable, "-c", CHILD, *overrides]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            times = step_times(Path(folder) / "told", batch_size)
        told, silent = (statistics.median(times[kind]) for kind in (1.0, 0.0))
        repetitions.append(
            {
                "told_windows": float(len(times[1.0])),
                "silent_windows": float(len(times[0.0])),
                "step_ms": 1000 * silent,
                "ms_per_checkpoint": 1000 * WINDOW_STEPS * (told - silent),
                "window_ratio": told / silent,
            }
        )
        print(repetitions[-1], flush=True)
    figures = {key: statistics.median(one[key] for one in repetitions) for key in repetitions[0]}
    report("ray_report", repetitions, figures, options.save)


if __name__ == "__main__":
    main()
