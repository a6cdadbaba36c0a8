"""SIGTERM to all processes of a run, as systemd and Slurm send it, at moments from its start to its evaluation."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from tests.helpers.runs import Sigray, SmallRun

# Lines of output at which the signal comes; each run goes on with the one before.
MOMENTS = {
    "scan": "",
    "start of Ray": "starting Ray on this machine",
    "start of the workers": "starting the training workers",
    "training": r"step +15  samples",
    "evaluation": r"step +120  samples",
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


def test_sigterm_to_all_processes_ends_a_run_within_seconds(own_ray, tmp_path):
    small = SmallRun(tmp_path)
    overrides = ["cluster.num_workers=1", "data.num_workers=1", "eval.pixel_baseline=false"]
    for number, (moment, text) in enumerate(MOMENTS.items()):
        run = Sigray(tmp_path / f"{number}.log", {**os.environ}, "train", small.config, *overrides, has_session=True)
        lease = small.path / "lease.json"
        run.wait_until(lambda run=run, text=text, lease=lease: lease.exists() and re.search(text, run.output()))
        os.killpg(run.process.pid, signal.SIGTERM)
        begin = time.monotonic()
        code = run.wait()
        assert (moment, code) == (moment, 130), run.output()
        assert time.monotonic() - begin < 30, run.output()
        assert session(run.process.pid) == [], moment
        assert re.search(r"stopped at [\d,]+ samples after", run.output()), run.output()
        assert re.search(r"continue with: (this command|sigray resume)", run.output()), run.output()
        assert "Traceback" not in run.output()
        if moment == "training":
            assert sorted((small.path / "checkpoints").glob("*/commit.json")), run.output()
