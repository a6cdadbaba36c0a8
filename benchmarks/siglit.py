"""What stored embeddings of a locked tower save, and what a pretrained tower is worth at equal time.

    python -m benchmarks.siglit              about 15 minutes on two cores
    python -m benchmarks.siglit --save       keep the result in benchmarks/results/

stored     examples/emoji_siglit.yaml: the text tower trains from the store
live       the same run without a store: the image tower runs in every step, to the same embeddings
scratch    examples/emoji_cpu.yaml, as many pairs as it sees in the seconds that embedding and training took `stored`

Stored and live alternate, for some steps each; their rate is the median of their lines of metrics, the first left out.
The last line has pairs per second, stored over live, and top-1 on held-out images, stored over scratch, the lesser of
the two held-out sets; each the larger the better.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import ROOT, ensure_emoji, report
from sigray.orchestrator.config import load_config
from sigray.workers.data.embedding_store import EmbeddingStore

SIGRAY = "import sys; from sigray.tuning.cli import main; sys.exit(main(sys.argv[1:]))"
SIGLIT, SCRATCH = ROOT / "examples" / "emoji_siglit.yaml", ROOT / "examples" / "emoji_cpu.yaml"
NO_EVALUATION = ["eval.sets={}", "eval.pixel_baseline=false", "checkpoint.save_every_steps=null"]
NUM_STEPS = {"stored": 60, "live": 8}  # about 10 and 20 s


def sigray(*arguments: str) -> None:
    """Run a command of sigray in the repository's root, its output kept to itself unless it fails."""
    done = subprocess.run([sys.executable, "-c", SIGRAY, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"sigray {' '.join(arguments)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def train(config: Path, folder: Path, name: str, *overrides: str) -> Path:
    """A run; returns its folder."""
    sigray("train", str(config), f"run.dir={folder}", f"run.name={name}", "--overwrite", *overrides)
    return folder / name


def rate(run: Path) -> float:
    """Pairs per second of a run, the median of its lines without the first."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return median(line["throughput/samples_per_s"] for line in lines[1:])


def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3, help="of stored and live")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    ensure_emoji()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sigray("embed", str(SIGLIT))  # what is there already is not computed again, and its time is remembered
        path = load_config(SIGLIT).embeddings.store
        assert path is not None
        store, embed_s = f"embeddings.store={path}", sum(entry.seconds for entry in EmbeddingStore(path).history())
        batch = load_config(SIGLIT).train.global_batch_size
        repetitions: list[dict[str, float]] = []
        for _ in range(options.repetitions):
            rates = {}
            for name, where in (("stored", store), ("live", "embeddings.store=null")):
                size = [
                    f"train.num_samples={NUM_STEPS[name] * batch}",
                    "optim.num_warmup_samples=0",
                    f"train.log_every_steps={NUM_STEPS[name] // 4}",
                ]
                rates[name] = rate(train(SIGLIT, folder, name, where, *size, *NO_EVALUATION))
            repetitions.append({f"{name}_samples_per_s": value for name, value in rates.items()})
            print(repetitions[-1], flush=True)

        stored = summary(train(SIGLIT, folder, "whole", store, "eval.pixel_baseline=false"))
        short = train(SCRATCH, folder, "short", "train.num_samples=12800", "optim.num_warmup_samples=0", *NO_EVALUATION)
        seconds = embed_s + stored["train_s"]
        step = load_config(SCRATCH).train.global_batch_size
        num_samples = int(seconds * rate(short)) // step * step
        scratch = summary(
            train(SCRATCH, folder, "scratch", f"train.num_samples={num_samples}", "eval.pixel_baseline=false")
        )
        top1 = {
            name: [run["zero_shot"][s]["top1"] for s in sorted(run["zero_shot"])]
            for name, run in (("stored", stored), ("scratch", scratch))
        }
        repetitions.append(
            {
                "embed_s": embed_s,
                "stored_train_s": stored["train_s"],
                "scratch_train_s": scratch["train_s"],
                "scratch_samples": num_samples,
                **{
                    f"{name}_{which}_top1": rates[number]
                    for name, rates in top1.items()
                    for number, which in enumerate(sorted(stored["zero_shot"]))
                },
            }
        )
    speeds = [line["stored_samples_per_s"] / line["live_samples_per_s"] for line in repetitions[:-1]]
    figures = {
        "examples_speedup": median(speeds),
        "top1_over_scratch": min(s / c for s, c in zip(top1["stored"], top1["scratch"], strict=True)),
    }
    report("siglit", repetitions, figures, options.save)


if __name__ == "__main__":
    main()
