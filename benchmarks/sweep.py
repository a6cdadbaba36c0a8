"""What a sweep saves: decoding that trials share, and trials that are stopped early.

    python -m benchmarks.sweep              about 25 minutes on two cores
    python -m benchmarks.sweep --save       keep the result in benchmarks/results/

shared     four trials of one order of samples at once, on one stream; CPU seconds of its data-shard workers
separate   the same four at once, each with data-shard workers of its own
grid       12 configurations (learning rate x batch size), each to its end
asha       the same 12, the weak ones stopped at rungs

The figures and the weights of shared and separate must be the same, bit for bit, and asha must find the best of the
grid; otherwise the benchmark fails. The last line has the two ratios, each the smaller the better: CPU seconds of
decoding, shared over separate, and samples seen by all trials, asha over grid.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import ROOT, ensure_emoji, report
from sigray.tuning.study import load_study
from sigray.tuning.table import Table, ranking, read_table
from sigray.workers.storage import Storage

SWEEP = "import sys; from sigray.tuning.cli import main; sys.exit(main(sys.argv[1:]))"
LEARNING_RATES = [1.0e-5, 1.0e-4, 5.0e-4, 2.0e-3, 1.0e-2, 5.0e-2]
BATCHES = [32, 128]


def study(name: str, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "base": str(ROOT / "examples" / "emoji_cpu.yaml"),
        "dir": str(folder),
        "metric": "zero_shot.held_out_concepts.top5",
        "overrides": {
            "cluster.num_workers": 1,
            "eval.pixel_baseline": False,
            "checkpoint.save_every_steps": None,
            "train.log_every_steps": 20,
            "optim.num_warmup_samples": 1024,
        },
    } | more


def sharing(name: str, folder: Path, *, is_shared: bool) -> dict[str, Any]:
    """Four learning rates; to prevent sharing, a key without effect makes their streams differ."""
    cases = {
        f"lr {lr}": {"optim.lr": lr, "data.cache_mib": 256 if is_shared else 256 + number}
        for number, lr in enumerate([2.0e-4, 5.0e-4, 1.0e-3, 2.0e-3])
    }
    content = study(name, folder, budget=20_480, parallel=4, space={"trial": {"cases": cases}})
    # Random crops: every epoch is decoded again, as large data is. Ray's count of CPUs is not what is measured.
    content["overrides"] |= {"data.crop": "random", "data.cpus_per_worker": 0}
    return content


def twelve(name: str, folder: Path, scheduler: str) -> dict[str, Any]:
    return study(
        name,
        folder,
        budget=24_576,
        # Not earlier: some thousand samples tell nothing about a model yet.
        rungs=[6_144, 12_288],
        scheduler={"name": scheduler, "eta": 4},
        space={"optim.lr": {"grid": LEARNING_RATES}, "train.global_batch_size": {"grid": BATCHES}},
    )


def run(content: dict[str, Any], folder: Path) -> tuple[Table, float]:
    """Run a study by the command line; its table, and seconds."""
    path = folder / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", SWEEP, "sweep", str(path)], check=True, cwd=ROOT, env=environment)
    seconds = time.monotonic() - begin
    table = read_table(Storage(load_study(path).config.storage_uri))
    bad = [row.error for row in table.rows.values() if row.status not in ("finished", "stopped")]
    if bad:
        raise RuntimeError(f"{content['name']}: {bad[0]}")
    return table, seconds


def outcome(folder: Path, name: str, table: Table) -> dict[int, Any]:
    """Figures at every rung, and what the newest checkpoint's files hash to."""
    found = {}
    for number, row in table.rows.items():
        commits = sorted((folder / name / "trials" / f"trial-{number:03d}" / "checkpoints").glob("*/commit.json"))
        found[number] = [result.figures for result in row.results], json.loads(commits[-1].read_text())["files"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    ensure_emoji()
    with tempfile.TemporaryDirectory(prefix="sigray-sweep-") as name:
        folder = Path(name)
        shared, shared_s = run(sharing("shared", folder, is_shared=True), folder)
        separate, separate_s = run(sharing("separate", folder, is_shared=False), folder)
        if outcome(folder, "shared", shared) != outcome(folder, "separate", separate):
            raise RuntimeError("trials that share a stream ended otherwise than those that do not")
        grid, grid_s = run(twelve("grid", folder, "none"), folder)
        asha, asha_s = run(twelve("asha", folder, "asha"), folder)
    best, best_asha = (ranking(table.rows.values())[0] for table in (grid, asha))
    if best.values != best_asha.values:
        raise RuntimeError(f"the grid's best is {best.values} with {best.mean}, that of ASHA {best_asha.values}")

    def cpu_s(table: Table) -> float:
        return sum(stream["cpu_s"] for stream in table.streams)

    def decoded(table: Table) -> float:
        return sum(stream["decoded"] for stream in table.streams)

    repetition = {
        "shared_cpu_s": cpu_s(shared),
        "separate_cpu_s": cpu_s(separate),
        "shared_decoded": decoded(shared),
        "separate_decoded": decoded(separate),
        "shared_wall_s": shared_s,
        "separate_wall_s": separate_s,
        "grid_samples": float(grid.samples_spent),
        "asha_samples": float(asha.samples_spent),
        "grid_wall_s": grid_s,
        "asha_wall_s": asha_s,
        "best_figure": best.mean,
    }
    figures = {
        "shared_decode_ratio": cpu_s(shared) / cpu_s(separate),
        "asha_examples_ratio": asha.samples_spent / grid.samples_spent,
    }
    report("sweep", [repetition], figures, options.save)


if __name__ == "__main__":
    main()
