"""Folders of an attacker beside good runs: pages stay up, read nothing else, and send nothing."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

from sigray.orchestrator.reports.foreign_folder import MAX_BYTES, ForeignFolder, LinkError
from sigray.orchestrator.reports.live_server import RUNS as RUN_PAGES
from sigray.orchestrator.reports.live_server import Kind, Look, Pages
from sigray.orchestrator.reports.run_page import write_report
from sigray.tuning.live_page import SWEEPS as SWEEP_PAGES
from sigray.workers.storage import Storage
from tests.helpers.hostile_folders import CANARY, RUNS, SWEEPS, Listener, draw_all
from tests.helpers.run_folders import made, write_run
from tests.helpers.runs import LIMIT_S

GOOD = ("a-good-run", "zz-good-run")


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr("sigray.orchestrator.reports.live_server._WAIT_S", 120.0)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Every answer about the folders, by path, and the number of connections to a store meanwhile."""
    root = tmp_path_factory.mktemp("hostile")
    place = made(root / "place")
    with Listener() as listener, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sigray.orchestrator.reports.live_server._WAIT_S", 120.0)
        for name, value in listener.variables.items():
            patch.setenv(name, value)
        names = draw_all(place, made(root / "elsewhere") / "secret", listener.address)
        for name in GOOD:
            write_run(made(place / name), metrics=[])
        before = {file: file.lstat().st_mtime_ns for file in root.rglob("*")}
        pages = Pages([str(place)], [RUN_PAGES, SWEEP_PAGES])
        paths = ["/", "/runs", "/sweeps"]
        for name in [*GOOD, *names, "link-run", "link-loop", "fifo", "file"]:
            kind = "sweeps" if name in SWEEPS else "runs"
            paths += [f"/{kind}/{name}", f"/{kind}/{name}/report.html", f"/runs/{name}/trials/one"]
        found = {path: pages.answer(path) for path in [*paths, *(f"/api{path}" for path in paths)]}
        assert {file: file.lstat().st_mtime_ns for file in root.rglob("*")} == before  # nothing was written
        found["connections"] = listener.num_connections
    return found


def entries(answers: dict[str, Any], kind: str) -> dict[str, Any]:
    return {entry["name"]: entry for entry in json.loads(answers[f"/api/{kind}"].body)[kind]}


def test_the_list_has_all_and_the_good_ones_whole(answers):
    listed = entries(answers, "runs")
    assert set(listed) == {*GOOD, *RUNS, *SWEEPS}  # a sweep's folder has the files of a run here
    assert json.loads(answers["/api/runs"].body)["notes"] == []
    for name in GOOD:
        assert (listed[name]["status"], answers[f"/runs/{name}"].status) == ("finished", 200)
        assert listed[name]["says"].startswith("step 332 of 332, 84,992 of 84,992")
    assert set(entries(answers, "sweeps")) == set(SWEEPS)


def test_no_answer_has_a_foreign_file(answers):
    bodies = [answer.body for path, answer in answers.items() if path != "connections"]
    texts = [body.decode(errors="replace") if isinstance(body, bytes) else str(body) for body in bodies]
    assert len(texts) > 300
    assert not [text for text in texts if CANARY in text]
    assert not [text for text in texts if "root:x:" in text]
    for name in ("link-run", "link-loop", "fifo", "file"):
        assert answers[f"/runs/{name}"].status == 404


def test_no_answer_made_a_request(answers):
    assert answers["connections"] == 0
    page = answers["/runs/storage-query"].body
    assert "x?scheme" not in page or "&amp;endpoint_override" in page
    assert "Lease and checkpoints are in s3://bucket" in page


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("link-config", "config.yaml is a symbolic link, which pages do not follow"),
        ("link-metrics", "metrics.jsonl is a symbolic link"),
        ("link-lease", "lease.json is a symbolic link"),
        ("link-folder-evaluations", "evaluations is a symbolic link"),
        ("link-folder-checkpoints", "checkpoints is a symbolic link"),
        ("fifo-config", "config.yaml is no regular file"),
        ("fifo-metrics", "metrics.jsonl is no regular file"),
        ("fifo-lease", "lease.json is no regular file"),
        ("folder-as-file", "summary.json is no regular file"),
        ("huge-config", "config.yaml has 10,737,418,240 bytes; pages read at most 262,144"),
        ("huge-summary", "summary.json has 10,737,418,240 bytes"),
        ("yaml-bad", "config.yaml is left out: not YAML"),
        ("yaml-bomb", "aliases"),
        ("yaml-deep", "levels deep"),
        ("yaml-long", "config.yaml has 10,"),
        ("json-deep", "summary.json is left out: not JSON"),
        ("json-digits", "summary.json is left out: not JSON"),
    ],
)
def test_the_entry_of_a_bad_folder_says_why(answers, name, reason):
    assert reason in entries(answers, "runs")[name]["says"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("sweep-grid", "1,000,000,000,000 combinations"), ("sweep-power", "a number above 1e+300"),
     ("sweep-list", "arithmetic takes numbers only"), ("sweep-link", "symbolic link")],
)  # fmt: skip
def test_the_entry_of_a_bad_sweep_says_why(answers, name, reason):
    entry = entries(answers, "sweeps")[name]
    assert entry["status"] == "unreadable"
    assert reason in entry["says"]


def test_what_is_left_out_stands_on_the_page(answers):
    assert "metrics.jsonl: its first 10," in answers["/runs/huge-metrics"].body
    assert "evaluations: only 1,000 of 1,500 files are read" in answers["/runs/many-files"].body
    assert len(json.loads(answers["/api/runs/text-long"].body)["name"]) == 300
    assert "<script>alert(" not in answers["/runs/text-markup"].body
    assert "</script>" not in answers["/runs/text-breaks"].body.partition("<main>")[2].partition("</main>")[0]


def test_a_read_is_bounded_and_takes_regular_files_only(tmp_path):
    folder = ForeignFolder(Storage(made(tmp_path / "place")), "run")
    run = made(tmp_path / "place" / "run")
    with (run / "long").open("wb") as file:
        file.truncate(10 << 30)
        file.seek(-3, os.SEEK_END)
        file.write(b"\na\n")
    lines, left_out = folder.read_lines("long")
    assert (lines, left_out) == ([b"a"], (10 << 30) - 2)
    with pytest.raises(OSError, match="pages read at most"):
        folder.read("long")
    (run / "x").write_bytes(b"x" * MAX_BYTES)
    for _ in range(3):  # with the 16 MiB above
        assert len(folder.read("x")) == MAX_BYTES
    with pytest.raises(OSError, match="more than 64 MiB to read"):
        folder.read("x")
    (tmp_path / "secret").write_text("secret")
    for path in ("../../secret", "..", "a/../../../secret"):
        with pytest.raises(FileNotFoundError):
            folder.read(path)
        assert not folder.exists(path)
    (run / "link").symlink_to(tmp_path)
    for path in ("link", "link/secret"):
        with pytest.raises(LinkError):
            folder.read(path)
    with pytest.raises(OSError, match="no regular file"):
        ForeignFolder(Storage("/dev"), "").read("null")
    assert folder.at(f"{tmp_path}/place/other") is not None
    for uri in (f"{tmp_path}/place/../secret", str(tmp_path), f"{tmp_path}/place2", "s3://bucket/place", "/"):
        assert folder.at(uri) is None


def test_a_slow_folder_holds_up_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr("sigray.orchestrator.reports.live_server._WAIT_S", 0.3)
    monkeypatch.setattr("sigray.orchestrator.reports.live_server._KEEP_S", 0.0)
    released, looks = threading.Event(), []

    def look(folder: ForeignFolder, address: str, for_list: bool) -> Look:
        name = folder.uri.rpartition("/")[2]
        looks.append(name)
        folder.read("mark")
        if name.startswith("slow"):
            released.wait(LIMIT_S)
        return Look("finished", "says", 1.0, {}, Markup)

    for name in ("good", "slow-1", "slow-2"):
        (made(tmp_path / name) / "mark").write_text("x")
    pages = Pages([str(tmp_path)], [Kind("runs", "mark", "none", look)])

    def listed() -> tuple[list[str], list[str]]:
        content = json.loads(pages.answer("/api/runs").body)
        return sorted(entry["name"] for entry in content["runs"]), content["notes"]

    held = threading.Thread(target=pages.answer, args=("/runs/slow-1",))
    held.start()
    try:
        deadline = time.monotonic() + LIMIT_S  # an answer rests ten times as long as a busy machine took for it
        while listed() != (["good"], ["not read yet: slow-1, slow-2"]):
            assert time.monotonic() < deadline
        assert pages.answer("/runs/good").status == 200
    finally:
        released.set()
        held.join()
    while listed() != (["good", "slow-1", "slow-2"], []):
        assert time.monotonic() < deadline
    # The folders that took long are read less often.
    looks.clear()
    while "good" not in looks:
        listed()
        assert time.monotonic() < deadline
    assert set(looks) == {"good"}


def test_a_report_is_not_written_through_a_link(tmp_path):
    run = write_run(made(tmp_path / "run"))
    victim = tmp_path / "victim"
    victim.write_text("keep")
    (run / "report.html").symlink_to(victim)
    assert "<html" in Path(write_report(run)).read_text()
    assert (victim.read_text(), (run / "report.html").is_symlink()) == ("keep", False)


def test_a_folder_below_a_bucket_is_read(s3_variables, monkeypatch):
    """An empty part of a path is an error in S3, and none on a disk: the report of a sweep reads its trials so."""
    for name, value in s3_variables.items():
        monkeypatch.setenv(name, value)
    bucket = Storage("s3://sigray/sweeps/below")
    bucket.write("trials/trial-000/metrics.jsonl", b"{}\n")
    for folder in (ForeignFolder(bucket).below("trials/trial-000"), ForeignFolder(bucket, "trials").below("trial-000")):
        assert folder.read_lines("metrics.jsonl") == ([b"{}"], 0)
