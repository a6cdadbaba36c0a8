"""Measure the speed of the loss over ranks, and the bytes that it sends.

For each number of ranks, in the same gloo processes of one thread each, alternating: `ring_sigmoid_loss` and every
`dist_impl` of open_clip's `SigLipLoss`, forward and backward, on the same features. The time is that of the slowest
rank. `speedup_open_clip` is against the fastest `dist_impl`. `bytes_over_floor` is the traffic of the loopback device
during sigray's passes, TCP headers and the check of all ranks' shapes included. It is divided by the bytes of (R - 1) b
D features and float32 gradients per rank. The result has the worst of the numbers of ranks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from open_clip.loss import SigLipLoss

from benchmarks.common import report
from sigray.losses import ring_sigmoid_loss
from tests.helpers.ranks import run_on_ranks
from tests.helpers.reference import random_features

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


def loopback_bytes() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))


def measure(
    rank: int, world_size: int, batch_size: int, dim: int, num_repetitions: int
) -> tuple[list[dict[str, float]], float]:
    """Seconds of each contestant per repetition on this rank, and bytes sent per pass of sigray."""
    num_pairs = batch_size // world_size
    part = slice(rank * num_pairs, (rank + 1) * num_pairs)
    image, text = (random_features(batch_size, dim, seed=seed, dtype=torch.float32)[part] for seed in (0, 1))
    leaves = [tensor.clone().requires_grad_() for tensor in (image, text, torch.tensor(10.0), torch.tensor(-10.0))]
    losses = {"sigray": ring_sigmoid_loss}
    losses |= {impl: SigLipLoss(rank=rank, world_size=world_size, dist_impl=impl) for impl in DIST_IMPLS}

    def run(name: str) -> torch.Tensor:
        for leaf in leaves:
            leaf.grad = None
        value = losses[name](*leaves)
        value.backward()
        return value.detach()

    values = {name: run(name) for name in losses}  # also the warm-up
    for value in values.values():
        dist.all_reduce(value)
        assert torch.allclose(value, values["sigray"], rtol=1e-4), values
    repetitions = []
    for _ in range(num_repetitions):
        times = {}
        for name in losses:
            dist.barrier()
            begin = time.perf_counter()
            run(name)
            times[name] = time.perf_counter() - begin
        repetitions.append(times)
    dist.barrier()
    before, num_passes = loopback_bytes(), 4
    for _ in range(num_passes):
        run("sigray")
    dist.barrier()
    return repetitions, (loopback_bytes() - before) / num_passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch-size", type=int, default=8192, help="over all ranks")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    repetitions: list[dict[str, float]] = [{} for _ in range(options.repetitions)]
    speedups, ratios = [], []
    for world_size in options.ranks:
        arguments = options.batch_size, options.dim, options.repetitions
        ranks = run_on_ranks(world_size, measure, *arguments)
        series = {
            name: [max(rank[0][number][name] for rank in ranks) for number in range(options.repetitions)]
            for name in ("sigray", *DIST_IMPLS)
        }
        for number, repetition in enumerate(repetitions):
            repetition |= {f"ranks{world_size}_{name}_ms": 1000 * times[number] for name, times in series.items()}
        medians = {name: statistics.median(times) for name, times in series.items()}
        ours = series["sigray"]
        against = {
            name: statistics.median(a / b for a, b in zip(series[name], ours, strict=True)) for name in DIST_IMPLS
        }
        floor = world_size * (world_size - 1) * (options.batch_size // world_size) * options.dim * (4 + 4)
        speedups.append(min(against.values()))
        ratios.append(ranks[0][1] / floor)
        print(
            f"{world_size} ranks: ms " + ", ".join(f"{name} {1000 * value:.0f}" for name, value in medians.items()),
            f"; {ranks[0][1] / world_size / 1e6:.2f} MB per rank and pass, {ratios[-1]:.4f} of the floor",
            flush=True,
        )
    report("ring", repetitions, {"speedup_open_clip": min(speedups), "bytes_over_floor": max(ratios)}, options.save)


if __name__ == "__main__":
    main()
