"""Variables from which the libraries of trackers take servers and keys.

`sigray submit` gives a job those of its config's trackers. They are in no config and in no record of a run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

VARIABLES: dict[str, tuple[str, ...]] = {
    "tensorboard": (),
    "wandb": ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_MODE"),
    "mlflow": (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
        "MLFLOW_TRACKING_INSECURE_TLS",
        "MLFLOW_EXPERIMENT_NAME",
    ),
    "trackio": ("TRACKIO_PROJECT", "TRACKIO_DIR"),
}
SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")


def variables_of(trackers: Iterable[str]) -> dict[str, str]:
    """Return the variables of trackers that are set here."""
    names = [name for tracker in trackers for name in VARIABLES[tracker]]
    return {name: os.environ[name] for name in names if name in os.environ}
