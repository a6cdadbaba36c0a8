"""Which trials a study makes: a function of its number, however often and after whatever it is asked."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sigray.tuning.search import Outcome, Search, frozen_trial
from sigray.tuning.study import parse_study
from tests.helpers.sweeps import study_content


def search_of(**changes: Any) -> Search:
    return Search(parse_study(study_content(**changes), "study"))


def test_seeds_and_budgets_are_searches_of_their_own():
    search = search_of(seeds=[4, 5], budget=[300, 900])
    assert search.num_trials == 8
    made = [search.propose(number, []) for number in range(8)]
    assert [(one.seed, one.budget, one.point.values["optim.lr"]) for one in made] == [
        (seed, budget, lr) for seed in (4, 5) for budget in (300, 900) for lr in (1e-3, 1e-2)
    ]
    with pytest.raises(IndexError):
        search.propose(8, [])


def test_an_expression_sees_the_budget():
    space = {"optim.lr": {"grid": [1.0]}, "optim.num_warmup_samples": {"expr": "train.num_samples // 10"}}
    search = search_of(budget=[300, 900], space=space)
    assert [search.propose(n, []).point.overrides["optim.num_warmup_samples"] for n in (0, 1)] == [30, 90]


def test_random_draws_are_crossed_with_the_grid():
    space = {"optim.lr": {"loguniform": [1e-4, 1e-2]}, "loss.name": {"grid": ["sigmoid", "softmax"]}}
    search = search_of(space=space, search={"name": "random", "num_trials": 3})
    values = [search.propose(n, []).point.values for n in range(search.num_trials)]
    assert [value["loss.name"] for value in values] == ["sigmoid", "softmax"] * 3
    rates = [value["optim.lr"] for value in values]
    assert rates[::2] == rates[1::2]
    assert len(set(rates)) == 3
    other = search_of(space=space, search={"name": "random", "num_trials": 3, "seed": 1})
    assert other.propose(0, []).point.values["optim.lr"] != rates[0]


def test_a_grid_is_shuffled_where_trials_are_compared_with_those_before():
    space = {"optim.lr": {"grid": [10.0**-n for n in range(1, 9)]}}
    plain = search_of(space=space)
    shuffled = search_of(space=space, scheduler={"name": "asha"})
    in_file = [plain.propose(n, []).point.values["optim.lr"] for n in range(8)]
    order = [shuffled.propose(n, []).point.values["optim.lr"] for n in range(8)]
    assert in_file == space["optim.lr"]["grid"]
    assert order != in_file
    assert sorted(order) == sorted(in_file)


OPTUNA = {
    "space": {
        "loss.name": {"choice": ["sigmoid", "softmax"]},
        "optim.lr": {"loguniform": [1e-4, 1e-1]},
        "model.init_logit_bias": {"uniform": [-10, 0], "when": "loss.name == 'sigmoid'"},
    },
    "search": {"name": "optuna", "num_trials": 24, "num_startup_trials": 6, "lag": 3},
}


def outcome_of(point: Any) -> Outcome:
    """Best at lr 1e-2 with the sigmoid."""
    values = point.values
    figure = 1 - abs(math.log10(values["optim.lr"]) + 2) / 3 - 0.3 * (values["loss.name"] == "softmax")
    return Outcome(point, [figure / 2, figure], True, True)


def test_optuna_learns_and_repeats_itself_from_the_table_alone():
    search, outcomes, points = search_of(**OPTUNA), [], []
    for number in range(search.num_trials):
        points.append(search.propose(number, outcomes).point)
        outcomes.append(outcome_of(points[-1]))
    assert all(
        ("model.init_logit_bias" in point.values) == (point.values["loss.name"] == "sigmoid") for point in points
    )
    late = [point.values["loss.name"] for point in points[12:]]
    assert late.count("sigmoid") > late.count("softmax")
    assert max(outcome.values[-1] for outcome in outcomes[6:]) > 0.8
    again = search_of(**OPTUNA)  # as after a restart: another process, the middle first
    for number in (13, 23, 7, 0):
        assert again.propose(number, outcomes[:number]).point == points[number]


def test_optuna_waits_for_the_results_that_it_depends_on_and_for_no_others():
    search = search_of(**OPTUNA)
    points = [search.propose(0, []).point]
    unknown = Outcome(points[0], [], False, False)
    for number in (1, 2):
        point = search.propose(number, [unknown] * number)
        assert point is not None, "the first lag trials wait for nobody"
        points.append(point.point)
    running = [Outcome(point, [], False, False) for point in points]
    assert search.propose(3, running) is None
    done = [outcome_of(points[0]), *running[1:]]
    assert search.propose(3, done) == search.propose(3, [outcome_of(point) for point in points])


def test_optuna_takes_trials_that_failed_or_could_not_run():
    search = search_of(**OPTUNA)
    points = [search.propose(n, [Outcome(search.propose(0, []).point, [], True, False)] * n).point for n in range(3)]
    known = [Outcome(points[0], [], True, False), Outcome(points[1], [0.3], True, False), outcome_of(points[2])]
    assert search.propose(6, [*known, *known]) is not None


def test_each_budget_is_searched_from_its_own_results():
    search = search_of(
        **OPTUNA
        | {"budget": [300, 900], "search": {"name": "optuna", "num_trials": 4, "num_startup_trials": 1, "lag": 1}}
    )
    outcomes: list[Outcome] = []
    for number in range(8):
        outcomes.append(outcome_of(search.propose(number, outcomes).point))
    point = outcomes[7].point
    others = [Outcome(outcome.point, [-value for value in outcome.values], True, True) for outcome in outcomes[3::-1]]
    assert search.propose(7, [*others, *outcomes[4:7]]).point == point
    assert search.propose(7, [*outcomes[:4], *others[:3]]).point != point


def test_random_draws_are_independent():
    space = {"optim.lr": {"uniform": [0, 1]}, "optim.weight_decay": {"uniform": [0, 1]}}
    search = search_of(space=space, search={"name": "random", "num_trials": 3})
    drawn = [value for n in range(3) for value in search.propose(n, []).point.values.values()]
    assert len(set(drawn)) == 6


def test_what_was_stopped_is_pruned_for_optuna():
    import optuna

    study = parse_study(study_content(**OPTUNA), "study")
    point = Search(study).propose(0, []).point
    stopped = frozen_trial(study.config.space, Outcome(point, [0.3], True, False))
    assert (stopped.state, stopped.value) == (optuna.trial.TrialState.PRUNED, None)
    assert stopped.intermediate_values == {0: 0.3}
    finished = frozen_trial(study.config.space, Outcome(point, [0.3, 0.5], True, True))
    assert (finished.state, finished.value) == (optuna.trial.TrialState.COMPLETE, 0.5)
    assert finished.intermediate_values == {0: 0.3, 1: 0.5}
