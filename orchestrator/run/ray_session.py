"""Start or join Ray for a run, end its leftovers, and handle signals."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sigray.orchestrator.address import cluster_address
from sigray.orchestrator.config import RunConfig
from sigray.orchestrator.run.own_ray import own_surroundings
from sigray.orchestrator.run.policy import RunFailed
from sigray.orchestrator.run.progress import Display
from sigray.orchestrator.run.trial import TRIAL_CPUS

_EXIT_TIMEOUT_S = 3.0  # for processes of a Ray that was shut down
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
    # Seconds between two health checks of the training workers by Ray Train.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1" if config.cluster.dashboard else "0")
    address = cluster_address(config)
    if not address and not config.cluster.dashboard:
        for name, value in LEAN_RAY.items():
            if not (records_tasks and "task_events" in name):
                os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    with contextlib.ExitStack() as surroundings:
        if address:
            display.say(f"joining the Ray cluster at {address}")
            try:
                ray.init(address=address, log_to_driver=False)
            except Exception as error:  # as with a token of another cluster
                raise RunFailed(f"the Ray cluster at {address} cannot be joined: {error}") from error
        else:
            temporary = surroundings.enter_context(own_surroundings(display))
            display.say("starting Ray on this machine")
            num_cpus, resources = _own_resources(config, num_trials)
            try:
                ray.init(
                    address="local",
                    _temp_dir=temporary,
                    # Ray only counts CPUs: on a small machine data-shard workers and training workers share cores.
                    num_cpus=max(os.cpu_count() or 1, int(num_cpus + 0.5)),
                    resources=resources,
                    include_dashboard=config.cluster.dashboard,
                    log_to_driver=False,
                    configure_logging=False,
                )
            except Exception as error:  # Ray raises the base class, as on a machine that is too busy
                raise RunFailed(f"Ray did not start on this machine: {error}") from error
        try:
            yield
        finally:
            leftovers = {} if address else _ray_processes()
            ray.shutdown()
            _end(leftovers)


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


def _ray_processes() -> dict[int, str]:
    """Return ids and start times of Ray's workers below this process.

    An id together with a start time names one process: the kernel reuses ids.
    """
    family = {os.getpid()}
    processes = _processes()
    while grown := {pid for pid, (parent, _) in processes.items() if parent in family} - family:
        family |= grown
    workers = {}
    for pid in family & processes.keys():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
                workers[pid] = processes[pid][1]
    return workers


def _processes() -> dict[int, tuple[int, str]]:
    """Return parent and start time of each process of this machine, by process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            found[int(path.name)] = (int(fields[1]), fields[19])
    return found


def _end(processes: dict[int, str]) -> None:
    """Kill processes that remain a few seconds after their Ray was shut down.

    About one of seven Train controllers that end while their Ray goes on hangs for ever while its process exits. It
    waits for threads of its metrics and GCS clients (Ray 2.60), and its raylet no longer knows it.
    """
    deadline = time.monotonic() + _EXIT_TIMEOUT_S
    while processes:
        running = _processes()
        processes = {pid: start for pid, start in processes.items() if pid in running and running[pid][1] == start}
        if time.monotonic() > deadline:
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.1)


@contextlib.contextmanager
def stop_on_signal(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first Ctrl-C or SIGTERM; the second one ends the driver."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with contextlib.ExitStack() as earlier_handlers:

        def handle(number: int, frame: Any) -> None:
            earlier_handlers.close()
            stop()

        for number in (signal.SIGINT, signal.SIGTERM):
            earlier_handlers.callback(signal.signal, number, signal.getsignal(number))
            signal.signal(number, handle)
        yield
