"""`sigray report`, `sigray pages` and `sigray monitor`."""

import contextlib
import signal
import threading
from argparse import Namespace
from collections.abc import Iterator

from rich.console import Console

from sigray.orchestrator.cli.command import RUN, argument, command, local, positive_int, say

PAGES_PORT = argument("--pages-port", type=positive_int, default=3001, metavar="N", help="port of the pages (3001)")


@command(RUN)
def report(options: Namespace, console: Console) -> None:
    """Write a run's report.html again."""
    from sigray.orchestrator.reports.run_page import write_report

    say(console, f"report: {write_report(options.run_folder)}")


@command(
    argument("places", nargs="*", metavar="PLACE", help="folders, or s3://bucket/prefix, of runs or sweeps"),
    argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default 127.0.0.1)"),
    PAGES_PORT,
)
def pages(options: Namespace, console: Console) -> None:
    """Serve live pages of runs and sweeps.

    examples:
      sigray pages                          runs/, sweeps/, ~/sigray-runs and ~/sigray-sweeps, on http://127.0.0.1:3001
      sigray pages /data/runs s3://bucket/runs s3://bucket/sweeps
      sigray pages --host 0.0.0.0           for a phone in the same network; everyone there can read the pages

    Needs no Ray and does not contact the runs: a page is drawn from the run's folder and updated every few seconds.
    """
    ended = _end_signal()
    with _serve_pages(options, console, options.host):
        ended.wait()


@command(
    argument("--session", default="/tmp/ray/session_latest", metavar="DIR", help="Ray's session folder"),
    argument("--out", type=local, default="monitor", metavar="DIR", help="database, generated files (default monitor)"),
    argument("--port", type=positive_int, default=9090, metavar="N", help="port of Prometheus (default 9090)"),
    argument("--grafana-port", type=positive_int, default=3000, metavar="N", help="default 3000"),
    argument("--generate", action="store_true", help="write the alert rules and the dashboard, run nothing"),
    argument("--runs", action="append", dest="places", metavar="PLACE", help="as of `sigray pages`; may be repeated"),
    PAGES_PORT,
)
def monitor(options: Namespace, console: Console) -> None:
    """Run Prometheus with alerts on the head, and draw Ray's Metrics page.

    examples:
      sigray monitor                          on the head of a cluster (in tmux or by systemd); Ctrl-C ends it
      sigray monitor --generate --out rules   alert rules and dashboard for a Prometheus and Grafana of your own
      ray exec cluster.yaml --tmux 'sigray monitor'

    Needs prometheus on PATH (`apt-get install prometheus`). If grafana-server is installed, sigray starts it with Ray's
    dashboards and its own; if not, sigray draws the panels itself. It also serves the pages of `sigray pages`. All
    servers listen on 127.0.0.1 only.
    """
    from sigray.orchestrator.cluster.prometheus import generate, monitor

    out, port, grafana_port = options.out, options.port, options.grafana_port
    if options.generate:
        say(console, *generate(out))
        return
    ended = _end_signal()
    with (
        monitor(console, session=options.session, out=out, port=port, grafana_port=grafana_port) as process,
        _serve_pages(options, console, "127.0.0.1"),
    ):
        while not ended.wait(1):
            if process.poll() is not None:
                raise RuntimeError(f"Prometheus ended; see {out / 'prometheus.log'}")


@contextlib.contextmanager
def _serve_pages(options: Namespace, console: Console, host: str) -> Iterator[None]:
    """Serve the pages of `options.places` within the block."""
    from sigray.orchestrator.reports.http_server import serve
    from sigray.orchestrator.reports.live_server import PLACES, RUNS, Pages

    pages = Pages(options.places or PLACES, [RUNS, *options.more_pages()])
    with serve(pages.answer, options.pages_port, host=host):
        say(console, f"pages of runs and sweeps: http://{host}:{options.pages_port}")
        yield


def _end_signal() -> threading.Event:
    """Return an event that Ctrl-C and SIGTERM set."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    return ended
