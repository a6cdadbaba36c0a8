"""What the commands of `sigray` share: arguments, help, output."""

import contextlib
import inspect
import math
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from sigray.workers.urls import local_path

Run = Callable[[Namespace, Console], int | None]
JobOf = Callable[[Namespace], Any]  # returns a `Job` of orchestrator/cluster/jobs.py
Argument = Callable[[Any], object]  # adds an argument to a parser
Command = Callable[[Any], None]  # adds a parser to argparse's subparsers


def command(
    *arguments: Argument, name: str | None = None, usage: str | None = None, job: JobOf | None = None
) -> Callable[[Run], Command]:
    """Make a command of a function that returns the exit code, or None for 0.

    The function's docstring is the help: one sentence; then examples, what the command does, exit codes.

    Args:
        job: returns the command as a job, for `sigray submit`; it makes the command's own checks.
    """

    def decorate(run: Run) -> Command:
        def add_to(parsers: Any) -> None:
            summary, _, examples = inspect.cleandoc(run.__doc__ or "").partition("\n\n")
            parser: ArgumentParser = parsers.add_parser(
                name or run.__name__,
                help=summary[0].lower() + summary[1:].rstrip("."),
                description=summary,
                epilog=examples,
                usage=usage,
                formatter_class=RawDescriptionHelpFormatter,
            )
            for add in arguments:
                add(parser)
            parser.set_defaults(run=run, job_of=job)

        return add_to

    return decorate


def argument(*names: str, **settings: Any) -> Argument:
    """Return an argument; the settings are those of argparse's `add_argument`."""
    return lambda parser: parser.add_argument(*names, **settings)


def either(*arguments: Argument) -> Argument:
    """Return arguments that exclude each other."""

    def add(parser: ArgumentParser) -> None:
        group = parser.add_mutually_exclusive_group()
        for add_one in arguments:
            add_one(group)

    return add


def positive(text: str, kind: type = float) -> Any:
    """Return a positive, finite number; argparse prints the error."""
    try:
        number = kind(text)
    except ValueError:
        number = 0
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"{text} is not a positive {'integer' if kind is int else 'number'}")
    return number


positive_int = partial(positive, kind=int)


def local(text: str) -> Path:
    """Return a path on this machine; argparse prints that a URL is none."""
    try:
        local_path(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    return Path(text)


CONFIG = argument("config", metavar="CONFIG.yaml")
OVERRIDES = argument("overrides", nargs="*", metavar="KEY=VALUE", help="override keys: train.global_batch_size=512")
RUN = argument("run_folder", metavar="RUN", help="folder of a run, or its storage as s3://bucket/prefix/name")


def say(console: Console, *lines: object) -> None:
    """Print lines without line breaks."""
    console.print("\n".join(map(str, lines)), soft_wrap=True)


@contextlib.contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yield `progress(stage, done, total)`: bars, or lines without a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
                if not console.is_terminal:
                    say(console, f"{stage}: {total:,} to do")
            bars.update(tasks[stage], completed=done, total=total)

        yield progress
