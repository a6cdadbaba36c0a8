"""A Google Cloud Storage server for the tests: the part of the XML API that object_store's client uses, in memory.

    python -m tests.helpers.gs     prints its address

Neither emulator on PyPI serves it: `fake-gcs-server` refuses the XML API's PUT and ignores ifGenerationMatch, and
`gcp-storage-emulator` knows neither HEAD nor listings there. The behaviour follows Google's reference,
https://cloud.google.com/storage/docs/xml-api/reference-headers and
https://cloud.google.com/storage/docs/request-preconditions.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import hashlib
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.helpers.s3 import BUCKET

TOKEN = "emulator"
_PAGE = 1000


@dataclass(frozen=True)
class _Object:
    content: bytes
    generation: int
    modified: float = field(default_factory=time.time)

    @functools.cached_property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.content).hexdigest()}"'

    def headers(self) -> dict[str, str]:
        date = email.utils.formatdate(self.modified, usegmt=True)
        return {"ETag": self.etag, "Last-Modified": date, "x-goog-generation": str(self.generation)}


class GoogleStorage(ThreadingHTTPServer):
    """The server; `objects` is the content of the bucket."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, _Object] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.generations = itertools.count(int(time.time() * 1e6))
        self.lock = threading.Lock()
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that go."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and a small body in one packet
    server: GoogleStorage

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes | memoryview = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()  # into the buffer of `wfile`
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def _handle(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "AuthenticationRequired")
        elif bucket != BUCKET:
            self._refuse(404, "NoSuchBucket")
        elif not key:
            self._list(query)
        elif "uploads" in query:
            name = f"upload-{next(self.server.generations)}"
            self.server.uploads[name] = {}
            xml = f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
            self._answer(200, xml.encode())
        elif "uploadId" in query:
            self._upload(key, query, body)
        elif self.command == "PUT":
            self._put(key, body)
        else:
            self._read(key)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _put(self, key: str, body: bytes, answer: bytes = b"") -> None:
        with self.server.lock:
            known = self.server.objects.get(key)
            wanted = self.headers.get("x-goog-if-generation-match")
            is_met = wanted is None or int(wanted) == (known.generation if known else 0)
            if is_met:
                known = self.server.objects[key] = _Object(body, next(self.server.generations))
        if is_met and known:
            self._answer(200, answer, known.headers())
        else:
            self._refuse(412, "PreconditionFailed")

    def _upload(self, key: str, query: dict[str, str], body: bytes) -> None:
        parts = self.server.uploads.get(query["uploadId"])
        if parts is None:
            self._refuse(404, "NoSuchUpload")
        elif self.command == "PUT":
            parts[int(query["partNumber"])] = body
            self._answer(200, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        elif self.command == "POST":
            content = b"".join(parts[number] for number in sorted(parts))
            etag = _Object(content, 0).etag
            xml = f"<CompleteMultipartUploadResult><ETag>{escape(etag)}</ETag></CompleteMultipartUploadResult>"
            self._put(key, content, xml.encode())
            del self.server.uploads[query["uploadId"]]
        else:
            del self.server.uploads[query["uploadId"]]
            self._answer(204)

    def _read(self, key: str) -> None:
        with self.server.lock:
            found = self.server.objects.get(key)
            if found and self.command == "DELETE":
                del self.server.objects[key]
        if found is None:
            self._refuse(404, "NoSuchKey")
        elif self.command == "DELETE":
            self._answer(204)
        elif self.headers.get("If-Match", found.etag) != found.etag:
            self._refuse(412, "PreconditionFailed")
        elif self.command == "HEAD":
            self._answer(200, found.content, found.headers())
        elif wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            size = len(found.content)
            begin = int(first) if first else max(size - int(last), 0)
            end = min(int(last) + 1, size) if first and last else size
            if begin >= size:
                self._refuse(416, "InvalidRange")
                return
            content_range = f"bytes {begin}-{end - 1}/{size}"
            self._answer(206, memoryview(found.content)[begin:end], found.headers() | {"Content-Range": content_range})
        else:
            self._answer(200, found.content, found.headers())

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = max(query.get("start-after", ""), query.get("continuation-token", ""))
        with self.server.lock:
            objects = sorted(item for item in self.server.objects.items() if item[0].startswith(prefix))
        lines: list[str] = []
        folders: list[str] = []
        last = ""
        for key, found in objects:
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            name = key[: cut + 1] if cut >= 0 else key
            if name <= after or (cut >= 0 and name in folders):
                continue
            if len(lines) + len(folders) == _PAGE:
                break
            last = name
            if cut >= 0:
                folders.append(name)
                continue
            date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(found.modified))
            lines.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{date}</LastModified>"
                f"<ETag>{escape(found.etag)}</ETag><Size>{len(found.content)}</Size></Contents>"
            )
        else:
            last = ""
        lines += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders]
        lines += [f"<NextContinuationToken>{escape(last)}</NextContinuationToken>"] if last else []
        truncated = f"<IsTruncated>{str(bool(last)).lower()}</IsTruncated>"
        self._answer(200, f"<ListBucketResult>{''.join(lines)}{truncated}</ListBucketResult>".encode())


@contextlib.contextmanager
def gs_server() -> Iterator[dict[str, str]]:
    """Start the server in a process of its own; yields the variables that reach it. The bucket is BUCKET."""
    command = [sys.executable, "-m", "tests.helpers.gs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        try:
            yield {"STORAGE_EMULATOR_HOST": process.stdout.readline().strip(), "GOOGLE_BEARER_TOKEN": TOKEN}
        finally:
            process.kill()


def main() -> None:
    server = GoogleStorage()
    print(server.endpoint, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
