"""Write the golden values of what is random in a run: `python -m tests.golden.make`.

They come from `tests/golden/definition.py`, which follows the docs and imports nothing of sigray. The tests named
`golden` compare the product with them. Should a value change, old runs no longer resume: change it only with the docs.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden import definition

FILE = Path(__file__).parent / "values.json"
PLACES: list[definition.Place] = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 12, 4711)]


def orders() -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = [
        {"datasets": [[4, 3, 5]], "weights": [1.0], "seed": 7, "num_lanes": 2, "shuffle_window": 4},
        {"datasets": [[4, 3, 5]], "weights": [1.0], "seed": 8, "num_lanes": 2, "shuffle_window": 4},
        {"datasets": [[17, 2, 9, 1]], "weights": [1.0], "seed": 0, "num_lanes": 5, "shuffle_window": 3},
        {"datasets": [[6, 5], [4], [3, 3]], "weights": [3.0, 1.0, 0.7], "seed": 2, "num_lanes": 3, "shuffle_window": 2},
    ]
    for order in asked:
        order |= {"global_batch_size": 6, "num_steps": 12}
        order["batches"] = definition.global_batches(**order)
    return asked


def crops() -> list[dict[str, Any]]:
    images = [(480, 640, (0.5, 1.0), (3 / 4, 4 / 3)), (20, 90, (0.9, 1.0), (3 / 4, 4 / 3))]  # the second: no box fits
    return [
        {
            "seed": seed,
            "place": place,
            "image": image,
            "box": definition.crop_box(*image, definition.uniforms(seed, place, "crop")),
        }
        for seed, place, image in itertools.product((0, 5), PLACES, images)
    ]


def captions() -> list[dict[str, Any]]:
    sources = {"txt": 1.0, "json:names": 3.0, "json:long": 0.5}
    samples = [
        {"txt": ["a"], "json:names": ["b", "c", "d"], "json:long": ["e"]},
        {"txt": ["a"], "json:long": ["e"]},
    ]
    return [
        {
            "seed": seed,
            "place": place,
            "sources": sources,
            "captions": sample,
            "chosen": definition.choose_caption(sources, sample, definition.uniforms(seed, place, "caption")),
        }
        for seed, place, sample in itertools.product((0, 5), PLACES, samples)
    ]


def noise() -> list[dict[str, Any]]:
    places = [(epoch, shard, index) for epoch in range(2) for shard in range(2) for index in range(4)]
    made = []
    for seed, fraction in ((0, 0.5), (5, 0.3)):
        made.append(
            {
                "seed": seed,
                "fraction": fraction,
                "places": places,
                "images": {
                    row: definition.noise_image(place, seed, 2).flatten().tolist()
                    for row, place in enumerate(places)
                    if definition.is_corrupted(place, seed, definition.IMAGE, fraction)
                },
                "captions": {
                    row: definition.noise_caption(place, seed, 5, 1000)
                    for row, place in enumerate(places)
                    if definition.is_corrupted(place, seed, definition.TEXT, fraction)
                },
                "caption_rows": definition.caption_rows(places, seed, fraction),
            }
        )
    return made


def negatives() -> list[dict[str, Any]]:
    """Which texts each image keeps, of a global batch of eight pairs."""
    return [
        {
            "seed": seed,
            "step": step,
            "fraction": 0.4,
            "kept": [
                [definition.is_kept(image, text, definition.step_seed(seed, step), 0.4) for text in range(8)]
                for image in range(8)
            ],
        }
        for seed, step in ((0, 0), (0, 1), (3, 0))
    ]


def tower_draws() -> list[dict[str, int]]:
    """Seeds of torch's generator before a micro-batch goes through the towers."""
    return [
        {
            "seed": seed,
            "step": step,
            "rank": rank,
            "micro_batch": micro_batch,
            "draws": definition.step_seed(seed, step, rank, micro_batch),
        }
        for seed, step, rank, micro_batch in itertools.product((0, 3), (0, 1), (0, 1), (0, 1, 2))
    ]


def make() -> dict[str, Any]:
    return {
        "order": orders(),
        "crop": crops(),
        "caption": captions(),
        "noise": noise(),
        "negatives": negatives(),
        "tower_draws": tower_draws(),
    }


def text() -> str:
    """The file's content, one value a line."""
    lines = [
        f'"{name}": [\n' + ",\n".join(json.dumps(value) for value in values) + "\n]" for name, values in make().items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    np.seterr(all="raise")
    FILE.write_text(text())
    print(f"{FILE}: {FILE.stat().st_size / 1024:.0f} KB")
