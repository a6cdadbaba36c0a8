"""Any content of any file that a command reads: it works, or one kind of error names the file."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sigray.orchestrator.cluster.files import check_cluster_file
from sigray.orchestrator.config import ConfigError, load_config
from sigray.orchestrator.reports.foreign_folder import ForeignFolder
from sigray.orchestrator.reports.run_files import read_run_files
from sigray.orchestrator.run.export import _figures
from sigray.orchestrator.run_folder import RunFolder, read_run
from sigray.tuning.study import load_study, read_study
from sigray.tuning.table import read_table
from sigray.workers.checkpoint.index import (
    CheckpointError,
    list_checkpoints,
    newest_checkpoint,
    read_info,
    read_metrics,
)
from sigray.workers.checkpoint.lease import is_driven, read_lease
from sigray.workers.data.embedding_store import EmbeddingStore
from sigray.workers.data.tar import DataError
from sigray.workers.evaluation.datasets import read_classes
from sigray.workers.storage import Storage

ROOT = Path(load_config.__code__.co_filename).resolve().parents[1]
RUN = Path(__file__).parents[1] / "data" / "run_2026_11" / "run"
STEP = max(folder.name for folder in (RUN / "checkpoints").iterdir())
LEASE = {"owner": "a", "host": "b", "boot": "c", "pid": 1, "expires": 1e9}
EVALUATION = {"step": 4, "samples_seen": 32, "zero_shot": {"a": {"top1": 0.5}}, "retrieval": {}}
KEY = {"members": ["json", "txt"], "dtype": "fp16"}
STORED = {"part": "train", "source": "a.tar", "source_bytes": 1, "source_fingerprint": "x"}
STORED |= {"num_samples": 1, "num_refused": 0, "num_bytes": 1, "refused": {}}
EVENTS = [
    {"event": "trial", "number": 0, "seed": 0, "budget": 8, "values": {"optim.lr": 0.1}, "overrides": {}},
    {"event": "result", "number": 0, "rung": 0, "samples_seen": 8, "value": 0.5, "loss": 1.0, "figures": {}},
    {"event": "decision", "number": 0, "rung": 0, "answer": "stop", "why": "done"},
    {"event": "stream", "decoded": 1, "served": 2, "cpu_s": 0.5},
    {"event": "failed", "number": 0, "why": "x"},
]


def read_a_run(folder: Path) -> None:
    storage = Storage(folder)
    newest_checkpoint(storage)
    read_info(storage, STEP)
    read_lease(storage)
    is_driven(storage)
    config = read_run(str(folder))
    run = RunFolder(config)
    run.path, run.storage = folder, storage
    run.manifest()
    run.metrics()
    for info in list_checkpoints(storage):
        _figures(run, info, ema=False)
    found = read_run_files(ForeignFolder(Storage(folder)))
    assert found.status
    assert found.samples_seen >= 0
    read_metrics(storage)
    from sigray.workers.checkpoint.writer import read_best, read_left_out

    read_best(storage)
    read_left_out(storage)


def read_a_sweep(folder: Path) -> None:
    read_study(str(folder))
    load_study(folder / "study.yaml", ["optim.weight_decay=0.1"])
    table = read_table(Storage(folder))
    assert all(row.status and row.key for row in table.rows.values())


def read_a_store(folder: Path) -> None:
    store = EmbeddingStore(str(folder))
    store.format().prefix()
    store.check(KEY)
    store.complete("train")
    sum(entry.num_images for entry in store.history())


def read_single_files(folder: Path) -> None:
    read_classes(str(folder / "classes.json"))
    load_config(folder / "config.yaml", ["optim.lr=1e-3"])
    check_cluster_file(folder / "cluster.yaml")


def lines(*entries: Any) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def study() -> dict[str, Any]:
    return load_study(next((ROOT / "tuning" / "studies").glob("batch_size.yaml"))).config.model_dump(mode="json")


# What reads a folder, and its files; None: those of a run that a sigray of 2026-11 wrote.
FOLDERS: dict[str, tuple[Callable[[Path], None], dict[str, Any]]] = {
    "run": (
        read_a_run,
        {
            "config.yaml": None,
            "manifest.json": None,
            f"checkpoints/{STEP}/commit.json": None,
            "lease.json": LEASE,
            "best_checkpoint.json": {"name": STEP, "figure": 0.5},
            "left_out.json": {"steps": [3]},
            "summary.json": EVALUATION | {"steps": 4, "status": "finished"},
            "metrics.jsonl": {"step": 1, "samples_seen": 8},
            "metrics/0000000000-0000000004.jsonl": {"step": 1, "samples_seen": 8},
            "evaluations/step-0000000004.json": EVALUATION,
        },
    ),
    "sweep": (read_a_sweep, {"study.yaml": study, "results.jsonl": EVENTS}),
    "store": (
        read_a_store,
        {
            "store.json": {"version": 1, "key": KEY, "format": {"dtype": "fp16", "dim": 4, "num_views": 1}},
            "train/a.json": STORED,
            "history/00000.json": {"num_images": 1, "seconds": 1.0},
        },
    ),
    "files": (
        read_single_files,
        {
            "classes.json": [{"id": "0", "name": "a"}],
            "config.yaml": lambda: yaml.safe_load((ROOT / "examples" / "emoji_cpu.yaml").read_text()),
            "cluster.yaml": lambda: yaml.safe_load((ROOT / "cluster.yaml").read_text()),
        },
    ),
}
NASTY = st.sampled_from(
    [
        *(None, True, -1, 0, 2**70, 10**400, 10**4000, 1e308, float("nan"), float("inf"), "", "x", "\0", [], {}, [[]]),
        *({"a": {}}, [None], functools.reduce(lambda value, _: [value], range(150), 0), ["x"] * 50, {"": 1}),
    ]
)


@functools.cache
def original(kind: str, name: str) -> Any:
    content = FOLDERS[kind][1][name]
    if content is None:
        return yaml.safe_load((RUN / name).read_text().replace("@", "/x"))
    return content() if callable(content) else content


def encoded(name: str, value: Any) -> bytes:
    if name.endswith(".yaml"):
        return yaml.dump(value, Dumper=yaml.CSafeDumper).encode()
    return lines(*value) if name.endswith(".jsonl") and isinstance(value, list) else json.dumps(value).encode()


def write(folder: Path, kind: str) -> None:
    for name in FOLDERS[kind][1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(name, original(kind, name)))


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(one for key, each in pairs for one in paths(each, (*path, key)))]


@st.composite
def content(draw, kind: str, name: str) -> bytes:
    way = draw(st.sampled_from(["bytes", "value", "other", "missing", "extra", "deep"]))
    if way == "bytes":
        return draw(st.binary(max_size=50))
    if way == "deep":
        return draw(st.sampled_from([b"[", b'{"a":', b"- "])) * 100_000
    if way == "value":
        return encoded(name, draw(NASTY))
    value = copy.deepcopy(original(kind, name))
    *parents, last = draw(st.sampled_from(paths(value)[1:]))
    place = value
    for key in parents:
        place = place[key]
    if way == "missing":
        del place[last]
    elif way == "other" or not isinstance(place, dict):
        place[last] = draw(NASTY)
    else:
        place["more"] = draw(NASTY)
    return encoded(name, value)


FILES = [(kind, name) for kind, (_, files) in FOLDERS.items() for name in files]


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_files_can_be_read(kind, tmp_path) -> None:
    write(tmp_path, kind)
    FOLDERS[kind][0](tmp_path)


@pytest.mark.parametrize(("kind", "name"), FILES)
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_other_content_gives_one_kind_of_error(kind, name, data) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        write(folder, kind)
        (folder / name).write_bytes(data.draw(content(kind, name)))
        FOLDERS[kind][0](folder)
    except (ConfigError, CheckpointError, DataError) as error:
        message = str(error)
        # A checkpoint is named by its folder, a store by the config's key.
        names = (name, name.rpartition("/")[0] or name, f"embeddings.store={folder}")
        assert any(part in message for part in names)
    finally:
        shutil.rmtree(folder)
