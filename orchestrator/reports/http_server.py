"""Serve pages over HTTP: a function answers each GET, on a thread of its own.

The Host of a request must be an address, localhost, or this machine's name. A page of another site can give its own
name the address of this server (DNS rebinding); the browser would then show it the answers.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import ipaddress
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HTML, JSON, TEXT = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"
EMBEDDED = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""Content-Security-Policy of pages that other pages embed."""
_ALONE = f"{EMBEDDED}; frame-ancestors 'none'; sandbox"
_CLIENT_S = 20  # a client that sends nothing, or takes nothing, for this time is left


@dataclass(frozen=True)
class Answer:
    """The answer to a GET."""

    body: str | bytes
    kind: str = HTML
    status: int = 200
    policy: str = _ALONE  # Content-Security-Policy


@contextlib.contextmanager
def serve(answer: Callable[[str], Answer], port: int, *, host: str = "127.0.0.1") -> Iterator[int]:
    """Answer GETs until the end of the block; yields the port.

    Args:
        answer: receives the path with its query; several threads call it.
        port: 0 takes a free one.

    Raises:
        OSError: if the port is not free.
    """

    names = {"localhost", host.lower(), socket.gethostname().lower()}

    class Handler(BaseHTTPRequestHandler):
        timeout = _CLIENT_S

        def do_GET(self) -> None:
            hosts = self.headers.get_all("Host", [])
            if len(hosts) != 1 or not _is_ours(hosts[0], names):
                given = ", ".join(hosts)[:200] or "none"
                found = Answer(f"the request is for the host {given}: use localhost or an address\n", TEXT, 421)
            else:
                try:
                    found = answer(self.path)
                except Exception as error:  # content that nothing foresaw: the server goes on
                    found = Answer(f"{type(error).__name__}: {error}\n"[:1000], TEXT, 500)
            data = found.body.encode(errors="replace") if isinstance(found.body, str) else found.body
            tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            is_known = self.headers.get("If-None-Match") == tag
            headers = {"Content-Security-Policy": found.policy, "Content-Type": found.kind, "ETag": tag}
            headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
            headers["Cache-Control"] = "no-cache"
            if "gzip" in self.headers.get("Accept-Encoding", "") and len(data) > 1000:
                data = gzip.compress(data, compresslevel=3)
                headers["Content-Encoding"] = "gzip"
            self.send_response(304 if is_known else found.status)
            for name, value in headers.items():
                self.send_header(name, value)
            if not is_known:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if not is_known and self.command != "HEAD":
                self.wfile.write(data)

        do_HEAD = do_GET

        def refuse(self) -> None:
            self.send_response(405)
            self.send_header("Allow", "GET, HEAD")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = refuse

        def log_message(self, *_: object) -> None:
            pass

    try:
        server = _Server((host, port), Handler)
    except OSError as error:
        raise OSError(f"port {port} of {host}: {error.strerror}") from error
    with server:
        threading.Thread(target=server.serve_forever, name="pages", daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Leave a client that went away, or sent no HTTP, without a traceback."""


def _is_ours(host: str, names: set[str]) -> bool:
    """Return whether a Host, with any port, is an address or one of our names."""
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        return name in names or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
