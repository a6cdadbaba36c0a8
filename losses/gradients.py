"""The mean of gradients over ranks, in an order of addition that never changes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def all_reduce_gradients(
    module: nn.Module,
    *,
    group: dist.ProcessGroup | None = None,
    all_reduce: Callable[[Tensor], object] | None = None,
) -> None:
    """Replace every gradient by its mean over ranks, in one all-reduce.

    Not DistributedDataParallel: it regroups its buckets after the first step. With three or more ranks, a resumed run
    would then add the same numbers in another order than the unbroken run. The weights would differ in the last bit.
    Gradients of split weights (FSDP2) are left alone: their backward pass has averaged them.

    Args:
        module: with gradients of the same parameters on every rank.
        group: the process group; None is the default group. Without torch.distributed, or with one rank, nothing
            happens.
        all_reduce: sums a tensor over the ranks in place, for a device that `dist.all_reduce` does not know.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    found = (parameter.grad for parameter in module.parameters())
    gradients = [gradient for gradient in found if gradient is not None and not isinstance(gradient, DTensor)]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    if all_reduce is None:
        dist.all_reduce(flat, group=group)
    else:
        all_reduce(flat)
    flat.div_(dist.get_world_size(group))
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
