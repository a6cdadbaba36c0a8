"""Faults between a client and a real S3 server: proxies of the tests' own on the loopback device.

`FaultProxy` runs in the process of the test. Requests go through as they are, the Host header included, so signatures
stay valid; for each GET of an object a schedule says what goes wrong with it. `throttled` runs in a process of its own
and looks at nothing: it moves bytes with splice, at the latency and the rate per connection that real S3 has.

    python -m tests.helpers.faultproxy UPSTREAM_PORT LATENCY_S BYTES_PER_S     prints its port
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

BODY_FAULTS = ("reset", "close", "stall")
ANSWERS = {
    "503": (503, "SlowDown"),
    "429": (429, "TooManyRequests"),
    "500": (500, "InternalError"),
    "404": (404, "NoSuchKey"),
    "403": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
}


@dataclass(frozen=True)
class Fault:
    """What happens to one answer.

    `kind` is one of BODY_FAULTS (after `num_bytes` of a body that is longer), a key of ANSWERS (instead of the object),
    "hang up" (before it), "redirect" (to `redirects_to`: the proxy itself), "slow head" (a header of which a byte comes
    each 0.1 s for ever), "lost answer" (the server has done what was asked), "no ranges" (all of it, as from a store
    that knows no ranges), "no if-match" (as from one that does not know those; both only if requests are unsigned),
    "other range" (said to begin one byte later than asked for), or "short" (`num_bytes` less than asked for, under a
    Content-Length that fits them).
    """

    kind: str
    num_bytes: int = 0


Schedule = Callable[[], Fault | None]


def in_turn(faults: Sequence[Fault | None]) -> Schedule:
    """These faults for the first GETs, none after."""
    waiting = list(faults)
    return lambda: waiting.pop(0) if waiting else None


def drawn(seed: int, share: float, kinds: Sequence[str], most_bytes: int) -> Schedule:
    """A fault for a share of the GETs, of these kinds in equal parts, after 0 to `most_bytes` bytes."""
    rng = random.Random(seed)
    return lambda: Fault(rng.choice(kinds), rng.randrange(most_bytes)) if rng.random() < share else None


class Outage:
    """A context manager: a way to a server that can be cut. Moves bytes, looks at nothing.

    Args:
        port: of the server on this machine.

    Attributes:
        endpoint: where clients connect.
        num_sent: bytes that clients have sent.
        is_down: whether connections are refused.
    """

    def __init__(self, port: int) -> None:
        self._upstream, self._open = port, set[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_sent, self.is_down, self._cut_at = 0, False, float("inf")

    def __enter__(self) -> Outage:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut_after(0)
        self._listener.close()

    def cut_after(self, num_bytes: int) -> None:
        """Cut all connections, and refuse new ones, once clients have sent so many bytes more; 0: now."""
        self._cut_at = self.num_sent + num_bytes
        if not num_bytes:
            self._cut()

    def mend(self) -> None:
        self._cut_at, self.is_down = float("inf"), False

    def _cut(self) -> None:
        self.is_down = True
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.is_down:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._upstream))
            self._open |= {client, server}
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._move, args=(source, target, source is client), daemon=True).start()

    def _move(self, source: socket.socket, target: socket.socket, is_client: bool) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65536):
                if is_client:
                    self.num_sent += len(content)
                    if self.num_sent >= self._cut_at:
                        self._cut()
                        break
                target.sendall(content)
        for each in (source, target):
            self._open.discard(each)
            each.close()


class FaultProxy:
    """A context manager; `endpoint` is its address.

    Attributes:
        schedule: is asked once for each request of an object with one of `methods`; may be replaced at any time.
        faults: that were injected, by kind.
        ranges: (first, last) byte of each GET that had a Range header, in the order of arrival.
        num_sent: bytes of object bodies that were passed on.
        most_at_once: GETs that were in progress at the same time.
    """

    def __init__(self, upstream: str, schedule: Schedule = lambda: None, methods: Sequence[str] = ("GET",)) -> None:
        address = urlsplit(upstream)
        self._upstream = (address.hostname, address.port)
        self._methods = methods
        self.schedule, self.faults, self.ranges = schedule, Counter[str](), list[tuple[int, int]]()
        self.conditions: list[str] = []  # If-Match of each GET of an object, "" for none
        self.num_sent = self.most_at_once = self._num_at_once = 0
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = self.redirects_to = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        # Each answer says how long it is, or its connection to the server would not be kept.
        with connection, contextlib.suppress(OSError), socket.create_connection(self._upstream) as server:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not self._closing.is_set() and self._exchange(connection, server):
                pass

    def _exchange(self, connection: socket.socket, server: socket.socket) -> bool:
        """One request and its answer; whether the connection may carry another one."""
        head = b""
        while b"\r\n\r\n" not in head:
            received = connection.recv(1 << 16)
            if not received:
                return False
            head += received
        head, _, body = head.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        method, path, _ = lines[0].split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        place, _, query = path.partition("?")
        # az lists below an account
        is_object = method in self._methods and place.count("/") > 1 and "comp=list" not in query
        fault = self.schedule() if is_object else None
        missing = int(headers.get("content-length", 0)) - len(body)
        if is_object and (asked := headers.get("range", "").removeprefix("bytes=")):
            first, last = (int(number) for number in asked.split("-"))
            self.ranges.append((first, last))
            self.conditions.append(headers.get("if-match", ""))
            if fault and fault.kind == "no ranges":
                lines = [line for line in lines if line.split(":")[0].lower() not in ("range", "if-match")]
            if fault and fault.kind == "no if-match":
                lines = [line for line in lines if line.split(":")[0].lower() != "if-match"]
        if fault:
            if fault.kind not in BODY_FAULTS:
                self._count(fault)
            if fault.kind == "hang up":
                return False
            if fault.kind in ANSWERS:
                status, code = ANSWERS[fault.kind]
                while missing > 0:
                    missing -= len(connection.recv(min(missing, 1 << 16)))
                error = f"<Error><Code>{code}</Code><Message>injected</Message></Error>"
                connection.sendall(f"HTTP/1.1 {status} x\r\nContent-Length: {len(error)}\r\n\r\n{error}".encode())
                return True
            if fault.kind == "redirect":
                location = f"Location: {self.redirects_to}{path}\r\nContent-Length: 0\r\n\r\n"
                connection.sendall(f"HTTP/1.1 307 x\r\n{location}".encode())
                return True
            if fault.kind == "slow head":
                connection.sendall(b"HTTP/1.1 200 x\r\nx-slow: ")
                while not select.select([connection], [], [], 0.1)[0] and not self._closing.is_set():
                    connection.sendall(b"x")
                return False
        server.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
        while missing > 0:
            received = connection.recv(1 << 16)
            server.sendall(received)
            missing -= len(received)
        if fault and fault.kind == "lost answer":
            server.recv(1)
            return False
        with self._lock:
            self._num_at_once += is_object
            self.most_at_once = max(self.most_at_once, self._num_at_once)
        try:
            return self._answer(connection, server, method, fault, is_object)
        finally:
            with self._lock:
                self._num_at_once -= is_object

    def _count(self, fault: Fault) -> None:
        with self._lock:
            self.faults[fault.kind] += 1

    def _answer(
        self, connection: socket.socket, server: socket.socket, method: str, fault: Fault | None, is_object: bool
    ) -> bool:
        answer = http.client.HTTPResponse(server, method=method)
        answer.begin()
        length = answer.getheader("Content-Length")
        kept = length is not None or method == "HEAD" or answer.status in (204, 304)
        content_range = answer.getheader("Content-Range")
        if fault and fault.kind in ("other range", "short") and content_range:  # the request itself is signed
            first, last = map(int, content_range.removeprefix("bytes ").partition("/")[0].split("-"))
            cut_bytes = min(fault.num_bytes, last - first) if fault.kind == "short" else 0
            last -= cut_bytes
            first += fault.kind == "other range"
            answer.headers.replace_header("Content-Range", f"bytes {first}-{last}/{content_range.partition('/')[2]}")
            length = str(int(length or 0) - cut_bytes)
            answer.headers.replace_header("Content-Length", length)
        lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
        lines += [f"{k}: {v}" for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection")]
        lines += [] if kept else ["Connection: close"]
        connection.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n")
        cut = fault if fault and fault.kind in BODY_FAULTS and fault.num_bytes < int(length or 0) else None
        left = cut.num_bytes if cut else None
        num_passed = 0
        while left is None or left > 0:
            piece = answer.read(1 << 16 if left is None else min(left, 1 << 16))
            if fault and fault.kind == "short":
                piece = piece[: int(length or 0) - num_passed]
            if not piece:
                return kept
            num_passed += len(piece)
            if is_object:  # counted before the client can have it
                with self._lock:
                    self.num_sent += len(piece)
            connection.sendall(piece)
            left = None if left is None else left - len(piece)
        assert cut is not None
        self._count(cut)
        if cut.kind == "stall":
            while not self._closing.is_set():  # until the client goes
                if select.select([connection], [], [], 0.1)[0] and not connection.recv(1 << 16):
                    break
        if cut.kind == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False


@contextlib.contextmanager
def throttled(upstream: str, latency_s: float, bytes_per_s: float) -> Iterator[str]:
    """A proxy in its own process that answers `latency_s` late and at `bytes_per_s` per connection; its address."""
    command = [
        sys.executable,
        "-m",
        "tests.helpers.faultproxy",
        str(urlsplit(upstream).port),
        str(latency_s),
        str(bytes_per_s),
    ]
    folder = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def _throttle(connection: socket.socket, server: socket.socket, latency_s: float, bytes_per_s: float) -> None:
    due = time.perf_counter()  # when the bytes moved so far may have arrived

    def requests() -> None:
        nonlocal due
        with contextlib.suppress(OSError):
            while request := connection.recv(1 << 16):
                time.sleep(latency_s)
                due = time.perf_counter()  # idle time earns nothing
                server.sendall(request)
            server.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=requests, daemon=True).start()
    source, sink = os.pipe()
    with contextlib.suppress(OSError):
        fcntl.fcntl(source, fcntl.F_SETPIPE_SZ, 1 << 20)
        while count := os.splice(server.fileno(), sink, 1 << 18):
            # Up to 20 ms of lateness, of this process or the server, are made up for: the machine's and not the link's.
            due = max(due, time.perf_counter() - 0.02) + count / bytes_per_s
            time.sleep(max(0.0, due - time.perf_counter()))
            while count:
                count -= os.splice(source, connection.fileno(), count)
    for each in (connection, server):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
    os.close(source)
    os.close(sink)


def main() -> None:
    port, latency_s, bytes_per_s = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = socket.create_connection(("127.0.0.1", port))
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_throttle, args=(connection, server, latency_s, bytes_per_s), daemon=True).start()


if __name__ == "__main__":
    main()
