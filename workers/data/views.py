"""Pixels of a sample: the image, and views of it for self-distillation.

    S  image size, also of the global view      s  size of a local view      L  local views      b  rows

The teacher sees the global view, the student the local ones (SILC, arXiv 2310.13355; SigLIP 2, arXiv 2502.14786).
Image and views come from one decoded image. A row with views is flat bytes, because its parts have two sizes:

    image (S, S, 3)   global view (S, S, 3)   local view 0 (s, s, 3)   ...   local view L - 1 (s, s, 3)

The image has the same bits with and without views: each view has random numbers of its own (docs/data.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # data-shard workers do without it
    from torch import Tensor

Rows = TypeVar("Rows", np.ndarray, "Tensor")


@dataclass(frozen=True)
class Views:
    """Crops of an image beside the image: one global view, and local ones.

    Args:
        num_local: L.
        local_size: s, in pixels.
        global_scale, local_scale: smallest and largest fraction of the image's area in a view.
    """

    num_local: int
    local_size: int
    global_scale: tuple[float, float]
    local_scale: tuple[float, float]


@dataclass(frozen=True)
class Pixels:
    """The pixels of a sample that a request names.

    Args:
        image_size: S.
        views: None: the image alone.
    """

    image_size: int
    views: Views | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row of uint8: (S, S, 3); with views (num_bytes,)."""
        return (self.image_size, self.image_size, 3) if self.views is None else (self.num_bytes,)

    @property
    def num_bytes(self) -> int:
        """Bytes of a row."""
        num_bytes = 3 * self.image_size**2
        if self.views is not None:
            num_bytes += num_bytes + 3 * self.views.num_local * self.views.local_size**2
        return num_bytes


def split(rows: Rows, pixels: Pixels) -> tuple[Rows, Rows, Rows]:
    """Return views of the memory of rows: images, global views, local views.

    Args:
        rows: (b, num_bytes), on any device.
        pixels: of the rows, with views.

    Returns:
        (b, S, S, 3), (b, S, S, 3) and (b, L, s, s, 3).
    """
    views, size = pixels.views, pixels.image_size
    assert views is not None
    assert rows.shape[1:] == pixels.shape
    count = len(rows)
    end = 3 * size**2
    return (
        rows[:, :end].reshape(count, size, size, 3),
        rows[:, end : 2 * end].reshape(count, size, size, 3),
        rows[:, 2 * end :].reshape(count, views.num_local, views.local_size, views.local_size, 3),
    )
