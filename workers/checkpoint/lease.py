"""The lease of a run: one driver holds it, every writer checks it.

    RUN/lease.json    owner, host, process and expiry; the driver renews it every 10 s

In a store, a driver takes and renews the lease by a conditional put: of two drivers at once, one succeeds. On a disk,
and in a store that ignores conditions, both write, and the driver whose lease is there half a second later holds it.

If a driver or its machine dies, its training workers may keep running. The next driver's lease names another owner, and
the `Fence` of the old workers refuses their writes (checkpoints, ledger).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field, FiniteFloat

from sigray.workers.parse import ParseError, as_type, parse_json
from sigray.workers.storage import ChangedError, Storage

LEASE_FILE = "lease.json"
_LIFETIME_S = 60.0
_RENEW_S = 10.0
_SETTLE_S = 0.5


class RunHeld(ValueError):
    """Another driver holds the lease, so this driver cannot start."""


class RunTakenOver(RuntimeError):
    """Another driver took the lease after this driver started."""


@dataclass(frozen=True)
class Lease:
    """Content of lease.json."""

    owner: str  # a random name
    host: str
    boot: str  # id of the machine's boot: a pid means something within one boot only
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    expires: FiniteFloat  # Unix time


def is_free(lease: Lease | None, now: float, host: str, boot: str, is_alive: Callable[[int], bool]) -> bool:
    """Whether a driver may take a run.

    True if the run has no lease, if the lease expired, or if its process ran on this machine and is gone.

    Args:
        now: Unix time.
        host, boot: of this machine.
        is_alive: whether a process of this machine has this id.
    """
    if lease is None or now >= lease.expires:
        return True
    return (lease.host, lease.boot) == (host, boot) and not is_alive(lease.pid)


def read_lease(storage: Storage) -> Lease | None:
    """The lease of a run or sweep; None if lease.json is missing or no lease."""
    try:
        return _parsed(storage.read(LEASE_FILE))
    except FileNotFoundError:
        return None


def _parsed(content: bytes | None) -> Lease | None:
    try:
        return as_type(Lease, parse_json(content)) if content else None
    except ParseError:
        return None


def is_driven(storage: Storage) -> bool:
    """Whether a driver holds the run or sweep now."""
    return _is_held(read_lease(storage))


def _is_held(lease: Lease | None) -> bool:
    return not is_free(lease, time.time(), socket.gethostname(), _boot(), _is_alive)


@dataclass(frozen=True)
class Fence:
    """Refuses writes to a run after another driver took the lease."""

    storage: Storage
    owner: str | None  # of the lease under which these training workers started; None: the run has no lease

    def check(self) -> None:
        """Compare the owners; call this before each write.

        Raises:
            RunTakenOver: if the lease names another owner.
            OSError: if the storage cannot be read.
        """
        if self.owner is None:
            return
        try:
            owner = as_type(dict[str, Any], parse_json(self.storage.read(LEASE_FILE))).get("owner")
        except (FileNotFoundError, ParseError):
            return  # the driver has ended, or is just writing its lease
        if owner != self.owner:
            raise RunTakenOver(f"another driver has taken over {self.storage.uri}: this worker writes nothing more")


class RunLease:
    """Context manager that holds the lease of a run and renews it in the background.

    Raises:
        RunHeld: on entering, if another driver holds the lease.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.owner = uuid.uuid4().hex  # in the lease while this driver holds it
        self._is_lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> RunLease:
        content, version = self._storage.read_version(LEASE_FILE)
        held = _parsed(content)
        if _is_held(held):
            raise self._refusal(held)
        try:
            self._storage.write_if(LEASE_FILE, self._content(), version)
        except ChangedError:
            raise self._refusal(read_lease(self._storage)) from None
        time.sleep(_SETTLE_S)
        held = read_lease(self._storage)
        if held is None or held.owner != self.owner:
            raise self._refusal(held)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        held = read_lease(self._storage)
        if held is not None and held.owner == self.owner:
            self._storage.delete(LEASE_FILE)

    def check(self) -> None:
        """Raise RunTakenOver if another driver has taken the run."""
        if self._is_lost:
            raise RunTakenOver(
                f"another driver has taken over {self._storage.uri} ({LEASE_FILE} there names it): this driver could "
                f"not renew its lease within {_LIFETIME_S:.0f} s. Nothing is lost; the other driver continues the run"
            )

    def _renew(self) -> None:
        while not self._stop.wait(_RENEW_S):
            try:
                self.renew()
            except OSError:
                continue  # while the storage is unreachable, other drivers cannot reach it either
            if self._is_lost:
                return

    def renew(self) -> None:
        """Hold the lease for another minute, unless another driver holds it.

        The background thread does this too.
        """
        content, version = self._storage.read_version(LEASE_FILE)
        held = _parsed(content)
        self._is_lost = held is not None and held.owner != self.owner
        if not self._is_lost:
            self._storage.write_if(LEASE_FILE, self._content(), version)

    def _content(self) -> bytes:
        lease = Lease(self.owner, socket.gethostname(), _boot(), os.getpid(), time.time() + _LIFETIME_S)
        return json.dumps(asdict(lease)).encode()

    def _refusal(self, held: Lease | None) -> RunHeld:
        holder = f"process {held.pid} on {held.host}" if held else "another driver"
        left_s = max(held.expires - time.time(), 0) if held else _LIFETIME_S
        return RunHeld(
            f"{self._storage.uri} is being run by {holder}: stop that driver first (Ctrl-C there leaves a checkpoint), "
            f"or choose another run.name. If the driver is dead, its lease ends in {left_s:.0f} s"
        )


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
