"""Whole runs through the command line: a small run's folder, and `sigray` in the background."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.data import COLOURS, TOWERS, write_dataset

SIGRAY = str(Path(sys.executable).parent / "sigray")
NUM_STEPS, BATCH = 120, 24
LIMIT_S = 900.0  # of one command; it ends what hangs, also on a machine on which other tests run


class SmallRun:
    """A folder with data, a config and the runs made of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_dataset(folder / "train", [60, 40, 70, 30])
        write_dataset(folder / "held_out", [24])
        (folder / "classes.json").write_text(json.dumps([{"id": name, "name": name} for name in COLOURS]))
        colours = {
            "shards": str(folder / "held_out"),
            "classes": str(folder / "classes.json"),
            "templates": ["{}", "a {} field"],
        }
        content = {
            "run": {"name": "small", "dir": str(folder / "runs")},
            "data": {
                "shards": str(folder / "train"),
                "block_size": 16,
                "num_lanes": 3,
                "shuffle_window": 32,
                "num_workers": [1, 2],
            },
            # Patch dropout: a step depends on its random state, which a resumed run must find again, and the second
            # pass over a micro-batch as well.
            "model": {"towers": {**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], "patch_dropout": 0.25}}},
            "train": {
                "num_samples": NUM_STEPS * BATCH,
                "global_batch_size": BATCH,
                "micro_batch_size": 4,
                "ledger": True,
                "log_every_steps": 1,
            },
            "optim": {"num_warmup_samples": 48},
            "eval": {"pixel_baseline": True, "sets": {"colours": colours}},
            "cluster": {"num_workers": 2},
            "checkpoint": {"save_every_steps": 10, "keep_newest": 2},
        }
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(content))
        self.path = folder / "runs" / "small"

    def losses(self) -> dict[int, float]:
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        assert len({line["step"] for line in lines}) == len(lines), "a step is logged twice"
        return {line["step"]: line["train/loss"] for line in lines}

    def num_lines(self) -> int:
        metrics = self.path / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0


class Sigray:
    """`sigray` in the background, its output in a file.

    Args:
        has_session: start a session, to signal all its processes.
    """

    def __init__(self, log: Path, environment: dict[str, str], *arguments: object, has_session: bool = False) -> None:
        self.log = log
        with log.open("w") as output:
            command = [SIGRAY, *map(str, arguments)]
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=has_session
            )

    def output(self) -> str:
        return self.log.read_text()

    def wait_until(self, condition: Any, timeout_s: float = LIMIT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def wait(self) -> int:
        return self.process.wait(timeout=LIMIT_S)


EXAMPLES = sorted(Path("examples").glob("*.yaml"))
