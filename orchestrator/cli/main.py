"""The command line: parse, call, print. What a command does stands in the module that it calls.

Heavy imports (torch, Ray) happen inside the commands, so that `--help` and a config error answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sigray.orchestrator.cluster.jobs import DEFAULT_PAGES
from sigray.orchestrator.config import ConfigError, RunConfig, json_schema, load_config, override
from sigray.orchestrator.planning.devices import CPU, DEVICES

if TYPE_CHECKING:
    from sigray.orchestrator.reports.live_server import Kind

_DESCRIPTION = """\
Train SigLIP-style image-text models from WebDataset tars on a Ray cluster.

  python -m examples.emoji36 data/emoji36         make a small real data set (1 minute)
  sigray train examples/emoji_cpu.yaml            train on it, evaluate, write runs/emoji_cpu/report.html
  sigray train examples/emoji_cpu.yaml train.global_batch_size=512 run.name=big
                                                  any key of the YAML can be overridden: section.key=value
  sigray resume runs/emoji_cpu                    go on from the newest checkpoint
  sigray eval runs/emoji_cpu                      measure the newest checkpoint again
  sigray config examples/emoji_cpu.yaml           print the whole config, every default written out
  sigray plan examples/emoji_cpu.yaml             predict memory, time and cost before anything starts
  sigray profile examples/emoji_cpu.yaml          where the time of one step goes, as table, picture and traces
  sigray embed examples/emoji_siglit.yaml         compute a locked image tower's embeddings once, for training
  sigray sweep tuning/studies/batch_size.yaml     train many runs that differ in chosen keys, and compare them

  sigray data inspect 'data/emoji36/train/*.tar' --sheet sheet.html
                                                  what shards hold, what is broken in them, and pictures
  sigray data tokenizer 'data/emoji36/train/*.tar' tokenizer.json
                                                  a tokenizer from their captions
  sigray data audit runs/emoji_cpu                did the run use every sample exactly once per epoch?
  sigray submit --cluster cluster.yaml -- train run.yaml
                                                  the same as a job on a cluster (also logs, status, stop)
  sigray pages                                    live pages of the runs and sweeps here, for browser and phone
  sigray monitor                                  the same on a cluster's head, with Prometheus and alerts
  sigray cluster check cluster.yaml               what is wrong with a cluster file
  sigray chaos run.yaml --faults 20               kill whatever can die: does the run end with the same weights?
"""
_EPILOG = """\
Exit codes: 0 done; 1 the run failed; 2 the command, config, data or storage cannot be used; 130 interrupted
(a checkpoint was written; `sigray resume` goes on).
"""

_INSPECT_EXAMPLES = """\
examples:
  sigray data inspect data/emoji36/train                          a folder
  sigray data inspect 'tars/train-{000000..000127}.tar' --sheet sheet.html
  sigray data inspect s3://bucket/prefix data.s3.endpoint=http://127.0.0.1:9000
  sigray data inspect tars data.image_keys=[jpg] 'data.captions={txt: 1, json:captions.en: 3}'
  sigray data inspect examples/emoji_cpu.yaml --all               the data of a run, as the run reads it

By default about 2,000 samples are decoded, spread evenly over all shards, and reading stops after 30 s; what was
not read is said. Broken is what training would refuse. Exit code 2 where shards are damaged, cut short or missing, or
where training would not start or would stop; the last table says why.
"""
_AUDIT_EXAMPLES = """\
examples:
  sigray train run.yaml train.ledger=true run.name=a              write down every pair that enters a loss
  sigray data audit runs/a                                        and prove it
  sigray data audit s3://bucket/runs/a

Exit codes: 0 every sample of each complete epoch was used exactly once, and every step had its pairs; 1 not so, and
the first missing or doubled samples are named; 2 there is no ledger to audit.
"""
_TOKENIZER_EXAMPLES = """\
examples:
  sigray data tokenizer 'tars/*.tar' tokenizer.json --vocab-size 8000
  sigray data tokenizer tars world.json --kind unigram 'data.captions={json:captions.de: 1, json:captions.ja: 1}'
  sigray data tokenizer examples/emoji_cpu.yaml tokenizer.json    the captions of a run

Every caption of every source in data.captions counts, whatever its weight. All are held in memory: of large data some
shards are enough, as 'train-{000000..000009}.tar'. bpe is for languages that write words apart with few different
characters; unigram is for any languages, and knows no unknown character.
"""


_PLAN_EXAMPLES = """\
examples:
  sigray plan examples/emoji_cpu.yaml                             on this machine
  sigray plan examples/siglip_b16_5days_32xtpu_v4.yaml            on the devices that the config names
  sigray plan my_run.yaml --device h100 --devices 8 --price-per-hour 3
  sigray plan my_run.yaml --device l4 train.micro_batch_size=256  any key can be overridden
  sigray plan examples/siglit_g14_4xtpu_v4.yaml embeddings.store=null
                                                                  the locked tower in every step
  sigray plan my_run.yaml --json                                  for programs

Devices: cpu (this machine), {devices}.
Needs no cluster, no accelerator and no data. docs/plan.md says what is counted, what is assumed and how far it was off.

Exit codes: 0 it fits; 2 it does not, and the message says which train.micro_batch_size would.
"""

_PROFILE_EXAMPLES = """\
examples:
  sigray profile examples/emoji_cpu.yaml
  sigray profile my_run.yaml --steps 20 train.micro_batch_size=256
  sigray profile my_run.yaml --warm-up 20 cluster.num_workers=4

Trains for real, with the workers and data of the config, under the name NAME-profile: some steps to warm up, then those
that are profiled, then one with a checkpoint, which is deleted at the end. Prints where the time of a step went, part
by part, and leaves in the run's folder:
  profile/step.png                a bar for each rank
  profile/rank-0000.json.gz       each rank's trace, for ui.perfetto.dev or chrome://tracing
  profile/rank-0000-steps.json    the parts of each step in seconds, from that trace
  profile/rank-0000-xla.txt       torch-xla's counters, under torch-xla
  profile/ray_timeline.json       what data-shard workers did meanwhile, also for ui.perfetto.dev (a Ray of its own)

Parts: data wait; to device; forward; loss: tiles, and loss: ring (waiting for other ranks); backward; gradient
all-reduce; optimizer; metrics (every train.log_every_steps steps); checkpoint; other. On CUDA the host waits at the end
of each part, so nothing overlaps and the step takes longer than one that nobody profiles; both are printed. Under
torch-xla a step is one program: its inside is not told apart ("device program").

Exit codes: those of `sigray train`.
"""

_EMBED_EXAMPLES = """\
examples:
  sigray embed examples/emoji_siglit.yaml                         once
  sigray train examples/emoji_siglit.yaml                         as often as you like
  sigray embed run.yaml embeddings.store=s3://bucket/embeddings cluster.num_workers=8

Runs the locked image tower once over the shards of data.shards and eval.sets, with cluster.num_workers workers of
cluster.accelerator, and writes one tar of embeddings, captions and classes for each tar of images (docs/data.md).
Interrupted, or run again with more data, it embeds what is missing. A store of another tower or preprocessing is
refused.
"""

_EXPORT_EXAMPLES = """\
examples:
  sigray export runs/emoji_cpu                                    the newest checkpoint, for open_clip
  sigray export runs/emoji_cpu --format onnx --out emoji_onnx     both towers, for onnxruntime
  sigray export s3://bucket/runs/a --format safetensors --out a
  sigray export runs/emoji_cpu/checkpoints/step-0000000400        another checkpoint

An open_clip export is loaded again with plain open_clip and compared. Each folder has a model card, README.md: how to
load it, data, recipe, results.
"""

_CHAOS_EXAMPLES = """\
examples:
  sigray chaos examples/emoji_cpu.yaml train.num_samples=100000
  sigray chaos run.yaml --kinds trainer,driver --faults 5 --every-s 60
  sigray chaos run.yaml --faults 200 --seed 1                     a soak; the seed repeats its faults

Runs the config twice, on this machine and in a Ray of its own: once undisturbed (not again where that is done already),
and once with faults at random moments. A driver that ends is started again by the same `sigray train`. Then compares
weights, optimizer state, losses and ledger. Kinds of faults, by default all that are possible with the config:
  trainer           kill a training worker
  trainer-hang      stop a training worker for good
  data-worker       kill a data-shard worker
  data-worker-hang  stop a data-shard worker for good
  evaluation        kill an evaluation
  driver            kill the driver and its Ray
  node              kill the raylet
  gcs               kill Ray's gcs_server
  storage           have the storage refuse checkpoints for a while
  truncate          cut the newest checkpoint in half, kill the driver
Only processes that the runs have started are touched. DIR holds the runs, their output (undisturbed.log, disturbed.log)
and chaos.json, which has each fault.

Exit codes: 0 both runs ended alike; 1 they did not, or the run did not come to its end; 2 it cannot be started.
"""

_CLUSTER_EXAMPLES = """\
examples:
  sigray cluster check cluster.yaml clusters/*.yaml

Takes `ray up` files of the providers aws, gcp and local, and KubeRay manifests (RayCluster, RayJob). Looks at Ray's own
schema and preparation, and at what they let pass: machine types, chips and GPUs of a host, images, regions and zones by
their form, tokens, health checks, a head that would train, secrets. Asks no cloud: quotas and the existence of images
are not checked.

Exit codes: 0 nothing is wrong; 2 something is, each named with its place.
"""

_SUBMIT_EXAMPLES = """\
examples:
  sigray submit --cluster cluster.yaml -- train my_run.yaml run.storage=s3://bucket/runs
  sigray submit --address http://127.0.0.1:8265 -- train my_run.yaml optim.lr=5e-4 --overwrite
  sigray submit --env AWS_ENDPOINT_URL --env AWS_ACCESS_KEY_ID --env AWS_SECRET_ACCESS_KEY -- train my_run.yaml
  sigray logs my_run-1126-101500                                  the terminal was lost: follow the job again
  sigray stop my_run-1126-101500                                  end it with a last checkpoint

The config is checked here first; then the code of this checkout, the resolved config, and tokenizer and class lists
travel to the head, where `sigray train` runs as a Ray job. Shards and run.storage must be where all hosts see them.
Submitting the same run again goes on from its newest checkpoint. Ctrl-C leaves the job running. Give --env what has no
other way to the hosts; where they have a role of their own, nothing.

Exit codes: those of `sigray train`; 1 also where the cluster does not answer; 2 where the run cannot be submitted.
"""

_MONITOR_EXAMPLES = """\
examples:
  sigray monitor                          on the head of a cluster, beside it (tmux, or systemd); Ctrl-C ends it
  sigray monitor --generate --out rules   alert rules and Grafana dashboard for a Prometheus and Grafana of your own
  ray exec cluster.yaml --tmux 'sigray monitor'

Needs prometheus on PATH (`apt-get install prometheus`). Where grafana-server is installed it is started with Ray's
dashboards and ours; where it is not, sigray draws them itself. It serves what `sigray pages` serves.
All listens on 127.0.0.1 only.
"""

_PAGES_EXAMPLES = """\
examples:
  sigray pages                            what runs/, sweeps/ and ~/sigray-runs hold, on http://127.0.0.1:3001
  sigray pages /data/runs s3://bucket/runs s3://bucket/sweeps
  sigray pages --host 0.0.0.0             for a phone in the same network; nobody is asked who they are

Needs no Ray and asks nothing of a run: each page is drawn from the run's folder, and asks for news every few seconds.
"""


def main(
    arguments: list[str] | None = None,
    add_more: Callable[[Any], None] = lambda command: None,
    more_pages: Callable[[], list[Kind]] = list,
) -> int:
    """Run a command and return the exit code. The entry point of `sigray` is `tuning/cli.py`, which adds `sweep`.

    Args:
        arguments: of the command line; None: those of this process.
        add_more: given a function that adds a command: (name, run, help, examples=...) -> its parser.
        more_pages: what has live pages besides runs; asked when they are served.
    """
    parser = _parser(add_more)
    # argparse ends a list of overrides at the first option; `train x.yaml --overwrite run.name=a` shall work too.
    options, rest = parser.parse_known_args(arguments, argparse.Namespace(more_pages=more_pages))
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    try:
        return options.run(options, Console())
    except (ValueError, OSError) as error:  # the user's config, data or storage: told, not traced
        return _fail(error, code=2)
    except RuntimeError as error:  # a tool that is missing, a run that failed
        return _fail(error, code=1)
    except KeyboardInterrupt as error:
        return _fail(KeyboardInterrupt(str(error) or "interrupted"), code=130)


def _train(options: argparse.Namespace, console: Console) -> int:
    config = load_config(options.config, options.overrides)
    from sigray.orchestrator.run.driver import train

    return _finish(train(config, console, overwrite=options.overwrite), config, console)


def _resume(options: argparse.Namespace, console: Console) -> int:
    from sigray.orchestrator.run.folder import read_run

    saved = read_run(options.run_folder)
    config = override(saved, options.overrides, options.run_folder)
    from sigray.orchestrator.run.driver import train

    return _finish(train(config, console, resume_from=saved), config, console)


def _eval(options: argparse.Namespace, console: Console) -> int:
    from sigray.orchestrator.run.folder import read_run

    run, _, name = options.run_folder.rstrip("/").partition("/checkpoints/")
    config = override(read_run(run), options.overrides, run)
    if not config.eval.sets:
        raise ConfigError(f"{run} has no eval.sets: add one, as eval.sets.NAME.shards=PATTERN")
    from sigray.workers.checkpoint.index import CheckpointError, list_checkpoints, read_info
    from sigray.workers.storage import Storage

    storage = Storage(run)
    checkpoints = [read_info(storage, name)] if name else list_checkpoints(storage)
    if not checkpoints:
        raise CheckpointError(f"{run} has no checkpoint yet")
    from sigray.orchestrator.run.driver import evaluate
    from sigray.orchestrator.run.monitor import figures_table

    console.print(f"checkpoint {checkpoints[-1].name} of {run}", highlight=False)
    console.print(figures_table(evaluate(config, checkpoints[-1], console)))
    return 0


def _export(options: argparse.Namespace, console: Console) -> int:
    from sigray.orchestrator.run.folder import read_run

    run, _, name = options.run_folder.rstrip("/").partition("/checkpoints/")
    config = read_run(run)
    from sigray.workers.checkpoint.index import CheckpointError, list_checkpoints, read_info
    from sigray.workers.storage import Storage

    storage = Storage(run)
    checkpoints = [read_info(storage, name)] if name else list_checkpoints(storage)
    if not checkpoints:
        raise CheckpointError(f"{run} has no checkpoint yet")
    from sigray.orchestrator.run.export import export_run

    out = Path(options.out) if options.out else None
    made = export_run(config, checkpoints[-1], options.format, out, overwrite=options.overwrite)
    lines = [f"checkpoint {checkpoints[-1].name} of {run}", *made.remarks, f"exported: {made.path}"]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    return 0


def _report(options: argparse.Namespace, console: Console) -> int:
    from sigray.orchestrator.reports.run_page import write_report

    console.print(f"report: {write_report(Path(options.run_folder))}", highlight=False, soft_wrap=True)
    return 0


def _profile(options: argparse.Namespace, console: Console) -> int:
    config = load_config(options.config, options.overrides)
    from sigray.orchestrator.run.profile import profile_run, remarks, table
    from sigray.workers.training.profile import Profile

    split, folder = profile_run(config, Profile(options.warm_up, options.steps), console)
    console.print(table(split))
    lines = [*remarks(split, config), f"picture and traces: {folder}"]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    return 0


def _chaos(options: argparse.Namespace, console: Console) -> int:
    from sigray.orchestrator.chaos.chaos import chaos, result_table

    result = chaos(
        options.config,
        options.overrides,
        console,
        out=Path(options.out) if options.out else None,
        seed=options.seed,
        num_faults=options.faults,
        every_s=options.every_s,
        kinds=options.kinds.split(",") if options.kinds is not None else None,
        stuck_s=options.stuck_s,
    )
    console.print(result_table(result))
    if result.differences:
        raise RuntimeError(result.verdict)
    console.print(result.verdict, highlight=False, soft_wrap=True)
    return 0


def _submit(options: argparse.Namespace, console: Console) -> int:
    import os

    from sigray.orchestrator.cluster.jobs import check_job, job_client, submit

    command, *words = options.words or [""]
    if command != "train" or not words or words[0].startswith("-"):
        raise ConfigError("give a run, as `sigray submit -- train CONFIG.yaml`; `sigray submit --help`")
    flags = [word for word in words[1:] if word.startswith("-")]
    if set(flags) - {"--overwrite"}:
        raise ConfigError(f"{', '.join(sorted(set(flags) - {'--overwrite'}))}: `sigray train` has no such option")
    config = check_job(words[0], [word for word in words[1:] if not word.startswith("-")])
    missing = [name for name in options.env if name not in os.environ]
    if missing:
        raise ConfigError(f"--env {', '.join(missing)}: not set here")
    if options.cluster:
        from sigray.orchestrator.cluster.files import check_cluster_file

        for problem in check_cluster_file(options.cluster).problems:  # the cluster is up: it is not refused for them
            console.print(f"{options.cluster}: {problem}", highlight=False, markup=False, soft_wrap=True)
    env = {name: os.environ[name] for name in options.env}
    with job_client(options.cluster, options.address) as client:
        job = submit(client, config, flags, env=env, job=options.job, pages=options.pages)
        console.print(f"job {job}", highlight=False)
        if options.no_follow:
            return 0
        return _follow(client, job, options)


def _follow(client: Any, job: str, options: argparse.Namespace) -> int:
    import shlex
    import sys

    from sigray.orchestrator.cluster.jobs import follow

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        return follow(client, job, show)
    except KeyboardInterrupt:
        where = f" --cluster {shlex.quote(options.cluster)}" if options.cluster else ""
        where += f" --address {options.address}" if options.address else ""
        raise KeyboardInterrupt(f"the job goes on: sigray logs{where} {job}, sigray stop{where} {job}") from None


def _logs(options: argparse.Namespace, console: Console) -> int:
    from sigray.orchestrator.cluster.jobs import job_client, newest_job

    with job_client(options.cluster, options.address) as client:
        return _follow(client, options.job or newest_job(client.list_jobs()), options)


def _status(options: argparse.Namespace, console: Console) -> int:
    from sigray.orchestrator.cluster.jobs import job_client, jobs_table

    with job_client(options.cluster, options.address) as client:
        console.print(jobs_table(client.list_jobs()))
    return 0


def _stop(options: argparse.Namespace, console: Console) -> int:
    from sigray.orchestrator.cluster.jobs import job_client, stop

    with job_client(options.cluster, options.address) as client:
        stop(client, options.job, console)
    return 0


def _monitor(options: argparse.Namespace, console: Console) -> int:
    from sigray.orchestrator.cluster.prometheus import generate, monitor

    out = Path(options.out)
    if options.generate:
        for path in generate(out):
            console.print(str(path), highlight=False, soft_wrap=True)
        return 0
    ended = _end_signal()
    with (
        monitor(
            console, session=options.session, out=out, port=options.port, grafana_port=options.grafana_port
        ) as process,
        _serve_pages(options, console, "127.0.0.1"),
    ):
        while not ended.wait(1):
            if process.poll() is not None:
                raise RuntimeError(f"Prometheus ended; see {out / 'prometheus.log'}")
    return 0


def _pages(options: argparse.Namespace, console: Console) -> int:
    ended = _end_signal()
    with _serve_pages(options, console, options.host):
        ended.wait()
    return 0


@contextlib.contextmanager
def _serve_pages(options: argparse.Namespace, console: Console, host: str) -> Iterator[None]:
    from sigray.orchestrator.reports.http_server import serve
    from sigray.orchestrator.reports.live_server import PLACES, RUNS, Pages

    pages = Pages(options.places or PLACES, [RUNS, *options.more_pages()])
    with serve(pages.answer, options.pages_port, host=host):
        console.print(f"pages of runs and sweeps: http://{host}:{options.pages_port}", highlight=False, soft_wrap=True)
        yield


def _end_signal() -> threading.Event:
    """Set by Ctrl-C and SIGTERM."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    return ended


def _cluster_check(options: argparse.Namespace, console: Console) -> int:
    from sigray.orchestrator.cluster.files import check_cluster_file, report_lines

    checks = [check_cluster_file(path) for path in options.files]
    for check in checks:
        for line in report_lines(check):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 2 if any(check.problems for check in checks) else 0


def _plan(options: argparse.Namespace, console: Console) -> int:
    config = load_config(options.config, options.overrides)
    from sigray.orchestrator.planning.plan import check_fits, default_num_devices, plan, run_device, tables

    kind = run_device(config, options.device, options.devices)
    if kind is None:
        raise ConfigError("which device? Give --device or cluster.device: " + ", ".join([CPU, *DEVICES]))
    num_devices = options.devices or default_num_devices(config, kind)
    predicted = plan(config, kind, num_devices, price_per_hour=options.price_per_hour)
    if options.json:
        print(json.dumps(predicted.as_dict(), indent=1))
    else:
        console.print(tables(predicted))
    check_fits(predicted, config)
    return 0


def _embed(options: argparse.Namespace, console: Console) -> int:
    config = load_config(options.config, options.overrides)
    from sigray.orchestrator.run.embed import embed

    console.print(embed(config, console), highlight=False, soft_wrap=True)
    return 0


def _config(options: argparse.Namespace, console: Console) -> int:
    if options.schema:
        print(json_schema())
    elif options.config:
        print(load_config(options.config, options.overrides).to_yaml(), end="")
    else:
        raise ConfigError("give a YAML file to resolve, or --schema")
    return 0


def _data_inspect(options: argparse.Namespace, console: Console) -> int:
    from sigray.orchestrator.data.inspect import MAX_S, NUM_PICTURES, NUM_SAMPLES, data_section, inspect_data
    from sigray.orchestrator.data.inspect_sheet import inspection_tables, write_sheet

    data = data_section(options.overrides)
    sheet = Path(options.sheet) if options.sheet else None
    if sheet is not None and not sheet.absolute().parent.is_dir():
        raise ConfigError(f"--sheet {sheet}: the folder {sheet.absolute().parent} does not exist")
    is_default = options.samples is None and not options.all
    with ProgressBars(console) as progress:
        found = inspect_data(
            data,
            num_samples=None if options.all else options.samples or NUM_SAMPLES,
            max_s=MAX_S if is_default else None,
            num_pictures=NUM_PICTURES if sheet else 0,
            progress=progress,
        )
    console.print(inspection_tables(found))
    if sheet is not None:
        write_sheet(found, sheet)
        console.print(f"sheet: {sheet.absolute()}", highlight=False, soft_wrap=True)
    if found.problems:
        first = ": ".join(found.problems[0])
        num_problems = len(found.problems)
        raise ConfigError(first if num_problems == 1 else f"problems with the data, {num_problems}: see the last table")
    return 0


def _data_audit(options: argparse.Namespace, console: Console) -> int:
    from sigray.orchestrator.run.folder import read_run

    config = read_run(options.run_folder)
    from sigray.orchestrator.data.audit import audit_run, audit_table

    found = audit_run(config)
    console.print(audit_table(found))
    if not found.audit.is_exact:
        raise RuntimeError(found.verdict)
    console.print(found.verdict, highlight=False, soft_wrap=True)
    return 0


def _data_tokenizer(options: argparse.Namespace, console: Console) -> int:
    from sigray.orchestrator.data.inspect import data_section
    from sigray.orchestrator.data.train_tokenizer import train_caption_tokenizer

    data = data_section([options.pattern, *options.overrides])
    with ProgressBars(console) as progress:
        made = train_caption_tokenizer(
            data,
            Path(options.out),
            vocab_size=options.vocab_size,
            kind=options.kind,
            lower_case=not options.keep_case,
            progress=progress,
        )
    console.print(
        f"{made.path.absolute()}: {made.vocab_size:,} tokens, from {made.num_captions:,} captions; "
        f"{made.num_unusable:,} samples without a usable one\n"
        f"tokens per caption, the closing [EOS] included: median {made.tokens_median:.0f}, "
        f"95th percentile {made.tokens_95_pct:.0f}\n\n{made.yaml}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0


def _finish(summary: dict[str, Any], config: RunConfig, console: Console) -> int:
    from sigray.orchestrator.formatting import format_duration
    from sigray.orchestrator.run.monitor import figures_table

    if summary["zero_shot"] or summary["retrieval"]:
        console.print(figures_table(summary))
    console.print(
        f"{summary['status']} at {summary['samples_seen']:,.0f} samples after {format_duration(summary['total_s'])}, "
        f"{format_duration(summary['train_s'])} of it training\n"
        f"report: {config.folder / 'report.html'}",
        highlight=False,
        soft_wrap=True,
    )
    if summary["status"] == "stopped":
        console.print(f"go on with: sigray resume {config.storage_uri}", highlight=False, soft_wrap=True)
        return 130
    return 0


def _fail(error: BaseException, code: int) -> int:
    Console(stderr=True).print(f"sigray: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
    return code


def _parser(add_more: Callable[[Any], None]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sigray", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Any, help: str, group: Any = commands, examples: str | None = None
    ) -> argparse.ArgumentParser:
        added = group.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    def overrides(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="dotted overrides, as train.global_batch_size=512"
        )

    added = command("train", _train, "start a run from a YAML file")
    added.add_argument("config", metavar="CONFIG.yaml")
    overrides(added)
    added.add_argument("--overwrite", action="store_true", help="delete an earlier run of the same name first")

    added = command("resume", _resume, "go on with a run from its newest checkpoint")
    added.add_argument("run_folder", metavar="RUN", help="a run's folder, or its storage as s3://bucket/prefix/name")
    overrides(added)

    added = command("eval", _eval, "evaluate a checkpoint: zero-shot and retrieval, beside chance")
    added.add_argument(
        "run_folder", metavar="RUN_OR_CHECKPOINT", help="a run (its newest checkpoint), or RUN/checkpoints/step-..."
    )
    overrides(added)

    added = command(
        "export",
        _export,
        "write a checkpoint for open_clip or onnxruntime, with a model card",
        examples=_EXPORT_EXAMPLES,
    )
    added.add_argument("run_folder", metavar="RUN_OR_CHECKPOINT", help="a run (its newest checkpoint), or one of them")
    added.add_argument("--format", choices=["open_clip", "safetensors", "onnx"], default="open_clip")
    added.add_argument("--out", metavar="DIR", help="folder to make (default RUN_DIR/NAME/export/FORMAT)")
    added.add_argument("--overwrite", action="store_true", help="delete an earlier export first")

    added = command("report", _report, "write a run's report.html again")
    added.add_argument("run_folder", metavar="RUN")

    added = command(
        "embed", _embed, "compute a locked image tower's embeddings once, into a store", examples=_EMBED_EXAMPLES
    )
    added.add_argument("config", metavar="CONFIG.yaml")
    overrides(added)

    added = command("config", _config, "print a config with every default written out, or the JSON schema")
    added.add_argument("config", nargs="?", metavar="CONFIG.yaml")
    overrides(added)
    added.add_argument("--schema", action="store_true", help="the JSON schema, for completion in an editor")

    added = command(
        "plan",
        _plan,
        "predict memory, time, bytes on the wire and cost of a run",
        examples=_PLAN_EXAMPLES.format(devices=", ".join(DEVICES)),
    )
    added.add_argument("config", metavar="CONFIG.yaml")
    overrides(added)
    added.add_argument("--device", choices=[CPU, *DEVICES], metavar="NAME", help="default cluster.device")
    added.add_argument("--devices", type=_positive, metavar="N", help="how many (default those of the config)")
    added.add_argument("--price-per-hour", type=_positive_price, metavar="X", help="of one device")
    added.add_argument("--json", action="store_true", help="print the plan as JSON")

    added = command(
        "profile",
        _profile,
        "run some steps, and show where the time of one goes: table, picture, traces",
        examples=_PROFILE_EXAMPLES,
    )
    added.add_argument("config", metavar="CONFIG.yaml")
    overrides(added)
    added.add_argument("--steps", type=_positive, default=10, metavar="N", help="that are profiled (default 10)")
    added.add_argument("--warm-up", type=_positive, default=10, metavar="N", help="before them (default 10)")

    added = command(
        "chaos",
        _chaos,
        "break a run on purpose, again and again, and prove that it ends as if nothing had happened",
        examples=_CHAOS_EXAMPLES,
    )
    added.add_argument("config", metavar="CONFIG.yaml")
    overrides(added)
    added.add_argument("--out", metavar="DIR", help="folder of both runs (default RUN_DIR/NAME-chaos)")
    added.add_argument("--faults", type=_positive, default=20, metavar="N", help="how many (default 20)")
    added.add_argument("--seed", type=int, default=0, metavar="N", help="decides which and when (default 0)")
    added.add_argument(
        "--every-s", type=_positive_s, default=20.0, metavar="S", help="mean seconds between two faults (default 20)"
    )
    added.add_argument("--kinds", metavar="A,B", help="kinds of faults, separated by commas")
    added.add_argument(
        "--stuck-s", type=_positive_s, default=900.0, metavar="S", help="give up after S seconds without a step (900)"
    )

    cluster = commands.add_parser("cluster", help="check cluster files", description="Check cluster files.")
    cluster_kinds = cluster.add_subparsers(title="commands", metavar="COMMAND", required=True)
    added = command(
        "check",
        _cluster_check,
        "find what is wrong with cluster files, before anything is started",
        cluster_kinds,
        _CLUSTER_EXAMPLES,
    )
    added.add_argument("files", nargs="+", metavar="FILE")

    added = command(
        "submit", _submit, "run `sigray train` as a job on a cluster, and follow it", examples=_SUBMIT_EXAMPLES
    )
    added.usage = "sigray submit [--cluster FILE | --address URL] [options] -- train CONFIG.yaml [KEY=VALUE ...]"
    added.add_argument("words", nargs="*", metavar="-- train CONFIG.yaml", help="a `sigray train` command")
    _where(added)
    added.add_argument("--job", metavar="ID", help="the job's id (default the run's name and the time)")
    added.add_argument(
        "--env", action="append", default=[], metavar="NAME", help="a variable that the run gets from here"
    )
    added.add_argument("--no-follow", action="store_true", help="return as soon as the job is submitted")
    added.add_argument(
        "--pages",
        default=DEFAULT_PAGES,
        metavar="URL",
        help="where your browser finds the pages of runs, for the link at the job (default %(default)s)",
    )
    for name, run, help in (
        ("logs", _logs, "follow a job on a cluster from its beginning, as often as you like"),
        ("status", _status, "list the jobs of a cluster"),
        ("stop", _stop, "end a job with a last checkpoint"),
    ):
        added = command(name, run, help)
        if name != "status":
            added.add_argument("job", nargs=None if name == "stop" else "?", metavar="JOB", help="default the newest")
        _where(added)

    added = command(
        "monitor",
        _monitor,
        "run Prometheus with alerts on the head, and pictures for the Metrics page of Ray's dashboard",
        examples=_MONITOR_EXAMPLES,
    )
    added.add_argument("--session", default="/tmp/ray/session_latest", metavar="DIR", help="Ray's session folder")
    added.add_argument("--out", default="monitor", metavar="DIR", help="database and generated files (default monitor)")
    added.add_argument("--port", type=_positive, default=9090, metavar="N", help="of Prometheus (default 9090)")
    added.add_argument("--grafana-port", type=_positive, default=3000, metavar="N", help="default 3000")
    added.add_argument("--generate", action="store_true", help="write the alert rules and the dashboard, run nothing")
    added.add_argument(
        "--runs",
        action="append",
        dest="places",
        metavar="PLACE",
        help="a folder or s3://bucket/prefix of runs or sweeps that have pages, as of `sigray pages`; repeat it",
    )
    _pages_port(added)

    added = command("pages", _pages, "serve live pages of runs and sweeps", examples=_PAGES_EXAMPLES)
    added.add_argument(
        "places",
        nargs="*",
        metavar="PLACE",
        help="a folder or s3://bucket/prefix of runs or sweeps (default ~/sigray-runs, runs and sweeps)",
    )
    added.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default 127.0.0.1)")
    _pages_port(added)

    add_more(command)

    data = commands.add_parser("data", help="look at data, make data", description="Look at data, make data.")
    kinds = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    added = command(
        "inspect", _data_inspect, "print what shards hold and what is wrong with them", kinds, _INSPECT_EXAMPLES
    )
    added.usage = "sigray data inspect PATTERN... [data.KEY=VALUE ...] [--samples N | --all] [--sheet FILE.html]"
    # Under the name that also takes the words behind the options.
    added.add_argument(
        "overrides", nargs="+", metavar="PATTERN", help="shards, or a run's CONFIG.yaml; data.KEY=VALUE among them"
    )
    extent = added.add_mutually_exclusive_group()
    extent.add_argument("--samples", type=_positive, metavar="N", help="decode about N samples, however long it takes")
    extent.add_argument("--all", action="store_true", help="decode every sample, however long it takes")
    added.add_argument("--sheet", metavar="FILE.html", help="write a page with pictures and captions")

    added = command(
        "audit", _data_audit, "prove from a run's ledger that it used each sample once", kinds, _AUDIT_EXAMPLES
    )
    added.add_argument("run_folder", metavar="RUN", help="a run's folder, or its storage as s3://bucket/prefix/name")

    added = command(
        "tokenizer", _data_tokenizer, "train a tokenizer on the captions of shards", kinds, _TOKENIZER_EXAMPLES
    )
    added.add_argument("pattern", metavar="PATTERN", help="shards, or a run's CONFIG.yaml")
    added.add_argument("out", metavar="OUT.json")
    overrides(added)
    added.add_argument("--vocab-size", type=_positive, default=8192, metavar="N", help="tokens at most (default 8192)")
    added.add_argument("--kind", choices=["bpe", "unigram"], default="bpe", help="default bpe")
    added.add_argument("--keep-case", action="store_true", help="keep capitals; by default all is made lower case")
    return parser


def _where(added: argparse.ArgumentParser) -> None:
    where = added.add_mutually_exclusive_group()
    where.add_argument("--cluster", metavar="FILE", help="a `ray up` file: its head is reached by ssh")
    where.add_argument("--address", metavar="URL", help="of the dashboard (default http://127.0.0.1:8265)")


def _pages_port(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--pages-port", type=_positive, default=3001, metavar="N", help="of the pages of runs and sweeps (default 3001)"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _positive_price(text: str) -> float:
    price = float(text)
    if not 0 < price < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive price")
    return price


def _positive_s(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return seconds


class ProgressBars:
    """Calls of `progress(stage, done, total)` as rich bars, or as a line per stage where there is no terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=console) if console.is_terminal else None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> ProgressBars:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bars is None:
            if stage not in self._tasks:
                self._console.print(f"{stage}: {total:,} to do", highlight=False)
                self._tasks[stage] = None
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)
