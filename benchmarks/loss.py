"""Measure the speed of the loss, forward and backward, and its memory.

In one process, alternating, on the same features:

    sigray            sigray.losses.sigmoid_loss
    floor             the three matrix products of the tiles alone, by torch, in sigray's dtype of products
    open_clip         open_clip.loss.SigLipLoss on one rank
    plain, compiled   the equation under autograd, and torch.compile of it
    jax               big_vision's formula (trainers/proj/image_text/siglip.py) under jax.jit, if jax is installed:
                      uv pip install -e '.[bench]'; on CPU only
    siglip-kernel     fused_siglip_loss of the package of that name, if it is installed; on CUDA only

Speed-ups and floor ratios are medians over repetitions of ratios within a repetition. The result has the worst of the
widths and batch sizes. A contestant that takes longer than `--patience` seconds is measured only once: bfloat16
products on a CPU without the instructions. Memory is the growth of the resident set above the features, less the two
feature gradients; on CUDA, the growth of the allocator.

    python -m benchmarks.loss --save
    python -m benchmarks.loss --device cuda --save
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from open_clip.loss import SigLipLoss
from torch import Tensor

from benchmarks.common import cuda_growth_mib, peak_growth_mib, report
from sigray.losses import sigmoid_loss, sigmoid_loss_plain
from sigray.losses.tiles import default_tile_size, product_dtype
from tests.helpers.reference import random_features

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# Sizes for all contestants, and smaller ones whose time is that of launching operations.
BATCH_SIZES = {"cpu": ([8192], [1024, 256]), "cuda": ([32768, 8192], [1024])}
LARGE = {"cpu": 262_144, "cuda": 1_048_576}
Contestant = Callable[[], object]


def leaves(batch_size: int, dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    features = [random_features(batch_size, dim, seed=seed, dtype=dtype) for seed in (0, 1)]
    scalars = torch.tensor(10.0), torch.tensor(-10.0)
    return [tensor.to(device).requires_grad_() for tensor in (*features, *scalars)]


def backward_of(loss: Callable[..., Tensor], inputs: list[Tensor]) -> Contestant:
    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        loss(*inputs).backward()

    return run


def floor(inputs: list[Tensor]) -> Contestant:
    image, text = (tensor.detach().to(product_dtype(tensor)) for tensor in inputs[:2])
    size = min(default_tile_size(image.device), len(image))
    tile = torch.rand(size, size, device=image.device).to(image.dtype)
    gradients = torch.zeros_like(image), torch.zeros_like(text)
    spare = torch.empty_like(image[:size])

    def run() -> None:
        for top in range(0, len(image), size):
            for left in range(0, len(text), size):
                rows, columns = slice(top, top + size), slice(left, left + size)
                torch.mm(image[rows], text[columns].T, out=tile)
                if image.dtype == torch.float32:
                    gradients[0][rows].addmm_(tile, text[columns])
                    gradients[1][columns].addmm_(tile.T, image[rows])
                else:
                    torch.mm(tile, text[columns], out=spare)
                    torch.mm(tile.T, image[rows], out=spare)

    return run


def jax_loss(inputs: list[Tensor]) -> Contestant | None:
    try:
        import jax
    except ImportError:
        return None
    jnp = jax.numpy

    def loss(image, text, scale, bias):  # type: ignore[no-untyped-def]
        logits = image @ text.T * scale + bias
        signs = 2 * jnp.eye(len(image)) - 1
        return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signs * logits), axis=-1))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    dtype = jnp.bfloat16 if inputs[0].dtype == torch.bfloat16 else jnp.float32
    arrays = [jnp.asarray(tensor.detach().float().numpy(), dtype=dtype) for tensor in inputs]
    return lambda: jax.block_until_ready(step(*arrays))


def siglip_kernel(inputs: list[Tensor]) -> Contestant | None:
    try:
        from siglip_kernel import fused_siglip_loss
    except ImportError:
        print("siglip-kernel is not installed")
        return None
    image, text, scale, bias = inputs
    return backward_of(fused_siglip_loss, [image, text, scale.detach().log().requires_grad_(), bias])


def contestants(batch_size: int, dim: int, dtype: torch.dtype, all_peers: bool, device: str) -> dict[str, Contestant]:
    inputs = leaves(batch_size, dim, dtype, device)
    found: dict[str, Contestant | None] = {
        "sigray": backward_of(sigmoid_loss, inputs),
        "floor": floor(inputs),
        "open_clip": backward_of(SigLipLoss(), inputs),
    }
    if all_peers and dtype == torch.bfloat16 and product_dtype(inputs[0]) != torch.bfloat16:
        print("this processor has no bfloat16 instructions: of the peers, only open_clip is measured in bfloat16")
    elif all_peers:
        found["plain"] = backward_of(sigmoid_loss_plain, inputs)
        found["compiled"] = backward_of(torch.compile(sigmoid_loss_plain), inputs)
        if device == "cpu":
            found["jax"] = jax_loss(inputs)
            if found["jax"] is None:
                print("jax is not installed: big_vision's formula is left out")
    if device == "cuda":
        found["siglip_kernel"] = siglip_kernel(inputs)
    return {name: contestant for name, contestant in found.items() if contestant}


def repeat(run: Contestant, times: int) -> Contestant:
    return lambda: [run() for _ in range(times)]


def timed(run: Contestant) -> float:
    """Seconds until the device is done."""
    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    finish()
    begin = time.perf_counter()
    run()
    finish()
    return time.perf_counter() - begin


def alternate(runs: dict[str, Contestant], num_repetitions: int, patience_s: float) -> dict[str, list[float]]:
    """Seconds of each contestant per repetition, after one warm-up."""
    first = {name: timed(run) for name, run in runs.items()}
    slow = {name: seconds for name, seconds in first.items() if seconds > patience_s}
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for _ in range(num_repetitions):
        # In another order each time: freed memory and spinning threads of one contestant affect all others.
        for name in order.sample(list(runs), len(runs)):
            times[name].append(slow[name] if name in slow else timed(runs[name]))
    return times


def peak_mib(batch_size: int, dim: int, device: str) -> float:
    """Peak MiB of a forward and backward pass in float32, above features and gradients."""
    inputs = leaves(batch_size, dim, torch.float32, device)
    backward_of(sigmoid_loss, leaves(8, dim, torch.float32, device))()
    gradients = 2 * batch_size * dim * 4 / 2**20
    grown = cuda_growth_mib if device == "cuda" else peak_growth_mib
    return grown(backward_of(sigmoid_loss, inputs)) - gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--patience", type=float, default=20, metavar="SECONDS")
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 768])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", choices=BATCH_SIZES, default="cpu")
    parser.add_argument(
        "--large", action="store_true", help="also one pass at B = 262,144 (CUDA: 1,048,576), D = 64 (minutes)"
    )
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    repetitions: list[dict[str, float]] = [{} for _ in range(options.repetitions)]

    device = options.device
    memory = {f"{size // 1024}k": peak_mib(size, 64, device) for size in (8192, 16384, 32768, 65536)}
    print("peak MiB at D = 64: " + ", ".join(f"{name} {mib:.0f}" for name, mib in memory.items()))
    figures["memory_mb_32k"] = peak_mib(32768, 512, device)
    # open_clip keeps logits, their product with the labels and the labels for its backward pass.
    print(
        f"peak MiB at B = 32,768, D = 512: {figures['memory_mb_32k']:.0f} (B x B float32 alone: {32768**2 * 4 >> 20})"
    )

    for label in options.dtypes:
        speedups, floors, small = [], [], []
        large_sizes, small_sizes = BATCH_SIZES[device]
        for batch_size in large_sizes + small_sizes:
            for dim in options.dims:
                large = batch_size in large_sizes
                runs = contestants(batch_size, dim, DTYPES[label], large, device)
                # Passes in a row: a clock tick must not matter.
                inner = 20 if not large else 1 if device == "cpu" else 3
                runs = {name: repeat(run, inner) for name, run in runs.items()}
                times = alternate(runs, options.repetitions, options.patience)
                medians = {name: statistics.median(series) / inner for name, series in times.items()}
                line = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in medians.items())
                print(f"B = {batch_size}, D = {dim}, {label}: ms {line}", flush=True)
                for number, repetition in enumerate(repetitions):
                    for name, series in times.items():
                        repetition[f"{label}_{batch_size}_{dim}_{name}_ms"] = 1000 * series[number] / inner

                def ratio(name: str, times: dict[str, list[float]] = times) -> float:
                    return statistics.median(a / b for a, b in zip(times[name], times["sigray"], strict=True))

                if device == "cuda":
                    kernel = ratio("siglip_kernel") if "siglip_kernel" in times else float("nan")
                    print(f"    open_clip / sigray {ratio('open_clip'):.3g}, siglip_kernel / sigray {kernel:.3g}")
                    figures[f"speedup_siglip_kernel_{label}_{batch_size}_{dim}"] = kernel
                if large:
                    speedups.append(ratio("open_clip"))
                    floors.append(ratio("floor"))
                else:
                    small.append(ratio("open_clip"))
        figures |= {
            f"speedup_open_clip_{label}": min(speedups),
            f"floor_ratio_{label}": min(floors),
            f"small_speedup_open_clip_{label}": min(small),
        }
    if options.large:
        inputs = leaves(LARGE[device], 64, torch.float32, device)
        seconds = figures[f"seconds_{LARGE[device]}"] = timed(backward_of(sigmoid_loss, inputs))
        print(f"B = {LARGE[device]:,}, D = 64: {seconds:.1f} s")
    order = ["speedup_open_clip_f32", "speedup_open_clip_bf16", "floor_ratio_f32", "floor_ratio_bf16", "memory_mb_32k"]
    last = {name: figures[name] for name in order if name in figures}
    name = "loss" if device == "cpu" else f"loss-{device}"
    if len(options.dtypes) < len(DTYPES):
        name += "-" + "-".join(options.dtypes)
    rest = {key: value for key, value in figures.items() if key not in last}
    report(name, repetitions, rest | last, options.save)


if __name__ == "__main__":
    main()
