"""What is random in a run, by docs/data.md ("The order, exactly" and after) and docs/numerics.md ("Draws of a step").

Imports nothing of sigray and takes the slow, obvious way: `tests/golden/make.py` makes the golden values from it, and
`tests/helpers/plain_run.py` trains with it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections.abc import Iterator, Sequence

import numpy as np

Place = tuple[int, int, int]
"""Epoch, shard, index in the shard."""

CYCLE = 4096


def permutation(length: int, *seed: int) -> list[int]:
    return np.random.RandomState(list(seed)).permutation(length).tolist()


def epoch_order(
    shard_sizes: Sequence[int], seed: Sequence[int], epoch: int, num_lanes: int, shuffle_window: int
) -> list[tuple[int, int]]:
    """(shard, index) at each position of one epoch of one dataset."""
    line = [
        (shard, index)
        for shard in permutation(len(shard_sizes), *seed, 0, epoch)
        for index in range(shard_sizes[shard])
    ]
    segments, begin = [], 0
    for number in range(num_lanes):
        length = len(line) // num_lanes + (number < len(line) % num_lanes)
        segment, shuffled = line[begin : begin + length], []
        begin += length
        num_windows = -(-length // shuffle_window)
        for window in range(num_windows):
            part = segment[window * length // num_windows : (window + 1) * length // num_windows]
            shuffled += [part[slot] for slot in permutation(len(part), *seed, 1, epoch, number, window)]
        segments.append(shuffled)
    return [segments[position % num_lanes][position // num_lanes] for position in range(len(line))]


def turns(weights: Sequence[float]) -> list[int]:
    """The dataset whose turn it is at each position of a cycle."""
    if len(weights) == 1:
        return [0]
    shares = [weight / sum(weights) * CYCLE for weight in weights]
    counts = [max(math.floor(share), 1) for share in shares]
    by_remainder = sorted(range(len(weights)), key=lambda number: counts[number] - shares[number])
    for number in by_remainder[: max(CYCLE - sum(counts), 0)]:
        counts[number] += 1
    counts[counts.index(max(counts))] -= sum(counts) - CYCLE
    credit, order = [0] * len(weights), []
    for _ in range(CYCLE):
        credit = [have + count for have, count in zip(credit, counts, strict=True)]
        chosen = credit.index(max(credit))
        credit[chosen] -= CYCLE
        order.append(chosen)
    return order


def global_batches(
    datasets: Sequence[Sequence[int]],
    weights: Sequence[float],
    *,
    seed: int,
    num_lanes: int,
    shuffle_window: int,
    global_batch_size: int,
    num_steps: int,
) -> list[list[Place]]:
    """The pairs of each step, in the order of the global batch. Shards are numbered through all datasets."""
    cycle = turns(weights)
    first_shards = [sum(map(len, datasets[:number])) for number in range(len(datasets))]
    epochs: dict[tuple[int, int], list[tuple[int, int]]] = {}
    counts, batches = [0] * len(datasets), []
    for step in range(num_steps):
        batch: list[tuple[int, int, int]] = []  # dataset, lane, position in the dataset's stream
        for position in range(step * global_batch_size, (step + 1) * global_batch_size):
            dataset = cycle[position % len(cycle)]
            batch.append((dataset, counts[dataset] % num_lanes, counts[dataset]))
            counts[dataset] += 1
        places = []
        for dataset, _, position in sorted(batch):
            epoch, slot = divmod(position, sum(datasets[dataset]))
            if (dataset, epoch) not in epochs:
                seeds = (seed, dataset) if dataset else (seed,)
                order = epoch_order(datasets[dataset], seeds, epoch, num_lanes, shuffle_window)
                epochs[dataset, epoch] = order
            shard, index = epochs[dataset, epoch][slot]
            places.append((epoch, first_shards[dataset] + shard, index))
        batches.append(places)
    return batches


def uniforms(seed: int, place: Place, purpose: str) -> Iterator[float]:
    """The numbers in [0, 1) of a sample in an epoch, for one purpose."""
    for counter in itertools.count():
        content = struct.pack("<5q", seed, *place, counter)
        digest = hashlib.blake2b(content, digest_size=64, person=purpose.encode()).digest()
        for start in range(0, 64, 8):
            yield (int.from_bytes(digest[start : start + 8], "little") >> 11) / 2**53


def crop_box(
    height: int, width: int, scale: Sequence[float], ratio: Sequence[float], numbers: Iterator[float]
) -> tuple[int, int, int, int]:
    """Top, left, height, width."""
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * next(numbers))
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * next(numbers))
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 1 <= box_height <= height and 1 <= box_width <= width:
            top = int(next(numbers) * (height - box_height + 1))
            return top, int(next(numbers) * (width - box_width + 1)), box_height, box_width
    box_height, box_width = min(height, max(1, round(width / ratio[0]))), min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def choose_caption(sources: dict[str, float], captions: dict[str, list[str]], numbers: Iterator[float]) -> str:
    """One caption of a sample.

    Args:
        sources: data.captions.
        captions: by source, of those sources that the sample has.
    """
    heaviest_first = sorted(sources, key=lambda source: -sources[source])
    arrivals = {source: -math.log1p(-next(numbers)) / sources[source] for source in heaviest_first}
    found = captions[min(captions, key=lambda source: arrivals[source])]
    return found[int(next(numbers) * len(found))]


IMAGE, TEXT, ALIGNMENT, DEAL = range(4)
NOISE = {
    "image": (IMAGE,),
    "text": (TEXT,),
    "alignment": (ALIGNMENT,),
    "image_text": (IMAGE, TEXT),
    "all": (IMAGE, TEXT, ALIGNMENT),
}


def place_hash(place: Place, seed: int, purpose: int) -> int:
    mask, h = 2**64 - 1, seed * 16 + purpose
    for number in place:
        h = (h * 0x9E3779B97F4A7C15 + number + 1) & mask
        h = ((h ^ h >> 30) * 0xBF58476D1CE4E5B9) & mask
        h = ((h ^ h >> 27) * 0x94D049BB133111EB) & mask
        h = h ^ h >> 31
    return h


def is_corrupted(place: Place, seed: int, purpose: int, fraction: float) -> bool:
    return (place_hash(place, seed, purpose) >> 11) / 2**53 < fraction


def noise_image(place: Place, seed: int, size: int) -> np.ndarray:
    """(size, size, 3) uint8."""
    random = np.random.RandomState(place_hash(place, seed, IMAGE) % 2**32)
    return np.frombuffer(random.bytes(size * size * 3), np.uint8).reshape(size, size, 3)


def noise_caption(place: Place, seed: int, context_length: int, vocab_size: int) -> list[int]:
    """Tokens, padded with zeros."""
    random = np.random.RandomState(place_hash(place, seed, TEXT) % 2**32)
    length = random.randint(1, context_length + 1)
    return [*random.randint(1, vocab_size, size=length).tolist(), *[0] * (context_length - length)]


def caption_rows(places: Sequence[Place], seed: int, fraction: float) -> list[int]:
    """For each pair of a global batch, the pair whose caption it gets."""
    rows = list(range(len(places)))
    chosen = [row for row in rows if is_corrupted(places[row], seed, ALIGNMENT, fraction)]
    order = sorted(chosen, key=lambda row: place_hash(places[row], seed, DEAL))
    for number, row in enumerate(order):
        rows[row] = order[(number + 1) % len(order)]
    return rows


def step_seed(*numbers: int) -> int:
    """32 bits of (seed, step) for random negatives, or of (seed, step, rank, micro-batch) for the towers' draws."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _mixed(index: int, seed: int) -> int:
    h = (index + (seed % 2**20) * 0x9E3779B1) % 2**32
    for factor in (0x5BD1E995, 0x2C9277B5):
        h = ((h ^ h >> 15) * factor) % 2**31
    return h ^ h >> 13


def is_kept(image: int, text: int, seed: int, fraction: float) -> bool:
    """Whether `loss.negatives: random` keeps the negative of an image and a text of the global batch."""
    h = _mixed(image, 2 * seed) ^ _mixed(text, 2 * seed + 1)
    for factor in (0x2C1B3C6D, 0x297A2D39):
        h = (h * factor) % 2**32
        h = h ^ h >> 15
    return h % 2**31 < min(round(fraction * 2**31), 2**31 - 1)
