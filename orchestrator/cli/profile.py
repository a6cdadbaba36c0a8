"""`sigray profile`."""

from argparse import Namespace
from dataclasses import replace

from rich.console import Console

from sigray.orchestrator.cli.command import CONFIG, OVERRIDES, argument, command, positive_int, say
from sigray.orchestrator.cluster.jobs import Job, config_job
from sigray.orchestrator.config import load_config


def _profile_job(options: Namespace) -> Job:
    job, config = config_job("profile", options, ["--steps", str(options.steps), "--warm-up", str(options.warm_up)])
    from sigray.orchestrator.run.profile import profile_config
    from sigray.workers.training.profile import FOLDER, Profile

    config = profile_config(config, Profile(options.warm_up, options.steps))
    name = config.run.name
    result = ["fetch", f"{config.storage_uri}/{FOLDER}", f"{name}-traces"]
    return replace(job, name=name, page=f"/runs/{name}", storage=config.storage_uri, result=result)


@command(
    CONFIG,
    OVERRIDES,
    argument("--steps", type=positive_int, default=10, metavar="N", help="profiled steps (default 10)"),
    argument("--warm-up", type=positive_int, default=10, metavar="N", help="steps before them (default 10)"),
    job=_profile_job,
)
def profile(options: Namespace, console: Console) -> None:
    """Run some steps and show the time of each part: table, picture, traces.

    examples:
      sigray profile examples/emoji_cpu.yaml
      sigray profile my_run.yaml --steps 20 train.micro_batch_size=256
      sigray profile my_run.yaml --warm-up 20 cluster.num_workers=4

    Trains with the workers and data of the config, under the name NAME-profile: warm-up steps, the profiled steps, and
    one step with a checkpoint, which is deleted at the end. Prints the time of each part of a step, and writes into the
    run's folder and storage:
      profile/step.png                a bar for each rank
      profile/rank-0000.json.gz       each rank's trace, for ui.perfetto.dev or chrome://tracing
      profile/rank-0000-steps.json    the parts of each step in seconds, from that trace
      profile/rank-0000-xla.txt       torch-xla's counters, under torch-xla
      profile/ray_timeline.json       the data-shard workers' tasks, for ui.perfetto.dev (in a Ray of the run's own)

    Parts: data wait; to device; forward; loss: tiles, and loss: ring (waiting for other ranks); backward; gradient
    all-reduce; optimizer; metrics (every train.log_every_steps steps); checkpoint; other. On CUDA the host waits at the
    end of each part, so nothing overlaps and a profiled step takes longer; sigray prints both times. Under torch-xla a
    step is one program, whose parts cannot be measured ("device program").

    Exit codes: those of `sigray train`.
    """
    config = load_config(options.config, options.overrides)
    from sigray.orchestrator.run.profile import profile_run, remarks, table
    from sigray.workers.training.profile import Profile

    split, folder = profile_run(config, Profile(options.warm_up, options.steps), console)
    console.print(table(split))
    say(console, *remarks(split, config), f"picture and traces: {folder}")
