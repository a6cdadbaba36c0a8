"""Take the pictures of docs/cluster.md from a Ray head, `sigray monitor`, a submitted run and a sweep.

    apt-get install prometheus chromium fonts-dejavu-core fonts-liberation
    pip install -e '.[docs]'                       # playwright, which drives Debian's Chromium
    python -m examples.emoji36 data/emoji36
    python -m docs.take_screenshots                # about ten minutes on two cores, into docs/screenshots

Everything runs below a temporary folder and on free ports, and ends with the script. Each picture waits until its
content is there. A panel that stays empty ends the script with an error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tests.helpers.head import BIN, Head, ray_head
from tests.helpers.s3 import free_ports

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "screenshots"
RUN, SWEEP = "emoji_cpu", "loss_and_lr"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 380, "height": 780}
_MAX_BYTES = 300_000
_STUDY = {
    "name": SWEEP,
    "question": "Sigmoid or softmax, and at which learning rate?",
    "base": str(ROOT / "examples" / "emoji_cpu.yaml"),
    "overrides": {"cluster.num_workers": 1, "train.log_every_steps": 5},
    "metric": "zero_shot.held_out_designer.top5",
    "budget": 25600,
    "rungs": [6400, 12800],
    "space": {"loss.name": {"grid": ["sigmoid", "softmax"]}, "optim.lr": {"grid": [3.0e-4, 1.0e-3]}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser (default: that on PATH)")
    parser.add_argument("--samples", type=int, default=76_800, help="that the submitted run sees")
    parser.add_argument("--no-run", action="store_true", help="leave the run's pictures as they are")
    parser.add_argument("--no-sweep", action="store_true", help="leave the sweep's pictures as they are")
    options = parser.parse_args()
    if options.chromium is None or not shutil.which("prometheus"):
        raise SystemExit("apt-get install prometheus chromium")
    with tempfile.TemporaryDirectory(prefix="sigray-shots-") as name:
        home = Path(name)
        prometheus, grafana, pages = free_ports(3)
        hosts = {
            "RAY_PROMETHEUS_HOST": f"http://127.0.0.1:{prometheus}",
            "RAY_GRAFANA_HOST": f"http://127.0.0.1:{grafana}",
        }
        with ray_head(home, **hosts) as head:
            command = [
                "monitor",
                "--session",
                head.folder / "session_latest",
                "--out",
                home / "monitor",
                "--port",
                prometheus,
            ]
            command += ["--grafana-port", grafana, "--pages-port", pages]
            command += ["--runs", "~/sigray-runs", "--runs", "~/sweeps"]
            with _sigray(head, home / "monitor.log", *command), _browser(options.chromium, home) as browser:
                where = {"head": head.address, "prometheus": hosts["RAY_PROMETHEUS_HOST"]}
                where["pages"] = f"http://127.0.0.1:{pages}"
                if not options.no_run:
                    _run_pictures(browser, head, home, where, options.samples)
                if not options.no_sweep:
                    _sweep_pictures(browser, head, home, where)


def _run_pictures(browser: Any, head: Head, home: Path, where: dict[str, str], num_samples: int) -> None:
    """Take the pictures of a submitted run, and wait for its end."""
    words = ["train", str(ROOT / "examples" / "emoji_cpu.yaml"), f"run.storage={home}/storage"]
    words += [f"train.num_samples={num_samples}", "checkpoint.save_every_steps=80", "train.log_every_steps=5"]
    submit = ["submit", "--address", head.address, "--pages", where["pages"], "--no-follow", "--", *words]
    subprocess.run([BIN / "sigray", *submit], env=head.environment, cwd=ROOT, check=True)
    job = next(iter(_ask(f"{head.address}/api/jobs/")))["submission_id"]

    def told() -> dict[str, Any]:
        return _ask(f"{where['pages']}/api/runs/{RUN}") or {}

    _wait("half of the run", lambda: told().get("samples_seen", 0) > num_samples / 2, 600)
    _wait("an evaluation", lambda: told().get("num_evaluations", 0) >= 2, 600)
    with _tab(browser, DESKTOP) as tab:
        tab.goto(f"{where['pages']}/runs/{RUN}")
        tab.locator("time", has_text="ago").first.wait_for()
        # The page updates itself: the step changes without a reload, which would delete the mark.
        place = tab.locator(".place").inner_text().partition(",")[0]
        tab.evaluate("window.isTheSame = true")
        tab.wait_for_function(
            "place => window.isTheSame && !document.querySelector('.place').textContent.startsWith(place + ',')",
            arg=place,
            timeout=120_000,
        )
        _keep("run", tab, height=1750)
    with _tab(browser, PHONE, scale=2, is_mobile=True) as tab:
        tab.goto(f"{where['pages']}/runs/{RUN}")
        tab.locator("time", has_text="ago").first.wait_for()
        wide = tab.evaluate("document.documentElement.scrollWidth")
        assert wide <= PHONE["width"], f"the page is {wide} px wide"
        _keep("run_phone", tab, height=1500)
    with _tab(browser, {"width": 1440, "height": 760}) as tab:
        tab.goto(f"{head.address}/#/jobs")
        tab.get_by_text(RUN, exact=True).first.wait_for()
        tab.get_by_text("RUNNING").first.wait_for()
        _keep("jobs", tab)
        tab.goto(f"{head.address}/#/jobs/{job}")
        tab.get_by_text("User-provided metadata").first.wait_for()
        tab.get_by_text(f"{where['pages']}/runs/{RUN}").first.wait_for()
        tab.get_by_text("Expand", exact=True).first.click()
        tab.get_by_text(f'"job_name": "{RUN}"').last.wait_for()
        _keep("job", tab)
    query = "ray_sigray_train_loss"
    # The driver sets it once and then repeats it. If Ray had dropped the series, there would be two.
    form = urllib.parse.urlencode({"query": "count_over_time(ray_sigray_checkpoint_every_s[10m])"})
    _wait(
        "ten scrapes",
        lambda: any(
            float(one["value"][1]) >= 10 for one in _ask(f"{where['prometheus']}/api/v1/query?{form}")["data"]["result"]
        ),
        300,
    )
    with _tab(browser, {"width": 1440, "height": 1500}) as tab:
        tab.goto(f"{head.address}/#/metrics")
        frame = tab.frame_locator("iframe").first
        frame.locator("figure", has_text="Loss").first.wait_for()
        assert frame.get_by_text("no data in this time").count() == 0
        _keep("metrics", tab, settle_s=3)
    with _tab(browser, {"width": 1280, "height": 880}) as tab:
        graph = urllib.parse.urlencode({"g0.expr": query, "g0.tab": 0, "g0.range_input": "3m"})
        tab.goto(f"{where['prometheus']}/graph?{graph}")
        tab.get_by_text(f'run="{RUN}"').first.wait_for()
        _keep("prometheus", tab, settle_s=3)
    _wait("the end of the run", lambda: told().get("status") == "finished", 900)


def _sweep_pictures(browser: Any, head: Head, home: Path, where: dict[str, str]) -> None:
    """Take the pictures of a sweep while its trials run, on the same head."""
    study = home / "study.yaml"
    study.write_text(json.dumps(_STUDY | {"dir": str(home / "sweeps")}))
    command = [BIN / "sigray", "sweep", study, f"cluster.address={head.cluster}"]
    with (home / "sweep.log").open("w") as log:
        sweep = subprocess.Popen(
            command, env=head.environment, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        try:

            def is_at_work() -> bool:
                assert sweep.poll() is None, (home / "sweep.log").read_text()
                trials = (_ask(f"{where['pages']}/api/sweeps/{SWEEP}") or {}).get("trials", {}).values()
                done = sum(len(trial["results"]) for trial in trials)
                return done >= 6 and any(trial["status"] == "running" for trial in trials)

            _wait("a sweep at work", is_at_work, 900)
            with _tab(browser, DESKTOP) as tab:
                tab.goto(f"{where['pages']}/sweeps/{SWEEP}")
                tab.locator("time", has_text="ago").first.wait_for()
                _keep("sweep", tab, whole=True)
            with _tab(browser, {"width": 1440, "height": 900}) as tab:
                tab.goto(f"{head.address}/#/metrics")
                row = tab.frame_locator("iframe").first.locator("h2", has_text="Sweeps")
                row.wait_for()
                row.evaluate("row => row.scrollIntoView()")
                _keep("sweep_metrics", tab, settle_s=3)
            with _tab(browser, PHONE, scale=2, is_mobile=True) as tab:
                tab.goto(f"{where['pages']}/")
                tab.get_by_text(SWEEP).first.wait_for()
                _keep("list_phone", tab)
        finally:
            sweep.terminate()  # each trial writes a checkpoint, then the sweep ends
            sweep.wait()


def _ask(url: str) -> Any:
    """Return JSON; None if there is nothing yet."""
    try:
        return json.load(urllib.request.urlopen(url, timeout=30))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def _wait(what: str, condition: Callable[[], Any], timeout_s: float) -> None:
    print(f"waiting for {what}", flush=True)
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not after {timeout_s:.0f} s")
        time.sleep(1)


@contextlib.contextmanager
def _sigray(head: Head, log: Path, *words: object) -> Iterator[None]:
    with log.open("w") as output:
        command = [str(BIN / "sigray"), *map(str, words)]
        process = subprocess.Popen(command, env=head.environment, stdout=output, stderr=output)
        try:
            _wait(f"sigray {words[0]}", lambda: "pages of runs" in log.read_text() or process.poll() is not None, 120)
            assert process.poll() is None, log.read_text()
            yield
        finally:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def _browser(chromium: str, home: Path) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as playwright:
        # A context with a fresh profile; Chromium's own traffic stays off.
        browser = playwright.chromium.launch(
            executable_path=chromium, headless=True, args=arguments, env=os.environ | {"HOME": str(home)}
        )
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def _tab(browser: Any, size: dict[str, int], scale: int = 1, is_mobile: bool = False) -> Iterator[Any]:
    context = browser.new_context(
        viewport=size, device_scale_factor=scale, is_mobile=is_mobile, color_scheme="light", locale="en-GB"
    )
    try:
        tab = context.new_page()
        tab.set_default_timeout(60_000)
        yield tab
    finally:
        context.close()


def _keep(name: str, tab: Any, *, height: int | None = None, whole: bool = False, settle_s: float = 1) -> None:
    """Save a picture of a tab: the visible part, the top, or all; in 256 colours to keep git small."""
    time.sleep(settle_s)  # fonts, transitions
    size = tab.viewport_size
    if height is not None:
        tab.set_viewport_size({"width": size["width"], "height": height})
        time.sleep(settle_s)
    image = Image.open(io.BytesIO(tab.screenshot(full_page=whole))).convert("RGB")
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{name}.png"
    # MAXCOVERAGE does not weight by frequency: a thin curve keeps its colour.
    image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < _MAX_BYTES, f"{path} has {path.stat().st_size:,} bytes"
    print(f"{path.relative_to(ROOT)}: {image.width} x {image.height}, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
