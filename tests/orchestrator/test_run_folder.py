"""The lines of metrics in a run's folder, and what --overwrite deletes there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from sigray.orchestrator.cli.main import main
from sigray.orchestrator.config import ConfigError, RunConfig, override, parse_config
from sigray.orchestrator.run_folder import EVENTS, METRICS, SUMMARY, RunFolder, left_message
from sigray.workers.checkpoint.lease import LEASE_FILE
from sigray.workers.data.manifest import Manifest
from sigray.workers.storage import StorageError
from tests.helpers.data import TOWERS
from tests.helpers.s3 import BUCKET


@pytest.fixture
def folder(tmp_path):
    content = {
        "run": {"name": "a", "dir": str(tmp_path)},
        "data": {"shards": "/tars"},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 64, "global_batch_size": 16},
    }
    found = RunFolder(parse_config(content, "a"))
    found.path.mkdir()
    return found


@pytest.fixture
def config(folder) -> RunConfig:
    content = {
        "run": {"name": "a", "dir": str(folder.path.parent)},
        "data": {"shards": "/tars"},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 64, "global_batch_size": 16},
    }
    return parse_config(content, "a")


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def steps(folder: RunFolder) -> list[float]:
    return [line["step"] for line in folder.metrics()]


def test_the_first_line_of_a_step_stays(folder):
    for step in (1, 2, 3, 4):
        folder.append_metrics({"step": step, "attempt": 1})
    for attempt, first in ((2, 2), (3, 0)):
        folder.restore_metrics(first)
        assert folder.newest_line().get("step", 0) == first
        for step in range(first + 1, 6):
            folder.append_metrics({"step": step, "attempt": attempt})
    assert [(line["step"], line["attempt"]) for line in folder.metrics()] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2)]
    assert folder.newest_line() == {"step": 5, "attempt": 3}


def test_the_next_driver_keeps_the_first_line_too(folder, config):
    folder.append_metrics({"step": 1, "attempt": 1})
    RunFolder(config).append_metrics({"step": 1, "attempt": 2})
    RunFolder(config).append_metrics({"step": 2, "attempt": 2})
    assert [line["attempt"] for line in folder.metrics()] == [1, 2]


def test_another_machine_takes_the_lines_of_the_storage(config, tmp_path):
    here, there = (
        RunFolder(override(config, [f"run.storage={tmp_path}/shared", f"run.dir={tmp_path}/{name}"], "test"))
        for name in ("here", "there")
    )
    for folder in (here, there):
        folder.path.mkdir(parents=True)
    for step in (1, 2, 3):
        here.append_metrics({"step": step, "attempt": 1})
    here.upload_records()
    there.storage.write(
        "metrics/0000000000-0000000002.jsonl", b'{"step": 1, "attempt": 2}\n{"step": 2, "attempt": 2}\n'
    )
    there.restore_metrics(2)
    there.append_metrics({"step": 3, "attempt": 3})
    assert [(line["step"], line["attempt"]) for line in there.metrics()] == [(1, 1), (2, 1), (3, 1)]


def test_a_shared_folder_gets_the_records_as_a_bucket_does(config, tmp_path):
    config = override(config, [f"run.storage={tmp_path}/shared"], "test")
    folder = RunFolder(config)
    folder.begin(config, Manifest(()))
    folder.save_summary({"facts": {}})
    folder.append_event("starting", "note")
    folder.upload_records()
    assert all((tmp_path / "shared" / config.run.name / name).exists() for name in (SUMMARY, EVENTS))


def test_a_line_that_a_crash_cut_short_is_left_out(folder):
    folder.append_metrics({"step": 1})
    with (folder.path / METRICS).open("a") as file:
        file.write(json.dumps({"step": 2})[:-4])
    assert steps(folder) == [1]


def test_what_a_run_writes_is_deleted_and_the_rest_named(folder, config):
    folder.begin(config, Manifest(()))
    folder.append_metrics({"step": 1})
    folder.save_evaluation({"step": 1})
    folder.save_summary({})
    put(
        folder.path,
        "checkpoints/step-0000000004/model.safetensors",
        "checkpoints/step-0000000004/commit.json",
        "checkpoints/step-0000000004/commit.json.0123456789abcdef0123456789abcdef.tmp",
        "metrics/0000000000-0000000004.jsonl",
        "ledger/0000000000-0000000004-rank-0.parquet",
        "tensorboard/events.out.tfevents.1.host.2.0",
        "export/onnx/visual.onnx",
        "report.html",
    )
    mine = [f"checkpoints/note-{number:02}.txt" for number in range(12)]
    put(folder.path, *mine, "metrics/mine.txt", "photos/1.jpg", LEASE_FILE)
    folder.check_clear(config)
    left = folder.clear()
    found = sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file())
    assert found == sorted([*mine, "metrics/mine.txt", "photos/1.jpg", LEASE_FILE])
    assert not (folder.path / "ledger").exists()
    assert left_message(left).startswith(f"files that sigray did not write are left: {folder.path}/{mine[0]}, ")
    assert left_message(left).endswith(f"{mine[9]} and 4 more")


def test_a_symlink_is_deleted_and_not_followed(folder, config, tmp_path):
    put(tmp_path, "elsewhere/step-0000000004/commit.json", "elsewhere/config.yaml", "other/1.jpg")
    folder.begin(config, Manifest(()))
    (folder.path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (folder.path / "tensorboard").mkdir()
    (folder.path / "tensorboard" / "events.out.tfevents.1").symlink_to(tmp_path / "elsewhere" / "config.yaml")
    (folder.path / "mine").symlink_to(tmp_path / "other")
    assert folder.clear() == [f"{folder.path}/mine"]
    assert sorted(path.name for path in folder.path.iterdir()) == ["mine"]
    assert (tmp_path / "elsewhere/step-0000000004/commit.json").read_text() == "x"
    assert (tmp_path / "elsewhere/config.yaml").read_text() == "x"


@pytest.mark.parametrize(
    "key", ["data.shards", "model.init_from", "model.tokenizer", "eval.sets.x.shards", "eval.sets.x.classes"]
)
@pytest.mark.parametrize("way", ["{run}/in/{{000..002}}.tar", "{link}/in/a.tar", "in/a.tar", "{run}"])
def test_a_folder_with_an_input_of_the_run_is_refused(folder, config, tmp_path, monkeypatch, key, way):
    folder.begin(config, Manifest(()))
    put(folder.path, "in/a.tar")
    (tmp_path / "link").symlink_to(folder.path)
    monkeypatch.chdir(folder.path)
    path = way.format(run=folder.path, link=tmp_path / "link")
    more = [] if key.startswith("eval.sets.x.shards") else ["eval.sets.x.shards=/y"] if "eval" in key else []
    wanted = override(config, [f"{key}={json.dumps(path)}", *more], "test")
    with pytest.raises(ConfigError, match=rf"{key}=.* is in {folder.path}, which --overwrite clears"):
        folder.check_clear(wanted)


@pytest.mark.parametrize(
    ("text", "has_manifest", "reason"),
    [
        ("a: 1", True, "has no data"),
        ("[", True, "not YAML"),
        ("run: {}\ndata: {}\ntrain: {}\n", False, "holds a config.yaml but no manifest.json"),
    ],
)
def test_a_folder_of_something_else_is_refused(folder, config, text, has_manifest, reason):
    (folder.path / "config.yaml").write_text(text)
    if has_manifest:
        put(folder.path, "manifest.json")
    with pytest.raises(ConfigError, match=f"{reason}.*--overwrite deletes only what sigray wrote"):
        folder.check_clear(config)


def test_a_run_in_s3_is_cleared_the_same_way(config, s3_variables, monkeypatch):
    for name, value in s3_variables.items():
        monkeypatch.setenv(name, value)
    remote = override(config, [f"run.storage=s3://{BUCKET}/runs"], "test")
    folder = RunFolder(remote)
    folder.begin(remote, Manifest(()))
    folder.storage.write("checkpoints/step-0000000004/commit.json", b"x")
    folder.storage.write("photos/1.jpg", b"x")
    folder.check_clear(remote)
    assert folder.clear() == [f"{folder.storage.uri}/photos/1.jpg"]
    assert folder.storage.walk() == ["photos/1.jpg"]
    inside = override(remote, [f"data.shards={folder.storage.uri}/x.tar"], "test")
    with pytest.raises(ConfigError, match=r"data.shards=s3://.* is in s3://"):
        folder.check_clear(inside)


@pytest.mark.parametrize("name", [METRICS, EVENTS])
def test_a_full_disk_is_named(folder, name, monkeypatch, capsys):
    """The kernel's own ENOSPC: a file that is /dev/full; the command line adds what to do."""
    folder.restore_metrics(0)  # knows the lines so far: /dev/full can be read for ever
    (folder.path / name).unlink(missing_ok=True)
    (folder.path / name).symlink_to("/dev/full")
    write = {METRICS: lambda: folder.append_metrics({"step": 1}), EVENTS: lambda: folder.append_event("a", "note")}
    with pytest.raises(OSError, match=f"No space left on device: '{folder.path / name}'"):
        write[name]()

    def load(*_: object) -> None:
        write[name]()

    monkeypatch.setattr("sigray.orchestrator.cli.plan.load_config", load)
    assert main(["config", "a.yaml"]) == 2
    said = capsys.readouterr().err
    assert f"{folder.path / name}': free space there, or choose another place by run.dir, run.storage" in said


def test_a_write_to_a_full_disk_leaves_nothing_and_names_the_file(folder, monkeypatch):
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sigray.workers.storage.os.fsync", refuse)
    with pytest.raises(OSError, match=f"No space left on device: '{folder.path}/summary.json'"):
        folder.save_summary({"status": "finished"})
    assert list(folder.path.iterdir()) == []
    with pytest.raises(StorageError, match="is not writable: .*No space left on device"):
        folder.storage.check_writable()
    assert list(folder.path.iterdir()) == []
