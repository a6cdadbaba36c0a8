"""A trial of the user's own Tuner: its config, its results, its end. Real Tuners are in tests/examples/test_ray.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining

from sigray.orchestrator.config import ConfigError, RunConfig, load_config
from sigray.orchestrator.run import driver
from sigray.orchestrator.run.result import TrainResult
from sigray.tuning.trainable import Results, RunTrial, trainable, trial_config
from tests.helpers.data import write_small_run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("trainable")
    return load_config(write_small_run(folder, train={"num_samples": 64, "global_batch_size": 8}))


def line(step: int) -> dict[str, float]:
    return {"step": step, "samples_seen": 8 * step, "train/loss": 1 / step}


def evaluation(step: int) -> dict[str, Any]:
    return {"step": step, "samples_seen": 8 * step, "zero_shot": {"colours": {"top1": step / 10}}, "sheets": {"a": []}}


def finished(**changed: Any) -> TrainResult:
    summary = {"zero_shot": {"colours": {"top1": 0.8}}, "retrieval": {}}
    some: dict[str, Any] = {"checkpoint": None, "zero_shot": {}, "retrieval": {}, "linear_probe": {}, "train_s": 1}
    given = {"status": "finished", "steps": 8, "samples_seen": 64, "loss": 0.125, "summary": summary} | changed
    return TrainResult(**some, **given, total_s=1, folder=Path("/runs/a"), storage="/runs/a")


def test_sampled_values_arrive_at_dotted_keys(config):
    found = trial_config(config, {"optim.lr": np.float64(0.25), "train.global_batch_size": np.int64(16)}, "1a2b")
    assert (found.optim.lr, found.train.global_batch_size) == (0.25, 16)
    assert found.folder == Path(config.run.dir) / "small" / "1a2b"
    assert found.model == config.model
    stored = config.model_copy(update={"run": config.run.model_copy(update={"storage": "s3://bucket/runs"})})
    assert trial_config(stored, {}, "1a2b").storage_uri == "s3://bucket/runs/small/1a2b"
    with pytest.raises(ConfigError, match="optim.learning_rate"):
        trial_config(config, {"optim.learning_rate": 1.0}, "1a2b")


def test_without_held_out_sets_each_line_is_a_result():
    results = Results(is_evaluated=False)
    results.line(line(2))
    results.line(line(4))
    results.end(finished())
    found = [results.next() for _ in range(3)]
    assert [(one["step"], one["samples_seen"], one["loss"], one.get("done", False)) for one in found] == [
        (2, 16, 0.5, False),
        (4, 32, 0.25, False),
        (8, 64, 0.125, True),
    ]
    assert found[1]["train/loss"] == 0.25


def test_with_held_out_sets_each_evaluation_is_a_result():
    """A scheduler misses its metric in a result without figures, and ends the whole Tuner."""
    results = Results(is_evaluated=True)
    results.line(line(2))
    results.line(line(4))
    results.evaluation(evaluation(2))
    results.end(finished())
    first, last = results.next(), results.next()
    assert (first["samples_seen"], first.get("zero_shot"), first["loss"]) == (16, {"colours": {"top1": 0.2}}, 0.25)
    assert "sheets" not in first  # images
    assert (last["zero_shot"], last["done"]) == ({"colours": {"top1": 0.8}}, True)


def test_the_error_of_a_run_is_that_of_its_trial():
    results = Results(is_evaluated=False)
    results.end(OSError("no space"))
    with pytest.raises(OSError, match="no space"):
        results.next()


def trial_of(config: RunConfig, params: dict[str, Any]) -> RunTrial:
    made: Any = trainable(config)
    return made(config=params)


def test_a_stopped_trial_ends_its_run_before_its_process(config, monkeypatch):
    """Ray Tune stops a trial by `Trainable.stop`, and then ends its process."""
    ended = []

    def train(run: RunConfig, console: Any, *, observer: Any) -> TrainResult:
        assert run.optim.lr == 0.5
        observer.line(line(1))
        while not observer.must_stop:
            time.sleep(0.01)
        time.sleep(0.2)  # the last checkpoint
        ended.append(observer)
        return finished(status="stopped")

    monkeypatch.setattr(driver, "train", train)
    trial = trial_of(config, {"optim.lr": 0.5})
    assert trial.train()["samples_seen"] == 8
    assert ended == []
    trial.stop()
    assert len(ended) == 1


def test_a_paused_trial_goes_on_as_itself_only(config, tmp_path):
    """A scheduler that pauses restores the trial's own checkpoint, population based training that of another."""
    trial = trial_of(config, {})
    saved = trial.save_checkpoint(str(tmp_path))
    trial.load_checkpoint(saved)
    with pytest.raises(ConfigError, match="population based training does nothing here"):
        trial.load_checkpoint({"run": saved["run"] + "-other"})


class Controller:
    """Stands for Ray Tune's, which asks for the resources of a trial before the trial starts."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler_alg = scheduler

    def ask(self, config: RunConfig) -> Any:
        return trainable(config).default_resource_request({})


def test_population_based_training_is_refused_by_name(config):
    scheduler = PopulationBasedTraining(hyperparam_mutations={"optim.lr": [0.1, 0.2]})
    with pytest.raises(ConfigError, match="PopulationBasedTraining: population based training does nothing here"):
        Controller(scheduler).ask(config)


@pytest.mark.parametrize("scheduler", [ASHAScheduler(), FIFOScheduler()], ids=["asha", "none"])
def test_other_schedulers_get_a_small_place(config, scheduler):
    assert Controller(scheduler).ask(config).bundles == [{"CPU": 0.5}]


def test_a_trial_has_a_place_for_its_evaluations(config):
    sets = load_config(
        Path(config.run.dir).parent / "run.yaml",
        ["eval.sets.a={shards: /a}", "eval.num_workers=2", "eval.cpus_per_worker=3"],
    )
    assert Controller(FIFOScheduler()).ask(sets).bundles == [{"CPU": 0.5}, {"CPU": 3.0}, {"CPU": 3.0}]
