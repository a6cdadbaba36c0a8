"""The search space: the config keys that a study varies, and how points are made.

A dimension is a dotted key of the config, or a free name if it sets several keys at once (`cases`). Dimensions are set
in the order of the file and may use the earlier ones: `expr` computes a key from others, `when` skips a dimension if
its condition is false.

    train.global_batch_size: {grid: [128, 512, 2048]}
    loss.name:               {grid: [sigmoid, softmax]}
    model.init_logit_bias:   {expr: "log(1 / (train.global_batch_size - 1))", when: "loss.name == 'sigmoid'"}

A point is a function of (space, base config, seed, number), without state between two points.
"""

from __future__ import annotations

import ast
import copy
import difflib
import hashlib
import itertools
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from sigray.orchestrator.config import ConfigError, put
from sigray.workers.config import Section

MAX_POINTS = 10_000  # of a search, for each seed and budget
_KINDS = ("grid", "cases", "choice", "uniform", "loguniform", "expr")


class Dimension(Section):
    """One of grid, cases, choice, uniform, loguniform or expr, and optionally `when`."""

    grid: Annotated[list[Any], Field(min_length=1)] | None = None
    """Every value, crossed with every other grid and cases."""
    cases: Annotated[dict[str, Annotated[dict[str, Any], Field(min_length=1)]], Field(min_length=1)] | None = None
    """A grid of named values that set several keys: {NAME: {KEY: VALUE, ...}, ...}."""
    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """One of these, drawn."""
    uniform: tuple[float, float] | None = None
    """A number drawn uniformly between two bounds."""
    loguniform: tuple[float, float] | None = None
    """A number between two bounds whose logarithm is drawn uniformly."""
    expr: str | None = None
    """An expression over the config, with keys such as train.global_batch_size.

    Allowed: numbers, + - * / ** //, comparisons, `a if b else c`, and the functions log, log2, log10, exp, sqrt, min,
    max, round, floor, ceil, abs."""
    when: str | None = None
    """A condition; if it is false, the dimension is skipped and its key unchanged."""

    @property
    def kind(self) -> str:
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @property
    def values(self) -> list[Any]:
        """The values of a grid, cases (their names) or a choice."""
        return list(self.grid or self.cases or self.choice or [])

    @model_validator(mode="after")
    def _one_kind(self) -> Dimension:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(_KINDS)} expected, not {', '.join(given) or 'none'}")
        for name in ("uniform", "loguniform"):
            bounds = getattr(self, name)
            if bounds is not None and not bounds[0] < bounds[1]:
                raise ValueError(f"{name}={list(bounds)}: [smaller, larger] expected")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform={list(self.loguniform)}: both must be above 0")
        texts = [json.dumps(value, sort_keys=True) for value in self.grid or self.choice or []]
        twice = sorted({text for text in texts if texts.count(text) > 1})
        if twice:
            raise ValueError(f"{self.kind} has {', '.join(twice)} twice")
        for expression in (self.expr, self.when):
            if expression is not None:
                _parse(expression)
        return self


Space = Mapping[str, Dimension]


@dataclass(frozen=True)
class Point:
    """One configuration.

    Attributes:
        values: of the dimensions that exist at this point, for people and for tables.
        overrides: dotted keys of the config and their values.
    """

    values: dict[str, Any]
    overrides: dict[str, Any]

    @property
    def key(self) -> str:
        """A key that equal configurations share."""
        return json.dumps(self.overrides, sort_keys=True)


def make_point(space: Space, base: dict[str, Any], pick: Callable[[str, Dimension], Any]) -> Point:
    """Make a point: set the dimensions in order.

    Args:
        base: the config that the space varies, complete.
        pick: returns the value, or the name of a case, of a dimension without `expr`.

    Raises:
        ConfigError: for an expression that cannot be computed.
    """
    content = copy.deepcopy(base)
    values: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    for name, dimension in space.items():
        if dimension.when is not None and not evaluate(dimension.when, content):
            continue
        value = evaluate(dimension.expr, content) if dimension.expr is not None else pick(name, dimension)
        values[name] = value
        for key, item in dimension.cases[value].items() if dimension.cases is not None else [(name, value)]:
            put(content, key, copy.deepcopy(item), "the base run")
            overrides[key] = item
    return Point(values, overrides)


def crossed_points(
    space: Space, base: dict[str, Any], pick_rest: Callable[[str, Dimension], Any] | None = None
) -> list[Point]:
    """Every combination of the grids and cases, each once.

    Args:
        pick_rest: for the other dimensions.
    """
    crossed = {name: dimension.values for name, dimension in space.items() if dimension.kind in ("grid", "cases")}
    num_points = math.prod(map(len, crossed.values()))
    if num_points > MAX_POINTS:
        raise ConfigError(f"space: its grids have {num_points:,} combinations; at most {MAX_POINTS:,} are allowed")
    points: dict[str, Point] = {}
    for combination in itertools.product(*crossed.values()):
        chosen = dict(zip(crossed, combination, strict=True))

        def pick(name: str, dimension: Dimension, chosen: dict[str, Any] = chosen) -> Any:
            if name in chosen:
                return chosen[name]
            assert pick_rest is not None, name
            return pick_rest(name, dimension)

        point = make_point(space, base, pick)
        points.setdefault(point.key, point)  # if `when` skips a dimension, several combinations are equal
    return list(points.values())


def draw(dimension: Dimension, uniform: float) -> Any:
    """The value of a dimension for a number in [0, 1)."""
    if dimension.uniform is not None:
        low, high = dimension.uniform
        return low + uniform * (high - low)
    if dimension.loguniform is not None:
        low, high = (math.log(bound) for bound in dimension.loguniform)
        return math.exp(low + uniform * (high - low))
    return dimension.values[int(uniform * len(dimension.values))]


def random_uniform(*place: object) -> float:
    """A number in [0, 1) from a hash: adding a dimension does not change the others."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


# ------------------------------------------------------------------------------------------- expressions

_MATH: Any = (math.log, math.log2, math.log10, math.exp, math.sqrt, min, max, round, math.floor, math.ceil, abs)
_FUNCTIONS: dict[str, Callable[..., Any]] = {function.__name__: function for function in _MATH}
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: operator.contains(b, a),
    ast.NotIn: lambda a, b: not operator.contains(b, a),
}
_LEAVES = (ast.Constant, ast.Name, ast.Attribute, ast.Expression, ast.expr_context, ast.boolop)
_COMPOUNDS = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call, ast.List, ast.Tuple)
_LONGEST, _LARGEST_POWER = 500, 64
_LARGEST = 1e300  # integers have no end of their own: five nested powers take gigabytes and hours


def evaluate(expression: str, content: Mapping[str, Any]) -> Any:
    """The value of an expression over a config.

    Args:
        content: nested; `train.global_batch_size` in the expression is content["train"]["global_batch_size"].

    Raises:
        ConfigError: for what is no expression, an unknown key, or arithmetic that fails; names the expression.
    """
    body = _parse(expression).body
    try:
        value = _value(body, content)
    except (ArithmeticError, ValueError, TypeError) as error:
        raise ConfigError(f"expression {expression!r}: {error}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"expression {expression!r} is {value}")
    return value


def _parse(expression: str) -> ast.Expression:
    """The syntax tree, of allowed nodes only."""
    if len(expression) > _LONGEST:
        raise ConfigError(f"an expression of {len(expression)} characters; {_LONGEST} are allowed")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"expression {expression!r} cannot be read: {error}") from error
    for node in ast.walk(tree):
        allowed = isinstance(node, _LEAVES + _COMPOUNDS) or type(node) in _OPERATORS
        if isinstance(node, ast.Call):
            allowed = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
        if not allowed:
            what = ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__
            raise ConfigError(f"expression {expression!r}: {what!r} is not allowed; functions: {', '.join(_FUNCTIONS)}")
    return tree


def _value(node: ast.AST, content: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name | ast.Attribute):
        return _lookup(ast.unparse(node), content)
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item, content) for item in node.elts]
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand, content))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, content), _value(node.right, content)
        if not all(isinstance(side, int | float) for side in (left, right)):  # [0] * 10**10
            raise ValueError("arithmetic takes numbers only")
        if max(abs(left), abs(right)) > _LARGEST:
            raise ValueError(f"a number above {_LARGEST}")
        if isinstance(node.op, ast.Pow) and abs(right) > _LARGEST_POWER:
            raise ValueError(f"a power of {right}; {_LARGEST_POWER} is the largest")
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.BoolOp):
        values = (_value(item, content) for item in node.values)
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.Compare):
        left = _value(node.left, content)
        for operation, item in zip(node.ops, node.comparators, strict=True):
            right = _value(item, content)
            if not _OPERATORS[type(operation)](left, right):
                return False
            left = right
        return True
    if isinstance(node, ast.IfExp):
        return _value(node.body if _value(node.test, content) else node.orelse, content)
    assert isinstance(node, ast.Call)
    assert isinstance(node.func, ast.Name)
    return _FUNCTIONS[node.func.id](*(_value(item, content) for item in node.args))


def _lookup(key: str, content: Mapping[str, Any]) -> Any:
    place: Any = content
    for part in key.split("."):
        if not isinstance(place, Mapping) or part not in place:
            near = difflib.get_close_matches(key, list(_keys(content)), n=1)
            raise ValueError(f"no key {key!r} in the config" + (f"; did you mean {near[0]}?" if near else ""))
        place = place[part]
    return place


def _keys(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")
