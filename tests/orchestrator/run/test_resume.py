"""Each key of a run is fixed on a resume, or free; the docs list the free ones."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from sigray.orchestrator.config import ConfigError, RunConfig, check_resume
from sigray.workers.config import PhaseConfig
from tests.mutations.keys import leaf_keys

DOCS = Path(__file__).parents[3] / "docs" / "operations.md"
# Every section that may be left out, and an entry wherever names are the user's.
CONTENT: dict[str, Any] = {
    "run": {"name": "saved", "dir": "/runs", "storage": "/storage"},
    "data": {"shards": {"name": {"shards": "/tars", "weight": 2}}},
    "model": {"name": "ViT-B-16-SigLIP", "decoder": {}, "heads": {}},
    "train": {
        "ema": 64,
        "num_samples": 64,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "label_noise": {"kind": "text", "fraction": 0.5},
    },
    "loss": {"caption_weight": 1, "distill": {}},
    "optim": {"groups": [{"match": "text.*"}]},
    "phases": [{"start": 48, "weights": {"name": 1}, "optim": {}, "loss": {}}],
    "eval": {"sets": {"name": {"shards": "/held_out"}}},
}


def keys_in_docs() -> list[str]:
    """Backticked keys of the middle column."""
    part = DOCS.read_text().partition("## What may change on a resume")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in part.splitlines() if line.startswith("| ") and "may change" not in line]
    return [key for row in rows for key in re.findall(r"`([^`]+)`", row[2])]


def is_free(key: str) -> bool:
    """Whether the docs say so."""
    return any(key == free or (free.endswith(".*") and key.startswith(free[:-1])) for free in keys_in_docs())


def another(value: Any) -> Any:
    """Another value, of the same type if there is one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 or 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, list | tuple):
        return [*value, *value] or ["x"]
    return {"x": 1} if value == {} else {} if isinstance(value, dict) else 1


def changed(key: str) -> RunConfig:
    """The config with another value at a key; not validated, as a check of all sections would allow some changes only
    together."""
    content = copy.deepcopy(RunConfig.model_validate(CONTENT).model_dump())
    place: Any = content
    *path, last = key.split(".")
    for part in path:
        place = place[0] if isinstance(place, list) else place[next(iter(place)) if part == "*" else part]
    if key == "data.shards":
        place[last] = "/other"
    else:
        assert last in place
        place[last] = another(place[last])
    config = RunConfig.model_construct(**content)
    for name, field in RunConfig.model_fields.items():
        section: Any = field.annotation
        if name == "phases":
            config.__dict__[name] = [PhaseConfig.model_construct(**phase) for phase in content[name]]
        else:
            config.__dict__[name] = section.model_construct(**content[name])
    return config


@pytest.mark.parametrize("key", leaf_keys())
def test_a_changed_key_is_refused_or_free(key):
    saved = RunConfig.model_validate(CONTENT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are not validated
        try:
            check_resume(saved, changed(key))
            refused = ""
        except ConfigError as error:
            refused = str(error)
    assert bool(refused) != is_free(key)
    if refused:
        name = key.partition(".*")[0]
        assert f"{name}" in refused


def test_the_docs_name_keys_that_exist():
    known = leaf_keys()
    for free in keys_in_docs():
        assert free in known or (free.endswith(".*") and any(key.startswith(free[:-1]) for key in known)), free


def test_an_unchanged_config_goes_on():
    check_resume(RunConfig.model_validate(CONTENT), RunConfig.model_validate(CONTENT))


def test_a_tower_keeps_its_value_by_its_former_name():
    """Runs that began before the package was called sigray have the name in their config.yaml."""
    former, now = (
        RunConfig.model_validate(CONTENT | {"model": CONTENT["model"] | {"image_tower": f"{name}:efficientnet_lite0"}})
        for name in ("workers.image_towers", "sigray.workers.model.image_towers")
    )
    check_resume(former, now)
    assert former.model.image_tower == "sigray.workers.model.image_towers:efficientnet_lite0"
