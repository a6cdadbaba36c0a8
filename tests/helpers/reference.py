"""Slow twins: the obvious versions of what the packages do fast, in float64, for the parity tests."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sigray.losses import sigmoid_loss_plain
from sigray.workers.config import ModelConfig
from sigray.workers.data.order import LaneSlice, SampleRef, StreamOrder
from sigray.workers.model.towers import build_model, normalize_pixels


def random_features(num_rows: int, dim: int, *, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(num_rows, dim) of unit norm."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(features, dim=-1).to(dtype)


def pair_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, positive_offset: int | None) -> Tensor:
    """The loss of a rectangular block, pair by pair, under autograd."""
    total = image.new_zeros(())
    for i in range(len(image)):
        for j in range(len(text)):
            sign = 1 if positive_offset is not None and j == i + positive_offset else -1
            total = total - nn.functional.logsigmoid(sign * (scale * (image[i] @ text[j]) + bias))
    return total / len(image)


def step_gradients(
    model: ModelConfig, seed: int, images: Tensor, tokens: Tensor
) -> tuple[float, dict[str, Tensor], nn.Module]:
    """Loss and gradient of every parameter for one global batch: one process, float64, the whole B x B matrix.

    The weights are those that `sigray.workers.training.step.Trainer` starts from with the same seed.
    """
    torch.manual_seed(seed)
    module = build_model(model).double()
    output = module(normalize_pixels(images, model).double(), tokens)
    loss = sigmoid_loss_plain(
        output["image_features"], output["text_features"], output["logit_scale"], output["logit_bias"]
    )
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return float(loss.detach()), gradients, module


def samples_of(order: StreamOrder, piece: LaneSlice) -> Iterator[SampleRef]:
    """The samples of a lane slice, one by one: `StreamOrder.places`."""
    dataset = order.dataset_of(piece.lane)
    for index in range(piece.start, piece.stop):
        window, slot = order.window(piece.lane, index)
        yield dataset.locate(window.epoch, window.start + int(window.permutation[slot]))
