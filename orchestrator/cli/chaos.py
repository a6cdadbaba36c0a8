"""`sigray chaos`."""

from argparse import Namespace

from rich.console import Console

from sigray.orchestrator.cli.command import CONFIG, OVERRIDES, argument, command, local, positive, positive_int, say


@command(
    CONFIG,
    OVERRIDES,
    argument("--out", type=local, metavar="DIR", help="folder of both runs (default RUN_DIR/NAME-chaos)"),
    argument("--faults", type=positive_int, default=20, metavar="N", help="number of faults (default 20)"),
    argument("--seed", type=int, default=0, metavar="N", help="seed of their kinds and times (default 0)"),
    argument("--every-s", type=positive, default=20.0, metavar="S", help="mean seconds between faults (default 20)"),
    argument("--kinds", metavar="A,B", help="kinds of faults, separated by commas"),
    argument("--stuck-s", type=positive, default=900, metavar="S", help="give up after S seconds without a step (900)"),
)
def chaos(options: Namespace, console: Console) -> None:
    """Kill parts of a run at random, and prove that its weights stay the same.

    examples:
      sigray chaos examples/emoji_cpu.yaml train.num_samples=100000
      sigray chaos run.yaml --kinds trainer,driver --faults 5 --every-s 60
      sigray chaos run.yaml --faults 200 --seed 1                   a soak test; the seed repeats its faults

    Runs the config twice on this machine, in a Ray of its own: once undisturbed (unless DIR has that run already), and
    once with faults at random times. If a driver ends, the same `sigray train` starts it again. The driver outlives
    `node` and `gcs` and starts another Ray. Then compares weights, optimizer state, losses and ledger. Kinds of faults;
    the default is all that are possible with the config:
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
    The faults hit only processes of these runs. DIR holds the runs, their output (undisturbed.log, disturbed.log) and
    chaos.json, which lists the faults.

    Exit codes: 0 both runs ended alike; 1 they differ, or the run did not reach its end; 2 the run cannot be started.
    """
    from sigray.orchestrator.chaos.chaos import chaos, result_table

    result = chaos(
        options.config,
        options.overrides,
        console,
        out=options.out,
        seed=options.seed,
        num_faults=options.faults,
        every_s=options.every_s,
        kinds=options.kinds.split(",") if options.kinds is not None else None,
        stuck_s=options.stuck_s,
    )
    console.print(result_table(result))
    if result.differences:
        raise RuntimeError(result.verdict)
    say(console, result.verdict)
