"""Addresses of Ray: which one a run joins, and whether a Ray answers there.

Ray itself tries a dead address for 87 s and writes a page of C++ warnings, so sigray looks first.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sigray.orchestrator.config import ConfigError

if TYPE_CHECKING:
    from sigray.orchestrator.config import RunConfig

_ANSWER_S = 5.0  # for a connection, and again for the first bytes
_LOOK_S = 8.0  # for all of it, after the imports
_VARIABLE = "RAY_ADDRESS"


def cluster_address(config: RunConfig) -> str | None:
    """Return the address of the cluster to join; None if the run starts its own Ray."""
    return _source_and_address(config)[1]


def _source_and_address(config: RunConfig) -> tuple[str, str | None]:
    """Return the key or variable of the address, and the address.

    As in Ray, `auto` follows RAY_ADDRESS.
    """
    given = config.cluster.address
    variable = os.environ.get(_VARIABLE)
    from_variable = given in (None, "auto") and bool(variable)
    address = variable if from_variable else given
    return _VARIABLE if from_variable else "cluster.address", None if address in ("local", "") else address


def check_address(config: RunConfig) -> None:
    """Check within ten seconds that a Ray answers at the address to join.

    Raises:
        ConfigError: names the key or the variable, the reason and a remedy.
    """
    source, address = _source_and_address(config)
    if address is None:
        return
    here = f"unset {_VARIABLE}, or set cluster.address=local" if source == _VARIABLE else "leave cluster.address out"
    if why := _why_no_ray(address):
        raise ConfigError(f"{source}={address}: {why}. To start a Ray on this machine, {here}")


def _why_no_ray(address: str) -> str | None:
    """Return why a run cannot join an address; None if a GCS answers there."""
    if address == "auto":
        from ray._private import services

        try:
            address = services.canonicalize_bootstrap_address_or_die("auto")
        except ConnectionError:
            return "no Ray runs on this machine; start one with `ray start --head`, or give host:port"
        why = _why_no_ray(address)
        return f"the Ray that ran here last, at {address}, is gone: {why}" if why else None
    if "://" in address:
        what = "Ray's client port; a driver joins" if address.startswith("ray://") else "a dashboard; a run joins"
        return f"this is the address of {what} a cluster by the host:port of its GCS (port 6379 by default)"
    place = re.fullmatch(r"\[?([^][/@\s]+)\]?:(\d{1,5})", address)
    if place is None or not 0 < int(place[2]) < 2**16:
        return "host:port expected; `ray start` prints it (port 6379 by default)"
    host_and_port = (place[1], int(place[2]))
    # At once, before the import of Ray.
    why = _within(lambda: socket.create_connection(host_and_port, _ANSWER_S).close())
    return why or _why_no_gcs(f"[{place[1]}]:{place[2]}" if ":" in place[1] else address)


def _why_no_gcs(address: str) -> str | None:
    import grpc
    from ray._private.gcs_utils import create_gcs_channel
    from ray.core.generated import gcs_service_pb2
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    messages: Any = gcs_service_pb2  # mypy sees no names in generated code
    channel = create_gcs_channel(address)
    try:
        NodeInfoGcsServiceStub(channel).CheckAlive(messages.CheckAliveRequest(), timeout=_ANSWER_S)
    except grpc.RpcError as error:
        # A GCS that wants a token answers too; Ray says so.
        if error.code() not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return f"no GCS of a Ray answers there, whose port is 6379 by default ({error.code().name.lower()})"
    finally:
        channel.close()
    return None


def dashboard_url(address: str) -> str:
    """Return the URL of a dashboard that answers; `host:port` counts as http.

    Raises:
        ConfigError: no answer within ten seconds, or no address of a dashboard.
    """
    url = address if "://" in address else f"http://{address}"
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{address} is no address of a dashboard: http://HOST:8265 expected")
    if why := why_no_dashboard(url):
        raise ConfigError(f"no Ray dashboard answers at {url}: {why}. Give --cluster FILE, or --address URL")
    return url


def why_no_dashboard(url: str) -> str | None:
    """Return why no dashboard answers at a URL; None if one does."""

    def look() -> str | None:
        try:
            urllib.request.urlopen(f"{url.rstrip('/')}/api/version", timeout=_ANSWER_S).close()
        except urllib.error.HTTPError as error:
            return None if error.code in (401, 403) else str(error).lower()  # a head may want a token
        return None

    return _within(look)


def _within(look: Callable[[], str | None]) -> str | None:
    """Return what `look` returns, or why it failed.

    A name service may take longer than any time-out of a socket.
    """
    found: list[str | None] = []

    def run() -> None:
        try:
            found.append(look())
        except (OSError, ValueError, http.client.HTTPException) as error:
            found.append(_reason(getattr(error, "reason", error)))  # urllib wraps the reason

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_LOOK_S)
    return found[0] if found else f"no answer within {_LOOK_S:g} s"


def _reason(error: object) -> str:
    if isinstance(error, socket.gaierror):
        return "the name of the host does not resolve"
    if isinstance(error, TimeoutError):
        return f"no answer within {_ANSWER_S:g} s"
    if isinstance(error, http.client.HTTPException):
        return "what answers there speaks no HTTP"
    return str(getattr(error, "strerror", None) or error or type(error).__name__).lower()
