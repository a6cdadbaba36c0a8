"""Figures in the style of the pages, as SVG or PNG.

An SVG takes the page's colours and so follows its dark mode.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigray.orchestrator.formatting import NBSP, decimal, short_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]  # samples seen, value

# Named colours, registered with matplotlib: their values depend on the target of the figure.
INK, RULE = "sigray:ink", "sigray:rule"
SERIES = tuple(f"sigray:{name}" for name in ("first", "second", "third", "fourth", "fifth", "sixth"))
FIRST, SECOND = SERIES[:2]
_LIGHT = ("#5a6069", "#dcdad3", "#1f66b8", "#b8541a", "#1a7f4b", "#8a3f9e", "#8a6400", "#b3372f")  # as in page.css
_ON_PAPER = dict(zip((INK, RULE, *SERIES), _LIGHT, strict=True))
# In an SVG each colour is a placeholder for a variable of page.css. matplotlib omits its default, black (#000000).
_IN_SVG = {name: f"#{number:06x}" for number, name in enumerate(_ON_PAPER, start=1)}
_CSS = {color: f"var(--{name.partition(':')[2].replace('ink', 'soft')})" for name, color in _IN_SVG.items()}


def spans_decades(values: list[float]) -> bool:
    """Return whether a log axis shows more than a linear axis."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > 20


def plot(axes: Axes, points: Points, color: str, *, marker: str = "", label: str = "") -> None:
    marker = marker or ("o" if len(points) < 3 else "")
    axes.plot(*zip(*points, strict=True), color=color, linewidth=1.8, marker=marker, markersize=4, label=label or None)


def log_axis(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log", subs=[])
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if high / low < 1000 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: decimal(value)))


def rate_axis(axes: Axes, label: str) -> None:
    """Label the y axis, in percent."""
    from matplotlib.ticker import FuncFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:g} %"))
    axes.set_ylabel(label)


def samples_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda samples, _: short_count(samples)))
    axes.set_xlabel("pairs seen")


def time_axis(axes: Axes, times: Points) -> None:
    """Add an axis of time above that of samples.

    Args:
        times: (samples seen, seconds), both rising; empty: no axis.
    """
    import numpy
    from matplotlib.ticker import MaxNLocator

    if not times:
        return
    samples, seconds = zip(*times, strict=True)
    unit, size = next((one for one in (("h", 3600), ("min", 60)) if seconds[-1] >= 2 * one[1]), ("s", 1))
    ticks = [tick for tick in MaxNLocator(4).tick_values(0, seconds[-1] / size) if 0 <= tick * size <= seconds[-1]]
    top = axes.twiny()
    top.grid(visible=False)
    top.set_xlim(axes.get_xlim())
    # Between two lines of metrics the speed is constant.
    places = numpy.interp([tick * size for tick in ticks], seconds, samples)
    top.set_xticks(places, [f"{tick:g}{NBSP}{unit}" for tick in ticks])
    axes.figure.subplots_adjust(top=0.9)


def sparkline(points: Points) -> Any:
    """Return a small curve without axes as SVG; empty for fewer than two points."""
    from markupsafe import Markup

    is_log = spans_decades([value for _, value in points])
    points = [(x, math.log(y) if is_log else y) for x, y in points]
    if len(points) < 2:
        return Markup()
    (left, right), (low, high) = ((min(ends), max(ends)) for ends in zip(*points, strict=True))
    scaled = [((x - left) / (right - left or 1), (high - y) / (high - low) if high > low else 0.5) for x, y in points]
    line = " ".join(f"{2 + 116 * x:.1f},{2 + 24 * y:.1f}" for x, y in scaled)
    return Markup('<svg class="spark" viewBox="0 0 120 28" aria-hidden="true"><polyline points="{}"/></svg>').format(
        line
    )


def svg(draw: Callable[[Figure], None]) -> Any:
    """Return a figure as SVG for a page.

    Ids do not collide with those of other figures; colours come from the page's CSS.
    """
    from markupsafe import Markup

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    _draw(draw, _IN_SVG, buffer, format="svg", transparent=True, metadata=nothing)
    svg = "<svg" + buffer.getvalue().partition("<svg")[2]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it styles `*`: the whole page
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| id="(?![mp][0-9a-f]{10}")[^"]*"', "", svg)
    for color, css in _CSS.items():
        svg = svg.replace(color, css)
    return Markup(svg)


def png(draw: Callable[[Figure], None], path: Path) -> None:
    """Write the figure to a file, in the colours of the light page."""
    _draw(draw, _ON_PAPER, path, dpi=200, facecolor="white")


def _draw(draw: Callable[[Figure], None], colors: dict[str, str], target: Any, **options: Any) -> None:
    import matplotlib
    from matplotlib.colors import get_named_colors_mapping
    from matplotlib.figure import Figure

    mapping = get_named_colors_mapping()
    for name, color in colors.items():  # item by item, which also clears matplotlib's cache
        mapping[name] = color
    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: in the page's font, and searchable
        "text.parse_math": False,  # a name with two dollar signs is no formula
        "svg.hashsalt": "sigray",  # equal runs give equal bytes
        "font.size": 9.5,
        "legend.fontsize": 9.0,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), RULE),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
        "axes.grid.axis": "y",
        "grid.linewidth": 0.6,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.2, 2.9))
        # Equal margins align the axes of all figures, and a layout engine would draw each figure twice.
        figure.subplots_adjust(left=0.18, right=0.95, bottom=0.16, top=0.97, hspace=0.16)
        draw(figure)
        figure.savefig(target, **options)
