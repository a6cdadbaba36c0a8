"""The walk over the tiles of a block of images and texts, which both losses share: cosines out, products in.

B  images      M  texts      D  embedding dimension      R, C  rows and columns of a tile
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sigray.losses.fused import add_, has_bfloat16_products


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

    CPU: measured on two cores at B = 8192, where 1024 and 2048 (16 MiB of float32) differ by 5 % at most and larger
    ones only cost memory. CUDA: on an H100 at B = 32,768 the host asks for tiles of 4096 slower than they are done;
    8192, 128 MiB of bfloat16, takes 7 % longer than 16384 and a quarter of its memory.
    """
    return 8192 if device.type == "cuda" else 2048


@dataclass
class Tile:
    """One rectangle of the images x texts of a block."""

    rows: slice  # of the block's images
    columns: slice  # of the block's texts
    image: Tensor  # (R, D) in the dtype of products
    text: Tensor  # (C, D)
    x: Tensor  # (R, C) cosines; overwritten by whoever visits the tile, and by the next tile

    def pair_slices(self, offset: int) -> tuple[slice, slice]:
        """Rows and columns of the tile that are pairs, where the block's image i and text i + offset are one."""
        num_images, num_texts = self.x.shape
        shift = self.rows.start + offset - self.columns.start
        first, last = max(0, -shift), min(num_images, num_texts - shift)
        return slice(first, last), slice(first + shift, last + shift)

    def pairs(self, offset: int) -> Tensor | None:
        """Their elements of x, as a view; None where there are none."""
        rows, columns = self.pair_slices(offset)
        return self.x.diagonal(columns.start - rows.start) if rows.start < rows.stop else None


def tiles(image_features: Tensor, text_features: Tensor, tile_size: int) -> Iterator[Tile]:
    """All tiles of a block, row by row; their cosines share one buffer."""
    products = product_dtype(image_features)
    edges = min(tile_size, len(image_features)), min(tile_size, len(text_features))
    buffer = image_features.new_empty(edges[0] * edges[1], dtype=products)
    for top in range(0, len(image_features), tile_size):
        rows = slice(top, min(top + tile_size, len(image_features)))
        image = image_features[rows].to(products)
        for left in range(0, len(text_features), tile_size):
            columns = slice(left, min(left + tile_size, len(text_features)))
            text = text_features[columns].to(products)
            x = buffer[: len(image) * len(text)].view(len(image), len(text))
            yield Tile(rows, columns, image, text, torch.mm(image, text.T, out=x))


def accumulate(total: Tensor, dz: Tensor, features: Tensor, *, overwrite: bool = False) -> None:
    """total += dz @ features, or = where nothing is in it yet."""
    if total.dtype == features.dtype:
        total.addmm_(dz, features, beta=0 if overwrite else 1)
    elif total.device.type == "cuda":
        # cuBLAS adds products of bfloat16 to float32 by itself, and nothing is rounded to bfloat16 between.
        if overwrite:
            torch.mm(dz, features, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, dz, features, out_dtype=total.dtype, out=total)
    elif overwrite:
        total.copy_(dz @ features)
    else:
        add_(total, dz @ features)


def sum_dtype(features: Tensor) -> torch.dtype:
    """In which sums over tiles are kept."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def product_dtype(features: Tensor) -> torch.dtype:
    """In which features are multiplied: their own where that is fast and wide enough for dL/dz, else float32."""
    # float16 has no room for dL/dz: sigmoid(-17) is below its smallest number.
    if features.dtype == torch.bfloat16 and has_bfloat16_products(features.device):
        return torch.bfloat16
    return sum_dtype(features)
