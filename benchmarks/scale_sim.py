"""How long does it take to plan a run of a billion samples on 1,000 training workers, and how much memory?

    python -m benchmarks.scale_sim [--save]

No cluster and no data: the real code that decides, at the size at which it might become slow. 100,000 shards with a
billion samples, 1,000 training workers, 2,000 data-shard workers, global batch 32,000.

    manifest_s    make the manifest's JSON, read it again, compare it with itself, as a resume does
    order_s       the order's first epoch: permute the shards, lay them end to end
    deal_s        100 steps' parts of one training worker: each worker does this for itself, step by step
    locate_s      a window of every lane: each of 2,000 data-shard workers finds its first window's shards
    resume_s      a new order, and the place of a step in the last epoch found on each worker
    policy_s      10,000 failures judged, and room looked for in every size of a range of 1 to 1,000
    plan_s        all of these
    memory_gb     by how much the process grew, at most
    ring_8_ms ... the ring's model for a device's part of 32 pairs, D 768, bf16, beside an all-gather
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable

from benchmarks.common import peak_growth_mib, report
from sigray.orchestrator.batch import usable_sizes
from sigray.orchestrator.device_kinds import DEVICES
from sigray.orchestrator.run.policy import (
    Attempt,
    Failure,
    after_failure,
    sizes_to_try,
    wanted_data_workers,
)
from sigray.workers.data.manifest import Manifest, Shard
from sigray.workers.data.order import StreamOrder

NUM_SHARDS, NUM_SAMPLES = 100_000, 1_000_000_000
NUM_WORKERS, NUM_DATA_WORKERS, NUM_LANES = 1_000, 2_000, 2_000
BATCH, WINDOW, BLOCK = 32_000, 1_024, 128
PART, DIM, BYTES = 32, 768, 2  # pairs of one device, width of a feature, bytes of a number on the ring


def make_manifest() -> Manifest:
    """Uneven shards, a billion samples in all, with the marks that a header pass leaves (every 256th sample)."""
    draw = random.Random(0)
    mean = NUM_SAMPLES // NUM_SHARDS
    sizes = [draw.randrange(mean // 2, mean + mean // 2) for _ in range(NUM_SHARDS)]
    sizes[-1] += NUM_SAMPLES - sum(sizes)
    return Manifest(
        tuple(
            Shard(
                f"s3://bucket/tars/train-{number:06d}.tar",
                size * 35_000,
                size,
                f"{draw.getrandbits(128):032x}",
                marks=tuple(range(256 * 35_000, size * 35_000, 256 * 35_000)),
            )
            for number, size in enumerate(sizes)
        )
    )


def build(manifest: Manifest) -> StreamOrder:
    """As `sigray.workers.data.worker.build_order`, for a run with this seed, these lanes and windows."""
    sizes = [[shard.num_samples for shard in shards] for shards in manifest.datasets().values()]
    return StreamOrder(sizes, seed=0, num_lanes=NUM_LANES, shuffle_window=WINDOW)


def through_json(manifest: Manifest) -> None:
    again = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert again == manifest
    assert manifest.differences(again) == []


def deal(order: StreamOrder) -> None:
    """What a training worker computes for itself, over 100 steps."""
    for step in range(100):
        rank = step * 10 % NUM_WORKERS  # the work is the same for each
        part = order.rank_part(step, BATCH, rank, NUM_WORKERS)
        assert sum(piece.stop - piece.start for piece in part) == BATCH // NUM_WORKERS


def check_parts(order: StreamOrder) -> None:
    """The parts of 1,000 workers are the batch; a run does not compute this, so its time is not counted."""
    parts = [order.rank_part(7, BATCH, rank, NUM_WORKERS) for rank in range(0, NUM_WORKERS, 50)]
    assert all(sum(piece.stop - piece.start for piece in part) == BATCH // NUM_WORKERS for part in parts)
    assert sum(piece.stop - piece.start for piece in order.rank_part(7, BATCH, 0, 1)) == BATCH


def locate(order: StreamOrder) -> None:
    """A lane's first window on each data-shard worker: which shards must be opened."""
    for lane in range(NUM_LANES):
        window, _ = order.window(lane, 0)
        dataset = order.dataset_of(lane)
        first = dataset.locate(window.epoch, window.start)
        last = dataset.locate(window.epoch, window.start + len(window.permutation) - 1)
        assert first.epoch == last.epoch == 0


def resume(manifest: Manifest) -> None:
    """A worker that starts in the middle of the last of ten epochs."""
    order = build(manifest)
    step = 19 * NUM_SAMPLES // 2 // BATCH
    for lane in range(NUM_LANES):
        order.window(lane, order.next_index(lane, step, BATCH))
    order.dataset_of(0).locate(9, NUM_SAMPLES // 2)


def decide() -> None:
    sizes = usable_sizes(1, NUM_WORKERS, BATCH)
    failures = [Attempt(360.0 * n, 10 * n, 10 * n + 5, Failure.DIED, "gone") for n in range(10)]
    for number in range(10_000):
        after_failure(failures[: 1 + number % 10], 10)
        sizes_to_try(sizes, float(number % 60), 10.0)
    lines = [{"data/wait_pct": 30.0, "data/busy_workers": 900.0} for _ in range(1000)]
    wanted_data_workers(lines, 1_000, 1, NUM_DATA_WORKERS)


def ring_ms(num_devices: int, kind: str) -> tuple[float, float]:
    """Milliseconds to bring every text feature past a device, and gradients home: ring, and all-gather.

    The ring sends n - 1 chunks of texts and as many of their gradients, half of them each way round; each hop has a
    latency of its own. An all-gather brings all texts, and a reduce-scatter their gradients: the same bytes on the
    wire, one start each, and n chunks in memory instead of two.
    """
    device, hop_s = DEVICES[kind], 3e-6 if num_devices <= DEVICES[kind].island else 15e-6
    chunk = PART * DIM * BYTES
    sent = 2 * (num_devices - 1) * chunk / device.link(num_devices)
    hops = -(-(num_devices - 1) // 2)
    return 1e3 * (sent + 2 * hops * hop_s), 1e3 * (sent + 2 * hop_s)


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/")
    options = parser.parse_args()
    times: dict[str, float] = {}

    def plan() -> None:
        manifest = make_manifest()
        assert manifest.num_samples == NUM_SAMPLES
        times["manifest_s"] = seconds(lambda: through_json(manifest))
        order = build(manifest)
        times["order_s"] = seconds(lambda: order.dataset_of(0).locate(0, 0))
        times["deal_s"] = seconds(lambda: deal(order))
        check_parts(order)
        times["locate_s"] = seconds(lambda: locate(order))
        times["resume_s"] = seconds(lambda: resume(manifest))
        times["policy_s"] = seconds(decide)

    memory_gb = peak_growth_mib(plan) * 2**20 / 1e9
    rings = []
    for kind in ("tpu-v4", "h100"):
        for num_devices in (8, 64, 256, 1024):
            ring, gather = ring_ms(num_devices, kind)
            memory = 2 * PART * DIM * BYTES, num_devices * PART * DIM * BYTES
            sent_mb = 2 * (num_devices - 1) * PART * DIM * BYTES / 1e6
            print(
                f"{kind} x {num_devices}: {sent_mb:.1f} MB sent by each device, ring {ring:.3f} ms and "
                f"{memory[0] / 1e6:.2f} MB, all-gather {gather:.3f} ms and {memory[1] / 1e6:.2f} MB (a model)"
            )
            rings.append({"devices": num_devices, "ring_ms": ring, "gather_ms": gather, "sent_mb": sent_mb})
    report("scale-sim", [times, *rings], {"plan_s": sum(times.values()), "memory_gb": memory_gb}, options.save)


if __name__ == "__main__":
    main()
