"""The word check of `make check`: each rule finds its line, and lets the plain one pass."""

from __future__ import annotations

import pytest

from dev.prose import check_python, check_references, check_text, files, markdown

LONG = "word " * 26


def rules(source: str) -> list[str]:
    return [problem.rule for problem in check_python("workers/example.py", source)]


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        ("words", '"""Return it to whoever asked."""\n'),
        ("words", "x = 1  # nobody reads it\n"),
        ("words", 'raise ValueError("there is room for one more worker at the most")\n'),
        ("words", 'def f():\n    """Do it.\n\n    Raises:\n        ValueError: where the batch is empty.\n    """\n'),
        ("sentence", f'"""Return it.\n\n{LONG}.\n"""\n'),
        ("sentence", f"x = 1  # {LONG}\n"),
        ("summary", f'"""{"a" * 81}"""\n'),
        ("summary", f'class A:\n    x: int = 1\n    """{"a" * 81}"""\n'),
        ("walrus", "if True:\n    raise ValueError(y := 2)\n"),
        ("walrus", "for x in (y := [1]):\n    pass\n"),
        ("tuple", "a, b = 1, f(2)\n"),
    ],
)
def test_each_rule_finds_its_line(rule, source):
    assert rule in rules(source)


@pytest.mark.parametrize(
    "source",
    [
        '"""Return the features, or None if there are none."""\n',
        f'"""Return it.\n\n{"word " * 25}.\n"""\n',
        f'"""{"a" * 80}"""\n',
        "a, b = f(1), f(2)\n",
        "a, b = b, a + b\n",
        "a, b = f(1)\n",
        "if (x := f(1)) is None:\n    pass\n",
    ],
)
def test_plain_lines_pass(source):
    assert rules(source) == []


def test_code_and_tables_of_markdown_are_not_prose():
    text = f"# Title\n\n```\n{LONG}\n```\n\n| {LONG} |\n\n- one\n- {LONG}.\n"
    paragraphs = list(markdown(text))
    assert [line for line, _ in paragraphs] == [9, 10]
    found = [problem for line, paragraph in paragraphs for problem in check_text("a.md", line, paragraph)]
    assert [(problem.rule, problem.line) for problem in found] == [("sentence", 10)]


def test_the_repository_is_checked():
    names = files()
    assert {"README.md", "workers/config.py", "cluster.yaml", "losses/fused.c"} <= set(names)
    assert not [name for name in names if name.startswith(("dev/log", "benchmarks/results", "src/sigray/losses"))]


def test_a_file_that_is_named_exists():
    text = "see docs/data.md, workers/*.py,\nand docs/no_such_page.md of runs/NAME/docs/other.md\n"
    assert [(problem.rule, problem.line) for problem in check_references("a.md", text)] == [("reference", 2)]
