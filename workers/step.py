"""One optimizer step over one global batch. Runs with or without a process group, with or without Ray.

b  pairs on this rank      S  image size      T  context length      D  embedding dimension
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from losses import ring_sigmoid_loss
from workers.config import ModelConfig, OptimConfig
from workers.device import Device
from workers.feed import Batch
from workers.optim import build_optimizer, learning_rate
from workers.towers import build_model, normalize_pixels


@dataclass
class StepResult:
    """Scalars of one step, still on the device. `loss` is this rank's part; its mean over ranks is the loss."""

    loss: Tensor
    logit_scale: Tensor
    logit_bias: Tensor
    grad_norm: Tensor
    learning_rate: float


class Trainer:
    """Model, optimizer and the step that moves them.

    Args:
        model: config of the towers.
        optim: config of the optimizer.
        device: of this worker.
        num_samples: length of the run, for the schedule.
        global_batch_size: B, over all ranks.
        seed: of the run; weights and the random state of every step follow from it.

    Attributes:
        module: the open_clip model, the same weights on every rank.
        optimizer: its AdamW.
    """

    def __init__(
        self,
        model: ModelConfig,
        optim: OptimConfig,
        device: Device,
        *,
        num_samples: int,
        global_batch_size: int,
        seed: int,
    ) -> None:
        self._model, self._optim, self._device = model, optim, device
        self._num_samples, self._global_batch_size, self._seed = num_samples, global_batch_size, seed
        torch.manual_seed(seed)
        self.module = build_model(model).to(device.torch_device)
        self.optimizer = build_optimizer(self.module, optim)
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        if dist.is_initialized():
            for tensor in self.module.state_dict().values():
                dist.broadcast(tensor, src=0)
        self.module.train()

    def step(self, batch: Batch) -> StepResult:
        """Forward, loss over the global batch, backward, clip, update."""
        lr = self._set_learning_rate(batch.step)
        # Dropout and the like depend on (seed, step, rank) alone, so a resumed run needs no saved random state.
        seeds = np.random.SeedSequence([self._seed, batch.step, self._rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        images, tokens = self._device.to_device(batch.images, batch.tokens)
        self.optimizer.zero_grad(set_to_none=True)
        with self._device.autocast():
            features = self.module(normalize_pixels(images, self._model), tokens)
        loss = ring_sigmoid_loss(
            features["image_features"].float(),
            features["text_features"].float(),
            features["logit_scale"],
            features["logit_bias"],
        )
        loss.backward()
        average_gradients(self.module)
        clip = self._optim.grad_clip_norm
        grad_norm = nn.utils.clip_grad_norm_(self.module.parameters(), clip if clip is not None else float("inf"))
        self.optimizer.step()
        return StepResult(
            loss.detach(), features["logit_scale"].detach(), features["logit_bias"].detach(), grad_norm, lr
        )

    def _set_learning_rate(self, step: int) -> float:
        lr = learning_rate(self._optim, step * self._global_batch_size, self._num_samples)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr


def average_gradients(module: nn.Module) -> None:
    """Mean over ranks of every gradient, in one all-reduce of one flat buffer.

    Not DistributedDataParallel: it regroups its buckets after the first step, so with three ranks or more a resumed
    run would add the same numbers in another order than the unbroken one, and the weights would part in the last bit.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat.div_(dist.get_world_size())
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
