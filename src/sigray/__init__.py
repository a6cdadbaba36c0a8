"""Train SigLIP-style image-text models on a Ray cluster.

The names below are loaded on first use, so `import sigray` itself imports neither torch nor Ray. The subpackages
`sigray.losses`, `sigray.workers`, `sigray.orchestrator` and `sigray.tuning` are the folders of the repository
(docs/architecture.md).

    loss = sigray.sigmoid_loss(image_features, text_features, logit_scale, logit_bias)
    result = sigray.train(sigray.load_config("run.yaml", ["optim.lr=1e-4"]))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "DataError",
    "RunConfig",
    "Stream",
    "SweepResult",
    "TrainResult",
    "all_reduce_gradients",
    "cached_backward",
    "load_config",
    "load_study",
    "plan",
    "ring_sigmoid_loss",
    "sigmoid_loss",
    "stream",
    "sweep",
    "train",
    "trainable",
]

_MODULES = {
    "DataError": "sigray.workers.data.tar",
    "RunConfig": "sigray.orchestrator.config",
    "Stream": "sigray.workers.data.stream",
    "SweepResult": "sigray.tuning.result",
    "TrainResult": "sigray.orchestrator.run.result",
    "all_reduce_gradients": "sigray.losses.gradients",
    "cached_backward": "sigray.losses.gradcache",
    "load_config": "sigray.orchestrator.config",
    "load_study": "sigray.tuning.study",
    "plan": "sigray.orchestrator.planning.plan",
    "ring_sigmoid_loss": "sigray.losses.ring",
    "sigmoid_loss": "sigray.losses.sigmoid",
    "stream": "sigray.workers.data.stream",
    "sweep": "sigray.tuning.sweep",
    "train": "sigray.orchestrator.run.driver",
    "trainable": "sigray.tuning.trainable",
}

if TYPE_CHECKING:
    from sigray.losses.gradcache import cached_backward
    from sigray.losses.gradients import all_reduce_gradients
    from sigray.losses.ring import ring_sigmoid_loss
    from sigray.losses.sigmoid import sigmoid_loss
    from sigray.orchestrator.config import RunConfig, load_config
    from sigray.orchestrator.planning.plan import plan
    from sigray.orchestrator.run.driver import train
    from sigray.orchestrator.run.result import TrainResult
    from sigray.tuning.result import SweepResult
    from sigray.tuning.study import load_study
    from sigray.tuning.sweep import sweep
    from sigray.tuning.trainable import trainable
    from sigray.workers.data.stream import Stream, stream
    from sigray.workers.data.tar import DataError
else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'sigray' has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
