"""Run a config from its checks to its report: the order of a run's life.

check      address and devices, lease, config of an earlier run, `preflight.check_run`
start      Ray (`ray_session`), data-shard workers, monitor
           the process of the trackers (`tracker_process`)
supervise  attempts of the training workers (`supervisor`), evaluations beside them (`evaluations`)
evaluate   figures of the newest checkpoint
finish     end of Ray, summary, report

If the run's own Ray dies, the run goes back to `start`. A signal ends the run after `finish`.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sigray.orchestrator.address import cluster_address
from sigray.orchestrator.config import RunConfig, check_resume
from sigray.orchestrator.plain_console import PlainConsole
from sigray.orchestrator.reports.run_page import write_report
from sigray.orchestrator.run import policy, ray_death
from sigray.orchestrator.run.evaluations import Evaluations, add_baselines, evaluates_at_start, submit_evaluation
from sigray.orchestrator.run.monitor import RunMonitor
from sigray.orchestrator.run.observer import Observer
from sigray.orchestrator.run.own_ray import check_start
from sigray.orchestrator.run.places import Places
from sigray.orchestrator.run.policy import RunFailed
from sigray.orchestrator.run.preflight import check_model_and_sets, check_run, longer_text, with_inputs
from sigray.orchestrator.run.progress import Display
from sigray.orchestrator.run.ray_death import RayDied
from sigray.orchestrator.run.ray_session import ray_session
from sigray.orchestrator.run.records import RunRecords
from sigray.orchestrator.run.result import TrainResult, not_begun, result_of
from sigray.orchestrator.run.signals import interrupt, on_stop_signal
from sigray.orchestrator.run.summary import summarize
from sigray.orchestrator.run.supervisor import Supervisor, resume_advice
from sigray.orchestrator.run.tracker_process import TrackerProcess
from sigray.orchestrator.run.trial import Rungs, Trial
from sigray.orchestrator.run.worker_group import WorkerGroup
from sigray.orchestrator.run_folder import CONFIG, RunFolder, evaluation_name, left_message
from sigray.workers.checkpoint.index import CheckpointInfo, list_checkpoints
from sigray.workers.checkpoint.lease import RunLease
from sigray.workers.data.pool import as_raised

if TYPE_CHECKING:
    from sigray.workers.data.manifest import Manifest
    from sigray.workers.data.pool import DataPool, SharedPool
    from sigray.workers.training.profile import Profile

_POLL_S = 0.5
# Keys of summary.json.
_OF_TRAINING = {"train_s", "total_s", "facts", "zero_shot", "retrieval", "linear_probe", "without_ema"}


def train(
    config: RunConfig,
    console: Console | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trial: Trial | None = None,
    profile: Profile | None = None,
    observer: Observer | None = None,
) -> TrainResult:
    """Train a model as a config says, until the run is done or interrupted.

    A run of this name that has begun goes on from its newest checkpoint. Ctrl-C, SIGTERM and SIGHUP save a checkpoint
    first; a second one ends the driver at once. Outside the main thread, no signal is handled.

        config = sigray.load_config("run.yaml", ["train.num_samples=1e6"])
        result = sigray.train(config)

    Args:
        config: the run, as `load_config` returns it.
        console: shows the progress; None: a console on standard output.
        resume: go on with a run that exists; start none.
        overwrite: delete an earlier run of the same name first.
        trial: the trial of a sweep that this run is; the sweep has checked its config.
        profile: the steps to profile; the run ends after these steps.
        observer: takes lines of metrics and evaluations as they come, and may stop the run.

    Returns:
        Status, counts, figures, and the newest checkpoint.

    Raises:
        ConfigError, DataError, OSError: for what the user can fix, before anything starts.
        RunFailed: if training itself failed.
    """
    run = _Run(config, Display(console or PlainConsole()), RunFolder(config), trial, profile, observer)
    check_start(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(on_stop_signal(interrupt))
        try:
            finished = run.check(stack, is_resumed=resume, overwrite=overwrite)
        except KeyboardInterrupt:
            if ray_death.find_death():
                raise
            return not_begun(run.folder, time.monotonic() - run.begin)
        if finished is not None:
            return result_of(run.folder, finished)
        run.display.keep = run.folder.append_event
        run.start_trackers(stack)
        try:
            status = run.go_on()
        except KeyboardInterrupt:
            if run.lives and run.lives[-1].supervisor.is_stopping:
                raise  # the second signal
            status = "stopped"
        except Exception as error:
            run.folder.append_event(str(error), "failure")
            run.sum_up("failed")
            raise
        with on_stop_signal(lambda: run.display.say("stopping: the run's summary is written")):
            run.folder.append_event(status, "note")
            summary = run.sum_up(status)
        return result_of(run.folder, summary, run.ray_result)


@dataclass
class _Run:
    """A run over all of its Rays; arguments as `train`.

    Attributes:
        lives: one for each Ray that the run has had.
        failed: attempts that failed, on any of them.
    """

    config: RunConfig
    display: Display
    folder: RunFolder
    trial: Trial | None
    profile: Profile | None
    observer: Observer | None
    begin: float = field(default_factory=time.monotonic)
    lives: list[_RayLife] = field(default_factory=list)
    failed: list[policy.Attempt] = field(default_factory=list)

    def check(self, stack: contextlib.ExitStack, *, is_resumed: bool, overwrite: bool) -> dict[str, Any] | None:
        """Check and begin the run; return its summary if it is finished.

        Args:
            stack: gets the lease, and the cluster that the run joins.
        """
        config, folder, display = self.config, self.folder, self.display
        stack.callback(folder.remove_if_empty)
        folder.storage.check_writable()
        self.lease = stack.enter_context(RunLease(folder.storage))
        saved: Manifest | None = None
        begun: RunConfig | None = None
        is_begun = is_resumed or (not overwrite and folder.is_used())
        if is_begun:
            begun = folder.saved_config()
            if not is_resumed:
                taken = f"{folder.storage.uri} holds a run of this name"
                display.say(f"{taken}: going on with it (--overwrite starts again)")
        config = self.config = with_inputs(config, display.say, begun)
        if begun is not None:
            check_resume(begun, config)
            finished = folder.finished_summary(config, at_start=evaluates_at_start(config, is_trial=False))
            if finished is not None and self.trial is None and config.eval == begun.eval:
                display.say(
                    f"the run is finished. `sigray resume {config.storage_uri} train.num_samples=N` trains it to "
                    f"more than {finished['samples_seen']:,.0f} samples"
                )
                return finished
            if config.train.num_samples > begun.train.num_samples:
                display.say(longer_text(begun, config, folder.storage))
            saved = folder.manifest()
        elif overwrite:
            folder.check_clear(config)
        if cluster_address(config) is not None:
            stack.enter_context(ray_session(config, display))  # tasks of the cluster read the headers of the shards
        self.manifest = check_run(config, display, saved=saved, is_trial=self.trial is not None)
        if not is_begun and folder.is_used() and (left := folder.clear()):
            display.say(left_message(left))
        folder.begin(config, self.manifest)
        return None

    def start_trackers(self, stack: contextlib.ExitStack) -> None:
        """Start the process that sends the run to its trackers; `stack` ends it."""
        names = [] if self.profile is not None else self.config.run.trackers
        name = self.trial.name if self.trial is not None else self.config.run.name
        group = name.rpartition("/")[0] if self.trial is not None else ""
        stack.enter_context(TrackerProcess(self.folder, names, self.display.say, name=name, group=group))

    def go_on(self) -> str:
        """Train on one Ray after another until the end; return "finished" or "stopped"."""
        while True:
            first_step = _saved_step(self.folder)
            num_lives = len(self.lives)
            try:
                with (
                    ray_session(self.config, self.display, records_tasks=self.profile is not None),
                    contextlib.ExitStack() as stack,
                ):
                    self.lives.append(_RayLife(self, stack))
                    return self.lives[-1].train()
            except RayDied as error:
                # A Ray that dies twice while it starts would do so again.
                failure = policy.Failure.DIED if len(self.lives) > num_lives else policy.Failure.ERROR
                self._start_again(error, first_step, failure)

    @property
    def ray_result(self) -> Any:
        """Result of the newest attempt that ended without an error; None before."""
        return next((life.supervisor.result for life in reversed(self.lives) if life.supervisor.result), None)

    def _start_again(self, error: RayDied, first_step: int, failure: policy.Failure) -> None:
        """Wait until Ray may start again.

        Raises:
            RunFailed: if it may not.
        """
        step = _saved_step(self.folder)
        self.failed.append(policy.Attempt(time.monotonic(), first_step, step, failure, str(error)))
        decision = policy.after_failure(self.failed, self.config.cluster.max_failures_per_hour)
        if cluster_address(self.config) is not None or isinstance(decision, policy.GiveUp):
            reason = f" ({decision.reason})" if isinstance(decision, policy.GiveUp) else ""
            raise RunFailed(f"{error}{reason}: {resume_advice(step, self.folder.storage)}") from error
        self.display.say(f"{error}: starting Ray again, to go on from step {step:,}", "restart")
        time.sleep(decision.pause_s)

    def sum_up(self, status: str) -> dict[str, Any]:
        """Write summary and report; return the summary."""
        facts, newest, refused = self.lives[-1].results() if self.lives else ({}, None, {})
        train_s = sum(life.supervisor.train_s for life in self.lives)
        times = {"train_s": train_s, "total_s": time.monotonic() - self.begin}
        summary = summarize(self.config, self.folder, self.manifest, status, facts, newest, **times)
        if not facts:  # the training workers did not start: what an earlier driver has found out stays
            summary |= {name: value for name, value in self.folder.summary().items() if name in _OF_TRAINING}
        summary["refused"] = refused
        if refused:
            rows = [f"{n['count']:,} x {reason}, first {n['first']}" for reason, n in refused.items()]
            self.display.say("\n  ".join(["samples refused or cut since the last start:", *rows]))
        self.folder.save_summary(summary)
        write_report(self.folder.path)
        self.folder.upload_records()
        return summary


class _RayLife:
    """A run on one Ray, from the start of that Ray until its end.

    Args:
        stack: ends the pool, the places and the records.
    """

    def __init__(self, run: _Run, stack: contextlib.ExitStack) -> None:
        import ray.experimental.internal_kv

        from sigray.workers.data.pool import DataPool, start_here

        config, folder, display, trial = run.config, run.folder, run.display, run.trial
        self._run = run
        if trial is not None:
            self._pool: DataPool | SharedPool = trial.pool
        else:
            self._pool = DataPool(run.manifest, config.data, config.model, seed=config.run.seed, run=config.run.name)
        stack.callback(lambda: ray_death.find_death() or self._pool.close())
        is_joined = cluster_address(config) is not None if trial is None else trial.is_joined
        store = ray.experimental.internal_kv if is_joined else None
        self._places = stack.enter_context(Places(f"run {config.run.name}", store, is_trial=trial is not None))
        monitor = start_here(RunMonitor)
        name = trial.name if trial else config.run.name
        self._records = RunRecords(config, folder, run.manifest, display, name=name)
        stack.enter_context(contextlib.closing(self._records))
        self._rungs = Rungs(config, folder, monitor, trial)
        self._evaluations = Evaluations(config, folder, self._records, self._rungs, display, run.observer)
        if run.lives:
            self._records.facts, self._evaluations.newest, _ = run.lives[-1].results()
        at_start = evaluates_at_start(config, is_trial=trial is not None)
        group = WorkerGroup(
            config, folder, run.manifest, self._pool, monitor, run.lease.owner, self._rungs.steps, run.profile, at_start
        )
        parts = (group, run.lease, self._records, self._evaluations, self._rungs, display, self._places)
        self.supervisor = Supervisor(config, *parts, run.observer, run.failed)

    def train(self) -> str:
        """Train, and evaluate what is trained; return "finished" or "stopped"."""
        run = self._run
        status = self.supervisor.run()
        if self.supervisor.is_stopping and run.config.eval.sets and run.trial is None:
            status = "stopped"  # a resume evaluates the newest checkpoint
        if run.profile is not None:
            import ray

            path = run.folder.path / "profile" / "ray_timeline.json"  # mainly for the data-shard workers
            path.parent.mkdir(exist_ok=True)
            ray.timeline(filename=str(path))
        self._pool.release()  # the evaluations may wait for resources
        self._places.hold()
        if status == "finished":
            self._evaluate()
        return status

    def _evaluate(self) -> None:
        """Evaluate the rest of the checkpoints, and let the sweep decide on the newest."""
        self._evaluations.finish()
        newest = self._evaluations.newest
        if newest is not None:
            while self._rungs.decide_on(newest) == "wait":
                time.sleep(_POLL_S)
                self._run.lease.check()
            add_baselines(self._run.config, newest)
            self._run.folder.save_evaluation(newest)

    def results(self) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
        """Return start-up facts, newest evaluation and refused samples."""
        return self._records.facts, self._evaluations.newest, self._records.refused_of_all()


def _saved_step(folder: RunFolder) -> int:
    return next((info.step for info in list_checkpoints(folder.storage)[-1:]), 0)


def evaluate(config: RunConfig, info: CheckpointInfo, console: Console) -> dict[str, Any]:
    """Evaluate one checkpoint as a Ray task; keep the result with the run."""
    display, folder = Display(console), RunFolder(config)
    check_start(config, num_workers=0, num_evaluations=1)
    check_model_and_sets(config, is_begun=True)
    with ray_session(config, display):
        import ray

        try:
            result = ray.get(submit_evaluation(config, folder, info))
        except ray.exceptions.RayTaskError as error:
            raise as_raised(error) from error
        add_baselines(config, result)
    if (folder.path / CONFIG).exists():
        folder.save_evaluation(result)
        write_report(folder.path)
    if str(folder.path) != folder.storage.uri:
        try:
            folder.storage.write(evaluation_name(result["step"]), json.dumps(result).encode())
        except OSError as error:  # another user's run, for example
            display.say(f"the result is not kept with the run: {folder.storage.uri}: {error}")
    return result
