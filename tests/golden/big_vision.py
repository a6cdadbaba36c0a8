"""Write the features of big_vision's own SigLIP model: `python tests/golden/big_vision.py CHECKOUT`.

CHECKOUT is a clone of https://github.com/google-research/big_vision. The script runs outside sigray's environment:
`pip install jax flax einops ml_collections absl-py scipy`. The weights are drawn by name from a fixed seed, so
`big_vision.json` holds names, shapes and features only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).parent / "big_vision.json"
SIZE, PATCH, LENGTH, WORDS, WIDTH = 32, 8, 8, 60, 32
SHAPE = {"width": WIDTH, "depth": 2, "mlp_dim": 4 * WIDTH, "num_heads": 2}


def drawn_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Weights by name; numpy promises the values of a RandomState for ever."""
    random = np.random.RandomState(0)
    return {name: (random.randn(*shapes[name]) * 0.2).astype(np.float32) for name in sorted(shapes)}


def drawn_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Images, (2, row, column, channel), and tokens."""
    random = np.random.RandomState(1)
    return random.randn(2, SIZE, SIZE, 3).astype(np.float32), random.randint(0, WORDS, (2, LENGTH))


def features(scan: bool) -> dict[str, Any]:
    import flax
    import jax
    from big_vision.models.proj.image_text import two_towers

    model = two_towers.Model(
        image={**SHAPE, "patch_size": (PATCH, PATCH), "pool_type": "map", "scan": scan},
        text={**SHAPE, "vocab_size": WORDS, "scan": scan},
        out_dim=(None, WIDTH),
        temperature_init=10.0,
        bias_init=-10.0,
    )
    images, texts = drawn_inputs()
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), images, texts)["params"]
    flat = {f"params/{name}": leaf.shape for name, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items()}
    weights = {name.removeprefix("params/"): value for name, value in drawn_weights(flat).items()}
    with jax.default_matmul_precision("highest"):
        parameters = {"params": flax.traverse_util.unflatten_dict(weights, sep="/")}
        image_features, text_features, _ = model.apply(parameters, images, texts)
    return {"shapes": flat, "image_features": image_features.tolist(), "text_features": text_features.tolist()}


def open_checkout(checkout: str) -> str:
    """Make big_vision's packages importable; return the checkout's commit."""
    sys.path.insert(0, checkout)
    import flax.training.checkpoints  # noqa: F401  before it could see the empty modules

    for name in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile"):  # opens remote files, and none is opened here
        sys.modules[name] = types.ModuleType(name)
    command = ["git", "-C", checkout, "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    content = {"commit": open_checkout(sys.argv[1]), "plain": features(False), "scan": features(True)}
    FILE.write_text(json.dumps(content) + "\n")
