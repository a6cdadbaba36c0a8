"""Small real data for the tests: WebDataset tars of drawn images with captions, written within a second."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "black": (0, 0, 0)}


def encode_image(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, samples: list[dict[str, bytes | str]]) -> Path:
    """A tar through webdataset's own writer; each sample a mapping of ending to content, `__key__` included."""
    import webdataset as wds

    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path), mtime=0) as writer:
        for sample in samples:
            writer.write(
                {
                    key: value.encode() if isinstance(value, str) and key != "__key__" else value
                    for key, value in sample.items()
                }
            )
    return path


def drawn_sample(number: int, size: int = 20) -> dict[str, bytes | str]:
    """A coloured field with a mark whose place tells the number: every sample differs, the colour is its class."""
    colour = list(COLOURS)[number % len(COLOURS)]
    pixels = np.full((size, size, 3), COLOURS[colour], np.uint8)
    pixels[number // size % size, number % size] = 255
    return {
        "__key__": f"sample{number:05d}",
        "png": encode_image(pixels),
        "txt": f"{colour} field number {number}",
        "json": json.dumps({"class": colour, "number": number}),
    }


def write_dataset(folder: Path, shard_sizes: list[int]) -> list[Path]:
    """Tars of drawn samples numbered through, one for each size."""
    paths, number = [], 0
    for shard, size in enumerate(shard_sizes):
        samples = [drawn_sample(number + index) for index in range(size)]
        paths.append(write_tar(folder / f"shard-{shard:03d}.tar", samples))
        number += size
    return paths


def write_small_run(folder: Path, **sections: Any) -> Path:
    """A run of small towers over 64 drawn samples in two shards, and these sections; returns its YAML."""
    write_dataset(folder / "train", [40, 24])
    content = {
        "run": {"name": "small", "dir": str(folder / "runs")},
        "data": {"shards": str(folder / "train"), "block_size": 8, "num_lanes": 2, "shuffle_window": 16},
        "model": {"towers": TOWERS},
        **sections,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
