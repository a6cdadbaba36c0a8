"""Data-shard workers as Ray actors, and how training workers request blocks.

    driver                          DataPool         starts and stops data-shard workers, publishes those that are up
    one small actor                 StreamRegistry   the published workers and each subscriber's position
    each training worker            PoolBlocks       requests blocks; replaces hung workers, bypasses stragglers
    driver of a subscribed run      SharedPool       reads the stream of a pool that another driver owns

Subscribers of a stream stay together: a block is decoded once for all of them if each requests it while its data-shard
worker still keeps it. So a fast subscriber waits for slower ones, see `workers/data/stream_registry.py`.

Any worker can decode any block, so a change of the list needs no handover. A lane's next block is requested from
another worker, which reads that lane's window and continues.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ray
from ray.util import scheduling_strategies as strategies

from sigray.workers.config import DataConfig, ModelConfig
from sigray.workers.data import store_stream
from sigray.workers.data.buffers import Place
from sigray.workers.data.extras import Extras
from sigray.workers.data.manifest import Manifest
from sigray.workers.data.stream_registry import StreamRegistry
from sigray.workers.data.tar import DataError
from sigray.workers.data.views import Pixels
from sigray.workers.data.worker import CUT, Block, DataWorker, keep_freed_memory
from sigray.workers.metrics import WorkerMetrics

logger = logging.getLogger(__name__)

_REFRESH_S = 5.0  # between two requests of a training worker for the list of data-shard workers
# A worker is a straggler, and another gets a backup request, after this many times the usual decode time of a block.
_STRAGGLER_FACTOR = 8.0
_NUM_RETRIES = 2  # of a request for a block whose worker died
_MAX_CRASHES = 2  # requests that failed after their retries, until the block is given up
_METRICS_S = 2.0  # between two updates of the Prometheus metrics
_SUBSCRIBERS_S = 0.05  # between two checks whether slower subscribers have caught up
_ACCELERATOR_LABEL, _NODE_ID_LABEL = "ray.io/accelerator-type", "ray.io/node-id"


def in_tasks(function: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
    """A `manifest.ParallelMap` over the cluster that this process has joined."""
    task: Any = ray.remote(num_cpus=1, max_retries=3)(lambda item: function(item))
    for reference in [task.remote(item) for item in items]:
        yield ray.get(reference)


def as_raised(error: Any) -> BaseException:
    """The cause of a RayTaskError if the user can fix it, else the error.

    The message of such a cause is shown without a traceback.
    """
    return error.cause if isinstance(error.cause, ValueError | OSError) else error


def start_here(actor_class: Any, *arguments: Any) -> Any:
    """Start a small actor without a CPU on the driver's machine: it lasts as long."""
    here = strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(actor_class).options(num_cpus=0, scheduling_strategy=here).remote(*arguments)


def placement(nodes: list[dict[str, Any]]) -> Any:
    """Ray's scheduling strategy that prefers hosts without accelerators.

    Ray's SPREAD suits clusters whose hosts are alike. In a mixed cluster it uses hosts that train as well.

    Args:
        nodes: as `ray.nodes()` gives them.
    """
    alive = [node for node in nodes if node["Alive"]]
    training = [
        node["NodeID"]
        for node in alive
        if _ACCELERATOR_LABEL in node["Labels"] or node["Resources"].get("GPU") or node["Resources"].get("TPU")
    ]
    if len(training) in (0, len(alive)):
        return "SPREAD"
    # The first label is Ray's own and holds for hosts that join later too. It is missing if resources were declared by
    # hand.
    wanted: Any = {_ACCELERATOR_LABEL: strategies.DoesNotExist(), _NODE_ID_LABEL: strategies.NotIn(*training)}
    return strategies.NodeLabelSchedulingStrategy(hard={}, soft=wanted)


def listed(reference: Any) -> list[Any]:
    """The actors in the result of `StreamRegistry.actors`."""
    (actors,) = ray.get(ray.get(reference))
    return actors


class DataWorkerActor(DataWorker):
    """A `DataWorker` in a process of its own."""

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        model: ModelConfig,
        *,
        seed: int,
        run: str = "",
        extras: Extras | None = None,
    ) -> None:
        # Ray reserves one core for this process. torch, if it is imported later, reads the first variable then.
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        keep_freed_memory()
        super().__init__(manifest, data, model, seed=seed, extras=extras)
        self._start_cpu_s = time.process_time()  # used by imports
        self._metrics = WorkerMetrics(run)
        self._updated_at = 0.0

    @ray.method(max_task_retries=_NUM_RETRIES)
    def block(  # type: ignore[override]  # Ray's stub of `method` forgets the defaults
        self, lane: int, number: int, places: Sequence[Place] = (), pixels: Pixels | None = None
    ) -> Block:
        """As `DataWorker.block`; updates the Prometheus metrics every `_METRICS_S`."""
        block = super().block(lane, number, places, pixels)
        if time.monotonic() - self._updated_at > _METRICS_S:
            self._updated_at = time.monotonic()
            reasons = self.refused + Counter({CUT: self.num_cut})
            self._metrics.update(self.num_decoded, reasons, Counter(store_stream.TRAFFIC))
        return block

    def is_up(self) -> bool:
        return True

    def usage(self) -> dict[str, float]:
        """Samples decoded and served, and CPU seconds since this process was up."""
        cpu_s = time.process_time() - self._start_cpu_s
        return {"decoded": self.num_decoded, "served": self.num_served, "cpu_s": cpu_s}


def first_workers(data: DataConfig) -> list[dict[str, float]]:
    """Ray resources of each data-shard worker that a pool starts with."""
    num_workers = data.num_workers if isinstance(data.num_workers, int) else data.num_workers[0]
    return [{"CPU": data.cpus_per_worker, **data.resources_per_worker}] * num_workers


class DataPool:
    """The driver's side: starts, publishes and retires data-shard workers.

    No worker runs before `start` and after `release`. A stream is a function of position, so new workers continue it.

    Args:
        manifest, data, model, seed, extras: as `DataWorker`.
        window, num_readers: as `StreamRegistry`.
        run: name of the run in the metrics.

    Attributes:
        registry: handle of the pool's `StreamRegistry`, for `SharedPool`.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        model: ModelConfig,
        *,
        seed: int,
        window: int | None = None,
        num_readers: int = 1,
        run: str = "",
        extras: Extras | None = None,
    ) -> None:
        self._arguments = (manifest, data, model)
        self._seed, self._run, self._extras = seed, run, extras
        self._starting: list[tuple[Any, Any]] = []  # actors, and references that resolve when they are up
        self._retired: list[tuple[float, Any]] = []  # since when, and the actor
        self.registry: Any = start_here(StreamRegistry, window, num_readers)
        self._actors: list[Any] = []

    def start(self) -> None:
        """Start the first workers, if none runs."""
        # They are published at once: Ray keeps requests until they are up.
        self._actors = self._actors or [self._start() for _ in first_workers(self._arguments[1])]
        self._publish()

    @property
    def demand(self) -> Sequence[dict[str, float]]:
        """Ray resources of each worker that `start` would start now."""
        return [] if self._actors else first_workers(self._arguments[1])

    @property
    def size(self) -> int:
        """Workers that are up or starting."""
        return len(self._actors) + len(self._starting)

    def resize(self, size: int) -> None:
        """Start or retire workers; retired ones finish their outstanding requests."""
        while self.size < size:
            actor = self._start()
            self._starting.append((actor, actor.is_up.remote()))
        while self.size > size and len(self._actors) > 1:
            self._retired.append((time.monotonic(), self._actors.pop()))
            self._publish()

    def poll(self) -> None:
        """Publish workers that are up, stop retired ones; called several times a second."""
        for actor, reference in list(self._starting):
            if ray.wait([reference], timeout=0)[0]:
                self._starting.remove((actor, reference))
                self._actors.append(actor)
                self._publish()
        for since, actor in list(self._retired):
            if time.monotonic() - since > 4 * _REFRESH_S:
                self._retired.remove((since, actor))
                ray.kill(actor)

    def blocks(self, timeout_s: float) -> PoolBlocks:
        """The block source of the training workers of the run that owns the pool."""
        return PoolBlocks(self.registry, timeout_s)

    def usage(self) -> dict[str, float]:
        """The sum of the workers' usage; a replaced worker counts from its restart."""
        used = ray.get([actor.usage.remote() for actor in self._actors])
        return {key: sum(one[key] for one in used) for key in used[0]}

    @property
    def is_held(self) -> bool:
        """Whether workers run or start."""
        return bool(self._actors)

    def release(self) -> bool:
        """Stop all workers, if no training worker reads; return True."""
        others = [*(actor for actor, _ in self._starting), *(actor for _, actor in self._retired)]
        for actor in [*self._actors, *others]:
            ray.kill(actor)
        self._actors, self._starting, self._retired = [], [], []
        return True

    def close(self) -> None:
        """Stop all workers and the registry."""
        self.release()
        ray.kill(self.registry)

    def _publish(self) -> None:
        ray.get(self.registry.publish.remote([ray.put(self._actors)]))

    def _start(self) -> Any:
        manifest, data, model = self._arguments
        # Ray restarts a dead worker and repeats its outstanding requests; a block's request twice.
        actor = ray.remote(
            num_cpus=data.cpus_per_worker,
            resources=data.resources_per_worker,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=placement(ray.nodes()),
        )(DataWorkerActor)
        return actor.remote(manifest, data, model, seed=self._seed, run=self._run, extras=self._extras)


class SharedPool:
    """The stream of a pool that another driver owns, for a run that subscribes to it.

    Args:
        registry: handle of the pool's `StreamRegistry`.
        subscriber: name of the run, unique in the pool.
    """

    def __init__(self, registry: Any, subscriber: str) -> None:
        self._registry, self._subscriber = registry, subscriber

    def blocks(self, timeout_s: float) -> PoolBlocks:
        """The block source of this run's training workers."""
        return PoolBlocks(self._registry, timeout_s, self._subscriber)

    def subscribe(self, number: int) -> None:
        """Make the other subscribers wait: training starts with this block of each lane."""
        ray.get(self._registry.subscribe.remote(self._subscriber, number))

    def unsubscribe(self) -> None:
        """Let the other subscribers continue: this run requests nothing for a while."""
        self._registry.unsubscribe.remote(self._subscriber)

    demand: tuple[dict[str, float], ...] = ()
    is_held = True  # the process of the run holds resources
    size = None

    def start(self) -> None:
        """Do nothing: the owner of the pool starts, polls and releases it."""

    def poll(self) -> None:
        """See `start`."""

    def release(self) -> bool:
        """Return False: only the end of this run's process releases anything."""
        return False

    def close(self) -> None:
        """Unsubscribe; the owner of the pool closes it."""
        self.unsubscribe()


class _Request(NamedTuple):
    """An outstanding request to a data-shard worker."""

    actor: Any
    reference: Any
    pixels: Pixels | None
    has_places: bool = False
    is_backup: bool = False


def may_send_backup(num_others: int, num_late: int, num_lost: int, num_blocks: int) -> bool:
    """Whether a late worker's block is requested from another worker.

    Backup requests to workers that are all slow would make them slower. So most workers must not be late, and at most
    one block in twenty may have a backup request that the first worker answered before. The requests that win are as
    many as the late workers need.

    Args:
        num_others: workers that are not late.
        num_late: workers that lost to a backup request and have not answered since, this one included.
        num_lost: backup requests that lost.
        num_blocks: blocks received.
    """
    return num_others >= num_late and num_lost <= num_blocks / 20


class PoolBlocks:
    """A training worker's `BlockSource`: lanes dealt over the published workers.

    Ray restarts a dead worker and repeats its requests. If a worker takes several times as long as usual, it is a
    straggler: another worker gets a backup request, and the lane goes to the one that answers first. If a worker gives
    no answer for `timeout_s`, it is killed, and Ray restarts it.

    Used by one thread, that of the loader.

    Args:
        registry: handle of the pool's `StreamRegistry`.
        timeout_s: data.worker_timeout_s.
        subscriber: name of the run if it shares the stream with other runs.
    """

    def __init__(self, registry: Any, timeout_s: float, subscriber: str | None = None) -> None:
        self._registry, self._timeout_s, self._subscriber = registry, timeout_s, subscriber
        self._newest = -1  # block that was requested
        self._actors: list[Any] = []
        self._taken_over: dict[int, Any] = {}  # lanes of stragglers, and the worker that serves each instead
        self._stragglers: dict[Any, tuple[float, Any]] = {}  # since when, and the outstanding reference
        self._remote: set[Any] = set()  # workers that cannot write to this process's memory
        self._usual_s = 0.0  # running mean of the time in which a worker decodes a block
        self._num_blocks = 0
        self._num_lost = 0  # backup requests that the straggler answered before
        self._refreshed_at = 0.0
        self._refresh: Any = None  # reference of the list of workers while it is outstanding

    @property
    def shares_memory(self) -> bool:
        """Whether any worker may be on this machine, as far as is known."""
        return not self._actors or any(actor not in self._remote for actor in self._actors)

    def request(self, lane: int, number: int, places: Sequence[Place] = (), pixels: Pixels | None = None) -> Any:
        """As `loader.BlockSource`."""
        self._refresh_actors()
        self._check_stragglers()
        if self._subscriber is not None and number > self._newest:
            # Slower subscribers may still need what this block would evict.
            while not ray.get(self._registry.may_request.remote(self._subscriber, number)):
                time.sleep(_SUBSCRIBERS_S)
            self._newest = number
        actor = self._taken_over.get(lane) or self._home(lane)
        if actor in self._remote:
            places = ()
        return _Request(actor, actor.block.remote(lane, number, places, pixels), pixels, bool(places))

    def wait(self, lane: int, number: int, handle: Any) -> Block:
        """As `loader.BlockSource`.

        Raises:
            DataError: as the data-shard worker raised it; the block kills each worker that decodes it.
            RuntimeError: if no worker answers, replaced ones included.
        """
        outstanding: list[_Request] = [handle]
        begin = time.monotonic()
        num_timeouts = num_crashes = 0
        while True:
            other = self._backup_for(outstanding[0].actor) if len(outstanding) == 1 else None
            if other is None:
                patience_s = self._timeout_s / 4
            elif outstanding[0].actor in self._stragglers:
                patience_s = 0.0  # its other requests wait too
            else:
                patience_s = max(1.0, _STRAGGLER_FACTOR * self._usual_s)
            references = [request.reference for request in outstanding]
            ready, _ = ray.wait(references, timeout=min(patience_s, self._timeout_s / 4))
            if ready:
                answered = outstanding.pop(references.index(ready[0]))
                try:
                    block = ray.get(ready[0])
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                    # The worker was retired, or its machine is gone, and the block with it. Or it died again and again.
                    num_crashes += isinstance(error, ray.exceptions.ActorUnavailableError)
                    if num_crashes == _MAX_CRASHES:
                        samples = ray.get(answered.actor.describe.remote(lane, number))
                        num_deaths = (_NUM_RETRIES + 1) * num_crashes
                        raise DataError(
                            f"lane {lane} block {number}: data-shard workers died {num_deaths} times while they "
                            f"decoded {samples}. Run without these shards, or give the workers more memory"
                        ) from error
                    outstanding = outstanding or [self.request(lane, number, (), handle.pixels)]
                    continue
                self._note(lane, block, answered, outstanding)
                block.has_straggler = handle.has_places and answered is not handle
                return block
            waited_s = time.monotonic() - begin
            if waited_s > self._timeout_s * (num_timeouts + 1):
                num_timeouts += 1
                if num_timeouts == 3:
                    raise RuntimeError(
                        f"lane {lane} block {number}: data-shard workers gave no answer in {waited_s:.0f} s, though "
                        "they were replaced; raise data.worker_timeout_s if decoding is slow, or check that the "
                        "shards can be read"
                    )
                for request in outstanding:
                    self._replace(request.actor)
                outstanding = [self.request(lane, number, (), handle.pixels)]
            elif other is not None:
                reference = other.block.remote(lane, number, (), handle.pixels)
                outstanding.append(_Request(other, reference, handle.pixels, is_backup=True))

    def _note(self, lane: int, block: Block, answered: _Request, outstanding: list[_Request]) -> None:
        """Note the decode time, stragglers, and workers on other machines."""
        self._num_blocks += 1
        self._usual_s += 0.1 * (block.decode_s - self._usual_s) if self._usual_s else block.decode_s
        if answered.has_places and len(block.images):
            self._remote.add(answered.actor)
        if outstanding and not answered.is_backup:
            self._num_lost += 1
        elif outstanding:
            self._taken_over[lane] = answered.actor
            for request in outstanding:
                self._stragglers.setdefault(request.actor, (time.monotonic(), request.reference))

    def _backup_for(self, actor: Any) -> Any | None:
        """The worker for a backup request if `actor` is late; None if none may be sent."""
        late = self._stragglers.keys() | {actor}
        others = [other for other in self._actors if other not in late]
        if not self._usual_s or not may_send_backup(len(others), len(late), self._num_lost, self._num_blocks):
            return None
        return others[self._num_blocks % len(others)]

    def _check_stragglers(self) -> None:
        """Give stragglers that have answered their lanes back; replace hung ones."""
        for actor, (since, reference) in list(self._stragglers.items()):
            has_answered = bool(ray.wait([reference], timeout=0, fetch_local=False)[0])
            is_hung = not has_answered and time.monotonic() - since > self._timeout_s
            if is_hung:
                self._replace(actor)
            if has_answered or is_hung:
                del self._stragglers[actor]
                self._taken_over = {lane: by for lane, by in self._taken_over.items() if self._home(lane) != actor}

    def _replace(self, actor: Any) -> None:
        logger.warning("a data-shard worker gave no answer within %.0f s: replacing it", self._timeout_s)
        ray.kill(actor, no_restart=False)

    def _home(self, lane: int) -> Any:
        return self._actors[lane % len(self._actors)]

    def _refresh_actors(self) -> None:
        if self._refresh is None and (not self._actors or time.monotonic() - self._refreshed_at > _REFRESH_S):
            self._refreshed_at = time.monotonic()
            self._refresh = self._registry.actors.remote()
        if self._refresh is not None and (not self._actors or ray.wait([self._refresh], timeout=0)[0]):
            actors = listed(self._refresh)
            self._refresh = None
            if actors != self._actors:
                self._actors = actors
                self._remote = set()
                self._taken_over, self._stragglers = {}, {}
