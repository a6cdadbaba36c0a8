"""docs/config.md is what `python -m dev.config_md` writes, and explains every key."""

import re

from dev.config_md import PATH, text


def test_the_page_is_current():
    assert PATH.read_text(encoding="utf-8") == text(), "run python -m dev.config_md"


def test_every_key_has_a_sentence():
    rows = [line for line in text().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


def test_links_lead_to_a_heading():
    page = text()
    anchors = {re.sub("[^a-z_]", "", heading.lower()) for heading in re.findall(r"^##+ (.*)$", page, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]*)\)", page)) <= anchors
