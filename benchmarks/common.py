"""What the benchmarks share: the demo data, ranks without Ray, the closing line and the kept result."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from orchestrator.emoji import build_emoji
from orchestrator.launch import environment

ROOT = Path(__file__).resolve().parent.parent
EMOJI = ROOT / "data" / "emoji36"


def ensure_emoji() -> None:
    """Build the demo data where `examples/` expects it, unless it is there."""
    build_emoji(EMOJI, progress=lambda stage, done, total: print(f"{stage}: {done} of {total}", end="\r"))
    print()


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, world_size, *arguments)` on every rank of a fresh gloo group; the results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank_main, (world_size, folder, function, arguments), nprocs=world_size)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _rank_main(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    torch.save(function(rank, world_size, *arguments), Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def median(values: list[float]) -> float:
    return statistics.median(values)


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
