"""The mean of gradients over ranks, against a plain mean."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sigray.losses import all_reduce_gradients
from tests.helpers.ranks import run_on_ranks

SHAPES = {"matrix": (5, 3), "scalar": (), "vector": (7,), "unused": (2,)}


def gradients_of(rank: int) -> nn.ParameterDict:
    """Parameters with this rank's gradients; one has none on any rank."""
    random = torch.Generator().manual_seed(rank)
    module = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()})
    for name, parameter in module.items():
        if name != "unused":
            parameter.grad = torch.randn(parameter.shape, generator=random)
    return module


def reduced(rank: int, world_size: int, in_a_group: bool) -> dict[str, torch.Tensor | None]:
    group = dist.new_group([0, 1]) if in_a_group else None
    module = gradients_of(rank)
    if not in_a_group or rank < 2:
        all_reduce_gradients(module, group=group)
    return {name: parameter.grad for name, parameter in module.items()}


@pytest.mark.parametrize("in_a_group", [False, True])
def test_gradients_become_their_mean(in_a_group: bool) -> None:
    ranks = 2 if in_a_group else 3
    found = run_on_ranks(3, reduced, in_a_group)
    own = [gradients_of(rank) for rank in range(3)]
    for rank, gradients in enumerate(found):
        assert gradients["unused"] is None
        for name in ("matrix", "scalar", "vector"):
            mean = torch.stack([own[other][name].grad for other in range(ranks)]).double().mean(dim=0)
            expected = mean if rank < ranks else own[rank][name].grad
            torch.testing.assert_close(gradients[name], expected.float(), msg=name)
            assert rank >= ranks or torch.equal(gradients[name], found[0][name])


def test_one_process_keeps_its_gradients() -> None:
    module = gradients_of(0)
    all_reduce_gradients(module)
    assert torch.equal(module["matrix"].grad, gradients_of(0)["matrix"].grad)
