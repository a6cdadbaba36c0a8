"""Tars of real photographs with captions, for benchmarks of decoding: 8 shards of 1,000 JPEGs, made once.

    python -m benchmarks.photo_tars [FOLDER]    about a minute on two cores, 300 MB; FOLDER is data/photos

The photographs are those that the PyPI package `scikit-image` (the `bench` extra) carries in its wheel, in so far as
its docstrings name an owner who gave all rights away:

    astronaut.png          512 x 512   NASA, public domain
    chelsea.png            451 x 300   Stefan van der Walt, CC0
    coffee.png             600 x 400   Rachel Michetti, CC0
    hubble_deep_field.jpg 1000 x 872   NASA, public domain
    rocket.jpg             640 x 427   SpaceX, public domain

Every sample is another part of one of them, with its own size (256 to 512 pixels per side), exposure, mirroring and
JPEG quality (85 to 92), 4:2:0 as cameras and the web have it. Size and content decide what a decoder costs, so a
sample costs what a thumbnail of a web photograph costs: 35 kB on average. A sample is key.jpg, key.json, key.txt. All
of it follows from the seed, the versions of Pillow and numpy, and the photographs.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import math
import os
import shutil
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from benchmarks.common import ROOT

PHOTOS = ROOT / "data" / "photos"
NUM_SHARDS, SHARD_SAMPLES, SEED, VERSION = 8, 1000, 0, 1

# File, share of the samples, what captions call it.
SOURCES = {
    "astronaut.png": (0.24, ("an astronaut in an orange suit", "a smiling woman", "a pilot beside a flag")),
    "chelsea.png": (0.24, ("a tabby cat", "a cat with green eyes", "a sleepy house cat")),
    "coffee.png": (0.24, ("a cup of espresso", "a red saucer with a spoon", "a small coffee")),
    "rocket.jpg": (0.24, ("a rocket on its launch pad", "a white rocket", "a launch tower")),
    "hubble_deep_field.jpg": (0.04, ("distant galaxies", "a field of stars", "a deep view of the sky")),
}
_OPENINGS = ("", "a photo of ", "a close photo of ", "picture: ", "my favourite shot of ", "detail of ", "we found ")
_LIGHTS = ("in soft light", "on a bright morning", "at dusk", "under a grey sky", "in warm lamp light", "in the shade")
_PLACES = (
    "seen from the left",
    "next to an old wooden table",
    "in front of a plain wall",
    "at the back of the room",
    "close to the window",
    "beside the garden path",
    "near the old harbour",
)
_REST = (
    "taken with a borrowed camera",
    "for the autumn calendar",
    "from our visit last summer",
    "slightly out of focus",
    "printed on thick paper",
    "as it looked ten years ago",
    "shared by a neighbour",
    "number {} of the series",
    "after {} hours of waiting",
)


def ensure_photos(folder: Path = PHOTOS) -> list[Path]:
    """The tars, made unless they are there.

    Raises:
        ModuleNotFoundError: where scikit-image is not installed.
    """
    paths = [folder / f"photos-{number:03d}.tar" for number in range(NUM_SHARDS)]
    made = {"version": VERSION, "seed": SEED, "num_shards": NUM_SHARDS, "shard_samples": SHARD_SAMPLES}
    note = folder / "made.json"
    if note.is_file() and json.loads(note.read_text()) == made:
        return paths
    photographs()  # fails here and not in a child
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begin = time.perf_counter()
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        num_bytes = list(pool.map(write_shard, paths, range(NUM_SHARDS)))
    note.write_text(json.dumps(made) + "\n")
    print(f"{folder}: {sum(num_bytes) / 1e6:.0f} MB in {time.perf_counter() - begin:.0f} s")
    return paths


def photo_folder() -> Path:
    """scikit-image's data folder, for which it need not be imported.

    Raises:
        ModuleNotFoundError: where scikit-image is not installed.
    """
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the photographs come from scikit-image: uv pip install -e '.[bench]'")
    return Path(package.origin).parent / "data"


def photographs() -> dict[str, Image.Image]:
    """The photographs by file name."""
    folder = photo_folder()
    return {name: Image.open(folder / name).convert("RGB") for name in SOURCES}


def write_shard(path: Path, number: int) -> int:
    """Write one tar; returns its bytes."""
    sources, names = photographs(), list(SOURCES)
    shares = [SOURCES[name][0] for name in names]
    random = np.random.RandomState([SEED, number])
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(SHARD_SAMPLES):
            name = names[random.choice(len(names), p=shares)]
            jpeg, size = photo(sources[name], random)
            text = caption(SOURCES[name][1], random)
            facts = {"caption": text, "source": name, "width": size[0], "height": size[1]}
            members = {"jpg": jpeg, "json": json.dumps(facts).encode(), "txt": text.encode()}
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{number:03d}{index:06d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    partial.rename(path)
    return path.stat().st_size


def photo(source: Image.Image, random: np.random.RandomState) -> tuple[bytes, tuple[int, int]]:
    """A part of a photograph as JPEG, and its width and height."""
    ratio = math.exp(random.uniform(math.log(2 / 3), math.log(3 / 2)))
    longer = random.randint(384, 513)
    width, height = (
        (longer, max(256, round(longer / ratio))) if ratio >= 1 else (max(256, round(longer * ratio)), longer)
    )
    # At most 1.6 times enlarged where the photograph allows it: what is enlarged more is too smooth to be one.
    fit = min(source.width / width, source.height / height)
    scale = random.uniform(min(fit, 0.625), min(fit, 1.6))
    box_width, box_height = width * scale, height * scale
    left, top = random.uniform(0, source.width - box_width), random.uniform(0, source.height - box_height)
    image = source.resize(
        (width, height), Image.Resampling.LANCZOS, box=(left, top, left + box_width, top + box_height)
    )
    if random.rand() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = ImageEnhance.Brightness(image).enhance(random.uniform(0.8, 1.2))
    image = ImageEnhance.Color(image).enhance(random.uniform(0.7, 1.3))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=int(random.randint(85, 93)), subsampling="4:2:0")
    return stream.getvalue(), (width, height)


def caption(things: tuple[str, ...], random: np.random.RandomState) -> str:
    """A sentence of 8 to 20 words."""

    def pick(words: tuple[str, ...]) -> str:
        return words[random.randint(len(words))].format(random.randint(2, 1000))

    words = (pick(_OPENINGS) + " ".join([pick(things), pick(_LIGHTS), pick(_PLACES), pick(_REST)])).split()
    while len(words) < random.randint(8, 16):
        words += pick(_REST).split()
    text = " ".join(words[:20])
    return text[0].upper() + text[1:] + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=PHOTOS)
    ensure_photos(parser.parse_args().folder)


if __name__ == "__main__":
    main()
