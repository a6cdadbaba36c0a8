"""A sweep's progress on the console: a live table on a terminal, lines otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from sigray.orchestrator.run.progress import Display
from sigray.tuning.study import Study
from sigray.tuning.table import Table

_MAX_ROWS = 40  # on a terminal


def words(values: dict[str, Any]) -> str:
    """Values by the last part of their keys: {'optim.lr': 0.001} -> 'lr=0.001'."""
    return " ".join(f"{name.rpartition('.')[2]}={value_text(value)}" for name, value in values.items())


def value_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class LiveTable:
    """Show the table of a sweep while it fills."""

    def __init__(self, display: Display, study: Study) -> None:
        self._display, self._study = display, study
        self._live: Live | None = None
        self._printed: dict[int, tuple[int, str]] = {}  # number of decisions and status of each trial

    def start(self, table: Table, at_once: int, num_streams: int) -> None:
        """Print the plan of the sweep and start the live table."""
        config = self._study.config
        rungs = " and ".join(
            ", ".join(f"{rung:,}" for rung in config.rungs_of(budget)) + " samples" for budget in config.budgets
        )
        over = sum(row.is_over for row in table.rows.values())
        self._display.say(
            f"sweep    {config.folder}\n"
            f"trials   {len(table.rows)}{' so far' if config.search.name == 'optuna' else ''}, {over} of them over; "
            f"{at_once} at once\n"
            f"rungs    {rungs}; scheduler {config.scheduler.name}\n"
            f"metric   {config.metric}\n"
            f"streams  {num_streams}, each read by the trials that have the same data and seed\n"
            f"output   {config.folder / 'trials'}/trial-*.log"
        )
        self._printed = {number: (len(row.decided), row.status) for number, row in table.rows.items()}
        if self._display.console.is_terminal:
            self._live = Live(console=self._display.console, refresh_per_second=2, transient=True)
            self._live.start()

    def show(self, table: Table, lines: dict[int, dict[str, float]], running: Iterable[int]) -> None:
        """Print what is new in the table, and redraw the live table."""
        for number, row in table.rows.items():
            num_decided, status = self._printed.get(number, (0, ""))
            self._printed[number] = (len(row.decided), row.status)
            name = f"trial {number} ({words(row.values)}, seed {row.seed})"
            for result in row.decided[num_decided:]:
                word = {"go on": "goes on", "stop": "stops"}[str(result.answer)]
                why = f": {result.why}" if result.why else ""
                self._display.say(f"{name} at {result.samples_seen:,} samples: {result.value:.2%}, {word}{why}")
            if row.status == "failed" and status != "failed":
                self._display.say(f"{name} failed, the sweep goes on: {row.error}")
        if self._live is not None:
            self._live.update(results_table(table, self._study, lines, running))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def results_table(
    table: Table, study: Study, lines: dict[int, dict[str, float]] | None = None, running: Iterable[int] = ()
) -> RichTable:
    """A table of all trials; if there are too many, of the running and the best ones."""
    running, lines = set(running), lines or {}
    names = list(study.config.space)
    shown = RichTable(box=None, padding=(0, 2, 0, 0), header_style="bold")
    shown.add_column("trial", justify="right")
    for name in names:
        shown.add_column(name.rpartition(".")[2], justify="right")
    has_seeds, has_budgets = len(study.config.seeds) > 1, len(study.config.budgets) > 1
    optional = ["seed"] * has_seeds + ["budget"] * has_budgets
    for column in (*optional, "status", "samples", "figure", "loss", "samples/s"):
        shown.add_column(column, justify="left" if column == "status" else "right")
    rows = list(table.rows.values())
    if len(rows) > _MAX_ROWS:
        best = sorted(rows, key=lambda row: -(row.results[-1].value if row.results else 0))
        first = [row for row in rows if row.number in running]
        rows = (first + [row for row in best if row not in first])[:_MAX_ROWS]
    for row in rows:
        line = lines.get(row.number, {}) if row.number in running else {}
        status = "running" if row.number in running and not row.is_over else row.status
        seen = max(line.get("samples_seen", 0), row.samples_seen)
        cells = [str(row.number), *(value_text(row.values.get(name, "")) for name in names)]
        cells += [str(row.seed)] * has_seeds + [f"{row.budget:,}"] * has_budgets
        cells += [status, f"{seen:,.0f}" if seen else ""]
        cells.append(f"{row.results[-1].value:.2%}" if row.results else "")
        cells.append(f"{line['train/loss']:.4f}" if "train/loss" in line else "")
        cells.append(f"{line['throughput/samples_per_s']:,.0f}" if line else "")
        style = {"failed": "red", "infeasible": "red", "stopped": "dim", "running": "bold"}.get(status, "")
        shown.add_row(*(Text(cell) for cell in cells), style=style)
    return shown
