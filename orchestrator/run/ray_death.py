"""Notice when the Ray of this process dies.

`watched` raises RayDied soon after one of these: the raylet or the gcs_server of a Ray that this process has started;
the raylet of this machine, on a cluster that the process has joined; the gcs_server of such a cluster, if it is away
for long. Without this, a call of Ray waits for a minute, and then Ray ends the process with lines of its log.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sigray.orchestrator.run.policy import RunFailed
from sigray.orchestrator.run.ray_processes import kill_marked

_NOTICE_S = 2.0  # after an error of Ray, until the death that caused it is visible
_POLL_S = 1.0
_GCS_TIMEOUT_S = 40.0  # Ray ends a driver after 60 s


class RayDied(RunFailed):
    """A process died on which all of a run's Ray depends."""


find_death: Callable[[], str] = str  # of the Ray of this process: what died; empty while all live


def own_death(mark: str) -> Callable[[], str]:
    """Return what finds the death of a Ray that this process starts after this call.

    Kills the rest of that Ray, which would only wait.

    Args:
        mark: of the processes of that Ray.
    """
    before = _dead_children().keys()
    first: list[str] = []

    def find() -> str:
        if not first:
            first.extend(command for child, command in _dead_children().items() if child not in before)
            if first:
                kill_marked(mark)
        return f"the {first[0]} of this run's Ray died" if first else ""

    return find


def _dead_children() -> dict[int, str]:
    """Return ids and commands of Ray's dead processes that this process has started."""
    dead = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            command, _, fields = Path(f"/proc/{name}/stat").read_text().partition("(")[2].rpartition(")")
            state, parent = fields.split()[:2]
            if state == "Z" and int(parent) == os.getpid() and command in ("raylet", "gcs_server"):
                dead[int(name)] = command
    return dead


def joined_death() -> Callable[[], str]:
    """Return what finds the death of a cluster that this process has joined."""
    from ray._private import worker

    node: Any = worker._global_node

    host, _, port = node.gcs_address.rpartition(":")
    answered_at = time.monotonic()

    def find() -> str:
        nonlocal answered_at
        before = answered_at
        with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=_POLL_S):
            answered_at = time.monotonic()
        waited_s = time.monotonic() - answered_at
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_POLL_S)
                connection.connect(node.raylet_socket_name)
        except (ConnectionRefusedError, FileNotFoundError):
            if answered_at == before:  # a raylet without a gcs_server ends itself
                return (
                    f"the gcs_server of the cluster's head node, {node.gcs_address}, and then this node's raylet died"
                )
            return f"the raylet of node {node.node_ip_address}, on which this driver runs, died"
        except OSError:
            pass  # it is busy
        if waited_s < _GCS_TIMEOUT_S:
            return ""
        return f"the gcs_server of the cluster's head node, {node.gcs_address}, gave no answer for {waited_s:.0f} s"

    return find


@contextlib.contextmanager
def watched(find: Callable[[], str], say: Callable[[str], None] | None = None) -> Iterator[None]:
    """Raise RayDied if the Ray of this process dies.

    A signal interrupts what the main thread does: SIGCHLD, which the kernel sends at the death of a child.

    Args:
        find: as `own_death` and `joined_death` return it.
        say: shows a message. Given for processes that are no children of this one: a thread asks `find`, and shows the
            death itself. The main thread may be in a call of Ray that nothing interrupts until Ray ends the process.
    """
    global find_death
    find_death = find
    main, over = threading.main_thread(), threading.Event()

    def handle(number: int, frame: Any) -> None:
        if find():
            signal.signal(signal.SIGCHLD, before)
            raise KeyboardInterrupt  # Ray's calls pass on no other exception of a handler

    def poll() -> None:
        while not over.wait(_POLL_S):
            if (death := find()) and say is not None and main.ident is not None:
                say(f"{death}: when the cluster is up again, the same command goes on")
                signal.pthread_kill(main.ident, signal.SIGCHLD)
                return

    is_main = threading.current_thread() is main
    before = signal.signal(signal.SIGCHLD, handle) if is_main else None
    if say is not None and is_main:
        threading.Thread(target=poll, name="ray-death", daemon=True).start()
    try:
        with raised():
            yield
    finally:
        over.set()
        find_death = str
        if is_main:
            signal.signal(signal.SIGCHLD, before)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raise RayDied in the place of what the death of this process's Ray has caused."""
    from ray.exceptions import RayError

    try:
        yield
    except RunFailed:  # its message says more
        raise
    except BaseException as error:
        deadline = time.monotonic() + (_NOTICE_S if isinstance(error, RayError) else 0)
        while not (death := find_death()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if death:
            raise RayDied(death) from error
        raise
