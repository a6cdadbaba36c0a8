"""Foreign JSON and YAML: parse it, or raise one kind of error; write YAML.

Both parsers return plain values or raise `ParseError`, whatever the content; `as_type` makes records of the values. The
caller adds the name of the file and raises the error of its border: DataError, CheckpointError or ConfigError.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.cyaml import CParser  # type: ignore[attr-defined]
from yaml.resolver import Resolver

MAX_JSON_BYTES = 64 << 20  # an answer takes at most 21 times as much: `[[],[],...]`
_MAX_YAML_BYTES = 4 << 20
_MAX_YAML_DEPTH = 64
_MAX_YAML_NODES = 1_000_000  # after aliases are expanded
_MAX_DIGITS = 100
_BOM = b"\xef\xbb\xbf"
_BREAKS = re.compile("[\x85\u2028\u2029]")
_DIGITS = re.compile(r"0[0-9_]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
Count = Annotated[int, Field(ge=0, lt=2**63)]
Record = TypeVar("Record")
_KINDS = {"bool": "a truth value", "int": "a number", "float": "a number", "null": "null"}


class ParseError(ValueError):
    """Unusable content; the message is a short reason without the file's name."""


def parse_json(content: bytes | str | memoryview, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Return the value of a JSON text.

    The text is UTF-8, at most 200 levels deep, with integers of at most 4300 digits. NaN and Infinity are read: our
    metrics may hold them, and img2dataset writes them. A key that comes twice has its last value. Half of a surrogate
    pair is refused: nothing could encode the text again.

    Raises:
        ParseError: for any other content.
    """
    try:
        data = content.encode() if isinstance(content, str) else bytes(content)
    except UnicodeEncodeError:
        raise ParseError("not JSON: half of a surrogate pair, which UTF-8 cannot hold") from None
    if len(data) > max_bytes:
        raise ParseError(f"{len(data)} bytes of JSON, at most {max_bytes} are read")
    try:
        return from_json(data.removeprefix(_BOM), cache_strings="keys")
    except ValueError as error:
        raise ParseError(f"not JSON: {error}") from None


def as_type(kind: type[Record], content: Any) -> Record:
    """Return a parsed value as a dataclass, or a container of dataclasses.

    Unknown keys are ignored.

    Raises:
        ParseError: gives the first key of another type, and its value.
    """
    try:
        return _adapter(kind).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        key = ".".join(map(str, first["loc"]))
        found = f" (found {first['input']!r:.60})" if first["type"] != "missing" else ""
        raise ParseError(f"{f'{key}: ' if key else ''}{first['msg'].lower()}{found}") from None


_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)


def parse_yaml(content: bytes | str) -> Any:
    """Return the value of a YAML 1.1 text without ambiguous values.

    Values are null, truth values, numbers, texts, lists, and mappings with texts as keys; a date is a text. Refused are
    tags other than `!!str`, keys that come twice, and numbers that YAML 1.1 reads in base 8 or 60.

    Raises:
        ParseError: for any other content; gives line and remedy.
    """
    try:
        data = content.encode() if isinstance(content, str) else content
        data.decode()
    except UnicodeError:
        raise ParseError("not YAML: no UTF-8") from None
    if len(data) > _MAX_YAML_BYTES:
        raise ParseError(f"{len(data)} bytes of YAML, at most {_MAX_YAML_BYTES} are read")
    data = data.removeprefix(_BOM)
    try:
        return _Loader(data).get_single_data()
    except yaml.MarkedYAMLError as error:
        reason = ": ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        if mark is None:
            raise ParseError(f"not YAML: {reason}") from None
        hint = ": indent with spaces" if data.decode()[mark.index : mark.index + 1] == "\t" else ""
        raise ParseError(f"not YAML: {reason}, line {mark.line + 1}, column {mark.column + 1}{hint}") from None
    except yaml.reader.ReaderError as error:
        raise ParseError(
            f"not YAML: character U+{int(error.character):04X} at position {error.position} is not allowed"
        ) from None


def dump_yaml(value: Any) -> str:
    """Return a YAML text that `parse_yaml` reads as this value, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Escape what libyaml reads as a line break and returns as a space: U+0085."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _BREAKS.search(text) else None)


_Dumper.add_representer(str, _quoted)


class _Loader(Composer, CParser, SafeConstructor, Resolver):
    """CSafeLoader with bounds, without tags and ambiguous numbers.

    libyaml gives the events, at ten times the speed of PyYAML's own scanner. PyYAML's composer recurses, so the bounds
    stand there.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":value"))]
        for first, resolvers in Resolver.yaml_implicit_resolvers.items()
    }

    def __init__(self, content: bytes) -> None:
        CParser.__init__(self, content)
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)
        self._depth = 0
        self._num_nodes: dict[int, int] = {}  # by id of the composed node: itself and below, aliases expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # its type in the stubs has neither mark nor tag
        line = event.start_mark.line + 1
        if self._depth == _MAX_YAML_DEPTH:
            raise ParseError(f"line {line}: more than {_MAX_YAML_DEPTH} levels deep")
        if not isinstance(event, yaml.AliasEvent) and event.tag not in (None, "!", "tag:yaml.org,2002:str"):
            raise ParseError(f"line {line}: the tag {event.tag!r} is refused: plain values expected")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._num_nodes:
                raise ParseError(f"line {line}: *{event.anchor} stands inside of &{event.anchor}")
            return node
        num_nodes = 1
        if isinstance(node, yaml.ScalarNode):
            _check_number(node.value, node.tag.rpartition(":")[2], line)
        elif isinstance(node, yaml.SequenceNode):
            num_nodes += sum(self._num_nodes[id(each)] for each in node.value)
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
            num_nodes += sum(self._num_nodes[id(key)] + self._num_nodes[id(value)] for key, value in node.value)
        if num_nodes > _MAX_YAML_NODES:
            raise ParseError(f"line {line}: aliases expand to more than {_MAX_YAML_NODES} values")
        self._num_nodes[id(node)] = num_nodes
        return node


def _check_number(text: str, kind: str, line: int) -> None:
    if kind not in ("int", "float"):
        return
    if len(text) > _MAX_DIGITS:
        raise ParseError(f"line {line}: a number of {len(text)} digits, at most {_MAX_DIGITS} are read")
    if _SEXAGESIMAL.fullmatch(text):
        raise ParseError(f"line {line}: {text} is a number in base 60 to YAML 1.1: for the text, write '{text}'")
    digits = text.lstrip("+-")
    if kind == "int" and _DIGITS.fullmatch(digits):
        plain = digits.replace("_", "").lstrip("0") or "0"
        raise ParseError(f"line {line}: {text} is in base 8 to YAML 1.1: write {plain}, or '{text}' for the text")
    if kind == "int" and not re.search("[0-9a-fA-F]", digits.removeprefix("0x").removeprefix("0b")):  # 0x_
        raise ParseError(f"line {line}: {text} is no number: for the text, write '{text}'")


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        kind = key.tag.rpartition(":")[2]
        if kind == "merge":
            continue
        if not isinstance(key, yaml.ScalarNode):
            raise ParseError(f"line {line}: the key is a list or mapping: a text expected")
        if kind != "str":
            raise ParseError(f"line {line}: the key {key.value!r} is {_KINDS[kind]} to YAML: write it in quotes")
        if key.value in lines:
            raise ParseError(f"line {line}: the key {key.value!r} comes twice, first in line {lines[key.value]}")
        lines[key.value] = line
