"""The live page of a sweep over HTTP, and `sigray pages` as a command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from sigray.orchestrator.reports.http_server import serve
from sigray.orchestrator.reports.live_server import RUNS, Pages
from sigray.tuning.live_page import SWEEPS
from sigray.tuning.report import write_report
from sigray.tuning.study import STUDY, Study
from sigray.tuning.table import Writer
from sigray.workers.checkpoint.lease import RunLease
from sigray.workers.storage import Storage
from tests.helpers.run_folders import CONFIG, add_line, made, write_run
from tests.helpers.s3 import free_ports
from tests.helpers.sweeps import decision, full_table, result, study_of, trial


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = study_of(tmp_path / "sweeps", rungs=[300], seeds=[0])
    made(study.config.folder)
    (study.config.folder / STUDY).write_text(study.config.to_yaml())
    return study


def point(batch: int, loss: str) -> dict[str, object]:
    return {"train.global_batch_size": batch, "loss.name": loss, "optim.lr": batch / 1000}


def test_a_sweep_at_work_and_at_its_end(study, tmp_path, monkeypatch):
    monkeypatch.setattr("sigray.workers.checkpoint.lease._SETTLE_S", 0.01)
    monkeypatch.setattr("sigray.orchestrator.reports.live_server._KEEP_S", 0.0)
    monkeypatch.setattr("sigray.orchestrator.reports.live_server._REST", 0)
    monkeypatch.setattr("sigray.orchestrator.reports.live_server._WAIT_S", 60.0)
    storage = Storage(study.config.storage_uri)
    writer = Writer(storage)
    writer.add(trial(0, **point(2, "sigmoid")), trial(1, **point(20, "sigmoid")), trial(2, **point(2, "softmax")))
    writer.add(result(0, 0, 0.25), decision(0, 0, "stop"))
    folder = made(study.config.folder / "trials" / "trial-001")
    write_run(folder, config=CONFIG | {"run": {"name": "trial-001"}}, metrics=[], evaluations=[], summary=None)
    add_line(folder, 2)
    write_run(made(folder.parent / "trial-000"), metrics=[], evaluations=[], summary=None)
    with serve(Pages([str(tmp_path / "sweeps")], [RUNS, SWEEPS]).answer, 0) as port:

        def get(path: str) -> str:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30).read().decode()

        def told() -> dict:
            return json.loads(get("/api/sweeps/tiny"))

        with RunLease(storage), RunLease(Storage(folder)):
            content = told()
            assert content["status"] == "running"
            assert {number: row["status"] for number, row in content["trials"].items()} == {
                "0": "stopped",
                "1": "running",
                "2": "waiting",
            }
            assert content["trials"]["1"]["samples_seen"] == 512
            page = get("/sweeps/tiny")
            assert "1 of 3\u00a0trials over" in page
            # The sentence and the tiles are of one look.
            assert "3\u00a0trials (1 running, 1 stopped, 1 waiting) saw 812\u00a0pairs in all" in page
            assert "<dt>pairs seen, all trials</dt><dd>812</dd>" in page
            assert "Loss, 900\u00a0pairs" in page.replace("900 pairs", "900\u00a0pairs")
            assert "stopped: because" in page
            # From the trial at work to its own page.
            assert 'href="/runs/tiny/trials/trial-001"' in page
            trial_page = json.loads(get("/api/runs/tiny/trials/trial-001"))
            assert trial_page["status"] == "running"
            nav = trial_page["html"].partition("</nav>")[0]
            assert re.findall('href="([^"]*)"', nav) == ["/", "/sweeps/tiny", "/runs/tiny/trials/trial-000"]
            assert not (study.config.folder / "figures").exists()  # a page that is looked at writes nothing
        assert told()["status"] == "unfinished"
        assert json.loads(get("/api/"))["sweeps"][0]["says"] == "1 of 3\u00a0trials over"

        table = full_table(study)
        events = [{"event": "stream", "decoded": 10, "served": 20, "cpu_s": 1.0}]
        for row in table.rows.values():
            if row.number > 2:
                events.append(trial(row.number, **row.values))
        writer.add(*events)
        write_report(study, storage, writer.table)
        assert "figures/" in get("/sweeps/tiny/report.html")
        assert get("/sweeps/tiny/trials.csv").startswith("trial,seed")
        figure = next((study.config.folder / "figures").iterdir())
        answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/sweeps/tiny/figures/{figure.name}")
        assert (answer.headers["Content-Type"], answer.read()[:4]) == ("image/png", b"\x89PNG")
        (study.config.folder / "results.jsonl").write_text('{"event": "none of ours"}\n')
        with pytest.raises(urllib.error.HTTPError, match="502"):
            get("/sweeps/tiny")
        assert json.loads(get("/api/"))["sweeps"][0]["status"] == "unreadable"
        for path in ("/sweeps/tiny/study.yaml", "/sweeps/tiny/figures/../study.yaml", "/sweeps/tiny/tune.log"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                get(path)


def test_the_command_serves_until_it_is_told_to_end(study, tmp_path):
    (port,) = free_ports(1)
    command = [sys.executable, "-c", "import sys; from sigray.tuning.cli import main; sys.exit(main())"]
    command += ["pages", str(tmp_path / "sweeps"), "--pages-port", str(port)]
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"pages of runs and sweeps: http://127.0.0.1:{port}\n"
        told = {"notes": ["not read yet"]}
        while told["notes"]:
            told = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/api/"))
        assert [entry["name"] for entry in told["sweeps"]] == ["tiny"]
        taken = subprocess.run(command, capture_output=True, text=True)
        assert taken.returncode == 2
        assert f"port {port} of 127.0.0.1: Address already in use" in taken.stderr
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
