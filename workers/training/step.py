"""One optimizer step over one global batch, with or without a process group.

b  pairs on this rank      S  image size      T  context length      D  embedding dimension

The loss always uses the whole global batch. Cutting the batch into ranks and micro-batches changes memory and time,
but the loss and the gradients only by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from sigray.losses import NonFiniteFeatures, cached_backward, feature_means
from sigray.losses.spans import span
from sigray.losses.tiles import ranges
from sigray.workers.checkpoint.writer import EMA
from sigray.workers.config import LossConfig, ModelConfig, OptimConfig, Tower
from sigray.workers.data.loader import Batch
from sigray.workers.data.views import Pixels, split
from sigray.workers.device import Device, LateChecks
from sigray.workers.model.inputs import shapes
from sigray.workers.model.tokenizer import CaptionEnds
from sigray.workers.model.towers import (
    TOWERS,
    build_model,
    checkpoint_activations,
    compile_tower_blocks,
    layer_scales,
    lock_towers,
    normalize_pixels,
)
from sigray.workers.training.captioner import Captioner
from sigray.workers.training.optim import build_optimizer, learning_rate, update_ema
from sigray.workers.training.phases import Schedule
from sigray.workers.training.row_losses import RowLosses
from sigray.workers.training.student import Student


@dataclass
class StepResult:
    """Figures of a step, on the device; `loss` is this rank's, to average over ranks."""

    loss: Tensor
    feature_means: Tensor  # (2 D + 1,) of this rank's rows, see `losses.mean_logits`
    logit_scale: Tensor
    logit_bias: Tensor
    grad_norm: Tensor
    learning_rate: float
    terms: dict[str, Tensor] = field(default_factory=dict)  # of a loss with several: each of this rank, unweighted


class BadStep(FloatingPointError):
    """A step whose loss or gradients are not finite, or whose loss leaps."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(step, message)  # both, so that it can be pickled
        self.step = step  # counted from 1

    def __str__(self) -> str:
        return str(self.args[1])


class Trainer:
    """Model, optimizer and the step that updates them.

    Args:
        schedule: of the learning rate.
        global_batch_size: B, over all ranks.
        micro_batch_size: pairs per forward pass; None: all b of this rank.
        activation_checkpointing: whether the blocks of the towers keep their inputs only.
        stored_embeddings: whether batches hold embeddings of the locked image tower in place of images.
        caption_ends: of the model's tokenizer, if it has a decoder.
        ema: half-life in samples of an average of the weights; None: none.
        seed: of the run; determines the weights and the random state of every step.
        phase: number of the phase, whose fresh weights are its own.

    Attributes:
        module: the open_clip model, with the same weights on every rank.
        pixels: what a row of a batch's images must hold.
        caption_ends: as given.
    """

    def __init__(
        self,
        model: ModelConfig,
        optim: OptimConfig,
        loss: LossConfig,
        device: Device,
        *,
        schedule: Schedule,
        global_batch_size: int,
        micro_batch_size: int | None,
        seed: int,
        phase: int = 0,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
        stored_embeddings: bool = False,
        caption_ends: CaptionEnds | None = None,
        ema: int | None = None,
    ) -> None:
        self._model, self._optim, self._loss, self._device = model, optim, loss, device
        self._schedule, self._global_batch_size, self._seed = schedule, global_batch_size, seed
        self._micro_batch_size = micro_batch_size
        self._ema_decay = None if ema is None else 0.5 ** (global_batch_size / ema)
        self._is_first = True
        torch.manual_seed(seed if phase == 0 else _mixed_seed([seed, phase]))
        self.module = device.place(build_model(model, stored_embeddings=stored_embeddings))
        lock_towers(self.module, model)
        if compile_blocks:
            compile_tower_blocks(self.module)
        if activation_checkpointing:
            checkpoint_activations(self.module, model, device.checkpoint)
        captioner: Captioner | None = None
        if loss.caption_weight:
            assert caption_ends is not None, "a captioning loss needs the tokenizer's pads"
            captioner = Captioner(self.module, loss, caption_ends, seed, is_recorded=device.settle is not None)
        student: Student | None = None
        if loss.distill is not None:
            student = Student(self.module, model, loss.distill, self._average_of, device, seed)
        self.caption_ends = caption_ends
        self._row_losses = RowLosses(loss, captioner, student)
        self.pixels = Pixels(shapes(model)[0], student.views if student is not None else None)
        scales = layer_scales(self.module, model, optim.layer_decay)
        self.optimizer = build_optimizer(self.module, optim, device.optimizer_options(), scales)
        self._log_logit_scale = self.module.get_parameter("logit_scale")
        bias = self.module.logit_bias
        self._logit_bias = bias if isinstance(bias, Tensor) else torch.zeros((), device=device.torch_device)

    def step(self, batch: Batch) -> StepResult:
        """Forward, loss over the global batch, backward, clip, update.

        Raises:
            BadStep: on every rank and before the weights change, if features of any rank hold NaN or infinity; names
                rank and micro-batch.
        """
        lr = self._set_learning_rate(batch.step)
        size = self._micro_batch_size or len(batch.images)
        self.optimizer.zero_grad(set_to_none=True)
        means: list[Tensor] = []
        late_checks: LateChecks = []
        contrastive: list[Tensor] = []

        def global_loss(image_features: Tensor, text_features: Tensor) -> Tensor:
            with span("loss: tiles"):
                means.append(feature_means(image_features, text_features))
                value = self._global_loss(image_features, text_features, batch.step, size, late_checks)
            contrastive.append(value.detach())
            return value

        if self._row_losses.looks_ahead:
            with span("teacher"), self._device.autocast():
                self._row_losses.look_ahead(self._whole_batch(batch, size))
        try:
            loss = cached_backward(
                lambda rows: self._encode(batch, rows, rows.start // size),
                global_loss,
                num_rows=len(batch.images),
                micro_batch_size=size,
                row_loss=(lambda rows: self._row_losses.loss(rows, len(batch.images))) if self._row_losses else None,
                encode_again=lambda rows: self._encode_again(batch, rows, rows.start // size),
                sync=self._device.settle,
            )
            for check in late_checks:
                check()
        except NonFiniteFeatures as error:
            raise BadStep(
                batch.step + 1,
                f"step {batch.step + 1}: NaN or infinity in {error.name} of rank {error.rank}, micro-batch "
                f"{error.row // size} (pair {error.row % size} of it); the weights are those of step {batch.step}. "
                "Lower optim.lr, or train in fp32",
            ) from error
        with span("gradient all-reduce"):
            self._device.average_gradients(self.module)
        terms = {"contrastive_loss": contrastive[0], **self._row_losses.finish()} if self._row_losses else {}
        with span("optimizer"):
            clip = self._optim.grad_clip_norm
            grad_norm = self._device.clip_gradients(self.module, clip if clip is not None else float("inf"))
            # Before the update: the values that this loss was computed with.
            logit_scale, logit_bias = self._log_logit_scale.detach().exp(), self._logit_bias.detach().clone()
            self.optimizer.step()
            if self._ema_decay is not None:
                update_ema(self.optimizer, self._ema_decay)
        if self._is_first:
            self._device.split_state(self.optimizer)
            self._is_first = False
        if self._device.settle is not None:
            self._device.settle()
        return StepResult(loss, means[0], logit_scale, logit_bias, grad_norm, lr, terms)

    def _encode(
        self, batch: Batch, rows: slice, micro_batch: int, towers: Sequence[Tower] = TOWERS
    ) -> tuple[Tensor, ...]:
        """Features of a micro-batch by tower, laid out and rounded for the loss."""
        # Dropout depends on (seed, step, rank, micro-batch) alone: a second pass over the micro-batch draws the same
        # numbers, and a resumed run needs no saved random state.
        self._device.seed(_mixed_seed([self._seed, batch.step, self._device.random_rank, micro_batch]))
        row_losses = self._row_losses if self._row_losses and torch.is_grad_enabled() else None
        captions, masks = row_losses.targets(batch, rows) if row_losses is not None else ([], [])
        with span("to device"):
            images, tokens, *copies = self._device.to_device(batch.images[rows], batch.tokens[rows], *captions, *masks)
        views: tuple[Tensor, Tensor] | None = None
        if self.pixels.views is not None:
            images, *both = split(images, self.pixels)
            views = both[0], both[1]
        with span("forward"), self._device.autocast():
            # A locked tower draws no random numbers, so leaving it out does not change those of the other tower.
            if "visual" in towers and images.dtype == torch.uint8:  # not stored embeddings
                images = normalize_pixels(images, self._model)
            features = self.module(images if "visual" in towers else None, tokens if "text" in towers else None)
            del images  # bfloat16 towers keep a copy: these would stay through the terms below
            if row_losses is not None:
                row_losses.encode(tokens, views, copies[: len(captions)], copies[len(captions) :])
        names = {"visual": "image_features", "text": "text_features"}
        return tuple(self._device.lay_out(features[names[tower]].to(self._device.product_dtype)) for tower in towers)

    def _whole_batch(self, batch: Batch, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the global views and predicted patches of each micro-batch."""
        for rows in ranges(len(batch.images), size):
            _, (_, reads) = self._row_losses.targets(batch, rows)
            images, reads = self._device.to_device(batch.images[rows], reads)
            yield split(images, self.pixels)[1], reads
            if self._device.settle is not None:
                self._device.settle()

    def _encode_again(self, batch: Batch, rows: slice, micro_batch: int) -> tuple[Tensor | None, ...]:
        """As `_encode`, with None in place of the features of a locked tower."""
        unlocked = [tower for tower in TOWERS if tower not in self._model.locked]
        needed = [
            name for name in TOWERS if name in unlocked or (name == "visual" and self._row_losses.reads_image_tower)
        ]
        features = dict(zip(needed, self._encode(batch, rows, micro_batch, needed), strict=True))
        return tuple(features[tower] if tower in unlocked else None for tower in TOWERS)

    def _global_loss(
        self, image_features: Tensor, text_features: Tensor, step: int, micro_batch_size: int, late_checks: LateChecks
    ) -> Tensor:
        features = image_features, text_features, self._log_logit_scale.exp(), self._logit_bias
        seed = _mixed_seed([self._seed, step])  # the same on all ranks
        return self._device.loss(
            features, self._loss, seed=seed, micro_batch_size=micro_batch_size, late_checks=late_checks
        )

    def _average_of(self, parameter: nn.Parameter) -> Tensor:
        return self.optimizer.state.get(parameter, {}).get(EMA, parameter)

    def _set_learning_rate(self, step: int) -> float:
        lr = learning_rate(self._optim, self._schedule.place(step * self._global_batch_size), self._schedule.length)
        for group in self.optimizer.param_groups:
            group["lr"] = self._device.number(lr * group.get("lr_scale", 1.0))
        return lr


def _mixed_seed(numbers: list[int]) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
