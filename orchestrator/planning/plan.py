"""What a run needs, before anything starts: memory of a device, time, bytes on the wire, data-shard workers, money.

    B  pairs in the global batch       R  devices       b  pairs on one device (B / R)       D  embedding dimension
    m  pairs of a micro-batch on one device             f  bytes of a feature's number

Pure functions of a config and a `DeviceKind`. The towers, their backward pass and the optimizer are run as the training
step runs them, on tensors without memory (torch's fake tensors), while every allocation and every multiplication is
counted; the loss and the ring are formulas, because their inner loops are compiled code. docs/plan.md says what is
counted, what is assumed, and how far it was from measurements.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sigray.losses.negatives import NUM_BINS
from sigray.losses.tiles import default_tile_size, has_bfloat16_products
from sigray.orchestrator.batch import MAX_DATA_WORKER_UTILISATION, micro_batch
from sigray.orchestrator.config import ConfigError, RunConfig
from sigray.orchestrator.planning.count import TowerCosts, gathered_bytes, measure_towers
from sigray.orchestrator.planning.devices import COMPILED, CPU, DEVICES, GB, GIB, DeviceKind
from sigray.workers.config import LossConfig, Precision
from sigray.workers.model.inputs import shapes

FITS = 0.95
"""Part of a device's memory that a plan may fill: allocators leave holes."""
DECODE_S = 740e-6
"""CPU seconds per sample of a data-shard worker: photographs of 256 to 512 px to 224, with tar, tokens and hand-over,
on a core of an AMD EPYC, when torch still resized (benchmarks/results/2026-11-25-stream.json). A hardware thread whose
core is shared with somebody took 1,226 us (2026-11-27-stream.json)."""
_CPU_FRAMEWORK = 0.95 * GIB  # resident set of a training worker after its imports, measured (torch's CUDA build)
_CPU_UTILISATION = 0.5  # of the speed of a large product, see docs/plan.md
_CPU_RING_BYTES_PER_S = 1.0 * GB  # gloo over loopback; between hosts: 10 Gbit/s Ethernet
_FLOAT32 = 4
_DAY_S = 86_400


class DoesNotFit(ConfigError):
    """A run that needs more memory than its devices have; the message names both, and what would fit."""


@dataclass(frozen=True)
class Phase:
    """What a device holds at the worst moment of one part of a step, in bytes by item."""

    name: str
    items: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.items.values())


@dataclass(frozen=True)
class Plan:
    """What a run is expected to need. Bytes and seconds unless a name says otherwise.

    Attributes:
        device: the sort of device.
        num_devices: R.
        batch: pairs of a step, in all, on one device, and in one micro-batch of one device.
        parameters: numbers of them: of each tower, and how many train.
        phases: of a step, in order; the largest decides.
        memory: of one device.
        flops_per_sample: forward of each tower, forward again, backward, loss; what the device executes.
        compute_s, wire_s: of a step; they are added, though the ring hides behind the loss.
        wire: bytes that a device sends per step: features, gradients of texts, gradients of weights.
        num_steps: of the run.
        data_workers: data-shard workers that keep the devices busy; None where that is not known.
        object_store: bytes of decoded samples on their way, over all hosts.
        price_per_hour: of one device; None where it was not given.
        assumptions: what else the figures rest on, for the user.
    """

    device: DeviceKind
    num_devices: int
    batch: dict[str, int]
    parameters: dict[str, int]
    phases: list[Phase]
    memory: int
    flops_per_sample: dict[str, float]
    compute_s: float
    wire_s: float
    wire: dict[str, int]
    num_steps: int
    data_workers: int | None
    object_store: int
    price_per_hour: float | None
    assumptions: list[str] = field(default_factory=list)

    @property
    def peak(self) -> Phase:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        return self.peak.total <= FITS * self.memory

    @property
    def step_s(self) -> float:
        return self.compute_s + self.wire_s

    @property
    def samples_per_s(self) -> float:
        return self.batch["global"] / self.step_s

    @property
    def days(self) -> float:
        """Of training alone: starts, checkpoints and evaluations come on top."""
        return self.num_steps * self.step_s / _DAY_S

    @property
    def cost(self) -> float | None:
        if self.price_per_hour is None:
            return None
        return self.days * 24 * self.num_devices * self.price_per_hour

    def as_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {
            "device": {"name": self.device.name, "source": self.device.source, "utilisation": self.device.utilisation},
            "num_devices": self.num_devices,
            "batch": self.batch,
            "parameters": self.parameters,
            "memory_bytes": {
                "device": self.memory,
                "usable": int(FITS * self.memory),
                "peak": self.peak.total,
                "peak_phase": self.peak.name,
                "phases": {phase.name: phase.items for phase in self.phases},
            },
            "fits": self.fits,
            "flops_per_sample": self.flops_per_sample,
            "step_s": {"compute": self.compute_s, "wire": self.wire_s},
            "wire_bytes_per_step": self.wire,
            "samples_per_s": self.samples_per_s,
            "num_steps": self.num_steps,
            "days": self.days,
            "data_workers": self.data_workers,
            "object_store_bytes": self.object_store,
            "cost": self.cost,
            "assumptions": self.assumptions,
        }


def plan(
    config: RunConfig,
    kind: DeviceKind,
    num_devices: int,
    *,
    price_per_hour: float | None = None,
) -> Plan:
    """What a run of this config needs on so many devices of a kind. Whether it fits is in the result.

    With `embeddings.store` the locked image tower was run before, and the devices never hold it.

    Args:
        price_per_hour: of one device.

    Raises:
        ConfigError: where the batch does not divide over the devices.
    """
    if config.train.compile_blocks and "cuda" in kind.accelerators:
        kind = dataclasses.replace(kind, utilisation=kind.utilisation * COMPILED)
    stored_embeddings = config.embeddings.store is not None
    batch, accelerator = config.train.global_batch_size, kind.accelerators[0]
    if batch % num_devices:
        near = max(num_devices, batch // num_devices * num_devices)
        raise ConfigError(
            f"train.global_batch_size={batch} does not divide over {num_devices} devices: {near} or "
            f"{near + num_devices} would"
        )
    part = batch // num_devices
    micro, precision = _micro_batch_size(config, part, kind), config.train.precision
    towers = measure_towers(
        config.model,
        config.optim,
        precision,
        micro,
        cached=micro < part,
        plain_attention=accelerator == "tpu" or config.cluster.uses_xla,
        activation_checkpointing=config.train.activation_checkpointing,
        stored_embeddings=stored_embeddings,
    )
    num_micro, gathered = part // micro, 0
    if config.sharding.weights == "split":
        gathered = gathered_bytes(config.model)
        parts = ("weights", "optimizer_state", "gradients", "gradients_at_peak")
        whole = {name: getattr(towers, name) for name in parts}
        # What the update takes besides is as large as what it updates.
        towers = dataclasses.replace(
            towers,
            **{name: size // num_devices for name, size in whole.items()},
            peak=towers.peak - whole["gradients_at_peak"] + whole["gradients_at_peak"] // num_devices,
            update_peak=towers.update_peak // num_devices,
        )
    dim, f = towers.embed_dim, 2 if precision == "bf16" else _FLOAT32
    sample_bytes = _sample_bytes(config, dim * f, stored_embeddings)
    always = {
        "weights": towers.weights,
        "optimizer state": towers.optimizer_state,
        # CPU: two batches that are ready, the one in use, the one being assembled. Else: the one in use and the next.
        "input batches": (4 if accelerator == CPU else 2) * part * sample_bytes,
        "framework": int(kind.framework),
        **({"gathered weights and their gradients": gathered} if gathered else {}),
    }
    if accelerator == CPU:
        # What a checkpoint is written from: one worker's, in memory that all share.
        always["checkpoint copy"] = (towers.weights + towers.optimizer_state) // num_devices
    tile_size, products = _tile_size(config.loss, accelerator), _product_bytes(precision, accelerator)
    loss = loss_bytes(config.loss, part, dim, num_devices, f, products, tile_size)
    phases = [
        Phase(phase.name, always | phase.items)
        for phase in _phases(
            towers, 2 * part * dim * f, loss, cached=micro < part, averages=num_devices > 1 and not gathered
        )
    ]

    flops = {name: count / micro for name, count in towers.flops.items()}
    # Three products of the sigmoid loss, four of the softmax, over all pairs (docs/numerics.md).
    flops["loss"] = (3 if config.loss.name == "sigmoid" else 4) * 2.0 * batch * dim
    compute_s = part * sum(flops.values()) / (kind.peak(precision) * kind.utilisation)
    wire = wire_bytes(config.loss, part, dim, num_devices, f, towers.gradients)
    if gathered:
        # Each pass gathers all weights: forward and backward, with micro-batches forward twice; each backward pass
        # hands its gradients out.
        passes = 2 if num_micro == 1 else 3 * num_micro
        wire["gathered weights"] = passes * (num_devices - 1) * towers.weights
        wire["gradients of weights"] = num_micro * (num_devices - 1) * towers.gradients
    wire_s = sum(wire.values()) / kind.link(num_devices)
    rate = batch / (compute_s + wire_s)
    return Plan(
        device=kind,
        num_devices=num_devices,
        batch={"global": batch, "per device": part, "micro-batch": micro},
        parameters={
            "image tower": towers.parameters["visual"],
            "text tower": towers.parameters["text"],
            "trained": towers.parameters["trained"],
        },
        phases=phases,
        memory=int(kind.memory),
        flops_per_sample=flops,
        compute_s=compute_s,
        wire_s=wire_s,
        wire=wire,
        num_steps=-(-config.train.num_samples // batch),
        data_workers=None if stored_embeddings else math.ceil(rate * DECODE_S / MAX_DATA_WORKER_UTILISATION),
        object_store=config.data.num_requested_batches(batch) * batch * sample_bytes,
        price_per_hour=price_per_hour,
        assumptions=_assumptions(config, kind),
    )


def _phases(towers: TowerCosts, features: int, loss: int, *, cached: bool, averages: bool) -> list[Phase]:
    """What comes and goes in a step.

    Args:
        features: bytes of all features of a device; their gradients take as much, in their place.
        loss: as `loss_bytes`.
        cached: whether a device has several micro-batches.
        averages: whether gradients are averaged over devices, through one flat buffer.
    """
    activations, update = towers.peak - towers.gradients_at_peak, towers.gradients if averages else 0
    ends = [
        Phase("towers", {"activations": activations, "gradients": towers.gradients_at_peak, "features": features}),
        Phase("update", {"gradients": towers.gradients, "all-reduce and optimizer": max(update, towers.update_peak)}),
    ]
    if not cached:
        return [Phase("loss", {"activations": towers.graph, "loss and ring": loss}), *ends]
    return [
        Phase("embed", {"activations": towers.embed_peak, "features": features}),
        Phase("loss", {"features": features, "loss and ring": loss}),
        *ends,
    ]


def _sample_bytes(config: RunConfig, feature_bytes: int, stored_embeddings: bool) -> int:
    """Of one pair as it comes from the data-shard workers: of a stored image, a row of features."""
    size, context_length, _ = shapes(config.model)
    return (feature_bytes if stored_embeddings else size * size * 3) + context_length * 4


def _assumptions(config: RunConfig, kind: DeviceKind) -> list[str]:
    peak, locked = kind.peak(config.train.precision) / 1e12, " and ".join(config.model.locked)
    lines = [
        f"{kind.name}: {kind.utilisation:.0%} of {peak:,.1f} TFLOP/s ({kind.source})",
        "days are of training alone: no starts, checkpoints, evaluations, waits for data",
    ]
    if config.embeddings.store is not None:
        lines.append("the image embeddings are in the store: what `sigray embed` takes to make it is not in here")
    else:
        if locked:
            lines.append(f"the locked tower ({locked}) runs live, forward only")
        rate = f"{1 / DECODE_S:,.0f} a second and core"
        lines.append(f"data-shard workers decode photographs at {rate}; small images are faster")
    if kind.name == CPU:
        lines.append(
            "memory is what is held; glibc may keep freed blocks, as much again for a small model, unless "
            "MALLOC_MMAP_THRESHOLD_=1048576 is in the environment, which costs some speed"
        )
    return lines


def check_fits(found: Plan, config: RunConfig) -> None:
    """Refuse what needs more memory than there is.

    Raises:
        DoesNotFit: naming both, and the largest train.micro_batch_size that fits.
    """
    if found.fits:
        return
    peak, usable = found.peak, FITS * found.memory
    best = largest_micro_batch(config, found.device, found.num_devices)
    most = max(peak.items, key=lambda name: peak.items[name])
    now = found.batch["micro-batch"] * _devices_per_worker(config, found.device)
    advice = (
        f"train.micro_batch_size={best} fits (now {now})"
        if best is not None
        else "no micro-batch is small enough: take more or larger devices, a smaller model or a smaller global batch"
    )
    if not config.train.activation_checkpointing:
        train = config.train.model_copy(update={"activation_checkpointing": True})
        if plan(config.model_copy(update={"train": train}), found.device, found.num_devices).fits:
            advice += ", and so does train.activation_checkpointing=true alone"
    raise DoesNotFit(
        f"one {found.device.name} needs {peak.total / GIB:.1f} GiB at the worst moment of a step ({peak.name}; most of "
        f"it {most}, {peak.items[most] / GIB:.1f} GiB) and has {found.memory / GIB:.1f} GiB, of which "
        f"{usable / GIB:.1f} can be filled: {advice}"
    )


def largest_micro_batch(config: RunConfig, kind: DeviceKind, num_devices: int) -> int | None:
    """The largest train.micro_batch_size (of a training worker) that fits; None where none does."""
    part, devices = config.train.global_batch_size // num_devices, _devices_per_worker(config, kind)

    def fits(micro: int) -> bool:
        changed = config.train.model_copy(update={"micro_batch_size": micro * devices})
        tried = config.model_copy(update={"train": changed})
        return plan(tried, kind, num_devices).fits

    sizes = [size for size in range(1, part + 1) if part % size == 0]
    # The whole part at once may fit where smaller ones do not: a single micro-batch meets no gradients.
    best = part if fits(part) else _last(sizes, fits)
    return None if best is None else best * devices


def largest_batch(config: RunConfig, kind: DeviceKind, num_devices: int, *, step: int = 64) -> int | None:
    """The largest global batch that fits without micro-batches, in steps of `step` pairs per device."""

    def fits(number: int) -> bool:
        train = {"micro_batch_size": None, "global_batch_size": number * step * num_devices}
        return plan(config.model_copy(update={"train": config.train.model_copy(update=train)}), kind, num_devices).fits

    high = 1
    while fits(high):
        high *= 2
    best = _last(list(range(high // 2, high)), fits) if high > 1 else None
    return None if best is None else best * step * num_devices


def _last(values: list[int], holds: Callable[[int], bool]) -> int | None:
    """The last of ascending values for which a predicate holds that holds up to some value; None: for none."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if holds(values[middle]) else (low, middle)
    return values[low - 1] if low else None


def check_memory(config: RunConfig) -> None:
    """Refuse, before anything starts, a run whose training workers certainly do not fit on their devices.

    Certain is it for a named cluster.device, and for CPU workers that share this machine: all of them together, without
    what a process needs anyway, against all of its memory.

    Raises:
        DoesNotFit: naming both numbers and what would fit.
    """
    kind = run_device(config)
    if kind is None or (kind.name == CPU and config.cluster.uses_xla):
        return
    if kind.name == CPU:
        kind = dataclasses.replace(kind, framework=0)
    check_fits(plan(config, kind, default_num_devices(config, kind)), config)


def run_device(config: RunConfig, name: str | None = None, num_devices: int | None = None) -> DeviceKind | None:
    """The device that a run is planned for; None where none is known.

    Args:
        name: of it; by default cluster.device, else this machine for CPU workers of a Ray of the run's own.
        num_devices: that share this machine, by default the run's.
    """
    cluster = config.cluster
    name = name or cluster.device
    if name is None and cluster.accelerator in ("cpu", "xla_cpu") and not has_cluster(config):
        name = CPU
    if name == CPU:
        return this_cpu(num_devices or cluster.worker_range[1] * (cluster.num_devices or 1), cluster.cpus_per_worker)
    return DEVICES[name] if name is not None else None


def has_cluster(config: RunConfig) -> bool:
    """Whether the run joins a cluster that is there, whose machines are not known."""
    return bool(config.cluster.address or os.environ.get("RAY_ADDRESS"))


def default_num_devices(config: RunConfig, kind: DeviceKind) -> int:
    """Devices of a run's largest number of training workers."""
    return config.cluster.worker_range[1] * _devices_per_worker(config, kind)


def _devices_per_worker(config: RunConfig, kind: DeviceKind) -> int:
    return config.cluster.num_devices or kind.per_host


def _micro_batch_size(config: RunConfig, part: int, kind: DeviceKind) -> int:
    """m, where a device has `part` pairs."""
    size = config.micro_batch_size(config.cluster.worker_range[1])
    return part if size is None else micro_batch(part, max(1, size // _devices_per_worker(config, kind)))


def _tile_size(loss: LossConfig, accelerator: str) -> int:
    return loss.tile_size or default_tile_size(torch.device(accelerator if accelerator == "cuda" else "cpu"))


def _product_bytes(precision: Precision, accelerator: str) -> int:
    """Of a number in the products of the loss (`sigray.losses.tiles.product_dtype`)."""
    if precision != "bf16" or accelerator != CPU:
        return 2 if precision == "bf16" else _FLOAT32
    return 2 if has_bfloat16_products(torch.device("cpu")) else _FLOAT32


def loss_bytes(
    loss: LossConfig, num_pairs: int, dim: int, num_devices: int, feature_bytes: int, product_bytes: int, tile_size: int
) -> int:
    """The most that the loss holds at once beyond the features: sums, a tile, what is on the ring.

    Args:
        num_pairs: b.
        feature_bytes: f.
        product_bytes: of a number in the products.
        tile_size: edge of a tile.
    """
    rows = num_pairs * dim
    edge = min(tile_size, num_pairs)
    tile = edge * edge * product_bytes
    if product_bytes != feature_bytes:  # rows and columns of the tile, converted
        tile += 2 * edge * dim * product_bytes
    # In units of b D: texts that arrive while others are used; sums of their gradients, one hop behind.
    texts, sums = {1: (0, 0), 2: (1, 3)}.get(num_devices, (2, 5))
    counting = 0
    if loss.negatives != "all" and loss.negatives_fraction < 1:
        if loss.negatives in ("hardest", "easiest"):  # before the loss: a tile's numbers as keys, and two histograms
            counting = rows * texts * feature_bytes + tile + 16 * edge * edge + 2 * NUM_BINS * 8
        tile += (12 if loss.negatives == "random" else 5) * edge * edge  # which of a tile count
    if product_bytes != _FLOAT32:  # a product, before it is added to the float32 sums
        tile += edge * dim * product_bytes
    if loss.name == "softmax":  # cosines where they are not float32 yet, and four steps from them to dL/dz
        tile += (4 + (product_bytes != _FLOAT32)) * edge * edge * _FLOAT32
    gradients = 2 * rows * _FLOAT32 + 3 * num_pairs * _FLOAT32  # of images and texts; sums of rows
    ring = rows * (texts * feature_bytes + sums * _FLOAT32)
    converted = 2 * rows * feature_bytes if feature_bytes != _FLOAT32 else 0  # the gradients as they are handed back
    return max(counting, gradients + max(ring + tile, converted))


def wire_bytes(
    loss: LossConfig, num_pairs: int, dim: int, num_devices: int, feature_bytes: int, gradient_bytes: int
) -> dict[str, int]:
    """Bytes that one device sends in a step (`sigray.losses.ring`, docs/numerics.md).

    Args:
        num_pairs: b.
        feature_bytes: f.
        gradient_bytes: of the gradients of all weights, which a ring reduces in two rounds of parts.
    """
    hops, rows = num_devices - 1, num_pairs * dim
    features, sums = hops * rows * feature_bytes, hops * rows * _FLOAT32
    if loss.name == "softmax":  # a first round for the normalisers, which come home and are then shown to everybody
        features, sums = 2 * features, sums + 2 * hops * num_pairs * _FLOAT32
    elif loss.negatives in ("hardest", "easiest") and loss.negatives_fraction < 1:  # two rounds that count
        features *= 3
    return {
        "features of texts": features,
        "gradients of texts": sums,
        "gradients of weights": 2 * hops * gradient_bytes // num_devices,
    }


def this_cpu(num_workers: int, threads: int) -> DeviceKind:
    """This machine, shared by so many training workers of so many threads each. Times products for a fifth of a second.

    Args:
        threads: of each training worker.
    """
    speed = {dtype: _product_speed(dtype, threads) for dtype in ("float32", "bfloat16")}
    return DeviceKind(
        name=CPU,
        accelerators=("cpu", "xla_cpu"),
        memory=machine_memory() / num_workers,
        peak_bf16=speed["bfloat16"],
        peak_fp32=speed["float32"],
        peak_tf32=speed["float32"],
        utilisation=_CPU_UTILISATION,
        framework=_CPU_FRAMEWORK,
        ring_bytes_per_s=_CPU_RING_BYTES_PER_S,
        island=num_workers,
        network_bytes_per_s=_CPU_RING_BYTES_PER_S,
        per_host=1,
        source=f"products timed on this machine, {threads} thread{'s' * (threads > 1)} a worker",
    )


def machine_memory() -> int:
    """Bytes that this machine, or the container around this process, has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _product_speed(dtype: str, threads: int) -> float:
    """FLOP/s of products of the size that a Base tower has, the best of a few."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kind = getattr(torch, dtype)
        a, b = torch.ones(1024, 768, dtype=kind), torch.ones(768, 768, dtype=kind)
        best, until = math.inf, time.perf_counter() + 0.1
        while time.perf_counter() < until:
            begin = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)
    return 2 * 1024 * 768 * 768 / best


def tables(found: Plan) -> Group:
    """A plan for the terminal."""
    peak = found.peak
    unit, name = (GIB, "GiB") if peak.total >= 4 * GIB else (2**20, "MiB")

    def amount(size: float) -> str:
        return f"{size / unit:,.2f}" if unit == GIB else f"{size / unit:,.0f}"

    memory = Table(box=None, padding=(0, 0, 0, 2))
    memory.add_column(f"{name} on one {found.device.name}")
    for phase in found.phases:
        memory.add_column(phase.name, justify="right")
    for item in dict.fromkeys(item for phase in found.phases for item in phase.items):
        sizes = [phase.items.get(item) for phase in found.phases]
        if any(sizes):
            memory.add_row(item, *("" if size is None else amount(size) for size in sizes))
    memory.add_row("together", *(amount(phase.total) for phase in found.phases), style="bold")

    def listed(values: Mapping[str, float], scale: float, digits: int) -> str:
        return ", ".join(f"{key} {value / scale:,.{digits}f}" for key, value in values.items())

    batch = found.batch
    rows = {
        "memory": f"{'fits' if found.fits else 'does not fit'}: at most {amount(peak.total)} {name} of "
        f"{amount(found.memory)}, of which {amount(FITS * found.memory)} can be filled",
        "batch": f"{batch['global']:,} pairs = {batch['per device']:,} x {found.num_devices}, "
        f"{batch['micro-batch']:,} through the towers at once",
        "parameters, M": listed(found.parameters, 1e6, 1),
        "GFLOP per sample": listed(found.flops_per_sample, 1e9, 2),
        "step": f"{found.step_s:,.3g} s: computing {found.compute_s:,.3g} s, links {found.wire_s:,.2g} s",
        "speed": f"{found.samples_per_s:,.0f} samples/s",
        "run": f"{found.num_steps:,} steps, {_duration(found.days)}",
    }
    if found.num_devices > 1:
        rows["a device sends, MB per step"] = listed(found.wire, 1e6, 1)
    if found.data_workers is not None:
        store = f"{found.object_store / GIB:,.2f} GiB of samples on their way"
        rows["data-shard workers"] = f"{found.data_workers:,}, of one core each; {store}"
    if found.cost is not None:
        rows["cost"] = f"{found.cost:,.2f} at {found.price_per_hour:g} per hour and device"
    run = Table(box=None, padding=(0, 0, 0, 2), show_header=False)
    run.add_column()
    run.add_column(overflow="fold")
    for title, text in rows.items():
        run.add_row(Text(title), Text(text))
    return Group(memory, Text(), run, Text(), *(Text(f"- {line}") for line in found.assumptions))


def _duration(days: float) -> str:
    if days >= 1:
        return f"{days:,.2f} days"
    hours = days * 24
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
