"""Time of a step by part: torch.profiler around some steps, split by spans.

The loop marks the end of each step; the spans (`losses/spans.py`) name its parts. Each rank writes to the run's
storage:

    profile/rank-0000.json.gz      the trace, for Perfetto (ui.perfetto.dev) or chrome://tracing
    profile/rank-0000-steps.json   `RankProfile`, from the same trace
    profile/rank-0000-xla.txt      torch-xla's own counters, under torch-xla

On CUDA the host waits for the device at the end of each span. Otherwise the spans would measure only the time to
launch the kernels. Under torch-xla, spans measure only the time to record operations: one program computes the whole
step, and the host waits for it in "device program".
"""

from __future__ import annotations

import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from sigray.losses.spans import PREFIX, recording
from sigray.workers.device import Device
from sigray.workers.storage import Storage

FOLDER = "profile"
PARTS = (
    "data wait", "to device", "forward", "loss: tiles", "loss: ring", "backward", "device program",
    "gradient all-reduce", "optimizer", "metrics", "checkpoint", "other",
)  # fmt: skip
"""In the order of a step. "other" is the time outside all spans."""
_STEP = "ProfilerStep#"


@dataclass(frozen=True)
class Profile:
    """Which steps to profile."""

    warm_up: int  # number of steps before them, in each attempt
    steps: int  # number of profiled steps; one more step follows, which ends with a checkpoint

    @property
    def total(self) -> int:
        return self.warm_up + self.steps + 1


@dataclass(frozen=True)
class RankProfile:
    """Result of one rank."""

    rank: int
    device: str
    plain_step_s: float | None  # median of the steps before, without the profiler; None: too few
    steps: list[dict[str, float]]  # seconds of each profiled step by part; they add up to its wall time


def split_steps(events: Iterable[dict[str, Any]]) -> list[dict[str, float]]:
    """Seconds of each step of a Chrome trace, by part.

    Each moment counts for the innermost span.

    Args:
        events: of the trace. The steps of torch.profiler and our spans are used, on the thread of the steps.
    """
    named = [event for event in events if event.get("cat") == "user_annotation" and event.get("ph") == "X"]
    steps = sorted((event for event in named if event["name"].startswith(_STEP)), key=lambda event: event["ts"])
    spans = [event for event in named if event["name"].startswith(PREFIX)]
    spans.sort(key=lambda event: (event["ts"], -event["dur"]))  # if two begin together, the longer one is the outer one
    found = []
    for step in steps:
        begin = float(step["ts"])
        end = begin + float(step["dur"])
        inside = [
            (max(begin, float(event["ts"])), min(end, float(event["ts"]) + float(event["dur"])), event["name"])
            for event in spans
            if event["tid"] == step["tid"] and event["ts"] < end and event["ts"] + event["dur"] > begin
        ]
        parts = dict.fromkeys(PARTS, 0.0)
        for left, right in pairwise(sorted({begin, end, *(edge for span in inside for edge in span[:2])})):
            names = [name for start, stop, name in inside if start <= left and right <= stop]
            parts[names[-1].removeprefix(PREFIX) if names else "other"] += (right - left) / 1e6
        found.append(parts)
    return found


class StepProfiler:
    """Profiles steps of a training loop, or does nothing.

    Args:
        wanted: which steps; None: nothing is profiled.
    """

    def __init__(self, wanted: Profile | None, device: Device, storage: Storage, rank: int) -> None:
        self._wanted, self._device, self._storage, self._rank = wanted, device, storage, rank
        self._ends: list[float] = []
        self._recording = ExitStack()

    def __enter__(self) -> StepProfiler:
        if self._wanted is None:
            return self
        activities = [ProfilerActivity.CPU]
        if self._device.torch_device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        skipped = self._wanted.warm_up - 1
        steps = schedule(skip_first=skipped, wait=0, warmup=1, active=self._wanted.steps + 1, repeat=1)
        self._profile = profile(activities=activities, schedule=steps, on_trace_ready=self._save)
        self._profile.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if self._wanted is not None:
            self._recording.close()
            self._profile.stop()

    def step_done(self) -> None:
        """Mark the end of a step, logging and checkpoint included."""
        if self._wanted is None:
            return
        self._ends.append(time.perf_counter())
        if len(self._ends) == self._wanted.warm_up:
            self._recording.enter_context(recording(self._device.settle_span))
        elif len(self._ends) == self._wanted.total:
            self._recording.close()
        self._profile.step()

    def _save(self, trace: profile) -> None:
        assert self._wanted is not None
        # The first two steps allocate buffers and the optimizer's state; torch.profiler warms up in the last one.
        ends = self._ends[1 : self._wanted.warm_up - 1]
        plain = [after - before for before, after in pairwise(ends)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json.gz")
            trace.export_chrome_trace(str(path))
            content = path.read_bytes()
        steps = split_steps(json.loads(gzip.decompress(content))["traceEvents"])
        found = RankProfile(self._rank, self._device.describe(), statistics.median(plain) if plain else None, steps)
        name = f"{FOLDER}/rank-{self._rank:04d}"
        self._storage.write(f"{name}.json.gz", content)
        report = self._device.compiler_report()
        if report:
            self._storage.write(f"{name}-xla.txt", report.encode())
        self._storage.write(f"{name}-steps.json", json.dumps(asdict(found)).encode())
