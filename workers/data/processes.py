"""Data-shard workers as processes of this machine, for a loop without Ray.

    reader's process    ProcessBlocks    deals lanes over its processes, requests blocks, restarts a dead process
    each process        main             answers requests in order; ends with the reader's process

Images go into the reader's memory (`workers/data/buffers.py`), the rest through a socket. A plain `subprocess`: fork is
unsafe beside the threads of torch, and multiprocessing's spawn runs the user's script again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
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
from sigray.workers.data.views import Pixels
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

    def forget(self) -> None:
        """Drop the outstanding requests: no loop waits for them."""
        for worker in self._workers:
            worker.generation += 1

    @property
    def pids(self) -> list[int]:
        """Return the processes."""
        return [worker.pid for worker in self._workers]

    def request(
        self, lane: int, number: int, places: Sequence[Place] = (), pixels: Pixels | None = None
    ) -> Future[Block]:
        """As `loader.BlockSource`."""
        return self._worker(lane).request(lane, number, tuple(places), pixels)

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
        self.generation = 0
        self._end: Exception | None = None  # why it answers no more
        self._lock.acquire()  # until the thread has sent the arguments
        self._start()
        threading.Thread(target=self._read, name="data-shard worker", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def request(self, *what: Any) -> Future[Block]:
        future: Future[Block] = Future()
        with self._lock:
            if self._end is not None:
                future.set_exception(self._end)
                return future
            self._outstanding.append(((self.generation, *what), future))
            with contextlib.suppress(OSError):  # it has died: `_read` sends the request again
                self._connection.send((self.generation, *what))
        return future

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._end = self._end or RuntimeError("the stream is closed")
        self._process.kill()
        with self._lock:  # not while another is started
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
                command,
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the reader, whose end ends the process
            )

    def _send_arguments(self) -> None:
        """Wait until the process takes them, if they are more than the socket holds."""
        with contextlib.suppress(OSError):
            self._connection.send_bytes(self._arguments)

    def _read(self) -> None:
        """Resolve requests until the end, in a thread of its own."""
        self._send_arguments()
        self._lock.release()
        num_deaths = 0
        while True:
            try:
                content = self._connection.recv_bytes()
            except (EOFError, OSError):
                num_deaths += 1
                with self._lock:
                    status = self._process.wait()
                    if num_deaths == _MAX_DEATHS and self._end is None:
                        self._end = DataError(self._why_dead(status))
                    if self._end is not None:
                        for _, future in self._outstanding:
                            future.set_exception(self._end)
                        return
                    self._start()
                    self._send_arguments()
                    with contextlib.suppress(OSError):
                        for what, _ in self._outstanding:
                            self._connection.send(what)
                continue
            num_deaths = 0
            _, future = self._outstanding.popleft()
            try:
                answer = pickle.loads(content)
            except Exception as error:
                answer = RuntimeError(
                    f"a value of the map function cannot be unpickled: {type(error).__name__}: {error}"
                )
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _why_dead(self, status: int) -> str:
        what = f"a data-shard worker's process ended {_MAX_DEATHS} times (status {status}) without an answer"
        for (_, lane, number, *_), _ in itertools.islice(self._outstanding, 1):
            what = f"lane {lane} block {number}: {what}"
        return f"{what}. Its output has the reason; without one it may need more memory"


def main() -> None:
    """Answer requests for blocks until the other end of the socket is gone."""
    keep_freed_memory()
    connection = Connection(int(sys.argv[1]))
    requests = _Requests()
    arguments = connection.recv_bytes()
    # In a thread: the reader's sends never wait for a decode, and its end is seen at once.
    threading.Thread(target=requests.receive, args=(connection,), daemon=True).start()
    worker: DataWorker | None = None
    failed: Exception = AssertionError()
    try:
        by_place, by_name = pickle.loads(arguments)
        worker = DataWorker(*by_place, **by_name)
    except Exception as error:  # the answer to each request
        failed = error
    while True:
        generation, *request = requests.queue.get()
        answer: Block | Exception | None = None
        try:
            if generation == requests.newest_generation:  # else no loop waits for it
                answer = worker.block(*request) if worker is not None else failed
        except Exception as error:
            answer = error
        connection.send_bytes(_pickled(answer))


class _Requests:
    """Requests that a process has received and not answered."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self.newest_generation = 0

    def receive(self, connection: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                request = connection.recv()
                self.newest_generation = request[0]
                self.queue.put(request)
        os._exit(0)


def _pickled(answer: Block | Exception | None) -> bytes:
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
