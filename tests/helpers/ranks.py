"""Run functions on several gloo ranks, each a process of its own, and bring the results back."""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.connection
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

_TIMEOUT_S = 600.0  # of one call; whole runs take a minute on a busy machine


class RankGroup:
    """A gloo group that stays, for functions without lasting effects; to be closed, or used as a context manager.

    A start costs half a second a rank: a property test makes one group for all of its examples.
    """

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        # The fork server imports torch and open_clip once for all tests: a fresh interpreter would do so per rank.
        context.set_forkserver_preload(["torch", "open_clip", "sigray.workers.training.train"])
        self._folder = tempfile.TemporaryDirectory()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            here, there = context.Pipe()
            arguments = (rank, world_size, self._folder.name, there)
            process = context.Process(target=_rank_main, args=arguments, daemon=True)
            process.start()
            there.close()  # so that the end of the process is the end of the connection
            self._connections.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(rank, world_size, *arguments)` on every rank; its results by rank.

        The function must be importable by name. Results travel through files, so they may be of any size.

        Raises:
            RuntimeError: with the traceback of the rank that failed first; the group is closed then.
        """
        for connection in self._connections:
            connection.send((function, arguments))
        paths: dict[int, str] = {}
        while waiting := set(range(len(self._connections))) - paths.keys():
            ready = multiprocessing.connection.wait([self._connections[rank] for rank in waiting], _TIMEOUT_S)
            if not ready:
                self.close()
                raise RuntimeError(f"ranks {sorted(waiting)} gave no answer in {_TIMEOUT_S:.0f} s")
            for rank in waiting:
                connection = self._connections[rank]
                if connection not in ready:
                    continue
                try:
                    failure, paths[rank] = connection.recv()
                except EOFError:
                    failure = f"rank {rank} died with exit code {self._processes[rank].exitcode}"
                if failure:
                    self.close()
                    raise RuntimeError(failure)
        return [torch.load(io.BytesIO(Path(paths[rank]).read_bytes()), weights_only=False) for rank in sorted(paths)]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=5)
            process.kill()  # one that waits for a rank that is gone
            process.join()
        self._connections, self._processes = [], []
        self._folder.cleanup()

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """As `RankGroup.run`, on a group of its own: for functions that change their process."""
    with RankGroup(world_size) as group:
        return group.run(function, *arguments)


def _rank_main(rank: int, world_size: int, folder: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:  # the group is closed
            break
        result, failure = Path(folder, f"result-{rank}"), ""
        try:
            torch.save(function(rank, world_size, *arguments), result)
        except BaseException:
            failure = traceback.format_exc()
        connection.send((failure, str(result)))
    torch.distributed.destroy_process_group()
