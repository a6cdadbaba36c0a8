"""What does each term of SigLIP 2's recipe cost, beside the sum of its parts measured apart?

`{term}_step_ratio`: time of a step with the term over that of a step with the contrastive loss alone.
`{term}_waste`: what the term adds to a step, over the sum of its parts. The parts: forward and backward pass of the
decoder on given image tokens; forward pass of the teacher; forward and backward pass of the student with its loss; the
update of the parameters that the term adds. 1: nothing is wasted. `all` shares its teacher between both terms of
self-distillation, and so does its sum. Contestants take turns, repetition by repetition; figures are medians.

`views_decode_ratio`: CPU time of a data-shard worker for an image with a global view and eight local ones, over that
for the image alone; of photographs to 224 pixels (benchmarks/photo_tars.py).
"""

from __future__ import annotations

import argparse
import statistics
import tarfile
import time
from collections.abc import Callable
from typing import IO, Any, cast

import numpy as np
import torch

from benchmarks.common import report
from benchmarks.photo_tars import PHOTOS, ensure_photos
from sigray.workers.config import DataConfig, DistillConfig, LossConfig, ModelConfig, OptimConfig
from sigray.workers.data.decode import Decoder, sample_random
from sigray.workers.data.loader import Batch
from sigray.workers.data.views import Pixels, Views, split
from sigray.workers.device import Device, open_device
from sigray.workers.model.tokenizer import CaptionEnds
from sigray.workers.training.captioner import Captioner
from sigray.workers.training.phases import Schedule
from sigray.workers.training.step import Trainer
from sigray.workers.training.student import Student

SIZE, LENGTH, VOCABULARY = 128, 32, 8192
TEXT = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 192, "heads": 3, "layers": 6}
VISION = {"timm_model_name": f"siglip_vit_w192_d6_h3_m768_p16_s{SIZE}", "timm_pool": "map", "timm_proj": "none"}
MODEL = ModelConfig(
    towers={"embed_dim": 192, "vision_cfg": VISION | {"image_size": SIZE}, "text_cfg": TEXT},
    decoder={},
    heads={"hidden": 512, "bottleneck": 128, "prototypes": 4096},
)
ENDS = CaptionEnds(0, 0)
NUM_PHOTOS = 100
TERMS = {
    "contrastive": LossConfig(),
    "captions": LossConfig(caption_weight=1),
    "local": LossConfig(distill=DistillConfig(masked_weight=0)),
    "masked": LossConfig(distill=DistillConfig(local_weight=0)),
    "all": LossConfig(caption_weight=1, distill=DistillConfig()),
}
ADDS = {"captions": ["decoder"], "local": ["distiller"], "masked": ["distiller"], "all": ["decoder", "distiller"]}


def make_trainer(loss: LossConfig, device: Device, num_pairs: int) -> Trainer:
    return Trainer(
        MODEL,
        OptimConfig(schedule="constant"),
        loss,
        device,
        schedule=Schedule(num_pairs),
        global_batch_size=num_pairs,
        micro_batch_size=None,
        seed=0,
        caption_ends=ENDS,
        ema=100 * num_pairs,
    )


def make_batch(trainer: Trainer, num_pairs: int) -> Batch:
    """Noise; captions fill a quarter to a half of the context."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (num_pairs, *trainer.pixels.shape), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, VOCABULARY, (num_pairs, LENGTH), generator=generator).int()
    for row in range(num_pairs):
        tokens[row, LENGTH // 4 + row % (LENGTH // 4) :] = 0
    samples = np.stack([np.zeros(num_pairs), np.zeros(num_pairs), np.arange(num_pairs)], axis=1).astype(np.int64)
    return Batch(0, pixels, tokens, samples=samples, keys=[""] * num_pairs, replaced=np.zeros(num_pairs, bool))


def parts_of(trainer: Trainer, batch: Batch, device: Device, term: str) -> list[Callable[[], object]]:
    """The parts of a term, each to be timed on its own."""
    loss = TERMS[term]
    rows = slice(0, len(batch.tokens))
    parts: list[Callable[[], object]] = []
    if loss.caption_weight:
        captioner = Captioner(trainer.module, loss, ENDS, 0, is_recorded=False)
        is_parallel, weights, places = captioner.targets(batch, rows)
        seen = torch.randn(len(batch.tokens), (SIZE // 16) ** 2, 192, requires_grad=True)
        decoder: Any = trainer.module.get_submodule("decoder")
        parts.append(lambda: decoder(seen, batch.tokens, is_parallel, weights, 0, places).backward())
    if loss.distill is not None:
        student = Student(trainer.module, MODEL, loss.distill, lambda parameter: parameter, device, 0)
        views = split(batch.images, trainer.pixels)[1:]
        targets = student.targets(batch, rows)
        parts.append(lambda: sum(student.encode(*views, *targets).values()).backward())  # type: ignore[union-attr]
    added = [p for name in ADDS[term] for p in trainer.module.get_submodule(name).parameters()]
    optimizer = torch.optim.AdamW(added, fused=True)
    for parameter in added:
        parameter.grad = torch.zeros_like(parameter)
    parts.append(optimizer.step)
    return parts


def decoding(views: Views | None) -> Callable[[], object]:
    """Return a function that decodes some photographs."""
    decoder = Decoder(DataConfig(shards=str(PHOTOS)), 224, views=views)
    out = np.empty(Pixels(224, views).shape, np.uint8)
    with tarfile.open(sorted(PHOTOS.glob("*.tar"))[0]) as tar:
        names = [name for name in tar.getnames() if name.endswith(".jpg")][:NUM_PHOTOS]
        photos = [{"jpg": cast("IO[bytes]", tar.extractfile(name)).read()} for name in names]

    def run() -> None:
        for number, photo in enumerate(photos):
            decoder.decode_image(photo, out, sample_random(0, 0, 0, number))

    return run


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    ensure_photos(PHOTOS)
    device = open_device("cpu", 0, "fp32")
    trainers = {term: make_trainer(loss, device, options.pairs) for term, loss in TERMS.items()}
    batches = {term: make_batch(trainer, options.pairs) for term, trainer in trainers.items()}
    apart = {
        term: parts_of(make_trainer(TERMS[term], device, options.pairs), batches[term], device, term) for term in ADDS
    }
    with_views, alone = (decoding(views) for views in (Views(8, 96, (0.4, 1.0), (0.05, 0.4)), None))
    repetitions = []
    for number in range(options.repetitions + 1):
        found = {f"{term}_s": seconds(lambda term=term: trainers[term].step(batches[term])) for term in TERMS}  # type: ignore[misc]
        found |= {f"{term}_parts_s": sum(map(seconds, parts)) for term, parts in apart.items()}
        found |= {"decode_views_s": seconds(with_views), "decode_s": seconds(alone)}
        if number:  # the first is the warm-up
            repetitions.append(found)
    medians = {key: statistics.median(each[key] for each in repetitions) for key in repetitions[0]}
    figures: dict[str, float] = {}
    for term in ADDS:
        ratios = [each[f"{term}_s"] / each["contrastive_s"] for each in repetitions]
        added = [(each[f"{term}_s"] - each["contrastive_s"]) / each[f"{term}_parts_s"] for each in repetitions]
        figures |= {f"{term}_step_ratio": statistics.median(ratios), f"{term}_waste": statistics.median(added)}
    figures["views_decode_ratio"] = statistics.median(each["decode_views_s"] / each["decode_s"] for each in repetitions)
    report("terms", repetitions, medians | figures, options.save)


if __name__ == "__main__":
    main()
