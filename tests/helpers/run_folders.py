"""Run folders as training leaves them, written out: metrics, evaluations with hostile names, summary."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

SET, OTHER = "held_out_designer", "held_out_concepts"
HOSTILE = "<script>alert('x')</script> & co"


def zero_shot(top1: float, top5: float, num_classes: int, num_images: int) -> dict[str, Any]:
    figures = {"top1": top1, "top5": top5, "num_classes": num_classes, "num_images": num_images, "num_refused": 0}
    return figures | {"chance1": 1 / num_classes, "chance5": min(5, num_classes) / num_classes}


def retrieval(recall: float, num: int, num_distinct: int | None = None) -> dict[str, Any]:
    distinct = num_distinct or num
    figures: dict[str, Any] = {"num_images": num, "num_captions": num, "num_distinct_captions": distinct}
    for way in ("image_to_text", "text_to_image", "merged_image_to_text", "merged_text_to_image"):
        for k in (1, 5, 10):
            figures |= {f"{way}_r{k}": recall * k, f"{way}_chance{k}": k / num}
    return figures


def png() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def sheet_entry(truth: str, names: list[str]) -> dict[str, Any]:
    best = [{"name": name, "cosine": 0.5 - n / 10, "right": name == truth} for n, name in enumerate(names)]
    return {"png_base64": png(), "truth": truth, "best": best}


def evaluation(step: int, top1: float, top5: float) -> dict[str, Any]:
    right = sheet_entry("ant", ["ant", "bee", "cow", "dog", "elk"])
    near = sheet_entry(HOSTILE, ["bee", HOSTILE, "cow", "dog", "elk"])
    wrong = sheet_entry("zebra", ["ant", "bee", "cow", "dog", "elk"])
    return {
        "step": step,
        "samples_seen": step * 256,
        "zero_shot": {SET: zero_shot(top1, top5, 1720, 1720), OTHER: zero_shot(0.066, 0.188, 180, 1221)},
        "retrieval": {SET: retrieval(0.02, 1720)},
        "sheets": {SET: [right, near, wrong, wrong], OTHER: []},
    }


def metrics_line(step: int) -> dict[str, float]:
    return {
        "step": step,
        "samples_seen": step * 256,
        "train/loss": 10.0 / step,
        "train/logit_scale": 10.0,
        "train/logit_bias": -10.0,
        "train/grad_norm": 1.0,
        "train/learning_rate": 1e-3,
        "throughput/samples_per_s": 417.0,
        "data/wait_pct": 1.2,
        "data/refused_samples": 3,
        "memory/peak_gib": 1.25,
    }


CONFIG = {
    "run": {"name": "demo", "seed": 7},
    "data": {"shards": HOSTILE},
    "train": {"num_samples": 84900, "global_batch_size": 256, "precision": "fp32"},
    "optim": {"lr": 0.001, "schedule": "cosine"},
    "model": {"name": None, "towers": {}},
    "eval": {"sets": {SET: {}, OTHER: {}}},
}
SUMMARY: dict[str, Any] = {
    "name": "demo",
    "status": "finished",
    "steps": 332,
    "samples_seen": 84992,
    "train_s": 200.4,
    "total_s": 3725.0,
    "loss": 2.0,
    "facts": {
        "device": "cpu",
        "world_size": 2,
        "global_batch_size": 256,
        "batch_per_worker": 128,
        "micro_batch_size": 128,
        "parameters_m": {"all": 2.03, "visual": 0.91, "text": 1.12},
        "weight_decay": "0.0001 on matrices: 2.0 M of 2.0 M parameters",
        "first_step": 0,
        "num_steps": 332,
        "epochs": 8.48,
    },
    "data": {"shards": 20, "samples": 10022, "bytes": 47_185_920},
    "zero_shot": {
        SET: zero_shot(0.026, 0.1012, 1720, 1720) | {"pixel_baseline_top1": 0.456},
        OTHER: zero_shot(0.066, 0.188, 180, 1221) | {"pixel_baseline_top1": 0.0},
    },
    "retrieval": {},
    "environment": {
        "sigray": "0.1.0",
        "torch": "2.9.1",
        "hardware": "Xeon, 2 cores",
        "commit": "abc",
        "date": "2026-1-2",
    },
}


def write_run(
    folder: Path,
    *,
    config: Any = CONFIG,
    metrics: list[dict[str, float]] | None = None,
    evaluations: list[dict[str, Any]] | None = None,
    summary: Any = SUMMARY,
) -> Path:
    """A run folder; None leaves a file out, except that metrics and evaluations have full ones by default."""
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [metrics_line(step) for step in range(10, 333, 10)] + [metrics_line(332)] if metrics is None else metrics
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "evaluations").mkdir()
    done = [evaluation(160, 0.01, 0.05), evaluation(332, 0.026, 0.1012)] if evaluations is None else evaluations
    for each in done:
        (folder / "evaluations" / f"step-{each['step']:010d}.json").write_text(json.dumps(each))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def add_line(folder: Path, step: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics_line(step)) + "\n")
