"""Show a run on a terminal: start-up block, progress, figures."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from sigray.orchestrator.formatting import format_duration
from sigray.workers.data.manifest import listed

_WAITING_LINE_S = 20  # between two lines while the training workers start


class Display:
    """Show a start-up block, then a live line on a terminal, else plain lines.

    Attributes:
        keep: called with each message and its kind: "note", "restart", "failure" or PENDING.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.keep: Callable[[str, str], None] = lambda text, kind: None
        self._progress: Progress | None = None
        self._bar: Any = None
        self._first: tuple[float, float] | None = None
        self._num_samples = 0
        self._next_waiting_s: float | None = 0.0  # None after the training workers have started

    def say(self, message: str, kind: str = "note") -> None:
        """Print a message and keep it."""
        self._print(message)
        self.keep(message, kind)

    def _print(self, message: str) -> None:
        self.console.print(Text(message), soft_wrap=True)  # no markup, on a console of the caller either

    def start(self, title: str, facts: dict[str, Any], data: dict[str, Any]) -> None:
        """Print the start-up block, and show progress from here on."""
        self._next_waiting_s = None
        parameters = facts["parameters_m"]
        batch = "{global_batch_size} pairs = {batch_per_worker} x {world_size} workers".format(**facts)
        if facts["micro_batch_size"] < facts["batch_per_worker"]:
            batch += f", in micro-batches of {facts['micro_batch_size']}"
        rows = {
            "run": title,
            "devices": f"{facts['world_size']} training worker(s) on {facts['device']}",
            "batch": batch,
            "model": f"{parameters['all']:.1f} M parameters ("
            + (f"image {parameters['visual']:.1f} M" if parameters["visual"] else "image embeddings from a store")
            + f", text {parameters['text']:.1f} M)",
            "decay": facts["weight_decay"],
            "average": f"half-life {facts['ema']:,} samples" if facts.get("ema") else "",
            "data": f"{data['samples']:,} pairs in {data['shards']} shards, {data['bytes'] / 1e6:,.1f} MB; "
            f"{facts['epochs']:.1f} epochs",
            "not used": listed(Counter(data.get("unusable", {}))),
            "steps": f"{facts['first_step']:,} to {facts['num_steps']:,}",
            "phases": "\n".join(
                f"{phase['number']} after step {phase['first_step']:,}: {', '.join(phase['changes'])}"
                for phase in facts.get("phases", [])
            ),
        }
        grid = Table.grid(padding=(0, 2))
        for key, value in rows.items():
            if value:
                grid.add_row(Text(key, style="bold"), Text(value))
        self.console.print(grid)
        self._num_samples = facts["num_steps"] * facts["global_batch_size"]
        self._first = None
        if self.console.is_terminal:
            self.close()
            # Time left by the rate since the start: rich's own estimate jumps at each checkpoint.
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[left]}"))
            self._progress = Progress(*columns, console=self.console)
            done = facts["first_step"] * facts["global_batch_size"]
            self._bar = self._progress.add_task("starting", total=self._num_samples, completed=done, left="")
            self._progress.start()

    def waiting(self, elapsed_s: float) -> None:
        """Say that the training workers start: a minute on a small machine."""
        if self._next_waiting_s is not None and elapsed_s >= self._next_waiting_s:
            self._print(f"starting the training workers ({format_duration(elapsed_s)})")
            self._next_waiting_s += _WAITING_LINE_S

    def metrics(self, line: dict[str, float]) -> None:
        """Show a line of metrics and the time left."""
        samples = line["samples_seen"]
        now = time.monotonic()
        if self._first is None:
            self._first = (now, samples)
        left = ""
        if samples > self._first[1]:
            rate = (samples - self._first[1]) / (now - self._first[0])
            left = f"{format_duration((self._num_samples - samples) / rate)} left"
        text = (
            f"step {line['step']:>6,.0f}  samples {samples:>9,.0f}  loss {line['train/loss']:7.4f}  "
            f"scale {line['train/logit_scale']:6.2f}  bias {line['train/logit_bias']:7.2f}  "
            f"{line['throughput/samples_per_s']:6,.0f} samples/s  data wait {line['data/wait_pct']:4.1f} %"
        )
        if self._progress is not None:
            self._progress.update(self._bar, description=text, completed=samples, left=left)
        else:
            self._print(f"{text}  {left}" if left else text)

    def evaluation(self, result: dict[str, Any]) -> None:
        """Print a line per zero-shot set of an evaluated checkpoint, and one without EMA."""
        for which, figures_of in (("", result), (", without EMA", result.get("without_ema") or {})):
            for name, figures in figures_of.get("zero_shot", {}).items():
                self._print(
                    f"  zero-shot at {result['samples_seen']:,} samples, {name}{which}: "
                    f"top-1 {figures['top1']:.1%} (chance {figures['chance1']:.2%}), "
                    f"top-5 {figures['top5']:.1%} (chance {figures['chance5']:.2%})"
                )

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def figures_table(result: dict[str, Any]) -> Group:
    """Return the figures of a summary or an evaluation beside their chance levels.

    With an average of the weights, the figures without it follow. The table fits 80 columns.
    """
    parts: list[RenderableType] = []
    for name, figures in result["zero_shot"].items():
        rows = [_figure(f"top-{k}", figures[f"top{k}"], figures[f"chance{k}"]) for k in (1, 5)]
        if "pixel_baseline_top1" in figures:
            rows[0][-1] = f"{figures['pixel_baseline_top1']:.2%}"
        parts += [Text(f"{name}: zero-shot, {figures['num_classes']:,} classes", style="bold"), _table(rows)]
    for name, figures in result["retrieval"].items():
        for title, prefix in _retrieval_titles(figures).items():
            rows = [
                _figure(
                    f"{way.replace('_', ' ')} R@{k}",
                    figures[f"{prefix}{way}_r{k}"],
                    figures[f"{prefix}{way}_chance{k}"],
                )
                for way in ("image_to_text", "text_to_image")
                for k in (1, 5, 10)
            ]
            parts += [Text(f"{name}: retrieval, {title}", style="bold"), _table(rows)]
    for name, figures in result.get("linear_probe", {}).items():
        rows = [_figure("top-1", figures["top1"], figures["chance1"])]
        parts += [Text(f"{name}: linear probe, fitted on {figures['num_fit']:,} images", style="bold"), _table(rows)]
    if without := result.get("without_ema"):
        parts += [Text("\nwithout EMA:"), figures_table(without)]
    return Group(*parts)


def _retrieval_titles(figures: dict[str, Any]) -> dict[str, str]:
    """What was counted -> prefix of its figures; merged only if captions are equal."""
    images, captions = f"{figures['num_images']:,} images", f"{figures['num_captions']:,} captions"
    num_distinct = figures.get("num_distinct_captions")
    if num_distinct is None:  # measured before sigray read all captions of an image
        return {f"{images}, equal captions merged": ""}
    titles = {f"{images}, {captions}": ""}
    return titles if num_distinct == figures["num_captions"] else titles | {"equal captions merged": "merged_"}


def _table(rows: list[list[str]]) -> Table:
    table = Table(box=None, padding=(0, 0, 0, 2))
    for column in ("", "result", "chance", "x chance", "pixel neighbour"):
        width = 20 if not column else len(column)
        table.add_column(column, justify="right" if column else "left", min_width=width, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _figure(title: str, value: float, chance: float) -> list[str]:
    return [title, f"{value:.2%}", f"{chance:.2%}", f"{value / chance:.1f}", ""]
