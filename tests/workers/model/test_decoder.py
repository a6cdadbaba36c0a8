"""The captioning decoder against big_vision's own: the loss and every gradient."""

import json

import numpy as np
import pytest
import torch

from sigray.workers.model.decoder import Decoder
from tests.golden import captioner


@pytest.mark.parametrize("case", list(captioner.CASES))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=["double", "single"]
)
def test_decoder_is_big_visions(case, dtype, tolerance):
    """Of all positions, and of those alone that count; tolerances are parts of the largest gradient.

    The largest difference was 9e-16 in float64 and 6e-7 in float32, that is 5 units in the last place.
    """
    golden = json.loads(captioner.FILE.read_text())
    is_parallel, has_bias = captioner.CASES[case]
    expected = golden["cases"][case]
    gradients = {name: np.array(value) for name, value in expected["gradients"].items()}
    values = captioner.drawn_values(golden["shapes"])
    image_tokens = torch.tensor(values["encoded"], dtype=dtype, requires_grad=True)
    wanted = {"encoded": gradients.pop("encoded")} | captioner.torch_values(gradients)
    decoder = Decoder(
        layers=captioner.LAYERS,
        width=captioner.WIDTH,
        heads=captioner.HEADS,
        mlp_width=captioner.MLP_WIDTH,
        image_width=image_tokens.shape[2],
        vocab_size=captioner.VOCABULARY,
        context_length=captioner.TOKENS.shape[1],
        has_bias=has_bias,
    ).to(dtype)
    weights = captioner.torch_values({name: values[name] for name in gradients})
    decoder.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    tokens = torch.from_numpy(captioner.TOKENS)
    counts = tokens != 0
    position_weights = counts.to(dtype) / counts.sum(dim=1, keepdim=True) / len(tokens)
    for places in (None, counts.flatten().nonzero()[:, 0]):
        loss = decoder(image_tokens, tokens, torch.tensor(is_parallel).bool(), position_weights, 0, places)
        assert loss.item() == pytest.approx(expected["loss"], rel=tolerance)
        leaves = {"encoded": image_tokens} | dict(decoder.named_parameters())
        found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        assert found.keys() == wanted.keys()
        largest = max(abs(value).max() for value in wanted.values())
        for name, want in wanted.items():
            difference = abs(found[name].numpy() - want).max()
            assert difference <= tolerance * largest, name
