"""Check the words of the repository: `python -m dev.prose [PATH ...]`, part of `make check`.

What a program can see of the rules for prose in CONTRIBUTING.md:

    words      phrases that the field does not use, and what to write instead (`PHRASES`)
    sentence   at most 25 words
    summary    a docstring's first line has at most 80 characters
    walrus     no `:=` in a `for` or `raise`
    tuple      several values are assigned at once only if they are of one form, as in `a, b = f(x), f(y)`, or swapped
    reference  every file of the repository that a text names exists

Text means: Markdown outside code blocks and tables, docstrings, comments, and the strings of messages. `dev/log.md`
is a diary and stays as it was written.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_WORDS = 25
MAX_SUMMARY = 80
CODE = ("native", "losses", "workers", "orchestrator", "tuning", "src")  # where every rule holds
SKIPPED = ("dev/log.md", "dev/prose.py", "tests/test_prose.py", "benchmarks/results/")

# Regular expression (whole words, any case) -> what to write instead.
PHRASES = {
    r"whoever|whomever|whatever else|who is told|what is told": "name the actor",
    r"asks? ahead|asked(?: for)? ahead|asking ahead": "prefetch",
    r"the late one|late ones?": "straggler",
    r"reads? along|reading along|read-along": "subscribe, subscriber",
    r"hunger|hungry|starved": "waits for data",
    r"at the most": "at most",
    r"at the least": "at least",
    r"(?<!fall )(?<!falls )(?<!lag )(?<!lags )behind(?! a proxy| a bastion)": "after",
    r"(?<=[:;,] )where (?:the|a|an|it|they|there|this|that|no|nothing|one|some|any|open_clip|shards)": "if, when",
    r"(?:None|True|False|Empty|0) where|where there (?:is|are)|where it (?:can|does|has|is)|where they are": "if, when",
    r"of \w+(?: \w+)? there (?:is|are) as many": "no inversion",
    r"there is room|has room|is there room|no room|room for": "capacity, free resources",
    r"was heard|is heard|heard of|hears? of|been heard": "no heartbeat",
    r"seats?": "slot",
    r"anew": "again",
    r"leave (?:its|their) places?": "release its resources",
    r"so much the|the more so|hence no": "say it plainly",
    r"as long as it takes": "until it is done",
    r"by turns|in turns": "alternating",
    r"of a sort|in a word": "leave it out",
    r"nobody|somebody|anybody": "name the actor",
    r"goes? its way|goes? round|on the way(?= to)|on their way": "say what happens",
    r"lives? on\b(?! one| a| the)": "continues",
    r"a life|in an earlier life|one life|each life": "attempt",
    r"mends?|mended|mending": "repair, retry, fix",
    r"the asker|askers?": "caller",
    r"is certain to be": "is always",
    r"FACTS": "a file of the repository",
}

_FILE = re.compile(
    r"(?<![\w/.{*-])(?:native|losses|workers|orchestrator|tuning|src|tests|benchmarks|docs|dev|examples|clusters)/"
    r"[\w./-]+\.(?:py|md|yaml|toml|c|h|j2|css|js|json|sh|png)\b"
)


@dataclass(frozen=True)
class Problem:
    path: str
    line: int
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.text}"


def markdown(text: str) -> Iterator[tuple[int, str]]:
    """Yield the paragraphs of a Markdown text with their first lines; no code, tables or headings."""
    in_code, begin = False, 0
    paragraph: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        stripped = line.strip()
        if stripped.startswith("```"):
            in_code = not in_code
        ends = in_code or not stripped or stripped.startswith(("```", "|", "#", "<", "!["))
        starts_item = re.match(r"([-*]|\d+\.) ", stripped)
        if (ends or starts_item) and paragraph:
            yield begin, " ".join(paragraph)
            paragraph = []
        if not ends and not line.startswith("    "):
            begin = begin if paragraph else number
            paragraph.append(re.sub(r"^([-*]|\d+\.) ", "", stripped))


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield each docstring with its line, those below attributes included."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield the comments of Python source; lines of comment that follow each other are one."""
    begin, words, previous = 0, [], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or "----" in token.string or token.string.startswith("#!"):
            continue
        text = token.string.lstrip("# ").strip()
        alone = token.line.strip().startswith("#")
        if words and alone and token.start[0] == previous + 1:
            words.append(text)
        else:
            if words:
                yield begin, " ".join(words)
            begin, words = token.start[0], [text]
        previous = token.start[0] if alone else -1
    if words:
        yield begin, " ".join(words)


def messages(tree: ast.Module, own: set[int]) -> Iterator[tuple[int, str]]:
    """Yield strings of several words: messages, help texts, report texts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.lineno not in own:
            text = node.value
        else:
            continue
        if text.count(" ") >= 3:
            yield node.lineno, text


def sentences(text: str) -> Iterator[str]:
    """Split a paragraph into sentences; what is in brackets or code counts as one word."""
    text = re.sub(r"`[^`]*`|\[([^\]]*)\]\([^)]*\)|https?://\S+", lambda found: found.group(1) or "X", text)
    text = re.sub(r"\([^()]*\)", "", text)
    yield from re.split(r"(?<=[.!?:;])\s+", text)


def check_references(path: str, text: str, begin: int = 1) -> Iterator[Problem]:
    for number, line in enumerate(text.splitlines(), begin):
        for name in _FILE.findall(line):
            if not Path(name).exists():
                yield Problem(path, number, "reference", f"{name} is not there")


def check_text(path: str, line: int, text: str, *, is_prose: bool = True) -> Iterator[Problem]:
    for phrase, instead in PHRASES.items():
        for found in re.finditer(rf"\b(?:{phrase})\b", text, 0 if phrase.isupper() else re.IGNORECASE):
            at = line + text.count("\n", 0, found.start())
            yield Problem(path, at, "words", f"{found.group(0)!r}: {instead}")
    if is_prose:
        for paragraph in re.split(r"\n\s*\n|\n\s*(?:[-*] |\w[\w, ]*: )", text):
            if re.search(r"\S {3,}\S", paragraph):  # a table
                continue
            for sentence in sentences(" ".join(paragraph.split())):
                if (count := len(re.findall(r"[A-Za-z][\w'-]*", sentence))) > MAX_WORDS:
                    yield Problem(path, line, "sentence", f"{count} words: {sentence[:70]}...")


def check_python(path: str, source: str) -> Iterator[Problem]:
    tree = ast.parse(source)
    is_code = path.startswith(CODE)
    own: set[int] = set()
    for line, text in docstrings(tree):
        own.add(line)
        yield from check_references(path, text, line)
        yield from check_text(path, line, text, is_prose=is_code)
        summary = text.strip().split("\n")[0]
        if is_code and len(summary) > MAX_SUMMARY:
            yield Problem(path, line, "summary", f"{len(summary)} characters: {summary[:60]}...")
    for line, text in comments(source):
        yield from check_references(path, text, line)
        yield from check_text(path, line, text, is_prose=is_code)
    if is_code:
        for line, text in messages(tree, own):
            yield from check_references(path, text, line)
            yield from check_text(path, line, text, is_prose=False)
        yield from check_syntax(path, tree)


def check_syntax(path: str, tree: ast.Module) -> Iterator[Problem]:
    for node in ast.walk(tree):
        header = node.iter if isinstance(node, ast.For) else node if isinstance(node, ast.Raise) else None
        if header is not None and any(isinstance(part, ast.NamedExpr) for part in ast.walk(header)):
            yield Problem(path, node.lineno, "walrus", "assign on a line of its own")
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and not (is_swap(target, node.value) or is_one_form(node.value)):
                    yield Problem(path, node.lineno, "tuple", ast.unparse(node)[:70])


def is_swap(target: ast.Tuple, value: ast.Tuple) -> bool:
    """Whether the values read what is assigned."""
    return bool({ast.unparse(item) for item in target.elts} & {ast.unparse(item) for item in ast.walk(value)})


def is_one_form(value: ast.Tuple) -> bool:
    """Whether the values are the same expression of other names."""
    return len({tuple(type(part) for part in ast.walk(item)) for item in value.elts}) == 1


def check(path: str) -> list[Problem]:
    source = Path(path).read_text(encoding="utf-8")
    if path.endswith(".py"):
        return list(check_python(path, source))
    references = list(check_references(path, source))
    if path.endswith(".md"):
        return references + [problem for line, text in markdown(source) for problem in check_text(path, line, text)]
    return references + [
        problem
        for number, line in enumerate(source.splitlines(), 1)
        for problem in check_text(path, number, line, is_prose=False)
    ]


def files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    kinds = (".py", ".md", ".j2", ".yaml", ".c", ".h", ".js", ".sh")
    return [
        name
        for name in listed
        if name.endswith(kinds)
        and not name.startswith(SKIPPED)
        and Path(name).is_file()
        and not Path(name).is_symlink()
    ]


def main(paths: list[str]) -> int:
    chosen = [name for name in files() if not paths or name.startswith(tuple(paths))]
    problems = [problem for name in chosen for problem in check(name)]
    print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
