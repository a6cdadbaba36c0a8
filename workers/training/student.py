"""The self-distillation terms of a step, micro-batch by micro-batch.

    b  images of this rank      L  local views of each      P  patches      m  predicted patches of each image

The teacher is the average of the weights (`train.ema`), or the weights themselves before the first update. It sees the
global view. The student sees the local views, and the global view with masked patches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sigray.losses import Teacher, distillation_loss, sinkhorn_center
from sigray.workers.config import DistillConfig, ModelConfig
from sigray.workers.data.loader import Batch
from sigray.workers.data.sample_hash import Purpose, place_hash
from sigray.workers.data.views import Views
from sigray.workers.device import Device
from sigray.workers.model.distiller import ViewEncoder
from sigray.workers.model.towers import normalize_pixels


class Student:
    """The image tower of a model that learns from its own average.

    Args:
        module: the model, with a distiller.
        average_of: returns the average of a parameter, or the parameter if it has none yet.
        seed: of the run.

    Attributes:
        views: what a batch must hold beside the images.
        num_patches, num_predicted: P and m.
        looks_ahead: whether `look_ahead` must come before `encode`.
    """

    def __init__(
        self,
        module: nn.Module,
        model: ModelConfig,
        config: DistillConfig,
        average_of: Callable[[nn.Parameter], Tensor],
        device: Device,
        seed: int,
    ) -> None:
        self._encoder = ViewEncoder(module.get_submodule("visual"), module.get_submodule("distiller"))
        self._model, self._config, self._device, self._seed = model, config, device, seed
        self._average_of = average_of
        trunk: Any = module.get_submodule("visual.trunk")
        self.num_patches = trunk.patch_embed.num_patches
        self._num_masked = num_masked(self.num_patches, config)
        self.num_predicted = self.num_patches if config.predicts == "all" else self._num_masked
        self.views = views_of(config, trunk)
        self.looks_ahead = config.balance == "sinkhorn"
        # If the teacher looks ahead, by head: its states of each micro-batch that awaits `encode`, its prototypes, and
        # the centers of the batch.
        self._seen: list[dict[str, Tensor]] = []
        self._tables: dict[str, Tensor] = {}
        self._centers: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}  # of the teacher's states, by head
        self._num_rows = 0

    @property
    def kept_bytes(self) -> int:
        """Bytes of the teacher's states of an image that wait for `encode`."""
        if not self.looks_ahead:
            return 0
        states = (self._config.local_weight > 0) + (self._config.masked_weight > 0) * self.num_predicted
        distiller: Any = self._encoder.distiller
        return states * distiller.local_head.prototypes.shape[1] * self._device.product_dtype.itemsize

    def targets(self, batch: Batch, rows: slice) -> list[Tensor]:
        """Host tensors of a micro-batch, for `encode`.

        (rows, P) bool: the masked patches; and (rows, m): the numbers of the predicted ones, in order.
        """
        masked = drawn_patches(batch.samples[rows], self._seed, self.num_patches, self._num_masked)
        if self._config.predicts == "all":
            reads = np.broadcast_to(np.arange(self.num_patches), masked.shape).copy()
        else:
            reads = np.nonzero(masked)[1].reshape(len(masked), -1)
        return [torch.from_numpy(masked), torch.from_numpy(reads)]

    def encode(
        self,
        global_views: Tensor,
        local_views: Tensor,
        masked: Tensor,
        reads: Tensor,
        *,
        loss: Callable[..., Tensor] = distillation_loss,
    ) -> dict[str, Tensor]:
        """The terms of a micro-batch: means over its images.

        Args:
            global_views: (rows, S, S, 3) uint8 on the device.
            local_views: (rows, L, s, s, 3) uint8.
            masked, reads: those of `targets`, on the device.
            loss: `distillation_loss`, or what stands for it in a plan.
        """
        pixels = normalize_pixels(global_views, self._model)
        if self.looks_ahead:
            wanted = {head: (states, self._tables[head]) for head, states in self._seen.pop(0).items()}
        else:
            wanted = self._teach(pixels, reads)
            self._add_to_sums(wanted)
        found = {}
        if "local" in wanted:
            small = normalize_pixels(local_views.flatten(0, 1), self._model)
            states, table = self._encoder(small, pools=True)["local"]
            states = states.unflatten(0, local_views.shape[:2])
            found["local_loss"] = self._loss("local", (states, table), wanted["local"], loss)
        if "masked" in wanted:
            own = self._encoder(pixels, masked, pools=False, reads=reads)["masked"]
            found["masked_loss"] = self._loss("masked", own, wanted["masked"], loss)
        return found

    def look_ahead(self, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Show the teacher the whole batch, and compute the centers of it.

        Args:
            parts: global views and predicted patches of each micro-batch, in the order of `encode`.
        """
        products = self._device.product_dtype
        self._seen = []
        for global_views, reads in parts:
            found = self._teach(normalize_pixels(global_views, self._model), reads)
            self._seen.append({head: states.to(products) for head, (states, _) in found.items()})
            self._tables = {head: table.to(products) for head, (_, table) in found.items()}
        with torch.no_grad(), torch.autocast(self._device.torch_device.type, enabled=False):
            for head, table in self._tables.items():
                states = [seen[head] for seen in self._seen]
                temperature = self._config.teacher_temperature
                self._centers[head] = sinkhorn_center(states, table, temperature, self._device.average)

    def _teach(self, pixels: Tensor, reads: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the teacher's states of a micro-batch's global views, and its prototypes.

        By head, (rows, 1, D) or (rows, m, D) and (K, D).
        """
        has_local, has_masked = self._config.local_weight > 0, self._config.masked_weight > 0
        with torch.no_grad(), self._as_teacher() as weights:
            kinds = {"pools": has_local, "reads": reads if has_masked else None}
            found = functional_call(self._encoder, weights, (pixels,), kinds)
        if has_local:
            states, table = found["local"]
            found["local"] = states[:, None], table
        return found

    def _add_to_sums(self, taught: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for head, (states, _) in taught.items():
            total = states.float().mean(dim=1).sum(dim=0)
            self._sums[head] = self._sums[head] + total if head in self._sums else total
        self._num_rows += len(states)

    def _loss(
        self,
        head: str,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor],
        loss: Callable[..., Tensor],
    ) -> Tensor:
        """The term of a head.

        Args:
            student, teacher: states and prototypes.
        """
        config = self._config
        states, table = student
        own: Tensor = self._encoder.distiller.get_buffer(f"{head}_center")
        center = self._centers[head] if self.looks_ahead else own
        products = self._device.product_dtype
        wanted = Teacher(teacher[0].to(products), teacher[1].to(products), center, config.teacher_temperature)
        with torch.autocast(states.device.type, enabled=False):
            return loss(states.to(products), table.to(products), wanted, config.student_temperature)

    def move_centers(self) -> None:
        """Move the averages of the teacher's logits, before the step changes the weights.

        The mean over a batch of logits is that of the states, times the prototypes.
        """
        momentum = self._config.center_momentum
        with torch.no_grad(), self._as_teacher() as weights:
            for head, total in self._sums.items():
                mean = self._device.average(total / self._num_rows)
                name = f"distiller.{head}_head.prototypes"
                logits = torch.nn.functional.normalize(weights[name], dim=-1) @ mean
                self._encoder.distiller.get_buffer(f"{head}_center").lerp_(logits, 1 - momentum)
        self._sums = {}
        self._num_rows = 0
        self._tables = {}
        self._centers = {}

    @contextlib.contextmanager
    def _as_teacher(self) -> Iterator[dict[str, Tensor]]:
        """Yield the teacher's weights by name, without dropout in the meantime.

        They are detached: autocast would keep a weight that it casts here, without its graph, for the student.
        """
        training = [part for part in self._encoder.modules() if part.training]
        for part in training:
            part.training = False
        is_whole = self._config.teacher == "all"
        try:
            yield {
                name: (self._average_of(parameter) if is_whole or name.startswith("distiller.") else parameter).detach()
                for name, parameter in self._encoder.named_parameters()
            }
        finally:
            for part in training:
                part.training = True


def views_of(config: DistillConfig, trunk: Any) -> Views:
    """Return the views that a section asks for.

    Args:
        trunk: the ViT of timm.

    Raises:
        ValueError: if its patches do not divide a small crop.
    """
    patch, size = trunk.patch_embed.patch_size[0], trunk.patch_embed.img_size[0]
    local_size = config.local_size or max(1, round(size * 3 / 7 / patch)) * patch
    if local_size % patch:
        raise ValueError(f"loss.distill.local_size={local_size} does not divide by the patches of {patch} pixels")
    num_local = config.num_local_views if config.local_weight else 0
    return Views(num_local, local_size, config.global_scale, config.local_scale)


def num_masked(num_patches: int, config: DistillConfig) -> int:
    """Return how many patches of each image are masked; at least one."""
    return max(1, round(config.mask_fraction * num_patches))


def drawn_patches(samples: np.ndarray, seed: int, num_patches: int, count: int) -> np.ndarray:
    """Return (n, num_patches) bool, the masked patches of each sample.

    Args:
        samples: (n, 3) epoch, shard, index.
        count: masked patches of each.
    """
    each = np.repeat(samples, num_patches, axis=0)
    places = np.column_stack([each, np.tile(np.arange(num_patches), len(samples))])
    order = place_hash(places, seed, Purpose.MASKED_PATCHES).reshape(len(samples), num_patches).argsort(axis=1)
    masked = np.zeros((len(samples), num_patches), bool)
    np.put_along_axis(masked, order[:, :count], True, axis=1)
    return masked
