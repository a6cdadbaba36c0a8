"""Data-shard workers as processes of this machine, for a loop without Ray.

    reader's process    ProcessBlocks    deals lanes over its processes, requests blocks, restarts a dead process
    each process        main             answers requests in order; ends with the reader's process

Images go into the reader's memory (`workers/data/buffers.py`), the rest through a socket. A plain `subprocess`: fork is
unsafe beside the threads of torch, and multiprocessing's spawn runs the user's script again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from sigray.workers.data.buffers import Place
from sigray.workers.data.tar import DataError
from sigray.workers.data.worker import Block, DataWorker, keep_freed_memory

_MAX_DEATHS = 3  # of a process in a row without an answer
_MAX_TIMEOUTS = 3  # of a request


class ProcessBlocks:
    """A `loader.BlockSource` over processes that this process owns.

    Args:
        arguments: of `DataWorker`, pickled: a tuple, and a dict by name.
        num_workers: processes.
        timeout_s: data.worker_timeout_s.
    """

    shares_memory = True

    def __init__(self, arguments: bytes, num_workers: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._workers = [_Process(arguments) for _ in range(num_workers)]

    @property
    def pids(self) -> list[int]:
        """Return the processes."""
        return [worker.pid for worker in self._workers]

    def request(self, lane: int, number: int, places: Sequence[Place] = ()) -> Future[Block]:
        """As `loader.BlockSource`."""
        return self._worker(lane).request(lane, number, tuple(places))

    def wait(self, lane: int, number: int, handle: Future[Block]) -> Block:
        """As `loader.BlockSource`.

        Raises:
            DataError: as the data-shard worker raised it; or its process dies each time that it decodes the block.
            RuntimeError: if the process does not answer, replaced or not.
        """
        begin = time.monotonic()
        for _ in range(_MAX_TIMEOUTS):
            with contextlib.suppress(TimeoutError):
                return handle.result(self._timeout_s)
            if handle.done():  # with a TimeoutError of its own
                return handle.result()
            self._worker(lane).kill()
        raise RuntimeError(
            f"lane {lane} block {number}: its data-shard worker gave no answer in {time.monotonic() - begin:.0f} s, "
            "though it was replaced; raise worker_timeout_s if decoding is slow, or check that the shards can be read"
        )

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()

    def _worker(self, lane: int) -> _Process:
        return self._workers[lane % len(self._workers)]


class _Process:
    """A process that answers requests in order, restarted when it dies."""

    def __init__(self, arguments: bytes) -> None:
        self._arguments = arguments
        self._lock = threading.Lock()
        self._outstanding: deque[tuple[tuple[Any, ...], Future[Block]]] = deque()
        self._is_closed = False
        self._start()
        threading.Thread(target=self._read, name="data-shard worker", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def request(self, *what: Any) -> Future[Block]:
        future: Future[Block] = Future()
        with self._lock:
            if self._is_closed:
                future.set_exception(RuntimeError("the data-shard worker's process has ended"))
                return future
            self._outstanding.append((what, future))
            with contextlib.suppress(OSError):  # it has died: `_read` sends the request again
                self._connection.send(what)
        return future

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._process.kill()
        self._process.wait()

    def _start(self) -> None:
        self._connection, there = Pipe()
        with there:
            command = [sys.executable, "-P", "-m", __name__, str(there.fileno())]
            # For map functions in modules beside the user's script. One core for each process.
            path = {"PYTHONPATH": os.pathsep.join(folder or os.getcwd() for folder in sys.path)}
            environment = os.environ | path | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            self._process = subprocess.Popen(
                command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, env=environment
            )
        with contextlib.suppress(OSError):
            self._connection.send_bytes(self._arguments)

    def _read(self) -> None:
        """Resolve requests until the end, in a thread of its own."""
        num_deaths = 0
        while True:
            try:
                answer = self._connection.recv()
            except (EOFError, OSError):
                num_deaths += 1
                with self._lock:
                    status = self._process.wait()
                    if self._is_closed or num_deaths == _MAX_DEATHS:
                        self._is_closed = True
                        return self._fail(status)
                    self._start()
                    with contextlib.suppress(OSError):
                        for what, _ in self._outstanding:
                            self._connection.send(what)
                continue
            num_deaths = 0
            _, future = self._outstanding.popleft()
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _fail(self, status: int) -> None:
        """Answer all requests, of which the oldest ended the process each time."""
        for what, future in self._outstanding:
            future.set_exception(
                DataError(
                    f"lane {what[0]} block {what[1]}: the data-shard worker's process ended {_MAX_DEATHS} times "
                    f"(status {status}) before it answered. Its output has the reason; without one it may need more "
                    "memory"
                )
            )


def main() -> None:
    """Answer requests for blocks until the other end of the socket is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the reader, whose end ends this process
    keep_freed_memory()
    connection = Connection(int(sys.argv[1]))
    requests: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
    arguments = connection.recv_bytes()
    # In a thread: the reader's sends never wait for a decode, and its end is seen at once.
    threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()
    worker: DataWorker | None = None
    failed: Exception = AssertionError()
    try:
        by_place, by_name = pickle.loads(arguments)
        worker = DataWorker(*by_place, **by_name)
    except Exception as error:  # the answer to each request
        failed = error
    while True:
        request = requests.get()
        try:
            answer: Block | Exception = worker.block(*request) if worker is not None else failed
        except Exception as error:
            answer = error
        connection.send_bytes(_pickled(answer))


def _receive(connection: Connection, requests: SimpleQueue[tuple[Any, ...]]) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            requests.put(connection.recv())
    os._exit(0)


def _pickled(answer: Block | Exception) -> bytes:
    """The answer, or what it says if it cannot be sent."""
    try:
        content = pickle.dumps(answer)
        if isinstance(answer, Exception):
            pickle.loads(content)
        return content
    except Exception as error:
        what = f"{type(answer).__name__}: {answer}"
        if not isinstance(answer, Exception):
            what = f"a value that the map function returned cannot be pickled: {error}"
        return pickle.dumps(RuntimeError(what))


if __name__ == "__main__":
    main()
