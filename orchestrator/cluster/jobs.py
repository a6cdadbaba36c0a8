"""Runs as Ray Jobs on a cluster that is up: submit, follow, look, stop.

A job carries the code of this checkout, the resolved config and the small files that it names; the node's environment
must be the pinned one, and the job says so where it is not. The driver runs on the head. It needs no terminal: `sigray
logs` picks up where a lost one left off.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

import sigray
from sigray.orchestrator.config import FILES, ConfigError, RunConfig, load_config
from sigray.orchestrator.formatting import format_duration
from sigray.workers.config import SUBFOLDERS

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
DEFAULT_PAGES = "http://127.0.0.1:3001"  # where `sigray monitor` serves the pages of runs, and where they are forwarded
_PACKAGE = Path(sigray.__file__).parent
_REQUIREMENTS = _PACKAGE.parents[1] / "requirements.txt"  # of a checkout; an installed sigray has none
_CONFIG = "sigray-config.yaml"
_MAX_FILE_MIB = 16  # of a file that travels with a job
_STOP_S = 120  # for a last checkpoint, before Ray kills a job that was told to stop
_AWAY_S = 300.0  # without an answer of the cluster, after which following a job gives up
_TUNNEL_S = 60.0  # for ssh to come up
# What decides numbers; other packages of another version are the node's business.
_PINNED = ("ray", "torch", "torchvision", "open-clip-torch", "timm", "numpy", "tokenizers", "simplejpeg", "pillow")


class ClusterAway(RuntimeError):
    """Nothing answers at the address of a cluster."""


def check_job(path: str, overrides: list[str]) -> RunConfig:
    """The config of a run that is to be submitted.

    Raises:
        ConfigError: for what `sigray train` would refuse, and for what only this machine could find.
    """
    config = load_config(path, overrides)
    if config.run.storage is None and config.run.dir == str(Path("runs").absolute()):
        raise ConfigError(
            f"{path}: run.storage is not set: the hosts of a cluster need one place for checkpoints, as "
            "run.storage=s3://bucket/runs or a folder that all of them see"
        )
    for name in _local_files(config):
        file = Path(name)
        if not file.is_file():
            raise ConfigError(f"{path}: {name} is named and does not exist")
        if file.stat().st_size > _MAX_FILE_MIB << 20:
            raise ConfigError(f"{path}: {name} is larger than {_MAX_FILE_MIB} MiB: put it where all hosts see it")
    return config


def _local_files(config: RunConfig) -> list[str]:
    """Small files that the config names and the job takes along: tokenizer and class lists."""
    names = [spec.classes for spec in config.eval.sets.values() if spec.classes and spec.classes != SUBFOLDERS]
    if config.model.tokenizer != "open_clip":
        names.append(config.model.tokenizer)
    return sorted({name for name in names if "://" not in name})


def stage(config: RunConfig, folder: Path) -> None:
    """Fill a job's working directory: code, config, and the files that it names, each below its content's hash."""
    shutil.copytree(_PACKAGE, folder / "sigray", ignore=shutil.ignore_patterns("__pycache__", "*.so", ".*"))
    content = config.to_yaml()
    for name in _local_files(config):
        data = Path(name).read_bytes()
        place = f"{FILES}/{hashlib.sha256(data).hexdigest()[:16]}/{Path(name).name}"
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(data)
        content = re.sub(rf"(:\s+){re.escape(name)}$", rf"\g<1>{place}", content, flags=re.MULTILINE)
    assert not any(name in content for name in _local_files(config)), "a local path would travel"
    (folder / _CONFIG).write_text(content)
    if _REQUIREMENTS.exists():
        shutil.copy(_REQUIREMENTS, folder)


def submit(
    client: Any,
    config: RunConfig,
    options: list[str],
    *,
    env: dict[str, str] | None = None,
    job: str | None = None,
    pages: str = DEFAULT_PAGES,
) -> str:
    """Upload and start a run; returns the job's id.

    Args:
        client: Ray's JobSubmissionClient.
        config: as `check_job` gave it.
        options: of `sigray train`, such as --overwrite.
        env: variables that the run's processes get; Ray's dashboard shows names only to browsers.
        job: the job's id; by default the run's name and the time.
        pages: where the browser that shows the dashboard finds the pages of runs.
    """
    entrypoint = ["python", "-m", "sigray.tuning.cli", "train", _CONFIG, *options]
    words = shlex.join(entrypoint)
    if config.run.dir == str(Path("runs").absolute()):
        words += ' run.dir="$HOME/sigray-runs"'  # of the head; the working directory goes with the job
    with tempfile.TemporaryDirectory(prefix="sigray-job-") as folder:
        stage(config, Path(folder))
        return client.submit_job(
            entrypoint=f"python -m sigray.orchestrator.cluster.jobs && exec {words}",
            submission_id=job or f"{config.run.name}-{time.strftime('%m%d-%H%M%S')}",
            runtime_env={
                "working_dir": folder,
                "env_vars": {
                    "PYTHONUNBUFFERED": "1",
                    "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S),
                    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
                    **(env or {}),
                },
            },
            # Ray's dashboard lists a job by its job_name; on the job's own page it shows the beginning of all this.
            metadata={
                "page": f"{pages.rstrip('/')}/runs/{config.run.name}",
                "job_name": config.run.name,
                "storage": config.storage_uri,
            },
        )


def follow(client: Any, job: str, show: Callable[[str], None]) -> int:
    """Show a job's log from its beginning to its end; returns the exit code of its driver.

    A connection that breaks is made anew, and nothing is shown twice.

    Raises:
        ClusterAway: where the cluster does not answer for 5 minutes.
    """
    shown, heard_at = 0, time.monotonic()

    async def read() -> None:
        nonlocal shown, heard_at
        seen = 0
        async for text in client.tail_job_logs(job):
            heard_at = time.monotonic()
            begin, seen = seen, seen + len(text)
            if seen > shown:
                show(text[max(0, shown - begin) :])
                shown = seen

    while True:
        try:
            client.get_job_info(job)  # an unknown job has a log that never begins
            asyncio.run(read())
            info = client.get_job_info(job)
            heard_at = time.monotonic()
            if info.status.is_terminal():
                # What the driver said last may not have come by then.
                rest = client.get_job_logs(job)[shown:]
                break
        except Exception as error:
            if "does not exist" in str(error):
                raise ConfigError(f"there is no job {job!r}; `sigray status` lists them") from error
            if time.monotonic() - heard_at > _AWAY_S:
                raise ClusterAway(f"the cluster did not answer for {format_duration(_AWAY_S)}: {error}") from error
        time.sleep(1)
    if rest:
        show(rest)
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code) % 256
    if info.message and info.status != "SUCCEEDED":
        show(f"{info.message}\n")
    return 0 if info.status == "SUCCEEDED" else 1


def jobs_table(jobs: list[Any]) -> Table:
    """The jobs of a cluster, newest first."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("job", "status", "started", "took", "run"):
        table.add_column(column, overflow="fold")
    for job in sorted(jobs, key=lambda one: one.start_time or 0, reverse=True):
        if not job.submission_id:
            continue
        begin, end = (job.start_time or 0) / 1000, (job.end_time or time.time() * 1000) / 1000
        metadata = job.metadata or {}
        table.add_row(
            job.submission_id,
            job.status.value.lower(),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(begin)),
            format_duration(end - begin),
            metadata.get("storage", ""),
        )
    return table


def newest_job(jobs: list[Any]) -> str:
    """The job that was submitted last.

    Raises:
        ConfigError: where there is none.
    """
    submitted = [job for job in jobs if job.submission_id]
    if not submitted:
        raise ConfigError("the cluster has no job")
    return str(max(submitted, key=lambda one: one.start_time or 0).submission_id)


def stop(client: Any, job: str, console: Console) -> None:
    """Ask a run to write a checkpoint and end; returns when it has ended.

    Raises:
        ConfigError: where there is no such job.
    """
    try:
        info = client.get_job_info(job)
    except RuntimeError as error:
        raise ConfigError(f"there is no job {job!r}; `sigray status` lists them") from error
    if info.status.is_terminal():
        console.print(f"{job} has ended before: {info.status.value.lower()}", highlight=False)
        return
    client.stop_job(job)
    console.print(f"{job} is writing a last checkpoint (up to {_STOP_S} s)", highlight=False)
    while not client.get_job_info(job).status.is_terminal():
        time.sleep(0.5)
    console.print(f"{job}: {client.get_job_info(job).status.value.lower()}", highlight=False)


@contextlib.contextmanager
def job_client(cluster: str | None, address: str | None) -> Iterator[Any]:
    """Ray's client of a cluster's Jobs: by the address of its dashboard, or by its `ray up` file and a tunnel.

    Raises:
        ClusterAway: where nothing answers.
    """
    import logging

    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(_tunnel(cluster)) if cluster else address
        url = url or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(name, None)  # Ray would take them for the address that it is given
        try:
            client = JobSubmissionClient(url)
        except (ConnectionError, RuntimeError) as error:
            raise ClusterAway(f"no Ray dashboard answers at {url}: {_first_line(error)}") from error
        yield client


@contextlib.contextmanager
def _tunnel(cluster: str) -> Iterator[str]:
    """The head's dashboard on a free port of this machine's loopback, by Ray's own ssh."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "ray"), "dashboard", cluster, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            deadline = time.monotonic() + _TUNNEL_S
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    said = log.read().decode(errors="replace").strip()
                    raise ClusterAway(f"no way to the head of {cluster} (`ray dashboard`):\n{said[-1000:]}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            process.wait()


def _answers(port: int) -> bool:
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=2)
    except urllib.error.HTTPError:
        return True  # it asks for a token
    except OSError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def environment_differences(requirements: str) -> list[str]:
    """Packages that decide numbers and are not of the pinned version in this environment, one line each."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    lines = []
    for text in requirements.splitlines():
        if not text.strip() or text.startswith("#"):
            continue
        wanted = Requirement(text)
        if wanted.name not in _PINNED or (wanted.marker and not wanted.marker.evaluate()):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or not wanted.specifier.contains(found.partition("+")[0], prereleases=True):
            lines.append(f"{wanted.name}: {found} here, {wanted.specifier} pinned")
    return lines


def _main() -> int:
    """The first thing a job does on the cluster: is this the environment that was pinned?"""
    path = Path("requirements.txt")
    differences = environment_differences(path.read_text()) if path.exists() else []
    if differences:
        print("sigray: the cluster's environment is not that of requirements.txt (run clusters/setup.sh on each node):")
        print("\n".join(f"  {line}" for line in differences), flush=True)
        return 2
    config = yaml.safe_load(Path(_CONFIG).read_text())
    print(f"job of run {config['run']['name']} on {socket.gethostname()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
