"""Live pages over HTTP: what a run folder says at each moment of a run, and nothing but that."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sigray.orchestrator.config import load_config
from sigray.orchestrator.reports.http_server import serve
from sigray.orchestrator.reports.live_server import RUNS, Pages
from sigray.orchestrator.run_folder import PENDING, RunFolder
from sigray.workers.checkpoint.lease import RunLease
from sigray.workers.storage import Storage
from tests.helpers.run_folders import CONFIG, HOSTILE, SET, SUMMARY, add_line, evaluation, made, metrics_line, write_run
from tests.helpers.s3 import BUCKET, s3_server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("sigray.workers.checkpoint.lease._SETTLE_S", 0.01)
    monkeypatch.setattr("sigray.orchestrator.reports.live_server._KEEP_S", 0.0)
    monkeypatch.setattr("sigray.orchestrator.reports.live_server._REST", 0)
    monkeypatch.setattr("sigray.orchestrator.reports.live_server._WAIT_S", 60.0)


Get = Callable[..., tuple[int, str]]


@pytest.fixture
def served() -> Iterator[Callable[..., Get]]:
    """Serves places until the test ends; given a path as it is, without the corrections of a client library."""
    servers = []

    def start(*places: Path | str) -> Get:
        server = serve(Pages([str(place) for place in places], [RUNS]).answer, 0)
        servers.append(server)
        port = server.__enter__()

        def get(path: str, **headers: str) -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", path, headers={name.replace("_", "-"): text for name, text in headers.items()})
            answer = connection.getresponse()
            get.headers = dict(answer.getheaders())
            body = answer.read()
            connection.close()
            if get.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            return answer.status, body.decode()

        return get

    yield start
    for server in servers:
        server.__exit__(None, None, None)


def api(get: Get, path: str) -> dict[str, Any]:
    status, text = get(f"/api{path}")
    assert status == 200, text
    return json.loads(text)


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html).replace("\N{NO-BREAK SPACE}", " "))


def make_checkpoint(storage: Storage, step: int) -> None:
    commit = {"name": f"step-{step:010d}", "step": step, "samples_seen": step * 256, "files": {}, "model": {}}
    storage.write(f"checkpoints/step-{step:010d}/commit.json", json.dumps(commit).encode())


def test_a_run_from_its_start_to_its_end(served, tmp_path):
    folder = made(tmp_path / "demo")
    storage = Storage(folder)
    get = served(tmp_path)
    assert get("/runs/demo")[0] == 404
    write_run(folder, metrics=[], evaluations=[], summary=None)
    run = RunFolder(load_config_of(folder))
    with RunLease(storage):
        run.append_event("starting Ray on this machine", "note")
        told = api(get, "/runs/demo")
        assert (told["status"], told["step"], told["checkpoint"], told["left_s"]) == ("starting", 0, None, None)
        assert "The training workers are starting." in text_of(told["html"])

        run.append_event("needs 2 training workers, which no free place fits", PENDING)
        assert api(get, "/runs/demo")["status"] == api(get, "/runs")["runs"][0]["status"] == "waiting for room"
        run.append_event("starting 2 training workers", "note")
        assert api(get, "/runs/demo")["status"] == "starting"
        for step in (10, 20):
            add_line(folder, step)
        make_checkpoint(storage, 20)
        run.append_event("the training workers were restarted and go on from step 10", "restart")
        told = api(get, "/runs/demo")
        assert (told["status"], told["step"], told["num_restarts"]) == ("running", 20, 1)
        # 84,900 pairs in steps of 256 are 84,992, at the 417 pairs per second of the lines.
        assert told["left_s"] == pytest.approx((84_992 - 20 * 256) / 417)
        assert told["checkpoint"]["step"] == 20
        assert abs(told["updated_at"] - time.time()) < 30
        said = text_of(told["html"])
        for words in (
            "step 20 of 332, 5,120 of 84,992 pairs",
            "time left, about 3 min 12 s",
            "loss per image 0.5",
            "scale 10",
            "bias \N{MINUS SIGN}10",
            "pairs per second 417",
            "data wait 1.2 %",
            "restarts 1",
            "Newest checkpoint: step 20",
        ):
            assert words in said
        assert said.index("were restarted") < said.index("starting Ray")
        assert told["html"].count("<svg") == 5  # loss, scale and bias, gradient norm, learning rate, throughput

        first = get("/api/runs/demo")[1]
        assert get("/api/runs/demo", If_None_Match=get.headers["ETag"]) == (304, "")
        run.save_evaluation(evaluation(20, 0.026, 0.1012))
        add_line(folder, 30)
        told = api(get, "/runs/demo")
        assert json.dumps(told) != first
        assert told["zero_shot"][SET]["top1"] == 0.026
        assert f"10.1 % of the {SET} images" in text_of(told["html"])
        assert told["html"].count("<svg") == 7
        entry = api(get, "/runs")["runs"][0]
        assert entry["figures"] == f"loss 0.3333, top-1 2.6\u00a0% of {SET}"
        assert entry["curve"] == [[256 * step, 10 / step] for step in (10, 20, 30)]
        page = get("/runs")[1]
        assert page.count('<svg class="spark"') == 1
        assert '<span class="status" data-is="running">running</span>' in page
        assert '<a href="/">' in page
        assert '<a href="/">' in get("/runs/demo")[1]

    # The driver has gone and left no summary.
    told = api(get, "/runs/demo")
    assert (told["status"], told["left_s"]) == ("unfinished", None)
    assert "last update" in text_of(told["html"])
    for status in ("failed", "stopped", "finished"):
        (folder / "summary.json").write_text(json.dumps(SUMMARY | {"status": status}))
        assert api(get, "/runs/demo")["status"] == status
    assert get("/runs/demo/report.html")[0] == 404
    (folder / "report.html").write_text("the report")
    assert get("/runs/demo/report.html") == (200, "the report")
    assert 'href="/runs/demo/report.html"' in get("/runs/demo")[1]


def load_config_of(folder: Path) -> Any:
    path = folder.parent / "run.yaml"
    content = {"run": {"name": folder.name, "dir": str(folder.parent)}, "data": {"shards": "x"}}
    content |= {"model": {"name": "ViT-B-32"}, "train": {"num_samples": 512, "global_batch_size": 256}}
    path.write_text(yaml.safe_dump(content))
    return load_config(path)


def test_the_page_and_its_json_are_one(served, tmp_path):
    write_run(made(tmp_path / "demo"))
    get = served(tmp_path)
    status, page = get("/runs/demo", Accept_Encoding="gzip")
    assert status == 200
    assert get.headers["Content-Encoding"] == "gzip"
    assert api(get, "/runs/demo")["html"].strip() in page
    assert "<title>demo (finished)</title>" in page
    assert "width=device-width" in page
    # The browser runs our script and nothing else, and fetches from nowhere else.
    policy = get("/runs/demo") and get.headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'sha256-" in policy
    assert not re.search(r"https?://|@import|<link|<iframe", page)


def test_the_script_is_the_one_that_the_policy_allows(served, tmp_path):
    import base64
    import hashlib

    get = served(tmp_path)
    page = get("/")[1]
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in get.headers["Content-Security-Policy"]


def test_the_list_has_the_newest_first_and_each_name_once(served, tmp_path, monkeypatch):
    monkeypatch.setattr("sigray.orchestrator.reports.live_server._MAX_ENTRIES", 2)
    for place, name, step in (("a", "old", 10), ("a", "demo", 10), ("b", "demo", 20), ("b", "new", 30)):
        write_run(
            made(tmp_path / place / name),
            config=CONFIG | {"run": {"name": name}},
            metrics=[metrics_line(step)],
            summary=None,
        )
    (tmp_path / "a" / "no_run").mkdir()
    old = tmp_path / "a" / "old" / "metrics.jsonl"
    os.utime(old, (1000, 1000))
    get = served(tmp_path / "a", tmp_path / "b", tmp_path / "nowhere")
    for path in ("/", "/runs", "/runs/"):
        assert get(path)[0] == 200
    entries = api(get, "/runs")["runs"]
    assert [entry["name"] for entry in entries][-1] == "old"
    assert sorted(entry["name"] for entry in entries) == ["demo", "new", "old"]
    (demo,) = (entry for entry in entries if entry["name"] == "demo")
    assert demo["says"].startswith("step 10 of 332")  # the first place that has the name
    assert api(get, "/runs/demo")["step"] == 10
    assert 'href="/runs/new"' in get("/")[1]
    assert 'href="/runs/old"' not in get("/")[1]
    assert "1 older ones are not shown" in get("/")[1]


def test_nothing_outside_a_run_is_served(served, tmp_path):
    place = tmp_path / "place"
    for folder in (place / "demo", place / "demo" / "trials" / "one", tmp_path / "outside"):
        write_run(made(folder))
    (tmp_path / "secret").write_text("secret")
    (place / "secret").write_text("secret")
    (place / "link").symlink_to(tmp_path / "outside")
    (place / "demo" / "report.html").symlink_to(tmp_path / "secret")
    (place / "demo" / "notes.html").write_text("secret")
    get = served(place)
    assert get("/runs/demo/trials/one")[0] == 200  # as the trials of a sweep lie
    for path in (
        "/runs/nothing",
        "/runs/..",
        "/runs/../outside",
        "/runs/%2e%2e/outside",
        "/runs/..%2foutside",
        "/runs/demo/../../outside",
        "/runs/demo/%2e%2e/%2e%2e/secret",
        "/runs/.",
        "/runs/link",
        f"/runs/{tmp_path}/outside",
        "/runs/demo/config.yaml",
        "/runs/demo/metrics.jsonl",
        "/runs/demo/notes.html",
        "/runs/demo/report.html",
        "/runs/demo/report.html/../../../secret",
        "/runs/demo%00",
        "/runs/demo\\..\\..\\secret",
        "/runs/secret",
        "/sweeps/demo",
        "/other",
        "/../secret",
    ):
        for address in (path, f"/api{path}"):
            status, text = get(address)
            assert (status, text) == (404, "not found\n"), address
    assert "link" not in get("/")[1]


def test_what_data_says_is_text(served, tmp_path):
    folder = made(tmp_path / "demo")
    write_run(folder, config=CONFIG | {"run": {"name": HOSTILE}}, summary=None)
    RunFolder(load_config_of(folder)).append_event(HOSTILE, "note")
    page = served(tmp_path)("/runs/demo")[1]
    assert page.count("<script>") == 1
    assert page.count("&lt;script&gt;alert(") >= 2  # the name and the event


def test_half_a_file_is_no_error(served, tmp_path):
    folder = made(tmp_path / "demo")
    write_run(folder, summary=None)
    for name in ("metrics.jsonl", "events.jsonl", "summary.json", "lease.json"):
        with (folder / name).open("a") as file:
            file.write('{"time": 17')
    told = api(served(tmp_path), "/runs/demo")
    assert told["status"] == "unfinished"
    assert [text.partition(" ")[0] for text in told["unreadable"]] == ["summary.json"]
    assert told["step"] == 332


def test_a_long_run_is_drawn_with_few_points(served, tmp_path):
    folder = made(tmp_path / "demo")
    lines = [metrics_line(step) for step in range(1, 20_001)]
    lines[7000]["train/loss"] = 1234.0  # a spike stays
    write_run(folder, metrics=lines, evaluations=[], summary=None)
    told = api(served(tmp_path), "/runs/demo")
    assert len(told["html"]) < 400_000
    from sigray.orchestrator.reports.run_charts import curve

    points = curve(lines, "train/loss")
    assert len(points) <= 1002
    assert (7001 * 256, 1234.0) in points
    assert (points[0][0], points[-1][0]) == (256, 20_000 * 256)


@pytest.mark.parametrize("num_known", [0, 1])
def test_a_shared_folder_is_followed_by_its_checkpoints(served, tmp_path, num_known):
    """As a bucket is: the driver keeps metrics.jsonl on its own disk. The newest line is older than the checkpoint."""
    folder = made(tmp_path / "demo")
    config = CONFIG | {"run": {"name": "demo", "storage": str(tmp_path)}}
    write_run(folder, config=config, metrics=[metrics_line(5)][:num_known], evaluations=[], summary=None)
    (folder / "metrics").mkdir()
    lines = "".join(json.dumps(metrics_line(step)) + "\n" for step in (5, 10, 15))
    (folder / "metrics" / "0000000000-0000000020.jsonl").write_text(lines)
    make_checkpoint(Storage(folder), 20)
    get = served(tmp_path)
    with RunLease(Storage(folder)):
        told = api(get, "/runs/demo")
        assert (told["status"], told["step"], told["samples_seen"], told["checkpoint"]["step"]) == (
            "running",
            20,
            5120,
            20,
        )
        assert "Loss per image, lower is better: from 2 after 1,280 pairs to 0.6667." in text_of(told["html"])
        assert api(get, "/runs")["runs"][0]["says"].startswith("step 20 of 332, 5,120 of 84,992 pairs")


def test_a_run_in_s3_is_followed_by_its_checkpoints(served, tmp_path, monkeypatch):
    """A driver elsewhere keeps metrics.jsonl to itself until the end; the lines up to a checkpoint come with it."""
    with s3_server(tmp_path) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        uri = f"s3://{BUCKET}/runs"
        storage = Storage(f"{uri}/demo")
        config = CONFIG | {"run": {"name": "demo", "storage": uri}}
        storage.write("config.yaml", yaml.safe_dump(config).encode())
        lines = "".join(json.dumps(metrics_line(step)) + "\n" for step in (10, 20))
        storage.write("metrics/0000000000-0000000020.jsonl", lines.encode())
        make_checkpoint(storage, 20)
        get = served(uri)
        with RunLease(storage):
            told = api(get, "/runs/demo")
            assert (told["status"], told["step"], told["checkpoint"]["step"]) == ("running", 20, 20)
            assert told["html"].count("<svg") == 5
        assert [entry["name"] for entry in api(get, "/")["runs"]] == ["demo"]
        assert get("/runs/../demo")[0] == 404

        # On the driver's machine the local folder has the lines, and its config says where the checkpoints are. The
        # config alone opens no storage: it must be below a place.
        folder = made(tmp_path / "local" / "demo")
        write_run(folder, config=config, metrics=[metrics_line(30)], evaluations=[], summary=None)
        told = api(served(tmp_path / "local"), "/runs/demo")
        assert (told["checkpoint"], told["storage"], told["is_storage_read"]) == (None, uri, False)
        assert f"Lease and checkpoints are in {uri}" in told["html"]
        told = api(served(tmp_path / "local", uri), "/runs/demo")
        assert (told["status"], told["step"], told["checkpoint"]["step"]) == ("unfinished", 30, 20)
