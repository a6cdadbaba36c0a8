"""One storage per kind of store for the tests: a folder, and buckets of s3, gs and az servers."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from tests.helpers.az import AZURITE, az_server
from tests.helpers.gs import gs_server
from tests.helpers.s3 import BUCKET, s3_server

SCHEMES = ("s3", "gs", *(["az"] if AZURITE else []))  # Azurite is a package of npm
KINDS = ("local", *SCHEMES)


@contextlib.contextmanager
def bucket_server(scheme: str, folder: Path) -> Iterator[dict[str, str]]:
    """Start the server of a scheme; yields the variables that reach it."""
    with {"s3": s3_server, "az": az_server, "gs": lambda _: gs_server()}[scheme](folder) as variables:
        yield variables


class Places:
    """Gives new places of each kind; a server starts with its first place.

    `variables` are those of the servers so far.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self.variables: dict[str, dict[str, str]] = {}

    def new(self, kind: str) -> str:
        """Return a place in which nothing is; the environment reaches its server."""
        if kind == "local":
            return str(self._folder / uuid.uuid4().hex)
        if kind not in self.variables:
            (self._folder / kind).mkdir()
            found = self._stack.enter_context(bucket_server(kind, self._folder / kind))
            self.variables[kind] = found
            self._stack.enter_context(mock.patch.dict(os.environ, found))
        return f"{kind}://{BUCKET}/{uuid.uuid4().hex}"

    def close(self) -> None:
        self._stack.close()
