"""Start or join Ray for a run, and end it with all its processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator

from sigray.orchestrator.address import cluster_address
from sigray.orchestrator.config import RunConfig
from sigray.orchestrator.run import ray_death, ray_processes
from sigray.orchestrator.run.own_ray import own_folder
from sigray.orchestrator.run.policy import RunFailed
from sigray.orchestrator.run.progress import Display
from sigray.orchestrator.run.signals import blocked_for_children
from sigray.orchestrator.run.trial import TRIAL_CPUS

LEAN_RAY = {
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_free_objects_period_milliseconds": "100",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Environment of a Ray that a run starts itself.

Each process of Ray costs about 1 % of a core while idle, and on a small machine the training workers need those cores.
Such a Ray has no reader of its metrics and task events, and no sender of preemptions. Its log monitor looks for files
twice a second instead of ten times. Ray frees objects ten times a second instead of once: the object store then cycles
through less memory, which each process has to touch page by page.
"""


@contextlib.contextmanager
def ray_session(
    config: RunConfig, display: Display, num_trials: int = 0, *, records_tasks: bool = False
) -> Iterator[None]:
    """Join the configured cluster, or start a Ray for this run; leave it at the end.

    A process that is already part of a cluster, such as a trial of a sweep, neither joins nor leaves one.

    Args:
        num_trials: runs of a sweep that a Ray of its own must fit at the same time; 0: this run only.
        records_tasks: let a Ray of its own record when its tasks ran, for its timeline.
    """
    # Seconds between two looks of Ray Train: at its training workers, and at the nodes that will be preempted.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1" if config.cluster.dashboard else "0")
    address = cluster_address(config)
    if not address and not config.cluster.dashboard:
        for name, value in LEAN_RAY.items():
            if not (records_tasks and "task_events" in name):
                os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        with ray_death.raised():
            yield
        return
    with contextlib.ExitStack() as stack:
        if address:
            display.say(f"joining the Ray cluster at {address}")
            stack.callback(ray.shutdown)
            try:
                with blocked_for_children():
                    ray.init(address=address, log_to_driver=False)
            except Exception as error:  # as with a token of another cluster
                raise RunFailed(f"the Ray cluster at {address} cannot be joined: {error}") from error
            stack.enter_context(ray_death.watched(ray_death.joined_death(), display.say))
        else:
            folder = own_folder(display)
            display.say("starting Ray on this machine")
            stack.callback(ray.shutdown)
            num_cpus, resources = _own_resources(config, num_trials)
            mark = stack.enter_context(_own_processes(folder or ""))
            stack.enter_context(ray_death.watched(ray_death.own_death(mark)))
            try:
                with blocked_for_children(), _marked(mark):
                    ray.init(
                        address="local",
                        _temp_dir=folder,
                        # Ray only counts CPUs: on a small machine data-shard and training workers share cores.
                        num_cpus=max(os.cpu_count() or 1, int(num_cpus + 0.5)),
                        resources=resources,
                        include_dashboard=config.cluster.dashboard,
                        log_to_driver=False,
                        configure_logging=False,
                    )
            except BaseException as error:  # Ray raises Exception itself, or was interrupted by a death
                if death := ray_death.find_death():
                    busy = "Ray gives its processes 30 s to start; is this machine too busy?"
                    raise ray_death.RayDied(f"{death} while it started ({busy})") from error
                if not isinstance(error, Exception):
                    raise
                raise RunFailed(f"Ray did not start on this machine: {error}") from error
        yield


@contextlib.contextmanager
def _own_processes(folder: str = "") -> Iterator[str]:
    """Yield a mark for the processes of a Ray; end them and their folder.

    A watcher does so if this process ends before: only this process has the other end of the watcher's input.
    """
    mark = uuid.uuid4().hex
    command = [sys.executable, "-I", "-S", ray_processes.__file__, mark, folder]
    with blocked_for_children():
        watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield mark
    finally:
        ray_processes.clean_up(mark, folder)
        watcher.kill()
        watcher.wait()


@contextlib.contextmanager
def _marked(mark: str) -> Iterator[None]:
    """Mark the processes that start in this context."""
    # SPT_NOENV: Ray's agents set their title, and would write it over their environment.
    variables = {ray_processes.MARK: mark, "SPT_NOENV": "1"}
    os.environ |= variables
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def _own_resources(config: RunConfig, num_trials: int) -> tuple[float, dict[str, float]]:
    """Return the CPUs and other resources of a run's own Ray.

    The other resources are those of the config, so a config for a cluster also runs on one machine.
    """
    data, cluster = config.data, config.cluster
    num_runs = max(1, num_trials)
    num_training_workers = num_runs * cluster.worker_range[1]
    num_data_workers = data.num_workers if isinstance(data.num_workers, int) else data.num_workers[1]
    if num_trials:
        num_data_workers *= 2  # when one seed of a sweep ends, the stream of the next seed already starts
    num_cpus = (
        num_data_workers * data.cpus_per_worker
        + num_training_workers * cluster.cpus_per_worker
        + num_runs * config.eval.num_workers * config.eval.cpus_per_worker
        + num_trials * TRIAL_CPUS
    )
    training, decoding = cluster.resources_per_worker, data.resources_per_worker
    return num_cpus, {
        name: training.get(name, 0) * num_training_workers + decoding.get(name, 0) * num_data_workers
        for name in training | decoding
    }
