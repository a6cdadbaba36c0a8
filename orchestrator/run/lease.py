"""One driver per run: a lease in the run's storage, renewed while the driver lives, free again when it has expired.

RUN/lease.json    who drives the run, where, and until when unless it is renewed
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

from sigray.orchestrator.config import ConfigError
from sigray.workers.checkpoint.fence import LEASE_FILE, RunTakenOver
from sigray.workers.storage import Storage


class RunHeld(ConfigError):
    """Another driver holds the lease."""


_LIFETIME_S, _RENEW_S = 60.0, 10.0
_SETTLE_S = 0.5  # two drivers that start at once both write; the one whose lease stands after this time has it


@dataclass(frozen=True)
class Lease:
    """What lease.json says."""

    owner: str  # a random name
    host: str
    boot: str  # of the machine's kernel, so that a pid means something
    pid: int
    expires: float  # Unix time


def is_free(lease: Lease | None, now: float, host: str, boot: str, is_alive: Callable[[int], bool]) -> bool:
    """Whether a run may be taken: never leased, expired, or left by a process of this machine that is gone.

    Args:
        now: Unix time.
        host, boot: of this machine.
        is_alive: whether a process id of this machine is in use.
    """
    if lease is None or now >= lease.expires:
        return True
    return (lease.host, lease.boot) == (host, boot) and not is_alive(lease.pid)


def read_lease(storage: Storage) -> Lease | None:
    """Of a run or sweep; None where nobody has one, or half of one."""
    try:
        return Lease(**json.loads(storage.read(LEASE_FILE)))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def is_driven(storage: Storage) -> bool:
    """Whether a driver holds the run or sweep now."""
    return _holds(read_lease(storage))


def _holds(lease: Lease | None) -> bool:
    """Whether a lease keeps others out now, as seen from this machine."""
    return not is_free(lease, time.time(), socket.gethostname(), _boot(), _is_alive)


class RunLease:
    """A context manager that holds the lease of a run.

    Args:
        storage: of the run.

    Attributes:
        owner: a random name, in the lease while it is held.

    Raises:
        RunHeld: on entering, where another driver holds it.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage, self.owner = storage, uuid.uuid4().hex
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> RunLease:
        held = read_lease(self._storage)
        if _holds(held):
            raise self._refusal(held)
        self.renew()
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
        """Raises RunTakenOver once another driver has taken the run."""
        if self._lost:
            raise RunTakenOver(
                f"another driver has taken over {self._storage.uri} ({LEASE_FILE} there names it): this one could not "
                f"renew its lease within {_LIFETIME_S:.0f} s. Nothing is lost; the run goes on there"
            )

    def _renew(self) -> None:
        while not self._stop.wait(_RENEW_S):
            try:
                held = read_lease(self._storage)
                if held is not None and held.owner != self.owner:
                    self._lost = True
                    return
                self.renew()
            except OSError:
                continue  # the storage is away for a while: it is away for other drivers too

    def renew(self) -> None:
        """Hold it for another minute. Done in the background too."""
        lease = Lease(self.owner, socket.gethostname(), _boot(), os.getpid(), time.time() + _LIFETIME_S)
        self._storage.write(LEASE_FILE, json.dumps(asdict(lease)).encode())

    def _refusal(self, held: Lease | None) -> RunHeld:
        who = f"process {held.pid} on {held.host}" if held else "another driver"
        left_s = max(held.expires - time.time(), 0) if held else _LIFETIME_S
        return RunHeld(
            f"{self._storage.uri} is being run by {who}: stop that one first (Ctrl-C there leaves a checkpoint), or "
            f"choose another run.name. If it is dead, its lease ends in {left_s:.0f} s"
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
