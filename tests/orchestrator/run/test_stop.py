"""Signals to the processes of a run: SIGTERM to all, as systemd and Slurm send it, and the death of its Ray."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from tests.helpers.processes import descendants_named
from tests.helpers.runs import BATCH, NUM_STEPS, Sigray, SmallRun

LAST_STEP = 2 * NUM_STEPS
RAYLET = str(Path(ray.__file__).parent / "core/src/ray/raylet/raylet")
Moment = Callable[[str, Path], Any]  # of a run's output and its folder: true when the signal comes


def writes_checkpoint(output: str, folder: Path) -> bool:
    made = [path for path in (folder / "checkpoints").glob("*") if not (path / "commit.json").exists()]
    return bool(made) and "step " in output


# Each run goes on with the one before.
MOMENTS: dict[str, Moment] = {
    "lease": lambda output, folder: (folder / "lease.json").exists(),
    "start of Ray": lambda output, folder: "starting Ray on this machine" in output,
    "start of the workers": lambda output, folder: "starting the training workers" in output,
    "workers are up": lambda output, folder: "devices  1 training worker" in output,
    "first step": lambda output, folder: "step " in output,
    "training": lambda output, folder: output.count("step ") > 10,
    "checkpoint": writes_checkpoint,
    "evaluation": lambda output, folder: "zero-shot at" in output,
    "last step": lambda output, folder: f"step    {LAST_STEP}" in output,
    "end": lambda output, folder: f"steps    {LAST_STEP} to {LAST_STEP}" in output,
}


def session(pid: int) -> list[str]:
    """Names of the live processes of the session that a process has begun."""
    names = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = path.read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        state, _, _, session = fields.split()[:4]
        if int(session) == pid and state != "Z":
            names.append(name)
    return names


def test_sigterm_to_all_processes_ends_a_run_at_ten_moments(own_ray, tmp_path):
    """Also prints how long each end took: seconds, 30 at most on a machine that is not busy."""
    small = SmallRun(tmp_path)
    overrides = ["cluster.num_workers=1", "data.num_workers=1", "eval.pixel_baseline=false"]
    overrides += [f"train.num_samples={LAST_STEP * BATCH}"]
    for number, (moment, is_there) in enumerate(MOMENTS.items()):
        run = Sigray(tmp_path / f"{number}.log", {**os.environ}, "train", small.config, *overrides, has_session=True)
        run.wait_until(lambda run=run, is_there=is_there: is_there(run.output(), small.path))
        os.killpg(run.process.pid, signal.SIGTERM)
        begin = time.monotonic()
        code = run.wait()
        print(f"{moment}: {time.monotonic() - begin:.1f} s")
        assert (moment, code) == (moment, 130), run.output()
        assert session(run.process.pid) == [], moment
        assert re.search(r"stopped at [\d,]+ samples after", run.output()), run.output()
        assert re.search(r"continue with: (this command|sigray resume)", run.output()), run.output()
        assert "Traceback" not in run.output()
        steps = sorted(int(path.parent.name.split("-")[1]) for path in small.path.glob("checkpoints/*/commit.json"))
        done = [int(step) for step in re.findall(r"step +(\d+)  samples", run.output())]
        assert steps[-1:] == done[-1:] or not done, run.output()
    assert steps[-1] == LAST_STEP


def test_a_ray_that_dies_while_it_starts_is_named(own_ray, tmp_path):
    run = Sigray(tmp_path / "log", {**os.environ}, "train", SmallRun(tmp_path).config)
    while run.process.poll() is None:
        for pid in descendants_named(run.process.pid, RAYLET):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    assert run.process.returncode == 1
    assert "raylet of this run's Ray died while it started (Ray gives its processes 30 s" in run.output()
