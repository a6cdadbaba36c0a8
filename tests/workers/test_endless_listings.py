"""A server that repeats the pages of a listing for ever: an error in bounded time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sigray.workers import storage, stores
from sigray.workers.config import StoresConfig
from sigray.workers.data.shard_list import list_shards
from sigray.workers.data.tar import DataError
from sigray.workers.storage import Storage
from sigray.workers.stores import StoreError, list_objects

DATE = "2026-11-01T00:00:00Z"


class Endless(ThreadingHTTPServer):
    """Answers each request with the same page of `num_names`, and says that more follow if `is_endless`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.num_names = 0
        self.is_endless = True

    def page(self, is_az: bool) -> bytes:
        names = [f"folder/{number:04d}.tar" for number in range(self.num_names)]
        if is_az:
            fields = {
                "Last-Modified": "Sun, 01 Nov 2026 00:00:00 GMT",
                "Content-Length": 1,
                "Content-Type": "t",
                "Etag": "e",
            }
            meta = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
            blobs = "".join(f"<Blob><Name>{name}</Name><Properties>{meta}</Properties></Blob>" for name in names)
            return f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker>t</NextMarker></EnumerationResults>".encode()
        meta = f"<LastModified>{DATE}</LastModified><ETag>e</ETag><Size>1</Size>"
        keys = "".join(f"<Contents><Key>{name}</Key>{meta}</Contents>" for name in names)
        more = "<NextContinuationToken>t</NextContinuationToken><IsTruncated>true</IsTruncated>"
        return f"<ListBucketResult>{keys}{more if self.is_endless else ''}</ListBucketResult>".encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endless

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.server.page("comp=list" in self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endless]:
    server = Endless()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST", "AZURE_STORAGE_ENDPOINT"):
        monkeypatch.setenv(name, endpoint)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_BEARER_TOKEN", "AZURE_STORAGE_ACCOUNT_NAME"):
        monkeypatch.setenv(name, "name")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_a_listing_ends(endless, monkeypatch, scheme):
    url, began = f"{scheme}://bucket/folder", time.monotonic()
    monkeypatch.setattr(storage, "_LIST_S", 1.0)
    monkeypatch.setattr(storage, "_STORES", StoresConfig(deadline_s=1))
    monkeypatch.setattr(stores, "MAX_LISTED", 5000)
    stores_config = StoresConfig(deadline_s=1)
    place = Storage(url)
    for list_names in (lambda: list(list_objects(f"{url}/", stores_config)), place.walk, lambda: place.list("")):
        with pytest.raises(StoreError, match=r"folder/?': the store sends pages of a listing for 1 s without an end"):
            list_names()
    endless.num_names = 1000
    monkeypatch.setattr(storage, "_LIST_S", 60.0)  # a busy machine may need more than a second for five pages
    stores_config = StoresConfig(deadline_s=60)
    for list_names in (lambda: list(list_objects(f"{url}/", stores_config)), place.walk):
        with pytest.raises(StoreError, match="lists more than 5,000 names"):
            list_names()
    with pytest.raises(DataError, match="data.shards: .*lists more than 5,000 names"):
        list_shards(url, stores_config)
    assert time.monotonic() - began < 20


def test_a_process_may_exit_right_after_a_listing(endless):
    """obstore's coroutines abort one exit in twenty: their threads still need the GIL."""
    endless.is_endless = False
    program = """
import os, sys
from sigray.workers import stores
for _ in range(12):
    if not os.fork():
        list(stores.list_objects("gs://bucket/folder/"))
        sys.exit(3)
print({os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(12)})
"""
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True, text=True, timeout=60)
    assert done.stdout == "{3}\n", done
