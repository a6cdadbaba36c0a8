"""What the server of pages answers, and whom."""

from __future__ import annotations

import http.client
import socket

import pytest

from sigray.orchestrator.reports.http_server import Answer, serve


@pytest.fixture(scope="module")
def port():
    def answer(path: str) -> Answer:
        if path == "/broken":
            raise KeyError("unforeseen")
        return Answer(f"the page at {path}")

    with serve(answer, 0) as port:
        yield port


def request(port: int, method: str = "GET", path: str = "/", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer, answer.read()


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:3001", "LOCALHOST:9", "127.0.0.1:80", "[::1]:3001", "192.168.1.7:3001"]
)
def test_an_address_or_localhost_is_answered(port, host):
    answer, body = request(port, Host=host)
    assert (answer.status, body) == (200, b"the page at /")


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:3001", "localhost.evil.example", "127.0.0.1.evil.example", "x@[::1]@b.example", ""],
)
def test_another_host_is_refused(port, host):
    """A site whose name has the address of this server (DNS rebinding)."""
    answer, body = request(port, Host=host)
    assert answer.status == 421
    assert b"the page" not in body
    assert b"use localhost or an address" in body


def test_two_hosts_or_none_are_refused(port):
    for lines in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(b"GET / HTTP/1.0\r\n" + lines + b"\r\n")
            assert b" 421 " in client.makefile("rb").readline()


def test_head_is_a_get_without_its_body(port):
    got, body = request(port)
    head, nothing = request(port, "HEAD")
    assert (head.status, nothing) == (200, b"")
    assert head.headers["Content-Length"] == str(len(body))
    assert {name: head.headers[name] for name in head.headers if name != "Date"} == {
        name: got.headers[name] for name in got.headers if name != "Date"
    }
    tag = got.headers["ETag"]
    assert request(port, "HEAD", **{"If-None-Match": tag})[0].status == 304


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_other_methods_are_not_allowed(port, method):
    answer, _ = request(port, method)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/", "/broken"])
def test_every_answer_forbids_scripts_frames_and_guesses(port, path):
    answer, _ = request(port, path=path)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    policy = answer.headers["Content-Security-Policy"]
    for part in ("default-src 'none'", "frame-ancestors 'none'", "form-action 'none'", "base-uri 'none'", "sandbox"):
        assert part in policy


def test_an_unforeseen_error_is_an_answer(port):
    answer, body = request(port, path="/broken")
    assert (answer.status, body) == (500, b"KeyError: 'unforeseen'\n")


def test_silent_clients_block_nobody_and_are_left(port, monkeypatch):
    monkeypatch.setattr("sigray.orchestrator.reports.http_server._CLIENT_S", 0.2)
    with serve(lambda _: Answer("page"), 0) as quick:
        silent = [socket.create_connection(("127.0.0.1", quick), timeout=30) for _ in range(50)]
        silent[0].sendall(b"GET / HTTP/1.1\r\nHost: local")
        assert request(quick)[0].status == 200
        assert [client.recv(100) for client in silent] == [b""] * 50  # the server has closed them
        for client in silent:
            client.close()


def test_headers_are_bounded(port):
    assert request(port, **{"X-Long": "x" * 70_000})[0].status == 431
    assert request(port, **{f"X-{number}": "x" for number in range(200)})[0].status == 431
