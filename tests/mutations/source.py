"""Find a fault's function in a tree and change it. Faults name symbols, since lines move."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.mutations.fault import AnyFault, Fault, name_of

MAX_FAULTS_PER_FUNCTION = 3


class BadFaultError(ValueError):
    """A fault that cannot be put into the tree as it is written."""


def check(tree: Path, faults: Sequence[AnyFault]) -> list[str]:
    """Return a line for each fault that cannot be put into the tree as it is written."""
    problems = []
    for fault in faults:
        try:
            changed(tree, fault)
        except BadFaultError as error:
            problems.append(str(error))
        if not fault.tests:
            problems.append(f"{name_of(fault)}: {fault.says}: names no test")
    symbols = Counter(fault.symbol for fault in faults if isinstance(fault, Fault))
    for symbol, count in symbols.items():
        if count > MAX_FAULTS_PER_FUNCTION:
            problems.append(f"{symbol}: {count} faults, at most {MAX_FAULTS_PER_FUNCTION} may be in one function")
    for twice, count in Counter((name_of(fault), fault.says) for fault in faults).items():
        if count > 1:
            problems.append(f"{twice[0]}: {twice[1]}: is there {count} times")
    return problems


def changed(tree: Path, fault: AnyFault) -> tuple[Path, str]:
    """Return the fault's file, relative to the tree, and its text with the fault.

    Raises:
        BadFaultError: the symbol is not there, or `old` is not exactly once in it, or the result is no Python.
    """
    if isinstance(fault, Fault):
        return _replaced(tree, fault)
    _check_python(fault.append, fault)
    return Path(fault.file), f"{_read(tree, Path(fault.file), fault)}\n{fault.append}\n"


def _check_python(text: str, fault: AnyFault) -> None:
    """Parse the changed part only: parsing whole files for all faults takes seconds."""
    text = text.strip("\n")
    try:
        ast.parse(f"if True:\n{text}" if text[:1].isspace() else text)
    except SyntaxError as error:
        raise BadFaultError(f"{name_of(fault)}: {fault.says}: the result is no Python: {error}") from error


def _replaced(tree: Path, fault: Fault) -> tuple[Path, str]:
    where, _, symbol = fault.symbol.partition(":")
    is_c = where.endswith((".c", ".h"))
    path = Path(where) if is_c else Path(*where.removeprefix("sigray.").split("."))
    if not is_c:
        path = path / "__init__.py" if (tree / path).is_dir() else path.with_suffix(".py")
    text = _read(tree, path, fault)
    span = _c_span(text, symbol) if is_c else _python_span(text, symbol.split("."))
    if span is None:
        raise BadFaultError(f"{fault.symbol}: {fault.says}: {path} has no such symbol")
    function = text[span[0] : span[1]]
    if (count := function.count(fault.old)) != 1:
        raise BadFaultError(f"{fault.symbol}: {fault.says}: its text is there {count} times, not once: {fault.old!r}")
    if fault.old == fault.new:
        raise BadFaultError(f"{fault.symbol}: {fault.says}: changes nothing")
    function = function.replace(fault.old, fault.new)
    if not is_c:
        _check_python(function, fault)
    return path, text[: span[0]] + function + text[span[1] :]


def _read(tree: Path, path: Path, fault: AnyFault) -> str:
    try:
        return (tree / path).read_text()
    except OSError as error:
        raise BadFaultError(f"{name_of(fault)}: {fault.says}: {error}") from error


def _python_span(text: str, names: Sequence[str]) -> tuple[int, int] | None:
    """Return begin and end of the symbol in the text, decorators included; None if it is missing."""
    found: ast.AST = _parsed(text)
    for name in names:
        inside = [node for node in _statements(found) if name in _names_of(node)]
        if not inside:
            return None
        found = inside[-1]  # the last definition counts, as in Python
    first, last = getattr(found, "lineno", 1), getattr(found, "end_lineno", None)
    first = min([first, *(decorator.lineno for decorator in getattr(found, "decorator_list", ()))])
    lines = text.splitlines(keepends=True)
    return len("".join(lines[: first - 1])), len("".join(lines[:last]))


_parsed = functools.lru_cache(maxsize=256)(ast.parse)


def _statements(node: ast.AST) -> Iterable[ast.stmt]:
    """Yield the statements of a body and of its `if`, `with` and `try`, but not of inner functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from _statements(child)


def _names_of(node: ast.stmt) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def _c_span(text: str, name: str) -> tuple[int, int] | None:
    """Return begin and end of a C function or of a macro; None if it is missing."""
    if macro := re.search(rf"^#define {name}\b(.*\\\n)*.*\n", text, re.MULTILINE):
        return macro.span()
    start = re.search(rf"^[a-z][^;{{}}\n]*\b{name}\([^;{{}}]*\)\s*\{{", text, re.MULTILINE)
    if start is None:
        return None
    depth, end = 1, start.end()
    while depth and end < len(text):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return start.start(), end
