"""Data-shard workers as Ray actors: a pool that grows and shrinks, and the way from a training worker to it.

    driver                      DataPool       starts and stops actors, writes the list of those that are up
    one small actor             WorkerList     the list; whoever has its handle can read the stream
    each training worker        PoolBlocks     asks; replaces what is dead, hung or slow
    driver of another run       SharedPool     reads along in the stream of a pool that somebody else owns

Runs that read along keep pace: a block is decoded once for all of them if they ask for it while its data-shard worker
still has it. So a reader waits where it would leave another one behind that is with it, see `workers/data/stream_registry.py`.

Any worker can answer any question, so nothing is handed over when the list changes: a lane's next block is asked of
another worker, which reads that lane's window and goes on.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sigray.workers.config import DataConfig, ModelConfig
from sigray.workers.data import s3
from sigray.workers.data.buffers import Place
from sigray.workers.data.manifest import Manifest
from sigray.workers.data.stream_registry import WorkerList
from sigray.workers.data.worker import Block, DataWorker
from sigray.workers.metrics import WorkerMetrics

logger = logging.getLogger(__name__)

# How often a training worker looks whether the list of workers has changed.
_LOOK_S = 5.0
# A block is asked of a second worker once its reader has waited this many times as long as a block usually takes.
_SLOW = 8.0
_TELL_S = 2.0  # between two words to Prometheus
_PACE_S = 0.05  # between two looks whether the others have come
_ACCELERATOR_LABEL, _NODE_ID_LABEL = "ray.io/accelerator-type", "ray.io/node-id"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def in_tasks(function: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    """A `sigray.workers.data.manifest.ParallelMap` over the cluster that this process has joined."""
    import ray

    task: Any = ray.remote(num_cpus=1, max_retries=3)(lambda item: function(item))
    for reference in [task.remote(item) for item in items]:
        yield ray.get(reference)


def as_raised(error: Any) -> BaseException:
    """A RayTaskError as the error that it was, where that is for the user: so that it is told and not traced."""
    return error.cause if isinstance(error.cause, ValueError | OSError) else error


def start_here(actor_class: Any, *arguments: Any) -> Any:
    """A small actor with no CPU of its own on the driver's machine: it shall not die before the driver does."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(actor_class).options(num_cpus=0, scheduling_strategy=here).remote(*arguments)


def placement(nodes: list[dict[str, Any]]) -> Any:
    """Where Ray should put data-shard workers: on hosts without accelerators while those have room, else on any.

    Ray's SPREAD, right where all hosts are alike, goes round all of them, those that train included.

    Args:
        nodes: as `ray.nodes()` gives them.
    """
    from ray.util.scheduling_strategies import DoesNotExist, NodeLabelSchedulingStrategy, NotIn

    alive = [node for node in nodes if node["Alive"]]
    training = [node["NodeID"] for node in alive if _has_accelerator(node)]
    if len(training) in (0, len(alive)):
        return "SPREAD"
    # The first label is Ray's own and holds for hosts that come later too; it is missing where resources were declared
    # by hand.
    wanted: Any = {_ACCELERATOR_LABEL: DoesNotExist(), _NODE_ID_LABEL: NotIn(*training)}
    return NodeLabelSchedulingStrategy(hard={}, soft=wanted)


def _has_accelerator(node: dict[str, Any]) -> bool:
    return _ACCELERATOR_LABEL in node["Labels"] or any(node["Resources"].get(name) for name in ("GPU", "TPU"))


def listed(answer: Any) -> list[Any]:
    """The actors in a `WorkerList`'s answer."""
    import ray

    (actors,) = ray.get(ray.get(answer))
    return actors


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

    def __init__(self, manifest: Manifest, data: DataConfig, model: ModelConfig, *, seed: int, run: str = "") -> None:
        # One core is what Ray reserves for this process; torch, where it comes to be needed, reads it then.
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        keep_freed_memory()
        super().__init__(manifest, data, model, seed=seed)
        self._start_cpu_s = time.process_time()  # for imports and the like
        self._metrics, self._told_at = WorkerMetrics(run), 0.0

    def block(self, lane: int, number: int, places: Sequence[Place] = ()) -> Block:
        """As `DataWorker.block`; tells Prometheus now and then."""
        block = super().block(lane, number, places)
        if time.monotonic() - self._told_at > _TELL_S:
            self._told_at = time.monotonic()
            self._metrics.tell(self.num_decoded, self.refused, Counter(s3.TRAFFIC))
        return block

    def is_up(self) -> bool:
        return True

    def usage(self) -> dict[str, float]:
        """Samples decoded and handed out so far, and CPU seconds of this process since it was up."""
        cpu_s = time.process_time() - self._start_cpu_s
        return {"decoded": self.num_decoded, "served": self.num_served, "cpu_s": cpu_s}


class DataPool:
    """The driver's side: as many data-shard workers as it is told to have.

    Args:
        manifest, data, model, seed: as `DataWorker`.
        window: as `WorkerList`.
        run: name under which their metrics stand.

    Attributes:
        worker_list: handle of the `WorkerList`, for `SharedPool`.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        model: ModelConfig,
        *,
        seed: int,
        window: int | None = None,
        run: str = "",
    ) -> None:
        self._arguments: Any = (manifest, data, model)
        self._seed, self._run = seed, run
        self._cpus, self._resources, least = data.cpus_per_worker, data.resources_per_worker, data.num_workers
        self._actors: list[Any] = []
        self._starting: list[tuple[Any, Any]] = []  # actors, and references that resolve when they are up
        self._leaving: list[tuple[float, Any]] = []  # since when
        self.worker_list: Any = start_here(WorkerList, window)
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

    def blocks(self, timeout_s: float) -> PoolBlocks:
        """For the training workers of the run that owns the pool."""
        return PoolBlocks(self.worker_list, timeout_s)

    def usage(self) -> dict[str, float]:
        """The sum of what the workers have used; one that was replaced counts from its start."""
        import ray

        used = ray.get([actor.usage.remote() for actor in self._actors])
        return {key: sum(one[key] for one in used) for key in used[0]}

    def close(self) -> None:
        """Stop all workers."""
        import ray

        leaving = [actor for _, actor in self._leaving]
        for actor in [*self._actors, *(actor for actor, _ in self._starting), *leaving, self.worker_list]:
            ray.kill(actor)

    def _publish(self) -> None:
        import ray

        ray.get(self.worker_list.put.remote([ray.put(self._actors)]))

    def _start(self) -> Any:
        import ray

        # Ray restarts one that dies, and asks the new one what the old one was asked.
        actor = ray.remote(
            num_cpus=self._cpus,
            resources=self._resources,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=placement(ray.nodes()),
        )(DataWorkerActor)
        return actor.remote(*self._arguments, seed=self._seed, run=self._run)


class SharedPool:
    """The stream of a pool that another driver owns, as a run that reads along sees it.

    Args:
        worker_list: handle of the pool's `WorkerList`.
        reader: name of the run, its own in the pool.
    """

    def __init__(self, worker_list: Any, reader: str) -> None:
        self._list, self._reader = worker_list, reader

    def blocks(self, timeout_s: float) -> PoolBlocks:
        """For the training workers of this run."""
        return PoolBlocks(self._list, timeout_s, self._reader)

    def expect(self, number: int) -> None:
        """The training workers are about to start, with block `number` of each lane: the others wait for them."""
        import ray

        ray.get(self._list.expect.remote(self._reader, number))

    def leave(self) -> None:
        """The training workers ask for nothing for a while: the others go on."""
        self._list.leave.remote(self._reader)

    def tend(self) -> None:
        """The owner's business."""

    def close(self) -> None:
        """The owner's business, but for the others that need not wait."""
        self.leave()


class _Asked(NamedTuple):
    """A question that a worker has to answer."""

    actor: Any
    reference: Any
    is_told_places: bool = False


class PoolBlocks:
    """A training worker's `BlockSource`: lanes dealt over the listed workers.

    A dead worker is restarted by Ray, which repeats the question. One that takes several times as long as usual has
    its lane asked of another worker as well; whoever answers first gets the lane. One that gives no answer for
    `timeout_s` is killed, and thereby restarted.

    For one thread, that of its feed.

    Args:
        worker_list: handle of the pool's `WorkerList`.
        timeout_s: data.worker_timeout_s.
        reader: name of the run, where it keeps pace with others that read the same stream.
    """

    def __init__(self, worker_list: Any, timeout_s: float, reader: str | None = None) -> None:
        self._list, self._timeout_s, self._reader = worker_list, timeout_s, reader
        self._newest = -1  # block that was asked for
        self._actors: list[Any] = []
        self._taken_over: dict[int, Any] = {}  # lanes, and the worker that answers for a slow one
        self._suspects: dict[Any, tuple[float, Any]] = {}  # slow workers: since when, and what they owe
        self._elsewhere: set[Any] = set()  # workers that cannot write into this process's memory
        self._usual_s = 0.0  # running mean of how long a worker is busy with a block
        self._num_blocks = self._num_asked_twice = 0
        self._looked_at = 0.0
        self._look: Any = None  # reference of the list that is on its way

    @property
    def shares_memory(self) -> bool:
        """Whether any worker may be on this machine, as far as is known."""
        return not self._actors or any(actor not in self._elsewhere for actor in self._actors)

    def request(self, lane: int, number: int, places: Sequence[Place] = ()) -> Any:
        """As `feed.BlockSource`."""
        self._follow_list()
        self._judge_suspects()
        self._keep_pace(number)
        actor = self._taken_over.get(lane) or self._home(lane)
        if actor in self._elsewhere:
            places = ()
        return _Asked(actor, actor.block.remote(lane, number, places), bool(places))

    def wait(self, lane: int, number: int, handle: Any) -> Block:
        """The block; raises DataError as the worker did, RuntimeError where nobody answers."""
        import ray

        asked: list[_Asked] = [handle]
        begin = time.monotonic()
        num_killed = 0
        while True:
            patience_s = self._timeout_s / 4 if len(asked) > 1 else max(1.0, _SLOW * self._usual_s)
            ready, _ = ray.wait([one.reference for one in asked], timeout=min(patience_s, self._timeout_s / 4))
            if ready:
                answered = next(one for one in asked if one.reference == ready[0])
                asked.remove(answered)
                try:
                    block = ray.get(ready[0])
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
                    # Retired, or its machine is gone and took the answer along.
                    asked = asked or [self.request(lane, number)]
                    continue
                self._note(lane, block, answered, asked)
                block.has_late_writer = handle.is_told_places and answered is not handle
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
                for one in asked:
                    self._replace(one.actor)
                asked = [self.request(lane, number)]
            elif len(asked) == 1 and self._may_ask_twice():
                other = self._next_to(asked[0].actor)
                asked.append(_Asked(other, other.block.remote(lane, number)))
                self._num_asked_twice += 1

    def _keep_pace(self, number: int) -> None:
        """Wait for the other readers of the stream that this block would leave behind."""
        import ray

        if self._reader is None or number <= self._newest:
            return
        while not ray.get(self._list.may_ask.remote(self._reader, number)):
            time.sleep(_PACE_S)
        self._newest = number

    def _note(self, lane: int, block: Block, answered: _Asked, others: list[_Asked]) -> None:
        """Remember how long a block takes, who was slower than the one who answered, and who is on another machine."""
        self._num_blocks += 1
        self._usual_s += 0.1 * (block.decode_s - self._usual_s) if self._usual_s else block.decode_s
        if answered.is_told_places and len(block.images):
            self._elsewhere.add(answered.actor)
        if others and answered.actor != self._home(lane):
            self._taken_over[lane] = answered.actor
            for one in others:
                self._suspects.setdefault(one.actor, (time.monotonic(), one.reference))

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
            self._take(listed(self._list.get.remote()))
        if self._look is not None and ray.wait([self._look], timeout=0)[0]:
            self._take(listed(self._look))
            self._look = None
        if self._look is None and time.monotonic() - self._looked_at > _LOOK_S:
            self._looked_at, self._look = time.monotonic(), self._list.get.remote()

    def _take(self, actors: list[Any]) -> None:
        if actors != self._actors:
            self._actors, self._taken_over, self._suspects, self._elsewhere = actors, {}, {}, set()
