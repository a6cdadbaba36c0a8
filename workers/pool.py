"""Data-shard workers as Ray actors: a pool that grows and shrinks, and the way from a training worker to it.

    driver                      DataPool       starts and stops actors, writes the list of those that are up
    one small actor             WorkerList     the list; named, so that other runs can read the same stream
    each training worker        PoolBlocks     asks; replaces what is dead, hung or slow

Any worker can answer any question, so nothing is handed over when the list changes: a lane's next block is asked of
another worker, which reads that lane's window and goes on.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from workers.config import DataConfig, ModelConfig
from workers.data_worker import Block, DataWorker
from workers.shards import Manifest

logger = logging.getLogger(__name__)

# How often a training worker looks whether the list of workers has changed.
_LOOK_S = 5.0
# A block is asked of a second worker once its reader has waited this many times as long as a block usually takes.
_SLOW = 8.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def in_tasks(function: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    """A `workers.shards.ParallelMap` over the cluster that this process has joined."""
    import ray

    task: Any = ray.remote(num_cpus=1, max_retries=3)(lambda item: function(item))
    for reference in [task.remote(item) for item in items]:
        yield ray.get(reference)


class WorkerList:
    """The actors that are up. Runs as a Ray actor with no CPU of its own."""

    def __init__(self) -> None:
        self._actors: list[Any] = []

    def put(self, actors: list[Any]) -> None:
        self._actors = actors

    def get(self) -> list[Any]:
        return self._actors


def keep_freed_memory() -> None:
    """Let this process reuse the memory of large arrays instead of giving it back each time.

    glibc maps every large array anew, and the first touch of each page costs. 32 MiB is the most that it lets one keep;
    a block of 128 samples at 224 px has 18.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # no glibc: as it is
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


class DataWorkerActor(DataWorker):
    """A `DataWorker` in a process of its own."""

    def __init__(self, manifest: Manifest, data: DataConfig, model: ModelConfig, *, seed: int) -> None:
        import torch

        # One core is what Ray reserves for this process.
        torch.set_num_threads(1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        keep_freed_memory()
        super().__init__(manifest, data, model, seed=seed)

    def is_up(self) -> bool:
        return True


class DataPool:
    """The driver's side: as many data-shard workers as it is told to have.

    Args:
        manifest, data, model, seed: as `DataWorker`.

    Attributes:
        worker_list: handle of the `WorkerList`, for `PoolBlocks`.
    """

    def __init__(self, manifest: Manifest, data: DataConfig, model: ModelConfig, *, seed: int) -> None:
        import ray

        self._arguments: Any = (manifest, data, model)
        self._seed = seed
        self._cpus, least = data.cpus_per_worker, data.num_workers
        self._actors: list[Any] = []
        self._starting: list[tuple[Any, Any]] = []  # actors, and references that resolve when they are up
        self._leaving: list[tuple[float, Any]] = []  # since when
        self.worker_list: Any = ray.remote(num_cpus=0)(WorkerList).remote()
        # The first ones are listed at once: whoever asks waits for them.
        self._actors = [self._start() for _ in range(least if isinstance(least, int) else least[0])]
        self._publish()

    @property
    def size(self) -> int:
        """Workers that are up or on their way."""
        return len(self._actors) + len(self._starting)

    def resize(self, size: int) -> None:
        """Start or retire workers. Those that leave are stopped once what they were asked is answered."""
        while self.size < size:
            actor = self._start()
            self._starting.append((actor, actor.is_up.remote()))
        while self.size > size and len(self._actors) > 1:
            self._leaving.append((time.monotonic(), self._actors.pop()))
            self._publish()

    def tend(self) -> None:
        """List the workers that have come up, stop those that have left. Called a few times a second."""
        import ray

        for actor, reference in list(self._starting):
            if ray.wait([reference], timeout=0)[0]:
                self._starting.remove((actor, reference))
                self._actors.append(actor)
                self._publish()
        for since, actor in list(self._leaving):
            if time.monotonic() - since > 4 * _LOOK_S:
                self._leaving.remove((since, actor))
                ray.kill(actor)

    def close(self) -> None:
        """Stop all workers."""
        import ray

        leaving = [actor for _, actor in self._leaving]
        for actor in [*self._actors, *(actor for actor, _ in self._starting), *leaving, self.worker_list]:
            ray.kill(actor)

    def _publish(self) -> None:
        import ray

        ray.get(self.worker_list.put.remote(self._actors))

    def _start(self) -> Any:
        import ray

        # Ray restarts one that dies, and asks the new one what the old one was asked.
        actor = ray.remote(num_cpus=self._cpus, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")(
            DataWorkerActor
        )
        return actor.remote(*self._arguments, seed=self._seed)


class PoolBlocks:
    """A training worker's `BlockSource`: lanes dealt over the listed workers.

    A dead worker is restarted by Ray, which repeats the question. One that takes several times as long as usual has
    its lane asked of another worker as well; whoever answers first gets the lane. One that gives no answer for
    `timeout_s` is killed, and thereby restarted.

    For one thread, that of its feed.

    Args:
        worker_list: handle of the pool's `WorkerList`.
        timeout_s: data.worker_timeout_s.
    """

    def __init__(self, worker_list: Any, timeout_s: float) -> None:
        self._list, self._timeout_s = worker_list, timeout_s
        self._actors: list[Any] = []
        self._taken_over: dict[int, Any] = {}  # lanes, and the worker that answers for a slow one
        self._suspects: dict[Any, tuple[float, Any]] = {}  # slow workers: since when, and what they owe
        self._usual_s = 0.0  # running mean of how long a worker is busy with a block
        self._num_blocks = self._num_asked_twice = 0
        self._looked_at = 0.0
        self._look: Any = None  # reference of the list that is on its way

    def request(self, lane: int, number: int) -> Any:
        """An actor and the reference of its answer."""
        self._follow_list()
        self._judge_suspects()
        actor = self._taken_over.get(lane) or self._home(lane)
        return actor, actor.block.remote(lane, number)

    def wait(self, lane: int, number: int, handle: Any) -> Block:
        """The block; raises DataError as the worker did, RuntimeError where nobody answers."""
        import ray

        asked = [handle]
        begin = time.monotonic()
        num_killed = 0
        while True:
            patience_s = self._timeout_s / 4 if len(asked) > 1 else max(1.0, _SLOW * self._usual_s)
            ready, _ = ray.wait([reference for _, reference in asked], timeout=min(patience_s, self._timeout_s / 4))
            if ready:
                answered = next(pair for pair in asked if pair[1] == ready[0])
                asked.remove(answered)
                try:
                    block = ray.get(ready[0])
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
                    # Retired, or its machine is gone and took the answer along.
                    asked = asked or [self.request(lane, number)]
                    continue
                self._note(lane, block, answered[0], asked)
                return block
            waited_s = time.monotonic() - begin
            if waited_s > self._timeout_s * (num_killed + 1):
                num_killed += 1
                if num_killed == 3:
                    raise RuntimeError(
                        f"lane {lane} block {number}: data-shard workers gave no answer in {waited_s:.0f} s, though "
                        "they were replaced; raise data.worker_timeout_s if decoding is slow, or check that the "
                        "shards can be read"
                    )
                for actor, _ in asked:
                    self._replace(actor)
                asked = [self.request(lane, number)]
            elif len(asked) == 1 and self._may_ask_twice():
                other = self._next_to(asked[0][0])
                asked.append((other, other.block.remote(lane, number)))
                self._num_asked_twice += 1

    def _note(self, lane: int, block: Block, answered: Any, others: list[Any]) -> None:
        """Remember how long a block takes, and who was slower than the one who answered."""
        self._num_blocks += 1
        self._usual_s += 0.1 * (block.decode_s - self._usual_s) if self._usual_s else block.decode_s
        if others and answered != self._home(lane):
            self._taken_over[lane] = answered
            for actor, reference in others:
                self._suspects.setdefault(actor, (time.monotonic(), reference))

    def _may_ask_twice(self) -> bool:
        # At most one block in twenty: where all are slow, asking twice would make them slower.
        return len(self._actors) > 1 and self._usual_s > 0 and self._num_asked_twice <= self._num_blocks / 20

    def _judge_suspects(self) -> None:
        """A slow worker that has answered meanwhile gets its lanes back; one that has not in time is replaced."""
        import ray

        for actor, (since, reference) in list(self._suspects.items()):
            has_answered = bool(ray.wait([reference], timeout=0, fetch_local=False)[0])
            is_hung = not has_answered and time.monotonic() - since > self._timeout_s
            if is_hung:
                self._replace(actor)
            if has_answered or is_hung:
                del self._suspects[actor]
                self._taken_over = {lane: by for lane, by in self._taken_over.items() if self._home(lane) != actor}

    def _replace(self, actor: Any) -> None:
        import ray

        logger.warning("a data-shard worker gave no answer within %.0f s: replacing it", self._timeout_s)
        ray.kill(actor, no_restart=False)

    def _home(self, lane: int) -> Any:
        return self._actors[lane % len(self._actors)]

    def _next_to(self, actor: Any) -> Any:
        """Another worker than this one, the next in the list."""
        place = self._actors.index(actor) if actor in self._actors else 0
        return self._actors[(place + 1) % len(self._actors)]

    def _follow_list(self) -> None:
        import ray

        if not self._actors:
            self._take(ray.get(self._list.get.remote()))
        if self._look is not None and ray.wait([self._look], timeout=0)[0]:
            self._take(ray.get(self._look))
            self._look = None
        if self._look is None and time.monotonic() - self._looked_at > _LOOK_S:
            self._looked_at, self._look = time.monotonic(), self._list.get.remote()

    def _take(self, actors: list[Any]) -> None:
        if actors != self._actors:
            self._actors, self._taken_over, self._suspects = actors, {}, {}
