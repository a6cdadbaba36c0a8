"""Build the emoji36 data set: `python -m examples.emoji36 OUT_DIR`.

Emoji in nine drawing sets with names in 36 languages, from npm packages; about a minute.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from examples.emoji36.build import build_emoji
from sigray.orchestrator.cli.command import progress_bars


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.emoji36", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    out_dir = parser.parse_args().out_dir
    console = Console()
    try:
        with progress_bars(console) as progress:
            dataset = build_emoji(out_dir, progress=progress)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2  # as `sigray`: 2 for the user's input
    except KeyboardInterrupt:
        return 130
    for split, counts in dataset["splits"].items():
        console.print(
            f"{split}: {counts['num_samples']:,} images of {counts['num_concepts']:,} concepts",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"ready: {out_dir.absolute()} (licences: dataset.json, examples/emoji36/README.md)", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
