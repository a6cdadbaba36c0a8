"""The charts of a run's page: SVG in the page's own colours, each with a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from sigray.orchestrator import formatting as words
from sigray.orchestrator.reports import drawing
from sigray.orchestrator.reports.run_files import RunFiles, find_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MIN_RATE = 1e-6  # pairs per second; less would overflow
_TERMS = ("contrastive loss", "caption loss", "local loss", "masked loss")
_MAX_POINTS = 1000  # of a curve; a longer one keeps the lowest and highest point of each stretch


def charts(run: RunFiles) -> list[dict[str, Any]]:
    """Return the charts for which the run has data."""
    found = []
    times, waited_s = training_times(run.metrics)
    panels = partial(_panels, times, [samples for samples, _ in run.phases])

    def add(title: str, caption: str, svg: Any) -> None:
        found.append({"title": title, "caption": caption, "svg": svg})

    if loss := curve(run.metrics, "train/loss"):
        is_log = drawing.spans_decades([value for _, value in loss])
        caption = _from_to("Loss per image, lower is better", loss)
        caption += " Above: time in training, without pauses for checkpoints and restarts." if times else ""
        caption += " Dotted: a phase begins." if run.phases else ""
        terms = [(name, points) for name in _TERMS if (points := curve(run.metrics, f"train/{name.replace(' ', '_')}"))]
        caption += " Below: its terms, without their weights." if terms else ""
        add("Loss", caption, panels(("loss per image", loss), *terms, is_log=is_log and not terms))
    for name in run.zero_shot:
        if chart := _zero_shot(run, name):
            add(f"Zero-shot: {name}", *chart)
    scale, bias = curve(run.metrics, "train/logit_scale"), curve(run.metrics, "train/logit_bias")
    if scale and bias:
        first = _from_to(f"A logit is scale {words.TIMES} cosine + bias. Scale", scale)
        caption = f"{first[:-1]}; {_from_to('bias', bias)}"
        add("Logit scale and bias", caption, panels(("scale", scale), ("bias", bias)))
    if norm := curve(run.metrics, "train/grad_norm"):
        is_log = drawing.spans_decades([value for _, value in norm])
        caption = f"Of all gradients, before clipping. Median {words.decimal(median(value for _, value in norm))}, "
        caption += f"highest {words.decimal(max(value for _, value in norm))}."
        add("Gradient norm", caption, panels(("gradient norm", norm), is_log=is_log))
    if lr := curve(run.metrics, "train/learning_rate"):
        samples, top = max(lr, key=lambda point: point[1])
        caption = f"Highest after {words.count(samples)} pairs: {words.decimal(top)}."
        add("Learning rate", caption, panels(("learning rate", lr), from_zero=True))
    rate, wait = curve(run.metrics, "throughput/samples_per_s"), curve(run.metrics, "data/wait_pct")
    if rate and wait:
        caption = f"Median {words.count(median(value for _, value in rate))} pairs per second."
        if times:
            share = words.percent(waited_s / times[-1][1])
            caption += f" Training waited for data {share} of {words.duration(times[-1][1])} in all."
        add("Throughput", caption, panels(("pairs/s", rate), ("data wait, %", wait), from_zero=True))
    return found


def _panels(
    times: drawing.Points,
    borders: list[int],
    *panels: tuple[str, drawing.Points],
    from_zero: bool = False,
    is_log: bool = False,
) -> Any:
    """Draw curves with their labels, one below the other.

    Args:
        times: of the axis of time, above.
        borders: samples at which phases begin.
    """

    def draw(figure: Figure) -> None:
        column = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, (label, points), color in zip(column, panels, drawing.SERIES, strict=False):
            drawing.plot(axes, points, color)
            axes.set_ylabel(label)
            for samples in (place for place in borders if place <= points[-1][0]):
                axes.axvline(samples, color=drawing.INK, linewidth=0.8, linestyle=(0, (1, 2)))
            if from_zero:
                axes.set_ylim(bottom=0, top=1.15 * max(value for _, value in points) or 1)
            if is_log:
                drawing.log_axis(axes)
        drawing.samples_axis(column[-1])
        drawing.time_axis(column[0], times)

    return drawing.svg(draw)


def _zero_shot(run: RunFiles, name: str) -> tuple[str, Any] | None:
    curves = {k: curve(run.evaluations, "zero_shot", name, f"top{k}") for k in guesses(run.zero_shot[name])}
    curves = {k: points for k, points in curves.items() if points}
    if not curves:
        return None
    baseline = run.baseline(name)

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import LogLocator

        axes = figure.subplots()
        levels = [value for points in curves.values() for _, value in points]
        for (k, points), color, marker in zip(curves.items(), (drawing.FIRST, drawing.SECOND), "os", strict=False):
            drawing.plot(axes, points, color, marker=marker, label=f"top-{k}")
            if chance := find_number(run.zero_shot, name, f"chance{k}"):
                levels.append(chance)
                axes.axhline(chance, color=color, linewidth=1.2, linestyle=(0, (4, 3)), label=f"chance top-{k}")
        if baseline:
            levels.append(baseline)
            axes.axhline(baseline, color=drawing.INK, linewidth=1.2, linestyle=(0, (1, 2)), label="pixel neighbour")
        positive = [level for level in levels if level > 0]
        if drawing.spans_decades(positive):
            # A log axis cannot show a rate of 0: its line comes from below the frame.
            low = min(positive) / 2
            high = min(1.0, max(positive) * 2)
            axes.set_yscale("log", nonpositive="clip", subs=[])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if high / low < 1000 else (1,)))
            axes.set_ylim(low, high)
        else:
            axes.set_ylim(0, min(1.0, max(positive, default=1.0) * 1.1))
        drawing.rate_axis(axes, "images with the right name")
        drawing.samples_axis(axes)
        num_columns = 3 if baseline else 2
        figure.legend(loc="upper center", ncols=num_columns, frameon=False, handlelength=1.6, columnspacing=1.2)
        figure.subplots_adjust(top=0.83)

    parts = [f"top-{k} {words.percent(points[-1][1])}" for k, points in curves.items()]
    count = "the only evaluation so far" if max(map(len, curves.values())) == 1 else "the newest evaluation"
    lines = "dashed: chance" + ("; dotted: the pixel nearest neighbour at top-1" if baseline else "")
    return f"{', '.join(parts)} at {count}; {lines}.".capitalize(), drawing.svg(draw)


def guesses(figures: Any) -> tuple[int, ...]:
    """Return the numbers of guesses to show: 1 and 5.

    Five guesses among at most five names are always right and say nothing.
    """
    return (1,) if find_number(figures, "chance5") == 1 else (1, 5)


def language_bars(bars: list[tuple[str, float, float]]) -> Any:
    """Draw a bar for each (language, rate, chance), the highest first."""
    ordered = sorted(bars, key=lambda bar: -bar[1])

    def draw(figure: Figure) -> None:
        figure.set_size_inches(8.6, 2.9)
        axes = figure.subplots()
        places = range(len(ordered))
        axes.bar(places, [rate for _, rate, _ in ordered], color=drawing.FIRST, width=0.7)
        axes.plot(places, [chance for _, _, chance in ordered], color=drawing.SECOND, linewidth=1.2, label="chance")
        axes.set_xticks(places, [language for language, *_ in ordered], fontsize=8)
        axes.set_xlim(-0.6, len(ordered) - 0.4)
        drawing.rate_axis(axes, "image to text R@1")
        axes.legend(frameon=False, loc="upper right")
        figure.subplots_adjust(left=0.09)

    return drawing.svg(draw)


def curve(lines: Iterable[dict[str, Any]], *keys: str) -> drawing.Points:
    """Return (samples seen, value) of each line that has both.

    A long curve keeps its first and last point and the extremes in between.
    """
    pairs = [(find_number(line, "samples_seen"), find_number(line, *keys)) for line in lines]
    points = [(samples, value) for samples, value in pairs if samples is not None and value is not None]
    if len(points) <= _MAX_POINTS:
        return points
    stretch = -(-2 * len(points) // _MAX_POINTS)
    kept = {points[0], points[-1]}
    for begin in range(0, len(points), stretch):
        part = points[begin : begin + stretch]
        kept |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return sorted(kept)


def training_times(lines: Iterable[dict[str, Any]]) -> tuple[drawing.Points, float]:
    """Return (samples seen, seconds of training) by line, and seconds without data.

    A line gives the speed since the line before it; pauses for checkpoints and restarts do not count.
    """
    waited_s = 0.0
    points = [(0.0, 0.0)]
    for line in lines:
        samples, rate = (find_number(line, key) for key in ("samples_seen", "throughput/samples_per_s"))
        if samples is not None and rate is not None and rate > _MIN_RATE and samples > points[-1][0]:
            seconds = (samples - points[-1][0]) / rate
            points.append((samples, points[-1][1] + seconds))
            waited_s += seconds * (find_number(line, "data/wait_pct") or 0) / 100
    return points if len(points) > 1 else [], waited_s


def _from_to(what: str, points: drawing.Points) -> str:
    samples, value = points[0]
    first = f"{words.decimal(value)} after {words.count(samples)} pairs"
    if len(points) == 1:
        return f"{what}: {first}, the only line of metrics."
    return f"{what}: from {first} to {words.decimal(points[-1][1])}."
