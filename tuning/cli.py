"""The entry point of `sigray`: the commands of `orchestrator/cli/`, and `sweep`."""

import os
import sys
from argparse import Namespace
from typing import Any

from rich.console import Console

from sigray.orchestrator.cli.command import argument, command, either, say
from sigray.orchestrator.cli.main import main as orchestrator_main
from sigray.orchestrator.cluster.jobs import RESULT
from sigray.orchestrator.config import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    return orchestrator_main(arguments, [sweep], _sweep_pages)


def _sweep_pages() -> list[Any]:
    from sigray.tuning.live_page import SWEEPS

    return [SWEEPS]


def _sweep_job(options: Namespace) -> Any:
    from sigray.tuning.job import sweep_job

    return sweep_job(options)


@command(
    argument("overrides", nargs="*", metavar="STUDY.yaml", help="a study, then KEY=VALUE"),
    either(
        argument("--resume", metavar="DIR", help="continue the sweep of a folder, or of s3://bucket/prefix/name"),
        argument("--report", metavar="DIR", help="write the report of a sweep again"),
        argument("--plan", action="store_true", help="print the trials, and why some cannot run; start nothing"),
    ),
    argument("--retry", action="store_true", help="run failed trials once more"),
    argument("--overwrite", action="store_true", help="delete an earlier sweep of the same name first"),
    job=_sweep_job,
    usage="sigray sweep STUDY.yaml [KEY=VALUE ...] [--plan] [--overwrite]\n"
    "       sigray sweep --resume DIR [KEY=VALUE ...] [--retry]\n"
    "       sigray sweep --report DIR",
)
def sweep(options: Namespace, console: Console) -> int:
    """Train runs that differ in chosen keys, and compare them at equal samples seen.

    examples:
      sigray sweep tuning/studies/batch_size.yaml                 sigmoid and softmax at several batch sizes, demo data
      sigray sweep tuning/studies/batch_size.yaml --plan          the trials, and which cannot run
      sigray sweep study.yaml budget=20000 seeds=[0,1,2]          override any key of the study,
      sigray sweep study.yaml optim.lr=5e-4 cluster.address=auto  and any other key of its run
      sigray sweep study.yaml scale=full data.shards=s3://bucket/tars/
      sigray sweep --resume sweeps/batch_size                     continue; the same command as before does too
      sigray sweep --report sweeps/batch_size                     write report.html and the figures again

    A study is a YAML:
      base: ../../examples/emoji_cpu.yaml      the run that is varied
      metric: zero_shot.held_out_designer.top1 figure that ranks the trials; higher is better
      budget: 51200                            samples that each trial sees, whatever its batch size
      rungs: [12800, 25600]                    also evaluate here; a scheduler may stop a trial here
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

    A trial is a whole `sigray train` in DIR/trials. Trials with the same data order share their data-shard workers. As
    many trials run at once as the cluster has resources for. DIR has results.jsonl (always current), trials.csv,
    report.html, figures/ and best.yaml: `sigray train DIR/best.yaml`.

    Exit codes: 0 done, and the table lists failed and infeasible trials; 1 no trial has a result; 2 the study cannot be
    used; 130 interrupted (`sigray sweep --resume DIR` continues).
    """
    from sigray.tuning.study import load_study, read_study

    given = options.resume or options.report
    words = options.overrides
    has_study = bool(words) and "=" not in words[0]
    if given and has_study:
        raise ConfigError(f"{words[0]}: --resume and --report take the study from their folder")
    if not given and not has_study:
        raise ConfigError("give a study, as tuning/studies/batch_size.yaml, or --resume DIR; `sigray sweep --help`")
    study = read_study(given, words) if given else load_study(words[0], words[1:])
    from sigray.tuning.live import results_table
    from sigray.tuning.sweep import plan, sweep
    from sigray.tuning.table import read_table

    if options.plan:
        console.print(plan(study, console))
        return 0
    if options.report:
        from sigray.tuning.report import write_report
        from sigray.workers.storage import Storage

        storage = Storage(study.config.storage_uri)
        say(console, f"report: {write_report(study, storage, read_table(storage))}")
        return 0
    result = sweep(study, console, overwrite=options.overwrite, retry=options.retry)
    table = result.table
    console.print(results_table(table, study))
    from sigray.tuning.report import best_yaml, headline

    say(console, headline(study, table).replace("\u00a0", " "))
    if not best_yaml(study, table):
        os.environ.pop(RESULT, None)  # the last line of a job names best.yaml
    counts = ", ".join(f"{count} {status}" for status, count in table.counts().items())
    say(console, f"trials: {counts}; {table.samples_spent:,} samples seen\nreport: {study.config.folder}/report.html")
    if result.status == "stopped":
        say(console, f"continue with: sigray sweep --resume {study.config.storage_uri}")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
