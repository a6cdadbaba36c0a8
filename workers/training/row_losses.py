"""The terms of a loss that are means over rows: captions, self-distillation.

The contrastive loss needs the features of the whole batch before it has a gradient; these terms do not. So each
micro-batch adds its part in the pass that carries gradients back (`losses/gradcache.py`). The captions share that
pass's run of the image tower.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from sigray.workers.config import LossConfig
from sigray.workers.data.loader import Batch
from sigray.workers.training.captioner import Captioner
from sigray.workers.training.student import Student


class RowLosses:
    """The terms that a loss has beside the contrastive one.

    Args:
        captioner, student: None without such a term.
    """

    def __init__(self, loss: LossConfig, captioner: Captioner | None, student: Student | None) -> None:
        self._captioner, self._student = captioner, student
        distill = loss.distill
        self._weights = {"caption_loss": loss.caption_weight}
        if distill is not None:
            self._weights |= {"local_loss": distill.local_weight, "masked_loss": distill.masked_weight}
        self._part: dict[str, Tensor] = {}  # of a micro-batch, with its graph
        self._totals: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return self._captioner is not None or self._student is not None

    @property
    def reads_image_tower(self) -> bool:
        """Whether a term needs the image tower's run on the images, locked or not."""
        return self._captioner is not None

    @property
    def looks_ahead(self) -> bool:
        """Whether `look_ahead` must come before `encode`."""
        return self._student is not None and self._student.looks_ahead

    def look_ahead(self, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        """As `Student.look_ahead`."""
        assert self._student is not None
        self._student.look_ahead(parts)

    def targets(self, batch: Batch, rows: slice) -> tuple[list[Tensor], list[Tensor]]:
        """Host tensors of a micro-batch: of the captions, and of self-distillation."""
        captions = self._captioner.targets(batch, rows) if self._captioner is not None else []
        return captions, self._student.targets(batch, rows) if self._student is not None else []

    def encode(
        self, tokens: Tensor, views: tuple[Tensor, Tensor] | None, captions: list[Tensor], masks: list[Tensor]
    ) -> None:
        """Compute the terms of a micro-batch, right after the image tower has run.

        Args:
            tokens: (rows, T) on the device.
            views: global and local views there, if there is self-distillation.
            captions, masks: those of `targets`, there.
        """
        self._part = {}
        if self._captioner is not None:
            self._part |= self._captioner.encode(tokens, *captions)
        if self._student is not None and views is not None:
            self._part |= self._student.encode(*views, *masks)

    def loss(self, rows: slice, num_rows: int) -> Tensor:
        """The weighted part of a micro-batch in this rank's loss.

        Args:
            rows: of the micro-batch, of `num_rows`.
        """
        share = (rows.stop - rows.start) / num_rows
        parts = {name: share * value for name, value in self._part.items()}
        self._part = {}
        for name, value in parts.items():
            self._totals[name] = self._totals[name] + value.detach() if name in self._totals else value.detach()
        weighted = [self._weights[name] * value for name, value in parts.items()]
        return sum(weighted[1:], weighted[0])

    def finish(self) -> dict[str, Tensor]:
        """The terms of the step on this rank, without weights; before the weights change."""
        if self._student is not None:
            self._student.move_centers()
        totals, self._totals = self._totals, {}
        return totals
