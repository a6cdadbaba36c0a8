"""One optimizer step over one global batch. Runs with or without a process group, with or without Ray.

b  pairs on this rank      S  image size      T  context length      D  embedding dimension

The loss always sees the global batch: how it is cut into ranks and micro-batches changes memory and time, and neither
the loss nor any gradient beyond rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from losses import Negatives, NonFiniteFeatures, cached_backward, ring_sigmoid_loss, ring_softmax_loss
from workers.config import LossConfig, ModelConfig, OptimConfig
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
        loss: config of the loss.
        device: of this worker.
        num_samples: length of the run, for the schedule.
        global_batch_size: B, over all ranks.
        micro_batch_size: pairs that go through the towers at once; None: all b of this rank.
        seed: of the run; weights and the random state of every step follow from it.

    Attributes:
        module: the open_clip model, the same weights on every rank.
        optimizer: its AdamW.
    """

    def __init__(
        self,
        model: ModelConfig,
        optim: OptimConfig,
        loss: LossConfig,
        device: Device,
        *,
        num_samples: int,
        global_batch_size: int,
        micro_batch_size: int | None,
        seed: int,
    ) -> None:
        self._model, self._optim, self._loss, self._device = model, optim, loss, device
        self._num_samples, self._global_batch_size, self._seed = num_samples, global_batch_size, seed
        self._micro_batch_size = micro_batch_size
        torch.manual_seed(seed)
        self.module = build_model(model).to(device.torch_device)
        self.optimizer = build_optimizer(self.module, optim)
        self._log_logit_scale = self.module.get_parameter("logit_scale")
        self._logit_bias = self.module.get_parameter("logit_bias")
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        if dist.is_initialized():
            for tensor in self.module.state_dict().values():
                dist.broadcast(tensor, src=0)
        self.module.train()

    def step(self, batch: Batch) -> StepResult:
        """Forward, loss over the global batch, backward, clip, update.

        Raises:
            FloatingPointError: on every rank and before the weights change, where a rank's features hold NaN or
                infinity; names rank and micro-batch.
        """
        lr = self._set_learning_rate(batch.step)
        size = self._micro_batch_size or len(batch.images)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss = cached_backward(
                lambda rows: self._encode(batch, rows, rows.start // size),
                lambda image, text: self._global_loss(image, text, batch.step),
                num_rows=len(batch.images),
                micro_batch_size=size,
            )
        except NonFiniteFeatures as error:
            raise FloatingPointError(
                f"step {batch.step + 1}: NaN or infinity in {error.name} of rank {error.rank}, micro-batch "
                f"{error.row // size} (pair {error.row % size} of it); the weights are those of step {batch.step}. "
                "Lower optim.lr, or train in fp32"
            ) from error
        average_gradients(self.module)
        clip = self._optim.grad_clip_norm
        grad_norm = nn.utils.clip_grad_norm_(self.module.parameters(), clip if clip is not None else float("inf"))
        # The scalars of the weights that this loss was computed with.
        logit_scale, logit_bias = self._log_logit_scale.detach().exp(), self._logit_bias.detach().clone()
        self.optimizer.step()
        return StepResult(loss, logit_scale, logit_bias, grad_norm, lr)

    def _encode(self, batch: Batch, rows: slice, micro_batch: int) -> tuple[Tensor, Tensor]:
        """(rows, D) features of one micro-batch, in the dtype in which the loss multiplies them."""
        # Dropout and the like depend on (seed, step, rank, micro-batch) alone: a second pass over the micro-batch
        # draws the same, and a resumed run needs no saved random state.
        seeds = np.random.SeedSequence([self._seed, batch.step, self._rank, micro_batch])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        images, tokens = self._device.to_device(batch.images[rows], batch.tokens[rows])
        with self._device.autocast():
            features = self.module(normalize_pixels(images, self._model), tokens)
        dtype = self._device.product_dtype
        return features["image_features"].to(dtype), features["text_features"].to(dtype)

    def _global_loss(self, image_features: Tensor, text_features: Tensor, step: int) -> Tensor:
        scale, bias = self._log_logit_scale.exp(), self._logit_bias
        if self._loss.name == "softmax":
            return ring_softmax_loss(image_features, text_features, scale, bias, tile_size=self._loss.tile_size)
        seeds = np.random.SeedSequence([self._seed, step])  # the same on all ranks
        negatives = Negatives(self._loss.negatives, self._loss.negatives_fraction, int(seeds.generate_state(1)[0]))
        return ring_sigmoid_loss(
            image_features, text_features, scale, bias, negatives=negatives, tile_size=self._loss.tile_size
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
