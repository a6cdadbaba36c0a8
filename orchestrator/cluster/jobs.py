"""Run training as Ray Jobs on a cluster that is up: submit, follow, list, stop.

A job carries this package, the resolved config and the small files that the config names. The job's working directory
is first on the path of its processes, so the carried package wins over an installed one. The cluster's environment must
be the pinned one; the job ends with a list of the differences otherwise. The driver runs on the head and needs no
terminal: `sigray logs` follows a job from any terminal.
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
from sigray.orchestrator.address import dashboard_url
from sigray.orchestrator.config import FILES, ConfigError, RunConfig, load_config
from sigray.orchestrator.formatting import format_duration
from sigray.workers.config import SUBFOLDERS

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
DEFAULT_PAGES = "http://127.0.0.1:3001"  # port of `sigray monitor`'s run pages, and the forwarded one
_PACKAGE = Path(sigray.__file__).parent
_REQUIREMENTS = _PACKAGE.parents[1] / "requirements.txt"  # in a checkout; an installed wheel has none
_CONFIG = "sigray-config.yaml"
_MAX_FILE_MIB = 16  # of a file that a job carries
_STOP_S = 120  # for the last checkpoint, before Ray kills a stopped job
_AWAY_S = 300.0  # without an answer from the cluster, before following a job fails
_TUNNEL_S = 60.0  # for ssh to connect
# Packages whose versions change a run's numbers; other packages may differ.
_PINNED = ("ray", "torch", "torchvision", "open-clip-torch", "timm", "numpy", "tokenizers", "simplejpeg", "pillow")


def check_job(path: str, overrides: list[str]) -> RunConfig:
    """Load the config of a run before its submission.

    Raises:
        ConfigError: `sigray train` would refuse the config, or a file that it names cannot be carried.
    """
    config = load_config(path, overrides)
    if config.run.storage is None and config.run.dir == str(Path("runs").absolute()):
        remedy = "set run.storage=s3://bucket/runs or a folder that all hosts see"
        why = "the hosts of a cluster need one place for checkpoints"
        raise ConfigError(f"{path}: run.storage is not set: {why}; {remedy}")
    for name in _local_files(config):
        if not Path(name).is_file():
            raise ConfigError(f"{path}: {name} does not exist")
        if Path(name).stat().st_size > _MAX_FILE_MIB << 20:
            problem = f"{name} is larger than {_MAX_FILE_MIB} MiB: put the file on storage that all hosts see"
            raise ConfigError(f"{path}: {problem}")
    return config


def _local_files(config: RunConfig) -> list[str]:
    """Return the small files that a job carries: tokenizer and class lists."""
    names = [spec.classes for spec in config.eval.sets.values() if spec.classes and spec.classes != SUBFOLDERS]
    if config.model.tokenizer != "open_clip":
        names.append(config.model.tokenizer)
    return sorted({name for name in names if "://" not in name})


def stage(config: RunConfig, folder: Path) -> None:
    """Fill a job's working directory: package, config, and the files it names.

    Each file is below the hash of its content, so another content has another path.
    """
    # copytree follows links, so a checkout and an installed wheel give the same folder.
    shutil.copytree(_PACKAGE, folder / "sigray", ignore=shutil.ignore_patterns("__pycache__", "*.so", ".*"))
    content = config.to_yaml()
    for name in _local_files(config):
        data = Path(name).read_bytes()
        place = f"{FILES}/{hashlib.sha256(data).hexdigest()[:16]}/{Path(name).name}"
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(data)
        content = re.sub(rf"(:\s+){re.escape(name)}$", rf"\g<1>{place}", content, flags=re.MULTILINE)
    assert not any(name in content for name in _local_files(config)), "a local path is left"
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
    """Upload and start a run; return the job's id.

    Args:
        client: Ray's JobSubmissionClient.
        config: the result of `check_job`.
        options: options of `sigray train`, such as --overwrite.
        env: variables of the run's processes; Ray's dashboard shows a browser only their names.
        job: the job's id; by default the run's name and the time.
        pages: address of the run pages, as the browser that shows the dashboard reaches them.
    """
    words = shlex.join(["python", "-m", "sigray.tuning.cli", "train", _CONFIG, *options])
    if config.run.dir == str(Path("runs").absolute()):
        words += ' run.dir="$HOME/sigray-runs"'  # on the head: Ray deletes the job's working directory
    tracking = {"PYTHONUNBUFFERED": "1", "RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}
    variables = tracking | {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)} | (env or {})
    page = f"{pages.rstrip('/')}/runs/{config.run.name}"
    with tempfile.TemporaryDirectory(prefix="sigray-job-") as folder:
        stage(config, Path(folder))
        return client.submit_job(
            entrypoint=f"python -m sigray.orchestrator.cluster.jobs && exec {words}",
            submission_id=job or f"{config.run.name}-{time.strftime('%m%d-%H%M%S')}",
            runtime_env={"working_dir": folder, "env_vars": variables},
            # Ray's dashboard lists a job by its job_name, and shows the first lines of all metadata on the job's page.
            metadata={"page": page, "job_name": config.run.name, "storage": config.storage_uri},
        )


def follow(client: Any, job: str, show: Callable[[str], None]) -> int:
    """Show a job's log until the job ends; return the exit code of its driver.

    Reconnect if the connection breaks, and show nothing twice.

    Raises:
        RuntimeError: the cluster has not answered for 5 minutes.
    """
    shown = 0
    answered_at = time.monotonic()

    async def read() -> None:
        nonlocal shown, answered_at
        seen = 0
        async for text in client.tail_job_logs(job):
            answered_at = time.monotonic()
            begin, seen = seen, seen + len(text)
            if seen > shown:
                show(text[max(0, shown - begin) :])
                shown = seen

    while True:
        try:
            client.get_job_info(job)  # raises if there is no such job; its log would never begin
            asyncio.run(read())
            info = client.get_job_info(job)
            answered_at = time.monotonic()
            if info.status.is_terminal():
                # The stream may end before the driver's last lines.
                rest = client.get_job_logs(job)[shown:]
                break
        except Exception as error:
            if "does not exist" in str(error):
                raise _no_such_job(job) from error
            if time.monotonic() - answered_at > _AWAY_S:
                raise RuntimeError(f"the cluster did not answer for {format_duration(_AWAY_S)}: {error}") from error
        time.sleep(1)
    show(rest)
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code) % 256
    if info.message and info.status != "SUCCEEDED":
        show(f"{info.message}\n")
    return 0 if info.status == "SUCCEEDED" else 1


def _no_such_job(job: str) -> ConfigError:
    return ConfigError(f"there is no job {job!r}; `sigray status` lists the jobs")


def jobs_table(jobs: list[Any]) -> Table:
    """Return a table of a cluster's jobs, newest first."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("job", "status", "started", "took", "run"):
        table.add_column(column, overflow="fold")
    for job in _newest_first(jobs):
        begin = (job.start_time or 0) / 1000
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(begin))
        took = format_duration((job.end_time / 1000 if job.end_time else time.time()) - begin)
        storage = (job.metadata or {}).get("storage", "")
        table.add_row(job.submission_id, job.status.value.lower(), started, took, storage)
    return table


def newest_job(jobs: list[Any]) -> str:
    """Return the id of the newest job.

    Raises:
        ConfigError: the cluster has no job.
    """
    for job in _newest_first(jobs):
        return str(job.submission_id)
    raise ConfigError("the cluster has no job")


def _newest_first(jobs: list[Any]) -> list[Any]:
    submitted = [job for job in jobs if job.submission_id]
    return sorted(submitted, key=lambda job: job.start_time or 0, reverse=True)


def stop(client: Any, job: str, console: Console) -> None:
    """Stop a run after a last checkpoint; return when the job has ended.

    Raises:
        ConfigError: there is no such job.
    """
    try:
        status = client.get_job_info(job).status
    except RuntimeError as error:
        raise _no_such_job(job) from error
    if status.is_terminal():
        console.print(f"{job} has already ended: {status.value.lower()}")
        return
    client.stop_job(job)
    console.print(f"{job} is writing a last checkpoint (up to {_STOP_S} s)")
    while not (status := client.get_job_info(job).status).is_terminal():
        time.sleep(0.5)
    console.print(f"{job}: {status.value.lower()}")


@contextlib.contextmanager
def job_client(cluster: str | None, address: str | None) -> Iterator[Any]:
    """Connect to a cluster's Ray Jobs, by a `ray up` file or by an address.

    Args:
        cluster: path of the `ray up` file; a tunnel reaches its head.
        address: URL or host:port of the dashboard, if there is no `ray up` file.

    Raises:
        ConfigError: no dashboard answers at the address.
        RuntimeError: the head of the `ray up` file does not answer.
    """
    import logging

    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    with _tunnel(cluster) if cluster else contextlib.nullcontext(address) as given:
        url = dashboard_url(given or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS)
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(name, None)  # Ray would use it instead of `url`
        try:
            client = JobSubmissionClient(url)
        except (ConnectionError, RuntimeError) as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RuntimeError(f"no Ray dashboard answers at {url}: {why}") from error
        yield client


@contextlib.contextmanager
def _tunnel(cluster: str) -> Iterator[str]:
    """Forward the head's dashboard to a free loopback port, by `ray dashboard`."""
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
                    raise RuntimeError(f"`ray dashboard` does not reach the head of {cluster}:\n{said[-1000:]}")
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
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)  # the head wants a token
    return True


def environment_differences(requirements: str) -> list[str]:
    """Return a line for each package whose version here is not the pinned one."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    lines = []
    for wanted in (Requirement(text) for text in requirements.splitlines() if text.strip() and text[0] != "#"):
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
    """Check that a job's environment is the pinned one, before its run starts."""
    path = Path("requirements.txt")
    differences = environment_differences(path.read_text()) if path.exists() else []
    if differences:
        print("sigray: the cluster's environment differs from requirements.txt; run clusters/setup.sh on each node:")
        print("\n".join(f"  {line}" for line in differences), flush=True)
        return 2
    config = yaml.safe_load(Path(_CONFIG).read_text())
    print(f"job of run {config['run']['name']} on {socket.gethostname()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
