"""Predict what a run needs: memory, time, traffic, data-shard workers, cost.

    B  pairs in the global batch       R  devices       b  pairs on one device (B / R)       D  embedding dimension
    m  pairs of a micro-batch on one device             f  bytes of a feature's number

Pure functions of a config and a `DeviceKind`. `count.py` runs towers, backward pass and optimizer as the training step
does, on tensors without memory (torch's fake tensors). It counts every allocation and every multiplication. The loss
and the ring are formulas, because their inner loops are compiled code. docs/plan.md says what is counted and assumed,
and compares predictions with measurements.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sigray.orchestrator.address import cluster_address
from sigray.orchestrator.batch import MAX_DATA_WORKER_UTILISATION, micro_batch
from sigray.orchestrator.config import ConfigError, RunConfig
from sigray.orchestrator.device_kinds import COMPILED, CPU, DEVICES, GIB, DeviceKind
from sigray.orchestrator.planning.count import TowerCosts, gathered_bytes, measure_towers
from sigray.orchestrator.planning.loss_costs import loop_edge, loss_bytes, product_bytes, wire_bytes
from sigray.orchestrator.planning.this_machine import this_cpu
from sigray.orchestrator.tables import Column, add, rows_table, table
from sigray.workers.config import LossConfig
from sigray.workers.model.inputs import shapes
from sigray.workers.model.weights_towers import with_towers
from sigray.workers.training.phases import Phase, phases_of

FITS = 0.95
"""Fraction of a device's memory that a plan may fill: allocators leave holes."""
DECODE_S = 740e-6
"""CPU seconds per sample of a data-shard worker.

Photographs of 256 to 512 px to 224, with tar, tokens and hand-over, on a core of an AMD EPYC, when torch still resized
(benchmarks/results/2026-11-25-stream.json). A hardware thread on a shared core took 1,226 us
(2026-11-27-stream.json)."""
VIEWS_DECODE = 1.9
"""Factor on it with the views of self-distillation.

`views_decode_ratio` of benchmarks/results/2026-12-01-terms.json."""
_FLOAT32 = 4
_DAY_S = 86_400


class DoesNotFit(ConfigError):
    """A run needs more memory than its devices have."""


@dataclass(frozen=True)
class Part:
    """Peak of the memory that a device holds in one part of a step, in bytes by item."""

    name: str
    items: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.items.values())


@dataclass(frozen=True)
class Plan:
    """The predicted needs of a run, in bytes and seconds unless a name says otherwise.

    If the run has several phases, the numbers of a step are those of the phase that needs most memory.

    Attributes:
        device: kind of the devices.
        num_devices: R.
        batch: pairs of a step, in all, on one device, and in one micro-batch of one device.
        parameters: number of parameters of each tower, and of those that train.
        parts: of a step, in order; the largest decides.
        memory: of one device.
        flops_per_sample: forward of each tower, forward again, captions, views, backward, loss, as the device executes
            them.
        compute_s, wire_s: of a step. The plan adds them, though the ring overlaps with the loss.
        wire: bytes that a device sends per step: features, gradients of texts, gradients of weights.
        num_steps: of the run.
        data_workers: data-shard workers that keep the devices busy in every phase; None if they are not known.
        object_store: bytes of decoded samples that are ready or in transit, over all hosts; the most of any phase.
        price_per_hour: of one device; None if not given.
        assumptions: for the user.
        phase: of the step; None if the run has only one.
        phases: a plan of each, as of a run of its own; empty if the run has only one.
    """

    device: DeviceKind
    num_devices: int
    batch: dict[str, int]
    parameters: dict[str, int]
    parts: list[Part]
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
    phase: Phase | None = None
    phases: list[Plan] = field(default_factory=list)

    @property
    def peak(self) -> Part:
        """The part that needs most memory."""
        return max(self.parts, key=lambda part: part.total)

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
        """Days of training; starts, checkpoints and evaluations are not included."""
        return sum(each.days for each in self.phases) if self.phases else self.num_steps * self.step_s / _DAY_S

    @property
    def cost(self) -> float | None:
        price = self.price_per_hour
        return None if price is None else self.days * 24 * self.num_devices * price

    def as_dict(self) -> dict[str, Any]:
        """Return the whole plan, for `--json`; that of a phase has the same keys."""
        found = {
            "device": {"name": self.device.name, "source": self.device.source, "utilisation": self.device.utilisation},
            "num_devices": self.num_devices,
            "batch": self.batch,
            "parameters": self.parameters,
            "memory_bytes": {
                "device": self.memory,
                "usable": int(FITS * self.memory),
                "peak": self.peak.total,
                "peak_part": self.peak.name,
                "parts": {part.name: part.items for part in self.parts},
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
        if self.phase is not None:
            names = ("number", "first_step", "end_step", "changes")
            found["phase"] = {name: getattr(self.phase, name) for name in names}
        if self.phases:
            found["phases"] = [each.as_dict() for each in self.phases]
        return found


def plan(
    config: RunConfig, kind: DeviceKind | str, num_devices: int = 1, *, price_per_hour: float | None = None
) -> Plan:
    """Predict memory, time, traffic and cost of a run; needs no device.

        found = sigray.plan(sigray.load_config("run.yaml"), "h100", 8, price_per_hour=3.0)
        print(found.fits, found.peak.total, found.days, found.cost)

    A run that needs more memory than the devices have is no error: see `Plan.fits`. With `embeddings.store` the locked
    image tower ran before, and the devices never hold it. Each of several phases is planned as a run of its own.

    Args:
        kind: name of a device, as `sigray plan --device` takes it (docs/plan.md); "cpu" is this machine.
        num_devices: R. With "cpu" this many training workers share the machine.
        price_per_hour: of one device.

    Raises:
        ConfigError: if the device is not known, or if the batch does not divide over the devices.
        ValueError: if model.init_from would bring the towers and does not.
    """
    if isinstance(kind, str):
        kind = named_device(kind, num_devices, config.cluster.cpus_per_worker)
    if config.phases:
        return _together(
            [
                dataclasses.replace(_plan_phase(alone, losses, kind, num_devices, price_per_hour), phase=phase)
                for phase, losses, alone in _phases_alone(config)
            ]
        )
    return _plan_phase(config, [config.loss], kind, num_devices, price_per_hour)


def _plan_phase(
    config: RunConfig, losses: Sequence[LossConfig], kind: DeviceKind, num_devices: int, price_per_hour: float | None
) -> Plan:
    """As `plan`, of a run with one phase.

    Args:
        losses: of the phases before it too, whose optimizer state stays.
    """
    model = with_towers(config.model)
    if config.train.compile_blocks and "cuda" in kind.accelerators:
        kind = dataclasses.replace(kind, utilisation=kind.utilisation * COMPILED)
    stored_embeddings = config.embeddings.store is not None
    batch = config.train.global_batch_size
    accelerator = kind.accelerators[0]
    if batch % num_devices:
        near = max(num_devices, batch // num_devices * num_devices)
        raise ConfigError(
            f"train.global_batch_size={batch} does not divide over {num_devices} devices: {near} or "
            f"{near + num_devices} would"
        )
    share = batch // num_devices
    limit = config.micro_batch_size(config.cluster.worker_range[1])  # pairs of a training worker
    micro = share if limit is None else micro_batch(share, max(1, limit // _devices_per_worker(config, kind)))
    precision = config.train.precision
    towers = measure_towers(
        model,
        config.optim,
        precision,
        micro,
        cached=micro < share,
        losses=losses,
        accelerator=accelerator,
        uses_xla=accelerator == "tpu" or config.cluster.uses_xla,
        activation_checkpointing=config.train.activation_checkpointing,
        stored_embeddings=stored_embeddings,
    )
    gathered = gathered_bytes(model) if config.sharding.weights == "split" else 0
    if gathered:
        # The memory of an update grows with the weights that it updates.
        names = ("weights", "updated", "optimizer_state", "gradients", "gradients_at_peak", "update_peak")
        split = {name: getattr(towers, name) // num_devices for name in names}
        peak = towers.peak - towers.gradients_at_peak + split["gradients_at_peak"]
        towers = dataclasses.replace(towers, peak=peak, **split)
    ema = towers.updated if config.train.ema is not None else 0  # float32
    dim = towers.embed_dim
    f = 2 if precision == "bf16" else _FLOAT32
    _, context_length, _ = shapes(model)
    image_bytes = dim * f if stored_embeddings else towers.image_bytes  # a stored image is a row of features
    sample_bytes = image_bytes + context_length * 4
    always = {
        "weights": towers.weights,
        "optimizer state": towers.optimizer_state,
        **({"average of the weights": ema} if ema else {}),
        **({"teacher's states": share * towers.state_bytes + towers.ahead_bytes} if towers.state_bytes else {}),
        # CPU: two ready batches, the batch in use, the batch in assembly. Else: the batch in use and the next.
        "input batches": (4 if accelerator == CPU else 2) * share * sample_bytes,
        "framework": int(kind.framework),
        **({"gathered weights and their gradients": gathered} if gathered else {}),
    }
    if accelerator == CPU:
        # Checkpoints are written from the copy of one worker, in memory that all share.
        always["checkpoint copy"] = (towers.weights + towers.optimizer_state + ema) // num_devices
    edge = config.loss.tile_size or loop_edge(accelerator)
    loss = loss_bytes(config.loss, share, dim, num_devices, f, product_bytes(precision, accelerator), edge)
    averages = num_devices > 1 and not gathered
    parts = _parts(towers, 2 * share * dim * f, loss, cached=micro < share, averages=averages)
    flops = {name: count / micro for name, count in towers.flops.items()}
    # Three products of the sigmoid loss, four of the softmax, over all pairs (docs/numerics.md).
    flops["loss"] = (3 if config.loss.name == "sigmoid" else 4) * 2.0 * batch * dim
    compute_s = share * sum(flops.values()) / (kind.peaks[precision] * kind.utilisation)
    wire = wire_bytes(config.loss, share, dim, num_devices, f, towers.gradients)
    if gathered:
        # Each pass gathers all weights: forward and backward, with micro-batches forward twice. Each backward pass
        # scatters its gradients.
        num_micro = share // micro
        passes = 2 if num_micro == 1 else 3 * num_micro
        wire["gathered weights"] = passes * (num_devices - 1) * towers.weights
        wire["gradients of weights"] = num_micro * (num_devices - 1) * towers.gradients
    wire_s = sum(wire.values()) / kind.link(num_devices)
    rate = batch / (compute_s + wire_s)
    decode_s = _decode_s(config)
    ahead = config.data.prefetch_batches + -(-config.data.block_size * config.data.total_lanes // batch)
    return Plan(
        device=kind,
        num_devices=num_devices,
        batch={"global": batch, "per device": share, "micro-batch": micro},
        parameters={
            "image tower": towers.parameters["visual"],
            "text tower": towers.parameters["text"],
            "trained": towers.parameters["trained"],
        },
        parts=[Part(name, always | items) for name, items in parts.items()],
        memory=int(kind.memory),
        flops_per_sample=flops,
        compute_s=compute_s,
        wire_s=wire_s,
        wire=wire,
        num_steps=-(-config.train.num_samples // batch),
        data_workers=None if stored_embeddings else math.ceil(rate * decode_s / MAX_DATA_WORKER_UTILISATION),
        object_store=ahead * batch * sample_bytes,
        price_per_hour=price_per_hour,
        assumptions=_assumptions(config, kind),
    )


def _phases_alone(config: RunConfig) -> Iterator[tuple[Phase, list[LossConfig], RunConfig]]:
    """Yield each phase, the losses up to its own, and a config of it alone."""
    losses: list[LossConfig] = []
    for phase in phases_of(config):
        losses = [*losses, phase.loss]
        num_samples = (phase.end_step - phase.first_step) * config.train.global_batch_size
        sections = {"model": phase.model, "loss": phase.loss, "optim": phase.optim, "phases": []}
        yield phase, losses, _changed(config, num_samples=num_samples).model_copy(update=sections)


def _together(phases: list[Plan]) -> Plan:
    """Return the plan of a run from those of its phases."""
    data_workers = [each.data_workers for each in phases if each.data_workers is not None]
    return dataclasses.replace(
        max(phases, key=lambda each: each.peak.total),
        num_steps=sum(each.num_steps for each in phases),
        data_workers=max(data_workers, default=None),
        object_store=max(each.object_store for each in phases),
        phases=phases,
    )


def _parts(towers: TowerCosts, size: int, loss: int, *, cached: bool, averages: bool) -> dict[str, dict[str, int]]:
    """Return the bytes of each part of a step by item, beyond what stays all the time.

    Args:
        size: bytes of all features of a device; their gradients take their place, with as many bytes.
        loss: as `loss_bytes`.
        cached: whether a device has several micro-batches.
        averages: whether gradients are averaged over devices, through one flat buffer.
    """
    features = {"features": size}
    start = {"embed": {"activations": towers.embed_peak} | features} if cached else {}
    activations = towers.peak - towers.gradients_at_peak
    update = max(towers.gradients if averages else 0, towers.update_peak)
    return start | {
        "loss": (features if cached else {"activations": towers.graph}) | {"loss and ring": loss},
        "towers": {"activations": activations, "gradients": towers.gradients_at_peak} | features,
        "update": {"gradients": towers.gradients, "all-reduce and optimizer": update},
    }


def _decode_s(config: RunConfig) -> float:
    """Return the CPU seconds per sample of a data-shard worker."""
    return DECODE_S * (1 if config.loss.distill is None else VIEWS_DECODE)


def _assumptions(config: RunConfig, kind: DeviceKind) -> list[str]:
    peak = kind.peaks[config.train.precision] / 1e12
    lines = [
        f"{kind.name}: {kind.utilisation:.0%} of {peak:,.1f} TFLOP/s ({kind.source})",
        "days are of training alone: no starts, checkpoints, evaluations, waits for data",
    ]
    if config.embeddings.store is not None:
        lines.append("the image embeddings are in the store; the time of `sigray embed` is not included")
    else:
        if config.model.locked:
            lines.append(f"the locked tower ({' and '.join(config.model.locked)}) runs live, forward only")
        rate = f"{1 / _decode_s(config):,.0f} a second and core"
        lines.append(f"data-shard workers decode photographs at {rate}; small images are faster")
    if kind.name == CPU:
        lines.append(
            "memory is what is held; glibc may keep freed blocks, as much again for a small model, unless "
            "MALLOC_MMAP_THRESHOLD_=1048576 is in the environment, which costs some speed"
        )
    return lines


def check_fits(found: Plan, config: RunConfig) -> None:
    """Refuse a plan that needs more memory than its devices have.

    Raises:
        DoesNotFit: names both amounts, the phase if there are several, and the largest train.micro_batch_size that
            fits.
    """
    if found.fits:
        return
    peak = found.peak
    best = largest_micro_batch(config, found.device, found.num_devices)
    most = max(peak.items, key=lambda name: peak.items[name])
    now = found.batch["micro-batch"] * _devices_per_worker(config, found.device)
    advice = (
        f"train.micro_batch_size={best} fits (now {now})"
        if best is not None
        else "no micro-batch is small enough: take more or larger devices, a smaller model or a smaller global batch"
    )
    checkpointed = _changed(config, activation_checkpointing=True)
    if not config.train.activation_checkpointing and plan(checkpointed, found.device, found.num_devices).fits:
        advice += ", and so does train.activation_checkpointing=true alone"
    phase = "" if found.phase is None else f"{_shown(found.phase)}: "
    raise DoesNotFit(
        f"{phase}one {found.device.name} needs {peak.total / GIB:.1f} GiB at the peak of a step ({peak.name}; most of "
        f"it {most}, {peak.items[most] / GIB:.1f} GiB) and has {found.memory / GIB:.1f} GiB, of which "
        f"{FITS * found.memory / GIB:.1f} can be filled: {advice}"
    )


def _shown(phase: Phase) -> str:
    return f"phase {phase.number}" + (f" ({', '.join(phase.changes)})" if phase.changes else "")


def _changed(config: RunConfig, **train: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def largest_micro_batch(config: RunConfig, kind: DeviceKind, num_devices: int) -> int | None:
    """Return the largest train.micro_batch_size that fits, None if none does.

    It fits in every phase. The size counts the pairs of a training worker.
    """
    part = config.train.global_batch_size // num_devices
    devices = _devices_per_worker(config, kind)

    def fits(micro: int) -> bool:
        return plan(_changed(config, micro_batch_size=micro * devices), kind, num_devices).fits

    sizes = [size for size in range(1, part + 1) if part % size == 0]
    # The whole part at once may fit even if smaller sizes do not: a single micro-batch meets no gradients.
    number = len(sizes) if fits(part) else bisect.bisect_left(sizes, True, key=lambda size: not fits(size))
    return sizes[number - 1] * devices if number else None


def check_memory(config: RunConfig) -> None:
    """Refuse training workers that cannot fit on their devices, before a run starts.

    The check needs a named cluster.device, or CPU workers that share this machine. For the latter it compares all of
    them together with the machine's memory, without the memory of a process that does nothing.

    Raises:
        DoesNotFit: names both amounts and a remedy.
    """
    name = run_device(config)
    if name is None or (name == CPU and config.cluster.uses_xla):
        return
    num_devices = default_num_devices(config, name)
    kind = named_device(name, num_devices, config.cluster.cpus_per_worker)
    if name == CPU:
        kind = dataclasses.replace(kind, framework=0)
    check_fits(plan(config, kind, num_devices), config)


def named_device(name: str, num_devices: int, cpus_per_worker: int) -> DeviceKind:
    """Return a device by name; "cpu" is this machine, shared by `num_devices` workers.

    Raises:
        ConfigError: if no device has the name.
    """
    if name == CPU:
        return this_cpu(num_devices, cpus_per_worker)
    if name not in DEVICES:
        raise ConfigError(f"no device {name!r} is known: {', '.join([CPU, *DEVICES])}")
    return DEVICES[name]


def run_device(config: RunConfig) -> str | None:
    """Return the name of the run's device, None if it is not known.

    It is cluster.device, or this machine for CPU workers of a Ray that the run starts.
    """
    cluster = config.cluster
    # The machines of a cluster to join are not known.
    is_here = cluster.accelerator in ("cpu", "xla_cpu") and cluster_address(config) is None
    return cluster.device or (CPU if is_here else None)


def default_num_devices(config: RunConfig, name: str) -> int:
    """Return the devices of a run's largest number of training workers."""
    per_host = DEVICES[name].per_host if name != CPU else 1
    return config.cluster.worker_range[1] * (config.cluster.num_devices or per_host)


def _devices_per_worker(config: RunConfig, kind: DeviceKind) -> int:
    return config.cluster.num_devices or kind.per_host


def tables(found: Plan) -> Group:
    """Return a plan for the terminal."""
    peak = found.peak
    unit, name = (GIB, "GiB") if peak.total >= 4 * GIB else (2**20, "MiB")

    def amount(size: float) -> str:
        return f"{size / unit:,.2f}" if unit == GIB else f"{size / unit:,.0f}"

    memory = Table(box=None, padding=(0, 0, 0, 2))
    memory.add_column(f"{name} on one {found.device.name}")
    for part in found.parts:
        memory.add_column(part.name, justify="right")
    for item in dict.fromkeys(item for part in found.parts for item in part.items):
        sizes = [part.items.get(item) for part in found.parts]
        if any(sizes):
            memory.add_row(item, *("" if size is None else amount(size) for size in sizes))
    memory.add_row("together", *(amount(part.total) for part in found.parts), style="bold")

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
        store = f"{found.object_store / GIB:,.2f} GiB of prefetched samples"
        rows["data-shard workers"] = f"{found.data_workers:,}, of one core each; {store}"
    if found.cost is not None:
        rows["cost"] = f"{found.cost:,.2f} at {found.price_per_hour:g} per hour and device"
    lines = (Text(f"- {line}") for line in found.assumptions)
    head: list[Table | Text] = []
    if found.phase is not None:
        begins: list[Column] = [("phase", "right"), ("after step", "right"), ("changes", "left")]
        phases = table(*begins, (f"{name} at the peak", "right"), ("step, s", "right"), ("takes", "right"))
        for each in found.phases:
            assert each.phase is not None
            begin = (str(each.phase.number), f"{each.phase.first_step:,}", ", ".join(each.phase.changes))
            add(phases, *begin, amount(each.peak.total), f"{each.step_s:,.3g}", _duration(each.days))
        head = [phases, Text(), Text(f"A step of {_shown(found.phase)}, which needs most memory:")]
    return Group(*head, memory, Text(), rows_table(rows.items()), Text(), *lines)


def _duration(days: float) -> str:
    hours = days * 24
    less_than_a_day = f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
    return f"{days:,.2f} days" if days >= 1 else less_than_a_day
