"""The page of a run: `write_report` turns what a run folder holds into one HTML file that works offline.

    read      config.yaml, metrics.jsonl, evaluations/*.json, summary.json
    say       sentences, cards and tables as plain values, each computed from what was read
    draw      curves as SVG, in the page's own colours so that they follow its dark mode
    fill      report.html.j2 lays the values out and escapes everything that came from data

While a run lasts, `orchestrator/reports/live_server.py` serves the same page, always drawn anew, below what is known of the moment.

Any file may be missing, cut short or older than the others: a run can be stopped before its first evaluation, or die
after a resume and leave the summary of its life before. So the newest evaluation file decides over the summary, every
figure is looked up as one that may not be there, and the page says what is missing instead of leaving a hole.

Rates are fractions here and percentages on the page. A rate counts as better than chance only where blind guessing
would reach it in fewer than about one run of forty (two standard deviations of a binomial).
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import yaml

from sigray.orchestrator import formatting as words
from sigray.orchestrator.config import ConfigError
from sigray.orchestrator.reports import drawing
from sigray.orchestrator.reports.template import page, render
from sigray.orchestrator.run_folder import CONFIG, EVALUATIONS, METRICS, REPORT, SUMMARY
from sigray.workers.checkpoint.index import read_metrics
from sigray.workers.storage import Storage

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

_ORDINALS = ("1st", "2nd", "3rd", "4th", "5th")
_PACE_LINES = 10  # of metrics, from which the time left is told
_MAX_POINTS = 1000  # of a curve; of more, the lowest and highest of each stretch
_IMAGE_PX = 128  # side of a held-out image on the page


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` from the run's files.

    Args:
        folder: a run's local folder.

    Returns:
        The path of the page.

    Raises:
        ConfigError: where the folder holds nothing of a run.
    """
    run = read_run_files(Storage(folder))
    path = folder / REPORT
    path.write_text(page(f"{run.name} ({run.status})", draw_run(run)), encoding="utf-8")
    return path


def draw_run(run: RunFiles, now: Markup | None = None) -> Markup:
    """The content of the page.

    Args:
        now: of a live page, what it says of the moment. Held-out images are then left to the report.
    """
    return render(
        "sigray.orchestrator.reports",
        "report.html.j2",
        now=now,
        name=run.name,
        status=run.status,
        date=_text(run.summary, "environment", "date"),
        headline=_headline(run),
        remarks=_remarks(run),
        measured=_measured(run),
        stages=_stages(run),
        cards=_cards(run),
        without_classes=[name for name in run.retrieval if name not in run.zero_shot],
        has_baseline=any(run.baseline(name) is not None for name in run.zero_shot),
        retrieval=_retrieval(run),
        languages=_languages(run),
        figures=_figures(run),
        num_lines=len(run.metrics),
        sheets=_sheets(run) if now is None else [],
        facts=_facts(run),
        config_text=run.config_text,
        unreadable=run.unreadable,
    )


# ------------------------------------------------------------------------------------------------- read


@dataclass
class RunFiles:
    """What was found in a run folder.

    Attributes:
        storage: the folder.
        metrics, evaluations: by step.
        unreadable: names of files that could not be read.
        is_driven: a driver has the run now. A page that is written does not ask.
    """

    storage: Storage
    name: str
    config_text: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]
    unreadable: list[str]
    is_driven: bool

    @property
    def newest(self) -> dict[str, Any]:
        """The newest evaluation; the summary's figures where no evaluation file is left."""
        return self.evaluations[-1] if self.evaluations else self.summary

    @property
    def zero_shot(self) -> dict[str, dict[str, Any]]:
        return _mapping(self.newest, "zero_shot")

    @property
    def retrieval(self) -> dict[str, dict[str, Any]]:
        return _mapping(self.newest, "retrieval")

    @property
    def samples_seen(self) -> int:
        return int(max(_number(line, "samples_seen") or 0 for line in [self.summary, *self.metrics[-1:]]))

    @property
    def step(self) -> int:
        """Steps done."""
        ends = [(self.summary, "steps"), *((line, "step") for line in self.metrics[-1:])]
        return int(max(_number(content, key) or 0 for content, key in ends))

    @property
    def left_s(self) -> float | None:
        """Seconds to the end at the pace of the newest lines; pauses for checkpoints and restarts not counted."""
        rates = [_number(line, "throughput/samples_per_s") or 0 for line in self.metrics[-_PACE_LINES:]]
        pace = median(rates) if rates else 0
        planned = self.planned_samples
        return max(planned - self.samples_seen, 0) / pace if planned and pace else None

    @property
    def global_batch_size(self) -> int | None:
        sizes = (
            _number(self.summary, "facts", "global_batch_size"),
            _number(self.config, "train", "global_batch_size"),
        )
        return next((int(size) for size in sizes if size), None)

    @property
    def planned_samples(self) -> int | None:
        """Length of the whole run, in whole steps."""
        steps, batch = _number(self.summary, "facts", "num_steps"), self.global_batch_size
        if steps and batch:
            return int(steps * batch)
        wanted = _number(self.config, "train", "num_samples")
        return math.ceil(wanted / batch) * batch if wanted and batch else None

    @property
    def status(self) -> str:
        """The summary's word, or "unfinished" where there is none that covers the newest line of metrics.

        While a driver has the run: "running", or "starting" before the first line.
        """
        if self.is_driven:
            return "running" if self.metrics else "starting"
        trained = _number(self.metrics[-1], "step") if self.metrics else None
        is_stale = (_number(self.summary, "steps") or 0) < (trained or 0)
        return "unfinished" if is_stale else _text(self.summary, "status") or "unfinished"

    def baseline(self, name: str) -> float | None:
        """Top-1 of the pixel nearest neighbour. It does not depend on the checkpoint, so any file may know it."""
        for source in [*reversed(self.evaluations), self.summary]:
            value = _number(source, "zero_shot", name, "pixel_baseline_top1")
            if value is not None:
                return value
        return None


def read_run_files(storage: Storage, is_driven: bool = False) -> RunFiles:
    """What a run folder holds, locally or in S3.

    Raises:
        ConfigError: where the folder holds nothing of a run.
    """
    unreadable: list[str] = []

    def text(path: str) -> str:
        try:
            return storage.read(path).decode("utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def load(path: str, parse: Callable[[str], Any]) -> dict[str, Any]:
        try:
            content = parse(storage.read(path).decode("utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, yaml.YAMLError):
            content = None
        if not isinstance(content, dict):
            unreadable.append(path)
            return {}
        return content

    files = [f"{EVALUATIONS}/{name}" for name in storage.list(EVALUATIONS) if name.endswith(".json")]
    if not files and not any(storage.exists(name) for name in (CONFIG, METRICS, SUMMARY)):
        raise ConfigError(
            f"{storage.uri} is not a run: it holds no {CONFIG}. Give the local folder that `sigray train` named"
        )
    config, summary = load(CONFIG, yaml.safe_load), load(SUMMARY, json.loads)
    evaluations = [content for file in files if (content := load(file, json.loads))]
    lines = _lines(text(METRICS))
    if not storage.is_local:  # its metrics.jsonl is written at the end; the lines up to a checkpoint come with that
        known = {line.get("step") for line in lines}
        lines += [line for line in read_metrics(storage) if line["step"] not in known]
        lines.sort(key=lambda line: line["samples_seen"])
    return RunFiles(
        storage=storage,
        name=_text(summary, "name") or _text(config, "run", "name") or storage.uri.rpartition("/")[2],
        config_text=text(CONFIG),
        config=config,
        metrics=lines,
        evaluations=sorted(evaluations, key=lambda evaluation: _number(evaluation, "step") or 0),
        summary=summary,
        unreadable=unreadable,
        is_driven=is_driven,
    )


def _lines(text: str) -> list[dict[str, Any]]:
    """The lines of metrics; one that a crash cut short is left out."""
    lines = []
    for each in text.splitlines():
        try:
            line = json.loads(each)
        except ValueError:
            continue
        if isinstance(line, dict) and _number(line, "samples_seen") is not None:
            lines.append(line)
    return lines


def _find(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _number(content: Any, *keys: str) -> float | None:
    """The finite number at a path of keys, if there is one."""
    value = _find(content, *keys)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def _text(content: Any, *keys: str) -> str | None:
    """The non-empty text, or number, at a path of keys."""
    value = _find(content, *keys)
    return str(value) if isinstance(value, str | int | float) and value != "" else None


def _mapping(content: Any, *keys: str) -> dict[str, Any]:
    value = _find(content, *keys)
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def _list(content: Any, *keys: str) -> list[Any]:
    value = _find(content, *keys)
    return value if isinstance(value, list) else []


# -------------------------------------------------------------------------------------------------- say


def _headline(run: RunFiles) -> str:
    """The run's outcome in one sentence, with the numbers that matter."""
    progress = _progress(run)
    if run.status == "starting":
        return "The training workers are starting."
    if run.status in ("running", "finished"):
        return f"After {progress}, {_finding(run)}." if progress else f"{run.status.capitalize()}: {_finding(run)}."
    begin = {"stopped": "Stopped", "failed": "Failed"}.get(run.status, "Not finished")
    return f"{begin} after {progress}: {_finding(run)}." if progress else f"{begin} before its first line of metrics."


def _progress(run: RunFiles) -> str:
    """'84,992 pairs (8.5 epochs) in 3 min 20 s'; empty before the first step."""
    seen, planned = run.samples_seen, run.planned_samples
    if not seen:
        return ""
    text = (
        f"{words.count(seen)} of {words.count(planned)} pairs"
        if planned and seen < planned
        else words.counted(seen, "pair")
    )
    samples = _number(run.summary, "data", "samples")
    if samples:
        text += f" ({seen / samples:.1f}{words.NBSP}epochs)"
    train_s = _number(run.summary, "train_s")
    # train_s is that of the last session: not the time of the whole where the run went on from a checkpoint.
    if train_s and run.status not in ("unfinished", "running") and not _number(run.summary, "facts", "first_step"):
        text += f" in {words.duration(train_s)}"
    return text


def _finding(run: RunFiles) -> str:
    """What the newest evaluation says of the model, on the first set that has classes."""
    for name in run.zero_shot:
        best = _best_of(run, name)
        if best:
            return f"the model has the right name of {best.share} of the {name} images {best.place}: {best.against}"
    for name, figures in run.retrieval.items():
        found, blind = _number(figures, "image_to_text_r10"), _number(figures, "image_to_text_chance10")
        if found is not None and blind:
            share = f"{words.percent(found)} of the {name} images"
            against = _against(found, blind, _number(figures, "num_images"))
            return f"the model has the right caption of {share} among its ten closest: {against}"
    if run.config and not _mapping(run.config, "eval", "sets"):
        return "no held-out set is configured, so nothing says yet what the model can do"
    return "no checkpoint was evaluated, so nothing says yet what the model can do"


@dataclass
class _Best:
    """The figure that sums a zero-shot set up, in words."""

    share: str
    place: str
    against: str


def _best_of(run: RunFiles, name: str) -> _Best | None:
    """Five guesses, or one where five would cover half of the names or more."""
    figures = run.zero_shot[name]
    num_classes, num_images = _number(figures, "num_classes"), _number(figures, "num_images")
    of = f" of {words.counted(num_classes, 'name')}" if num_classes else ""
    for k, place in ((5, f"among its five best{of}"), (1, f"as its first guess{of}")):
        rate, chance = _number(figures, f"top{k}"), _number(figures, f"chance{k}")
        if rate is not None and chance and (k == 1 or chance < 0.5):
            return _Best(words.percent(rate), place, _against(rate, chance, num_images))
    return None


def _against(rate: float, chance: float, num_images: float | None) -> str:
    if not _beats(rate, chance, num_images):
        return f"no better than chance ({words.percent(chance)})"
    return words.multiple(rate, chance)


def _beats(rate: float, level: float, num_images: float | None) -> bool:
    """Whether a rate over n images is above a level by more than two standard deviations of luck."""
    return rate > level + 2 * math.sqrt(level * max(0.0, 1 - level) / max(1.0, num_images or 1.0))


def _remarks(run: RunFiles) -> list[str]:
    """Sentences under the headline: the other sets, and where the model stands against looking at pixels."""
    remarks: list[str] = []
    named = [(name, best) for name in run.zero_shot if (best := _best_of(run, name))]
    remarks += [f"For {name} it is {best.share} {best.place}: {best.against}." for name, best in named[1:]]
    for name, _ in named:
        baseline, top1 = run.baseline(name), _number(run.zero_shot, name, "top1")
        if baseline and top1 is not None and top1 < baseline:
            remarks.append(
                f"As a first guess on {name} it is still below a plain look-alike: {words.percent(top1)} right, where "
                f"the name of the training image with the closest pixels is right for {words.percent(baseline)}."
            )
    return remarks


def _measured(run: RunFiles) -> str:
    """Which checkpoint the figures are of."""
    if not run.zero_shot and not run.retrieval:
        return ""
    samples = _number(run.newest, "samples_seen")
    if samples is None:
        return "Measured on held-out images."
    step = _number(run.newest, "step") or _number(run.newest, "steps")
    which = f" of step {words.count(step)}," if step else ""
    text = f"Measured on the checkpoint{which} after {words.count(samples)} pairs."
    later = run.samples_seen - samples
    return text + (f" The run went on for {words.count(later)} more." if later > 0 else "")


def _stages(run: RunFiles) -> str:
    """For a run from stored embeddings, what was computed once before it, and what each stage took."""
    num_images, seconds = (_number(run.summary, "embeddings", name) for name in ("num_images", "seconds"))
    if not num_images or not seconds:
        return ""
    text = (
        f"Two stages. The locked image tower ran once over {words.counted(num_images, 'image')}: "
        f"{words.duration(seconds)}, {words.count(num_images / seconds)} images per second."
    )
    train_s = _number(run.summary, "train_s")
    if train_s:
        text += (
            f" From its stored embeddings the text tower then trained for {words.duration(train_s)} "
            f"on {words.count(run.samples_seen)} pairs."
        )
    return text


def _cards(run: RunFiles) -> list[dict[str, Any]]:
    """One card per zero-shot set: the model's rates as bars beside chance and the pixel neighbour."""
    cards = []
    for name, figures in run.zero_shot.items():
        num_images, num_classes = _number(figures, "num_images"), _number(figures, "num_classes")
        bars = [
            (f"top-{k}", label, kind, rate)
            for k in _guesses(figures)
            for label, kind, rate in (
                ("this model", "model", _number(figures, f"top{k}")),
                ("pixel neighbour", "baseline", run.baseline(name) if k == 1 else None),
                ("chance", "chance", _number(figures, f"chance{k}")),
            )
            if rate is not None
        ]
        longest = max((rate for *_, rate in bars), default=0) or 1
        groups: dict[str, list[dict[str, str]]] = {}
        for group, label, kind, rate in bars:
            bar = {"label": label, "kind": kind, "text": words.percent(rate), "width": f"{100 * rate / longest:.2f}"}
            groups.setdefault(group, []).append(bar)
        refused = _number(figures, "num_refused")
        size = [words.counted(num_images, "image")] if num_images else []
        size += [words.counted(num_classes, "name")] if num_classes else []
        size += [f"{words.counted(refused, 'sample')} refused"] if refused else []
        cards.append({"name": name, "size": ", ".join(size), "groups": groups, "verdict": _verdict(run, name)})
    return cards


def _guesses(figures: Any) -> tuple[int, ...]:
    """1 and 5; five guesses among five names, or fewer, are always right and say nothing."""
    return (1,) if _number(figures, "chance5") == 1 else (1, 5)


def _verdict(run: RunFiles, name: str) -> str:
    figures, sentences = run.zero_shot[name], []
    num_images, top1 = _number(figures, "num_images"), _number(figures, "top1")
    parts = []
    for k in _guesses(figures):
        rate, chance = _number(figures, f"top{k}"), _number(figures, f"chance{k}")
        if rate is not None and chance:
            parts.append(f"top-{k} is {_against(rate, chance, num_images)}")
    if parts:
        sentences.append(f"{', '.join(parts)}.".capitalize())
    baseline = run.baseline(name)
    if baseline == 0:
        sentences.append(
            "The pixel neighbour gets none right, as it must where no name of the set was trained on: looking alike "
            "does not help here."
        )
    elif baseline is not None and top1 is not None:
        if _beats(top1, baseline, num_images):
            sentences.append("Above the pixel neighbour: it has learned more than which images look alike.")
        elif top1 >= baseline:
            sentences.append("Level with the pixel neighbour: no proof yet of more than looking alike.")
        else:
            sentences.append(
                "Below the pixel neighbour: the name of the most similar training image would be right more often."
            )
    return " ".join(sentences)


def _retrieval(run: RunFiles) -> list[dict[str, Any]]:
    """One row per set and direction, one cell per k."""
    rows = []
    for name, figures in run.retrieval.items():
        num_images, num_captions = _number(figures, "num_images"), _number(figures, "num_captions")
        size = [words.counted(num_images, "image")] if num_images else []
        size += [words.counted(num_captions, "different caption")] if num_captions else []
        ways = []
        for way, asked in (("image_to_text", num_images), ("text_to_image", num_captions)):
            cells = []
            for k in (1, 5, 10):
                rate, chance = _number(figures, f"{way}_r{k}"), _number(figures, f"{way}_chance{k}")
                against = _against(rate, chance, asked) if rate is not None and chance else ""
                if "times" in against and chance:
                    against = f"{against.replace(' times ', words.TIMES + words.NBSP)} ({words.percent(chance)})"
                cells.append({"rate": words.percent(rate) if rate is not None else "not measured", "against": against})
            ways.append({"name": way.replace("_", " "), "cells": cells})
        rows.append({"name": name, "size": ", ".join(size), "ways": ways})
    return rows


def _languages(run: RunFiles) -> list[dict[str, Any]]:
    """Per set: a table of its languages, a sentence, and a bar for each language."""
    sets = []
    for name in _mapping(run.newest, "languages"):
        figures = _mapping(run.newest, "languages", name)
        columns = [
            ("image to text R@1", "retrieval", "image_to_text_r1", "image_to_text_chance1"),
            ("text to image R@1", "retrieval", "text_to_image_r1", "text_to_image_chance1"),
            ("named right", "zero_shot", "top1", "chance1"),
        ]
        columns = [
            column for column in columns if any(_number(row, *column[1:3]) is not None for row in figures.values())
        ]
        rows, bars = [], []
        for language, row in figures.items():
            cells = []
            for _, kind, key, chance_key in columns:
                rate, chance = _number(row, kind, key), _number(row, kind, chance_key)
                against = words.multiple(rate, chance) if rate is not None and chance else ""
                cells.append({"rate": words.percent(rate) if rate is not None else "not measured", "against": against})
            rows.append({"language": language, "num": _number(row, "retrieval", "num_images"), "cells": cells})
            rate, chance = (_number(row, "retrieval", f"image_to_text_{key}1") for key in ("r", "chance"))
            if rate is not None and chance:
                bars.append((language, rate, chance))
        if bars:
            mean = sum(rate for _, rate, _ in bars) / len(bars)
            far = sum(rate >= 50 * chance for _, rate, chance in bars)
            (best, best_rate, _), (worst, worst_rate, _) = (
                max(bars, key=lambda bar: bar[1]),
                min(bars, key=lambda b: b[1]),
            )
            said = (
                f"Image to text R@1 over {words.counted(len(bars), 'language')}: mean {words.percent(mean)}, from "
                f"{words.percent(worst_rate)} ({worst}) to {words.percent(best_rate)} ({best}); "
                f"{far} of them at 50 times chance or more."
            )
            sets.append(
                {
                    "name": name,
                    "head": [title for title, *_ in columns],
                    "rows": rows,
                    "said": said,
                    "svg": _language_bars(bars),
                }
            )
    return sets


def _language_bars(bars: list[tuple[str, float, float]]) -> Any:
    """A bar for each language, the highest first, with the chance level of each."""
    ordered = sorted(bars, key=lambda bar: -bar[1])

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter

        figure.set_size_inches(8.6, 2.9)
        axes = figure.subplots()
        places = range(len(ordered))
        axes.bar(places, [rate for _, rate, _ in ordered], color=drawing.FIRST, width=0.7)
        axes.plot(places, [chance for _, _, chance in ordered], color=drawing.SECOND, linewidth=1.2, label="chance")
        axes.set_xticks(places, [language for language, *_ in ordered], fontsize=8)
        axes.set_xlim(-0.6, len(ordered) - 0.4)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:g} %"))
        axes.set_ylabel("image to text R@1")
        axes.legend(frameon=False, loc="upper right")
        figure.subplots_adjust(left=0.09)

    return drawing.svg(draw)


def _sheets(run: RunFiles) -> list[dict[str, Any]]:
    """Per set: held-out images with the truth, the five best names and whether they are right."""
    sheets = []
    for name in _mapping(run.newest, "sheets"):
        entries = [_sheet_entry(entry) for entry in _list(run.newest, "sheets", name)]
        right, near = (sum(entry["kind"] in kinds for entry in entries) for kinds in (("right",), ("right", "near")))
        shown = len(entries)
        count = ""
        if shown:
            is_right, has = "is" if right == 1 else "are", "has" if near == 1 else "have"
            count = (
                f"{right} of {shown} shown {is_right} right at top-1; {near} {has} the right name among the five best."
            )
        sheets.append({"name": name, "count": count, "entries": entries})
    return sheets


def _sheet_entry(entry: Any) -> dict[str, Any]:
    best = [item for item in _list(entry, "best") if isinstance(item, dict)]
    place = next((number for number, item in enumerate(best) if item.get("right")), None)
    kind = "right" if place == 0 else "near" if place is not None else "wrong"
    if place is None:
        verdict = "wrong" if best else "not scored"
    else:
        verdict = "right" if place == 0 else f"{_ORDINALS[min(place, 4)]} guess"
    png = _text(entry, "png_base64") or ""
    width = _png_width(png)
    return {
        "png": png if width else "",
        # A whole multiple of the pixels that the model saw, so that each stays a square; larger images are shrunk.
        "px": width * (_IMAGE_PX // width) if 0 < width <= _IMAGE_PX else _IMAGE_PX,
        "is_enlarged": width <= _IMAGE_PX,
        "truth": _text(entry, "truth") or "unknown",
        "kind": kind,
        "verdict": verdict,
        "best": [
            {
                "name": _text(item, "name") or "",
                "cosine": f"{cosine:.3f}" if (cosine := _number(item, "cosine")) is not None else "",
                "is_right": bool(item.get("right")),
            }
            for item in best
        ],
    }


def _png_width(png_base64: str) -> int:
    """Pixels across, from the header of a PNG; 0 where it is none."""
    try:
        header = base64.b64decode(png_base64[:32])
        return int(struct.unpack(">I", header[16:20])[0]) if header.startswith(b"\x89PNG") else 0
    except (ValueError, struct.error):
        return 0


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    """What it ran on and how, as rows; what was not recorded is said in the last row."""
    summary, config = run.summary, run.config
    environment = {key: str(value) for key, value in _mapping(summary, "environment").items()}
    newest = run.metrics[-1] if run.metrics else {}

    def settings(*keys: tuple[str, str]) -> str:
        known = [(key, _text(config, section, key)) for section, key in keys]
        return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in known if value)

    rows = [
        ("Hardware", environment.pop("hardware", None)),
        ("Device", _text(summary, "facts", "device")),
        ("Batch", _batch(run)),
        ("Steps", _steps(run)),
        ("Time", _time(run)),
        ("Model", _model(run)),
        ("Recipe", settings(("optim", "lr"), ("optim", "schedule"), ("train", "precision"), ("run", "seed"))),
        ("Training data", _data(run)),
        ("Refused samples", None if (n := _number(newest, "data/refused_samples")) is None else words.count(n)),
        (
            "Peak memory",
            f"{n:.2f}{words.NBSP}GiB in the first worker" if (n := _number(newest, "memory/peak_gib")) else None,
        ),
        ("Date", environment.pop("date", None)),
        ("Commit", environment.pop("commit", None)),
        ("Versions", ", ".join(f"{key}{words.NBSP}{value}" for key, value in environment.items())),
    ]
    missing = [label.lower() for label, value in rows if not value]
    known = [(label, value) for label, value in rows if value]
    return known + ([("Known at the end" if run.is_driven else "Not recorded", ", ".join(missing))] if missing else [])


def _batch(run: RunFiles) -> str:
    batch = run.global_batch_size
    workers = _number(run.summary, "facts", "world_size")
    if not batch:
        return ""
    text = f"{words.counted(batch, 'pair')} per step"
    if workers:
        text += f" = {words.count(batch / workers)} on each of {words.counted(workers, 'training worker')}"
    return text + "; the loss sees all of them"


def _steps(run: RunFiles) -> str:
    planned = _number(run.summary, "facts", "num_steps")
    first = _number(run.summary, "facts", "first_step")
    text = f"{words.count(run.step)} of {words.count(planned)}" if planned else words.count(run.step)
    return text + (f"; the last start was from the checkpoint of step {words.count(first)}" if first else "")


def _time(run: RunFiles) -> str:
    train_s, total_s = _number(run.summary, "train_s"), _number(run.summary, "total_s")
    parts = [f"{words.duration(train_s)} training"] if train_s is not None else []
    parts += [f"{words.duration(total_s)} in all"] if total_s is not None else []
    session = " (last session)" if parts and _number(run.summary, "facts", "first_step") else ""
    return ", ".join(parts) + session


def _model(run: RunFiles) -> str:
    parameters = _mapping(run.summary, "facts", "parameters_m")
    sizes = {key: value for key in ("all", "visual", "text") if (value := _number(parameters, key)) is not None}
    name = _text(run.config, "model", "name") or ("towers written out in the config" if run.config else "")
    parts = [name] if name else []
    if "all" in sizes:
        parts.append(f"{sizes['all']:,.1f}{words.NBSP}M parameters")
    labels = {"visual": "image tower", "text": "text tower"}
    parts += [f"{label} {sizes[key]:,.1f}{words.NBSP}M" for key, label in labels.items() if key in sizes]
    return ", ".join(parts)


def _data(run: RunFiles) -> str:
    samples, shards, size = (_number(run.summary, "data", key) for key in ("samples", "shards", "bytes"))
    parts = [words.counted(samples, "pair")] if samples else []
    parts += [f"in {words.counted(shards, 'shard')}"] if shards else []
    parts += (
        [f"({size / 1e6:,.1f}{words.NBSP}MB)" if size < 1e9 else f"({size / 1e9:,.1f}{words.NBSP}GB)"] if size else []
    )
    return " ".join(parts)


# ------------------------------------------------------------------------------------------------- draw


def _figures(run: RunFiles) -> list[dict[str, Any]]:
    """The curves that there is something to draw for, each with a sentence that tells what it shows."""
    figures = []
    for title, figure in (
        ("Loss", _loss_figure(run)),
        *((f"Zero-shot: {name}", _zero_shot_figure(run, name)) for name in run.zero_shot),
        ("Logit scale and bias", _logit_figure(run)),
        ("Learning rate", _learning_rate_figure(run)),
        ("Throughput", _throughput_figure(run)),
    ):
        if figure is not None:
            figures.append({"title": title, "caption": figure[0], "svg": figure[1]})
    return figures


def _loss_figure(run: RunFiles) -> tuple[str, Any] | None:
    points = _curve(run.metrics, "train/loss")
    if not points:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        drawing.plot(axes, points, drawing.FIRST)
        if drawing.spans_decades([value for _, value in points]):
            axes.set_yscale("log")
        axes.set_ylabel("sigmoid loss per image")
        drawing.samples_axis(axes)

    return _from_to("Loss per image, lower is better", points), drawing.svg(draw)


def _zero_shot_figure(run: RunFiles, name: str) -> tuple[str, Any] | None:
    curves = {k: _curve(run.evaluations, "zero_shot", name, f"top{k}") for k in _guesses(run.zero_shot[name])}
    curves = {k: points for k, points in curves.items() if points}
    if not curves:
        return None
    chances = {k: _number(run.zero_shot, name, f"chance{k}") for k in curves}
    baseline = run.baseline(name)

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator

        axes = figure.subplots()
        levels = [value for points in curves.values() for _, value in points]
        for (k, points), color, marker in zip(curves.items(), (drawing.FIRST, drawing.SECOND), "os", strict=False):
            drawing.plot(axes, points, color, marker=marker, label=f"top-{k}")
            chance = chances[k]
            if chance:
                levels.append(chance)
                axes.axhline(chance, color=color, linewidth=1.2, linestyle=(0, (4, 3)), label=f"chance top-{k}")
        if baseline:
            levels.append(baseline)
            axes.axhline(baseline, color=drawing.INK, linewidth=1.2, linestyle=(0, (1, 2)), label="pixel neighbour")
        positive = [level for level in levels if level > 0]
        if drawing.spans_decades(positive):
            # A rate of 0 has no place on a log axis: its line comes from below the frame.
            low, high = min(positive) / 2, min(1.0, max(positive) * 2)
            axes.set_yscale("log", nonpositive="clip", subs=[])
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if high / low < 1000 else (1,)))
            axes.set_ylim(low, high)
        else:
            axes.set_ylim(0, min(1.0, max(positive, default=1.0) * 1.1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:g} %"))
        axes.set_ylabel("images named right")
        drawing.samples_axis(axes)
        figure.legend(
            loc="upper center", ncols=3 if baseline else 2, frameon=False, handlelength=1.6, columnspacing=1.2
        )
        figure.subplots_adjust(top=0.83)

    parts = [f"top-{k} {words.percent(points[-1][1])}" for k, points in curves.items()]
    count = "the only evaluation so far" if max(map(len, curves.values())) == 1 else "the newest evaluation"
    lines = "dashed: a blind guess" + ("; dotted: the pixel nearest neighbour at top-1" if baseline else "")
    return f"{', '.join(parts)} at {count}; {lines}.".capitalize(), drawing.svg(draw)


def _logit_figure(run: RunFiles) -> tuple[str, Any] | None:
    scale, bias = _curve(run.metrics, "train/logit_scale"), _curve(run.metrics, "train/logit_bias")
    if not scale or not bias:
        return None

    def draw(figure: Figure) -> None:
        for axes, points, color, label in zip(
            figure.subplots(2, sharex=True),
            (scale, bias),
            (drawing.FIRST, drawing.SECOND),
            ("scale", "bias"),
            strict=True,
        ):
            drawing.plot(axes, points, color)
            axes.set_ylabel(label)
        drawing.samples_axis(axes)

    caption = (
        f"{_from_to(f'A logit is scale {words.TIMES} cosine + bias. Scale', scale)[:-1]}; {_from_to('bias', bias)}"
    )
    return caption, drawing.svg(draw)


def _learning_rate_figure(run: RunFiles) -> tuple[str, Any] | None:
    points = _curve(run.metrics, "train/learning_rate")
    if not points:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        drawing.plot(axes, points, drawing.FIRST)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("learning rate")
        drawing.samples_axis(axes)

    samples, top = max(points, key=lambda point: point[1])
    return f"Highest after {words.count(samples)} pairs: {words.decimal(top)}.", drawing.svg(draw)


def _throughput_figure(run: RunFiles) -> tuple[str, Any] | None:
    rate, wait = _curve(run.metrics, "throughput/samples_per_s"), _curve(run.metrics, "data/wait_pct")
    if not rate or not wait:
        return None

    def draw(figure: Figure) -> None:
        for axes, points, color, label in zip(
            figure.subplots(2, sharex=True),
            (rate, wait),
            (drawing.FIRST, drawing.SECOND),
            ("pairs/s", "data wait, %"),
            strict=True,
        ):
            drawing.plot(axes, points, color)
            axes.set_ylim(bottom=0, top=1.15 * max(value for _, value in points) or 1)
            axes.set_ylabel(label)
        drawing.samples_axis(axes)

    speed, waiting = median(value for _, value in rate), median(value for _, value in wait)
    return (
        f"Median {words.count(speed)} pairs per second; training waited for data {words.percent(waiting / 100)} of the "
        "time.",
        drawing.svg(draw),
    )


def _curve(lines: Iterable[dict[str, Any]], *keys: str) -> drawing.Points:
    """(samples seen, value) of each line that has both; of very many the first, the last and the extremes between."""
    pairs = [(_number(line, "samples_seen"), _number(line, *keys)) for line in lines]
    points = [(samples, value) for samples, value in pairs if samples is not None and value is not None]
    if len(points) <= _MAX_POINTS:
        return points
    stretch = -(-2 * len(points) // _MAX_POINTS)
    kept = {points[0], points[-1]}
    for begin in range(0, len(points), stretch):
        part = points[begin : begin + stretch]
        kept |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return sorted(kept)


def _from_to(what: str, points: drawing.Points) -> str:
    (first_samples, first), (_, last) = points[0], points[-1]
    if len(points) == 1:
        return f"{what}: {words.decimal(first)} after {words.count(first_samples)} pairs, the only line of metrics."
    return f"{what}: from {words.decimal(first)} after {words.count(first_samples)} pairs to {words.decimal(last)}."
