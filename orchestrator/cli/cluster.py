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

    Exit codes: 0 no problem; 2 problems, each with its place in the file.
    """
    checks = [check_cluster_file(path) for path in options.files]
    for found in checks:
        say(console, *report_lines(found))
    return 2 if any(found.problems for found in checks) else 0


@command(
    argument("words", nargs="*", metavar="-- train CONFIG.yaml", help="a `sigray train` command"),
    CLUSTER,
    argument("--job", metavar="ID", help="the job's id (default the run's name and the time)"),
    argument("--env", action="append", default=[], metavar="NAME", help="give the run a variable of this environment"),
    argument("--no-follow", action="store_true", help="return as soon as the job is submitted"),
    argument(
        "--pages", default=jobs.DEFAULT_PAGES, metavar="URL", help="address of the runs' pages (default %(default)s)"
    ),
    usage="sigray submit [--cluster FILE | --address URL] [options] -- train CONFIG.yaml [KEY=VALUE ...]",
)
def submit(options: Namespace, console: Console) -> int:
    """Run `sigray train` as a job on a cluster, and follow the job.

    examples:
      sigray submit --cluster cluster.yaml -- train my_run.yaml run.storage=s3://bucket/runs
      sigray submit --address http://127.0.0.1:8265 -- train my_run.yaml optim.lr=5e-4 --overwrite
      sigray submit --env AWS_ENDPOINT_URL --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY -- train my_run.yaml
      sigray logs my_run-1126-101500                                follow the job again, after a lost terminal
      sigray stop my_run-1126-101500                                end the job with a last checkpoint

    Checks the config here first. Then the code of this checkout, the resolved config, tokenizer and class lists go to
    the head, and `sigray train` runs there as a Ray job. All hosts must reach the shards and run.storage. To continue a
    run from its newest checkpoint, submit it again. Ctrl-C leaves the job running. Hosts that get their credentials
    from a role need no --env.

    Exit codes: those of `sigray train`; 1 also if the cluster no longer answers; 2 if the run cannot be submitted.
    """
    command, *words = options.words or [""]
    if command != "train" or not words or words[0].startswith("-"):
        raise ConfigError("give a run, as `sigray submit -- train CONFIG.yaml`; `sigray submit --help`")
    flags = [word for word in words[1:] if word.startswith("-")]
    unknown = sorted(set(flags) - {"--overwrite"})
    if unknown:
        raise ConfigError(f"{', '.join(unknown)}: `sigray train` has no such option")
    config = jobs.check_job(words[0], [word for word in words[1:] if not word.startswith("-")])
    missing = [name for name in options.env if name not in os.environ]
    if missing:
        raise ConfigError(f"--env {', '.join(missing)}: not set here")
    if options.cluster:
        # The cluster is up: problems of its file do not stop the submission.
        for problem in check_cluster_file(options.cluster).problems:
            say(console, f"{options.cluster}: {problem}")
    env = {name: os.environ[name] for name in options.env}
    with jobs.job_client(options.cluster, options.address) as client:
        job = jobs.submit(client, config, flags, env=env, job=options.job, pages=options.pages)
        say(console, f"job {job}")
        return 0 if options.no_follow else _follow(client, job, options)


@command(argument("job", nargs="?", metavar="JOB", help="default the newest"), CLUSTER)
def logs(options: Namespace, console: Console) -> int:
    """Follow a job on a cluster from its beginning."""
    with jobs.job_client(options.cluster, options.address) as client:
        return _follow(client, options.job or jobs.newest_job(client.list_jobs()), options)


@command(CLUSTER)
def status(options: Namespace, console: Console) -> None:
    """List the jobs of a cluster."""
    with jobs.job_client(options.cluster, options.address) as client:
        console.print(jobs.jobs_table(client.list_jobs()))


@command(argument("job", metavar="JOB"), CLUSTER)
def stop(options: Namespace, console: Console) -> None:
    """End a job with a last checkpoint."""
    with jobs.job_client(options.cluster, options.address) as client:
        jobs.stop(client, options.job, console)


def _follow(client: Any, job: str, options: Namespace) -> int:
    try:
        return jobs.follow(client, job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        where = f" --cluster {shlex.quote(options.cluster)}" if options.cluster else ""
        where += f" --address {options.address}" if options.address else ""
        raise KeyboardInterrupt(f"the job continues: sigray logs{where} {job}, sigray stop{where} {job}") from None
