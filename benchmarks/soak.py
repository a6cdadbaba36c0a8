"""Break a small run over and over, as `sigray chaos` does, and count what came of it.

    python -m benchmarks.soak                three seeds of 40 faults of all ten kinds, about 40 minutes on two cores
    python -m benchmarks.soak --seeds 7 --faults 20
    python -m benchmarks.soak --save         keep the result in benchmarks/results/

Two training workers train small towers on the demo data, with evaluations and the ledger. One undisturbed run is the
measure for all seeds. The last line has the faults that were injected, and in how many places the ends of the disturbed
runs differ from the undisturbed one: weights, optimizer state, losses of all lines, samples in the ledger.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from rich.console import Console

from benchmarks.common import ROOT, ensure_emoji, report
from sigray.orchestrator.chaos.chaos import DISTURBED, chaos, result_table
from sigray.orchestrator.chaos.faults import KINDS

EMOJI = ROOT / "examples" / "emoji_cpu.yaml"
OVERRIDES = [
    "model.towers={embed_dim: 32, vision_cfg: {image_size: 32, patch_size: 16, width: 32, head_width: 16, layers: 1}, "
    "text_cfg: {context_length: 16, vocab_size: 4096, width: 32, heads: 2, layers: 1, no_causal_mask: true, "
    "pool_type: last}}",
    "train.global_batch_size=64",
    "train.log_every_steps=5",
    "eval.pixel_baseline=false",
    "eval.sets.held_out_concepts.retrieval=false",
    "checkpoint.save_every_steps=100",
    "data.num_workers=2",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="each makes a run")
    parser.add_argument("--faults", type=int, default=40, help="of each run")
    parser.add_argument("--every-s", type=float, default=3.0, help="mean seconds of training between two faults")
    parser.add_argument("--steps", type=int, default=8000, help="of each run; it must outlive its faults")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: a temporary one)")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    ensure_emoji()
    console, repetitions, counts = Console(), [], Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        out = (options.out or Path(temporary)).absolute()
        for seed in options.seeds:
            shutil.rmtree(out / DISTURBED, ignore_errors=True)
            found = chaos(
                str(EMOJI),
                [*OVERRIDES, f"train.num_samples={64 * options.steps}"],
                console,
                out=out,
                seed=seed,
                num_faults=options.faults,
                every_s=options.every_s,
            )
            console.print(result_table(found))
            console.print(found.verdict, highlight=False, markup=False, soft_wrap=True)
            own = Counter(fault.kind for fault in found.faults)
            counts += own
            repetitions.append(
                {
                    "seed": seed,
                    "faults": len(found.faults),
                    **{kind.replace("-", "_"): own[kind] for kind in KINDS},
                    "drivers_started_again": found.num_restarts,
                    "attempts": found.num_attempts,
                    "steps_done_again": found.steps_repeated,
                    "undisturbed_s": found.undisturbed_s,
                    "disturbed_s": found.disturbed_s,
                    "differences": len(found.differences),
                }
            )
    figures: dict[str, float] = {
        "kinds": len(counts),
        "faults": counts.total(),
        "differences": sum(int(found["differences"]) for found in repetitions),
    }
    report("soak", repetitions, figures, options.save)


if __name__ == "__main__":
    main()
