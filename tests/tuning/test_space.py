"""Points of a search space: every kind of dimension, conditions, expressions that cannot do harm."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sigray.orchestrator.config import ConfigError
from sigray.tuning.space import Dimension, crossed_points, draw, evaluate, make_point, random_uniform

BASE = {
    "train": {"global_batch_size": 128, "micro_batch_size": None},
    "loss": {"name": "sigmoid"},
    "optim": {"lr": 1e-3},
    "model": {"init_logit_bias": -10.0},
}


def space(**dimensions: dict) -> dict[str, Dimension]:
    return {name.replace("__", "."): Dimension(**content) for name, content in dimensions.items()}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("log(1 / (train.global_batch_size - 1))", math.log(1 / 127)),
        ("1e-3 * sqrt(train.global_batch_size / 128)", 1e-3),
        ("optim.lr if loss.name == 'sigmoid' else 2", 1e-3),
        ("train.micro_batch_size == None and loss.name in ['sigmoid', 'softmax']", True),
        ("1 < 2 < 3 and not (2 > 3)", True),
        ("max(1, min(4, 7 // 2)) - -2 ** 2 % 3", 3 - -(2**2) % 3),
        ("round(2.6) + floor(1.9) + ceil(0.1) + abs(-1) + log2(8) + log10(100) + exp(0)", 3 + 1 + 1 + 1 + 3 + 2 + 1),
    ],
)
def test_expressions(expression, value):
    assert evaluate(expression, BASE) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "open('/etc/passwd')",
        "(1).__class__",
        "train.__class__",
        "[x for x in (1, 2)]",
        "lambda: 1",
        "f'{train}'",
        "{}['a']",
        "log(x=1)",
        "(log)(1)(2)",
        "a := 1",
        "1; 2",
        "1 +",
        "9 ** 9 ** 9",
        "2 ** 100000",
        "'a' * " + "9" * 600,
    ],
)
def test_what_is_no_arithmetic_is_refused(expression):
    with pytest.raises(ConfigError, match="expression"):
        evaluate(expression, BASE)


@pytest.mark.parametrize("expression", ["1 / 0", "log(0)", "exp(1e9)", "loss.name + 1", "1e308 * 10", "sqrt(-1)"])
def test_arithmetic_that_fails_names_the_expression(expression):
    with pytest.raises(ConfigError, match="expression"):
        evaluate(expression, BASE)


def test_an_unknown_key_is_told_with_the_near_one():
    with pytest.raises(ConfigError, match=r"no key 'train.global_batch'.*did you mean train.global_batch_size"):
        evaluate("train.global_batch * 2", BASE)


def test_a_grid_is_every_combination_in_the_order_of_the_file():
    points = crossed_points(space(a={"grid": [1, 2]}, b={"grid": ["x", "y", "z"]}), {})
    assert [(point.values["a"], point.values["b"]) for point in points] == [(a, b) for a in (1, 2) for b in "xyz"]


def test_a_dimension_without_meaning_is_left_out_and_no_point_comes_twice():
    points = crossed_points(
        space(
            loss__name={"grid": ["sigmoid", "softmax"]},
            model__init_logit_bias={"grid": [-10, 0], "when": "loss.name == 'sigmoid'"},
        ),
        BASE,
    )
    assert [point.overrides for point in points] == [
        {"loss.name": "sigmoid", "model.init_logit_bias": -10},
        {"loss.name": "sigmoid", "model.init_logit_bias": 0},
        {"loss.name": "softmax"},
    ]


def test_an_expression_sees_what_was_set_before_it():
    points = crossed_points(
        space(
            train__global_batch_size={"grid": [2, 1001]},
            model__init_logit_bias={"expr": "log(1 / (train.global_batch_size - 1))"},
        ),
        BASE,
    )
    assert [point.overrides["model.init_logit_bias"] for point in points] == [0.0, -math.log(1000)]
    assert BASE["train"]["global_batch_size"] == 128


def test_a_case_sets_several_keys():
    (first, second) = crossed_points(
        space(start={"cases": {"as published": {"optim.lr": 1, "loss.name": "sigmoid"}, "other": {"optim.lr": 2}}}),
        BASE,
    )
    assert first.values == {"start": "as published"}
    assert first.overrides == {"optim.lr": 1, "loss.name": "sigmoid"}
    assert second.overrides == {"optim.lr": 2}


@given(st.floats(0, 1, exclude_max=True))
def test_what_is_drawn_is_within_bounds(uniform):
    assert 2 <= draw(Dimension(uniform=(2, 5)), uniform) <= 5
    assert 1e-4 * (1 - 1e-9) <= draw(Dimension(loguniform=(1e-4, 1e-2)), uniform) <= 1e-2 * (1 + 1e-9)
    assert draw(Dimension(choice=["a", "b", "c"]), uniform) in "abc"


def test_draws_cover_what_they_draw_from():
    numbers = [random_uniform(0, n, "lr") for n in range(2000)]
    assert 0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1
    counts = [sum(draw(Dimension(choice=["a", "b"]), number) == side for number in numbers) for side in "ab"]
    assert min(counts) > 900  # 4.5 standard deviations of a fair coin
    logs = [math.log10(draw(Dimension(loguniform=(1e-4, 1e-2)), number)) for number in numbers]
    assert sum(log < -3 for log in logs) == pytest.approx(1000, abs=100)


@given(st.integers(0, 5), st.integers(0, 50))
def test_another_dimension_does_not_change_the_draws_of_the_others(seed, number):
    one = space(optim__lr={"loguniform": (1e-4, 1e-2)})
    more = space(loss__name={"choice": ["sigmoid", "softmax"]}) | one

    def pick(name, dimension):
        return draw(dimension, random_uniform(seed, number, name))

    assert make_point(one, BASE, pick).values["optim.lr"] == make_point(more, BASE, pick).values["optim.lr"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "exactly one of"),
        ({"grid": [1], "choice": [2]}, "not grid, choice"),
        ({"uniform": (2, 1)}, r"uniform=\[2.0, 1.0\]"),
        ({"loguniform": (0, 1)}, "above 0"),
        ({"grid": [1, 1]}, "grid has 1 twice"),
        ({"expr": "import os"}, "cannot be read"),
        ({"grid": [1], "when": "open('x')"}, "not allowed"),
        ({"grid": [1], "gird": 2}, "gird"),
    ],
)
def test_a_wrong_dimension_is_told(content, message):
    with pytest.raises(ValidationError, match=message):
        Dimension(**content)
