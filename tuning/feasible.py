"""Whether a trial can run, checked before it starts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from sigray.orchestrator.config import RunConfig, parse_config
from sigray.orchestrator.planning.plan import check_memory
from sigray.orchestrator.run.preflight import check_model_config, with_inputs
from sigray.orchestrator.run.trial import rung_step
from sigray.orchestrator.run_folder import RunFolder
from sigray.workers.config import DataConfig, EvalConfig
from sigray.workers.data.manifest import Manifest

Check = Callable[[RunConfig, Manifest, Sequence[int]], None]


def check_rungs(config: RunConfig, manifest: Manifest, rungs: Sequence[int]) -> None:
    """Refuse rungs that are closer than a step.

    Raises:
        ValueError: naming two of them.
    """
    batch = config.train.global_batch_size
    for before, after in itertools.pairwise(rungs):
        if rung_step(before, batch) == rung_step(after, batch):
            raise ValueError(
                f"the rungs at {before:,} and {after:,} samples fall on the same step of "
                f"train.global_batch_size={batch}: they must be a batch apart"
            )


@functools.cache
def _check_sets(evaluation: str, data: str, store: str | None) -> None:
    """Check held-out sets, given as JSON; trials with the same sets read them once."""
    from sigray.workers.evaluation.set_checks import check_sets

    check_sets(EvalConfig.model_validate_json(evaluation), DataConfig.model_validate_json(data), store)


def _check_batch(config: RunConfig, manifest: Manifest, rungs: Sequence[int]) -> None:
    from sigray.workers.data.worker import check_batch
    from sigray.workers.training.phases import mixes_of

    check_batch(manifest, config.data, config.run.seed, config.train.global_batch_size, mixes_of(config))


# In this order; each raises ValueError with the remedy.
CHECKS: list[Check] = [
    _check_batch,
    check_rungs,
    lambda config, manifest, rungs: _check_sets(
        config.eval.model_dump_json(), config.data.model_dump_json(), config.embeddings.store
    ),
    lambda config, manifest, rungs: check_model_config(config),
    lambda config, manifest, rungs: check_memory(config),
]


def feasible(
    content: dict[str, Any], rungs: Sequence[int], manifest_of: Callable[[RunConfig], Manifest]
) -> RunConfig | str:
    """The config of a trial, or the reason why it cannot run.

    Args:
        content: of the config, not yet checked.
        rungs: in samples seen.
        manifest_of: returns the manifest of a config's shards, cached.
    """
    try:
        config = parse_config(content, content["run"]["name"])
        folder = RunFolder(config)
        begun = folder.saved_config() if folder.is_used() else None
        config = with_inputs(config, lambda remark: None, begun)  # the trial says it
        manifest = manifest_of(config)
        for check in CHECKS:
            check(config, manifest, rungs)
    except ValueError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        return "; ".join(line for line in lines if not line.endswith("cannot be run:"))
    return config
