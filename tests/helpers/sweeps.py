"""Studies, trials and tables of sweeps, written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from sigray.tuning.search import Search
from sigray.tuning.study import Study, parse_study
from sigray.tuning.table import Table
from tests.helpers.data import COLOURS, TOWERS, write_dataset


def run_content() -> dict[str, Any]:
    return {
        "run": {"name": "base"},
        "data": {"shards": "tars"},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 1000, "global_batch_size": 20},
        "eval": {"sets": {"colours": {"shards": "held", "classes": "classes.json"}, "plain": {"shards": "held"}}},
    }


def write_small_study(folder: Path, run: dict[str, dict[str, Any]], **study: Any) -> Path:
    """Write shards, base.yaml and study.yaml of a sweep that trains; return the study's path.

    Args:
        run: keys to set in the base run; its number of samples is the budget.
    """
    write_dataset(folder / "train", [60, 40, 70, 30])
    write_dataset(folder / "held_out", [24])
    (folder / "classes.json").write_text(json.dumps([{"id": name, "name": name} for name in COLOURS]))
    base = {
        "run": {"name": "base", "dir": str(folder / "runs")},
        "data": {"shards": str(folder / "train"), "num_lanes": 3, "shuffle_window": 32},
        "model": {"towers": TOWERS},
        "train": {"global_batch_size": 24},
        "eval": {"sets": {"colours": {"shards": str(folder / "held_out"), "classes": str(folder / "classes.json")}}},
    }
    base |= {section: base.get(section, {}) | keys for section, keys in run.items()}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    content = {
        "name": "small",
        "base": "base.yaml",
        "dir": str(folder / "sweeps"),
        "metric": "retrieval.colours.image_to_text_r10",
        "budget": base["train"]["num_samples"],
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content | study, sort_keys=False))
    return path


def study_content(**changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "base": run_content(),
        "metric": "zero_shot.colours.top1",
        "budget": 900,
        "space": {"optim.lr": {"grid": [1e-3, 1e-2]}},
    } | changes


FIGURES = {"zero_shot": {"colours": {"top1": 0.5, "num_images": 24}}}


def trial(number: int, seed: int = 0, budget: int = 900, **values: Any) -> dict[str, Any]:
    values = values or {"optim.lr": 10.0**-number}
    return {"event": "trial", "number": number, "seed": seed, "budget": budget, "values": values, "overrides": values}


def result(number: int, rung: int, value: float, samples_seen: int | None = None) -> dict[str, Any]:
    seen = samples_seen or (300, 900)[rung]
    return {
        "event": "result",
        "number": number,
        "rung": rung,
        "samples_seen": seen,
        "value": value,
        "loss": 1.0,
        "figures": FIGURES,
    }


def decision(number: int, rung: int, answer: str) -> dict[str, Any]:
    return {"event": "decision", "number": number, "rung": rung, "answer": answer, "why": "because"}


def table_of(*events: dict[str, Any]) -> Table:
    table = Table()
    for event in events:
        table.add(event)
    return table


def study_of(folder: Path, **changes: Any) -> Study:
    content = study_content(
        dir=str(folder),
        rungs=[300],
        seeds=[0, 1],
        question="Does <b>it</b> matter?",
        space={
            "train.global_batch_size": {"grid": [2, 20, 200]},
            "loss.name": {"grid": ["sigmoid", "softmax"]},
            "optim.lr": {"expr": "train.global_batch_size / 1000"},
        },
        expect=[
            {"text": "The sigmoid leads.", "better": {"loss.name": "sigmoid"}, "worse": {"loss.name": "softmax"}},
            {
                "text": "Larger is worse.",
                "better": {"train.global_batch_size": 2},
                "worse": {"train.global_batch_size": 200},
                "where": {"loss.name": "softmax"},
            },
        ],
        figures=[
            {"title": "Against the batch", "x": "train.global_batch_size", "series": "loss.name", "every_rung": True},
            {"title": "A table", "kind": "table", "rows": "loss.name", "columns": "train.global_batch_size"},
        ],
    )
    return parse_study(content | changes, "study")


def full_table(study: Study) -> Table:

    table, search = Table(), Search(study)
    for number in range(search.num_trials):
        proposal = search.propose(number, [])
        values = proposal.point.values
        table.add(trial(number, proposal.seed, proposal.budget, **values))
        sigmoid = values.get("loss.name") == "sigmoid"
        for rung, seen in enumerate(study.config.rungs_of(proposal.budget)):
            value = 0.2 + 0.1 * rung + 0.2 * sigmoid + 0.01 * proposal.seed
            figures = {"top1": value, "chance1": 0.25, "num_images": 2000}
            table.add(
                {
                    "event": "result",
                    "number": number,
                    "rung": rung,
                    "samples_seen": seen,
                    "value": value,
                    "loss": 1.0,
                    "figures": {"zero_shot": {"colours": figures}, "retrieval": {}},
                }
            )
            last = seen == proposal.budget
            table.add(
                {"event": "decision", "number": number, "rung": rung, "answer": "stop" if last else "go on", "why": ""}
            )
    return table
