"""Whether a disturbed run ended as the undisturbed one: weights, losses, ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sigray.orchestrator.config import RunConfig
from sigray.orchestrator.data.audit import audit_run
from sigray.orchestrator.run_folder import RunFolder
from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.data.tar import DataError

FILE = "chaos.json"
TOLERANCE = 1e-3
"""Relative difference of the last losses of a run that need not repeat its bits."""


@dataclass(frozen=True)
class Outcome:
    """The results that a run left in its folder."""

    step: int  # of its newest checkpoint
    files: dict[str, dict[str, Any]]  # of that checkpoint: name -> bytes, xxh3_128
    losses: list[tuple[int, float]]  # step and loss, as metrics.jsonl has them


def read_outcome(config: RunConfig) -> Outcome:
    folder = RunFolder(config)
    checkpoints = list_checkpoints(folder.storage)
    losses = [(int(line["step"]), line["train/loss"]) for line in folder.metrics()]
    return Outcome(checkpoints[-1].step, checkpoints[-1].files, losses) if checkpoints else Outcome(0, {}, losses)


def audit_differences(config: RunConfig) -> list[str]:
    """Return what is wrong with a run's ledger; empty if it is exact."""
    try:
        found = audit_run(config)
    except DataError as error:
        return [str(error)]
    return [] if found.audit.is_exact else [found.verdict]


def rounding(config: RunConfig) -> str:
    """Return why the two runs need not agree bit for bit; empty if they must."""
    if config.cluster.accelerator == "cuda":
        return "cluster.accelerator=cuda sums in any order"
    least, most = config.cluster.worker_range
    if least != most:
        return f"cluster.num_workers=[{least}, {most}] sums in another order after a resize"
    return ""


def differences(undisturbed: Outcome, disturbed: Outcome, *, is_exact: bool) -> list[str]:
    """Return the differences of the disturbed run, the most serious first.

    Args:
        is_exact: compare bits; else the last losses, to `TOLERANCE`.
    """
    found = []
    if undisturbed.step != disturbed.step:
        found.append(f"the last checkpoint is of step {disturbed.step:,}, undisturbed {undisturbed.step:,}")
    elif is_exact:
        changed = [name for name, expected in undisturbed.files.items() if disturbed.files.get(name) != expected]
        found += [f"{name} of step {disturbed.step:,} has other bytes" for name in changed]
    expected_losses, losses = dict(undisturbed.losses), dict(disturbed.losses)
    counts = Counter(step for step, _ in disturbed.losses)
    found += [f"step {step:,} is logged {count} times" for step, count in counts.items() if count > 1]
    found += [f"step {step:,} is not logged" for step in expected_losses if step not in losses]
    found += [f"step {step:,} is logged, but not undisturbed" for step in losses if step not in expected_losses]
    compared = sorted(expected_losses.keys() & losses.keys())
    for step in compared if is_exact else compared[-1:]:
        now, before = losses[step], expected_losses[step]
        if now != before and (is_exact or not abs(now - before) <= TOLERANCE * abs(before)):
            found.append(f"the loss of step {step:,} is {now!r}, undisturbed {before!r}")
    return found


def verdict(found: Sequence[str], num_losses: int, why_rounding: str) -> str:
    """Return one sentence for a list of differences."""
    if found:
        more = f" (and {len(found) - 1:,} more, see {FILE})" if len(found) > 1 else ""
        return f"different: {found[0]}{more}"
    if why_rounding:
        return (
            f"alike: the last losses agree to {TOLERANCE:g}, {num_losses:,} losses logged once each; ledger exact. "
            f"Weights may differ in rounding: {why_rounding}"
        )
    return f"identical: weights, optimizer and {num_losses:,} losses; ledger exact"
