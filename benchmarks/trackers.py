"""What does a tracker that hangs cost a run?

The same run, alternating:

    none     `run.trackers: []`
    hanging  TensorBoard, and an MLflow server that takes requests and never answers

Both log each `WINDOW_STEPS` steps and end with the same loss, bit for bit, or the benchmark fails. Process starts are
not counted, the first `WARM_UP_STEPS` neither, nor the minute that trackers get after the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, ensure_emoji, report
from sigray.orchestrator.config import load_config
from tests.helpers.hanging_server import hanging_mlflow

WARM_UP_STEPS, WINDOW_STEPS = 20, 5


def samples_per_s(overrides: list[str], folder: Path, variables: dict[str, str]) -> tuple[float, float]:
    """Return the rate after the warm-up, and the last loss."""
    command = [str(Path(sys.executable).parent / "sigray"), "train", "examples/emoji_cpu.yaml", "--overwrite"]
    environment = os.environ | variables
    subprocess.run([*command, *overrides], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "trackers" / "metrics.jsonl").read_text().splitlines()]
    seconds = [1 / line["throughput/samples_per_s"] for line in lines if line["step"] > WARM_UP_STEPS]
    return len(seconds) / sum(seconds), lines[-1]["train/loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--workers", type=int, default=1, help="training workers, one thread each")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    ensure_emoji()
    batch_size = load_config(ROOT / "examples" / "emoji_cpu.yaml").train.global_batch_size
    repetitions = []
    with tempfile.TemporaryDirectory() as folder, hanging_mlflow() as url:
        overrides = [
            f"run.dir={folder}",
            "run.name=trackers",
            f"train.num_samples={options.steps * batch_size}",
            f"train.log_every_steps={WINDOW_STEPS}",
            "checkpoint.save_every_steps=1000000",
            f"cluster.num_workers={options.workers}",
            "eval.sets={}",
            "eval.pixel_baseline=false",
            "optim.num_warmup_samples=1280",
        ]
        variables = {"none": {}, "hanging": {"MLFLOW_TRACKING_URI": url}}
        trackers = {"none": "run.trackers=[]", "hanging": "run.trackers=[tensorboard,mlflow]"}
        for number in range(options.repetitions):
            names = ["none", "hanging"] if number % 2 == 0 else ["hanging", "none"]
            found = {name: samples_per_s([*overrides, trackers[name]], Path(folder), variables[name]) for name in names}
            rates, losses = ({name: pair[at] for name, pair in found.items()} for at in (0, 1))
            if losses["none"] != losses["hanging"]:
                raise SystemExit(f"not the same run: last losses {losses}")
            repetitions.append(
                {f"{name}_samples_per_s": rates[name] for name in trackers}
                | {"step_rate_ratio": rates["hanging"] / rates["none"]}
            )
            print(repetitions[-1], flush=True)
    figures = {key: statistics.median([each[key] for each in repetitions]) for key in repetitions[0]}
    report("trackers", repetitions, figures, options.save)


if __name__ == "__main__":
    main()
