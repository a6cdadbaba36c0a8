"""An address at which no Ray answers is refused at once, by the name of its key or variable."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from sigray.orchestrator import address
from sigray.orchestrator.config import ConfigError, RunConfig, parse_config
from tests.helpers.data import TOWERS


def run_config(given: str | None) -> RunConfig:
    content = {
        "run": {"name": "a"},
        "data": {"shards": "a.tar"},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 8, "global_batch_size": 8},
        "cluster": {"address": given},
    }
    return parse_config(content, "run.yaml")


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def http_port() -> Iterator[int]:
    """The port of an HTTP server that is no Ray dashboard."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


ADDRESSES = {
    "127.0.0.1:1": "connection refused",
    "[::1]:1": "",  # refused, or no IPv6 here
    "no-such-host.invalid:6379": "the name of the host does not resolve",
    "10.0.0.9": "host:port expected",
    "10.0.0.9:99999": "host:port expected",
    "ray://10.0.0.9:10001": "this is the address of Ray's client port",
    "http://10.0.0.9:8265": "this is the address of a dashboard",
}


@pytest.mark.parametrize("given", ADDRESSES)
@pytest.mark.parametrize("variable", [False, True])
def test_an_address_without_a_ray_is_refused(given, variable, monkeypatch):
    """The message names the key or the variable, and how to do without."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", given)
    begin = time.monotonic()
    with pytest.raises(ConfigError) as raised:
        address.check_address(run_config(None if variable else given))
    assert time.monotonic() - begin < 10
    source, remedy = ("RAY_ADDRESS", "unset RAY_ADDRESS, or set") if variable else ("cluster.address", "leave")
    assert str(raised.value).startswith(f"{source}={given}: {ADDRESSES[given]}".rstrip())
    assert f"To start a Ray on this machine, {remedy} cluster.address" in str(raised.value)


def test_what_answers_but_is_no_ray_is_refused(silent, http_port, monkeypatch):
    monkeypatch.setattr(address, "_ANSWER_S", 0.5)
    for port in (silent, http_port):
        with pytest.raises(ConfigError, match=f"cluster.address=127.0.0.1:{port}: no GCS of a Ray answers there"):
            address.check_address(run_config(f"127.0.0.1:{port}"))


def test_a_ray_that_has_ended_is_named(monkeypatch):
    """Ray keeps the address of the last `ray start` in a file."""
    from ray._private import services

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "canonicalize_bootstrap_address_or_die", lambda given: "127.0.0.1:1")
    with pytest.raises(ConfigError, match="=auto: the Ray that ran here last, at 127.0.0.1:1, is gone: connection ref"):
        address.check_address(run_config("auto"))


@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [
        (None, None, None),
        (None, "", None),
        (None, "local", None),
        (None, "h:1", "h:1"),
        ("auto", "h:1", "h:1"),  # as Ray reads it
        ("g:2", "h:1", "g:2"),
        ("local", "h:1", None),
    ],
)
def test_which_ray_a_run_joins(given, variable, expected, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert address.cluster_address(run_config(given)) == expected


def test_a_dashboard_that_does_not_answer_is_refused(silent, http_port, monkeypatch):
    monkeypatch.setattr(address, "_ANSWER_S", 0.5)
    for given, why in {
        "127.0.0.1:1": "no Ray dashboard answers at http://127.0.0.1:1: connection refused. Give --cluster FILE",
        "http://127.0.0.1:1": "no Ray dashboard answers at http://127.0.0.1:1: connection refused",
        "no-such-host.invalid:8265": "the name of the host does not resolve",
        f"127.0.0.1:{silent}": "no answer within 0.5 s",
        f"127.0.0.1:{http_port}": "http error 501",
        "ray://127.0.0.1:10001": "ray://127.0.0.1:10001 is no address of a dashboard: http://HOST:8265 expected",
    }.items():
        with pytest.raises(ConfigError, match=why):
            address.dashboard_url(given)


def test_a_dashboard_is_reached_by_host_and_port():
    class Dashboard(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)  # it wants a token
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{server.server_address[1]}"
        assert address.dashboard_url(place) == address.dashboard_url(f"http://{place}") == f"http://{place}"
        server.shutdown()
