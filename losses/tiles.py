"""The loop over tiles that both losses share, and its matrix products.

B  images      M  texts      D  embedding dimension      R, C  rows and columns of a tile
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sigray.native import cpu_flags


def check_features(image_features: Tensor, text_features: Tensor) -> None:
    """Refuse features that cannot be multiplied with each other.

    Raises:
        ValueError: naming both shapes and dtypes.
    """
    image, text = image_features, text_features
    fits = image.ndim == text.ndim == 2 and image.shape[1] == text.shape[1] and image.dtype == text.dtype
    if not (fits and image.is_floating_point() and len(image) and len(text)):
        raise ValueError(
            f"image_features {tuple(image.shape)} {image.dtype} and text_features {tuple(text.shape)} {text.dtype}: "
            "expected (B, D) and (M, D) of one floating dtype, B and M at least 1"
        )


def default_tile_size(device: torch.device) -> int:
    """Edge of a tile.

    CPU: measured on two cores at B = 8192. 1024 and 2048 (16 MiB of float32) differ by at most 5 %, larger ones only
    cost memory. CUDA: on an H100 at B = 32,768 the host launches tiles of 4096 more slowly than the device computes
    them; 8192, 128 MiB of bfloat16, takes 7 % longer than 16384 and a quarter of its memory.
    """
    return 8192 if device.type == "cuda" else 2048


def positions_per_tile(edge: int, num_rows: int, num_logits: int) -> int:
    """How many positions of each row have no more logits than a tile; at least one.

    Args:
        edge: of the tile.
        num_logits: of a position.
    """
    return max(1, edge**2 // max(1, num_rows * num_logits))


@dataclass
class Tile:
    """One rectangle of the (B, M) cosines."""

    rows: slice  # of the images
    columns: slice  # of the texts
    image: Tensor  # (R, D) in the dtype of products
    text: Tensor  # (C, D)
    x: Tensor  # (R, C) cosines; the caller may overwrite them, and the next tile does

    def pair_slices(self, offset: int) -> tuple[slice, slice]:
        """Rows and columns of the tile that are pairs, if image i and text i + offset are."""
        num_images, num_texts = self.x.shape
        shift = self.rows.start + offset - self.columns.start
        first = max(0, -shift)
        last = min(num_images, num_texts - shift)
        return slice(first, last), slice(first + shift, last + shift)

    def pairs(self, offset: int) -> Tensor | None:
        """A view of the pairs' elements of x; None if the tile has no pair."""
        rows, columns = self.pair_slices(offset)
        return self.x.diagonal(columns.start - rows.start) if rows.start < rows.stop else None


def tiles(image_features: Tensor, text_features: Tensor, tile_size: int | None) -> Iterator[Tile]:
    """All tiles, row by row; their cosines share one buffer."""
    tile_size = tile_size or default_tile_size(image_features.device)
    products = product_dtype(image_features)
    edges = min(tile_size, len(image_features)), min(tile_size, len(text_features))
    buffer = image_features.new_empty(edges[0] * edges[1], dtype=products)
    for rows in ranges(len(image_features), tile_size):
        image = image_features[rows].to(products)
        for columns in ranges(len(text_features), tile_size):
            text = text_features[columns].to(products)
            x = buffer[: len(image) * len(text)].view(len(image), len(text))
            yield Tile(rows, columns, image, text, torch.mm(image, text.T, out=x))


def ranges(length: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover a length."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def accumulate(total: Tensor, dz: Tensor, features: Tensor, *, overwrite: bool = False) -> None:
    """Add dz @ features to a total in place, or overwrite the total with it."""
    if total.dtype == features.dtype:
        total.addmm_(dz, features, beta=0 if overwrite else 1)
    elif total.device.type == "cuda":
        # cuBLAS itself adds bfloat16 products to float32; nothing is rounded to bfloat16 in between.
        if overwrite:
            torch.mm(dz, features, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, dz, features, out_dtype=total.dtype, out=total)
    else:
        (total.copy_ if overwrite else total.add_)(dz @ features)


def sum_dtype(features: Tensor) -> torch.dtype:
    """The dtype of sums over tiles."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def product_dtype(features: Tensor) -> torch.dtype:
    """The dtype of products: the features' own if fast and wide enough, else float32."""
    # float16 is too narrow for dL/dz: sigmoid(-17) is below its smallest number.
    if features.dtype == torch.bfloat16 and has_bfloat16_products(features.device):
        return torch.bfloat16
    return sum_dtype(features)


def has_bfloat16_products(device: torch.device) -> bool:
    """Whether matrix products of bfloat16 run at full speed.

    On a CPU without the instructions torch multiplies bfloat16 matrices 5 to 70 times slower than float32
    (docs/numerics.md); products are then taken in float32. This is a property of the machine and not a timing: every
    run must yield the same weights.
    """
    return device.type != "cpu" or bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})
