"""Run a config from its checks to its report: the order of a run's life.

check      address and devices, lease, config of an earlier run, `preflight.check_run`
start      Ray (`ray_session`), data-shard workers, monitor
supervise  attempts of the training workers (`supervisor`), evaluations beside them (`evaluations`)
evaluate   figures of the newest checkpoint
finish     end of Ray, summary, report

If the run's own Ray dies, the run goes back to `start`. A signal ends the run after `finish`.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sigray.orchestrator.address import cluster_address
from sigray.orchestrator.config import RunConfig, check_resume
from sigray.orchestrator.plain_console import PlainConsole
from sigray.orchestrator.reports.run_page import write_report
from sigray.orchestrator.run import policy, ray_death
from sigray.orchestrator.run.evaluations import Evaluations, add_baselines, evaluates_at_start, submit_evaluation
from sigray.orchestrator.run.monitor import RunMonitor
from sigray.orchestrator.run.own_ray import check_start
from sigray.orchestrator.run.places import Places
from sigray.orchestrator.run.policy import RunFailed
from sigray.orchestrator.run.preflight import check_model_and_sets, check_run, longer_text
from sigray.orchestrator.run.progress import Display
from sigray.orchestrator.run.ray_death import RayDied
from sigray.orchestrator.run.ray_session import ray_session
from sigray.orchestrator.run.signals import interrupt, on_stop_signal
from sigray.orchestrator.run.summary import summarize
from sigray.orchestrator.run.supervisor import Supervisor
from sigray.orchestrator.run.trackers import RunRecords
from sigray.orchestrator.run.trial import Rungs, Trial
from sigray.orchestrator.run.worker_group import WorkerGroup
from sigray.orchestrator.run_folder import CONFIG, RunFolder, evaluation_name, left_message
from sigray.workers.checkpoint.index import CheckpointInfo, list_checkpoints
from sigray.workers.checkpoint.lease import RunLease

if TYPE_CHECKING:
    from sigray.workers.training.profile import Profile

_POLL_S = 0.5


def train(
    config: RunConfig,
    console: Console | None = None,
    *,
    resume_from: RunConfig | None = None,
    overwrite: bool = False,
    trial: Trial | None = None,
    profile: Profile | None = None,
) -> dict[str, Any]:
    """Train a model as a config says, until the run is done or interrupted.

    A run of this name that has begun goes on from its newest checkpoint. Ctrl-C, SIGTERM and SIGHUP save a checkpoint
    first; a second one ends the driver at once.

        config = sigray.load_config("run.yaml", ["train.num_samples=1e6"])
        summary = sigray.train(config)

    Args:
        config: the run, as `load_config` returns it.
        console: shows the progress; None: a console on standard output.
        resume_from: the config that the run began with, if the caller has read it already.
        overwrite: delete an earlier run of the same name first.
        trial: the trial of a sweep that this run is; the sweep has checked its config.
        profile: the steps to profile; the run ends after these steps.

    Returns:
        The content of summary.json, of which `status` is "finished" or "stopped". Of a run that is stopped before its
        folder is written, the content has no `steps`.

    Raises:
        ConfigError, DataError, OSError: for what the user can fix, before anything starts.
        RunFailed: if training itself failed.
    """
    begin = time.monotonic()
    display = Display(console or PlainConsole())
    check_start(config)
    folder = RunFolder(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(on_stop_signal(interrupt))
        joins_cluster = cluster_address(config) is not None
        try:
            stack.callback(folder.remove_if_empty)
            folder.storage.check_writable()
            lease = stack.enter_context(RunLease(folder.storage))
            if resume_from is not None or (not overwrite and folder.is_used()):
                begun = folder.saved_config()
                if resume_from is None:
                    taken = f"{folder.storage.uri} holds a run of this name"
                    display.say(f"{taken}: going on with it (--overwrite starts again)")
                resume_from = resume_from or begun
                check_resume(resume_from, config)
                finished = folder.finished_summary(config, at_start=evaluates_at_start(config, is_trial=False))
                if finished is not None and trial is None and config.eval == resume_from.eval:
                    display.say(
                        f"the run is finished. `sigray resume {config.storage_uri} train.num_samples=N` trains it to "
                        f"more than {finished['samples_seen']:,.0f} samples"
                    )
                    return finished
                if config.train.num_samples > resume_from.train.num_samples:
                    display.say(longer_text(resume_from, config, folder.storage))
            elif overwrite:
                folder.check_clear(config)
            if joins_cluster:
                stack.enter_context(ray_session(config, display))  # tasks of the cluster read the headers of the shards
            saved = folder.manifest() if resume_from is not None else None
            manifest = check_run(config, display, saved=saved, is_trial=trial is not None)
            if resume_from is None and folder.is_used():
                left = folder.clear()
                if left:
                    display.say(left_message(left))
            folder.begin(config, manifest)
        except KeyboardInterrupt:
            if ray_death.find_death():
                raise
            nothing = {"zero_shot": {}, "retrieval": {}, "train_s": 0.0, "total_s": time.monotonic() - begin}
            return {"status": "stopped", "samples_seen": 0, **nothing}
        display.keep = folder.append_event
        supervisors: list[Supervisor] = []  # one for each Ray that the run has had
        failed: list[policy.Attempt] = []

        def live() -> str:
            """Train and evaluate on the Ray of this process; return "finished" or "stopped"."""
            import ray.experimental.internal_kv

            from sigray.workers.data.pool import DataPool, SharedPool, start_here

            pool: DataPool | SharedPool
            if trial is not None:
                pool = trial.pool
            else:
                pool = DataPool(manifest, config.data, config.model, seed=config.run.seed, run=config.run.name)
            with contextlib.ExitStack() as stack:
                stack.callback(lambda: ray_death.find_death() or pool.close())
                joined = joins_cluster if trial is None else trial.is_joined
                store = ray.experimental.internal_kv if joined else None
                places = Places(f"run {config.run.name}", store, is_trial=trial is not None)
                stack.enter_context(places)
                monitor = start_here(RunMonitor)
                records = RunRecords(config, folder, manifest, display, name=trial.name if trial else config.run.name)
                stack.enter_context(contextlib.closing(records))
                rungs = Rungs(config, folder, monitor, trial)
                evaluations = Evaluations(config, folder, records, rungs, display)
                at_start = evaluates_at_start(config, is_trial=trial is not None)
                group = WorkerGroup(
                    config, folder, manifest, pool, monitor, lease.owner, rungs.steps, profile, at_start
                )
                supervisor = Supervisor(config, group, lease, records, evaluations, rungs, display, places, failed)
                if supervisors:
                    records.facts, evaluations.newest = (
                        supervisors[-1].records.facts,
                        supervisors[-1].evaluations.newest,
                    )
                supervisors.append(supervisor)
                status = supervisor.run()
                if supervisor.is_stopping and config.eval.sets and trial is None:
                    status = "stopped"  # a resume evaluates the newest checkpoint
                if profile is not None:
                    path = folder.path / "profile" / "ray_timeline.json"  # mainly for the data-shard workers
                    path.parent.mkdir(exist_ok=True)
                    ray.timeline(filename=str(path))
                pool.release()  # the evaluations may wait for resources
                places.hold()
                if status == "finished":
                    evaluations.finish()
                    if evaluations.newest is not None:
                        while rungs.decide_on(evaluations.newest) == "wait":
                            time.sleep(_POLL_S)
                            lease.check()
                        add_baselines(config, evaluations.newest)
                        folder.save_evaluation(evaluations.newest)
                return status

        def sum_up(status: str) -> dict[str, Any]:
            last = supervisors[-1] if supervisors else None
            seconds = {"train_s": sum(each.train_s for each in supervisors), "total_s": time.monotonic() - begin}
            facts, newest = (last.records.facts, last.evaluations.newest) if last else ({}, None)
            summary = summarize(config, folder, manifest, status, facts, newest, **seconds)
            summary["refused"] = last.records.refused_of_all() if last else {}
            if summary["refused"]:
                rows = [f"{n['count']:,} x {reason}, first {n['first']}" for reason, n in summary["refused"].items()]
                display.say("\n  ".join(["samples refused or cut since the last start:", *rows]))
            folder.save_summary(summary)
            write_report(folder.path)
            folder.upload_records()
            return summary

        try:
            while True:
                first_step = _saved_step(folder)
                num_lives = len(supervisors)
                try:
                    with ray_session(config, display, records_tasks=profile is not None):
                        status = live()
                    break
                except RayDied as error:
                    step = _saved_step(folder)
                    # A Ray that dies twice while it starts would do so again.
                    failure = policy.Failure.DIED if len(supervisors) > num_lives else policy.Failure.ERROR
                    failed.append(policy.Attempt(time.monotonic(), first_step, step, failure, str(error)))
                    decision = policy.after_failure(failed, config.cluster.max_failures_per_hour)
                    if joins_cluster or isinstance(decision, policy.GiveUp):
                        go_on = f"go on from step {step:,} with `sigray resume {folder.storage.uri}`"
                        reason = f" ({decision.reason})" if isinstance(decision, policy.GiveUp) else ""
                        raise RunFailed(f"{error}{reason}: {go_on}") from error
                    display.say(f"{error}: starting Ray again, to go on from step {step:,}", "restart")
                    time.sleep(decision.pause_s)
        except KeyboardInterrupt:
            if supervisors and supervisors[-1].is_stopping:
                raise  # the second signal
            status = "stopped"
        except Exception as error:
            folder.append_event(str(error), "failure")
            sum_up("failed")
            raise
        with on_stop_signal(lambda: display.say("stopping: the run's summary is written")):
            folder.append_event(status, "note")
            return sum_up(status)


def _saved_step(folder: RunFolder) -> int:
    return next((info.step for info in list_checkpoints(folder.storage)[-1:]), 0)


def evaluate(config: RunConfig, info: CheckpointInfo, console: Console) -> dict[str, Any]:
    """Evaluate one checkpoint as a Ray task; keep the result with the run."""
    display, folder = Display(console), RunFolder(config)
    check_start(config, num_workers=0, num_evaluations=1)
    check_model_and_sets(config, is_begun=True)
    with ray_session(config, display):
        import ray

        result = ray.get(submit_evaluation(config, folder, info))
        add_baselines(config, result)
    if (folder.path / CONFIG).exists():
        folder.save_evaluation(result)
        write_report(folder.path)
    if str(folder.path) != folder.storage.root:
        try:
            folder.storage.write(evaluation_name(result["step"]), json.dumps(result).encode())
        except OSError as error:  # another user's run, for example
            display.say(f"the result is not kept with the run: {folder.storage.uri}: {error}")
    return result
