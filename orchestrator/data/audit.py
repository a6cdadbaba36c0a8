"""`sigray data audit`: whether a run used each sample of an epoch exactly once.

`workers/training/ledger.py` counts; this module adds the steps of each epoch, the verdict and the table.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from rich.console import Group
from rich.text import Text

from sigray.orchestrator.config import RunConfig
from sigray.orchestrator.run_folder import RunFolder
from sigray.orchestrator.tables import Column, add, table
from sigray.workers.data.order import StreamOrder
from sigray.workers.data.worker import build_order
from sigray.workers.training.ledger import Audit, EpochAudit, audit
from sigray.workers.training.phases import mixes_of


@dataclass
class RunAudit:
    """The audit of a run's ledger, with what the report on it needs."""

    audit: Audit
    order: StreamOrder
    datasets: list[str]
    global_batch_size: int

    def steps_of(self, epoch: EpochAudit) -> range:
        """Return the steps that contain samples of an epoch, counted from 0."""
        dataset = self.datasets.index(epoch.dataset)

        def step_after(num_samples: int) -> int:
            """Return the number of steps after which the dataset has given so many samples."""
            return bisect.bisect_left(
                range(self.audit.num_steps),
                num_samples,
                key=lambda step: self.order.num_of_dataset(dataset, step * self.global_batch_size),
            )

        first = step_after(epoch.epoch * epoch.num_samples + 1) - 1
        return range(max(first, 0), step_after((epoch.epoch + 1) * epoch.num_samples))

    @property
    def verdict(self) -> str:
        """One sentence: the ledger is exact, or what is wrong with it."""
        found, batch = self.audit, self.global_batch_size
        if found.is_exact:
            num_over = sum(epoch.is_over for epoch in found.epochs)
            once = f"; every sample of {_counted(num_over, 'complete epoch')} was used exactly once" if num_over else ""
            return f"exact: each of {_counted(found.num_steps, 'step')} has its {batch:,} pairs, none twice{once}"
        parts = []
        for name in ("missing", "doubled"):
            if count := sum(getattr(epoch, f"num_{name}") for epoch in found.epochs):
                parts.append(f"{_counted(count, 'sample')} {name}")
        if found.wrong_steps:
            parts.append(f"{_counted(len(found.wrong_steps), 'step')} without exactly {batch:,} pairs")
        return f"the ledger is not exact: {', '.join(parts)}"


def audit_run(config: RunConfig) -> RunAudit:
    """Audit the ledger of a run.

    Raises:
        DataError: if there is no ledger, or if it does not belong to the run's data.
        OSError: from the storage.
    """
    folder = RunFolder(config)
    manifest = folder.manifest()
    order = build_order(manifest, config.data, config.run.seed, mixes_of(config))
    result = audit(folder.storage, manifest, order, config.train.global_batch_size)
    return RunAudit(result, order, list(manifest.datasets()), config.train.global_batch_size)


def audit_table(run: RunAudit) -> Group:
    """Return a row per dataset and epoch, and the first missing or doubled samples.

    Epochs and steps count from 1.
    """
    names = ("epoch", "samples", "used", "missing", "doubled", "replaced", "steps")
    has_names = run.datasets != [""]  # the only dataset of a run has no name
    columns: list[Column] = [("dataset", "left")] if has_names else []
    made = table(*columns, *((name, "right") for name in names), ("", "left"))
    details: list[Text] = []
    for epoch in run.audit.epochs:
        steps = run.steps_of(epoch)
        is_wrong = epoch.num_missing or epoch.num_doubled
        state = "complete" if epoch.is_over else "under way"
        missing = f"{epoch.num_missing:,}" if epoch.is_over else "-"
        cells = [f"{epoch.epoch + 1}", f"{epoch.num_samples:,}", f"{epoch.num_used:,}", missing]
        cells += [f"{epoch.num_doubled:,}", f"{epoch.num_replaced:,}", f"{steps.start + 1:,}-{steps.stop:,}"]
        cells.append(f"{state}, not exact" if is_wrong else state)
        add(made, *([epoch.dataset] if has_names else []), *cells)
        of = f"{epoch.dataset}, epoch" if has_names else "epoch"
        for name, first in (("missing", epoch.missing), ("doubled", epoch.doubled)):
            if count := getattr(epoch, f"num_{name}"):
                details.append(Text(f"{of} {epoch.epoch + 1}, {name}:{_first(first, count)}"))
    if run.audit.left_out:
        steps_left_out = ", ".join(f"{step:,}" for step in run.audit.left_out)
        details.append(Text(f"left out after a bad loss, their pairs changed no weights: steps {steps_left_out}"))
    if run.audit.wrong_steps:
        details.append(Text(f"steps:{_first(run.audit.wrong_steps[:10], len(run.audit.wrong_steps))}"))
    return Group(made, *details)


def _first(lines: list[str], count: int) -> str:
    more = [f"and {count - len(lines):,} more"] if count > len(lines) else []
    return "".join(f"\n  {line}" for line in [*lines, *more])


def _counted(count: int, one: str) -> str:
    return f"{count:,} {one}{'' if count == 1 else 's'}"
