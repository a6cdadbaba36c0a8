"""The two hooks into Ray Tune: a searcher and a callback that also stops.

Both pass calls on to the sweep's driver (`tuning/sweep.py`).
"""

from __future__ import annotations

from typing import Any, Protocol

from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper


class Driver(Protocol):
    """The part of the sweep's driver that Ray Tune calls."""

    is_stopping: bool

    def next_trial(self, trial_id: str) -> int | str | None: ...

    def trial_ended(self, trial_id: str, error: str | None) -> None: ...

    def trial_restarts(self, trial_id: str) -> None: ...

    def look(self, at_once: bool = False) -> None: ...


class Trials(Searcher):
    """Ray Tune's searcher: hands out the numbers of trials."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver

    def suggest(self, trial_id: str) -> Any:
        number = self._driver.next_trial(trial_id)
        return {"number": number} if isinstance(number, int) else number

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Ray Tune calls this once for each trial, after its last restart."""
        if not error:
            self._driver.trial_ended(trial_id, None)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the state is the sweep's table."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune pickles it for `Tuner.restore`, which we do not use


class Watch(Callback, Stopper):
    """Ray Tune's callback: refreshes the table, reports restarts and failed trials.

    In a sweep that stops, trials end by themselves. Once none runs, it stops those that wait for resources.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._runs_trials = True

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._runs_trials = any(trial.status == Trial.RUNNING for trial in trials)
        self._driver.look()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no single trial: Ray Tune would kill its process."""
        return False

    def stop_all(self) -> bool:
        return self._driver.is_stopping and not self._runs_trials

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._driver.trial_restarts(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        text = str(trial.get_error() or "its process died").strip()
        self._driver.trial_ended(trial.trial_id, text.splitlines()[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {}
