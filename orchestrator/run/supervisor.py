"""Supervise the attempts of a run's training workers.

An attempt is one group of training workers, from its start to its end. During an attempt, the supervisor takes the
events of the workers. It kills them after a heartbeat timeout and ends the attempt to grow. After a failure it does
what `policy.py` decides: retry, or give up.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sigray.orchestrator.batch import micro_batch, usable_sizes
from sigray.orchestrator.cluster import pending
from sigray.orchestrator.config import RunConfig
from sigray.orchestrator.formatting import format_duration
from sigray.orchestrator.resources import worker_resources
from sigray.orchestrator.run import policy
from sigray.orchestrator.run.evaluations import Evaluations
from sigray.orchestrator.run.observer import Observer
from sigray.orchestrator.run.places import Places, num_placed
from sigray.orchestrator.run.progress import Display
from sigray.orchestrator.run.records import RunRecords
from sigray.orchestrator.run.signals import on_stop_signal
from sigray.orchestrator.run.trial import Rungs
from sigray.orchestrator.run.worker_group import WorkerGroup
from sigray.workers.checkpoint.index import CheckpointInfo, list_checkpoints
from sigray.workers.checkpoint.lease import RunLease
from sigray.workers.checkpoint.writer import leave_out, read_left_out

if TYPE_CHECKING:
    from sigray.workers.data.pool import DataPool, SharedPool
    from sigray.workers.storage import Storage

_POLL_S = 0.5
_GROW_POLL_S = 10.0  # between two checks whether more training workers fit


def resume_advice(step: int, storage: Storage) -> str:
    """Return how to go on after a run has failed.

    Args:
        step: of the newest checkpoint; 0 without one.
    """
    return f"go on from step {step:,} with `sigray resume {storage.uri}`" if step else "no checkpoint yet"


@dataclass
class Supervisor:
    """Run attempts until the run is done, asked to stop, or fails for good.

    Args:
        failed: attempts that failed before, on an earlier Ray of the run.

    Attributes:
        newest_checkpoint: the newest one known; None before the first of this driver.
        train_s: seconds since the first attempt had its workers up.
    """

    config: RunConfig
    group: WorkerGroup
    lease: RunLease
    records: RunRecords
    evaluations: Evaluations
    rungs: Rungs
    display: Display
    places: Places
    observer: Observer | None = None
    failed: list[policy.Attempt] = field(default_factory=list)
    newest_checkpoint: CheckpointInfo | None = None
    train_s: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)
    _training_since: float | None = None
    _errors: list[BaseException] = field(default_factory=list)  # of this attempt, from each worker that sent one
    _first_step: int = 0  # of this attempt
    _last_step: int = 0  # of the newest line of metrics
    _size: int = 0  # training workers of this attempt
    _num_joined: int = 0  # of these, that are up
    result: Any = None  # Ray Train's, of the newest attempt that ended without an error

    def __post_init__(self) -> None:
        self._monitor, self._pool = self.group.monitor, self.group.pool
        self._storage = self.group.folder.storage
        self._heartbeat = Heartbeat(self.config.cluster.hang_timeout_s, self.display)
        self._autoscaler = PoolAutoscaler(self._pool, self.config.data.num_workers, self.display)
        self._sizes = usable_sizes(*self.config.cluster.worker_range, self.config.train.global_batch_size)

    def run(self) -> str:
        """Run all attempts; return "finished" or "stopped".

        Raises:
            RunFailed, DataError: what ended the run.
        """
        try:
            with on_stop_signal(self.ask_to_stop):
                self._run_attempts()
        finally:
            if self._training_since is not None:
                self.train_s = time.monotonic() - self._training_since
        return "finished" if self._is_done() else "stopped"

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()

    def ask_to_stop(self) -> None:
        """Have the training workers write a last checkpoint and end."""
        self._stop.set()
        self.display.say("stopping: a last checkpoint is written at the next log interval (again to stop at once)")
        self._monitor.request.remote("stop")

    def _run_attempts(self) -> None:
        for info in list_checkpoints(self._storage)[-1:] if self.rungs.steps else []:
            if self.rungs.was_left_open(info.step):
                self._take_checkpoint(info)
        least, most = self.config.cluster.worker_range
        unusable = [size for size in range(least, most + 1) if size not in self._sizes]
        if unusable:
            self.display.say(
                f"not with {', '.join(map(str, unusable))} training workers: "
                f"train.global_batch_size={self.config.train.global_batch_size} does not divide by that"
            )
        retry = policy.Retry(0.0)
        while not self._stop.is_set():
            # A rung that an earlier driver left open is decided first.
            while self.rungs.pending is not None and not self._stop.is_set():
                if self.rungs.is_released:
                    return  # the sweep starts the trial again after the decision
                self._wait()
            size = self._wait_for_capacity(retry)
            if size is None:
                return
            self._errors = self._attempt(size)
            self.places.pass_on()
            retry = policy.Retry(0.0)
            if not self._errors:
                if self._is_done():
                    return
                continue  # the attempt ended to grow, or to release its workers at a rung
            decision = self._decide()
            if isinstance(decision, policy.GiveUp):
                error = policy.classify_failure(self._errors)[1]
                if isinstance(error, ValueError):
                    raise error
                why = f": {decision.reason}" if decision.reason else ""
                raise policy.RunFailed(f"training failed{why} ({self._advice()}):\n{error}")
            retry = decision

    @property
    def _saved_step(self) -> int:
        """Steps done at the newest known checkpoint."""
        return self.newest_checkpoint.step if self.newest_checkpoint else self.records.facts.get("first_step", 0)

    def _is_done(self) -> bool:
        return bool(self.records.facts) and self._saved_step >= self.records.facts["num_steps"]

    # ------------------------------------------------------------------------------------------ one attempt

    def _attempt(self, size: int) -> list[BaseException]:
        """Run one attempt; return its errors, none if it ended as requested."""
        import ray

        self._errors = []
        self._num_joined = 0
        self._heartbeat.begin()
        self._first_step = self._last_step = self._saved_step
        ray.get(self._monitor.begin.remote("stop" if self._stop.is_set() else "go on"))
        self.rungs.subscribe(self._saved_step)
        ended: list[BaseException] = []

        def fit() -> None:
            try:
                self.result = self.group.trainer(size).fit()
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        self.display.keep(f"starting {size} training workers", "note")  # the run waits for room no longer
        begin = time.monotonic()
        grow_checked_at = 0.0
        while thread.is_alive():
            self._wait()
            self.display.waiting(time.monotonic() - begin)
            self._heartbeat.check()
            if self._stop.is_set() and not self._heartbeat.has_begun:
                return []  # the workers are still starting: there is nothing to save
            if time.monotonic() - grow_checked_at > _GROW_POLL_S and not self._stop.is_set():
                grow_checked_at = time.monotonic()
                self._grow(size, time.monotonic() - begin)
        self._poll()
        if not ended:
            return []
        failures = getattr(ended[0], "worker_failures", {})
        cause = getattr(ended[0], "controller_failure", None)
        return [*self._errors, *failures.values(), *([cause] if cause is not None else []), ended[0]]

    def _wait(self) -> None:
        time.sleep(_POLL_S)
        self.lease.check()
        self._poll()

    def _poll(self) -> None:
        """Take events; advance the pool, the evaluations and the pending rung."""
        import ray

        for event in ray.get(self._monitor.take.remote()):
            self._take(event["kind"], event["content"])
        self.records.prometheus.repeat()
        self._pool.poll()
        self.evaluations.poll()
        if self.observer is not None and self.observer.must_stop and not self._stop.is_set():
            self.ask_to_stop()
        if self.rungs.decide() == "stop":
            self._stop.set()

    def _take(self, kind: str, content: Any) -> None:
        """Take one event of `RayHooks`."""
        if kind == "joined":
            self._heartbeat.joined(content)
            self._num_joined += 1
            if self._num_joined == self._size:
                self.places.pass_on()
                if self.rungs.record({}):
                    self.ask_to_stop()
            return
        self._heartbeat.beat()
        if kind == "started":
            if self._training_since is None:
                self._training_since = time.monotonic()
            self._first_step = self._last_step = content["first_step"]
            self.records.started(content)
        elif kind == "phase":
            self.records.phase_began(*content)
        elif kind == "metrics":
            self._last_step = int(content["step"])
            self.records.metrics(content, getattr(self._pool, "size", None))
            self._autoscaler.metrics(content)
            if self.observer is not None:
                self.observer.line(content)
            if self.rungs.record(content) and not self._stop.is_set():
                self.ask_to_stop()
        elif kind == "checkpoint":
            self.records.prometheus.checkpoint()
            self._take_checkpoint(CheckpointInfo(**content))
        elif kind == "refused":
            self.records.refused(*content)
        elif kind == "preempted":
            left = "" if content is None else f" in {format_duration(content)}"
            self.display.say(f"a node will be preempted{left}: saving a checkpoint")
        elif kind == "warning":
            self.display.say(content)
        elif kind == "failed":
            self._errors += content

    def _take_checkpoint(self, info: CheckpointInfo) -> None:
        self.newest_checkpoint = info
        self.evaluations.add(info)
        self.rungs.saved(info.step)

    # ------------------------------------------------------------------------------------- size of the group

    def _wait_for_capacity(self, retry: policy.Retry) -> int | None:
        """Start the data-shard workers; return how many training workers to start.

        Returns:
            None if the run shall stop, or if the process of a trial ends to hold nothing.
        """
        cluster = self.config.cluster
        before = self.records.facts.get("world_size")
        resources = worker_resources(cluster)
        self.places.begin(retry.pause_s, was_taken=retry.was_taken)

        def probe(timeout_s: float) -> int:
            # The sweep has waited for the first start of a trial.
            patience_s = 0.0 if self.places.is_inherited else cluster.shrink_after_s
            sizes = policy.sizes_to_try(self._sizes, self.places.waited_s, patience_s)
            groups = {size: [*[resources] * size, *self._pool.demand] for size in sizes}
            return next((size for size in sizes if num_placed([groups[size]], timeout_s)), 0)

        while not self._stop.is_set():
            move, size = self.places.step(self._pool.is_held, probe)
            if move == "start":
                self._pool.start()
                self.places.hold((size, "training worker"), (self._pool.size, "data-shard worker"))
                if before not in (None, size):
                    self.display.say(f"training workers: {before} -> {size}")
                self._size = size
                return size
            if move == "give back":
                if not self._pool.release():
                    self.display.say("no free resources for the training workers: the sweep starts this trial later")
                    return None
                self.places.hold()
            demand = pending.demand_of(cluster, self._sizes[-1], self._pool.demand)
            self.places.say_pending(self.display, demand)
            self._wait()
        return None

    def _grow(self, size: int, running_s: float) -> None:
        """If more training workers fit, have this attempt write a checkpoint and end."""
        if running_s < self.config.cluster.grow_after_s:
            return
        resources = worker_resources(self.config.cluster)
        larger = [other for other in self._sizes if other > size]
        wanted = next((other for other in larger if num_placed([[resources] * (other - size)])), None)
        if wanted is not None:
            self.display.say(f"capacity for {wanted} training workers: saving a checkpoint, then starting them")
            self._monitor.request.remote("stop")

    # ------------------------------------------------------------------------------------------ after a failure

    def _decide(self) -> policy.Retry | policy.GiveUp:
        """Decide what to do after the errors of an attempt."""
        from sigray.workers.training.step import BadStep

        failure, error = policy.classify_failure(self._errors)
        self.records.prometheus.ended(isinstance(error, BadStep))
        if isinstance(error, BadStep):
            left_out = read_left_out(self._storage)
            decision = policy.after_bad_step(error.step, left_out, self.config.train.on_bad_loss)
            if isinstance(decision, policy.Retry):
                leave_out(self._storage, error.step)
                self.display.say(
                    f"{error}: going back to the last checkpoint, the batch of step {error.step} is left out"
                )
            return decision
        self.failed.append(policy.Attempt(time.monotonic(), self._first_step, self._last_step, failure, str(error)))
        decision = policy.after_failure(self.failed, self.config.cluster.max_failures_per_hour)
        if isinstance(decision, policy.Retry):
            # gloo starts its message with the place in its source.
            lines = re.sub(r"^\[[^]]*\] ", "", str(error).strip()).splitlines()
            first = lines[0].rstrip(".") if lines else type(error).__name__
            pause = f" in {format_duration(decision.pause_s)}" if decision.pause_s else ""
            self.display.say(f"{failure.value}: {first}. Starting the workers again{pause}")
        return decision

    def _advice(self) -> str:
        """Say how to go on after the run has failed."""
        advice = resume_advice(self._saved_step, self._storage)
        if self._saved_step and self.failed and self.failed[-1].failure is policy.Failure.MEMORY:
            facts = self.records.facts
            limit = max(1, facts["micro_batch_size"] // 2)
            smaller = micro_batch(facts["batch_per_worker"], limit, self.config.cluster.num_devices or 1)
            advice += f" and train.micro_batch_size={smaller}"
            if not self.config.train.activation_checkpointing:
                advice += ", or train.activation_checkpointing=true"
        return advice


class Heartbeat:
    """Kill the training workers of an attempt after a heartbeat timeout.

    Ray Train then ends the attempt. The first event of the training loop starts the clock. Before it, imports,
    compilation and the first read of the weights may take longer than any step.
    """

    def __init__(self, timeout_s: float, display: Display) -> None:
        self._timeout_s, self._display = timeout_s, display
        self.begin()

    def begin(self) -> None:
        """Begin an attempt, with workers that have not joined yet."""
        self._workers: list[Any] = []  # handles
        self._last_at: float | None = None

    @property
    def has_begun(self) -> bool:
        """Whether the training loop has sent an event."""
        return self._last_at is not None

    def joined(self, worker: Any) -> None:
        self._workers.append(worker)

    def beat(self) -> None:
        """Take note of an event of the training loop."""
        self._last_at = time.monotonic()

    def check(self) -> None:
        """Kill the workers if their last event is too long ago."""
        import ray

        if self._last_at is None or time.monotonic() - self._last_at < self._timeout_s:
            return
        self._display.say(
            f"no heartbeat from the training workers for {format_duration(self._timeout_s)}: killing them (if "
            "train.log_every_steps steps take so long, lower that key or raise cluster.hang_timeout_s)"
        )
        self._last_at = time.monotonic()  # the killed workers get the same time to end
        for worker in self._workers:
            ray.kill(worker)


class PoolAutoscaler:
    """Resize a pool of data-shard workers; a trial's pool keeps its size.

    Args:
        num_workers: data.num_workers; the pool is only resized within a range.
    """

    def __init__(self, pool: DataPool | SharedPool, num_workers: int | tuple[int, int], display: Display) -> None:
        self._pool, self._limits, self._display = pool, num_workers, display
        self._lines: list[dict[str, float]] = []  # of metrics, since the size last changed

    def metrics(self, line: dict[str, float]) -> None:
        """Take a line of metrics and resize the pool if the policy says so."""
        from sigray.workers.data.pool import SharedPool

        if isinstance(self._limits, int) or isinstance(self._pool, SharedPool):
            return
        self._lines.append(line)
        wanted = policy.wanted_data_workers(self._lines, self._pool.size, *self._limits)
        if wanted != self._pool.size:
            self._display.say(
                f"data-shard workers: {self._pool.size} -> {wanted} (data wait {line['data/wait_pct']:.0f} %)"
            )
            self._pool.resize(wanted)
            self._lines = []
