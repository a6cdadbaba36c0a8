"""`sigray cluster check`, and jobs: `sigray submit`, `logs`, `status`, `stop`."""

import os
import shlex
from argparse import Namespace
from typing import Any

from rich.console import Console

from sigray.orchestrator.cli.command import argument, command, either, say
from sigray.orchestrator.cluster import jobs
from sigray.orchestrator.cluster.files import check_cluster_file, report_lines
from sigray.orchestrator.config import ConfigError
from sigray.orchestrator.trackers.variables import variables_of

_COMMANDS = "train, resume, sweep, embed, eval, export and profile"
CLUSTER = either(
    argument("--cluster", metavar="FILE", help="a `ray up` file; sigray reaches the head by ssh"),
    argument("--address", metavar="URL", help="the dashboard, also as host:port (default http://127.0.0.1:8265)"),
)


@command(argument("files", nargs="+", metavar="FILE"))
def check(options: Namespace, console: Console) -> int:
    """Find problems in cluster files before anything is started.

    examples:
      sigray cluster check cluster.yaml clusters/*.yaml

    Takes `ray up` files of the providers aws, gcp and local, and KubeRay manifests (RayCluster, RayJob). Applies Ray's
    own schema and preparation, and checks what Ray lets pass: AWS's machine types, TPU slices, images, the form of
    regions and zones, tokens, health checks, a head that would train, secrets. Contacts no cloud: quotas and the
    existence of images are not checked.

    Exit codes: 0 no problem; 2 problems, or values to fill in, each with its place in the file.
    """
    checks = [check_cluster_file(path) for path in options.files]
    for found in checks:
        say(console, *report_lines(found))
    return 2 if any(found.problems or found.placeholders for found in checks) else 0


@command(
    argument("words", nargs="*", metavar="-- COMMAND ...", help=f"one of {_COMMANDS}"),
    CLUSTER,
    argument("--job", metavar="ID", help="the job's id (default the job's name and the time)"),
    argument("--env", action="append", default=[], metavar="NAME", help="give the run a variable of this environment"),
    argument("--no-follow", action="store_true", help="return as soon as the job is submitted"),
    argument(
        "--pages", default=jobs.DEFAULT_PAGES, metavar="URL", help="address of the runs' pages (default %(default)s)"
    ),
    usage="sigray submit [--cluster FILE | --address URL] [options] -- COMMAND ...",
)
def submit(options: Namespace, console: Console) -> int:
    """Run a command as a job on a cluster, and follow the job.

    examples:
      sigray submit --cluster cluster.yaml -- train my_run.yaml run.storage=s3://bucket/runs
      sigray submit --address http://127.0.0.1:8265 -- train my_run.yaml optim.lr=5e-4 --overwrite
      sigray submit -- sweep my_study.yaml storage=s3://bucket/sweeps
      sigray submit -- train s3://bucket/sweeps/my_study/best.yaml  the best configuration of that sweep
      sigray submit -- export s3://bucket/runs/my_run               into s3://bucket/runs/my_run/export/open_clip
      sigray submit --env AWS_ENDPOINT_URL --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY -- train my_run.yaml
      sigray logs my_run-1126-101500                                follow the job again, after a lost terminal
      sigray stop my_run-1126-101500                                end the job with a last checkpoint

    Takes train, resume, sweep, embed, eval, export and profile, with their own options. Makes the command's checks
    here first. A job carries the code of this checkout, the config with its overrides, and the small files that the
    config names. The command runs on the head. All hosts must reach the shards and the storage: URLs or absolute
    paths. The job's last line is the command that uses its result. To continue a run or a sweep, submit it again.
    Ctrl-C leaves the job running. Hosts that get their credentials from a role need no --env. The variables of the
    config's run.trackers, such as WANDB_API_KEY, go with the job if they are set here.

    Exit codes: those of the command; 1 also if the cluster no longer answers; 2 if the job cannot be submitted.
    """
    if not options.words:
        raise ConfigError("give a command, as `sigray submit -- train CONFIG.yaml`; `sigray submit --help`")
    given = options.parse(options.words)
    if given.job_of is None:
        raise ConfigError(f"`sigray {options.words[0]}` cannot be a job: submit takes {_COMMANDS}")
    job = given.job_of(given)
    missing = [name for name in options.env if name not in os.environ]
    if missing:
        raise ConfigError(f"--env {', '.join(missing)}: not set here")
    if options.cluster:
        # The cluster is up: problems of its file do not stop the submission.
        for problem in check_cluster_file(options.cluster).problems:
            say(console, f"{options.cluster}: {problem}")
    of_trackers = variables_of(job.trackers)
    if of_trackers:
        say(console, f"the job gets {', '.join(of_trackers)} of this environment (run.trackers)")
    env = of_trackers | {name: os.environ[name] for name in options.env}
    where = _where(options) + [word for name in options.env for word in ("--env", name)]
    with jobs.job_client(options.cluster, options.address) as client:
        id = jobs.submit(client, job, env=env, id=options.job, pages=options.pages, where=where)
        say(console, f"job {id}")
        return 0 if options.no_follow else _follow(client, id, options)


@command(argument("job", nargs="?", metavar="JOB", help="default the newest"), CLUSTER)
def logs(options: Namespace, console: Console) -> int:
    """Follow a job on a cluster from its beginning."""
    with jobs.job_client(options.cluster, options.address) as client:
        return _follow(client, options.job or jobs.newest_job(client.list_jobs()), options)


@command(CLUSTER)
def status(options: Namespace, console: Console) -> None:
    """List the jobs of a cluster."""
    with jobs.job_client(options.cluster, options.address) as client:
        say(console, *jobs.jobs_lines(client.list_jobs()))


@command(argument("job", nargs="?", metavar="JOB", help="default the newest at work"), CLUSTER)
def stop(options: Namespace, console: Console) -> None:
    """End a job with a last checkpoint."""
    with jobs.job_client(options.cluster, options.address) as client:
        jobs.stop(client, options.job or jobs.newest_job(client.list_jobs(), at_work=True), console)


def _follow(client: Any, job: str, options: Namespace) -> int:
    try:
        return jobs.follow(client, job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        words = shlex.join([*_where(options), job])
        raise KeyboardInterrupt(f"the job continues: sigray logs {words}, sigray stop {words}") from None


def _where(options: Namespace) -> list[str]:
    """Return the options that name the cluster."""
    given = {"--cluster": options.cluster, "--address": options.address}
    return [word for name, value in given.items() if value for word in (name, value)]
