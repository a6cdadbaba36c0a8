"""Whole tensors to the parts of FSDP2 (`sharding.weights: split`), and back."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor, if each rank holds a part of it; else the tensor itself.

    If it is split, all ranks must call this in the same order.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """This rank's part of a whole tensor, if `other` is split; else the tensor itself."""
    if not isinstance(other, DTensor):
        return tensor
    # All ranks hold the whole tensor, so no rank sends any.
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
