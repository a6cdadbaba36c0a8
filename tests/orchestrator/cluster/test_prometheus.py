"""Alert rules and dashboards made from the table of metrics, judged by Prometheus's own tools, and what Ray embeds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml

from sigray.orchestrator.cluster.prometheus import (
    UID,
    Pictures,
    alert_rules,
    fill_in,
    generate,
    grafana_dashboard,
)
from sigray.orchestrator.reports.http_server import serve
from sigray.tuning.cli import main
from sigray.workers.metrics import BY_NAME, METRICS, REPEAT_S, RunMetrics, WorkerMetrics
from sigray.workers.training.log_window import LogWindow
from tests.helpers.s3 import free_ports

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool of Debian's prometheus is missing")


def test_metrics_are_named_once_and_drawn_once():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    drawn = [panel["title"] for panel in grafana_dashboard()["panels"] if panel["type"] != "row"]
    assert drawn == [metric.title for metric in METRICS]
    ids = [panel["id"] for panel in grafana_dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


def test_every_key_of_a_line_of_metrics_is_exported():
    """The keys stand in `LogWindow.close` as literals."""
    import inspect
    import re

    written = set(re.findall(r'"(\w+/\w+)":', inspect.getsource(LogWindow.close)))
    assert "train/loss" in written
    assert written == {metric.key for metric in METRICS if "/" in metric.key}


def test_rules_and_panels_name_metrics_that_exist():
    import re

    known = {metric.exported for metric in METRICS}
    texts = [rule["expr"] for group in alert_rules()["groups"] for rule in group["rules"]]
    texts += [panel["targets"][0]["expr"] for panel in grafana_dashboard()["panels"] if panel["type"] != "row"]
    assert len(texts) > 5
    for text in texts:
        used = set(re.findall(r"ray_sigray_\w+", text))
        assert used
        assert used <= known


def test_what_is_written_goes_through_no_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("keep")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("sigray_alerts.yml", "sigray_grafana_dashboard.json"):
        (out / name).symlink_to(victim)
    for path in generate(out):
        assert path.parent == out
        assert path.stat().st_size > 100
    assert victim.read_text() == "keep"


@needs_promtool
def test_prometheus_takes_the_rules(tmp_path, capsys):
    assert main(["monitor", "--generate", "--out", str(tmp_path)]) == 0
    assert "sigray_alerts.yml" in capsys.readouterr().out
    done = subprocess.run(["promtool", "check", "rules", str(tmp_path / "sigray_alerts.yml")], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"4 rules found" in done.stdout


def alerts_after(minutes: str, series: dict[str, str], tmp_path: Path) -> set[str]:
    """The alerts that fire at a time, by promtool's own evaluation of the rules on made-up series."""
    rules, _ = generate(tmp_path)
    fired = set()
    for rule in alert_rules()["groups"][0]["rules"]:
        # `promtool test rules` compares with what is expected: expect nothing, and an alert that fires is a failure.
        content = {
            "rule_files": [str(rules)],
            "evaluation_interval": "30s",
            "tests": [
                {
                    "interval": "30s",
                    "input_series": [{"series": f'{name}{{run="a"}}', "values": text} for name, text in series.items()],
                    "alert_rule_test": [{"eval_time": minutes, "alertname": rule["alert"], "exp_alerts": []}],
                }
            ],
        }
        path = tmp_path / "test.yml"
        path.write_text(yaml.safe_dump(content))
        done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True)
        assert done.returncode == 0 or "exp:" in done.stdout + done.stderr, done.stderr
        if done.returncode:
            fired.add(rule["alert"].removeprefix("Sigray"))
    return fired


GOOD = {
    "ray_sigray_heard_time_s": "0+30x60",  # promtool's clock begins at 0, with a heartbeat every 30 s
    "ray_sigray_train_loss": "9-0.1x60",
    "ray_sigray_data_wait_pct": "2x60",
    "ray_sigray_checkpoint_time_s": "0+30x60",
    "ray_sigray_checkpoint_every_s": "120x60",
    "ray_sigray_bad_steps_total": "0x60",
}


@needs_promtool
@pytest.mark.parametrize(
    ("change", "fires"),
    [
        ({}, set()),
        ({"ray_sigray_heard_time_s": "0+30x10 300x50"}, {"Stalled"}),
        ({"ray_sigray_data_wait_pct": "2x20 60x40"}, {"DataStarved"}),
        ({"ray_sigray_data_wait_pct": "2x40 60x2 2x20"}, set()),  # a short wait is none
        ({"ray_sigray_train_loss": "9x40" + 20 * " NaN"}, {"NotANumber"}),
        ({"ray_sigray_bad_steps_total": "0x40 1x20"}, {"NotANumber"}),
        ({"ray_sigray_checkpoint_time_s": "0+30x10 300x50"}, {"CheckpointTooOld"}),
    ],
)
def test_an_alert_fires_when_it_should(change, fires, tmp_path):
    assert alerts_after("25m", GOOD | change, tmp_path) == fires


def test_what_runs_and_workers_set(monkeypatch):
    told: list[tuple[str, float, dict[str, str]]] = []
    now = 7.0

    def note(self: object, name: str, value: float, **tags: str) -> None:
        told.append((name, value, tags))

    monkeypatch.setattr("sigray.workers.metrics._Exporter.set", note)
    run = RunMetrics("a", save_every_s=60, clock=lambda: now)
    run.started({"world_size": 4})
    line = {metric.key: 1.0 for metric in METRICS if metric.key} | {"throughput/samples_per_s": 8.0}
    run.line(line, num_data_workers=3)
    run.checkpoint()
    recalls = {"image_to_text_r1": 0.25, "text_to_image_r1": 0.75}
    probe = {"birds": {"top1": 0.9}}
    run.evaluation({"zero_shot": {"birds": {"top1": 0.5}}, "retrieval": {"coco": recalls}, "linear_probe": probe})
    run.ended(is_bad_step=True)
    values = {name: value for name, value, _ in told}
    assert values["sigray_throughput_worker_samples_per_s"] == 2.0
    assert values["sigray_checkpoint_time_s"] == values["sigray_heard_time_s"] == 7.0
    assert ("sigray_zero_shot_top1", 0.5, {"set": "birds"}) in told
    assert ("sigray_linear_probe_top1", 0.9, {"set": "birds"}) in told
    assert ("sigray_retrieval_r1", 0.75, {"set": "coco", "direction": "text_to_image"}) in told
    of_workers = {metric.name for metric in METRICS if metric.kind == "counter" and metric.group == "Data"}
    assert set(values) == {metric.name for metric in METRICS if metric.owner == "run"} - of_workers

    # Ray forgets a gauge that is not set again: the last value of each, and no counter twice.
    gauges = {(name, *tags.items()): value for name, value, tags in told if BY_NAME[name].kind == "gauge"}
    told.clear()
    run.repeat()
    assert not told
    now += REPEAT_S
    run.repeat()
    run.repeat()
    assert [((name, *tags.items()), value) for name, value, tags in told] == list(gauges.items())

    told.clear()
    worker = WorkerMetrics("a")
    worker.update(10, Counter({"no caption": 1}), Counter({"bytes": 100, "stall": 2}))
    worker.update(15, Counter({"no caption": 1}), Counter({"bytes": 130, "stall": 2}))
    added: Counter[str] = Counter()
    for name, value, _ in told:
        added[name] += int(value)
    assert added == {
        "sigray_data_decoded_samples": 15,
        "sigray_data_refused_by_reason": 1,
        "sigray_store_bytes": 130,
        "sigray_store_retries": 2,
    }
    assert set(added) == of_workers


def test_every_series_has_a_name_of_its_own():
    """The legend holds each label that the query keeps, and a trial's names its sweep."""
    import re

    panels = [panel for panel in grafana_dashboard()["panels"] if panel["type"] != "row"]
    for metric, panel in zip(METRICS, panels, strict=True):
        (target,) = panel["targets"]
        kept = re.search(r"by \((.*?)\)", target["expr"])
        assert kept
        assert re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]) == kept[1].split(", ")
        assert metric.owner in kept[1]
    legends = {panel["title"]: panel["targets"][0]["legendFormat"] for panel in panels}
    assert legends["Figure by trial"] == legends["Samples seen by trial"] == "{{sweep}}/{{trial}}"
    assert legends["Trials by state"] == "{{sweep}} {{state}}"
    assert legends["Best figure so far"] == "{{sweep}}"


def test_variables_of_grafana_are_filled_in():
    query = 'sum(rate(x{SessionName=~"$SessionName",instance=~"${Instance:regex}"}[$interval])) by (y)'
    assert fill_in(query, {"var-SessionName": "s.1"}, 15) == (
        'sum(rate(x{SessionName=~"s\\\\.1",instance=~".*"}[60s])) by (y)'
    )


@pytest.fixture
def prometheus(tmp_path):
    """A real Prometheus that scrapes one page of metrics of this test."""
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is not installed (Debian: prometheus)")

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = 'ray_sigray_train_loss{run="demo",SessionName="s1"} 4.25\n'
            text += f'ray_sigray_heard_time_s{{run="demo"}} {time.time() - 3000}\n'
            for sweep in ("lr", "batch"):  # each has a trial-000
                text += f'ray_sigray_sweep_figure{{sweep="{sweep}",trial="trial-000"}} 0.1225\n'
                text += f'ray_sigray_sweep_trials{{sweep="{sweep}",state="running"}} 2\n'
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    Thread(target=server.serve_forever, daemon=True).start()
    session = tmp_path / "session"
    (session / "metrics" / "prometheus").mkdir(parents=True)
    (session / "metrics" / "grafana" / "dashboards").mkdir(parents=True)
    ray = {"uid": "rayDefaultDashboard", "title": "Ray", "panels": [
        {"type": "row", "title": "Closed", "panels": [
            {"id": 24, "type": "graph", "title": "Loss of Ray's panel",
             "targets": [{"expr": 'ray_sigray_train_loss{SessionName=~"$SessionName"}', "legendFormat": "{{run}}"}]}]},
    ]}  # fmt: skip
    dashboards = session / "metrics" / "grafana" / "dashboards"
    (dashboards / "default.json").write_text(json.dumps(ray))
    # What another user may have put there: it is left out, and nothing waits for it.
    os.mkfifo(dashboards / "a.json")
    (dashboards / "b.json").write_text("[" * 100_000)
    (tmp_path / "secret").write_text(json.dumps({"uid": "other", "title": "secret", "panels": []}))
    (dashboards / "c.json").symlink_to(tmp_path / "secret")
    target = f"127.0.0.1:{server.server_address[1]}"
    (session / "metrics" / "prometheus" / "prometheus.yml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "scrape_configs": [
                    {"job_name": "ray", "static_configs": [{"targets": [target]}], "proxy_url": "http://x"}
                ],
                "remote_write": [{"url": "http://x", "basic_auth": {"username": "x", "password_file": "/etc/passwd"}}],
            }
        )
    )
    yield session
    server.shutdown()
    server.server_close()


def fetch(url: str) -> str:
    return urllib.request.urlopen(url, timeout=10).read().decode()


def test_monitor_scrapes_alerts_and_draws(prometheus, tmp_path):
    from rich.console import Console

    from sigray.orchestrator.cluster.prometheus import monitor

    port, grafana = free_ports(2)
    with monitor(Console(quiet=True), session=str(prometheus), out=tmp_path / "out", port=port, grafana_port=grafana):
        deadline = time.monotonic() + 30
        while "SigrayStalled" not in (firing := fetch(f"http://127.0.0.1:{port}/api/v1/alerts")):
            assert time.monotonic() < deadline, firing
            time.sleep(0.2)
        assert json.loads(fetch(f"http://127.0.0.1:{grafana}/api/health"))["database"] == "ok"
        page = fetch(f"http://127.0.0.1:{grafana}/d/{UID}")
        assert "<svg" in page
        assert "4.25" in page
        for series in ("lr/trial-000 <b>12.2 %", "batch/trial-000 <b>12.2 %", "lr running <b>2", "demo <b>4.25"):
            assert f"{series}</b>" in page
        solo = "d-solo/rayDefaultDashboard/default-dashboard?orgId=1&panelId=24&theme=dark&from=now-30m&to=now"
        page = fetch(f"http://127.0.0.1:{grafana}/{solo}&var-SessionName=s1")
        assert page.count("<figure>") == 1
        assert "demo <b>4.25</b>" in page
        assert "no data in this time" in fetch(f"http://127.0.0.1:{grafana}/{solo}&var-SessionName=other")
        # Ray's Metrics page embeds Ray's dashboard: the training stands above it.
        page = fetch(f"http://127.0.0.1:{grafana}/d/rayDefaultDashboard/?orgId=1&kiosk=tv")
        assert page.index("Silence") < page.index("Loss of Ray&#x27;s panel")
        with pytest.raises(urllib.error.HTTPError):
            fetch(f"http://127.0.0.1:{grafana}/d/other")
    content = yaml.safe_load((tmp_path / "out" / "prometheus.yml").read_text())
    assert set(content) == {"global", "scrape_configs", "rule_files"}
    assert set(content["scrape_configs"][0]) == {"job_name", "static_configs"}


def test_pictures_say_that_prometheus_is_away(tmp_path):
    (port,) = free_ports(1)
    with serve(Pictures(tmp_path, f"http://127.0.0.1:{port}").answer, 0) as served:
        page = fetch(f"http://127.0.0.1:{served}/d-solo/{UID}?panelId=2")
    assert f"Prometheus at http://127.0.0.1:{port} does not answer" in page


def test_monitor_says_what_is_missing(tmp_path, capsys, monkeypatch):
    assert main(["monitor", "--session", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "prometheus.yml does not exist" in capsys.readouterr().err
    (tmp_path / "metrics" / "prometheus").mkdir(parents=True)
    (tmp_path / "metrics" / "prometheus" / "prometheus.yml").write_text("{}")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["monitor", "--session", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "apt-get install prometheus" in capsys.readouterr().err
