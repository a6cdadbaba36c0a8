"""One run from its config to its report: check, start, watch, evaluate, sum up. The driver's whole life in order.

Ray Train's trainer is constructed here and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from sigray.orchestrator.batch import micro_batch, usable_sizes
from sigray.orchestrator.config import ConfigError, RunConfig, check_resume
from sigray.orchestrator.formatting import format_duration
from sigray.orchestrator.planning.plan import check_memory
from sigray.orchestrator.run.folder import CONFIG, RunFolder, read_run
from sigray.orchestrator.run.monitor import Display, RayHooks, RunMonitor, TensorBoard
from sigray.orchestrator.run.policy import (
    Attempt,
    Failure,
    GiveUp,
    Retry,
    after_bad_step,
    after_failure,
    choose_size,
    classify_failure,
    wanted_data_workers,
)
from sigray.workers.checkpoint.index import CheckpointInfo, is_committed, list_checkpoints
from sigray.workers.checkpoint.lease import RunLease
from sigray.workers.checkpoint.writer import leave_out, mark_best, read_best, read_left_out
from sigray.workers.data.manifest import Manifest, in_threads, list_shards, scan_shards
from sigray.workers.data.tar import DataError
from sigray.workers.metrics import RunMetrics

if TYPE_CHECKING:
    from sigray.workers.config import EvalConfig
    from sigray.workers.data.loader import BlockSource
    from sigray.workers.data.pool import DataPool, SharedPool
    from sigray.workers.training.job import Answer, Hooks, TrainJob
    from sigray.workers.training.profile import Profile
    from sigray.workers.training.step import BadStep

_POLL_S = 0.5
_ROOM_S = 1.0  # how long a placement group may take to be ready where there is room
_GROW_LOOK_S = 10.0  # between two looks for room for more training workers
TRIAL_CPUS = 0.5  # and for the driver of a trial; Ray Tune allows no 0
_LEFT_S = 3.0  # for which the processes of a Ray that was shut down may take to end
_HOLD_S = 60.0  # for which training workers wait at a rung; then they leave their places to others
_EVALUATION_TRIES = 3  # of a rung, which a trial cannot do without
# For a Ray that this run starts itself. Every process of Ray costs about 1 % of a core by being there, and on a small
# machine those are the trainers' cores: nobody scrapes its metrics, reads its task events, sends it preemptions or
# waits for its log files, which are looked for twice a second and not ten times. What was read from the store is given
# back ten times a second and not once: the memory that it goes round in, and that each process has to touch page by
# page, is that much less.
LEAN_RAY = {
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_free_objects_period_milliseconds": "100",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


class RunFailed(RuntimeError):
    """A run that ended by an error in the training workers; the message is for the user."""


class Trial(Protocol):
    """What a sweep adds to a run that is one of its trials.

    Attributes:
        pool: the stream that the trials share.
        rungs: samples seen at which the trial is evaluated and the sweep decides whether it goes on. A rung falls on
            the first step at or behind it, so on the same count for every batch size that divides it. The end of the
            run is one by itself.
        passed: steps of the rungs behind which the trial was told to go on, in an earlier life.
    """

    pool: SharedPool
    rungs: tuple[int, ...]
    passed: frozenset[int]

    def heard(self, line: dict[str, float]) -> bool:
        """A line of metrics; returns whether the whole sweep stops."""

    def decide(self, evaluation: dict[str, Any], line: dict[str, float]) -> Answer:
        """Whether to go on behind a rung, or behind the end; asked again after "wait".

        Args:
            evaluation: of the checkpoint of the rung.
            line: the newest line of metrics.
        """


def rung_step(samples: int, global_batch_size: int) -> int:
    """The steps done at a rung: the first at or behind so many samples."""
    return -(-samples // global_batch_size)


def train(
    config: RunConfig,
    console: Console,
    *,
    resume_from: RunConfig | None = None,
    overwrite: bool = False,
    trial: Trial | None = None,
    profile: Profile | None = None,
) -> dict[str, Any]:
    """Run a config to its end, or until it is interrupted. A run that has begun already goes on.

    Args:
        config: what to run.
        console: where progress goes.
        resume_from: the config that the run began with, where the caller knows it.
        overwrite: delete an earlier run of the same name first.
        trial: where the run is part of a sweep, which has checked its config.
        profile: which steps to profile; the run ends behind them.

    Returns:
        The content of summary.json; `status` is "finished" or "stopped".

    Raises:
        ConfigError, DataError, OSError: for what the user can mend, before anything is started.
        RunFailed: where training itself failed.
    """
    begin = time.monotonic()
    display = Display(console)
    folder = RunFolder(config)
    folder.storage.check_writable()
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(RunLease(folder.storage))
        if resume_from is None and not overwrite and folder.is_used():
            resume_from = read_run(folder.storage.uri if folder.storage.exists(CONFIG) else str(folder.path))
            display.say(f"{folder.storage.uri} holds a run of this name: going on with it (--overwrite begins anew)")
        if resume_from is not None:
            check_resume(resume_from, config)
        if _cluster_address(config):  # a cluster that is there already reads the headers of the shards
            stack.enter_context(ray_of_run(config, display, records_tasks=profile is not None))
        manifest = scan(config, display)
        check_batch(config, manifest)
        if resume_from is not None:
            _check_unchanged(folder.manifest(), manifest)
        if trial is None:
            check_model_and_sets(config)
            check_memory(config)
        if config.model.init_from is not None and resume_from is None:
            from sigray.workers.model.init_weights import check_initial_weights

            display.say(check_initial_weights(config.model).text())
        if resume_from is None and folder.is_used():
            folder.clear()
            lease.renew()
        folder.begin(config, manifest)
        display.keep = folder.append_event
        if not _cluster_address(config):
            stack.enter_context(ray_of_run(config, display, records_tasks=profile is not None))
        run = stack.enter_context(_Run(config, folder, manifest, display, lease, trial, profile))
        try:
            status = run.watch()
            if profile is not None:
                _save_timeline(folder)
            if status == "finished":
                run.finish_evaluations()
        except Exception as error:
            folder.append_event(str(error), "failure")
            _sum_up(run, "failed", time.monotonic() - begin)
            raise
        folder.append_event(status, "note")
        return _sum_up(run, status, time.monotonic() - begin)


def _save_timeline(folder: RunFolder) -> None:
    """What every process of Ray did, task by task: of a profiled run, for data-shard workers above all."""
    import ray

    place = folder.path / "profile" / "ray_timeline.json"
    place.parent.mkdir(exist_ok=True)
    ray.timeline(filename=str(place))


def _sum_up(run: _Run, status: str, total_s: float) -> dict[str, Any]:
    """Write summary and report, and bring the run's records to its storage."""
    from sigray.orchestrator.reports.run_page import write_report

    summary = _summary(run, status, total_s)
    run.folder.save_summary(summary)
    write_report(run.folder.path)
    run.folder.upload_records()
    return summary


def evaluate(config: RunConfig, info: CheckpointInfo, console: Console) -> dict[str, Any]:
    """Evaluate one checkpoint as a Ray task and keep the result with the run."""
    display, folder = Display(console), RunFolder(config)
    check_model_and_sets(config)
    with ray_of_run(config, display):
        import ray

        result = ray.get(_submit_evaluation(config, folder, info))
        _add_baselines(config, result)
    if (folder.path / CONFIG).exists():
        from sigray.orchestrator.reports.run_page import write_report

        folder.save_evaluation(result)
        write_report(folder.path)
    return result


@dataclass
class _Run:
    """The moving parts of a run that has begun: data-shard workers, monitor, training workers, evaluations."""

    config: RunConfig
    folder: RunFolder
    manifest: Manifest
    display: Display
    lease: RunLease
    trial: Trial | None = None
    profile: Profile | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    newest_evaluation: dict[str, Any] | None = None
    train_s: float = 0.0  # since the training workers were up for the first time

    def __enter__(self) -> _Run:
        from sigray.workers.data.pool import DataPool, start_here

        self._monitor: Any = start_here(RunMonitor)
        self._pool: DataPool | SharedPool = (
            self.trial.pool
            if self.trial
            else DataPool(
                self.manifest,
                self.config.data,
                self.config.model,
                seed=self.config.run.seed,
                run=self.config.run.name,
            )
        )
        self._metrics = RunMetrics(self.config.run.name, self.config.checkpoint.save_every_s)
        self._lines_since_resize: list[dict[str, float]] = []
        self._tensorboard: TensorBoard | None = None
        self._to_evaluate: list[CheckpointInfo] = []
        self._evaluation: tuple[CheckpointInfo, Any] | None = None  # the one that runs, and its reference
        self._newest_checkpoint: CheckpointInfo | None = None
        self._failed: list[Attempt] = []
        self._errors: list[BaseException] = []  # of the attempt at hand, one for each training worker that told
        self._workers: list[Any] = []  # handles of the training workers of this attempt
        self._heard_at: float | None = None  # when they last told something, once they are all up
        self._draining: set[str] = set()  # machines whose end was announced
        self._first_step = self._last_step = 0  # of this attempt; the last one is that of the newest line of metrics
        self._stopping = False
        batch = self.config.train.global_batch_size
        self._num_steps = rung_step(self.config.train.num_samples, batch)
        self._rungs = (
            frozenset(rung_step(samples, batch) for samples in self.trial.rungs) if self.trial else frozenset()
        )
        self._rung: int | None = None  # the one that the trial has come to, until the sweep has decided
        self._rung_since = 0.0
        self._rung_evaluation: dict[str, Any] | None = None
        self._num_evaluation_failures = 0
        self._training_since: float | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self.display.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._pool.close()

    def watch(self) -> str:
        """Follow the run to its end, through as many attempts as it takes; returns "finished" or "stopped".

        Raises:
            RunFailed, DataError: what ended it.
        """
        try:
            with stop_on_signal(self._ask_to_stop):
                self._follow()
        finally:
            if self._training_since is not None:
                self.train_s = time.monotonic() - self._training_since
        return "finished" if self._is_done() else "stopped"

    def _follow(self) -> None:
        """One attempt after the other; raises as `watch`."""
        self._find_open_rung()
        while not self._stopping:
            if not self._is_let_go_on():
                return
            size = self._wait_for_room()
            if size is None:
                return
            self._errors = self._attempt(size)
            if not self._errors:
                if self._is_done() or self._stopping:
                    return
                continue  # stopped to grow, or to leave its place while it waits at a rung
            decision = self._judge()
            if isinstance(decision, GiveUp):
                raise _explain_failure(classify_failure(self._errors)[1], decision.reason, self._advice())
            self._pause(decision.pause_s)

    @property
    def _saved_step(self) -> int:
        """Steps done at the newest checkpoint that is known."""
        return self._newest_checkpoint.step if self._newest_checkpoint else self.facts.get("first_step", 0)

    def _is_done(self) -> bool:
        return bool(self.facts) and self._saved_step >= self.facts["num_steps"]

    def _attempt(self, size: int) -> list[BaseException]:
        """One life of a group of training workers; returns what ended it, nothing where it stopped by itself."""
        import ray

        self._errors, ended = [], []
        self._workers, self._heard_at = [], None
        self._first_step = self._last_step = self._saved_step
        ray.get(self._monitor.begin.remote("stop" if self._stopping else "go on"))
        self._expect_reader()

        def fit() -> None:
            try:
                _trainer(
                    self.config,
                    size,
                    self.folder,
                    self.manifest,
                    self._pool,
                    self._monitor,
                    self.lease.owner,
                    self._rungs,
                    self.profile,
                ).fit()
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        begin, grown_at = time.monotonic(), 0.0
        while thread.is_alive():
            time.sleep(_POLL_S)
            self.lease.check()
            self._take_events()
            self.display.waiting(time.monotonic() - begin)
            self._kill_if_hung()
            self._save_if_draining()
            if time.monotonic() - grown_at > _GROW_LOOK_S and not self._stopping:
                grown_at = time.monotonic()
                self._grow(size, time.monotonic() - begin)
        self._take_events()
        if not ended:
            return []
        failures = getattr(ended[0], "worker_failures", {})
        cause = getattr(ended[0], "controller_failure", None)
        return [*self._errors, *failures.values(), *([cause] if cause is not None else []), ended[0]]

    def _expect_reader(self) -> None:
        """Tell the other trials from which block of its lanes this one reads on."""
        if self.trial:
            data, seen = self.config.data, self._saved_step * self.config.train.global_batch_size
            self.trial.pool.subscribe(seen // (data.total_lanes * data.block_size))

    def _find_open_rung(self) -> None:
        """A driver before this one may have died between a rung's checkpoint and the decision."""
        newest = list_checkpoints(self.folder.storage)[-1:] if self.trial else []
        for info in newest:
            if self.trial and info.step in self._rungs - self.trial.passed and info.step < self._num_steps:
                self._newest_checkpoint = info
                self._reach_rung(info.step)
                self._to_evaluate.append(info)

    def _is_let_go_on(self) -> bool:
        """Wait, without training workers, until it is decided about the rung that the trial has come to, if any."""
        while self._rung is not None and not self._stopping:
            time.sleep(_POLL_S)
            self.lease.check()
            self._take_events()
        return not self._stopping

    def _reach_rung(self, step: int) -> None:
        self._rung, self._rung_since, self._rung_evaluation = step, time.monotonic(), None
        self._num_evaluation_failures = 0
        if self.trial:
            self.trial.pool.unsubscribe()

    def _decide_rung(self) -> None:
        """Ask the sweep about the rung, once its figures are there, and tell the training workers."""
        if self._rung is None or self._rung_evaluation is None or self.trial is None:
            return
        answer = self.trial.decide(self._rung_evaluation, (self.folder.metrics() or [{}])[-1])
        if answer == "wait":
            if time.monotonic() - self._rung_since > _HOLD_S:
                self._monitor.answer.remote(self._rung, "stop")  # the checkpoint is there
            return
        if answer == "stop":
            self._stopping = True
        else:
            self._expect_reader()
        self._monitor.answer.remote(self._rung, answer)
        self._rung = self._rung_evaluation = None

    def _wait_for_room(self) -> int | None:
        """How many training workers to start; None where the run is asked to stop meanwhile."""
        from sigray.orchestrator.run.backends import worker_resources

        least, most = self.config.cluster.worker_range
        sizes = usable_sizes(least, most, self.config.train.global_batch_size)
        unusable = sorted(set(range(least, most + 1)) - set(sizes))
        if unusable and not self._failed and self._training_since is None:
            self.display.say(
                f"not with {', '.join(map(str, unusable))} training workers: "
                f"train.global_batch_size={self.config.train.global_batch_size} does not divide by that"
            )
        begin, next_word_s = time.monotonic(), 5.0
        resources = worker_resources(self.config.cluster)
        while not self._stopping:
            fitting = next((size for size in sizes if _has_room(resources, size)), 0)
            waited_s = time.monotonic() - begin
            size = choose_size(sizes, fitting, waited_s, self.config.cluster.shrink_after_s)
            if size is not None:
                if self._training_since is not None and size != self.facts["world_size"]:
                    self.display.say(f"training workers: {self.facts['world_size']} -> {size}")
                return size
            if waited_s > next_word_s:
                next_word_s += 30
                self.display.say(f"{self._room(sizes[-1])} ({format_duration(waited_s)})")
            time.sleep(_POLL_S)
        return None

    def _room(self, count: int) -> str:
        """What so many training workers lack. The run goes on waiting even for what this cluster cannot bring up by
        itself: machines are started by hand, and a changed cluster file comes with another `ray up`."""
        import ray

        from sigray.orchestrator.cluster.pending import cluster_hosts, demand_of, find_autoscaler, pending_reason

        autoscaler = find_autoscaler(ray.get_runtime_context().gcs_address)
        return pending_reason(demand_of(self.config.cluster, count), cluster_hosts(), autoscaler).sentence

    def _grow(self, size: int, running_s: float) -> None:
        """Where there is room for more training workers, have this attempt write a checkpoint and stop."""
        from sigray.orchestrator.run.backends import worker_resources

        least, most = self.config.cluster.worker_range
        larger = [other for other in usable_sizes(least, most, self.config.train.global_batch_size) if other > size]
        if not larger or running_s < self.config.cluster.grow_after_s:
            return
        resources = worker_resources(self.config.cluster)
        wanted = next((other for other in larger if _has_room(resources, other - size)), None)
        if wanted is not None:
            self.display.say(f"there is room for {wanted} training workers: a checkpoint is written, then they start")
            self._monitor.request.remote("stop")

    def _save_if_draining(self) -> None:
        """Where a machine will be taken away and Ray has been told so: a checkpoint now."""
        for node, deadline_ms in _draining_nodes().items():
            if node not in self._draining:
                self._draining.add(node)
                left = f" in {format_duration(deadline_ms / 1000 - time.time())}" if deadline_ms else ""
                self.display.say(f"a machine will be taken away{left}: saving a checkpoint")
                self._monitor.request.remote("save")

    def _kill_if_hung(self) -> None:
        """Kill training workers of which nothing has been heard for too long; Ray Train then ends the attempt."""
        import ray

        timeout_s = self.config.cluster.hang_timeout_s
        if self._heard_at is None or time.monotonic() - self._heard_at < timeout_s:
            return
        self.display.say(
            f"nothing was heard of the training workers for {format_duration(timeout_s)}: killing them (a step that "
            "takes so long needs a larger cluster.hang_timeout_s)"
        )
        self._heard_at = time.monotonic()
        for worker in self._workers:
            ray.kill(worker)

    def _judge(self) -> Retry | GiveUp:
        from sigray.workers.training.step import BadStep

        failure, error = classify_failure(self._errors)
        self._metrics.ended(isinstance(error, BadStep))
        if isinstance(error, BadStep):
            return self._judge_bad_step(error)
        attempt = Attempt(time.monotonic(), self._first_step, self._last_step, failure, str(error))
        self._failed.append(attempt)
        decision = after_failure(self._failed, self.config.cluster.max_failures_per_hour)
        if isinstance(decision, Retry):
            pause = f" in {format_duration(decision.pause_s)}" if decision.pause_s else ""
            self.display.say(f"{failure.value}: {_first_line(error)}. Starting the workers again{pause}")
        return decision

    def _judge_bad_step(self, error: BadStep) -> Retry | GiveUp:
        storage = self.folder.storage
        decision = after_bad_step(error.step, read_left_out(storage), self.config.train.on_bad_loss)
        if isinstance(decision, Retry):
            leave_out(storage, error.step)
            self.display.say(f"{error}: going back to the last checkpoint, the batch of step {error.step} is left out")
        return decision

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stopping:
            time.sleep(_POLL_S)
            self.lease.check()
            self._take_events()

    def _advice(self) -> str:
        if not self._saved_step:
            return "no checkpoint yet"
        advice = f"go on from step {self._saved_step:,} with `sigray resume {self.folder.storage.uri}`"
        if self._failed and self._failed[-1].failure is Failure.MEMORY:
            advice += f" and train.micro_batch_size={self._smaller_micro_batch()}"
            if not self.config.train.activation_checkpointing:
                advice += ", or train.activation_checkpointing=true"
        return advice

    def _smaller_micro_batch(self) -> int:
        part, present = self.facts["batch_per_worker"], self.facts["micro_batch_size"]
        return micro_batch(part, max(1, present // 2), self.config.cluster.num_devices or 1)

    def finish_evaluations(self) -> None:
        """Wait for the figures of the newest checkpoint; also those of a run that had ended before it was resumed."""
        import ray

        if self._newest_checkpoint is None and self.config.eval.sets:
            self._to_evaluate += list_checkpoints(self.folder.storage)[-1:]
            self._evaluate_next()
        while self._evaluation is not None:
            ray.wait([self._evaluation[1]], timeout=_POLL_S)
            self._evaluate_next()
        if self.trial and self.newest_evaluation is not None:
            while self.trial.decide(self.newest_evaluation, (self.folder.metrics() or [{}])[-1]) == "wait":
                time.sleep(_POLL_S)
                self.lease.check()
        if self.newest_evaluation is not None:
            _add_baselines(self.config, self.newest_evaluation)
            self.folder.save_evaluation(self.newest_evaluation)

    def _ask_to_stop(self) -> None:
        self._stopping = True
        self.display.say("stopping: a last checkpoint is written at the next log interval (again to stop at once)")
        self._monitor.request.remote("stop")

    def _take_events(self) -> None:
        import ray

        for event in ray.get(self._monitor.take.remote()):
            content = event["content"]
            if event["kind"] == "joined":
                self._workers.append(content)
                continue
            self._heard_at = time.monotonic()
            if event["kind"] == "started":
                self._begin_attempt(content)
            elif event["kind"] == "metrics":
                self._last_step = int(content["step"])
                self.folder.append_metrics(content)
                self.display.metrics(content)
                self._metrics.line(content, getattr(self._pool, "size", None))
                self._resize_pool(content)
                if self.trial and self.trial.heard(content) and not self._stopping:
                    self._ask_to_stop()
                if self._tensorboard is not None:
                    self._tensorboard.metrics(content)
            elif event["kind"] == "checkpoint":
                self._newest_checkpoint = info = CheckpointInfo(**content)
                self._metrics.checkpoint()
                if self.config.eval.sets:
                    self._to_evaluate.append(info)
                if info.step in self._rungs and info.step < self._num_steps:
                    self._reach_rung(info.step)
            elif event["kind"] == "warning":
                self.display.say(content)
            elif event["kind"] == "failed":
                self._errors += content
        self._metrics.repeat()
        self._pool.poll()
        self._evaluate_next()
        self._decide_rung()

    def _resize_pool(self, line: dict[str, float]) -> None:
        from sigray.workers.data.pool import SharedPool

        num_workers = self.config.data.num_workers
        if isinstance(num_workers, int) or isinstance(self._pool, SharedPool):
            return
        self._lines_since_resize.append(line)
        wanted = wanted_data_workers(self._lines_since_resize, self._pool.size, *num_workers)
        if wanted != self._pool.size:
            self.display.say(
                f"data-shard workers: {self._pool.size} -> {wanted} (data wait {line['data/wait_pct']:.0f} %)"
            )
            self._pool.resize(wanted)
            self._lines_since_resize = []

    def _begin_attempt(self, facts: dict[str, Any]) -> None:
        if self._training_since is None:
            self._training_since = time.monotonic()
            self.display.keep(f"training begins at step {facts['first_step']:,}", "note")
        else:
            self.display.say(
                f"the training workers were restarted and go on from step {facts['first_step']:,}", "restart"
            )
        self.facts = facts
        self._metrics.started(facts)
        self._first_step = self._last_step = facts["first_step"]
        self.folder.restore_metrics(facts["first_step"])
        if self._tensorboard is not None:
            self._tensorboard.close()
        purge_from = facts["first_step"] * facts["global_batch_size"] + 1
        self._tensorboard = TensorBoard(self.folder, purge_from)
        self.display.start(str(self.folder.path), facts, _data_facts(self.manifest))

    def _evaluate_next(self) -> None:
        """One evaluation after the other: each worker process of its own would spend 15 s on imports first."""
        import ray

        if self._evaluation is not None:
            info, reference = self._evaluation
            if not ray.wait([reference], timeout=0)[0]:
                return
            self._evaluation = None
            try:
                self._keep_evaluation(ray.get(reference))
            except ray.exceptions.RayError as error:
                # The run goes on: `sigray eval` repeats it from its checkpoint.
                reason = getattr(error, "cause", error)
                if self.trial and info.step in (self._rung, self._num_steps):
                    self._num_evaluation_failures += 1
                    if self._num_evaluation_failures == _EVALUATION_TRIES:
                        raise RunFailed(f"the evaluation of {info.name} failed each time: {reason}") from error
                    self._to_evaluate.insert(0, info)
                else:
                    self.display.say(f"the evaluation of {info.name} failed, the run goes on: {reason}")
        while self._to_evaluate and self._evaluation is None:
            info = self._to_evaluate.pop(0)
            if is_committed(self.folder.storage, info):
                self._evaluation = info, _submit_evaluation(self.config, self.folder, info)
            else:
                self.display.say(
                    f"{info.name} was deleted before its turn to be evaluated: "
                    "raise checkpoint.keep_newest or checkpoint.save_every_steps for a figure of each"
                )

    def _keep_evaluation(self, result: dict[str, Any]) -> None:
        self.folder.save_evaluation(result)
        self._mark_best(result)
        self._metrics.evaluation(result)
        self.display.evaluation(result)
        if self._tensorboard is not None:
            self._tensorboard.evaluation(result)
        if self.newest_evaluation is None or result["step"] >= self.newest_evaluation["step"]:
            self.newest_evaluation = result
        if result["step"] == self._rung:
            self._rung_evaluation = result

    def _mark_best(self, result: dict[str, Any]) -> None:
        path = self.config.checkpoint.keep_best
        if path is None:
            return
        figure: Any = result
        for name in path.split("."):
            figure = figure.get(name) if isinstance(figure, dict) else None
        if not isinstance(figure, float | int):
            self.display.say(f"checkpoint.keep_best={path} is no figure of the evaluation: nothing is marked as best")
            return
        best = read_best(self.folder.storage)
        if best is None or figure > best[1]:
            mark_best(self.folder.storage, f"step-{result['step']:010d}", figure)


def train_job(
    config: RunConfig,
    num_workers: int,
    manifest: Manifest,
    blocks: BlockSource,
    hooks: Hooks,
    owner: str | None = None,
    rungs: frozenset[int] = frozenset(),
    profile: Profile | None = None,
) -> TrainJob:
    """What the training workers of a run need to know of its config."""
    from sigray.workers.training.job import TrainJob

    return TrainJob(
        data=config.data,
        model=config.model,
        train=config.train.model_copy(update={"micro_batch_size": config.micro_batch_size(num_workers)}),
        loss=config.loss,
        optim=config.optim,
        sharding=config.sharding,
        checkpoint=config.checkpoint,
        seed=config.run.seed,
        accelerator=config.cluster.accelerator,
        devices_per_worker=config.cluster.num_devices,
        cpus_per_worker=config.cluster.cpus_per_worker,
        manifest=manifest,
        storage_uri=config.storage_uri,
        owner=owner,
        blocks=blocks,
        hooks=hooks,
        rungs=rungs,
        profile=profile,
    )


def _trainer(
    config: RunConfig,
    num_workers: int,
    folder: RunFolder,
    manifest: Manifest,
    pool: DataPool | SharedPool,
    monitor: Any,
    owner: str,
    rungs: frozenset[int],
    profile: Profile | None,
) -> Any:
    """Ray Train's trainer of one attempt. It retries nothing: whether to try again is decided by `policy.py`."""
    import ray.train

    # TorchTrainer asks for torch_tpu where there are TPUs, before any code of ours runs.
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from sigray.orchestrator.run.backends import backend_config, raise_start_error, scaling_config
    from sigray.workers.training.train import train_loop_per_worker

    hooks = RayHooks(monitor)
    blocks = pool.blocks(config.data.worker_timeout_s)
    job = train_job(config, num_workers, manifest, blocks, hooks, owner, rungs, profile)

    def train_worker(_: dict[str, Any]) -> None:
        hooks.joined()
        try:
            raise_start_error()
            train_loop_per_worker(job)
        except Exception as error:
            hooks.failed(error)
            raise

    folder.forget_ray_checkpoints()
    failure_config: Any = ray.train.FailureConfig  # mypy sees that of Ray Train v1
    root, _, name = folder.storage.root.rpartition("/")
    return DataParallelTrainer(
        train_worker,
        train_loop_config={},
        backend_config=backend_config(config.cluster),
        scaling_config=scaling_config(config.cluster, num_workers),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=root,
            storage_filesystem=folder.storage.filesystem,
            failure_config=failure_config(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
        ),
    )


def _has_room(resources: dict[str, float], count: int) -> bool:
    """Whether the cluster could start so many more training workers now."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    # Free amounts would not do: they may lie on several machines.
    group = placement_group([resources] * count, strategy="PACK")
    has_room = group.wait(timeout_seconds=_ROOM_S)
    remove_placement_group(group)
    while ray.util.placement_group_table(group).get("state") not in (None, "REMOVED"):
        time.sleep(0.02)
    return has_room


def _draining_nodes() -> dict[str, int]:
    """Ids of the nodes that are being drained, and when they end, in milliseconds of Unix time; 0: not said."""
    from ray._private.state import state  # as Ray Train's own watcher; Ray has no public way

    return state.get_draining_nodes()


def evaluation_resources(evaluation: EvalConfig) -> dict[str, float]:
    """What Ray reserves for each worker of an evaluation while it works."""
    resources = {"CPU": float(evaluation.cpus_per_worker)}
    return resources if evaluation.accelerator == "cpu" else {**resources, "GPU": 1.0}


def _submit_evaluation(config: RunConfig, folder: RunFolder, info: CheckpointInfo) -> Any:
    import ray

    from sigray.workers.evaluation.evaluate import evaluate_checkpoint
    from sigray.workers.evaluation.features import EvaluationJob

    job = EvaluationJob(folder.storage.uri, info, config.model, config.data, config.eval, config.embeddings)
    resources = evaluation_resources(config.eval)
    task: Any = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))(evaluate_checkpoint)
    return task.remote(job)


def _add_baselines(config: RunConfig, result: dict[str, Any]) -> None:
    """Put the pixel neighbour's rate beside the zero-shot figures, where the config asks for it."""
    import ray

    from sigray.workers.evaluation.evaluate import pixel_baseline

    if config.eval.pixel_baseline:
        baselines = ray.get(ray.remote(num_cpus=1)(pixel_baseline).remote(config.data, config.eval))
        for name, baseline in baselines.items():
            result["zero_shot"][name]["pixel_baseline_top1"] = baseline


def scan(config: RunConfig, display: Display) -> Manifest:
    """The manifest of a run's shards, their headers read where they are not known; of the store's where it has one."""
    from sigray.workers.data.pool import in_tasks

    parallel_map = in_tasks if _cluster_address(config) else in_threads
    manifest = scan_shards(config.data.shards, config.data, _ScanProgress(display), parallel_map)
    if config.embeddings.store is None:
        return manifest
    from sigray.orchestrator.run.embed import check_store

    return check_store(config).manifest(manifest, config.data, parallel_map)


def check_batch(config: RunConfig, manifest: Manifest) -> None:
    """Refuse a batch that would hold a pair twice.

    Raises:
        ConfigError: with both numbers.
    """
    from sigray.workers.data.worker import build_order

    batch = config.train.global_batch_size
    order = build_order(manifest, config.data, config.run.seed)
    for number, (name, dataset) in enumerate(zip(manifest.datasets(), order.datasets, strict=True)):
        share = order.num_of_dataset(number, batch)
        if dataset.num_samples < share:
            raise ConfigError(
                f"train.global_batch_size={batch} takes {share} samples of data.shards{'.' + name if name else ''}, "
                f"which has {dataset.num_samples}: one batch would hold a pair twice and count it as its own negative"
            )


class _ScanProgress:
    """A line when shards have to be read, and one about every ten seconds of it."""

    def __init__(self, display: Display) -> None:
        self._display, self._said = display, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if not done:
            self._display.say(f"reading the headers of {total:,} shards")
        elif time.monotonic() - self._said > 10:
            self._display.say(f"read the headers of {done:,} of {total:,} shards")
        else:
            return
        self._said = time.monotonic()


def _check_unchanged(saved: Manifest, now: Manifest) -> None:
    changed = saved.differences(now)
    if changed:
        shown = "\n  ".join(changed[:20])
        raise DataError(f"the shards changed since the run began, so its order cannot be continued:\n  {shown}")


def check_model_and_sets(config: RunConfig) -> None:
    """What can be found wrong without a cluster: shapes, tokenizer, held-out sets, towers, optimizer."""
    from sigray.workers.evaluation.datasets import check_set, classes_of, probe_set
    from sigray.workers.model.inputs import shapes
    from sigray.workers.model.tokenizer import build_tokenizer
    from sigray.workers.model.towers import check_model
    from sigray.workers.training.optim import parameter_groups

    _, context_length, vocab_size = shapes(config.model)
    build_tokenizer(config.model, context_length, vocab_size)
    is_stored = config.embeddings.store is not None
    for name, spec in config.eval.sets.items():
        for each in [spec, *([probe_set(spec)] if spec.linear_probe is not None else [])]:
            if check_set(name, each, config.data, is_stored=is_stored) is None:
                list_shards(each.shards, config.data.s3)
        if spec.classes:
            classes_of(spec)
    parameter_groups(check_model(config.model), config.optim)
    if config.cluster.tpu_type is not None:
        from sigray.orchestrator.run.backends import check_slices

        check_slices(config.cluster)


def _cluster_address(config: RunConfig) -> str | None:
    """Of the cluster that the run joins; None: it starts a Ray of its own."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def ray_of_run(
    config: RunConfig, display: Display, num_trials: int = 0, *, records_tasks: bool = False
) -> Iterator[None]:
    """Join the cluster that is named, or start a Ray of this run's own; leave it at the end.

    Where this process is part of a cluster, as a trial of a sweep is, nothing is joined or left.

    Args:
        num_trials: for how many runs of a sweep a Ray of its own must have room at once; 0: for this run.
        records_tasks: have a Ray of its own remember when its tasks ran, for its timeline.
    """
    # How often Ray Train looks whether a training worker has died.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1" if config.cluster.dashboard else "0")
    address = _cluster_address(config)
    if not address and not config.cluster.dashboard:
        for name, value in LEAN_RAY.items():
            if not (records_tasks and "task_events" in name):
                os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    if address:
        display.say(f"joining the Ray cluster at {address}")
        ray.init(address=address, log_to_driver=False)
    else:
        num_workers = config.data.num_workers
        num_data_workers = num_workers if isinstance(num_workers, int) else num_workers[1]
        num_runs = max(1, num_trials)
        needed = (
            # Two streams run side by side where one seed of a sweep ends and the next begins.
            num_data_workers * config.data.cpus_per_worker * (2 if num_trials else 1)
            + num_runs * config.cluster.worker_range[1] * config.cluster.cpus_per_worker
            + num_runs * config.eval.num_workers * config.eval.cpus_per_worker
            + num_trials * TRIAL_CPUS
        )
        display.say("starting Ray on this machine")
        ray.init(
            address="local",
            # Ray only counts CPUs: on a small machine the data-shard workers and the trainers share the cores.
            num_cpus=max(os.cpu_count() or 1, int(needed + 0.5)),
            resources=_extra_resources(config, num_runs, num_data_workers * (2 if num_trials else 1)),
            include_dashboard=config.cluster.dashboard,
            log_to_driver=False,
            configure_logging=False,
        )
    try:
        yield
    finally:
        left = {} if address else _ray_processes()
        ray.shutdown()
        _end(left)


def _extra_resources(config: RunConfig, num_runs: int, num_data_workers: int) -> dict[str, float]:
    """What a Ray of a run's own offers besides CPUs, so that a config for a cluster runs on one machine too."""
    extra: dict[str, float] = {}
    for resources, count in (
        (config.cluster.resources_per_worker, config.cluster.worker_range[1] * num_runs),
        (config.data.resources_per_worker, num_data_workers),
    ):
        for name, amount in resources.items():
            extra[name] = extra.get(name, 0) + amount * count
    return extra


def _ray_processes() -> dict[int, str]:
    """Ray's workers below this process: their ids, and when they started, so that an id stands for one process."""
    parents, names, starts = {}, {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            pid = int(path.name)
            parents[pid], starts[pid] = int(fields[1]), fields[19]
            names[pid] = (path / "cmdline").read_bytes().decode(errors="replace")
    family = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    return {pid: starts[pid] for pid in family if names.get(pid, "").startswith("ray::")}


def _end(processes: dict[int, str]) -> None:
    """Kill what a Ray that was shut down has left behind.

    Of about seven Train controllers that end while their Ray goes on, one hangs for ever in the end of its process
    (Ray 2.60, in a wait of its metrics' and GCS clients' threads), and its raylet has forgotten it.
    """
    deadline = time.monotonic() + _LEFT_S
    while processes:
        now = _starts(processes)
        processes = {pid: start for pid, start in processes.items() if now.get(pid) == start}
        if time.monotonic() > deadline:
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.1)


def _starts(pids: Iterable[int]) -> dict[int, str]:
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            found[pid] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return found


@contextlib.contextmanager
def stop_on_signal(ask: Any) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the run, or the sweep, to stop; the second ends the driver."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        ask()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explain_failure(error: BaseException, reason: str, advice: str) -> Exception:
    """The cause of a failed run in the user's terms."""
    if isinstance(error, ValueError):
        return error
    why = f": {reason}" if reason else ""
    return RunFailed(f"training failed{why} ({advice}):\n{error}")


def _first_line(error: BaseException) -> str:
    lines = re.sub(r"^\[[^]]*\] ", "", str(error).strip()).splitlines()  # gloo begins with the place in its source
    return lines[0].rstrip(".") if lines else type(error).__name__


def _data_facts(manifest: Manifest) -> dict[str, int]:
    return {"shards": len(manifest.shards), "samples": manifest.num_samples, "bytes": manifest.num_bytes}


def _embeddings_facts(config: RunConfig) -> dict[str, float]:
    """What it took to make the store that a run reads; empty without one."""
    if config.embeddings.store is None:
        return {}
    from sigray.workers.data.embedding_store import EmbeddingStore

    history = EmbeddingStore(config.embeddings.store).history()
    return {name: sum(entry[name] for entry in history) for name in ("num_images", "seconds")}


def _summary(run: _Run, status: str, total_s: float) -> dict[str, Any]:
    evaluation = run.newest_evaluation or {}
    lines = run.folder.metrics()
    newest = lines[-1] if lines else {}
    return {
        "name": run.config.run.name,
        "status": status,
        "steps": newest.get("step", 0),
        "samples_seen": newest.get("samples_seen", 0),
        "train_s": round(run.train_s, 1),
        "total_s": round(total_s, 1),
        "loss": newest.get("train/loss"),
        "facts": run.facts,
        "data": _data_facts(run.manifest),
        "embeddings": _embeddings_facts(run.config),
        "zero_shot": evaluation.get("zero_shot", {}),
        "retrieval": evaluation.get("retrieval", {}),
        "linear_probe": evaluation.get("linear_probe", {}),
        "environment": environment(),
    }


def environment() -> dict[str, str]:
    """Versions, hardware and commit, as every result that is quoted carries them.

    SIGRAY_COMMIT in the environment names the commit where the files stand without their history, as in an image.
    """
    from importlib.metadata import version

    def commit() -> str:
        if named := os.environ.get("SIGRAY_COMMIT"):
            return named
        root = Path(__file__).resolve().parent
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    def processor() -> str:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.processor()

    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("sigray", "torch", "ray", "open-clip-torch", "webdataset")},
        "hardware": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
    }
