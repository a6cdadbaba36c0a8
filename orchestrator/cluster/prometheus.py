"""Prometheus for a cluster: alert rules, a dashboard, and `sigray monitor`.

Rules and dashboard are made from `workers/metrics.py`; `sigray monitor` starts Prometheus with them on the head. Ray's
dashboard shows metrics only if a Grafana answers. An installed Grafana gets our dashboard beside Ray's. Without one,
`Pictures` answers the URLs that Ray's dashboard embeds: /api/health, /d/UID and /d-solo/UID?panelId=N. It draws Ray's
panels and ours as SVG from Prometheus. It is no Grafana: panels cannot be edited.
"""

from __future__ import annotations

import contextlib
import functools
import html
import json
import math
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from sigray.orchestrator.formatting import ticks, with_unit
from sigray.orchestrator.reports.foreign_folder import MAX_BYTES, ForeignFolder
from sigray.orchestrator.reports.http_server import EMBEDDED, JSON, TEXT, Answer, serve
from sigray.workers.metrics import BY_NAME, METRICS
from sigray.workers.parse import dump_yaml, parse_json, parse_yaml
from sigray.workers.storage import Storage

UID = "sigrayTraining"
RULES, DASHBOARD = "sigray_alerts.yml", "sigray_grafana_dashboard.json"
SESSION = "/tmp/ray/session_latest"
_JOB_KEYS = ("job_name", "file_sd_configs", "static_configs")
_INTERVALS = ("scrape_interval", "evaluation_interval")
_STALLED_S, _DATA_WAIT_PCT, _MISSED_SAVES = 600, 20, 3
_COLOURS = ("#3274d9", "#e0752d", "#56a64b", "#a352cc", "#e02f44", "#8f8f8f", "#00a3a3", "#b877d9")
_WIDTH, _HEIGHT, _NUM_POINTS = 640, 300, 240
Series = list[tuple[str, list[tuple[float, float]]]]  # legend, (Unix time, value)


def alert_rules() -> dict[str, Any]:
    """Return Prometheus alert rules over the metrics of the table."""
    name = {key: metric.exported for key, metric in BY_NAME.items()}
    loss, wait = name["sigray_train_loss"], name["sigray_data_wait_pct"]
    saved, every = name["sigray_checkpoint_time_s"], name["sigray_checkpoint_every_s"]
    wait_text = 'training workers wait for samples {{ $value | printf "%.0f" }} % of their time'
    # name, condition, severity, how long the condition must hold, text
    table = [
        ("SigrayStalled", f"time() - {name['sigray_heard_time_s']} > {_STALLED_S}", "critical", "0s",
         f"no metrics from its training workers for {_STALLED_S} s"),
        ("SigrayDataStarved", f"avg_over_time({wait}[5m]) > {_DATA_WAIT_PCT}", "warning", "5m",
         f"{wait_text}: add data-shard workers (data.num_workers)"),
        ("SigrayNotANumber", f"{loss} != {loss} or increase({name['sigray_bad_steps']}[15m]) > 0", "critical", "0s",
         "a loss or a gradient was not finite, or jumped"),
        ("SigrayCheckpointTooOld", f"time() - {saved} > {_MISSED_SAVES} * {every} + 60", "critical", "0s",
         "the newest checkpoint is {{ $value | humanizeDuration }} old"),
    ]  # fmt: skip
    rules = []
    for alert, expr, severity, hold, text in table:
        rule = {"alert": alert, "expr": expr, "for": hold, "labels": {"severity": severity}}
        rules.append(rule | {"annotations": {"summary": f"run {{{{ $labels.run }}}}: {text}"}})
    return {"groups": [{"name": "sigray", "rules": rules}]}


def grafana_dashboard() -> dict[str, Any]:
    """Return Grafana's JSON of a dashboard: the table's metrics, a row for each group."""
    panels: list[dict[str, Any]] = []
    y = 0
    for group in dict.fromkeys(metric.group for metric in METRICS):
        panels.append({"type": "row", "title": group, "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}})
        members = [metric for metric in METRICS if metric.group == group]
        for place, metric in enumerate(members):
            panel: dict[str, Any] = {"type": "timeseries", "title": metric.title, "description": metric.meaning}
            panel["datasource"] = "${datasource}"
            panel["fieldConfig"] = {"defaults": {"unit": metric.unit}, "overrides": []}
            panel["gridPos"] = {"h": 8, "w": 8, "x": 8 * (place % 3), "y": y + 1 + 8 * (place // 3)}
            panel["targets"] = [{"expr": metric.query, "legendFormat": metric.legend, "refId": "A"}]
            panels.append(panel)
        y += 1 + 8 * -(-len(members) // 3)
    return {
        "uid": UID,
        "title": "Sigray training",
        "schemaVersion": 38,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
        "panels": [{"id": number} | panel for number, panel in enumerate(panels, 1)],
    }


def generate(out: Path) -> list[Path]:
    """Write alert rules and dashboard into a folder; return their paths."""
    storage = Storage(out)  # it replaces a file, and so writes through no link
    storage.write(RULES, yaml.safe_dump(alert_rules(), sort_keys=False, width=200).encode())
    storage.write(DASHBOARD, json.dumps(grafana_dashboard(), indent=1).encode())
    return [out / RULES, out / DASHBOARD]


@contextlib.contextmanager
def monitor(
    console: Console, *, session: str = SESSION, out: Path, port: int = 9090, grafana_port: int = 3000
) -> Iterator[subprocess.Popen[bytes]]:
    """Run Prometheus, and Grafana or `Pictures`, on the head's loopback.

    Args:
        console: prints the addresses.
        session: Ray's session folder on the head.
        out: folder of Prometheus's database and of the generated files.
        port: port of Prometheus; RAY_PROMETHEUS_HOST of `ray start --head` must name any other than 9090.
        grafana_port: port of Grafana; RAY_GRAFANA_HOST must name any other than 3000.

    Yields:
        The process of Prometheus.

    Raises:
        RuntimeError: Prometheus is not installed, does not start, or the head runs no Ray.
    """
    say = functools.partial(console.print, soft_wrap=True)
    metrics = Path(session, "metrics")
    config = metrics / "prometheus" / "prometheus.yml"
    if not config.exists():
        raise RuntimeError(f"{config} does not exist: run this on the head of a Ray with a dashboard, or set --session")
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        raise RuntimeError("no prometheus on PATH: run `apt-get install prometheus`")
    generate(out)
    content = _scrapes(config) | {"rule_files": [str((out / RULES).absolute())]}
    Storage(out).write("prometheus.yml", dump_yaml(content).encode())
    dashboards = Path(os.environ.get("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", metrics / "grafana" / "dashboards"))
    Storage(dashboards).write(DASHBOARD, (out / DASHBOARD).read_bytes())
    command = [prometheus, f"--config.file={out / 'prometheus.yml'}", f"--storage.tsdb.path={out / 'prometheus'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.retention.time=30d"]
    address = f"http://127.0.0.1:{port}"
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(_server(command, f"{address}/-/ready", out / "prometheus.log"))
        say(f"Prometheus: {address} (alerts: {address}/alerts)")
        grafana = shutil.which("grafana-server")
        if grafana is not None:
            home = os.environ.get("GF_PATHS_HOME", "/usr/share/grafana")
            environment = {"GF_SERVER_HTTP_ADDR": "127.0.0.1", "GF_SERVER_HTTP_PORT": str(grafana_port)}
            environment["GF_PATHS_DATA"] = str(out / "grafana")
            command = [grafana, f"--homepath={home}", f"--config={metrics}/grafana/grafana.ini", "web"]
            health = f"http://127.0.0.1:{grafana_port}/api/health"
            stack.enter_context(_server(command, health, out / "grafana.log", **environment))
            say(f"Grafana: http://127.0.0.1:{grafana_port}/d/{UID}")
        else:
            stack.enter_context(serve(Pictures(dashboards, address).answer, grafana_port))
            say(f"no Grafana is installed; pictures: http://127.0.0.1:{grafana_port}/d/{UID}")
        say("the Metrics page of Ray's dashboard shows the panels")
        yield database


def _scrapes(config: Path) -> dict[str, Any]:
    """Return only the targets and intervals of Ray's Prometheus config.

    The session may be of another user: a config can also name files with passwords, and hosts to send metrics to.

    Raises:
        RuntimeError: the config cannot be read.
    """
    try:
        content = parse_yaml(ForeignFolder(Storage(config.parent)).read(config.name))
        jobs = content["scrape_configs"]
        kept = [{key: job[key] for key in _JOB_KEYS if key in job} for job in jobs]
        return {"global": {key: content["global"][key] for key in _INTERVALS}, "scrape_configs": kept}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{config} is no Prometheus config of Ray ({error}): set --session") from error


@contextlib.contextmanager
def _server(command: list[str], url: str, log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server that answers at `url`."""
    variables = os.environ | environment
    log.unlink(missing_ok=True)  # it may be a link
    with log.open("x") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=variables)
    deadline = time.monotonic() + 30
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url, timeout=2).close()
                # Another process on that port would answer too, after ours has failed to bind it.
                if process.poll() is None:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{log.stem} did not start:\n{log.read_text()[-1500:]}")
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        process.wait()


# -------------------------------------------------------------------------------------------------- pictures


class Pictures:
    """Answers a Grafana's URLs with pages of SVG.

    Args:
        dashboards: folder of Grafana's dashboard files, Ray's and ours; each page reads it again.
        prometheus: address of Prometheus.
    """

    def __init__(self, dashboards: Path, prometheus: str) -> None:
        self._folder, self._prometheus = dashboards, prometheus

    def answer(self, path: str) -> Answer:
        """Answer a GET."""
        url = urllib.parse.urlsplit(path)
        parts = [part for part in url.path.split("/") if part]
        variables = dict(urllib.parse.parse_qsl(url.query))
        if parts == ["api", "health"]:
            return Answer(json.dumps({"database": "ok", "version": "sigray", "commit": ""}), JSON)
        dashboard = self._dashboard(parts[1]) if len(parts) >= 2 and parts[0] in ("d", "d-solo") else None
        if dashboard is not None:
            panels = list(_panels(dashboard))
            if parts[0] == "d-solo":
                panels = [panel for panel in panels if str(panel.get("id")) == variables.get("panelId")]
            elif dashboard["uid"] == "rayDefaultDashboard":  # Ray's Metrics page embeds it: training first
                panels = [*_panels(grafana_dashboard()), *panels]
            if panels:
                return Answer(self._page(dashboard, panels, variables), policy=EMBEDDED)
        return Answer("not found\n", TEXT, 404)

    def _dashboard(self, uid: str) -> dict[str, Any] | None:
        if uid == UID:
            return grafana_dashboard()
        folder = ForeignFolder(Storage(self._folder))
        for name in folder.list(""):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # another file than a dashboard
                if name.endswith(".json") and (content := parse_json(folder.read(name, MAX_BYTES))).get("uid") == uid:
                    return dict(content)
        return None

    def _page(self, dashboard: dict[str, Any], panels: list[dict[str, Any]], variables: dict[str, str]) -> str:
        begin = _unix_time(variables.get("from", "now-1h"))
        end = _unix_time(variables.get("to", "now"))
        is_solo = len(panels) == 1
        body = []
        heading = ""
        for panel in panels:
            if panel["type"] == "row":
                heading = f"<h2>{html.escape(panel['title'])}</h2>"
                continue
            series, problem = self._series(panel, variables, begin, end)
            if series or problem or is_solo:  # Ray has many panels of things that a cluster may lack
                body.append(heading + _figure(panel, series, problem, begin, end))
                heading = ""
        if not body:
            body.append("<p>No panel of this dashboard has data yet.</p>")
        is_dark = variables.get("theme") == "dark"
        background, ink, rule = ("#181b1f", "#d8d9da", "#2c3235") if is_dark else ("#ffffff", "#24292e", "#e4e7e7")
        title = html.escape(dashboard.get("title", ""))
        columns = "1fr" if is_solo else "repeat(auto-fill, minmax(20rem, 1fr))"
        text = "\n".join(body)
        return _PAGE.format(title=title, background=background, ink=ink, rule=rule, columns=columns, body=text)

    def _series(self, panel: dict[str, Any], variables: dict[str, str], begin: float, end: float) -> tuple[Series, str]:
        step = max(5, round((end - begin) / _NUM_POINTS))
        series: Series = []
        problem = ""
        for target in panel.get("targets") or []:
            query = fill_in(target.get("expr", ""), variables, step)
            form = urllib.parse.urlencode({"query": query, "start": begin, "end": end, "step": step})
            try:
                with urllib.request.urlopen(f"{self._prometheus}/api/v1/query_range?{form}", timeout=10) as answer:
                    found = json.load(answer)["data"]["result"]
            except urllib.error.HTTPError as error:
                problem = error.read().decode(errors="replace")[:300]
                continue
            except OSError as error:
                problem = f"Prometheus at {self._prometheus} does not answer: {error}"
                continue
            for one in found:
                points = [(float(at), float(value)) for at, value in one["values"] if math.isfinite(float(value))]
                if points:
                    series.append((_legend(target.get("legendFormat", ""), one["metric"]), points))
        return series, problem


def _panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield rows and panels in order; a closed row holds its panels."""
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels") or []


def fill_in(query: str, variables: dict[str, str], step: int) -> str:
    """Return a query with Grafana's variables from the URL; others become `.*`."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name in ("__rate_interval", "interval", "__interval", "window"):
            return f"{max(60, 4 * step)}s"
        if name == "__range":
            return "1h"
        given = variables.get(f"var-{name}", "")
        return re.escape(given).replace("\\", "\\\\") if given and given not in ("All", "$__all") else ".*"

    return re.sub(r"\$\{(\w+)(?::\w+)?\}|\$(\w+)", value, query).replace("{global_filters}", "")


def _legend(pattern: str, labels: dict[str, str]) -> str:
    text = re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), pattern).strip(" ,")
    return text or ", ".join(f"{key}={value}" for key, value in labels.items() if key != "__name__") or "value"


def _unix_time(text: str) -> float:
    """Return the Unix time, in s, of Grafana's `now-30m` or milliseconds."""
    match = re.fullmatch(r"now(?:-(\d+)([smhdw]))?", text)
    if match:
        size = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[match[2]] if match[2] else 0
        return time.time() - size * int(match[1] or 0)
    with contextlib.suppress(ValueError):
        return float(text) / 1000
    return time.time() - 3600


def _figure(panel: dict[str, Any], series: Series, problem: str, begin: float, end: float) -> str:
    title, meaning = html.escape(panel.get("title", "")), html.escape(panel.get("description", ""))
    if not series:
        why = html.escape(problem) or "no data in this time"
        return f'<figure><figcaption title="{meaning}">{title}</figcaption><p>{why}</p></figure>'
    unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit") or (panel.get("yaxes") or [{}])[0].get("format")
    values = [value for _, points in series for _, value in points]
    low, high = min(values), max(values)
    low = 0.0 if 0 <= low < 0.5 * high else low
    if high == low:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    left, right, top, bottom = 64, 8, 8, 24
    wide, tall = _WIDTH - left - right, _HEIGHT - top - bottom

    def x(at: float) -> float:
        return left + wide * (at - begin) / (end - begin)

    def y(value: float) -> float:
        return top + tall * (1 - (value - low) / (high - low))

    parts = []
    for value, text in ticks(low, high, unit):
        level = f"{y(value):.1f}"
        parts.append(f'<line class="grid" x1="{left}" x2="{_WIDTH - right}" y1="{level}" y2="{level}"/>')
        place = f'x="{left - 6}" y="{y(value) + 4:.1f}"'
        parts.append(f'<text {place} text-anchor="end">{text}</text>')
    clock_format = "%H:%M:%S" if end - begin < 600 else "%H:%M" if end - begin < 86_400 else "%d %b %H:%M"
    for at in (begin + (end - begin) * (number + 0.5) / 4 for number in range(4)):
        clock = time.strftime(clock_format, time.localtime(at))
        parts.append(f'<text x="{x(at):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{clock}</text>')
    keys = []
    for number, (name, points) in enumerate(series[:24]):
        colour = _COLOURS[number % len(_COLOURS)]
        line = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in points)
        begin_x, begin_y = line.partition(" ")[0].split(",")
        is_line = len(points) > 1
        shape = f'polyline points="{line}"' if is_line else f'circle r="2.5" cx="{begin_x}" cy="{begin_y}"'
        parts.append(f'<{shape} style="stroke:{colour};fill:none"/>')
        newest = with_unit(points[-1][1], unit)
        keys.append(f'<li><i style="background:{colour}"></i>{html.escape(name)} <b>{newest}</b></li>')
    more = f"<li>and {len(series) - 24} more</li>" if len(series) > 24 else ""
    return (
        f'<figure><figcaption title="{meaning}">{title}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
        f"<ul>{''.join(keys)}{more}</ul></figure>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="15"><title>{title}</title><style>
body {{ margin: 8px; background: {background}; color: {ink}; font: 14px/1.4 system-ui, sans-serif;
  display: grid; grid-template-columns: {columns}; gap: 8px }}
h2 {{ grid-column: 1 / -1; margin: 8px 0 0; font-size: 15px; border-bottom: 1px solid {rule} }}
figure {{ margin: 0; padding: 6px; border: 1px solid {rule}; border-radius: 3px; min-width: 0 }}
figcaption {{ font-weight: 600 }} polyline {{ stroke-width: 1.5 }} .grid {{ stroke: {rule} }}
svg {{ width: 100%; height: auto }} svg text {{ fill: {ink}; font-size: 11px }}
ul {{ margin: 2px 0 0; padding: 0; list-style: none; font-size: 12px; max-height: 5em; overflow: auto }}
li {{ display: inline-block; margin-right: 12px }}
i {{ display: inline-block; width: 10px; height: 3px; margin: 0 5px 3px 0 }}
</style></head><body>
{body}
</body></html>
"""
