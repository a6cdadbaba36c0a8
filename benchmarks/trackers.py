"""What does a tracker that hangs cost a run?

One run with TensorBoard, and with an MLflow server that takes requests and never answers. The process of the trackers
is stopped for a stretch of `STRETCH_LINES` lines of metrics (SIGSTOP) and goes on for the next, in turn. A stopped
process costs nothing, and one that goes on reads the lines of both stretches. The first line of a stretch and the first
`WARM_UP_STEPS` steps do not count. The last line has the median over repetitions of

    step_rate_ratio     steps per second while the process runs, over those while it is stopped (medians of each run)

The runs of a shared machine differ by 5 %, so two runs cannot show a cost of 1 %.
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
from pathlib import Path

from benchmarks.common import ROOT, ensure_emoji, report
from sigray.orchestrator.config import load_config
from tests.helpers.hanging_server import hanging_mlflow

WARM_UP_STEPS, WINDOW_STEPS, STRETCH_LINES = 20, 5, 4


def sender_of(folder: Path) -> int | None:
    """The process that sends the run of a folder."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_text().split("\0")
        except OSError:
            continue
        if "sigray.orchestrator.trackers.sender" in arguments and str(folder) in arguments:
            return int(path.parent.name)
    return None


def window_times(driver: subprocess.Popen[bytes], folder: Path, last_step: int) -> dict[str, list[float]]:
    """Seconds of a sample, by window, while the process of the trackers runs and while it is stopped."""
    found: dict[str, list[float]] = {"running": [], "stopped": []}
    path, kind, begin = folder / "metrics.jsonl", "running", 0
    sender = None
    while driver.poll() is None:
        time.sleep(0.1)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        lines = [line for line in lines if line.endswith(b"\n")]
        sender = sender or sender_of(folder)
        if sender is None or len(lines) < begin + 1 + STRETCH_LINES:
            continue
        for line in map(json.loads, lines[begin + 1 :]):
            if line["step"] > WARM_UP_STEPS:
                found[kind].append(1 / line["throughput/samples_per_s"])
        begin = len(lines)
        kind = "stopped" if kind == "running" else "running"
        os.kill(sender, signal.SIGSTOP if kind == "stopped" else signal.SIGCONT)
        if json.loads(lines[-1])["step"] >= last_step - STRETCH_LINES * WINDOW_STEPS:
            os.kill(sender, signal.SIGCONT)  # for the end of the run
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=1, help="training workers, one thread each")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    ensure_emoji()
    batch_size = load_config(ROOT / "examples" / "emoji_cpu.yaml").train.global_batch_size
    repetitions = []
    for _ in range(options.repetitions):
        with tempfile.TemporaryDirectory() as folder, hanging_mlflow() as url:
            command = [
                str(Path(sys.executable).parent / "sigray"), "train", "examples/emoji_cpu.yaml", f"run.dir={folder}",
                "run.name=trackers", "run.trackers=[tensorboard,mlflow]", "eval.sets={}", "eval.pixel_baseline=false",
                f"train.num_samples={options.steps * batch_size}", f"train.log_every_steps={WINDOW_STEPS}",
                "checkpoint.save_every_steps=1000000", f"cluster.num_workers={options.workers}",
                "optim.num_warmup_samples=1280",
            ]  # fmt: skip
            variables = os.environ | {"MLFLOW_TRACKING_URI": url}
            driver = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL)
            times = window_times(driver, Path(folder) / "trackers", options.steps)
            if driver.wait():
                raise SystemExit("the run failed")
        running, stopped = (statistics.median(times[kind]) for kind in ("running", "stopped"))
        repetitions.append(
            {
                "windows": float(len(times["running"]) + len(times["stopped"])),
                "samples_per_s": 1 / stopped,
                "step_rate_ratio": stopped / running,
            }
        )
        print(repetitions[-1], flush=True)
    figures = {key: statistics.median([each[key] for each in repetitions]) for key in repetitions[0]}
    report("trackers", repetitions, figures, options.save)


if __name__ == "__main__":
    main()
