"""What each term of SigLIP 2's recipe is worth at demo scale: at equal samples, and at equal time.

    python -m benchmarks.recipe --equal samples --save     about 40 minutes on two cores
    python -m benchmarks.recipe --equal time --save

Runs of examples/siglip2_emoji_cpu.yaml with no term, with each, and with all, over three seeds, on two ranks without
Ray. A term holds from the start, at SigLIP 2's weight for a B model; images keep their size. With `--equal time` a run
sees as many pairs as it can in the time that the run without terms takes; a short run of each measures its rate first.
Figures of each, mean and standard deviation over seeds:

zero_shot  top-1 and top-5 on the drawings of a designer that training never saw
dense      accuracy of a linear classifier on features before pooling: which of five shapes covers the centre of a
           patch of a drawn picture; patches without a shape do not count
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.common import ROOT, ensure_emoji, report
from sigray.orchestrator.config import RunConfig, load_config
from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.evaluation.evaluate import evaluate_checkpoint
from sigray.workers.evaluation.features import EvaluationJob
from sigray.workers.evaluation.linear_probe import linear_probe
from sigray.workers.model.decoder import ImageTokens
from sigray.workers.model.init_weights import build_trained_model
from sigray.workers.model.towers import normalize_pixels
from sigray.workers.storage import Storage
from tests.helpers.bare import train_bare
from tests.helpers.ranks import run_on_ranks

BASE = ["phases=[]", "cluster.num_workers=1", "eval.num_sheet_images=0", "checkpoint.save_every_steps=null"]
BASE += ["checkpoint.save_every_s=null"]
NO_DECODER = ["model.decoder=null", "loss.caption_weight=0"]
NO_HEADS = ["model.heads=null"]
LOCAL = "{local_weight: 0.25, masked_weight: 0, num_local_views: 4}"
MASKED = "{local_weight: 0, masked_weight: 0.0625}"
BOTH = "{local_weight: 0.25, masked_weight: 0.0625, num_local_views: 4}"
VARIANTS = {
    "none": [*NO_DECODER, *NO_HEADS],
    "captions": NO_HEADS,
    "local": [*NO_DECODER, f"loss.distill={LOCAL}"],
    "masked": [*NO_DECODER, f"loss.distill={MASKED}"],
    "all": [f"loss.distill={BOTH}"],
}
SET = "held_out_designer"
SHAPES = ("ellipse", "rectangle", "triangle", "cross", "ring")
NUM_PICTURES = 1500


def train(variant: str, folder: Path, num_samples: int, seed: int) -> tuple[RunConfig, float]:
    """A run; returns its config and its pairs per second, the median of its lines without the first."""
    config = load_config(
        ROOT / "examples" / "siglip2_emoji_cpu.yaml",
        [
            *BASE,
            *VARIANTS[variant],
            f"run.dir={folder}",
            f"run.name={variant}-{num_samples}-{seed}",
            f"run.seed={seed}",
            f"train.num_samples={num_samples}",
            f"optim.num_warmup_samples={num_samples // 20}",
            f"train.ema={num_samples // 20}",
        ],
    )
    lines = run_on_ranks(2, train_bare, config)[0]["lines"]
    return config, statistics.median(line["throughput/samples_per_s"] for line in lines[1:])


def drawn_pictures(size: int, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, S, S, 3) uint8 pictures of shapes, and (n, S / patch, S / patch) int: the shape at each patch's centre."""
    random = np.random.RandomState(0)
    scale = 4
    pictures = np.empty((NUM_PICTURES, size, size, 3), np.uint8)
    labels = np.empty((NUM_PICTURES, size // patch, size // patch), np.int64)
    for number in range(NUM_PICTURES):
        picture = Image.new("RGB", (scale * size, scale * size), tuple(random.randint(0, 256, 3)))
        mask = Image.new("L", picture.size, 0)
        for _ in range(random.randint(1, 4)):
            kind = random.randint(len(SHAPES))
            edge = random.randint(size, 3 * size)
            left, top = random.randint(-edge // 4, scale * size - edge // 2, 2)
            colour = tuple(random.randint(0, 256, 3))
            for canvas, fill in ((ImageDraw.Draw(picture), colour), (ImageDraw.Draw(mask), int(kind) + 1)):
                draw_shape(canvas, SHAPES[kind], int(left), int(top), int(edge), fill)
        pictures[number] = np.asarray(picture.resize((size, size), Image.Resampling.BOX))
        centre = scale * patch // 2
        labels[number] = np.asarray(mask)[centre :: scale * patch, centre :: scale * patch]
    return pictures, labels


def draw_shape(canvas: ImageDraw.ImageDraw, kind: str, left: int, top: int, edge: int, fill: Any) -> None:
    box = (left, top, left + edge, top + edge)
    third = edge // 3
    if kind == "ellipse":
        canvas.ellipse(box, fill=fill)
    elif kind == "rectangle":
        canvas.rectangle(box, fill=fill)
    elif kind == "triangle":
        canvas.polygon([(left, top + edge), (left + edge, top + edge), (left + edge // 2, top)], fill=fill)
    elif kind == "cross":
        canvas.rectangle((left + third, top, left + 2 * third, top + edge), fill=fill)
        canvas.rectangle((left, top + third, left + edge, top + 2 * third), fill=fill)
    else:
        canvas.ellipse(box, outline=fill, width=edge // 5)


def dense_accuracy(config: RunConfig) -> float:
    """Of a linear classifier on the features of patches, fitted on two thirds of the pictures."""
    storage = Storage(config.storage_uri)
    module: Any = build_trained_model(storage, list_checkpoints(storage)[-1], config.model, ema=True).eval()
    trunk = module.visual.trunk
    pictures, labels = drawn_pictures(trunk.patch_embed.img_size[0], trunk.patch_embed.patch_size[0])
    image_tokens = ImageTokens(module.visual)
    module.visual.requires_grad_(False)
    found = []
    for part in torch.from_numpy(pictures).split(250):
        module.visual(normalize_pixels(part, config.model))
        found.append(image_tokens.take())
    features = torch.nn.functional.normalize(torch.cat(found), dim=-1)
    shapes = torch.from_numpy(labels).flatten(1)
    halves = []
    for part in (slice(0, 2 * NUM_PICTURES // 3), slice(2 * NUM_PICTURES // 3, None)):
        has_shape = shapes[part] > 0
        halves.append((features[part][has_shape], [str(each) for each in shapes[part][has_shape].tolist()]))
    return linear_probe(*halves[0], *halves[1])["top1"]


def figures_of(config: RunConfig) -> dict[str, float]:
    storage = Storage(config.storage_uri)
    evaluation = config.eval.model_copy(update={"sets": {SET: config.eval.sets[SET]}})
    info = list_checkpoints(storage)[-1]
    job = EvaluationJob(config.storage_uri, info, config.model, config.data, evaluation, config.embeddings)
    zero_shot = evaluate_checkpoint(job)["zero_shot"][SET]
    return {"top1": zero_shot["top1"], "top5": zero_shot["top5"], "dense": dense_accuracy(config)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equal", choices=["samples", "time"], default="samples")
    parser.add_argument("--samples", type=int, default=51200, help="of the run without terms")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    ensure_emoji()
    batch = 128
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = dict.fromkeys(options.variants, options.samples)
        if options.equal == "time":
            rates = {variant: train(variant, folder / "rates", 40 * batch, 0)[1] for variant in VARIANTS}
            lengths = {
                variant: round(options.samples * rates[variant] / rates["none"] / batch) * batch for variant in lengths
            }
        repetitions = []
        for seed in range(options.seeds):
            found: dict[str, float] = {}
            for variant, length in lengths.items():
                config, rate = train(variant, folder, length, seed)
                own = figures_of(config) | {"samples": length, "samples_per_s": rate}
                found |= {f"{variant}_{key}": value for key, value in own.items()}
                print(f"seed {seed} {variant}: {own}", flush=True)
            repetitions.append(found)
    figures = {}
    for key in repetitions[0]:
        values = [each[key] for each in repetitions]
        figures[f"{key}_mean"] = statistics.mean(values)
        figures[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
    report(f"recipe-equal-{options.equal}", repetitions, figures, options.save)


if __name__ == "__main__":
    main()
