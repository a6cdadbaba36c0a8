"""What the benchmarks share: the demo data, the closing line and the kept result. Ranks come from `tests/ranks.py`."""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

from orchestrator.emoji import build_emoji
from orchestrator.launch import environment

ROOT = Path(__file__).resolve().parent.parent
EMOJI = ROOT / "data" / "emoji36"


def ensure_emoji() -> None:
    """Build the demo data where `examples/` expects it, unless it is there."""
    build_emoji(EMOJI, progress=lambda stage, done, total: print(f"{stage}: {done} of {total}", end="\r"))
    print()


def peak_growth_mib(run: Callable[[], object]) -> float:
    """By how much the resident set of this process grows, at most, while `run` runs (Linux, glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work left free would hide what this takes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = status_mib("VmRSS")
    run()
    return status_mib("VmHWM") - before


def status_mib(key: str) -> float:
    """A figure of /proc/self/status, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def report(name: str, repetitions: list[dict[str, float]], figures: dict[str, float], save: bool) -> None:
    """Print each repetition and, last, the figures; keep them under benchmarks/results/ where asked to."""
    for number, repetition in enumerate(repetitions, start=1):
        print(f"repetition {number}: " + " ".join(f"{key}={value:.4g}" for key, value in repetition.items()))
    content = {"benchmark": name, **environment(), "figures": figures, "repetitions": repetitions}
    if save:
        path = ROOT / "benchmarks" / "results" / f"{date.today().isoformat()}-{name}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"kept in {path.relative_to(ROOT)}")
    print(" ".join(f"{key}={value:.4g}" for key, value in figures.items()))
