"""A run without training: `python -m tests.helpers.played_run FOLDER` writes the records of one, and tracks it.

As a driver does: a restart goes on from the newest checkpoint, repeats its steps, and takes other times for them. A
file `stop` in the folder ends the run.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from sigray.orchestrator.config import RunConfig, parse_config
from sigray.orchestrator.run.tracker_process import TrackerProcess
from sigray.orchestrator.run_folder import RunFolder
from sigray.workers.data.manifest import Manifest
from tests.helpers.data import TOWERS
from tests.helpers.run_folders import evaluation, metrics_line

BATCH = 256
_LINE_S = 0.05
_SAVE_EVERY = 25  # steps


def played_config(folder: Path, trackers: list[str]) -> RunConfig:
    content = {
        "run": {"name": "played", "dir": str(folder), "trackers": trackers},
        "data": {"shards": "/tars"},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 1_000_000, "global_batch_size": BATCH},
    }
    return parse_config(content, "played")


def line_of(step: int) -> dict[str, float]:
    """The figures of a step; the rate is another one each time."""
    return metrics_line(step) | {"train/loss": 1 / 3 + 10 / step, "throughput/samples_per_s": time.monotonic()}


def play(folder: Path) -> None:
    config = played_config(folder, ["tensorboard", "wandb", "mlflow"])
    run = RunFolder(config)
    run.path.mkdir(parents=True, exist_ok=True)
    run.begin(config, Manifest(()))
    saved = folder / "saved"
    step = int(saved.read_text()) if saved.exists() else 0
    run.restore_metrics(step)
    run.save_summary({"name": "played"})
    with TrackerProcess(run, config.run.trackers, print, name="a sweep/played", group="a sweep"):
        while not (folder / "stop").exists():
            step += 1
            run.append_metrics(line_of(step))
            if step % _SAVE_EVERY == 0:
                run.save_evaluation(evaluation(step, 1 / step, 2 / step))
                saved.with_suffix(".new").write_text(str(step))
                os.replace(saved.with_suffix(".new"), saved)
            time.sleep(_LINE_S)
        run.save_summary({"name": "played", "status": "finished"})


if __name__ == "__main__":
    play(Path(sys.argv[1]))
