"""A web server for the tests that answers ranges and If-Match, and can redirect, as the hub of Hugging Face does."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Request:
    """What came over the wire: `target` is path and query, byte for byte."""

    method: str
    target: str
    headers: dict[str, str]


@dataclass
class Site:
    """Content of a server.

    Attributes:
        files: content by path, as requested.
        needs: text that the target or the Authorization header must hold; another request is refused.
        has_ranges: whether a Range header is heeded.
        redirects_to: address of another server, followed by `query`; answers keep an ETag of their own.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    needs: str = ""
    has_ranges: bool = True
    redirects_to: str = ""
    query: str = ""
    requests: list[Request] = field(default_factory=list)
    address: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        site = self.site
        headers = {name.lower(): value for name, value in self.headers.items()}
        site.requests.append(Request(self.command, self.path, headers))
        content = site.files.get(urlsplit(self.path).path)
        if site.needs not in self.path + headers.get("authorization", ""):
            self._answer(403)
        elif site.redirects_to:
            location = f"{site.redirects_to}{urlsplit(self.path).path}{site.query}"
            self._answer(302, b"elsewhere", Location=location, ETag='"of-the-redirect"')
        elif content is None:
            self._answer(404)
        else:
            etag = f'"{hashlib.md5(content).hexdigest()}"'
            if headers.get("if-match", etag) != etag:
                self._answer(412)
            elif (wanted := headers.get("range")) and site.has_ranges:
                first, last = map(int, wanted.removeprefix("bytes=").split("-"))
                part = content[first : last + 1]
                content_range = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
                self._answer(206 if part else 416, part, ETag=etag, Content_Range=content_range)
            else:
                self._answer(200, content, ETag=etag)

    do_HEAD = do_GET


@contextlib.contextmanager
def web_server(site: Site) -> Iterator[Site]:
    """Serve a site; yields it with its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": site}))
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
