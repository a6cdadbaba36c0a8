"""From drawings to photographs: names that a model learned from emoji, asked of photos that it never saw.

    python -m benchmarks.photos runs/emoji_siglit          half a minute, after that run
    python -m benchmarks.photos runs/emoji_siglit --save   keep the result in benchmarks/results/

The nine photographs of things come with scikit-image (the `bench` extra; its data folder names their sources, public
domain or CC0 but for the motorcycle, from the Middlebury stereo set). The names are the 1,739 of the demo's held-out
designer. Nine pictures are few: the figures say whether anything transfers, not how much. The last line has top-1 and
top-5, and the median place of the right name among all.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from benchmarks.common import EMOJI, report
from benchmarks.photo_tars import photo_folder
from sigray.orchestrator.run_folder import read_run
from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.config import DataConfig, EvalSet
from sigray.workers.evaluation.datasets import load_set, read_classes
from sigray.workers.evaluation.evaluate import class_labels
from sigray.workers.evaluation.features import Encoder
from sigray.workers.model.init_weights import build_trained_model
from sigray.workers.model.inputs import shapes
from sigray.workers.model.tokenizer import build_tokenizer
from sigray.workers.storage import Storage

PHOTOS = {  # file of scikit-image's data folder: the concept's id, its code points
    "astronaut.png": "1f469-200d-1f680",
    "camera.png": "1f3a5",
    "chelsea.png": "1f408",
    "coffee.png": "2615",
    "coins.png": "1fa99",
    "hubble_deep_field.jpg": "1f30c",
    "moon.png": "1f315",
    "motorcycle_left.png": "1f3cd",
    "rocket.jpg": "1f680",
}


def write_photos(folder: Path) -> None:
    """A tar of the photographs with their concepts."""
    import webdataset

    source = photo_folder()
    with webdataset.TarWriter(str(folder / "photos.tar")) as writer:
        for name, concept in PHOTOS.items():
            buffer = io.BytesIO()
            Image.open(source / name).convert("RGB").save(buffer, "PNG")
            sample = {"png": buffer.getvalue(), "txt": concept, "json": json.dumps({"concept": concept}).encode()}
            writer.write({"__key__": Path(name).stem, **sample})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run on the emoji data, whose newest checkpoint is asked")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    config, storage = read_run(options.run), Storage(options.run)
    size, context_length, vocab_size = shapes(config.model)
    module = build_trained_model(storage, list_checkpoints(storage)[-1], config.model)
    encoder = Encoder(module, config.model, build_tokenizer(config.model, context_length, vocab_size), 64)
    classes_path = str(EMOJI / "held_out_designer" / "classes.json")
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder))
        spec = EvalSet(shards=folder, classes=classes_path, class_field="concept")
        loaded = load_set(spec, DataConfig(shards=folder), size)
    classes = read_classes(classes_path)
    labels = class_labels(loaded.class_ids, classes, "photos")
    logits = encoder.images(loaded.images) @ encoder.texts([entry["name"] for entry in classes]).T
    places = (logits > logits.gather(1, labels[:, None])).sum(dim=1) + 1
    for name, label, row, place in zip(PHOTOS, labels.tolist(), logits, places.tolist(), strict=True):
        best = ", ".join(classes[number]["name"] for number in row.topk(5).indices.tolist())
        print(f"{name}: {classes[label]['name']} is number {place}; the first five: {best}")
    repetition = {name: float(place) for name, place in zip(PHOTOS, places.tolist(), strict=True)}
    figures = {
        "photos_top1": float(np.mean(places.numpy() == 1)),
        "photos_top5": float(np.mean(places.numpy() <= 5)),
        "median_place": float(median(places.tolist())),
    }
    report("photos", [repetition], figures, options.save)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
