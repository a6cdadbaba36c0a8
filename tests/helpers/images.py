"""Random images, resized by the product and by torch."""

import numpy as np
import torch

from sigray.workers.data.resize import resize


def resize_by_torch(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1).unsqueeze(0)
    resized = torch.nn.functional.interpolate(tensor, size, mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def image(height: int, width: int, kind: str = "noise") -> np.ndarray:
    random = np.random.default_rng([height, width])
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return (pixels > 127).astype(np.uint8) * 255 if kind == "black and white" else pixels


def resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    out = np.empty((*size, 3), np.uint8)
    resize(pixels, out, size=size)
    return out
