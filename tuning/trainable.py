"""A run as a trial of the user's own `ray.tune.Tuner`.

    driver: the user's Tuner       searcher, scheduler, loggers: the user's
      '-- trial (actor)            `RunTrial`: a thread with a whole `sigray train`
            |-- data-shard workers
            '-- training workers, in a placement group of their own

Ray Tune stops a trial by `RunTrial.cleanup`: the run writes a last checkpoint and ends its workers before the process
of the trial ends. If the process were killed, the placement group of its training workers would stay (Ray #54305).

`sigray sweep` decides differently (`tuning/sweep.py`): in the order of the trials, so that a sweep can be repeated.
"""

from __future__ import annotations

import queue
import sys
import threading
from typing import Any

from ray import tune
from ray.tune.schedulers import PopulationBasedTraining, PopulationBasedTrainingReplay

from sigray.orchestrator.config import ConfigError, RunConfig, parse_config, put
from sigray.orchestrator.plain_console import PlainConsole
from sigray.orchestrator.resources import evaluation_resources
from sigray.orchestrator.run.result import TrainResult
from sigray.orchestrator.run.trial import TRIAL_CPUS

LOG = "trial.log"
_TASKS = ("zero_shot", "retrieval", "linear_probe", "multilingual")
_POPULATION = (
    "population based training does nothing here: it copies the checkpoint of one trial into another and changes the "
    "learning rate in mid-run, and a sigray run keeps its own recipe. Take ASHAScheduler, MedianStoppingRule, "
    "HyperBandScheduler or none"
)


def trainable(config: RunConfig) -> type[tune.Trainable]:
    """Return a trainable for a `ray.tune.Tuner` that trains a config.

    Keys of the Tuner's `param_space` are dotted keys of the config. A trial is a run in RUN.DIR/RUN.NAME/TRIAL_ID and
    continues there after its process died. With `eval.sets` each evaluation is a result of the trial, otherwise each
    line of metrics. A result has `samples_seen` (for `time_attr`), `step`, `loss`, the newest line of metrics, and
    `zero_shot/SET/top1` and the other figures.

        space = {"optim.lr": tune.loguniform(1e-4, 1e-2)}
        tuner = tune.Tuner(sigray.trainable(config), param_space=space)

    Args:
        config: the run that is varied.

    Raises:
        ConfigError: by the Tuner, before a trial starts, if its scheduler is population based training.
    """
    return type("sigray", (RunTrial,), {"base": config})


class RunTrial(tune.Trainable):
    """A trial; Ray Tune calls the methods in the process of the trial.

    Attributes:
        base: the run that is varied.
    """

    base: RunConfig

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """Return the placement of a trial's process and evaluations.

        The driver calls this for each trial. The training workers have a placement group of their own.
        """
        _refuse_population_based_training()
        evaluation = cls.base.eval
        workers = [evaluation_resources(evaluation)] * (evaluation.num_workers if evaluation.sets else 0)
        return tune.PlacementGroupFactory([{"CPU": TRIAL_CPUS}, *workers])

    def setup(self, config: dict[str, Any]) -> None:
        self._run = trial_config(self.base, config, self.trial_id)
        self._results = Results(is_evaluated=bool(self._run.eval.sets))
        self._thread: threading.Thread | None = None

    def step(self) -> dict[str, Any]:
        """Wait for the next result of the run; the first call starts the run."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, name="sigray-train", daemon=True)
            self._thread.start()
        return self._results.next()

    def cleanup(self) -> None:
        """Let the run write a last checkpoint and end its workers."""
        self._results.must_stop = True
        if self._thread is not None:
            self._thread.join()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, str]:
        """Name the run, which keeps its checkpoints itself; for a trial that is paused."""
        return {"run": self._run.storage_uri}

    def load_checkpoint(self, checkpoint: dict[str, str] | None) -> None:
        """Take what `save_checkpoint` returned.

        Raises:
            ConfigError: if it names another run.
        """
        if checkpoint is not None and checkpoint["run"] != self._run.storage_uri:
            raise ConfigError(f"trial {self.trial_id} shall go on from {checkpoint['run']}: {_POPULATION}")

    def _train(self) -> None:
        from sigray.orchestrator.run.driver import train

        try:
            log = self._run.folder.parent / f"{self._run.run.name}-{LOG}"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", buffering=1) as file:
                result = train(self._run, PlainConsole(file=file, width=160), observer=self._results)
            self._results.end(result)
        except BaseException as error:
            self._results.end(error)


def trial_config(base: RunConfig, params: dict[str, Any], trial_id: str) -> RunConfig:
    """Return a trial's config: the base with sampled values at dotted keys.

    Raises:
        ConfigError: for an unknown key or a value that does not fit.
    """
    content = base.model_dump(mode="json")
    for key, value in params.items():
        put(content, key, value.item() if hasattr(value, "item") else value, "param_space")
    place = content["run"]
    place |= {"name": trial_id, "dir": f"{base.run.dir}/{base.run.name}"}
    if base.run.storage:
        place["storage"] = base.storage_uri
    return parse_config(content, f"trial {trial_id}")


class Results:
    """An `Observer` that keeps results until Ray Tune takes them.

    Args:
        is_evaluated: whether evaluations are results; otherwise lines of metrics are.
    """

    def __init__(self, *, is_evaluated: bool) -> None:
        self.must_stop = False
        self._is_evaluated = is_evaluated
        self._lines: list[dict[str, float]] = []  # the newest one
        self._queue: queue.SimpleQueue[dict[str, Any] | TrainResult | BaseException] = queue.SimpleQueue()

    def line(self, metrics: dict[str, float]) -> None:
        self._lines = [metrics]
        if not self._is_evaluated:
            self._queue.put(self._result(metrics["step"], metrics["samples_seen"], {}))

    def evaluation(self, result: dict[str, Any]) -> None:
        self._queue.put(self._result(result["step"], result["samples_seen"], result))

    def end(self, outcome: TrainResult | BaseException) -> None:
        """Add the end of the run, or its error."""
        self._queue.put(outcome)

    def next(self) -> dict[str, Any]:
        """Wait for the next result, of which the last has `done`; raises the run's error."""
        found = self._queue.get()
        if isinstance(found, BaseException):
            raise found
        if isinstance(found, TrainResult):
            return self._result(found.steps, found.samples_seen, found.summary) | {"loss": found.loss, "done": True}
        return found

    def _result(self, step: float, samples_seen: float, figures: dict[str, Any]) -> dict[str, Any]:
        line = self._lines[-1] if self._lines else {}
        figures_of = {task: figures[task] for task in _TASKS if figures.get(task)}
        counts = {"step": int(step), "samples_seen": int(samples_seen), "loss": line.get("train/loss")}
        return {key: float(value) for key, value in line.items()} | counts | figures_of


def _refuse_population_based_training() -> None:
    """Look for the scheduler of the Tuner that asks for the resources of a trial.

    Ray Tune gives a trainable no other way to know its scheduler before a trial starts.

    Raises:
        ConfigError: names population based training.
    """
    frame = sys._getframe()
    while frame is not None:
        scheduler = getattr(frame.f_locals.get("self"), "_scheduler_alg", None)
        if isinstance(scheduler, PopulationBasedTraining | PopulationBasedTrainingReplay):
            raise ConfigError(f"{type(scheduler).__name__}: {_POPULATION}")
        frame = frame.f_back  # type: ignore[assignment]
