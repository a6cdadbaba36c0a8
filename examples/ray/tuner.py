"""Your own Tuner: Optuna proposes batch size, bias and temperature, ASHA stops the trials that lag.

    python examples/ray/tuner.py examples/emoji_cpu.yaml

With another YAML, name the figure that ranks the trials, and what the run's keys shall be:

    python examples/ray/tuner.py run.yaml zero_shot/my_set/top1 train.num_samples=1e6 cluster.num_workers=4
"""

import math
import sys

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

import sigray

NUM_TRIALS = 6


def main(path: str, metric: str = "zero_shot/held_out_designer/top1", *overrides: str) -> None:
    config = sigray.load_config(path, overrides)
    largest = config.train.global_batch_size
    space = {
        "train.global_batch_size": tune.choice([largest // 4, largest // 2, largest]),
        "model.init_logit_bias": tune.uniform(-12.0, -2.0),
        "model.init_logit_scale": tune.uniform(0.0, math.log(20.0)),
    }
    # Ray counts CPUs and does not pin them: the processes of two trials at a time share those of a small machine.
    ray.init("local", num_cpus=16, include_dashboard=False, log_to_driver=False)
    tuner = tune.Tuner(
        sigray.trainable(config),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=metric,
            mode="max",
            search_alg=OptunaSearch(seed=0),
            scheduler=ASHAScheduler(
                time_attr="samples_seen",
                grace_period=config.train.num_samples // 4,
                max_t=config.train.num_samples,
                reduction_factor=2,
            ),
            num_samples=NUM_TRIALS,
            max_concurrent_trials=2,
        ),
        run_config=tune.RunConfig(name=f"{config.run.name}-tuner", storage_path=f"{config.run.dir}/tune", verbose=0),
    )
    results = tuner.fit()
    print(results.get_dataframe()[["samples_seen", "loss", metric, *(f"config/{key}" for key in space)]].to_string())
    print(f"{len(results)} trials, {results.num_errors} failed; best: {results.get_best_result().config}")


if __name__ == "__main__":
    main(*sys.argv[1:])
