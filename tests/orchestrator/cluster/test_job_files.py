"""Each key that names a file: a job carries the file, keeps its path, or is refused by the key's name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from sigray.orchestrator.carried_files import FILES, find_carried, keep_carried
from sigray.orchestrator.cluster.job_files import JobFiles
from sigray.orchestrator.config import ConfigError, RunConfig, load_config, put
from sigray.tuning.job import settle_study
from sigray.tuning.study import StudyConfig, load_study
from sigray.workers.config import Place, Section
from sigray.workers.storage import Storage
from tests.helpers.sweeps import run_content, study_content

# Texts that name no file. A new key with a text is in this list, or its type has a `Place` (workers/config.py).
NO_FILES = {
    RunConfig: {
        "run.name", "data.image_keys", "data.captions", "data.languages", "data.resources_per_worker",
        "data.stores.s3_endpoint", "data.stores.gs_endpoint", "data.stores.az_endpoint",
        "data.stores.region", "data.stores.profile", "model.init_fresh", "model.tokenizer_sha256",
        "optim.groups.match", "phases.loss", "phases.optim", "phases.init_fresh", "phases.weights",
        "eval.sets.class_field", "eval.sets.templates", "eval.sets.languages",
        "eval.sets.language_captions", "cluster.address", "cluster.device", "cluster.tpu_type", "cluster.tpu_topology",
        "cluster.resources_per_worker", "cluster.train_callbacks", "checkpoint.keep_best", "eval.sets",
    },
    # base, overrides, space, and the values that claims and figures name: `settle_study` goes through them.
    StudyConfig: {
        "name", "question", "base", "overrides", "metric", "space", "space.grid", "space.cases", "space.choice",
        "space.expr", "space.when", "expect.text", "expect.better", "expect.worse", "expect.where", "expect.than_where",
        "figures.title", "figures.x", "figures.series", "figures.rows", "figures.columns", "figures.where", "scale",
        "scales",
    },
}  # fmt: skip


def texts(kind: Any, key: str) -> Iterator[tuple[str, bool]]:
    """Yield the keys whose values may hold a text, and whether a `Place` decides on them."""
    if isinstance(kind, type) and issubclass(kind, Section):
        for name, inner in get_type_hints(kind, include_extras=True).items():
            if name in kind.model_fields:
                yield from texts(inner, f"{key}.{name}".lstrip("."))
    elif kind in (str, Any):
        yield key, False
    elif any(isinstance(one, Place) for one in get_args(kind)):
        yield key, True
        for section in sections(kind):
            yield from texts(section, key)
    else:
        for member in get_args(kind):
            yield from texts(member, key)


def sections(kind: Any) -> Iterator[Any]:
    for member in get_args(kind):
        if isinstance(member, type) and issubclass(member, Section):
            yield member
        yield from sections(member)


@pytest.mark.parametrize("model", [RunConfig, StudyConfig])
def test_each_key_with_a_text_is_decided_on(model):
    undecided = {key for key, is_place in texts(model, "") if not is_place}
    assert undecided ^ NO_FILES[model] == set(), "give the type a Place, or list the key as one that names no file"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with files that a config may name; a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("a.json", "b.json", "weights.safetensors", "tower.pt"):
        Path(name).write_text(name)
    with Path("large.pt").open("wb") as file:
        file.truncate((16 << 20) + 1)
    Path("folder").mkdir()
    return tmp_path


def settled(key: str, value: Any) -> tuple[Any, JobFiles]:
    files = JobFiles()
    return files.settle_keys({key: value})[key], files


FILE_KEYS = ["model.tokenizer", "model.init_from", "model.image_tower", "eval.sets.a.classes"]


@pytest.mark.parametrize("key", FILE_KEYS)
@pytest.mark.parametrize("is_absolute", [False, True])
def test_a_small_file_is_carried(here, key, is_absolute):
    value, files = settled(key, str(here / "tower.pt") if is_absolute else "tower.pt")
    assert files.carried == {value: b"tower.pt"}
    assert value.startswith(f"{FILES}/")
    assert value.endswith("/tower.pt")
    assert not files.problems


SHARED_KEYS = [
    "run.storage", "data.shards", "data.shards.photos.shards", "data.shard_cache", "embeddings.store",
    "eval.sets.a.shards", "eval.sets.a.linear_probe",
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "why"), [
    *((key, "missing.pt", "is no file") for key in FILE_KEYS),
    ("model.init_from", "large.pt", "larger than 16 MiB"),
    ("model.image_tower", "large.pt", "larger than 16 MiB"),
    ("model.tokenizer", "folder", "is a folder"), ("model.init_from", "folder", "is a folder"),
    *((key, "folder", "a path on this machine") for key in SHARED_KEYS),
    ("data.shards", ["s3://b/tars", "tars"], "data.shards=tars is a path on this machine"),
    ("model.name", "local-dir:folder", "a path on this machine"),
    ("model.towers", {"text_cfg": {"hf_model_name": "folder"}}, "model.towers.text_cfg.hf_model_name=folder"),
])  # fmt: skip
def test_a_file_that_the_hosts_cannot_see_is_refused_by_its_key(here, key, value, why):
    _, files = settled(key, value)
    assert [key in problem and why in problem for problem in files.problems] == [True], files.problems
    assert "absolute path that all hosts see" in files.problems[0]


@pytest.mark.parametrize(("key", "value"), [
    *((key, f"s3://bucket/{key}") for key in SHARED_KEYS[:2]),
    *((key, "/mnt/elsewhere") for key in SHARED_KEYS),
    *((key, "/mnt/elsewhere/large.pt") for key in FILE_KEYS),
    ("model.name", "ViT-B-16-SigLIP"), ("model.name", "hf-hub:org/name"), ("model.init_from", "hf-hub:org/name"),
    ("model.name", "local-dir:/mnt/model"),
    ("model.tokenizer", "open_clip"), ("eval.sets.a.classes", "subfolders"), ("model.image_tower", "package.module:f"),
    ("run.name", "a.json"), ("train.num_samples", 5), ("data.captions", {"txt": 1}),
])  # fmt: skip
def test_other_values_stay(here, key, value):
    found, files = settled(key, value)
    assert (found, files.carried, files.problems) == (value, {}, [])


def test_a_carried_file_may_hold_no_key(here):
    Path("a.json").write_text(json.dumps({"key": "AKIA" + "A" * 16}))
    _, files = settled("model.tokenizer", "a.json")
    assert files.problems == ["model.tokenizer=a.json holds an Amazon access key"]


def study(**changes: Any) -> dict[str, Any]:
    base = run_content()
    for key, value in {
        "data.shards": "/tars",
        "eval.sets": {"colours": {"shards": "/held", "classes": "a.json"}},
    }.items():
        put(base, key, value, "base")
    return study_content(base=base) | changes


def test_a_study_carries_the_files_of_all_its_parts(here):
    space = {
        "model.tokenizer": {"grid": ["open_clip", "a.json", "b.json"]},
        "model.init_from": {"choice": [None, "weights.safetensors"]},
        "tower": {"cases": {"own": {"model.image_tower": "tower.pt"}}},
    }
    claim = {"text": "b", "better": {"model.tokenizer": "b.json"}, "worse": {"model.tokenizer": "a.json"}}
    files = JobFiles()
    content = settle_study(files, study(space=space, expect=[claim], overrides={"model.tokenizer": "b.json"}))
    assert files.problems == []
    assert {Path(name).name for name in files.carried} == {"a.json", "b.json", "weights.safetensors", "tower.pt"}
    grid = content["space"]["model.tokenizer"]["grid"]
    assert grid[0] == "open_clip"
    assert content["expect"][0]["better"] == {"model.tokenizer": grid[2]}
    assert content["overrides"]["model.tokenizer"] == grid[2]
    assert content["base"]["eval"]["sets"]["colours"]["classes"] == grid[1]
    assert content["space"]["tower"]["cases"]["own"]["model.image_tower"] in files.carried


@pytest.mark.parametrize(("change", "said"), [
    ({"storage": "out"}, "storage=out is a path"),
    ({"overrides": {"data.shards": "tars"}}, "data.shards=tars is a path"),
    ({"space": {"data.shards": {"grid": ["/a", "b"]}}}, "data.shards=b is a path"),
    ({"space": {"model.tokenizer": {"expr": "'a.json' if 1 < 2 else 'b.json'"}}}, "write grid or cases"),
    (
        {
            "space": {
                "model.tokenizer": {"grid": ["a.json", "open_clip"]},
                "optim.lr": {"grid": [1], "when": "model.tokenizer == 'a.json'"},
            }
        },
        "space.optim.lr compares model.tokenizer",
    ),
])  # fmt: skip
def test_a_study_is_refused_by_its_key(here, change, said):
    files = JobFiles()
    settle_study(files, study(**change))
    assert len(files.problems) == 1
    assert said in files.problems[0]


def test_a_run_keeps_its_carried_files_for_another_machine(here, monkeypatch):
    value, files = settled("model.tokenizer", "a.json")
    job, elsewhere = here / "job", here / "elsewhere"
    (job / value).parent.mkdir(parents=True)
    (job / value).write_bytes(files.carried[value])
    storage = Storage(here / "storage")
    monkeypatch.chdir(job)
    saved = {"model": {"tokenizer": str(job / value)}, "other": ["x"]}
    keep_carried(saved, storage)
    assert find_carried(saved, lambda: storage) == saved
    # The job's folder is gone: the file comes from the storage, below the same hash.
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    saved["model"]["tokenizer"] = f"/gone/{value}"
    found = find_carried(saved, lambda: storage)["model"]["tokenizer"]
    assert Path(found).read_text() == "a.json"
    assert found.endswith(value)
    # A resubmission names the file in its own folder, so that the sweep is the same.
    monkeypatch.chdir(job)
    assert find_carried(saved, lambda: storage)["model"]["tokenizer"] == str(job / value)
    # A file that was replaced in the storage is no input.
    storage.write(value, b"other")
    Path(found).unlink()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(ValueError, match="another content"):
        find_carried(saved, lambda: storage)


def test_a_config_and_a_study_are_read_from_a_bucket(s3_variables, monkeypatch, tmp_path):
    for name, value in s3_variables.items():
        monkeypatch.setenv(name, value)
    storage = Storage("s3://sigray/configs")
    storage.write("base.yaml", yaml.safe_dump(run_content()).encode())
    storage.write("study.yaml", yaml.safe_dump(study_content(base="base.yaml")).encode())
    assert load_config("s3://sigray/configs/base.yaml", ["run.name=other"]).run.name == "other"
    assert load_study("s3://sigray/configs/study.yaml").base["train"]["global_batch_size"] == 20
    with pytest.raises(ConfigError, match="s3://sigray/configs/no.yaml: no such file"):
        load_config("s3://sigray/configs/no.yaml")
    with pytest.raises(ConfigError, match=r"ftp://.* give a local path or s3://"):
        load_config("ftp://host/no.yaml")
