"""How long does a photograph take from decoded pixels to 224 x 224, and how long altogether?

Photographs of `benchmarks/photo_tars.py`, the boxes that a run crops at random (0.9 to 1 of the area), one thread.
Contestants in one process, all of a repetition in an order of its own, over the same hundred photographs:

    sigray   `workers/data/resize.py`
    narrow   the same compiled without AVX-512, as for a processor that has AVX2 only
    torch    `_upsample_bicubic2d_aa` on channels last, which is torchvision's antialiased resize; it wants a copy of
             the box, which is part of the work here
    pillow   `Image.resize` with the box and BICUBIC

and `decode`, what sigray does with a JPEG before that: decode it. CPU time of this process in us per photograph;
`speedup_*` are medians over the repetitions of ratios within one. That sigray's and torch's pixels are equal is
asserted on every photograph.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.common import report
from benchmarks.photo_tars import ensure_photos
from sigray.workers.config import DataConfig
from sigray.workers.data import resize as module
from sigray.workers.data.decode import decode_pixels, random_box, sample_random
from sigray.workers.data.manifest import read_samples, scan_shards

SIZE, NUM_PHOTOS = 224, 100


def photographs(data: DataConfig) -> list[bytes]:
    """JPEGs of the first shard."""
    (shard,) = scan_shards(data.shards, data).shards
    return [bytes(sample.members["jpg"]) for sample in itertools.islice(read_samples(shard, data), NUM_PHOTOS)]


def by_pillow(image: Image.Image, box: tuple[int, int, int, int], out: np.ndarray) -> None:
    top, left, height, width = box
    resized = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    out[:] = np.asarray(resized)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=31)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = DataConfig(shards=str(ensure_photos()[0]))
    contents = photographs(data)
    images = [decode_pixels(content, data.max_image_pixels) for content in contents]
    boxes = []
    for place, (height, width, _) in enumerate(image.shape for image in images):
        draw = sample_random(0, 0, 0, place).uniforms("crop")
        boxes.append(random_box(height, width, data.crop_scale, data.crop_ratio, draw))
    pairs = list(zip(images, boxes, strict=True))
    cut = [image[top : top + height, left : left + width] for image, (top, left, height, width) in pairs]
    narrow = module._library(module._NARROW)
    if module._library() is None or narrow is None:
        raise SystemExit("no C compiler, or no AVX2: torch resizes here, there is nothing to compare")
    whole: dict[str, Any] = {"size": (SIZE, SIZE), "corner": (0, 0)}
    by_narrow, by_torch = partial(module._resize_by_library, narrow, **whole), partial(module._resize_by_torch, **whole)

    out, other = (np.empty((SIZE, SIZE, 3), np.uint8) for _ in range(2))
    for pixels in cut:
        module.resize(pixels, out, size=(SIZE, SIZE))
        for function in (by_torch, by_narrow):
            function(pixels, other)
            assert (out == other).all()

    work: dict[str, list[Callable[[], Any]]] = {
        "sigray": [partial(module.resize, pixels, out, size=(SIZE, SIZE)) for pixels in cut],
        "narrow": [partial(by_narrow, pixels, out) for pixels in cut],
        "torch": [partial(by_torch, pixels, out) for pixels in cut],
        "pillow": [partial(by_pillow, Image.fromarray(image), box, out) for image, box in pairs],
        "decode": [partial(decode_pixels, content, data.max_image_pixels) for content in contents],
    }
    repetitions = []
    for _ in range(options.repetitions + 1):
        times = {}
        for name in random.sample(list(work), len(work)):
            begin = time.process_time()
            for call in work[name]:
                call()
            times[f"{name}_us"] = 1e6 * (time.process_time() - begin) / len(cut)
        repetitions.append(times)
    del repetitions[0]  # pages and caches are touched for the first time
    figures = {f"{name}_us": statistics.median(times[f"{name}_us"] for times in repetitions) for name in work}
    for name, one, two in [("torch", "torch", "sigray"), ("pillow", "pillow", "sigray"), ("narrow", "torch", "narrow")]:
        ratios = [times[f"{one}_us"] / times[f"{two}_us"] for times in repetitions]
        figures[f"speedup_{name}"] = statistics.median(ratios)
    report("resize", repetitions, figures, options.save)


if __name__ == "__main__":
    main()
