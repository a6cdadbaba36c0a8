"""The captioning decoder against big_vision's own, loss and every gradient; its captions against a slow twin."""

import json

import numpy as np
import pytest
import torch

from sigray.workers.config import DecoderConfig
from sigray.workers.model.decoder import Decoder
from sigray.workers.model.tokenizer import CaptionEnds
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


def captions_without_a_cache(decoder, image_tokens, ends):
    """One image at a time; each token from all those before, computed again."""
    found = []
    for row in range(len(image_tokens)):
        caption = []
        while len(caption) < len(decoder.positional_embedding) and (not caption or caption[-1] != ends.end):
            length = len(caption) + 1
            causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
            states = decoder.read(image_tokens[row : row + 1], torch.tensor([[ends.pad, *caption]]), causal)
            caption.append(int(decoder.head(states)[0, -1].argmax()))
        found.append(caption + [ends.pad] * (len(decoder.positional_embedding) - len(caption)))
    return found


@pytest.mark.parametrize("ends", [CaptionEnds(0, 6), CaptionEnds(0, 0)], ids=["end by a token", "end by a pad"])
def test_captions_are_those_without_a_cache(ends):
    torch.manual_seed(2)
    sizes = {"layers": 2, "width": 24, "heads": 3}
    decoder = Decoder(**sizes, mlp_width=48, image_width=16, vocab_size=11, context_length=9, has_bias=True).double()
    assert decoder.sizes() == DecoderConfig(**sizes, bias=True)
    torch.nn.init.normal_(decoder.head.weight)
    image_tokens = torch.randn(16, 5, 16, dtype=torch.float64) * 3
    found = decoder.generate(image_tokens, ends)
    assert (found.dtype, found.shape) == (torch.int32, (16, 9))
    assert found.tolist() == captions_without_a_cache(decoder, image_tokens, ends)
    lengths = {row.index(ends.end) if ends.end in row else 9 for row in found.tolist()}
    assert 9 in lengths
    assert len(lengths) > 2, "captions of few lengths compare little"
    assert int(found.max()) < 11, "[MASK] is no token of a caption"


@pytest.mark.parametrize("last", [0, 4])
def test_captioning_stops_when_all_captions_have_ended(last, monkeypatch):
    decoder = Decoder(
        layers=1, width=8, heads=2, mlp_width=8, image_width=8, vocab_size=6, context_length=50, has_bias=False
    )
    steps = []
    monkeypatch.setattr(
        decoder.head,
        "forward",
        lambda states: steps.append(states) or one_hot(5 if len(steps) > last else 1, len(states)),
    )
    found = decoder.generate(torch.randn(2, 3, 8), CaptionEnds(0, 5))
    assert len(steps) == last + 1
    assert found.tolist() == [[1] * last + [5] + [0] * (49 - last)] * 2


def one_hot(token, num_rows):
    return torch.eye(6)[token].expand(num_rows, 1, 6)
