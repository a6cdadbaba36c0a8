"""`sigray eval` and `sigray export`."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from sigray.orchestrator.cli.command import OVERRIDES, argument, command, local, say
from sigray.orchestrator.cluster.job_files import is_shared
from sigray.orchestrator.cluster.jobs import Job, can_read, place_job
from sigray.orchestrator.config import ConfigError, RunConfig, override
from sigray.workers.urls import URL

CHECKPOINT = argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="a run, or RUN/checkpoints/step-...")


def _evaluate_job(options: Namespace) -> Job:
    job = place_job("eval", options.checkpoint, "run", options.overrides)
    if can_read(job.storage):
        _evaluated(options)
    return replace(job, name=f"{job.name}-eval", result=["fetch", f"{job.storage}/evaluations"])


@command(CHECKPOINT, OVERRIDES, name="eval", job=_evaluate_job)
def evaluate(options: Namespace, console: Console) -> None:
    """Evaluate a checkpoint: zero-shot and retrieval, beside chance.

    examples:
      sigray eval runs/emoji_cpu                                    the newest checkpoint
      sigray eval runs/emoji_cpu/checkpoints/step-0000000400        another checkpoint
      sigray eval runs/a eval.sets.mine.shards=tars/test            a set that the run does not have
    """
    run, config, checkpoint = _evaluated(options)
    from sigray.orchestrator.run.driver import evaluate
    from sigray.orchestrator.run.progress import figures_table

    say(console, f"checkpoint {checkpoint.name} of {run}")
    console.print(figures_table(evaluate(config, checkpoint, console)))


def _evaluated(options: Namespace) -> tuple[str, RunConfig, Any]:
    """Return the run, the config of its evaluation, and the checkpoint."""
    run, saved, checkpoint = _find_checkpoint(options.checkpoint)
    config = override(saved, options.overrides, run)
    if not config.eval.sets:
        raise ConfigError(f"{run} has no eval.sets: add one by eval.sets.NAME.shards=PATTERN")
    return run, config, checkpoint


def _export_job(options: Namespace) -> Job:
    from sigray.orchestrator.run.export import check_decoder

    run = options.checkpoint.rstrip("/").partition("/checkpoints/")[0]
    out = options.out or f"{run}/export/{options.format}"
    flags = ["--format", options.format, "--out", out, *(["--overwrite"] if options.overwrite else [])]
    flags += ["--weights", options.weights] if options.weights else []
    flags += ["--with-decoder"] if options.with_decoder else []
    check_decoder(options.format, with_decoder=options.with_decoder)
    job = place_job("export", options.checkpoint, "run", flags=flags)
    if not is_shared(out):
        raise ConfigError(f"--out {out} is a folder of this machine: give {URL}, or leave it out for {run}")
    if can_read(job.storage):
        _find_checkpoint(options.checkpoint)
    return replace(job, name=f"{job.name}-export", storage=out, result=["fetch", out])


@command(
    CHECKPOINT,
    argument("--format", choices=["open_clip", "transformers", "safetensors", "onnx"], default="open_clip"),
    argument(
        "--weights", choices=["ema", "last"], help="with train.ema: the average, the default, or the last weights"
    ),
    argument("--with-decoder", action="store_true", help="keep the captioning decoder: with --format safetensors"),
    argument("--out", metavar="DIR", help="new folder, or its URL in a store (default RUN_DIR/NAME/export/FORMAT)"),
    argument("--overwrite", action="store_true", help="delete an earlier export first"),
    job=_export_job,
)
def export(options: Namespace, console: Console) -> None:
    """Write a checkpoint for open_clip, transformers or onnxruntime.

    examples:
      sigray export runs/emoji_cpu                                  the newest checkpoint, for open_clip
      sigray export runs/my_siglip --format transformers            for AutoModel and pipeline()
      sigray export runs/emoji_cpu --format onnx --out emoji_onnx   both towers, for onnxruntime
      sigray export s3://bucket/runs/a --format safetensors --out s3://bucket/models/a
      sigray export runs/emoji_cpu/checkpoints/step-0000000400      another checkpoint

    sigray loads an export again with plain open_clip or transformers and compares the features. Each folder has a
    model card, README.md: how to load the model, data, recipe, results.
    """
    run, config, checkpoint = _find_checkpoint(options.checkpoint)
    from sigray.orchestrator.run.export import export_run

    place, remarks = export_run(
        config,
        checkpoint,
        options.format,
        options.out,
        weights=options.weights,
        with_decoder=options.with_decoder,
        overwrite=options.overwrite,
    )
    say(console, f"checkpoint {checkpoint.name} of {run}", *remarks, f"exported: {place}")


@command(
    argument("place", metavar="PLACE", help="a folder in a storage, as s3://bucket/prefix"),
    argument("folder", nargs="?", type=local, metavar="DIR", help="default the last part of PLACE, here"),
)
def fetch(options: Namespace, console: Console) -> None:
    """Copy a folder of a storage to this machine: an export, a profile, evaluations.

    examples:
      sigray fetch s3://bucket/runs/a/export/open_clip
      sigray fetch s3://bucket/models/a a_model
    """
    from sigray.workers.storage import Storage

    storage = Storage(options.place)
    folder = options.folder or Path(storage.uri.rpartition("/")[2])
    names = storage.walk()
    if not names:
        raise ConfigError(f"{storage.uri} holds no files")
    if folder.exists():
        raise ConfigError(f"{folder} exists: give another DIR")
    for name in names:
        if ".." in Path(name).parts:  # an object of S3 may have any name
            raise ConfigError(f"{storage.uri}: {name} would lead out of {folder}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        storage.download(name, folder / name)
    say(console, f"{len(names):,} files: {folder}")


def _find_checkpoint(place: str) -> tuple[str, RunConfig, Any]:
    """Return the run, its config, and the checkpoint that RUN_OR_CHECKPOINT names."""
    from sigray.orchestrator.run_folder import read_run
    from sigray.workers.checkpoint.index import CheckpointError, list_checkpoints, read_info
    from sigray.workers.storage import Storage

    run, _, name = place.rstrip("/").partition("/checkpoints/")
    config = read_run(run)
    checkpoints = [read_info(Storage(run), name)] if name else list_checkpoints(Storage(run))
    if not checkpoints:
        raise CheckpointError(f"{run} has no checkpoint yet")
    return run, config, checkpoints[-1]
