"""Entry point of `sigray`: the commands of `orchestrator/cli/main.py`, and `sweep` from here, as imports point one way."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from sigray.orchestrator.cli.main import main as orchestrator_main
from sigray.orchestrator.config import ConfigError

_EXAMPLES = """\
examples:
  sigray sweep tuning/studies/batch_size.yaml                 sigmoid and softmax at several batch sizes, demo data
  sigray sweep tuning/studies/batch_size.yaml --plan          which trials there are, and which cannot run
  sigray sweep study.yaml budget=20000 seeds=[0,1,2]          any key of the study can be overridden,
  sigray sweep study.yaml optim.lr=5e-4 cluster.address=auto  and any key of the run that it varies
  sigray sweep study.yaml scale=full data.shards=s3://bucket/tars/
  sigray sweep --resume sweeps/batch_size                     go on after whatever ended it; the same command does too
  sigray sweep --report sweeps/batch_size                     write report.html and the figures again

A study is a YAML:
  base: ../../examples/emoji_cpu.yaml      the run that is varied
  metric: zero_shot.held_out_designer.top1 by what trials are judged; higher is better
  budget: 51200                            samples that each trial sees, whatever its batch size
  rungs: [12800, 25600]                    where all are evaluated too, and where a scheduler may stop one
  space:                                   any dotted key of the run
    train.global_batch_size: {grid: [64, 256, 1024]}
    loss.name: {grid: [sigmoid, softmax]}
    optim.lr: {loguniform: [1.0e-4, 1.0e-2]}
    optim.weight_decay: {choice: [0.0, 0.05], when: "loss.name == 'sigmoid'"}
    model.init_logit_bias: {expr: "log(1 / (train.global_batch_size - 1))"}
  search: {name: random, num_trials: 4}    grid (default), random or optuna
  scheduler: {name: asha, eta: 3}          none (default), asha, median or hyperband
  seeds: [0, 1]                            the whole search, once for each
docs/sweeps.md explains each key; tuning/studies/ has the experiments of the SigLIP paper.

A trial is a whole `sigray train` below DIR/trials. Trials of one data order share their data-shard workers. As many run
at once as the cluster has room for. DIR has results.jsonl (at every moment), trials.csv, report.html, figures/ and
best.yaml: `sigray train DIR/best.yaml`.

Exit codes: 0 done, trials that failed or could not run are in the table; 1 no trial came to a result; 2 the study
cannot be used; 130 interrupted (`sigray sweep --resume DIR` goes on).
"""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    return orchestrator_main(arguments, _add_sweep, _sweep_pages)


def _sweep_pages() -> list[Any]:
    from sigray.tuning.live_page import SWEEPS

    return [SWEEPS]


def _add_sweep(command: Any) -> None:
    added: argparse.ArgumentParser = command(
        "sweep",
        _sweep,
        "train many runs that differ in chosen keys, at equal samples seen, and compare",
        examples=_EXAMPLES,
    )
    added.usage = (
        "sigray sweep STUDY.yaml [KEY=VALUE ...] [--plan] [--overwrite]\n"
        "       sigray sweep --resume DIR [KEY=VALUE ...] [--retry]\n"
        "       sigray sweep --report DIR"
    )
    added.add_argument("overrides", nargs="*", metavar="STUDY.yaml", help="a study; KEY=VALUE behind it")
    what = added.add_mutually_exclusive_group()
    what.add_argument("--resume", metavar="DIR", help="go on with the sweep in a folder, or s3://bucket/prefix/name")
    what.add_argument("--report", metavar="DIR", help="write the report of a sweep again")
    what.add_argument("--plan", action="store_true", help="print the trials, and why some cannot run; start nothing")
    added.add_argument("--retry", action="store_true", help="run trials that failed once more")
    added.add_argument("--overwrite", action="store_true", help="delete an earlier sweep of the same name first")


def _sweep(options: argparse.Namespace, console: Console) -> int:
    from sigray.tuning.study import load_study, read_study

    given = options.resume or options.report
    words = options.overrides
    if given and words and "=" not in words[0]:
        raise ConfigError(f"{words[0]}: --resume and --report take the study from their folder")
    if not given and not (words and "=" not in words[0]):
        raise ConfigError("give a study, as tuning/studies/batch_size.yaml, or --resume DIR; `sigray sweep --help`")
    study = read_study(given, words) if given else load_study(words[0], words[1:])
    from sigray.tuning.sweep import plan, sweep
    from sigray.tuning.table import ranking

    if options.plan:
        console.print(plan(study, console))
        return 0
    from sigray.tuning.live import results_table, value_text

    if options.report:
        from sigray.tuning.report import write_report
        from sigray.tuning.table import read_table
        from sigray.workers.storage import Storage

        storage = Storage(study.config.storage_uri)
        path = write_report(study, storage, read_table(storage))
        console.print(f"report: {path}", highlight=False, soft_wrap=True)
        return 0
    table = sweep(study, console, overwrite=options.overwrite, retry=options.retry)
    console.print(results_table(table, study))
    best = next((one for one in ranking(table.rows.values()) if one.rung >= 0), None)
    if best is not None:
        values = ", ".join(f"{name}={value_text(value)}" for name, value in best.values.items())
        spread = f" (standard deviation over {len(best.rows)} seeds {best.spread:.2%})" if len(best.rows) > 1 else ""
        console.print(f"best: {values}: {best.mean:.2%}{spread}", highlight=False, markup=False, soft_wrap=True)
    counts = ", ".join(f"{count} {status}" for status, count in table.counts().items())
    console.print(
        f"trials: {counts}; {table.samples_spent:,} samples seen\nreport: {study.config.folder / 'report.html'}",
        highlight=False,
        soft_wrap=True,
    )
    if not all(row.is_over for row in table.rows.values()):
        console.print(f"go on with: sigray sweep --resume {Path(study.config.folder)}", highlight=False, soft_wrap=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
