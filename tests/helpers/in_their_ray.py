"""What a user's program does with sigray in a Ray of its own.

    SEEN_FOLDER=DIR python -m tests.helpers.in_their_ray RUN.yaml

Writes what it found to DIR/found.json, and the reports that a callback took to DIR/reports.jsonl.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

import sigray

SEEN, FOUND = "reports.jsonl", "found.json"
TUNE_CALLBACK = "ray.tune.integration.ray_train:TuneReportCallback"


class Noted(ray.train.UserCallback):
    """Writes each report into a file of this folder."""

    def __init__(self) -> None:
        self._file = Path(os.environ["SEEN_FOLDER"]) / SEEN

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps([metrics[0]["step"], checkpoint and checkpoint.path, len(metrics)]) + "\n")


def train_runs() -> list[Any]:
    """The runs in Ray Train's state."""
    from ray.train.v2._internal.state.state_actor import get_state_actor

    actor = get_state_actor()
    return list(ray.get(actor.get_train_runs.remote()).values()) if actor is not None else []


def placement_groups() -> int:
    """The number of placement groups, after at most 20 s in which they may go."""
    for _ in range(20):
        left = [one for one in ray.util.placement_group_table().values() if one["state"] != "REMOVED"]
        if not left:
            break
        time.sleep(1)
    return len(left)


def in_a_thread(path: str) -> dict[str, Any]:
    """Train in another thread than the main one."""
    config = sigray.load_config(path, ["run.name=thread", "cluster.train_callbacks=[tests.helpers.in_their_ray:Noted]"])
    results: list[sigray.TrainResult] = []
    thread = threading.Thread(target=lambda: results.append(sigray.train(config)))
    thread.start()
    thread.join()
    (result,) = results
    path_of_ray = result.ray_result.checkpoint.path
    return {
        "status": result.status,
        "checkpoint": result.checkpoint,
        "ray_checkpoint": path_of_ray,
        "files": sorted(os.listdir(path_of_ray)),
        "ray_step": result.ray_result.metrics["step"],
        "runs": [run.status.value for run in train_runs()],
        "placement_groups": placement_groups(),
        "has_ray": ray.is_initialized(),
    }


def in_a_tune_function(path: str) -> dict[str, Any]:
    """Train in a function of Ray Tune's, which gets a result for each checkpoint."""
    config = sigray.load_config(path, ["run.name=tune", f"cluster.train_callbacks=['{TUNE_CALLBACK}']"])

    def function(params: dict[str, Any]) -> None:
        sigray.train(config)

    run_config = tune.RunConfig(storage_path=f"{config.run.dir}/tune", name="function", verbose=0)
    # Half a CPU for the function, one for each worker of an evaluation.
    placed: Any = tune.with_resources(function, tune.PlacementGroupFactory([{"CPU": 0.5}, {"CPU": 1.0}]))
    (result,) = tune.Tuner(placed, run_config=run_config).fit()
    frame = result.metrics_dataframe
    return {"steps": frame["step"].tolist(), "checkpoint_paths": frame["checkpoint_path"].tolist()}


def with_population_based_training(path: str) -> str:
    """The error of a Tuner whose scheduler is refused."""
    config = sigray.load_config(path, ["run.name=population"])
    scheduler = PopulationBasedTraining(hyperparam_mutations={"optim.lr": tune.uniform(1e-4, 1e-2)})
    tuner = tune.Tuner(
        sigray.trainable(config),
        param_space={"optim.lr": tune.uniform(1e-4, 1e-2)},
        tune_config=tune.TuneConfig(scheduler=scheduler, metric="loss", mode="min"),
        run_config=tune.RunConfig(storage_path=f"{config.run.dir}/tune", name="population", verbose=0),
    )
    try:
        tuner.fit()
    except Exception as error:
        return f"{error} {(config.folder).exists()}"
    return "no error"


def main(path: str) -> None:
    os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] = "1"
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    found: dict[str, Any] = {"thread": in_a_thread(path)}
    found["tune"] = in_a_tune_function(path)
    found["population"] = with_population_based_training(path)
    (Path(os.environ["SEEN_FOLDER"]) / FOUND).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
