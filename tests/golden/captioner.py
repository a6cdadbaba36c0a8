"""Write the loss and gradients of big_vision's decoder: `python -m tests.golden.captioner CHECKOUT`.

CHECKOUT and the packages are those of `tests/golden/big_vision.py`. The decoder is `Decoder` of
`models/proj/cappa/cappa.py` in float64, and the loss that of `trainers/proj/cappa/generative.py`. Inputs and weights
are drawn by name. `captioner.json` holds their shapes and, for each case, the loss and its gradient by all of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.golden.big_vision import drawn_weights, open_checkout

FILE = Path(__file__).parent / "captioner.json"
LAYERS, HEADS, WIDTH, MLP_WIDTH, VOCABULARY = 2, 2, 6, 7, 10
INPUTS = {"encoded": (3, 4, 5), "pos_emb": (1, 5, WIDTH)}  # the image tower is of another width
TOKENS = np.array([[5, 3, 9, 3, 1], [7, 1, 4, 0, 0], [9, 6, 0, 0, 0]])  # 0 is the pad
IS_PARALLEL = {"autoregressive": (0, 0, 0), "parallel": (1, 1, 1), "mixed": (0, 1, 0)}  # by caption
CASES = {
    f"{name} {bias}": (is_parallel, bias == "biases")
    for name, is_parallel in IS_PARALLEL.items()
    for bias in ("biases", "no biases")
    if (name, bias) != ("mixed", "no biases")  # the file is small
}


def drawn_values(shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Inputs and weights by flax's names: float64, and exact in float32.

    With values four times smaller, attention is flat: its gradients are below 1e-3 of the largest one.
    """
    return {name: 4 * value.astype(np.float64) for name, value in drawn_weights(shapes).items()}


def torch_values(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters or their gradients by the names, and in the shapes, of sigray's decoder."""
    renamed = {}
    for name, value in values.items():
        *layers, leaf = name.split("/")
        if leaf == "kernel":
            num_input_axes = 2 if layers[-1] == "out" else 1  # heads are an axis of their own
            value = value.reshape(np.prod(value.shape[:num_input_axes], dtype=int), -1).T
        new = ".".join([*layers, _LEAVES.get(leaf, leaf)])
        for old, replacement in _NAMES.items():
            new = new.replace(old, replacement)
        renamed[new] = value[0] if name == "pos_emb" else value
    return renamed


_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_NAMES = {  # replaced in this order
    "EmbedTargets": "token_embedding",
    "pos_emb": "positional_embedding",
    "EncDecBlock": "blocks.",
    "LayerNorm1": "norm_1",
    "LayerNorm2": "norm_2",
    "LayerNorm3": "norm_3",
    "LayerNorm": "norm",
    "SelfAttn": "self_attention",
    "CrossAttn": "cross_attention",
    "MLP.Dense_0": "mlp_in",
    "MLP.Dense_1": "mlp_out",
    "LogitsDense": "head",
}


def build(is_parallel: tuple[int, ...], has_bias: bool) -> Any:
    """Their decoder; if no caption is parallel, its table has no row for [MASK]."""
    from big_vision.models.proj.cappa import cappa

    return cappa.Decoder(
        emb_dim=WIDTH,
        mlp_dim=MLP_WIDTH,
        num_heads=HEADS,
        num_layers=LAYERS,
        output_vocab_size=VOCABULARY,
        masked_pred_prob=float(np.mean(is_parallel)),
        masking_ratio=1.0,
        use_bias=has_bias,
    )


def shapes_of(decoder: Any) -> dict[str, tuple[int, ...]]:
    import flax
    import jax

    inputs = (np.zeros(INPUTS["encoded"]), TOKENS, np.zeros(INPUTS["pos_emb"]))
    shapes = jax.eval_shape(decoder.init, jax.random.PRNGKey(0), *inputs)["params"]
    return {name: leaf.shape for name, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items()}


def loss_and_gradients(values: dict[str, np.ndarray], is_parallel: tuple[int, ...], has_bias: bool) -> dict[str, Any]:
    import flax
    import jax
    import jax.numpy as jnp
    from big_vision import utils

    decoder = build(is_parallel, has_bias)
    shapes = shapes_of(decoder)

    def loss_of(values: dict[str, Any]) -> Any:
        weights = {name: values[name][: shape[0]] for name, shape in shapes.items()}
        logits = decoder.apply(
            {"params": flax.traverse_util.unflatten_dict(weights, sep="/")},
            values["encoded"],
            TOKENS,
            values["pos_emb"],
            decoder_mask=flax.linen.make_causal_mask(TOKENS),
            deterministic=False,
            rngs={"dropout": jax.random.PRNGKey(0)},
        )
        return utils.weighted_softmax_xent(logits=logits, labels=TOKENS, weights=jnp.where(TOKENS != 0, 1.0, 0.0))

    drawn = jnp.asarray(1.0 - np.array(is_parallel))  # by which they choose captions
    with mock.patch("jax.random.uniform", return_value=drawn):
        loss, gradients = jax.value_and_grad(loss_of)({name: values[name] for name in [*INPUTS, *shapes]})
    assert {array.dtype for array in (loss, *gradients.values())} == {np.dtype(np.float64)}
    return {"loss": float(loss), "gradients": {name: array.tolist() for name, array in gradients.items()}}


def make() -> dict[str, Any]:
    import jax

    jax.config.update("jax_enable_x64", True)
    shapes = INPUTS | shapes_of(build(*CASES["parallel biases"]))  # all leaves
    values = drawn_values(shapes)
    return {"shapes": shapes, "cases": {name: loss_and_gradients(values, *case) for name, case in CASES.items()}}


if __name__ == "__main__":
    content = {"commit": open_checkout(sys.argv[1]), **make()}
    FILE.write_text(json.dumps(content, separators=(",", ":")) + "\n")
