"""The kinds of storage that a run may have: a folder, and a bucket of an s3, a gs or an az server."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.az import AZURITE, az_server
from tests.helpers.gs import gs_server
from tests.helpers.s3 import BUCKET, s3_server

_NO_AZURITE = pytest.mark.skipif(not AZURITE, reason="azurite-blob is not on PATH: npm install -g azurite")
SCHEMES = ("s3", "gs", pytest.param("az", marks=_NO_AZURITE))
KINDS = ("local", *SCHEMES)
ENDPOINTS = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST", "az": "AZURE_STORAGE_ENDPOINT"}


class Servers:
    """Starts the server of a scheme when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._variables: dict[str, dict[str, str]] = {}

    def variables(self, scheme: str) -> dict[str, str]:
        """Return the variables that reach the server; its bucket is `tests.helpers.s3.BUCKET`."""
        if scheme not in self._variables:
            server: Callable[[Path], contextlib.AbstractContextManager[dict[str, str]]]
            server = {"s3": s3_server, "gs": lambda _: gs_server(), "az": az_server}[scheme]
            (self._folder / scheme).mkdir()
            self._variables[scheme] = self._stack.enter_context(server(self._folder / scheme))
        return self._variables[scheme]

    def close(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def places(servers: Servers, folder: Path) -> Iterator[Callable[[str], str]]:
    """Yield a function that returns an empty place of a kind; the environment reaches its server."""
    with pytest.MonkeyPatch.context() as patch:

        def new(kind: str) -> str:
            if kind == "local":
                return str(folder / uuid.uuid4().hex)
            for name, value in servers.variables(kind).items():
                patch.setenv(name, value)
            return f"{kind}://{BUCKET}/{uuid.uuid4().hex}"

        yield new
