"""Each `sigray` command in the docs has options that exist, and the tutorial's config loads."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from sigray.orchestrator.cli.main import CLUSTER_COMMANDS, COMMANDS, _parser
from sigray.orchestrator.config import parse_config
from sigray.tuning.cli import sweep

PAGES = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Return the lines of code blocks that begin with `sigray`, without comments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [
        line for language, block in blocks if not language for line in block.splitlines() if line.startswith("sigray ")
    ]
    return [re.sub(r"\s+#.*", "", line) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_parse(page):
    parser = _parser([*COMMANDS, *CLUSTER_COMMANDS, sweep])
    for line in commands(page):
        words = shlex.split(line.partition(" > ")[0])[1:]
        if words == ["--help"]:
            continue
        _, rest = parser.parse_known_args(words)
        assert all("=" in word and not word.startswith("-") for word in rest), line


def test_the_pages_have_commands():
    assert sum(len(commands(page)) for page in PAGES) > 30


def test_the_tutorials_config_loads():
    block = re.search(r"^```yaml\n(run:.*?)^```", Path("docs/tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    assert parse_config(yaml.safe_load(block.group(1)), "tutorial").run.name == "my_run"


def test_the_config_of_the_fine_tuning_page_is_the_example():
    block = re.search(r"^```yaml\n(run:.*?)^```", Path("docs/fine_tuning.md").read_text(), re.MULTILINE | re.DOTALL)
    assert Path("examples/emoji_finetune.yaml").read_text().endswith(f"\n{block.group(1)}")
