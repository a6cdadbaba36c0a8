"""The sigmoid loss over a process group: text chunks travel round a ring, their gradients travel home behind them.

    R  ranks in the group             b  pairs on this rank (B / R)             D  embedding dimension

Each rank keeps its images and sees every rank's texts once (SigLIP, arXiv 2303.15343, section 3.3 and figure 1).
At step s rank r works on the chunk of rank r - s while that chunk is already on its way to r + 1; the gradient of a
chunk is gathered on the same road, one hop behind, so that it arrives at home after R - 1 hops. Memory per rank is
O(b D); on the wire each rank sends (R - 1) b D features and (R - 1) b D gradients.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from losses.sigmoid import DEFAULT_TILE_SIZE, LossBlock, one_pass, sigmoid_block


def ring_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    tile_size: int = DEFAULT_TILE_SIZE,
) -> Tensor:
    """This rank's part of the sigmoid loss over the global batch: its images against the texts of all ranks.

    The mean over ranks of the value is the loss of the global batch, and so is the mean of every parameter gradient
    (what DistributedDataParallel computes): text gradients from all ranks have come home before this returns.

    Args:
        image_features: (b, D) of this rank, unit norm; b must be the same on every rank.
        text_features: (b, D) of this rank, unit norm; row i belongs to image i.
        logit_scale: scalar, already exponentiated.
        logit_bias: scalar.
        group: the process group; None is the default group, or a single process where there is none.
        tile_size: as in `sigmoid_loss`.

    Returns:
        Scalar: the sum over b * R b pairs, divided by b.

    Raises:
        ValueError: where this rank holds more images than texts, or fewer.
        RuntimeError: in a backward pass with create_graph=True.
    """
    if len(image_features) != len(text_features):
        raise ValueError(f"{len(image_features)} images and {len(text_features)} texts on one rank: pairs expected")
    block = partial(_ring_block, group=group, tile_size=tile_size)
    return one_pass(block, image_features, text_features, logit_scale, logit_bias)


@torch.no_grad()
def _ring_block(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group: dist.ProcessGroup | None,
    tile_size: int,
) -> LossBlock:
    rank, num_ranks = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    chunk = text_features.contiguous()
    total: LossBlock | None = None
    home_grad = chunk  # this rank's own part of its texts' gradient; set at step 0
    arriving_grad: _Shift | None = None  # gradient of the chunk of this step, gathered by the ranks before us
    for step in range(num_ranks):
        next_chunk = _Shift(chunk, rank, num_ranks, group) if step + 1 < num_ranks else None
        block = sigmoid_block(
            image_features,
            chunk,
            logit_scale,
            logit_bias,
            positive_offset=0 if step == 0 else None,
            tile_size=tile_size,
        )
        if total is None:
            total, home_grad = block, block.grad_text
        else:
            total.loss += block.loss
            total.grad_image += block.grad_image
            total.grad_scale += block.grad_scale
            total.grad_bias += block.grad_bias
            gathered = block.grad_text if arriving_grad is None else block.grad_text.add_(arriving_grad.wait())
            arriving_grad = _Shift(gathered, rank, num_ranks, group)
        if next_chunk is not None:
            chunk = next_chunk.wait()
    assert total is not None
    total.grad_text = home_grad if arriving_grad is None else home_grad + arriving_grad.wait()
    return total


class _Shift:
    """A tensor on its way to the next rank while the previous rank's arrives; in flight until `wait`."""

    def __init__(self, tensor: Tensor, rank: int, num_ranks: int, group: dist.ProcessGroup | None) -> None:
        self._sent, self._received = tensor, torch.empty_like(tensor)
        # gloo and nccl count ranks of the whole world in point-to-point calls unless told the group's own.
        send = dist.P2POp(dist.isend, tensor, group=group, group_peer=(rank + 1) % num_ranks)
        receive = dist.P2POp(dist.irecv, self._received, group=group, group_peer=(rank - 1) % num_ranks)
        self._work = dist.batch_isend_irecv([send, receive])

    def wait(self) -> Tensor:
        for work in self._work:
            work.wait()
        return self._received
