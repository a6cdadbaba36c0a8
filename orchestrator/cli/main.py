"""The command line: build the parser, run a command, turn errors into exit codes.

A command is a function in a file of this folder; its docstring is its help. A command imports torch and Ray inside the
function, so that `--help` and a config error answer at once.
"""

import errno
import os
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import Any

from sigray.orchestrator.cli.chaos import chaos
from sigray.orchestrator.cli.checkpoint import evaluate, export, fetch
from sigray.orchestrator.cli.cluster import check, logs, status, stop, submit
from sigray.orchestrator.cli.command import Command, say
from sigray.orchestrator.cli.data import audit, inspect, tokenizer
from sigray.orchestrator.cli.pages import monitor, pages, report
from sigray.orchestrator.cli.plan import config, plan
from sigray.orchestrator.cli.profile import profile
from sigray.orchestrator.cli.train import embed, resume, track, train
from sigray.orchestrator.cluster.jobs import RESULT
from sigray.orchestrator.plain_console import PlainConsole
from sigray.orchestrator.run.signals import interrupt, on_stop_signal

_DESCRIPTION = """\
Train SigLIP-style image-text models from WebDataset tars on a Ray cluster.

  python -m examples.emoji36 data/emoji36         build a small real data set (1 minute)
  sigray train examples/emoji_cpu.yaml            train, evaluate, write the page runs/emoji_cpu/report.html
  sigray train examples/emoji_cpu.yaml train.global_batch_size=512 run.name=big
                                                  override any key of the YAML: section.key=value
  sigray resume runs/emoji_cpu                    continue from the newest checkpoint
  sigray eval runs/emoji_cpu                      evaluate the newest checkpoint again
  sigray export runs/emoji_cpu                    write the newest checkpoint for open_clip

`sigray COMMAND --help` has examples. docs/tutorial.md leads from your tars to an exported model.
"""
_EPILOG = """\
Exit codes: 0 done; 1 the run failed; 2 the command, config, data or storage cannot be used; 130 interrupted
(a checkpoint was written; `sigray resume` continues).
"""
# ValueError and OSError: the user's config, data or storage. RuntimeError: a missing tool, a failed run.
EXIT_CODES: dict[type[BaseException], int] = {ValueError: 2, OSError: 2, RuntimeError: 1, KeyboardInterrupt: 130}
COMMANDS = [train, resume, track, evaluate, export, fetch, report, embed, config, plan, profile, chaos]
CLUSTER_COMMANDS = [submit, logs, status, stop, monitor, pages]
GROUPS = {
    "cluster": ([check], "Check cluster files."),
    "data": ([inspect, audit, tokenizer], "Look at data, prove how a run used data, train a tokenizer."),
}


def main(
    arguments: Sequence[str] | None = None, more: Sequence[Command] = (), more_pages: Callable[[], list[Any]] = list
) -> int:
    """Run a command and return the exit code.

    `tuning/cli.py` is the entry point of `sigray`: it calls this function and adds `sweep`.

    Args:
        arguments: of the command line; None: those of this process.
        more: further commands.
        more_pages: returns the kinds of live pages besides those of runs.
    """
    parser = _parser([*COMMANDS, *CLUSTER_COMMANDS, *more])

    def parse(words: Sequence[str] | None) -> Namespace:
        # argparse ends a list of overrides at the first option, but `train x.yaml --overwrite run.name=a` works too.
        options, rest = parser.parse_known_args(words, Namespace(more_pages=more_pages, parse=parse))
        if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "overrides")):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            options.overrides += rest
        return options

    options = parse(arguments)
    try:
        with on_stop_signal(interrupt):  # SIGTERM and SIGHUP end a command as Ctrl-C does
            code = options.run(options, PlainConsole()) or 0
        if code == 0 and RESULT in os.environ:
            say(PlainConsole(), f"use the result: {os.environ[RESULT]}")
        return code
    except tuple(EXIT_CODES) as error:  # a message, no traceback
        message = str(error) or ("interrupted" if isinstance(error, KeyboardInterrupt) else "")
        if {getattr(each, "errno", None) for each in (error, error.__cause__)} & {errno.ENOSPC, errno.EDQUOT}:
            message += ": free space there, or choose another place by run.dir, run.storage, TMPDIR or RAY_TMPDIR"
        PlainConsole(stderr=True).print(f"sigray: {message}", style="red", soft_wrap=True)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


def _parser(commands: Sequence[Command]) -> ArgumentParser:
    parser = ArgumentParser(
        prog="sigray", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=RawDescriptionHelpFormatter
    )
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in commands:
        command(parsers)
    for group, (members, help) in GROUPS.items():
        added = parsers.add_parser(group, help=help[0].lower() + help[1:-1], description=help)
        subparsers = added.add_subparsers(title="commands", metavar="COMMAND", required=True)
        for command in members:
            command(subparsers)
    return parser
