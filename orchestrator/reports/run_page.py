"""The page of a run: one HTML file that works offline.

    run_files.py      reads config.yaml, metrics.jsonl, evaluations/*.json, summary.json
    this module       computes sentences, cards and tables as plain values
    run_charts.py     draws curves as SVG
    report.html.j2    lays the values out and escapes all text from data

While a run lasts, `live_server.py` serves the same page below the current state. The page names what is missing.

Rates are fractions here and percentages on the page. A rate counts as better than chance only if it is more than two
standard deviations of a binomial above it: random guesses reach that in fewer than about one run of forty.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigray.orchestrator import formatting as words
from sigray.orchestrator.reports.foreign_folder import ForeignFolder
from sigray.orchestrator.reports.run_charts import charts, guesses, language_bars
from sigray.orchestrator.reports.run_files import (
    RunFiles,
    find_dict,
    find_list,
    find_number,
    find_text,
    read_run_files,
    sets_of,
)
from sigray.orchestrator.reports.template import page, render
from sigray.orchestrator.run_folder import REPORT
from sigray.workers.storage import Storage

if TYPE_CHECKING:
    from markupsafe import Markup

_PLACES = ("right", "2nd guess", "3rd guess", "4th guess", "5th guess")
_IMAGE_PX = 128  # side of a held-out image on the page


def write_report(place: str | Path) -> str:
    """Write report.html into a run's folder or storage; return its path or URL.

    Raises:
        ConfigError: if the folder holds no file of a run.
    """
    storage = Storage(place)
    run = read_run_files(ForeignFolder(storage))
    storage.write(REPORT, page(f"{run.name} ({run.status})", draw_run(run)).encode())
    return f"{storage.uri}/{REPORT}"


def draw_run(run: RunFiles, now: Markup | None = None) -> Markup:
    """Return the content of the page.

    Args:
        now: the current state, of a live page. Only a written page shows held-out images.
    """
    sheets = _sheets(run) if now is None else []
    return render(
        "report.html.j2",
        now=now,
        name=run.name,
        status=run.status,
        date=find_text(run.summary, "environment", "date"),
        headline=_headline(run),
        remarks=_remarks(run),
        measured=_measured(run),
        stages=_stages(run),
        cards=_cards(run),
        without_classes=[name for name in run.retrieval if name not in run.zero_shot],
        has_baseline=any(run.baseline(name) is not None for name in run.zero_shot),
        retrieval=_retrieval(run),
        languages=_languages(run),
        figures=charts(run),
        num_lines=len(run.metrics),
        sheets=sheets,
        has_captions=any(entry["has_caption"] for sheet in sheets for entry in sheet["entries"]),
        facts=_facts(run),
        config_text=run.config_text,
        unreadable=run.unreadable,
    )


def _headline(run: RunFiles) -> str:
    """Return the run's outcome in one sentence, with the main numbers."""
    progress = _progress(run)
    if run.status == "starting":
        return "The training workers are starting."
    if run.status in ("running", "finished"):
        return f"After {progress}, {_finding(run)}." if progress else f"{run.status.capitalize()}: {_finding(run)}."
    begin = {"stopped": "Stopped", "failed": "Failed"}.get(run.status, "Not finished")
    return f"{begin} after {progress}: {_finding(run)}." if progress else f"{begin} before its first line of metrics."


def _progress(run: RunFiles) -> str:
    """Return '84,992 pairs (8.5 epochs) in 3 min 20 s', empty before the first step."""
    seen, planned = run.samples_seen, run.planned_samples
    if not seen:
        return ""
    text = (
        f"{words.count(seen)} of {words.count(planned)} pairs"
        if planned and seen < planned
        else words.counted(seen, "pair")
    )
    samples = find_number(run.summary, "data", "samples")
    if samples:
        text += f" ({seen / samples:.1f}{words.NBSP}epochs)"
    train_s = find_number(run.summary, "train_s")
    # train_s covers the last session only: not the whole time if the run was resumed from a checkpoint.
    if train_s and run.status not in ("unfinished", "running") and not find_number(run.summary, "facts", "first_step"):
        text += f" in {words.duration(train_s)}"
    return text


def _finding(run: RunFiles) -> str:
    """Return the newest evaluation's main result, on the first set that has classes."""
    for name in run.zero_shot:
        if best := _best_of(run, name):
            return f"the model has the right name of {best[0]} of the {name} images {best[1]}"
    for name, figures in run.retrieval.items():
        found, blind = find_number(figures, "image_to_text_r10"), find_number(figures, "image_to_text_chance10")
        if found is not None and blind:
            share = f"{words.percent(found)} of the {name} images"
            against = _against(found, blind, find_number(figures, "num_images"))
            return f"the model has the right caption of {share} among its ten closest: {against}"
    if run.config and not find_dict(run.config, "eval", "sets"):
        return "no held-out set is configured, so the quality of the model is not known"
    return "no checkpoint was evaluated, so the quality of the model is not known"


def newest_figure(run: RunFiles) -> str:
    """Return the main rate of the newest evaluation in a few words, if it has one."""
    return next(_main_rates(run.newest), "")


def _main_rates(evaluation: dict[str, Any]) -> Iterator[str]:
    """Yield the main rate of each task and set in a few words."""
    keys = (("zero_shot", "top1", "top-1"), ("retrieval", "image_to_text_r1", "image to text R@1"))
    rates = (
        (name, what, find_number(figures, key))
        for task, key, what in keys
        for name, figures in sets_of(evaluation, task).items()
    )
    return (f"{what} {words.percent(rate)} of {name}" for name, what, rate in rates if rate is not None)


def _best_of(run: RunFiles, name: str) -> tuple[str, str] | None:
    """Return the share of right images and its meaning, of five guesses.

    If five guesses cover half of the names, the first guess counts.
    """
    figures = run.zero_shot[name]
    num_classes, num_images = find_number(figures, "num_classes"), find_number(figures, "num_images")
    of = f" of {words.counted(num_classes, 'name')}" if num_classes else ""
    for k, place in ((5, f"among its five best{of}"), (1, f"as its first guess{of}")):
        rate, chance = find_number(figures, f"top{k}"), find_number(figures, f"chance{k}")
        if rate is not None and chance and (k == 1 or chance < 0.5):
            return words.percent(rate), f"{place}: {_against(rate, chance, num_images)}"
    return None


def _against(rate: float, chance: float, num_images: float | None) -> str:
    if not _beats(rate, chance, num_images):
        return f"no better than chance ({words.percent(chance)})"
    return words.multiple(rate, chance)


def _beats(rate: float, level: float, num_images: float | None) -> bool:
    """Return whether a rate is more than two standard deviations above a level."""
    return rate > level + 2 * math.sqrt(level * max(0.0, 1 - level) / max(1.0, num_images or 1.0))


def _remarks(run: RunFiles) -> list[str]:
    """Return sentences on the other sets, and on the pixel nearest neighbour."""
    named = {name: best for name in run.zero_shot if (best := _best_of(run, name))}
    remarks = [f"For {name} it is {share} {meaning}." for name, (share, meaning) in list(named.items())[1:]]
    for name in named:
        baseline = run.baseline(name)
        top1 = find_number(run.zero_shot, name, "top1")
        if baseline and top1 is not None and top1 < baseline:
            remarks.append(
                f"The first guess on {name} is still below the pixel neighbour: {words.percent(top1)} are right. The "
                f"name of the training image with the closest pixels is right for {words.percent(baseline)}."
            )
    return remarks


def _measured(run: RunFiles) -> str:
    """Return the checkpoint of the figures."""
    if not run.zero_shot and not run.retrieval:
        return ""
    samples = find_number(run.newest, "samples_seen")
    if samples is None:
        return "Measured on held-out images."
    step = find_number(run.newest, "step") or find_number(run.newest, "steps")
    which = f" of step {words.count(step)}," if step else ""
    average = " with the average of the weights (train.ema)" if find_dict(run.newest, "without_ema") else ""
    text = f"Measured on the checkpoint{which} after {words.count(samples)} pairs{average}."
    later = run.samples_seen - samples
    return text + (f" The run continued for {words.count(later)} more." if later > 0 else "")


def _stages(run: RunFiles) -> str:
    """Return the times of both stages of a run from stored embeddings."""
    num_images, seconds = (find_number(run.summary, "embeddings", name) for name in ("num_images", "seconds"))
    if not num_images or not seconds:
        return ""
    text = (
        f"Two stages. The locked image tower ran once over {words.counted(num_images, 'image')}: "
        f"{words.duration(seconds)}, {words.count(num_images / seconds)} images per second."
    )
    train_s = find_number(run.summary, "train_s")
    if train_s:
        text += (
            f" From its stored embeddings the text tower then trained for {words.duration(train_s)} "
            f"on {words.count(run.samples_seen)} pairs."
        )
    return text


def _cards(run: RunFiles) -> list[dict[str, Any]]:
    """Return a card per zero-shot set: bars of model, pixel neighbour and chance."""
    cards = []
    for name, figures in run.zero_shot.items():
        num_images, num_classes = find_number(figures, "num_images"), find_number(figures, "num_classes")
        bars = [
            (f"top-{k}", label, kind, rate)
            for k in guesses(figures)
            for label, kind, rate in (
                ("this model", "model", find_number(figures, f"top{k}")),
                ("pixel neighbour", "baseline", run.baseline(name) if k == 1 else None),
                ("chance", "chance", find_number(figures, f"chance{k}")),
            )
            if rate is not None
        ]
        longest = max((rate for *_, rate in bars), default=0) or 1
        groups: dict[str, list[dict[str, str]]] = {}
        for group, label, kind, rate in bars:
            bar = {"label": label, "kind": kind, "text": words.percent(rate), "width": f"{100 * rate / longest:.2f}"}
            groups.setdefault(group, []).append(bar)
        refused = find_number(figures, "num_refused")
        size = [words.counted(num_images, "image")] if num_images else []
        size += [words.counted(num_classes, "name")] if num_classes else []
        size += [f"{words.counted(refused, 'sample')} refused"] if refused else []
        cards.append({"name": name, "size": ", ".join(size), "groups": groups, "verdict": _verdict(run, name)})
    return cards


def _verdict(run: RunFiles, name: str) -> str:
    figures = run.zero_shot[name]
    num_images, top1 = find_number(figures, "num_images"), find_number(figures, "top1")
    parts = []
    for k in guesses(figures):
        rate, chance = find_number(figures, f"top{k}"), find_number(figures, f"chance{k}")
        if rate is not None and chance:
            parts.append(f"top-{k} is {_against(rate, chance, num_images)}")
    said = f"{', '.join(parts)}. ".capitalize() if parts else ""
    baseline = run.baseline(name)
    if baseline == 0:
        said += "The pixel neighbour gets none right: it cannot if no name of the set was trained on. "
        said += "Similar pixels do not help here."
    elif baseline is not None and top1 is not None:
        if _beats(top1, baseline, num_images):
            said += "Above the pixel neighbour: the model has learned more than similar pixels."
        elif top1 >= baseline:
            said += "Level with the pixel neighbour: no proof yet of more than similar pixels."
        else:
            said += "Below the pixel neighbour: the name of the most similar training image would be right more often."
    return said.rstrip()


def _retrieval(run: RunFiles) -> list[dict[str, Any]]:
    """Return a row per set and direction, a cell per k."""
    rows = []
    for name, figures in run.retrieval.items():
        num_images, num_captions = find_number(figures, "num_images"), find_number(figures, "num_captions")
        num_distinct = find_number(figures, "num_distinct_captions")
        size = [words.counted(num_images, "image")] if num_images else []
        size += [words.counted(num_captions, "caption")] if num_captions else []
        if refused := find_number(figures, "num_refused"):
            size.append(f"{words.counted(refused, 'sample')} refused")
        asked_of = [("image_to_text", num_images), ("text_to_image", num_captions)]
        if num_distinct is None:  # measured before sigray read all captions of an image
            size.append("equal captions merged")
        elif num_distinct != num_captions:
            size.append(f"{words.count(num_distinct)} of them different")
            asked_of += [("merged_image_to_text", num_images), ("merged_text_to_image", num_distinct)]
        ways = []
        for way, asked in asked_of:
            cells = []
            for k in (1, 5, 10):
                rate, chance = find_number(figures, f"{way}_r{k}"), find_number(figures, f"{way}_chance{k}")
                against = _against(rate, chance, asked) if rate is not None and chance else ""
                if "times" in against and chance:
                    against = f"{against.replace(' times ', words.TIMES + words.NBSP)} ({words.percent(chance)})"
                cells.append(_cell(rate, against))
            merged = ", equal captions merged" if way.startswith("merged_") else ""
            ways.append({"name": way.removeprefix("merged_").replace("_", " ") + merged, "cells": cells})
        rows.append({"name": name, "size": ", ".join(size), "ways": ways})
    return rows


def _languages(run: RunFiles) -> list[dict[str, Any]]:
    """Return a table, a sentence and a bar chart of the languages of each set."""
    sets = []
    for name, languages in sets_of(run.newest, "languages").items():
        columns = [
            ("image to text R@1", "retrieval", "image_to_text_r1", "image_to_text_chance1"),
            ("text to image R@1", "retrieval", "text_to_image_r1", "text_to_image_chance1"),
            ("named right", "zero_shot", "top1", "chance1"),
        ]
        figures = find_dict(languages)
        columns = [one for one in columns if any(find_number(row, *one[1:3]) is not None for row in figures.values())]
        rows, bars = [], []
        for language, row in figures.items():
            cells = []
            for _, kind, key, chance_key in columns:
                rate, chance = find_number(row, kind, key), find_number(row, kind, chance_key)
                cells.append(_cell(rate, words.multiple(rate, chance) if rate is not None and chance else ""))
            rows.append({"language": language, "cells": cells})
            rate, chance = (find_number(row, "retrieval", f"image_to_text_{key}1") for key in ("r", "chance"))
            if rate is not None and chance:
                bars.append((language, rate, chance))
        if bars:
            worst, best = (extreme(bars, key=lambda bar: bar[1]) for extreme in (min, max))
            mean = sum(rate for _, rate, _ in bars) / len(bars)
            far = sum(rate >= 50 * chance for _, rate, chance in bars)
            said = (
                f"Image to text R@1 over {words.counted(len(bars), 'language')}: mean {words.percent(mean)}, from "
                f"{words.percent(worst[1])} ({worst[0]}) to {words.percent(best[1])} ({best[0]}); "
                f"{far} of them at 50 times chance or more."
            )
            head = [title for title, *_ in columns]
            sets.append({"name": name, "head": head, "rows": rows, "said": said, "svg": language_bars(bars)})
    return sets


def _cell(rate: float | None, against: str) -> dict[str, str]:
    return {"rate": words.percent(rate) if rate is not None else "not measured", "against": against}


def _sheets(run: RunFiles) -> list[dict[str, Any]]:
    """Return held-out images of each set with their five best names and captions."""
    sheets = []
    for name in find_dict(run.newest, "sheets"):
        entries = [_sheet_entry(entry) for entry in find_list(run.newest, "sheets", name)]
        named = [entry["kind"] for entry in entries if entry["kind"] != "unnamed"]
        right, near = (sum(kind in kinds for kind in named) for kinds in (("right",), ("right", "near")))
        count = f"{right} of {len(named)} shown {'is' if right == 1 else 'are'} right at top-1; "
        count += f"{near} {'has' if near == 1 else 'have'} the right name among the five best."
        count = count if named else ""
        sheets.append({"name": name, "count": count, "entries": entries})
    return sheets


def _sheet_entry(entry: Any) -> dict[str, Any]:
    best = [item for item in find_list(entry, "best") if isinstance(item, dict)]
    place = next((number for number, item in enumerate(best) if item.get("right")), None)
    has_caption = "caption" in find_dict(entry)
    captions = [text for text in find_list(entry, "captions") if isinstance(text, str)]
    kind = "right" if place == 0 else "near" if place is not None else "wrong"
    if has_caption and find_text(entry, "truth") is None:
        kind = "unnamed"  # its set has no classes
    missed = "wrong" if best else "not scored"
    png = find_text(entry, "png_base64") or ""
    width = _png_width(png)
    return {
        "png": png if width else "",
        # A whole multiple of the model's pixels, so that each stays a square; larger images are shrunk.
        "px": width * (_IMAGE_PX // width) if 0 < width <= _IMAGE_PX else _IMAGE_PX,
        "is_enlarged": width <= _IMAGE_PX,
        "truth": find_text(entry, "truth") or "; ".join(captions) or "unknown",
        "kind": kind,
        "verdict": _PLACES[min(place, 4)] if place is not None else missed,
        "best": [
            {
                "name": find_text(item, "name") or "",
                "cosine": f"{cosine:.3f}" if (cosine := find_number(item, "cosine")) is not None else "",
                "is_right": bool(item.get("right")),
            }
            for item in best
        ],
        "captions": captions,
        "has_caption": has_caption,
        "caption": find_text(entry, "caption") or "(empty)",
    }


def _png_width(png_base64: str) -> int:
    """Return the width of a PNG in pixels, from its header; 0 if it is no PNG."""
    try:
        header = base64.b64decode(png_base64[:32])
        return int(struct.unpack(">I", header[16:20])[0]) if header.startswith(b"\x89PNG") else 0
    except (ValueError, struct.error):
        return 0


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    """Return hardware, recipe and versions as rows; the last names what is missing."""
    environment = {key: str(value) for key, value in find_dict(run.summary, "environment").items()}
    refused, peak_gib = (find_number(run.newest_line, key) for key in ("data/refused_samples", "memory/peak_gib"))
    settings = (("optim", "lr"), ("optim", "schedule"), ("train", "precision"), ("train", "ema"), ("run", "seed"))
    recipe = {key: find_text(run.config, section, key) for section, key in settings}
    rows = [
        ("Hardware", environment.pop("hardware", None)),
        ("Device", find_text(run.summary, "facts", "device")),
        ("Batch", _batch(run)),
        ("Steps", _steps(run)),
        ("Time", _time(run)),
        ("Model", _model(run)),
        *([("Phases", _phases(run))] if run.phases else []),
        ("Recipe", ", ".join(f"{key} {value}" for key, value in recipe.items() if value)),
        ("Training data", _data(run)),
        *(
            [("Figures without EMA", ", ".join(_main_rates(without)))]
            if (without := find_dict(run.newest, "without_ema"))
            else []
        ),
        ("Refused samples", words.count(refused) if refused is not None else None),
        ("Peak memory", f"{peak_gib:.2f}{words.NBSP}GiB in the first worker" if peak_gib else None),
        ("Date", environment.pop("date", None)),
        ("Commit", environment.pop("commit", None)),
        ("Versions", ", ".join(f"{key}{words.NBSP}{value}" for key, value in environment.items())),
    ]
    missing = [label.lower() for label, value in rows if not value]
    known = [(label, value) for label, value in rows if value]
    return known + ([("Known at the end" if run.is_driven else "Not recorded", ", ".join(missing))] if missing else [])


def _batch(run: RunFiles) -> str:
    batch = run.global_batch_size
    workers = find_number(run.summary, "facts", "world_size")
    if not batch:
        return ""
    text = f"{words.counted(batch, 'pair')} per step"
    if workers:
        text += f" = {words.count(batch / workers)} on each of {words.counted(workers, 'training worker')}"
    return text + "; the loss sees all of them"


def _steps(run: RunFiles) -> str:
    planned = find_number(run.summary, "facts", "num_steps")
    first = find_number(run.summary, "facts", "first_step")
    text = f"{words.count(run.step)} of {words.count(planned)}" if planned else words.count(run.step)
    return text + (f"; last resumed from the checkpoint of step {words.count(first)}" if first else "")


def _phases(run: RunFiles) -> str:
    return "; ".join(
        f"{number} after {words.count(samples)} pairs: {changes}"
        for number, (samples, changes) in enumerate(run.phases, 1)
    )


def _time(run: RunFiles) -> str:
    train_s, total_s = find_number(run.summary, "train_s"), find_number(run.summary, "total_s")
    parts = [f"{words.duration(train_s)} training"] if train_s is not None else []
    parts += [f"{words.duration(total_s)} in all"] if total_s is not None else []
    session = " (last session)" if parts and find_number(run.summary, "facts", "first_step") else ""
    return ", ".join(parts) + session


def _model(run: RunFiles) -> str:
    parameters = find_dict(run.summary, "facts", "parameters_m")
    sizes = {key: value for key in ("all", "visual", "text") if (value := find_number(parameters, key)) is not None}
    name = find_text(run.config, "model", "name") or ("towers written out in the config" if run.config else "")
    parts = [name] if name else []
    if "all" in sizes:
        parts.append(f"{sizes['all']:,.1f}{words.NBSP}M parameters")
    labels = {"visual": "image tower", "text": "text tower"}
    parts += [f"{label} {sizes[key]:,.1f}{words.NBSP}M" for key, label in labels.items() if key in sizes]
    return ", ".join(parts)


def _data(run: RunFiles) -> str:
    samples, shards, size = (find_number(run.summary, "data", key) for key in ("samples", "shards", "bytes"))
    parts = [words.counted(samples, "pair")] if samples else []
    parts += [f"in {words.counted(shards, 'shard')}"] if shards else []
    parts += [f"({words.byte_count(size)})"] if size else []
    return " ".join(parts)
