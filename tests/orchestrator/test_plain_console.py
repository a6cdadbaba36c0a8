"""Names and texts of data reach the terminal as they are: no markup, no emoji, no control characters."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sigray.orchestrator import run_folder
from sigray.orchestrator.cli.command import progress_bars, say
from sigray.orchestrator.cli.main import main
from sigray.orchestrator.plain_console import PlainConsole
from sigray.orchestrator.run.progress import Display
from sigray.orchestrator.tables import rows_table

NAMES = ["x:smile:/a.tar", "w[/x]", "[red]a.tar", "[link=file:///etc/passwd]a", "12 'a' 0x1f :warning:"]
CONTROLS = "a\x1b[2J\x1b]0;title\x07b\x9b31m\x08\x7f\u202eratc"


def shown(draw, **settings) -> str:
    out = io.StringIO()
    draw(PlainConsole(file=out, width=200, **settings))
    return out.getvalue()


def table(name: str) -> Table:
    made = Table(name, title=name)
    made.add_row(name)
    return made


def bars(name: str, console: Console) -> None:
    with progress_bars(console) as progress:
        progress(name, 1, 2)


def start(name: str, console: Console) -> None:
    facts = {"parameters_m": {"all": 1, "visual": 1, "text": 1}, "global_batch_size": 8, "batch_per_worker": 8}
    facts |= {"world_size": 1, "micro_batch_size": 8, "device": name, "epochs": 1.0, "first_step": 0, "num_steps": 2}
    facts |= {"weight_decay": "on matrices"}
    display = Display(console)
    display.start(name, facts, {"samples": 8, "shards": 1, "bytes": 8})
    display.close()


WAYS = {
    "text": lambda name, console: console.print(name),
    "Text": lambda name, console: console.print(Text(name)),
    "say": lambda name, console: say(console, name),
    "table": lambda name, console: console.print(table(name)),
    "rows": lambda name, console: console.print(rows_table([(name, name)])),
    "bars": bars,
    "display": lambda name, console: Display(console).say(name),
    "start": start,
}


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_name_is_shown_as_it_is(way, is_terminal) -> None:
    for name in NAMES:
        assert name in shown(lambda console, name=name: WAYS[way](name, console), force_terminal=is_terminal)


@pytest.mark.parametrize("way", WAYS)
def test_control_characters_do_not_reach_the_terminal(way) -> None:
    text = shown(lambda console: WAYS[way](CONTROLS, console), force_terminal=True)
    # What is left are rich's own sequences: styles, and the cursor of the bars.
    left = re.sub(r"\x1b\[(\?25[lh]|[0-9;]*[mKAG])|\r", "", text)
    assert "[2J" in left
    assert all(character.isprintable() or character == "\n" for character in left)


def test_a_callers_console_shows_messages_as_they_are() -> None:
    out = io.StringIO()
    Display(Console(file=out, width=200)).say(" ".join(NAMES))
    assert " ".join(NAMES) in out.getvalue()


def test_an_error_shows_the_name_as_it_is(capsys) -> None:
    assert main(["train", "w[/x]:smile:\x1b[2J.yaml"]) == 2
    assert "sigray: w[/x]:smile:␛[2J.yaml: no such file or directory" in capsys.readouterr().err


def test_no_other_console_is_made() -> None:
    root = Path(run_folder.__file__).resolve().parents[1]
    files = [file for folder in ("orchestrator", "tuning") for file in (root / folder).rglob("*.py")]
    assert len(files) > 50
    assert [file.name for file in files if re.search(r"\bConsole\(", file.read_text())] == []
