"""The trials of a sweep: trial n is a function of (study, n, earlier results).

    seed 0: budget 0: points 0 to N - 1, budget 1: points 0 to N - 1, ...
    seed 1: ...

Trials of one seed and one budget are a group: the scheduler compares them, and they read the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sigray.tuning.space import Dimension, Point, crossed_points, draw, make_point, random_uniform
from sigray.tuning.study import Study


@dataclass(frozen=True)
class Proposal:
    """The next trial."""

    number: int
    seed: int
    budget: int
    point: Point


@dataclass(frozen=True)
class Outcome:
    """The result of an earlier trial, for the searcher.

    Attributes:
        values: the metric at each rung that the trial reached; empty if it failed or was infeasible.
        is_over: whether the trial reaches no further rung.
        is_complete: whether it reached its last rung.
    """

    point: Point
    values: Sequence[float]
    is_over: bool
    is_complete: bool


class Search:
    """The trials of a study, by number.

    Attributes:
        num_trials: in all.
        needs_results: whether trials depend on the results of others.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        config = study.config
        self.needs_results = config.search.name == "optuna"
        self._points = {} if self.needs_results else {budget: self._all_points(budget) for budget in config.budgets}
        self._groups = [
            (seed, budget, len(self._points[budget]) if self._points else config.search.num_trials or 0)
            for seed in config.seeds
            for budget in config.budgets
        ]
        self.num_trials = sum(size for _, _, size in self._groups)

    def propose(self, number: int, outcomes: Sequence[Outcome]) -> Proposal | None:
        """Trial `number`; None while it depends on missing results.

        Args:
            outcomes: of the trials with lower numbers.

        Raises:
            ConfigError: for an expression of the space that cannot be computed.
        """
        first = 0
        for seed, budget, size in self._groups:
            if number < first + size:
                if not self.needs_results:
                    return Proposal(number, seed, budget, self._points[budget][number - first])
                point = self._ask_optuna(number - first, budget, outcomes[first:])
                return Proposal(number, seed, budget, point) if point else None
            first += size
        raise IndexError(f"trial {number} of {self.num_trials}")

    def _all_points(self, budget: int) -> list[Point]:
        config = self._study.config
        base = self._study.base_of(budget)
        if config.search.name == "grid":
            points = crossed_points(config.space, base)
            if config.scheduler.name == "none":
                return points
            # Shuffled: the metric often rises along an axis of the grid, and if each trial is better than the ones
            # before it, the scheduler stops none.
            return sorted(points, key=lambda point: random_uniform(config.search.seed, "order", point.key))
        points = []
        for number in range(config.search.num_trials or 0):

            def pick(name: str, dimension: Dimension, number: int = number) -> Any:
                return draw(dimension, random_uniform(config.search.seed, number, name))

            points += crossed_points(config.space, base, pick)
        return points

    def _ask_optuna(self, index: int, budget: int, outcomes: Sequence[Outcome]) -> Point | None:
        """Replay the outcomes into a new optuna study, and ask it for one point."""
        search = self._study.config.search
        known = outcomes[: max(0, index - search.lag + 1)]
        if not all(outcome.is_over for outcome in known):
            return None
        import optuna

        space = self._study.config.space
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(
            # A seed for each proposal: the number of proposals made in this process does not matter.
            seed=int(random_uniform(search.seed, index) * 2**32),
            n_startup_trials=search.num_startup_trials,
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for outcome in known:
            study.add_trial(frozen_trial(space, outcome))
        trial = study.ask()

        def pick(name: str, dimension: Dimension) -> Any:
            bounds = dimension.uniform or dimension.loguniform
            if bounds is not None:
                return trial.suggest_float(name, *bounds, log=dimension.loguniform is not None)
            # By index: optuna takes no lists or mappings as choices.
            return dimension.values[trial.suggest_categorical(name, list(range(len(dimension.values))))]

        return make_point(space, self._study.base_of(budget), pick)


def frozen_trial(space: Any, outcome: Outcome) -> Any:
    """An earlier trial for optuna; stopped and infeasible trials count as pruned."""
    import optuna

    params: dict[str, Any] = {}
    distributions: dict[str, Any] = {}
    for name, value in outcome.point.values.items():
        dimension = space[name]
        if dimension.expr is not None:
            continue
        bounds = dimension.uniform or dimension.loguniform
        if bounds is not None:
            low, high = bounds
            is_log = dimension.loguniform is not None
            distributions[name] = optuna.distributions.FloatDistribution(low, high, log=is_log)
        else:
            distributions[name] = optuna.distributions.CategoricalDistribution(list(range(len(dimension.values))))
            value = dimension.values.index(value)
        params[name] = value
    is_complete = outcome.is_complete
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.COMPLETE if is_complete else optuna.trial.TrialState.PRUNED,
        params=params,
        distributions=distributions,
        value=outcome.values[-1] if is_complete else None,
        intermediate_values=dict(enumerate(outcome.values)),
    )
