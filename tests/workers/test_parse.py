"""Foreign JSON and YAML: a plain value or ParseError, whatever the content."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sigray.workers.parse import ParseError, dump_yaml, parse_json, parse_yaml

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=5), values, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_json_is_read_as_json_loads_reads_it(value) -> None:
    text = json.dumps(value)
    assert parse_json(text) == parse_json(text.encode()) == parse_json(memoryview(text.encode())) == json.loads(text)


@given(st.text(max_size=40) | st.binary(max_size=40) | st.text('[]{}",:0123eE-+.\\uduN', max_size=30))
def test_json_raises_nothing_else(content) -> None:
    with contextlib.suppress(ParseError):
        parse_json(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe{\x00}\x00", "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        ("[" * 1_000_000, "recursion limit exceeded"),
        ('{"a":' * 300 + "1" + "}" * 300, "recursion limit exceeded"),
        ("1" * 5000, "number out of range"),
        ('"\\ud83d"', "hex escape"),
        ('"\ud83d"', "surrogate"),
        ("", "EOF"),
        ('{"a": 1} {', "trailing"),
    ],
)
def test_json_is_refused_with_a_reason(content, reason) -> None:
    with pytest.raises(ParseError, match=reason):
        parse_json(content)


def test_json_is_bounded_and_holds_nan() -> None:
    with pytest.raises(ParseError, match="12 bytes of JSON, at most 11 are read"):
        parse_json('"0123456789"', max_bytes=11)
    assert math.isnan(parse_json("NaN"))
    assert parse_json(b"\xef\xbb\xbf{}") == {}


@example("a\x85b\u2028c\u2029")
@given(VALUES)
def test_yaml_is_read_back_as_it_was_written(value) -> None:
    assert parse_yaml(dump_yaml(value)) == value


@given(
    st.text(max_size=40)
    | st.binary(max_size=40)
    | st.text("01x_b-+.:e9", min_size=1, max_size=6)
    | st.text("&*ab[]{}:,!-? \n\t'\"<#%", max_size=40)
)
def test_yaml_raises_nothing_else(content) -> None:
    with contextlib.suppress(ParseError):
        parse_yaml(content)


def bomb(line: str) -> str:
    return "a0: &a0 {x: 1}\n" + "".join(
        f"a{step}: &a{step} " + line % ",".join([f"*a{step - 1}"] * 10) + "\n" for step in range(1, 12)
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' comes twice, first in line 1"),
        ("a: {b: 1, 'b': 2}", "line 1: the key 'b' comes twice"),
        ("a: 010000", "line 1: 010000 is in base 8 to YAML 1.1: write 10000, or '010000' for the text"),
        ("a: -0_7", "base 8"),
        ("a: 1:30", "line 1: 1:30 is a number in base 60 to YAML 1.1: for the text, write '1:30'"),
        ("a: 1:30.5", "base 60"),
        ("a: 0x_", "0x_ is no number"),
        ("a: " + "1" * 5000, "a number of 5000 digits"),
        ("a: 0x" + "1" * 5000, "a number of 5002 digits"),
        ("1: a", "line 1: the key '1' is a number to YAML: write it in quotes"),
        ("on: a", "the key 'on' is a truth value to YAML"),
        ("? [a]\n: 1", "the key is a list or mapping"),
        ("a: &x [*x]", r"line 1: \*x stands inside of &x"),
        (bomb("[%s]"), "aliases expand to more than"),
        (bomb("{<<: [%s]}"), "aliases expand to more than"),
        ("!!python/object/apply:os.system ['true']", "python/object/apply:os.system' is refused"),
        ("a: !!binary aGFsbG8=", "binary' is refused"),
        ("a: 1\n---\nb: 1", "expected a single document in the stream"),
        ("a:\n\t- b", "line 2, column 1: indent with spaces"),
        ("a: \x00", r"character U\+0000"),
        ('a: "\\ud83d"', "line 1"),
        ("a: \ud83d", "no UTF-8"),
        (b"a: \xff", "no UTF-8"),
        ("[" * 1_000_000, "more than 64 levels deep"),
        ("- " * 1_000_000, "more than 64 levels deep"),
        ("a" * 5_000_000, "5000000 bytes of YAML, at most 4194304 are read"),
        ("<<: 1", "expected a mapping"),
        ("a: *x", "found undefined alias"),
    ],
)
def test_yaml_is_refused_with_a_reason(content, reason) -> None:
    with pytest.raises(ParseError, match=reason):
        parse_yaml(content)


def test_yaml_values_are_what_they_look_like() -> None:
    assert parse_yaml("run: {name: 2026-11-29, at: =, id: 08, hex: 0x1F, big: 1_000, zero: 0}") == {
        "run": {"name": "2026-11-29", "at": "=", "id": "08", "hex": 31, "big": 1000, "zero": 0}
    }
    assert parse_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}") == {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}}
    assert parse_yaml(b"\xef\xbb\xbfa: !!str 010") == {"a": "010"}
