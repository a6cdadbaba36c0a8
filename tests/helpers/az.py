"""Azurite, Microsoft's own emulator of Azure's blob storage, for the tests: `npm install azurite`, or `AZURITE`."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.s3 import BUCKET, free_ports

AZURITE = os.environ.get("AZURITE") or shutil.which("azurite-blob")
_ACCOUNT = "devstoreaccount1"  # the name and key of every Azurite, from its documents
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextlib.contextmanager
def az_server(folder: Path) -> Iterator[dict[str, str]]:
    """Start the server; yields the variables that reach it. The container is BUCKET."""
    assert AZURITE, "azurite-blob is not installed"
    (port,) = free_ports(1)
    command = [AZURITE, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
    command += ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    endpoint = f"http://127.0.0.1:{port}/{_ACCOUNT}"
    with (folder / "azurite.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no Azurite: {(folder / 'azurite.log').read_text()[-2000:]}")
                time.sleep(0.2)
            _make_container(endpoint)
            yield {
                "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
                "AZURE_STORAGE_ACCOUNT_KEY": _KEY,
                "AZURE_STORAGE_ENDPOINT": endpoint,
            }
        finally:
            process.kill()


def _make_container(endpoint: str) -> None:
    """PUT the container, signed as Azure's reference of Shared Key says: object_store makes none."""
    headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    lines = ["PUT", *[""] * 11, *(f"{name}:{value}" for name, value in headers.items())]
    text = "\n".join([*lines, f"/{_ACCOUNT}/{_ACCOUNT}/{BUCKET}", "restype:container"])
    signature = hmac.digest(base64.b64decode(_KEY), text.encode(), hashlib.sha256)
    headers |= {"Authorization": f"SharedKey {_ACCOUNT}:{base64.b64encode(signature).decode()}", "Content-Length": "0"}
    request = urllib.request.Request(f"{endpoint}/{BUCKET}?restype=container", b"", headers, method="PUT")
    request.add_unredirected_header("Content-type", "")
    urllib.request.urlopen(request).close()
