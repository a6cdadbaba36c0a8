"""The process of the trackers and the driver's side of it, and each tracker with its own library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sigray.orchestrator.config import ConfigError
from sigray.orchestrator.reports.foreign_folder import ForeignFolder
from sigray.orchestrator.reports.run_files import read_run_files
from sigray.orchestrator.run import tracker_process
from sigray.orchestrator.run.summary import summarize
from sigray.orchestrator.run.tracker_process import TrackerProcess, check_trackers
from sigray.orchestrator.run_folder import METRICS, RunFolder, TrackedAs
from sigray.orchestrator.trackers import sender
from sigray.orchestrator.trackers.feed import Feed, Row, Shown
from sigray.orchestrator.trackers.tensorboard_files import TensorBoard
from sigray.orchestrator.trackers.wandb_run import WandB, read_history
from sigray.workers.data.manifest import Manifest
from sigray.workers.storage import Storage
from tests.helpers.played_run import line_of, played_config
from tests.helpers.run_folders import SET, evaluation


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    config = played_config(tmp_path, ["tensorboard"])
    run = RunFolder(config)
    run.path.mkdir()
    run.begin(config, Manifest(()))
    run.tracked_as("played", "")
    return run


class Kept:
    """A tracker that keeps rows; `before_send` may raise or hang."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.notes: dict[str, str] = {}
        self.closed: list[str] = []
        self.num_opened = 0

    def open(self) -> Shown:
        self.num_opened += 1
        shown = Shown()
        for row in self.rows:
            shown.add(row)
        return shown

    def before_send(self, row: Row) -> None:
        pass

    def send(self, rows: list[Row]) -> None:
        for row in rows:
            self.before_send(row)
            self.rows.append(row)

    def note(self, notes: dict[str, str]) -> None:
        self.notes |= notes

    def close(self, status: str) -> None:
        self.closed.append(status)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "_POLL_S", 0.01)


def send_all(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, finish_s: float = 60, **trackers: Any
) -> tuple[list[str], list[str]]:
    """Send an ended run; return which trackers lack something, and what was said."""
    monkeypatch.setattr(sender, "ADAPTERS", {name: lambda *_, kept=kept: kept for name, kept in trackers.items()})
    ended, said = threading.Event(), []
    ended.set()
    return sender.send(run.path, list(trackers), ended, said.append, finish_s), said


def lines_in(rows: list[Row]) -> list[int]:
    return [row.step for row in rows if not row.is_evaluation]


def test_a_tracker_gets_lines_evaluations_and_the_end(run, quick, monkeypatch):
    for step in (1, 2, 3):
        run.append_metrics(line_of(step))
    run.save_evaluation(evaluation(2, 0.25, 0.5) | {"without_ema": evaluation(2, 0.125, 0.5)})
    run.save_summary({"status": "finished"})
    kept = Kept()
    assert send_all(run, monkeypatch, kept=kept) == ([], [])
    assert lines_in(kept.rows) == [1, 2, 3]
    assert kept.rows[0].figures["train/loss"] == 1 / 3 + 10
    figures = kept.rows[3].figures
    assert (figures[f"zero_shot_{SET}/top1"], figures[f"without_ema_zero_shot_{SET}/top1"]) == (0.25, 0.125)
    assert f"zero_shot_{SET}/num_images" not in figures
    assert kept.rows[3].images[f"images/{SET}"][0].truth == "ant"
    assert (kept.notes["status"], kept.closed) == ("finished", ["finished"])


def test_a_failed_tracker_is_asked_what_it_has(run, quick, monkeypatch):
    for step in (1, 2, 3, 4):
        run.append_metrics(line_of(step))
    kept = Kept()

    def fail_once(row: Row) -> None:
        if row.step == 3 and kept.num_opened == 1:
            kept.rows.append(row)  # it took the row, and the answer was lost
            raise ConnectionError("https://user:word@host is away, key secret-key")

    kept.before_send = fail_once
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    behind, said = send_all(run, monkeypatch, kept=kept)
    assert behind == []
    assert lines_in(kept.rows) == [1, 2, 3, 4]
    assert "https://...@host is away, key $WANDB_API_KEY" in said[0]


def test_a_tracker_that_hangs_stops_no_other_and_not_the_end(run, quick, monkeypatch):
    run.append_metrics(line_of(1))
    hanging, other, released = Kept(), Kept(), threading.Event()
    hanging.before_send = lambda row: released.wait(30)
    behind, _ = send_all(run, monkeypatch, 0.2, hanging=hanging, other=other)
    released.set()
    assert behind == ["hanging"]
    assert lines_in(other.rows) == [1]


def test_images_have_the_captions_that_a_decoder_wrote(run):
    done = evaluation(2, 0.25, 0.5)
    png = done["sheets"][SET][0]["png_base64"]
    done["sheets"][SET][0] |= {"captions": ["an ant"], "caption": "a bee"}
    done["sheets"]["unnamed"] = [{"png_base64": png, "captions": ["an ant", "ants"], "caption": ""}]
    run.save_evaluation(done)
    (row,) = Feed(run.path, Shown()).rows()
    named, unnamed = row.images[f"images/{SET}"][0], row.images["images/unnamed"][0]
    assert (named.truth, named.best) == ("ant", ["ant", "bee", "cow", "dog", "elk", "caption: a bee"])
    assert (unnamed.truth, unnamed.best) == ("an ant; ants", ["caption: "])


def test_a_later_figure_of_an_evaluation_is_sent_alone(run):
    run.save_evaluation(evaluation(2, 0.25, 0.5))
    shown = Shown()
    feed = Feed(run.path, shown)
    for row in feed.rows():
        shown.add(row)
    assert list(feed.rows()) == []
    later = evaluation(2, 0.25, 0.5)
    later["zero_shot"][SET]["pixel_baseline_top1"] = 0.4
    run.save_evaluation(later)
    os.utime(run.path / "evaluations" / "step-0000000002.json", (1, 1))
    (row,) = feed.rows()
    assert row.figures == {f"zero_shot_{SET}/pixel_baseline_top1": 0.4}
    assert row.images == {}


def test_a_half_written_line_is_read_when_it_is_whole(run):
    text = json.dumps(line_of(1)) + "\n"
    feed = Feed(run.path, Shown())
    (run.path / METRICS).write_text(text[:30])
    assert list(feed.rows()) == []
    with (run.path / METRICS).open("a") as file:
        file.write(text[30:])
    assert lines_in(list(feed.rows())) == [1]


def test_lines_of_a_file_that_was_replaced_are_not_sent_twice(run):
    run.append_metrics(line_of(1))
    shown = Shown()
    feed = Feed(run.path, shown)
    for row in feed.rows():
        shown.add(row)
    run.restore_metrics(1)
    run.append_metrics(line_of(2))
    assert lines_in(list(feed.rows())) == [2]


def rows_of(run: RunFolder, shown: Shown) -> list[Row]:
    return list(Feed(run.path, shown).rows())


def test_tensorboard_has_rows_whole_and_goes_on(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run.append_metrics(line_of(1))
    run.save_evaluation(evaluation(1, 0.25, 0.5))
    tracker = TensorBoard(run.path)
    tracker.send(rows_of(run, tracker.open()))
    run.append_metrics(line_of(2))
    tracker.send(rows_of(run, TensorBoard(run.path).open()))
    tracker.close("")
    file = next(path for path in (run.path / "tensorboard").iterdir() if path.stat().st_size > 1000)
    file.write_bytes(file.read_bytes()[:-5])  # a crash in the last event
    again = TensorBoard(run.path)
    rows = rows_of(run, again.open())
    assert [row.step for row in rows] == [2]
    again.send(rows)
    again.close("")
    found = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses == [(256, float(np.float32(1 / 3 + 10))), (512, float(np.float32(1 / 3 + 5)))]
    assert [(event.step, event.value) for event in found.Scalars(f"zero_shot_{SET}/top1")] == [(256, 0.25)]
    assert (found.Images(f"images/{SET}")[0].width, found.Images(f"images/{SET}")[0].step) == (32, 256)


def test_wandb_offline_goes_on_after_its_last_row(run, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_PROJECT", "tests")
    WandB.check()
    for step in (1, 2):
        run.append_metrics(line_of(step))
        run.save_evaluation(evaluation(step, 0.25, 0.5))
        tracker = WandB(run.path, TrackedAs("a1", "sweep/a", "sweep"))
        tracker.send(rows_of(run, tracker.open()))
        tracker.note({"checkpoint": "s3://bucket/a"})
        tracker.close("stopped")
    files = sorted((run.path / "wandb").glob("offline-run-*/run-a1.wandb"))
    rows = [row for file in files for row in read_history(file)]
    assert [(row["_step"], row["samples_seen"], row.get("step")) for row in rows] == [
        (0, 256, 1), (1, 256, None), (2, 512, 2), (3, 512, None),
    ]  # fmt: skip
    assert [row["train/loss"] for row in rows if "step" in row] == [1 / 3 + 10, 1 / 3 + 5]
    assert len(list((run.path / "wandb").glob("offline-run-*/files/media/images/**/*.png"))) >= 2
    assert all(b"0123456789" * 4 not in path.read_bytes() for path in run.path.rglob("*") if path.is_file())


def test_trackio_goes_on_after_its_last_row(run, monkeypatch, tmp_path):
    storage = pytest.importorskip("trackio.sqlite_storage", reason="trackio needs an older pillow")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")
    from sigray.orchestrator.trackers.trackio_run import Trackio

    for step in (1, 2):
        run.append_metrics(line_of(step))
        run.save_evaluation(evaluation(step, 0.25, 0.5))
        tracker = Trackio(run.path, TrackedAs("a1", "sweep/a", "sweep"))
        tracker.send(rows_of(run, tracker.open()))
    logs = storage.SQLiteStorage.get_logs("sigray", run_id="a1")
    losses = [(log["step"], log["train/loss"]) for log in logs if "train/loss" in log]
    assert losses == [(256, 1 / 3 + 10), (512, 1 / 3 + 5)]
    assert [log["step"] for log in logs if f"zero_shot_{SET}/top1" in log] == [256, 512]


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(tracker_process.importlib.util, "find_spec", lambda name: None)
    check_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match=r"run\.trackers: mlflow needs .* pip install 'sigray\[mlflow\]'"):
        check_trackers(["tensorboard", "mlflow"])


def test_the_run_keeps_its_id(run):
    assert run.tracked_as("other", "").id == run.tracked_as("played", "").id
    (run.path / "trackers.json").unlink()
    assert run.tracked_as("other", "group").name == "other"


def test_the_end_waits_for_a_hanging_process_only_so_long(run, monkeypatch):
    def start(*_: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    monkeypatch.setattr(tracker_process, "_start", start)
    monkeypatch.setattr(tracker_process, "_QUIET_S", 0.05)
    monkeypatch.setattr(tracker_process, "_KILL_S", 0.05)
    said: list[str] = []
    process = TrackerProcess(run, ["tensorboard"], said.append, name="played", finish_s=0.1)
    while process._process is None:
        time.sleep(0.01)
    assert not process.finish()
    assert said[0].startswith("waiting for the trackers (tensorboard), at most 0 s")
    assert f"`sigray track {run.path}` sends what they lack" in said[-1]
    assert process._process.poll() is not None


def test_a_process_that_was_killed_is_started_again(run):
    said: list[str] = []
    process = TrackerProcess(run, ["tensorboard"], said.append, name="played")
    run.append_metrics(line_of(1))
    deadline = time.monotonic() + 20
    while process._process is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process._process is not None
    process._process.kill()
    run.save_summary({"status": "finished"})
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.finish()
    assert said[0] == "the process of the trackers died (code -9): starting it again"
    assert TensorBoard(run.path).open().samples_seen == 256


def test_a_run_that_stops_while_it_repeats_steps_is_summed_up_at_its_own(run):
    for step in (1, 2, 3, 4):
        run.append_metrics(line_of(step))
    run.restore_metrics(2)
    run.append_metrics(line_of(3))
    config = played_config(run.path.parent, [])
    found = summarize(config, run, Manifest(()), "stopped", {}, None, train_s=1, total_s=1)
    assert (found["steps"], found["samples_seen"]) == (3, 768)
    run.save_summary(found)
    page = read_run_files(ForeignFolder(Storage(run.path)))
    assert (page.status, page.step, page.samples_seen) == ("stopped", 3, 768)
    run.append_metrics(line_of(5))
    page = read_run_files(ForeignFolder(Storage(run.path)))
    assert (page.status, page.step) == ("unfinished", 5)
