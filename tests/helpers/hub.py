"""A Hugging Face hub with one repository, for the client of huggingface_hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_COMMIT = "0" * 40


def _answer(path: str, files: dict[str, bytes]) -> bytes | None:
    if path.startswith("/api/models/a/b/tree/"):
        tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in files]
        return json.dumps(tree).encode()
    if path.startswith("/api/models/a/b"):
        return json.dumps({"id": "a/b", "sha": _COMMIT, "siblings": []}).encode()
    return files.get(re.sub(r"^/a/b/resolve/[^/]*/", "", path))


@contextlib.contextmanager
def hub(files: dict[str, bytes]) -> Iterator[str]:
    """A hub with one repository, a/b, of these files; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            content = _answer(self.path, files)
            self.send_response(404 if content is None else 200)
            if content is None:
                code = "EntryNotFound" if self.path.startswith("/a/b/") else "RepoNotFound"
                self.send_header("X-Error-Code", code)
            self.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')  # names the file in the cache
            self.send_header("X-Repo-Commit", _COMMIT)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET" and content is not None:
                self.wfile.write(content)

        do_GET = do_HEAD

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
