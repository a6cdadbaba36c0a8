"""`sigray eval` and `sigray export`."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.console import Console

from sigray.orchestrator.cli.command import OVERRIDES, argument, command, say
from sigray.orchestrator.config import ConfigError, RunConfig, override

CHECKPOINT = argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="a run, or RUN/checkpoints/step-...")


@command(CHECKPOINT, OVERRIDES, name="eval")
def evaluate(options: Namespace, console: Console) -> None:
    """Evaluate a checkpoint: zero-shot and retrieval, beside chance.

    examples:
      sigray eval runs/emoji_cpu                                    the newest checkpoint
      sigray eval runs/emoji_cpu/checkpoints/step-0000000400        another checkpoint
      sigray eval runs/a eval.sets.mine.shards=tars/test            a set that the run does not have
    """
    run, saved, checkpoint = _find_checkpoint(options.checkpoint)
    config = override(saved, options.overrides, run)
    if not config.eval.sets:
        raise ConfigError(f"{run} has no eval.sets: add one by eval.sets.NAME.shards=PATTERN")
    from sigray.orchestrator.run.driver import evaluate
    from sigray.orchestrator.run.progress import figures_table

    say(console, f"checkpoint {checkpoint.name} of {run}")
    console.print(figures_table(evaluate(config, checkpoint, console)))


@command(
    CHECKPOINT,
    argument("--format", choices=["open_clip", "safetensors", "onnx"], default="open_clip"),
    argument("--out", type=Path, metavar="DIR", help="new folder (default RUN_DIR/NAME/export/FORMAT)"),
    argument("--overwrite", action="store_true", help="delete an earlier export first"),
)
def export(options: Namespace, console: Console) -> None:
    """Write a checkpoint for open_clip or onnxruntime, with a model card.

    examples:
      sigray export runs/emoji_cpu                                  the newest checkpoint, for open_clip
      sigray export runs/emoji_cpu --format onnx --out emoji_onnx   both towers, for onnxruntime
      sigray export s3://bucket/runs/a --format safetensors --out a
      sigray export runs/emoji_cpu/checkpoints/step-0000000400      another checkpoint

    sigray loads an open_clip export again with plain open_clip and compares the features. Each folder has a model card,
    README.md: how to load the model, data, recipe, results.
    """
    run, config, checkpoint = _find_checkpoint(options.checkpoint)
    from sigray.orchestrator.run.export import export_run

    path, remarks = export_run(config, checkpoint, options.format, options.out, overwrite=options.overwrite)
    say(console, f"checkpoint {checkpoint.name} of {run}", *remarks, f"exported: {path}")


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
