"""A run with phases: small towers, two datasets, borders after steps 5 and 9 of 12."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sigray.orchestrator.config import RunConfig, load_config
from tests.helpers.data import write_dataset, write_small_run

BATCH, NUM_STEPS = 8, 12
FIRST, SECOND = 5, 9  # steps done at the borders
PHASES = [
    {
        "start": 40,
        "image_size": 32,
        "weights": {"fields": 1, "more": 3},
        "loss": {"negatives": "random", "negatives_fraction": 0.5},
        "optim": {"lr": 2e-3, "num_warmup_samples": 8, "weight_decay": 0.1, "beta2": 0.9},
        "schedule": "fresh",
    },
    {
        "start": 0.75,  # of 96
        "image_size": 24,
        "stretch": 2,
        "weights": {"fields": 1, "more": 0},
        "init_fresh": [r"text\.text_projection"],
    },
]


def phased_run(folder: Path, *overrides: str, phases: list[dict[str, Any]] = PHASES, **sections: Any) -> RunConfig:
    """Write its data and YAML, `run.yaml`; return the config."""
    write_dataset(folder / "more", [17, 6])
    shards = {
        "fields": {"shards": str(folder / "train"), "weight": 3},
        "more": {"shards": str(folder / "more"), "weight": 1},
    }
    path = write_small_run(
        folder,
        data={"shards": shards, "block_size": 8, "num_lanes": 2, "shuffle_window": 16},
        train={
            "num_samples": NUM_STEPS * BATCH, "global_batch_size": BATCH, "log_every_steps": 1, "ledger": True,
            "ema": 32,
        },
        checkpoint={"save_every_steps": 1, "keep_newest": 100},
        phases=phases,
        **sections,
    )  # fmt: skip
    return load_config(path, list(overrides))
