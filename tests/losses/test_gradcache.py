"""A loss over micro-batches against the same loss over the whole batch at once, in float64."""

from __future__ import annotations

import pytest
import torch

from sigray.losses import sigmoid_loss
from sigray.losses.gradcache import cached_backward
from sigray.losses.spans import recording, span

NUM_ROWS = 10


class Towers:
    """Two linear towers and a scale; remembers what was encoded, and whether with a graph."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels, self.tokens = (torch.randn(NUM_ROWS, 6, generator=generator).double() for _ in range(2))
        self.image, self.text = (torch.randn(6, 4, generator=generator).double().requires_grad_() for _ in range(2))
        self.scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
        self.calls: list[tuple[int, int, bool]] = []

    def encode(self, rows: slice) -> tuple[torch.Tensor, ...]:
        self.calls.append((rows.start, rows.stop, torch.is_grad_enabled()))
        pairs = ((self.pixels, self.image), (self.tokens, self.text))
        return tuple(torch.nn.functional.normalize(inputs[rows] @ weights, dim=1) for inputs, weights in pairs)

    def loss(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return sigmoid_loss(image, text, self.scale, torch.tensor(-3.0).double())

    @property
    def gradients(self) -> list[torch.Tensor | None]:
        return [self.image.grad, self.text.grad, self.scale.grad]


def whole() -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    towers = Towers()
    value = towers.loss(*towers.encode(slice(0, NUM_ROWS)))
    value.backward()
    return value.detach(), towers.gradients


@pytest.mark.parametrize("micro_batch_size", [1, 3, 5, 9])
@pytest.mark.parametrize("syncs", [False, True])
def test_micro_batches_give_the_gradients_of_the_whole_batch(micro_batch_size, syncs):
    towers, synced = Towers(), []
    value = cached_backward(
        towers.encode,
        towers.loss,
        num_rows=NUM_ROWS,
        micro_batch_size=micro_batch_size,
        sync=(lambda: synced.append(len(towers.calls))) if syncs else None,
    )
    expected, gradients = whole()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)  # float64, other order of additions
    for found, want in zip(towers.gradients, gradients, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-13)
    parts = [(start, min(start + micro_batch_size, NUM_ROWS)) for start in range(0, NUM_ROWS, micro_batch_size)]
    assert towers.calls == [(*part, with_graph) for with_graph in (False, True) for part in parts]
    count = len(parts)
    assert synced == ([*range(1, count + 1), count, *range(count + 1, 2 * count + 1)] if syncs else [])


def test_one_micro_batch_is_encoded_once():
    towers = Towers()
    value = cached_backward(towers.encode, towers.loss, num_rows=NUM_ROWS, micro_batch_size=NUM_ROWS)
    assert towers.calls == [(0, NUM_ROWS, True)]
    assert not value.requires_grad
    assert torch.equal(value, whole()[0])


def test_a_locked_tower_is_not_encoded_again():
    towers = Towers()
    towers.image.requires_grad_(False)

    def encode_again(rows: slice) -> tuple[torch.Tensor | None, ...]:
        return None, towers.encode(rows)[1]

    cached_backward(towers.encode, towers.loss, num_rows=NUM_ROWS, micro_batch_size=4, encode_again=encode_again)
    _, (_, want, scale) = whole()
    torch.testing.assert_close(towers.text.grad, want, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(towers.scale.grad, scale, rtol=1e-11, atol=1e-13)
    assert towers.image.grad is None


def test_a_span_waits_for_the_device_at_its_end_and_for_nothing_without_a_profile():
    synced = []
    with recording(lambda: synced.append(len(synced))):
        with span("a"), span("b") as profiled:
            assert profiled
            assert synced == []
        assert synced == [0, 1]
    with span("a") as profiled:
        assert not profiled
    assert synced == [0, 1]
