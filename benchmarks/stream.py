"""How many training batches per second does one consumer get on two cores?

Pairs of 224 x 224 pixels and 77 tokens from the same tars of real photographs (`benchmarks/photo_tars.py`), batches of
256. The contestants (`benchmarks/stream_peers.py`) take turns; each runs alone in a fresh process with the same small
environment on the same two cores, and its start and first batches do not count.

    speedup_open_clip   sigray's samples/s over the peer's; likewise speedup_webdataset
    speedup_stateful    samples/s of `sigray.stream` over webdataset's with torchdata's StatefulDataLoader
    speedup_ray_data    the same over Ray Data with its own decoder
    speedup_ray_data_our_decoder  the same over the faster of the two ways of running sigray's decoder in Ray Data
    floor_ratio         sigray's samples/s over those of two bare processes without hand-over, in
                        alternating windows of a few seconds, both being up all the time
    shared_cpu_ratio    CPU time of the data-shard workers with two readers of one stream over that with one

Each is the median over repetitions of the ratio within a repetition.

`--memory` streams all samples 20 times with sigray instead, and shows resident memory after the second time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, report
from benchmarks.photo_tars import PHOTOS, ensure_photos
from benchmarks.stream_peers import BATCH, CONTESTANTS, NUM_WORKERS
from sigray.orchestrator.run.ray_session import LEAN_RAY

TURN_S = 6.0
TIMEOUT_S = 1800  # of a contestant; for --memory on a busy machine
# open_clip_train 3.3.0 asks for this one and dies at a shard's end with 1.0.2.
OPEN_CLIP_NEEDS = "webdataset==0.2.86"
MEMORY_EPOCHS = 20


def run(name: str, data: Path, *arguments: str) -> Any:
    """What a contestant printed last, from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.stream_peers", name, "--data", str(data), *arguments]
    cores = sorted(os.sched_getaffinity(0))[:NUM_WORKERS]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(open_clip_needs(data) if name == "open_clip" else None),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    results = [line for line in done.stdout.splitlines() if line.startswith(("{", "["))]
    if not results:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return json.loads(results[-1])


def environment(first_on_path: Path | None) -> dict[str, str]:
    """The same for all: one thread per process, a Ray as `sigray train` starts it."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LANG") if key in os.environ}
    path = [str(folder) for folder in (first_on_path, ROOT) if folder]
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    return (
        kept
        | threads
        | LEAN_RAY
        | {
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONHASHSEED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
        }
    )


def open_clip_needs(data: Path) -> Path:
    """A folder with what open_clip_train wants otherwise than we, fetched at the first use."""
    folder = data / "peers" / OPEN_CLIP_NEEDS
    if not (folder / "webdataset").is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*install, "--target", str(folder), OPEN_CLIP_NEEDS], check=True)
    return folder


def run_memory(data: Path, save: bool) -> None:
    """A long stream's memory: its slope after the first tenth, and by how much it grows from there to the end.

    `memory_growth_pct` leaves the mapped tars out: their pages count as resident while anyone has them mapped.
    """
    series = run("sigray", data, "--epochs", str(MEMORY_EPOCHS))
    for point in series[:: max(1, len(series) // 20)]:
        print(" ".join(f"{key}={value:.0f}" for key, value in point.items()))
    later = series[len(series) // 10 :]
    samples = np.array([point["samples"] for point in later])
    figures = {}
    for key in ("rss_mib", "pss_mib", "own_mib"):
        slope, start = np.polyfit(samples - samples[0], [point[key] for point in later], 1)
        figures[f"{key}_at_a_tenth"] = float(start)
        figures[f"{key}_per_100k_samples"] = float(slope) * 1e5
    figures["memory_growth_pct"] = 100 * (
        figures["own_mib_per_100k_samples"] * (samples[-1] - samples[0]) / 1e5 / figures["own_mib_at_a_tenth"]
    )
    report("stream-memory", later, figures, save)


def repetition(names: list[str], data: Path, seconds: float) -> dict[str, float]:
    """Every contestant once."""
    found: dict[str, float] = {}
    for name in names:
        if name == "shared":
            one, two = (run(name, data, "--readers", str(readers))["worker_cpu_s"] for readers in (1, 2))
            found |= {"one_reader_cpu_s": one, "two_readers_cpu_s": two, "shared_cpu_ratio": two / one}
            print(f"shared: {one:.1f} s CPU of the data-shard workers with one reader, {two:.1f} with two", flush=True)
            continue
        if name == "in_turns":
            turns = run(name, data, "--seconds", str(TURN_S))
            found["floor_ratio"] = statistics.median(turn["sigray"] / turn["floor"] for turn in turns)
            pairs = ", ".join(f"{turn['sigray']:.0f}/{turn['floor']:.0f}" for turn in turns)
            print(f"in turns: sigray/floor {pairs}: {found['floor_ratio']:.3f}", flush=True)
            continue
        result = run(name, data, "--seconds", str(seconds))
        rate = result["samples_per_s"]
        found |= {
            f"{name}_samples_per_s": rate,
            f"{name}_cpu_us_per_sample": 1e6 * result["cpu_s_per_s"] / rate,
            f"{name}_peak_pss_mib": result["peak_pss_mib"],
        }
        print(
            f"{name}: {rate:.0f} samples/s, {rate / BATCH:.2f} batches/s, "
            f"{found[f'{name}_cpu_us_per_sample']:.0f} us CPU per sample, {result['peak_pss_mib']:.0f} MiB",
            flush=True,
        )
    ours = found.get("sigray_samples_per_s")
    if ours is not None:
        against = {
            "speedup_open_clip": ["open_clip"],
            "speedup_webdataset": ["webdataset"],
            "speedup_ray_data": ["ray_data_default"],
            "speedup_ray_data_our_decoder": ["ray_data", "ray_data_fused"],
        }
        for key, peers in against.items():
            rates = [found[f"{name}_samples_per_s"] for name in peers if name in names]
            if rates:
                found[key] = ours / max(rates)
    if "stream" in names and "stateful" in names:
        found["speedup_stateful"] = found["stream_samples_per_s"] / found["stateful_samples_per_s"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="measured of each contestant, at least")
    everything = [*CONTESTANTS, "in_turns", "shared"]
    parser.add_argument("--only", nargs="+", choices=everything, default=everything, metavar="NAME")
    parser.add_argument("--memory", action="store_true", help="a long stream's memory instead")
    parser.add_argument("--data", type=Path, default=PHOTOS, help="where the tars are, or are made")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    ensure_photos(options.data)
    if options.memory:
        run_memory(options.data, options.save)
        return
    names = options.only
    repetitions = []
    for number in range(options.repetitions):
        begin = number % len(names)  # another one begins each time
        print(f"repetition {number + 1}")
        repetitions.append(repetition(names[begin:] + names[:begin], options.data, options.seconds))
    figures = {key: statistics.median(found[key] for found in repetitions) for key in repetitions[0]}
    of_speed = [key for key in figures if key.startswith("speedup_")]
    last = {key: figures.pop(key) for key in [*of_speed, "floor_ratio", "shared_cpu_ratio"] if key in figures}
    report("stream", repetitions, last or figures, options.save)


if __name__ == "__main__":
    main()
