"""`sigray train`, `sigray resume`, `sigray track` and `sigray embed`."""

from argparse import Namespace
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from sigray.orchestrator.cli.command import CONFIG, OVERRIDES, RUN, argument, command, say
from sigray.orchestrator.cluster.jobs import Job, can_read, config_job, place_job
from sigray.orchestrator.config import ConfigError, RunConfig, check_resume, load_config, override
from sigray.orchestrator.formatting import format_duration

if TYPE_CHECKING:
    from sigray.orchestrator.run.result import TrainResult

_TRACK_S = 24 * 3600.0  # for which `sigray track` waits


def _train_job(options: Namespace) -> Job:
    return config_job("train", options, ["--overwrite"] if options.overwrite else [])[0]


@command(
    CONFIG,
    OVERRIDES,
    argument("--overwrite", action="store_true", help="delete an earlier run of the same name first"),
    job=_train_job,
)
def train(options: Namespace, console: Console) -> int:
    """Start a run from a YAML file, or continue it.

    examples:
      sigray train examples/emoji_cpu.yaml
      sigray train my_run.yaml optim.lr=5e-4 run.name=b             override any key of the YAML
      sigray train my_run.yaml cluster.address=auto                 on a running Ray cluster
      sigray train s3://bucket/sweeps/a/best.yaml                   the best configuration of a sweep

    If the run exists, the command continues it from its newest checkpoint. Ctrl-C writes a checkpoint and ends the run.
    docs/config.md explains each key.
    """
    config = load_config(options.config, options.overrides)
    from sigray.orchestrator.run.driver import train

    return _finish(train(config, console, overwrite=options.overwrite), config, console)


def _resume_job(options: Namespace) -> Job:
    job = place_job("resume", options.run_folder, "run", options.overrides)
    if not can_read(job.storage):
        return job
    run = _resumed(options).run
    return replace(job, home="run.dir" if run.storage else "", trackers=run.trackers)


@command(RUN, OVERRIDES, job=_resume_job)
def resume(options: Namespace, console: Console) -> int:
    """Continue a run from its newest checkpoint.

    examples:
      sigray resume runs/emoji_cpu
      sigray resume s3://bucket/runs/a cluster.num_workers=4        docs/operations.md lists what may change
    """
    config = _resumed(options)
    from sigray.orchestrator.run.driver import train

    return _finish(train(config, console, resume=True), config, console)


@command(RUN)
def track(options: Namespace, console: Console) -> int:
    """Send the trackers of a run what they lack.

    examples:
      sigray track runs/emoji_cpu                                   after a tracker was away at the end of the run
      WANDB_MODE=online sigray track runs/emoji_cpu

    Takes the local folder of a run, and the variables of its trackers (docs/trackers.md). What a tracker has is not
    sent again. Ctrl-C ends the command, and the next one goes on.

    Exit codes: 0 the trackers have everything; 1 they lack something.
    """
    from sigray.orchestrator.run.tracker_process import TrackerProcess, check_trackers
    from sigray.orchestrator.run_folder import METRICS, RunFolder, read_run

    config = read_run(options.run_folder)
    folder = RunFolder(config)
    if not (folder.path / METRICS).exists():
        raise ConfigError(
            f"{folder.path} has no {METRICS}: give the local folder of a run, on the host that trained it"
        )
    check_trackers(config.run.trackers)
    process = TrackerProcess(
        folder, config.run.trackers, lambda text: say(console, text), name=config.run.name, finish_s=_TRACK_S
    )
    return 0 if process.finish() else 1


def _resumed(options: Namespace) -> RunConfig:
    """Return the config to continue a run with."""
    from sigray.orchestrator.run_folder import read_run

    saved = read_run(options.run_folder)
    config = override(saved, options.overrides, options.run_folder)
    check_resume(saved, config)
    return config


def _embed_job(options: Namespace) -> Job:
    job, config = config_job("embed", options, has_run=False)
    store = config.embeddings.store
    if store is None:
        raise ConfigError(f"{options.config}: embeddings.store is not set: set embeddings.store=s3://bucket/embeddings")
    result = ["submit", "--", "train", options.config, *options.overrides]
    return replace(job, name=f"{job.name}-embed", page="/", storage=store, result=result)


@command(CONFIG, OVERRIDES, job=_embed_job)
def embed(options: Namespace, console: Console) -> None:
    """Compute a locked image tower's embeddings once, into a store.

    examples:
      sigray embed examples/emoji_siglit.yaml                       once
      sigray train examples/emoji_siglit.yaml                       any number of times
      sigray embed run.yaml embeddings.store=s3://bucket/embeddings cluster.num_workers=8

    Runs the locked image tower once over the shards of data.shards and eval.sets, with cluster.num_workers workers of
    cluster.accelerator. Writes one tar of embeddings, captions and classes for each tar of images (docs/data.md). After
    an interruption, or with more data, the same command embeds what is missing. It refuses a store that another tower
    or another preprocessing has made.
    """
    config = load_config(options.config, options.overrides)
    from sigray.orchestrator.run.embed import embed

    say(console, embed(config, console))


def _finish(result: "TrainResult", config: RunConfig, console: Console) -> int:
    from sigray.orchestrator.run.progress import figures_table

    if result.zero_shot or result.retrieval:
        console.print(figures_table(result.summary))
    is_begun = bool(result.summary)
    say(
        console,
        f"{result.status} at {result.samples_seen:,} samples after {format_duration(result.total_s)}, "
        f"{format_duration(result.train_s)} of it training",
        *([f"report: {config.folder / 'report.html'}"] if is_begun else []),
    )
    if result.status == "stopped":
        say(
            console, f"continue with: sigray resume {config.storage_uri}" if is_begun else "continue with: this command"
        )
        return 130
    return 0
