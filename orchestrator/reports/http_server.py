"""Serve pages over HTTP: a function answers each GET, on a thread of its own."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HTML, JSON, TEXT = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"
_STYLED_ONLY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Answer:
    """The answer to a GET."""

    body: str | bytes
    kind: str = HTML
    status: int = 200
    policy: str = _STYLED_ONLY  # Content-Security-Policy


@contextlib.contextmanager
def serve(answer: Callable[[str], Answer], port: int, *, host: str = "127.0.0.1") -> Iterator[int]:
    """Answer GETs until the end of the block; yields the port.

    Args:
        answer: receives the path with its query; several threads call it.
        port: 0 takes a free one.

    Raises:
        OSError: if the port is not free.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answer(self.path)
            data = found.body.encode() if isinstance(found.body, str) else found.body
            tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            is_known = self.headers.get("If-None-Match") == tag
            headers = {"Content-Security-Policy": found.policy, "X-Content-Type-Options": "nosniff"}
            headers |= {"Content-Type": found.kind, "Cache-Control": "no-cache", "ETag": tag}
            if "gzip" in self.headers.get("Accept-Encoding", "") and len(data) > 1000:
                data = gzip.compress(data, compresslevel=3)
                headers["Content-Encoding"] = "gzip"
            if is_known:
                data = b""
            self.send_response(304 if is_known else found.status)
            for name, value in headers.items():
                self.send_header(name, value)
            if not is_known:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise OSError(f"port {port} of {host}: {error.strerror}") from error
    with server:
        threading.Thread(target=server.serve_forever, name="pages", daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
