"""Run commands as Ray Jobs on a cluster that is up: submit, follow, list, stop.

A job carries this package, the config with its overrides, and the small files that the config names. The job's working
directory is first on the path of its processes, so the carried package wins over an installed one. The cluster's
environment must be the pinned one; the job ends with a list of the differences otherwise. The driver runs on the head
and needs no terminal: `sigray logs` follows a job from any terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

import sigray
from sigray.orchestrator.address import dashboard_url, why_no_dashboard
from sigray.orchestrator.cluster.job_files import JobFiles, is_shared
from sigray.orchestrator.config import ConfigError, RunConfig, override_of, parse_config, put, read_run_file
from sigray.orchestrator.formatting import format_duration
from sigray.orchestrator.secrets import secrets_of
from sigray.workers.parse import dump_yaml

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
DEFAULT_PAGES = "http://127.0.0.1:3001"  # port of `sigray monitor`'s run pages, and the forwarded one
_PACKAGE = Path(sigray.__file__).parent
_REQUIREMENTS = _PACKAGE.parents[1] / "requirements.txt"  # in a checkout; an installed wheel has none
FILE = "sigray-job.yaml"
RESULT = "SIGRAY_JOB_RESULT"
"""Variable of a job with its last line: the command that uses the result."""
_STOP_S = 120  # for the last checkpoint, before Ray kills a stopped job
_AWAY_S = 300.0  # without an answer from the cluster, before following a job fails
_AGENT_S = 60.0  # for the agent of a head that has just started; until then Ray refuses jobs
_TUNNEL_S = 60.0  # for ssh to connect
# Packages whose versions change a run's numbers; other packages may differ.
_PINNED = ("ray", "torch", "torchvision", "open-clip-torch", "timm", "numpy", "tokenizers", "simplejpeg", "pillow")


@dataclass(frozen=True)
class Job:
    """A command that runs on a cluster, checked here.

    Attributes:
        name: on the Jobs page of Ray's dashboard.
        words: of the command on the head, which runs in the job's folder.
        page: path of its live page.
        storage: URL or folder of its result.
        result: words of the command that uses the result from the user's machine.
        file: content of the YAML that the words name as `FILE`; None without one.
        files: what the config names.
        home: the key of the local folder, which is then below the head's home.
        trackers: of its runs, which need their variables.
    """

    name: str
    words: list[str]
    page: str
    storage: str
    result: list[str]
    file: dict[str, Any] | None = None
    files: JobFiles = field(default_factory=JobFiles)
    home: str = ""
    trackers: Sequence[str] = ()


def config_job(
    command: str, options: Namespace, flags: Sequence[str] = (), *, has_run: bool = True
) -> tuple[Job, RunConfig]:
    """Return job and config of a command that takes a run's YAML and overrides.

    Args:
        has_run: the command writes checkpoints, so the hosts need one place for them.

    Raises:
        ConfigError: `sigray train` would refuse the config, or the cluster cannot read a file that it names.
    """
    path = str(options.config)
    content = read_run_file(path)
    for text in options.overrides:
        put(content, *override_of(text), path)
    config = parse_config(copy.deepcopy(content), path)
    home = "run.dir" if drop_local(content["run"]) else ""
    if has_run and home and config.run.storage is None:
        remedy = "set run.storage=s3://bucket/runs or a folder that all hosts see"
        raise ConfigError(
            f"{path}: run.storage is not set: the hosts of a cluster need one place for checkpoints; {remedy}"
        )
    files = JobFiles()
    content = files.settle(RunConfig, content)
    files.check(path)
    name = config.run.name
    place = config.storage_uri
    job = Job(name, [command, FILE, *flags], f"/runs/{name}", place, ["export", place], content, files, home)
    return replace(job, trackers=config.run.trackers if has_run else ()), config


def place_job(command: str, place: str, kind: str, overrides: Sequence[str] = (), flags: Sequence[str] = ()) -> Job:
    """Return the job of a command that takes the storage of a run or sweep.

    Args:
        command: and the option that takes the place, if any.
        kind: run or sweep.

    Raises:
        ConfigError: the cluster cannot see the place, or a file that an override names.
    """
    if not is_shared(place):
        raise ConfigError(
            f"{place} is a folder of this machine, which the cluster does not see: give the storage of the {kind}, as "
            f"s3://bucket/{kind}s/NAME, or an absolute path that all hosts see"
        )
    place = place.rstrip("/")
    files = JobFiles()
    words = [*command.split(), place]
    for text in overrides:
        key, value = override_of(text)
        if found := list(secrets_of({key: value})):
            raise ConfigError(f"an override holds credentials, which must not be sent with a job: {found[0]}")
        settled = files.settle_keys({key: value})[key]
        words.append(text if settled == value else f"{key}={json.dumps(settled)}")
    files.check(f"sigray {command}")
    storage = place.partition("/checkpoints/")[0]
    name = storage.rpartition("/")[2]
    return Job(name, [*words, *flags], f"/{kind}s/{name}", storage, ["export", storage], files=files)


def can_read(place: str) -> bool:
    """Return whether a shared place can be read here, and not on the hosts only."""
    return "://" in place or Path(place).exists()


def drop_local(section: dict[str, Any], key: str = "dir") -> bool:
    """Drop a local folder of this machine; return whether the head gives another one."""
    return not is_shared(section.get(key)) and section.pop(key, "") is not None


def stage(job: Job, folder: Path) -> None:
    """Fill a job's working directory: package, YAML, and the files it names."""
    # copytree follows links, so a checkout and an installed wheel give the same folder.
    shutil.copytree(_PACKAGE, folder / "sigray", ignore=shutil.ignore_patterns("__pycache__", "*.so", ".*"))
    for name, data in job.files.carried.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    if job.file is not None:
        (folder / FILE).write_text(dump_yaml(job.file))
    if _REQUIREMENTS.exists():
        shutil.copy(_REQUIREMENTS, folder)


def submit(
    client: Any,
    job: Job,
    *,
    env: dict[str, str] | None = None,
    id: str | None = None,
    pages: str = DEFAULT_PAGES,
    where: Sequence[str] = (),
) -> str:
    """Upload and start a job; return its id.

    Args:
        client: Ray's JobSubmissionClient.
        env: variables of the run's processes; Ray's dashboard shows a browser only their names.
        id: by default the job's name and the time.
        pages: address of the run pages, as the browser that shows the dashboard reaches them.
        where: options of `sigray submit`, if the command that uses the result is another job.

    Raises:
        ConfigError: the command or the metadata hold a secret.
    """
    words = shlex.join(["python", "-m", "sigray.tuning.cli", *job.words])
    if job.home:  # Ray deletes the job's working directory
        words += f' {job.home}="$HOME/sigray-{"runs" if job.home == "run.dir" else "sweeps"}"'
    command, *rest = job.result
    result = shlex.join(["sigray", command, *(where if command == "submit" else ()), *rest])
    # Ray's dashboard lists a job by its job_name, and shows the first lines of all metadata on the job's page.
    page = f"{pages.rstrip('/')}{job.page}"
    metadata = {"page": page, "job_name": job.name, "storage": job.storage, "result": result}
    if found := list(secrets_of([*job.words, *metadata.values(), *([id] if id else [])])):
        raise ConfigError(f"the command holds {found[0].partition(': ')[2]}, which must not be sent with a job")
    tracking = {"PYTHONUNBUFFERED": "1", "RAY_TRAIN_ENABLE_STATE_TRACKING": "1", RESULT: result}
    variables = tracking | {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)} | (env or {})
    check = shlex.join(["python", "-m", "sigray.orchestrator.cluster.jobs", job.words[0], job.name])
    with tempfile.TemporaryDirectory(prefix="sigray-job-") as folder:
        stage(job, Path(folder))
        deadline = time.monotonic() + _AGENT_S
        while True:
            try:
                return client.submit_job(
                    entrypoint=f"{check} && exec {words}",
                    submission_id=id or f"{job.name}-{time.strftime('%m%d-%H%M%S')}",
                    runtime_env={"working_dir": folder, "env_vars": variables},
                    metadata=metadata,
                )
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(1)


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


def jobs_lines(jobs: list[Any]) -> list[str]:
    """Return aligned lines on a cluster's jobs, newest first; ids are never cut."""
    rows = [("job", "status", "started", "took", "storage")]
    for job in _newest_first(jobs):
        begin = (job.start_time or 0) / 1000
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(begin))
        took = format_duration((job.end_time / 1000 if job.end_time else time.time()) - begin)
        storage = (job.metadata or {}).get("storage", "")
        rows.append((job.submission_id, job.status.value.lower(), started, took, storage))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def newest_job(jobs: list[Any], *, at_work: bool = False) -> str:
    """Return the id of the newest job, or of the newest that has not ended.

    Raises:
        ConfigError: the cluster has no such job.
    """
    for job in _newest_first(jobs):
        if not (at_work and job.status.is_terminal()):
            return str(job.submission_id)
    raise ConfigError("no job of the cluster is at work" if at_work else "the cluster has no job")


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
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).parent / "ray"), "dashboard", cluster, "--port", port]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            deadline = time.monotonic() + _TUNNEL_S
            while why_no_dashboard(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    said = log.read().decode(errors="replace").strip()
                    raise RuntimeError(f"`ray dashboard` does not reach the head of {cluster}:\n{said[-1000:]}")
                time.sleep(0.2)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            process.wait()


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
    command, name = sys.argv[1:]
    print(f"sigray {command} {name} as a job on {socket.gethostname()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
