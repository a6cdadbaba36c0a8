"""The report of a sweep: question, results and their uncertainty.

    read      the study and its table
    text      sentences, tables and verdicts as plain values
    draw      curves, as SVG in the page and as PNG beside it
    fill      report.html.j2, in the style of a run's page

Also written: trials.csv, figures/*.png, and best.yaml, the best configuration as a run. The file is long because text
and figures share the helpers that name and round values.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigray.orchestrator import formatting as words
from sigray.orchestrator.reports import drawing
from sigray.orchestrator.reports.foreign_folder import ForeignFolder
from sigray.orchestrator.reports.run_charts import curve
from sigray.orchestrator.reports.run_files import read_lines
from sigray.orchestrator.reports.template import page, render
from sigray.orchestrator.run_folder import REPORT
from sigray.tuning.live import value_text
from sigray.tuning.search import Search
from sigray.tuning.study import Claim, FigureConfig, Study, split_metric, trial_name
from sigray.tuning.table import Ranked, Result, Row, Table, as_csv, ranking
from sigray.tuning.verdict import Verdict, sample_variance, verdict
from sigray.workers.checkpoint.index import CheckpointError
from sigray.workers.parse import dump_yaml
from sigray.workers.storage import Storage

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

TRIALS, BEST = "trials.csv", "best.yaml"
_MIN_FOR_IMPORTANCE = 10  # configurations; with fewer the estimate is mostly chance
_MAX_LEGEND = 6
_MAX_TICKS = 7
_MAX_LOSSES = 100  # trials, the newest


def write_report(study: Study, storage: Storage, table: Table) -> Path:
    """Write report.html, figures/, trials.csv and best.yaml; copy them to the storage.

    Returns:
        The path of the page.
    """
    folder = study.config.folder
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for old in figures.glob("*.png"):
        old.unlink()
    if content := best_yaml(study, table):
        (folder / BEST).write_text(content)
    else:
        (folder / BEST).unlink(missing_ok=True)
    num_rungs = max(len(study.config.rungs_of(budget)) for budget in study.config.budgets)
    (folder / TRIALS).write_text(as_csv(table, num_rungs))
    path = folder / REPORT
    title = f"{study.config.name} ({sweep_status(study, table)})"
    losses = read_losses(table, [ForeignFolder(Storage(folder)), ForeignFolder(storage)])
    drawn = draw_sweep(study, table, figures, losses)
    path.write_text(page(title, drawn, css=sweep_css()), encoding="utf-8")
    if str(folder) != storage.uri:
        for file in [path, folder / TRIALS, folder / BEST, *figures.glob("*.png")]:
            if file.exists():
                storage.upload(file, file.relative_to(folder).as_posix())
    return path


def draw_sweep(
    study: Study,
    table: Table,
    figures: Path | None,
    losses: Mapping[int, drawing.Points],
    now: Markup | None = None,
    status: str = "",
    trials: Mapping[int, Trial] | None = None,
) -> Markup:
    """The content of the page.

    Args:
        figures: folder to write the figures into as PNG too.
        losses: of each trial, by number.
        now, status: of a live page, its current state.
        trials: of a live page, the live state of trials by number.
    """
    if trials is None:
        trials = {row.number: Trial("", row.status, row.samples_seen) for row in table.rows.values()}
    return render(
        "report.html.j2",
        package="sigray.tuning",
        now=now,
        name=study.config.name,
        status=status or sweep_status(study, table),
        question=study.config.question,
        headline=headline(study, table),
        remarks=_remarks(study, table, trials),
        claims=[_claim(study, table, claim) for claim in study.config.expect],
        blocks=[_block(study, table, figure, figures) for figure in _figures(study)],
        curves=_curves(study, table, figures, losses),
        importance=_importance(study, table, figures),
        trials=_trials(study, table, trials),
        left_out=[
            (row.number, _words(row.values), row.status, row.error)
            for row in table.rows.values()
            if row.status in ("infeasible", "failed")
        ],
        best_yaml=best_yaml(study, table),
        best_path=study.config.folder / BEST,
        study_yaml=study.config.to_yaml(),
    )


def sweep_css() -> str:
    """The style of sweeps' pages, in addition to that of all pages."""
    return importlib.resources.files("sigray.tuning").joinpath("report.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Trial:
    """The live state of a trial."""

    address: str  # of its own page; empty if it has none
    status: str
    samples_seen: int


# ------------------------------------------------------------------------------------------------- text


def sweep_status(study: Study, table: Table) -> str:
    """ "finished" or "unfinished"."""
    rows = table.rows.values()
    return "finished" if all(row.is_over for row in rows) and len(rows) == Search(study).num_trials else "unfinished"


def read_losses(table: Table, places: Sequence[ForeignFolder]) -> dict[int, drawing.Points]:
    """Return the loss curve of each trial, from the first place that has it."""
    losses: dict[int, drawing.Points] = {}
    for number in list(table.rows)[-_MAX_LOSSES:]:
        for place in places:
            with contextlib.suppress(OSError, CheckpointError):
                lines, _ = read_lines(place.below(f"trials/{trial_name(number)}"), for_list=True)
                losses.setdefault(number, curve(lines, "train/loss"))
    return {number: points for number, points in losses.items() if points}


def _with_result(table: Table) -> list[Ranked]:
    return [one for one in ranking(table.rows.values()) if one.rung >= 0]


def headline(study: Study, table: Table) -> str:
    """The best configuration, its figure and the standard error of the figure."""
    ranked = _with_result(table)
    if not ranked:
        return "No trial has reached a result."
    best = known_best(study, table)
    results = _results(ranked[0])
    many = words.counted(len(ranked), "configuration")
    begin = f"Best of {many}" if len(ranked) > 1 else "One configuration so far"
    text = (
        f"{begin if best else f'None of {many} is above chance. Highest'}: {_words(ranked[0].values) or 'the base'}, "
        f"{_with_error(study, results)} after {words.counted(results[0].samples_seen, 'pair')}."
    )
    level = sum(best is not None and one.rung == best.rung and _is_level(study, best, one) for one in ranked[1:])
    if level:
        text += (
            f" {words.counted(level, 'other')} {'is' if level == 1 else 'are'} within two standard errors of the best: "
            "this sweep does not separate them."
        )
    return text


def best_figure(study: Study, table: Table) -> str:
    """The best figure for the list, if it is above chance."""
    best = known_best(study, table)
    return f"best {_with_error(study, _results(best))}" if best else ""


def _is_level(study: Study, best: Ranked, other: Ranked) -> bool:
    """Whether chance explains the difference of two configurations."""
    variance = sum(_error(study, _results(one)) ** 2 for one in (best, other))
    return best.mean - other.mean < 2 * variance**0.5


def known_best(study: Study, table: Table) -> Ranked | None:
    """The first of the ranking, if it is more than two standard errors above chance."""
    for best in _with_result(table)[:1]:
        chance = _chance(study, best.rows)
        if not chance or best.mean > chance + 2 * _error(study, _results(best)):
            return best
    return None


def _results(one: Ranked) -> list[Result]:
    return [row.results[one.rung] for row in one.rows]


def _error(study: Study, results: Sequence[Result]) -> float:
    """Standard error of a mean: of the images, or of three or more seeds if larger."""
    count = len(results)
    images = sum(sample_variance(result, study.config.metric) for result in results) / count**2
    seeds = statistics.variance(result.value for result in results) / count if count >= 3 else 0.0
    return max(images, seeds, 0.0) ** 0.5


def _mean(results: Sequence[Result]) -> float:
    return statistics.fmean(result.value for result in results)


def _with_error(study: Study, results: Sequence[Result]) -> str:
    """'50.5 % ± 0.79'."""
    return f"{words.percent(_mean(results))}{words.NBSP}±{words.NBSP}{100 * _error(study, results):.2f}"


def _remarks(study: Study, table: Table, trials: Mapping[int, Trial]) -> list[str]:
    rows = list(table.rows.values())
    chance = _chance(study, rows)
    remark = f"The figure is {study.config.metric}" + (f"; chance is {words.percent(chance)}." if chance else ".")
    few = {1: "One seed", 2: "Two seeds"}.get(len(study.config.seeds))
    remark += " ± is the standard error of the images"
    remark += f" alone. {few}: the variation between seeds is not known." if few else ", or of the seeds if larger."
    remarks = [remark]
    whole = sum(row.budget for row in rows if row.status != "infeasible")
    spent = sum(trial.samples_seen for trial in trials.values())
    if whole:
        saved = f", {words.percent(spent / whole)} of all budgets" if spent < 0.98 * whole else ""
        counts = Counter(trial.status for trial in trials.values())
        outcomes = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        remarks.append(
            f"{words.counted(len(rows), 'trial')} ({outcomes}) saw {words.counted(spent, 'pair')} in all{saved}."
        )
    decoded, served, cpu_s = (sum(one[key] for one in table.streams) for key in ("decoded", "served", "cpu_s"))
    if decoded:
        remarks.append(
            f"Their streams decoded {words.counted(decoded, 'sample')} in {cpu_s:,.0f}{words.NBSP}s of CPU; each was "
            f"read {served / decoded:.1f} times."
        )
    return remarks


def _chance(study: Study, rows: Iterable[Row]) -> float | None:
    task, name, figure = split_metric(study.config.metric)
    key = figure.replace("top", "chance") if task == "zero_shot" else figure.replace("_r", "_chance")
    for row in rows:
        for result in row.results:
            value = result.figures.get(task, {}).get(name, {}).get(key)
            if value is not None:
                return float(value)
    return None


def _claim(study: Study, table: Table, claim: Claim) -> dict[str, str]:
    derived = [name for name, dimension in study.config.space.items() if dimension.expr is not None]
    found = verdict(claim, table.rows.values(), study.config.metric, derived)
    kind = found.answer.replace(" ", "-")
    return {"text": claim.text, "answer": found.answer, "kind": kind, "detail": _detail(found)}


def _detail(found: Verdict) -> str:
    if found.answer == "no data":
        return "No pair of trials to compare: the trials were stopped, failed, or have not run yet."
    text = f"Difference {_points(found.mean)}{words.NBSP}± {100 * found.error:.2f} (standard error)"
    text += f", from {words.counted(found.num_pairs, 'pair of trials', 'pairs of trials')}"
    if len(found.by_seed) > 1:
        text += f"; by seed {', '.join(_points(value) for value in found.by_seed)}"
    else:
        text += "; one seed only, so the error is that of the images alone"
    return text + "."


def _points(difference: float) -> str:
    """Percentage points with sign: 0.0123 -> '+1.23 points'."""
    return f"{100 * difference:+.2f}{words.NBSP}points".replace("-", "\u2212")


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{_short(name)}{words.NBSP}{value_text(value)}" for name, value in values.items())


def _short(name: str) -> str:
    """'train.global_batch_size' -> 'global batch size', 'loss.name' -> 'loss'."""
    *before, last = name.split(".")
    return (before[-1] if before and last in ("name", "kind") else last).replace("_", " ")


def _samples(count: int) -> str:
    """25000 -> '25k', 24576 -> '24,576'."""
    return words.short_count(count) if count % 1000 == 0 else words.count(count)


def _trials(study: Study, table: Table, trials: Mapping[int, Trial]) -> dict[str, Any]:
    names = list(study.config.space)
    has_seeds, has_budgets = len(study.config.seeds) > 1, len(study.config.budgets) > 1
    head = ["trial", *map(_short, names), *["seed"] * has_seeds, *["budget"] * has_budgets]
    head += ["outcome", "pairs seen", "figure"]
    best = known_best(study, table)
    best_numbers = {row.number for row in best.rows} if best else set()
    rows = []
    order = list(table.rows.values())
    order.sort(
        key=lambda row: (trials[row.number].samples_seen, row.results[-1].value if row.results else 0), reverse=True
    )
    for row in order:
        trial = trials[row.number]
        outcome = trial.status
        if row.status == "stopped":
            outcome += f": {row.results[-1].why}"
        cells = [str(row.number), *(value_text(row.values.get(name, "")) for name in names)]
        cells += [str(row.seed)] * has_seeds + [words.count(row.budget)] * has_budgets
        cells += [outcome, words.count(trial.samples_seen)]
        cells.append(words.percent(row.results[-1].value) if row.results else "")
        rows.append({"cells": cells, "is_best": row.number in best_numbers, "trial": trial})
    return {"head": head, "rows": rows}


def best_yaml(study: Study, table: Table) -> str:
    """The best configuration as a run; empty if none is above chance."""
    best = known_best(study, table)
    if best is None:
        return ""
    row = best.rows[0]
    content = study.trial_content(row.number, row.seed, row.budget, row.overrides)
    content["run"] = {"name": f"{study.config.name}_best", "seed": row.seed}
    if storage := study.base["run"]["storage"] or study.config.storage:
        content["run"]["storage"] = storage
    note = (
        f"# The best configuration of the sweep {study.config.name}: {_words(best.values)}".replace(words.NBSP, " ")
        + f"\n# {study.config.metric} {100 * best.mean:.2f} % at {row.results[best.rung].samples_seen:,} samples"
        + (f", mean of {len(best.rows)} seeds" if len(best.rows) > 1 else "")
        + "\n#\n#   sigray train best.yaml\n"
    )
    return note + dump_yaml(content)


# ------------------------------------------------------------------------------------------------- draw


def _figures(study: Study) -> list[FigureConfig]:
    """The figures of the study; if it names none, one that suits its space."""
    if study.config.figures:
        return list(study.config.figures)
    numbers = [name for name, dimension in study.config.space.items() if _is_numeric(dimension.values or [0.0])]
    others = [name for name in study.config.space if name not in numbers]
    if not numbers:
        return [FigureConfig(title="The figure", kind="table", rows=others[0], columns=next(iter(others[1:]), None))]
    few = [name for name in numbers[1:] if len(study.config.space[name].values or []) in range(2, _MAX_LEGEND + 1)]
    series = next(iter([*others, *few]), None)
    return [FigureConfig(title=f"The figure against {_short(numbers[0])}", x=numbers[0], series=series)]


def _is_numeric(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _block(study: Study, table: Table, figure: FigureConfig, figures: Path | None) -> dict[str, Any]:
    """A titled group of panels, or a table."""
    rows = [
        row
        for row in table.rows.values()
        # A trial without a dimension belongs to all its values: without noise there is no kind of noise.
        if all(row.values.get(name, value) == value for name, value in figure.where.items())
        and row.status not in ("infeasible", "failed")
    ]
    if figure.kind == "table":
        return {"title": figure.title, "tables": _tables(study, rows, figure), "panels": []}
    panels = []
    for budget in study.config.budgets:
        rungs = study.config.rungs_of(budget)
        for samples in rungs if figure.every_rung else rungs[-1:]:
            panels += _lines_panel(study, [row for row in rows if row.budget == budget], figure, samples, figures)
    return {"title": figure.title, "tables": [], "panels": panels}


def _drawn(title: str, caption: str, draw: Callable[[Figure], None], figures: Path | None, name: str) -> dict[str, Any]:
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:80]
    if figures is not None:
        drawing.png(draw, figures / f"{slug}.png")
    png = f"{figures.name}/{slug}.png" if figures is not None else None
    return {"title": title, "caption": caption, "svg": drawing.svg(draw), "png": png}


def _summary(rows: Iterable[Row], samples: int) -> list[Result]:
    """The results of the best configuration among some rows, one for each seed."""
    by_key: dict[str, list[Result]] = {}
    for row in rows:
        result = row.at(samples)
        if result is not None:
            by_key.setdefault(row.key, []).append(result)
    return max(by_key.values(), key=lambda results: (len(results), _mean(results)), default=[])


def _lines_panel(
    study: Study, rows: Sequence[Row], figure: FigureConfig, samples: int, figures: Path | None
) -> list[dict[str, Any]]:
    """The panel of a figure for rows of one budget; empty if no trial has come so far."""
    x = str(figure.x)
    series = figure.series
    labels = _distinct(row.values[series] for row in rows if series in row.values) if series else [None]
    places = sorted(_distinct(row.values[x] for row in rows if x in row.values), key=_sort_key)
    lines: dict[str, list[tuple[Any, list[Result]]]] = {}  # places and results over seeds, by label
    for label in labels:
        chosen = [row for row in rows if series is None or row.values.get(series, label) == label]
        points = [(place, _summary([row for row in chosen if row.values.get(x) == place], samples)) for place in places]
        known = [(place, results) for place, results in points if results]
        if known:
            named = f"{_short(series)} " if series and not isinstance(label, str) else ""
            lines[named + value_text(label)] = known
    if not lines:
        return []
    chance = _chance(study, rows)
    is_numeric = _is_numeric(places)
    positions = {str(place): place if is_numeric else number for number, place in enumerate(places)}
    is_log = is_numeric and min(places) > 0 and max(places) / min(places) >= 8

    def draw(drawn: Figure) -> None:
        axes = drawn.subplots()
        for number, (label, points) in enumerate(lines.items()):
            color = drawing.SERIES[number % len(drawing.SERIES)]
            at = [positions[str(place)] for place, _ in points]
            means = [_mean(results) for _, results in points]
            errors = [_error(study, results) for _, results in points]
            marker = "os^Dv*"[number % 6]
            axes.errorbar(at, means, errors, fmt=f"-{marker}", color=color, lw=1.8, ms=5, capsize=3, label=label)
        if chance:
            axes.axhline(chance, color=drawing.INK, linewidth=1.0, linestyle=(0, (4, 3)))
        if is_log:
            axes.set_xscale("log", base=2)
        step = -(-len(places) // _MAX_TICKS)
        named = places[::-step][::-1]
        # 32768 -> '32.8k', 512 -> '512'
        texts = [words.short_count(float(f"{x:.3g}")) if is_numeric and x >= 10_000 else value_text(x) for x in named]
        axes.set_xticks([positions[str(place)] for place in named], texts)
        axes.minorticks_off()
        axes.margins(x=0.1)  # the name of the last place is wider than the margin of the figure
        _rate_axis(axes, study)
        axes.set_xlabel(_short(x))
        if len(lines) > 1:
            _legend(drawn, len(lines))

    best, place, label = max(
        ((results, place, label) for label, points in lines.items() for place, results in points),
        key=lambda one: _mean(one[0]),
    )
    others = [name for name, dimension in study.config.space.items() if name not in (x, series) and not dimension.expr]
    caption = f"Highest: {_with_error(study, best)} at {_short(x)} {value_text(place)}" + (
        f", {label}." if series else "."
    )
    caption += f" Each point has the best value of {' and '.join(map(_short, others))}." if others else ""
    caption += " Bars: one standard error."
    caption += " Dashed: chance." if chance else ""
    budget = rows[0].budget
    title = f"After {_samples(samples)} pairs" + (f" of {_samples(budget)}" if samples != budget else "")
    return [_drawn(title, caption, draw, figures, f"{figure.title} {samples}")]


def _tables(study: Study, rows: Sequence[Row], figure: FigureConfig) -> list[dict[str, Any]]:
    tables = []
    down = str(figure.rows)
    across = figure.columns or ""
    for budget in study.config.budgets:
        here = [row for row in rows if row.budget == budget]
        columns = _distinct(row.values.get(across) for row in here) if across else [None]
        lines = {}
        for head in _distinct(row.values.get(down) for row in here):
            line = [row for row in here if row.values.get(down) == head]
            cells = [_summary([row for row in line if row.values.get(across) == column], budget) for column in columns]
            lines[value_text(head)] = cells
        best = max((_mean(results) for cells in lines.values() for results in cells if results), default=None)
        tables.append(
            {
                "title": f"After {_samples(budget)} pairs",
                "corner": _short(down) + (f" \\ {_short(across)}" if across else ""),
                "head": [value_text(column) for column in columns] if across else [study.config.metric],
                "rows": [
                    {"head": head, "cells": [_cell(study, one, best) for one in cells]} for head, cells in lines.items()
                ],
            }
        )
    return tables


def _cell(study: Study, results: Sequence[Result], best: float | None) -> dict[str, Any]:
    """A cell of a table: the mean over seeds, and its standard error."""
    if not results:
        return {"text": "\u2013", "spread": "", "is_best": False}
    rate, _, error = _with_error(study, results).rpartition(f"{words.NBSP}±")
    return {"text": rate, "spread": f"±{error}", "is_best": _mean(results) == best}


def _curves(
    study: Study, table: Table, figures: Path | None, losses: Mapping[int, drawing.Points]
) -> list[dict[str, Any]]:
    """Loss and figure of every trial against samples seen, with the rungs."""
    panels = []
    for budget in study.config.budgets:
        rows = [row for row in table.rows.values() if row.budget == budget]
        if any(row.number in losses for row in rows):
            panels.append(_curves_panel(study, rows, budget, figures, losses, "Loss"))
        values: dict[int, drawing.Points] = {
            row.number: [(result.samples_seen, result.value) for result in row.results] for row in rows
        }
        if any(values.values()) and len(study.config.rungs_of(budget)) > 1:
            panels.append(_curves_panel(study, rows, budget, figures, values, "Learning curves"))
    return panels


def _curves_panel(
    study: Study,
    rows: Sequence[Row],
    budget: int,
    figures: Path | None,
    curves: Mapping[int, drawing.Points],
    title: str,
) -> dict[str, Any]:
    rows = [row for row in rows if curves.get(row.number)]
    is_loss = title == "Loss"
    values_of = {name: _distinct(row.values.get(name) for row in rows) for name in study.config.space}
    # Colours show the first dimension with few enough values for a legend.
    name, labels = next((item for item in values_of.items() if 2 <= len(item[1]) <= _MAX_LEGEND), ("", [None]))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for rung in study.config.rungs_of(budget):
            axes.axvline(rung, color=drawing.RULE, linewidth=0.8)
        named = set()
        for row in rows:
            number = labels.index(row.values.get(name))
            color = drawing.SERIES[number % len(drawing.SERIES)]
            label = value_text(labels[number]) if name and number not in named else None
            named.add(number)
            seen, values = zip(*curves[row.number], strict=True)
            marker = "" if is_loss and len(seen) > 1 else "."
            axes.plot(seen, values, color=color, linewidth=1.3, alpha=0.85, marker=marker, markersize=5, label=label)
            if row.status == "stopped":
                axes.plot(seen[-1:], values[-1:], color=color, marker="x", markersize=7, linestyle="")
        if not is_loss:
            _rate_axis(axes, study)
        elif drawing.spans_decades([value for row in rows for _, value in curves[row.number]]):
            drawing.log_axis(axes)
        drawing.samples_axis(axes)
        if name:
            _legend(figure, len(labels))

    stopped = sum(row.status == "stopped" for row in rows)
    caption = words.counted(len(rows), "trial") + (f", coloured by {_short(name)}" if name else "")
    caption += f"; {stopped} stopped at a rung (crosses)" if stopped else ""
    caption += (
        ". Training loss; trials with another loss function or batch size have another scale." if is_loss else "."
    )
    caption += " Vertical lines: rungs; a trial reaches a rung at the first step at or after it."
    name_of_file = f"{'loss' if is_loss else 'curves'} {budget}"
    return _drawn(f"{title}, {_samples(budget)} pairs", caption, draw, figures, name_of_file)


def _legend(figure: Figure, count: int) -> None:
    """Put a legend of `count` entries above the axes."""
    figure.legend(loc="upper center", ncols=3, frameon=False, handlelength=1.6)
    figure.subplots_adjust(top=0.80 if count > 3 else 0.87)


def importances(study: Study, table: Table) -> dict[str, float]:
    """Importance of each dimension: PED-ANOVA (arXiv 2304.10255), by optuna.

    Computed from the means over seeds of the configurations that reached their last rung; empty if these are too few.
    """
    space = study.config.space
    names = [name for name, dimension in space.items() if dimension.expr is None]
    ended = [one for one in _with_result(table) if all(row.status == "finished" for row in one.rows)]
    complete = [one for one in ended if one.values.keys() >= set(names)]
    if len(complete) < _MIN_FOR_IMPORTANCE or len(names) < 2:
        return {}
    import optuna

    from sigray.tuning.search import Outcome, frozen_trial
    from sigray.tuning.space import Point

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    known = optuna.create_study(direction="maximize")
    for one in complete:
        row: Row = one.rows[0]
        known.add_trial(frozen_trial(space, Outcome(Point(row.values, row.overrides), [one.mean], True, True)))
    found = optuna.importance.get_param_importances(known, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    return dict(found)


def _importance(study: Study, table: Table, figures: Path | None) -> list[dict[str, Any]]:
    found = importances(study, table)
    if not found:
        return []

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names = list(found)[::-1]
        axes.barh([_short(name) for name in names], [found[name] for name in names], color=drawing.FIRST, height=0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("share")
        figure.subplots_adjust(left=0.36)

    first = next(iter(found))
    caption = (
        f"{_short(first)} matters most for a good configuration. PED-ANOVA over the configurations that reached their "
        "last rung; shares add up to one."
    )
    return [_drawn("What matters", caption, draw, figures, "importance")]


def _rate_axis(axes: Any, study: Study) -> None:
    drawing.rate_axis(axes, study.config.metric.rpartition(".")[2].replace("_", " "))
    axes.set_ylim(bottom=0)


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Distinct values in order; also of lists and mappings, which have no hash."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _sort_key(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))
