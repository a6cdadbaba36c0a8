"""RunConfig: one YAML, typed and checked before anything starts.

    run data model train embeddings loss optim phases sharding eval cluster checkpoint

Imports no torch and no Ray. `workers/config.py` has the sections of the workers. The file is long because the checks
between sections stand here, each with its message.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import Field, ValidationError, model_validator

from sigray.orchestrator.batch import micro_batch, usable_sizes
from sigray.orchestrator.carried_files import find_carried
from sigray.orchestrator.device_kinds import DEVICES, DeviceName
from sigray.orchestrator.secrets import secrets_of
from sigray.workers import config as workers
from sigray.workers.config import (
    Accelerator,
    LocalFolder,
    LocalOrUri,
    NonNegativeInt,
    PhaseConfig,
    PositiveInt,
    Section,
)
from sigray.workers.parse import ParseError, dump_yaml, parse_yaml
from sigray.workers.training.phases import changed, phases_of

if TYPE_CHECKING:
    from sigray.workers.storage import Storage

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
AnySection = TypeVar("AnySection", bound=Section)


class ConfigError(ValueError):
    """A config that cannot be run: a line per problem with key, value, remedy."""


class RunSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run: letters, digits, dot, dash, underscore.
    The folder of the run is {dir}/{name}."""
    dir: LocalFolder = "runs"
    """Local folder of all runs.
    It holds config, metrics, TensorBoard files, summary and report."""
    storage: LocalOrUri | None = None
    """Storage of checkpoints: a shared folder, or a URL of a store; null: `dir`.
    URLs are s3://BUCKET/PREFIX, gs://BUCKET/PREFIX and az://CONTAINER/PREFIX."""
    seed: NonNegativeInt = 0
    """Seed of the weights, the order of samples, and dropout."""
    trackers: list[TrackerName] = ["tensorboard"]
    """Trackers that show the run: tensorboard, wandb, mlflow, trackio.
    Their keys and servers come from environment variables (trackers.md). tensorboard writes to the run's folder."""


class ClusterConfig(Section):
    address: str | None = None
    """Ray cluster to join: `auto`, or host:port of its GCS.
    Null joins the cluster of RAY_ADDRESS; without that variable, and with `local`, the run starts a Ray on this
    machine."""
    accelerator: Accelerator = "cpu"
    """Device of the training workers: cpu, cuda, tpu or xla_cpu.
    cpu uses gloo. cuda uses nccl, one GPU per worker. tpu uses torch-xla, one host with its chips per worker. xla_cpu
    is torch-xla's own CPU client, which rehearses a TPU run on any machine."""
    devices_per_worker: PositiveInt | None = None
    """Devices of each training worker.
    xla_cpu makes that many (null: 4). With tpu, each host must have that many chips (null: any number). cpu and cuda
    workers have one."""
    tpu_type: str | None = None
    """Generation of a TPU slice to reserve, by Ray's name.
    TPU-V4, TPU-V5LITEPOD, TPU-V5P or TPU-V6E. Ray reserves the slice as a whole. With xla_cpu, it rehearses the
    reservation."""
    tpu_topology: str | None = None
    """Topology of the slice, such as 2x2x2.
    That is four chips a host, two hosts; num_workers is the number of hosts."""
    device: DeviceName | None = None
    """Device model, for `sigray plan`.
    tpu-v4, tpu-v5e, tpu-v5p, tpu-v6e, a100-40, a100-80, h100, h200 or l4. If it is known, a run that does not fit in
    its memory is refused before anything starts. Null: unknown; for cpu workers, this machine."""
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Training workers: a number, or [least, most].
    With a range, the run continues with fewer workers after machines die, and grows when resources are free again. The
    global batch and the order of samples stay the same."""
    shrink_after_s: Annotated[float, Field(ge=0)] = 10
    """With a range: seconds to wait for the largest number of workers.
    After them, the run continues with a smaller number."""
    grow_after_s: Annotated[float, Field(ge=0)] = 60
    """With a range: seconds of training before a smaller run tries to grow.
    Growing writes a checkpoint and restarts the training workers."""
    cpus_per_worker: PositiveInt = 1
    """CPUs that Ray reserves for each training worker, and its threads."""
    resources_per_worker: dict[str, float] = {}
    """Further Ray resources of each training worker.
    For example {training: 1}, if the cluster file declares that resource."""
    max_failures_per_hour: NonNegativeInt = 10
    """Most restarts of the training workers within an hour.
    A restart continues from the newest checkpoint. Preemptions do not count. Bad input, a loss that is not a number,
    and too little memory end the run at once."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 1800
    """Heartbeat timeout of the training workers, in seconds.
    Training workers that send no event (metrics, checkpoint, warning) for this long are killed and restarted."""
    train_callbacks: list[Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]] = []
    """Classes of `ray.train.UserCallback`, as `package.module:Class`.
    Each is called without arguments. Ray Train's controller calls `after_report` once for each durable checkpoint.
    Tune's is ray.tune.integration.ray_train:TuneReportCallback."""
    dashboard: bool = False
    """Serve Ray's dashboard on 127.0.0.1:8265, if the run starts its own Ray."""

    @property
    def worker_range(self) -> tuple[int, int]:
        """Least and most training workers."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    @model_validator(mode="after")
    def _fields_agree(self) -> ClusterConfig:
        least, most = self.worker_range
        tpu = f"tpu_type={self.tpu_type}"
        kind = DEVICES.get(self.device) if self.device is not None else None
        one_host = self.accelerator == "tpu" and self.tpu_type is None
        if least > most:
            problem = f"num_workers=[{least}, {most}]: [least, most] expected"
        elif self.devices_per_worker not in (None, 1) and not self.uses_xla:
            problem = (
                f"devices_per_worker={self.devices_per_worker}: a {self.accelerator} worker has one; raise num_workers"
            )
        elif kind is not None and self.accelerator not in kind.accelerators:
            problem = f"device={self.device} needs accelerator={' or '.join(kind.accelerators)}, not {self.accelerator}"
        elif (self.tpu_type is None) != (self.tpu_topology is None):
            problem = f"{tpu} and tpu_topology={self.tpu_topology} belong together: give both or neither"
        elif self.tpu_type is not None and not self.uses_xla:
            problem = f"{tpu} needs accelerator=tpu, not {self.accelerator}"
        elif one_host and most > 1:
            problem = f"num_workers={self.num_workers}: several TPU hosts are a slice; give tpu_type and tpu_topology"
        elif one_host and self.devices_per_worker is None:
            problem = "accelerator=tpu needs tpu_type and tpu_topology, or devices_per_worker of one host"
        else:
            return self
        raise ValueError(problem)

    @property
    def uses_xla(self) -> bool:
        """Whether the training workers compute under torch-xla."""
        return self.accelerator in ("tpu", "xla_cpu")

    @property
    def num_devices(self) -> int | None:
        """Devices of each training worker; None: those that a TPU host has."""
        return self.devices_per_worker or {"tpu": None, "xla_cpu": 4}.get(self.accelerator, 1)


class RunConfig(Section):
    """A whole run. See examples/ for complete files."""

    run: RunSection
    data: workers.DataConfig
    model: workers.ModelConfig
    train: workers.TrainConfig
    embeddings: workers.EmbeddingsConfig = workers.EmbeddingsConfig()
    loss: workers.LossConfig = workers.LossConfig()
    optim: workers.OptimConfig = workers.OptimConfig()
    phases: list[PhaseConfig] = []
    """What changes at which point of the run."""
    sharding: workers.ShardingConfig = workers.ShardingConfig()
    eval: workers.EvalConfig = workers.EvalConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: workers.CheckpointConfig = workers.CheckpointConfig()

    @model_validator(mode="after")
    def _fields_agree(self) -> RunConfig:
        problems = [*self._batch_problems(), *self._run_problems(), *self._embeddings_problems()]
        problems += self._phase_problems()
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _batch_problems(self) -> Iterator[str]:
        """Yield how the global batch does not divide over workers and micro-batches."""
        batch, micro = self.train.global_batch_size, self.train.micro_batch_size
        (least, most), workers = self.cluster.worker_range, self.cluster.num_workers
        if not usable_sizes(least, most, batch):
            near = max(most, batch // most * most)
            yield (
                f"train.global_batch_size={batch} does not divide by cluster.num_workers={workers}: "
                f"{near} or {near + most} would"
            )
        elif micro is not None and isinstance(workers, int) and batch // workers % micro:
            part = batch // workers
            divisors = [size for size in range(1, part + 1) if part % size == 0]
            nearest = [size for size in divisors if size < micro][-1:] + [size for size in divisors if size > micro][:1]
            yield (
                f"train.micro_batch_size={micro} does not divide the {part} pairs of each training worker "
                f"(train.global_batch_size={batch} over cluster.num_workers={workers}): "
                f"{' or '.join(map(str, nearest))} would"
            )
        else:
            yield from self._device_problems()

    def _device_problems(self) -> Iterator[str]:
        """Yield what the devices cannot compute, and what does not divide over them."""
        accelerator = f"cluster.accelerator={self.cluster.accelerator}"
        if self.cluster.uses_xla and self.loss.negatives in ("hardest", "easiest"):
            yield f"loss.negatives={self.loss.negatives} cannot run with {accelerator}: all or random can"
        if self.cluster.uses_xla and self.train.compile_blocks:
            yield f"train.compile_blocks has no effect with {accelerator}, which compiles everything: leave it out"
        num_devices = self.cluster.num_devices
        for size in usable_sizes(*self.cluster.worker_range, self.train.global_batch_size):
            part = self.train.global_batch_size // size
            micro = self.micro_batch_size(size) or part
            key, pairs = ("train.micro_batch_size", micro) if micro < part else ("train.global_batch_size", part)
            if num_devices is not None and pairs % num_devices:
                yield (
                    f"{key}: {pairs} pairs of each of {size} training worker(s) do not divide over its {num_devices} "
                    "devices (cluster.devices_per_worker)"
                )

    def _run_problems(self) -> Iterator[str]:
        """Yield keys of different sections that contradict each other."""
        batch, samples = self.train.global_batch_size, self.train.num_samples
        warmup, cooldown = self.optim.num_warmup_samples, self.optim.num_cooldown_samples
        without_effect = sorted(self.optim.layer_decay.keys() & set(self.model.locked))
        hang_s, worker_s = self.cluster.hang_timeout_s, self.data.worker_timeout_s
        if batch > samples:
            yield f"train.global_batch_size={batch} is larger than train.num_samples={samples}: the run has no step"
        if self.optim.name == "adafactor" and self.sharding.weights == "split":
            yield "optim.name=adafactor needs whole gradients; sharding.weights=split has none: use adamw or lion"
        if warmup > samples:
            yield f"optim.num_warmup_samples={warmup} is larger than train.num_samples={samples}: lr is never reached"
        elif cooldown and warmup + cooldown > samples:
            yield (
                f"optim.num_warmup_samples={warmup} and num_cooldown_samples={cooldown} together are larger than "
                f"train.num_samples={samples}: lr is never reached"
            )
        if without_effect:
            yield f"optim.layer_decay.{without_effect[0]} has no effect with model.locked={self.model.locked}"
        if hang_s <= worker_s:
            yield (
                f"cluster.hang_timeout_s={hang_s:g} is not above data.worker_timeout_s={worker_s:g}: a data-shard "
                "worker that hangs would restart all training workers"
            )
        yield from self._decoder_problems()
        yield from self._distill_problems()
        if self.eval.pixel_baseline and not any(spec.classes for spec in self.eval.sets.values()):
            yield "eval.pixel_baseline=true needs a set with classes in eval.sets, and there is none"

    def _losses(self) -> dict[str, workers.LossConfig]:
        """Return the loss of each phase by the start of its keys.

        It ends before one that `_phase_problems` refuses.
        """
        found = {"": self.loss}
        for number, given in enumerate(self.phases):
            try:
                found[f"phases.{number}."] = changed(list(found.values())[-1], given.loss)
            except ValidationError:
                break
        return found

    def _decoder_problems(self) -> Iterator[str]:
        """Yield a captioning loss without a decoder, and a decoder without one."""
        losses = self._losses()
        used = next((key for key, loss in losses.items() if loss.caption_weight), None)
        if self.model.decoder is None and used is not None:
            yield f"{used}loss.caption_weight={losses[used].caption_weight:g} needs a decoder: set model.decoder={{}}"
        if self.model.decoder is not None and used is None:
            yield "model.decoder is never trained: set loss.caption_weight=1, here or in a phase"

    def _distill_problems(self) -> Iterator[str]:
        """Yield what self-distillation lacks, and what it cannot run with."""
        if all(each.distill is None for each in self._losses().values()):
            if self.model.heads is not None:
                yield "model.heads is never trained: set loss.distill={}, here or in a phase"
            return
        if self.model.heads is None:
            yield "loss.distill needs heads: set model.heads={}"
        if self.train.ema is None:
            yield "loss.distill needs a teacher: set train.ema, the half-life of its average in samples"
        if "visual" in self.model.locked or "visual" in self.model.trained_blocks:
            yield "loss.distill trains the whole image tower: leave visual out of model.locked and trained_blocks"
        if self.sharding.weights == "split":
            yield "loss.distill cannot run with sharding.weights=split: its teacher needs whole weights"
        if self.embeddings.store is not None:
            yield f"loss.distill needs images, which embeddings.store={self.embeddings.store} replaces"

    def _embeddings_problems(self) -> Iterator[str]:
        """Yield why stored embeddings cannot replace the image tower."""
        if self.embeddings.store is None:
            return
        store = f"embeddings.store={self.embeddings.store}"
        noise = self.train.label_noise
        views = self.embeddings.num_views
        vision = (self.model.towers or {}).get("vision_cfg", {})
        if "visual" not in self.model.locked:
            yield f"{store} needs a locked image tower: set model.locked=[visual]"
        if not (self.model.image_tower or self.model.init_from or vision.get("timm_model_pretrained")):
            yield f"{store} of a tower with fresh weights has no use: set model.image_tower or model.init_from"
        if self.model.decoder is not None:
            yield f"model.decoder reads the image tower, which {store} replaces: leave one of them out"
        if views > 1 and self.data.crop == "center":
            yield f"embeddings.num_views={views}: data.crop=center would store a view many times: set data.crop=random"
        if noise is not None and noise.kind in ("image", "image_text", "all"):
            yield f"train.label_noise.kind={noise.kind} needs images; embeddings.store holds none: text or alignment"

    def _phase_problems(self) -> Iterator[str]:
        """Yield what a phase cannot change, and schedules that are too short."""
        sections: dict[str, Any] = {"loss": self.loss, "optim": self.optim}
        for number, given in enumerate(self.phases):
            for name, section in sections.items():
                try:
                    sections = sections | {name: changed(section, getattr(given, name))}
                except ValidationError as error:
                    for problem in error.errors():
                        for line in _explain(dict(problem), type(section), "section"):
                            yield f"phases.{number}.{name}.{line}"
                    return
        try:
            found = phases_of(self)
        except ValueError as error:
            yield str(error)
            return
        yield from self._mixture_problems()
        for phase in found if self.phases else []:
            key = f"phases.{phase.number - 1}." if phase.number else ""
            warmup, cooldown = phase.optim.num_warmup_samples, phase.optim.num_cooldown_samples
            begins_schedule = phase.schedule.offset == 0
            if begins_schedule and warmup + cooldown > phase.schedule.length:
                yield (
                    f"{key}optim: num_warmup_samples={warmup} and num_cooldown_samples={cooldown} together are larger "
                    f"than the schedule of {phase.schedule.length:g} samples that begins there: lr is never reached"
                )
        for number, (given, phase) in enumerate(zip(self.phases, found[1:], strict=True)):
            key = f"phases.{number}."
            if not phase.changes:
                yield f"{key}start={given.start:g}: the phase changes nothing: leave it out"
            if 1 <= given.start < self.train.global_batch_size:
                yield f"{key}start={given.start:g} lies in the first step; a fraction of the run is below 1, as 0.9"
            for name in ("name", "groups", "layer_decay", "weight_decay_on"):
                if getattr(phase.optim, name) != getattr(self.optim, name):
                    yield f"{key}optim.{name} cannot change: its optimizer goes on with the state that it has"
            if self.cluster.uses_xla and phase.loss.negatives in ("hardest", "easiest"):
                yield f"{key}loss.negatives={phase.loss.negatives} cannot run with {self.cluster.accelerator}"
            if given.image_size is not None and self.embeddings.store is not None:
                yield f"{key}image_size={given.image_size}: embeddings.store holds those of one size: leave it out"

    def _mixture_problems(self) -> Iterator[str]:
        """Yield weights that name no dataset, or of datasets that no sample comes from."""
        shards = self.data.shards if isinstance(self.data.shards, dict) else {}
        for number, phase in enumerate(self.phases):
            weights = phase.weights
            if weights is not None and (weights.keys() != shards.keys() or not any(weights.values())):
                names = f"{{{', '.join(shards)}}}" if shards else "one without names, which cannot be weighted"
                yield (
                    f"phases.{number}.weights={weights}: the datasets of data.shards are {names}; give a weight of "
                    "each, one of them above 0"
                )
        if shards and not any(dataset.weight for dataset in shards.values()):
            yield "data.shards: each weight is 0: the run has no sample to begin with"
        for name, dataset in shards.items():
            if not dataset.weight and not any((phase.weights or {}).get(name) for phase in self.phases):
                yield f"data.shards.{name}.weight=0, and no phase gives it another: leave the dataset out"

    def micro_batch_size(self, num_workers: int) -> int | None:
        """Return train.micro_batch_size for a number of workers; None: the whole part.

        With a range of workers, return the largest divisor of the part within a limit: train.micro_batch_size, or a
        worker's part at the largest number of workers. So fewer workers do not need more memory.
        """
        least, most = self.cluster.worker_range
        batch, micro = self.train.global_batch_size, self.train.micro_batch_size
        if least == most:
            return micro
        part = batch // num_workers
        largest = usable_sizes(least, most, batch)[0]
        size = micro_batch(part, micro or batch // largest, self.cluster.num_devices or 1)
        return size if size < part else None

    @property
    def folder(self) -> Path:
        """The run's local folder, absolute."""
        return Path(self.run.dir, self.run.name)

    @property
    def storage_uri(self) -> str:
        """Folder or URI of the run's checkpoints: {storage}/{name}."""
        return f"{(self.run.storage or self.run.dir).rstrip('/')}/{self.run.name}"

    def to_yaml(self) -> str:
        """Return the config with every default; `parse_config` reads an equal one."""
        return dump_yaml(self.model_dump(mode="json"))


# A run's order of samples, its optimisation problem and its model: with another value it would be another run.
# fmt: off
FIXED_ON_RESUME = (
    "run.seed", "data.shards", "data.num_lanes", "data.shuffle_window", "data.image_keys", "data.captions", "data.crop",
    "data.crop_scale", "data.crop_ratio", "data.max_image_pixels", "model", "embeddings", "train", "loss", "optim",
    "phases",
)
_FREE_ON_RESUME = (
    "embeddings.batch_size", "train.num_samples", "train.log_every_steps", "train.micro_batch_size",
    "train.activation_checkpointing", "train.compile_blocks", "train.on_bad_loss", "train.max_loss_ratio",
    "loss.tile_size",
)
# fmt: on


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file and apply overrides.

    Args:
        overrides: dotted, with values in YAML: `train.global_batch_size=512`.

    Raises:
        ConfigError: for a missing or unreadable file, an unknown key, a wrong type, fields that contradict.
    """
    return parse_config(read_run_file(path), str(path), overrides)


def read_run_file(path: str | Path) -> dict[str, Any]:
    """Return the content of a run's YAML, not yet checked; raises as `read_mapping`."""
    return read_mapping(path, f"a mapping of sections expected ({', '.join(RunConfig.model_fields)})")


def read_mapping(path: str | Path, expected: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        expected: for the error about a file that holds something else.

    Raises:
        ConfigError: for a missing or unreadable file, or another content.
    """
    content = parse_mapping(read_file(path), str(path), expected)
    return find_carried(content, lambda: folder_of(path)[0])


def read_file(path: str | Path) -> bytes:
    """Return the content of a file or an s3:// object; raises as `read_mapping`."""
    try:
        if "://" in str(path):
            folder, name = folder_of(path)
            return folder.read(name)
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file or directory") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        strerror = getattr(error, "strerror", None)
        raise ConfigError(f"{path}: {strerror.lower() if strerror else error}") from error


def folder_of(path: str | Path) -> tuple[Storage, str]:
    """Return the folder of a file, local or in a bucket, and the file's name."""
    from sigray.workers.storage import Storage

    folder, slash, name = str(path).rpartition("/")
    return Storage(folder or slash or "."), name


def parse_mapping(text: bytes | str, path: str, expected: str) -> dict[str, Any]:
    """Return the mapping of a YAML text; raises as `read_mapping`, naming `path`."""
    try:
        content = parse_yaml(text)
    except ParseError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: {expected}")
    return content


def override(config: RunConfig, overrides: list[str], source: str) -> RunConfig:
    """Return a config with dotted overrides applied; raises as `load_config`."""
    return parse_config(config.model_dump(mode="json"), source, overrides)


def parse_config(content: dict[str, Any], source: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Apply overrides to a mapping and check it; raises as `load_config`."""
    for text in overrides:
        put(content, *override_of(text), source)
    return validate(RunConfig, content, source, "run", "cannot be run")


def validate(model: type[AnySection], content: dict[str, Any], source: str, noun: str, failure: str) -> AnySection:
    """Check a mapping, and refuse credentials in it: a run saves its config.

    Args:
        noun: what the file describes, for the error about a missing key.
        failure: follows `source` in the error: "cannot be run".

    Raises:
        ConfigError: a line per problem with key, value and allowed values; of secrets, only the keys.
    """
    secrets = "".join(f"  {line}\n" for line in secrets_of(content))
    if secrets:
        raise ConfigError(
            f"{source} holds credentials, which must not be saved with a run:\n{secrets}Give credentials by the "
            "environment, by data.stores.profile, or by the role of the machines; presigned URLs by a file of "
            "data.stores.signed_urls"
        )
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = [line for problem in error.errors() for line in _explain(dict(problem), model, noun)]
        raise ConfigError("\n  ".join([f"{source} {failure}:", *lines])) from None


def check_resume(saved: RunConfig, wanted: RunConfig) -> None:
    """Refuse a resume with another model, data order or recipe.

    Raises:
        ConfigError: names each key that must not change, with both values.
    """
    before, after = (flattened(config.model_dump(mode="json")) for config in (saved, wanted))
    fixed, free = (tuple(f"{name}." for name in names) for names in (FIXED_ON_RESUME, _FREE_ON_RESUME))
    lines = [
        f"{key}: the run was started with {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and f"{key}.".startswith(fixed) and not f"{key}.".startswith(free)
    ]
    if wanted.train.num_samples < saved.train.num_samples:
        numbers = f"the run was started with {saved.train.num_samples}, now {wanted.train.num_samples}"
        lines.append(f"train.num_samples: {numbers}: it can only be raised")
    moved = [phase.start for phase in saved.phases if phase.start < 1]
    if moved and wanted.train.num_samples != saved.train.num_samples:
        lines.append(
            f"train.num_samples: phases begin at fractions of it ({', '.join(map(str, moved))}), which would move: a "
            "run whose phases begin at numbers of samples can be made longer"
        )
    captions = [config.data.captions for config in (saved, wanted)]
    orders = [sorted(weights, key=weights.__getitem__, reverse=True) for weights in captions]
    if orders[0] != orders[1] and captions[0] == captions[1]:
        # Sources are drawn by falling weight, sources of equal weight in the order of the YAML.
        lines.append(f"data.captions: the run was started with the order {orders[0]}, now {orders[1]}")
    if lines:
        shown = "\n  ".join(lines)
        raise ConfigError(
            f"{saved.folder} cannot be resumed with another model, data order or recipe:\n  {shown}\n"
            "Leave these as they were, or start a new run with `sigray train` and another run.name, or with --overwrite"
        )


def override_of(override: str) -> tuple[str, Any]:
    """Return key and value of `section.key=value`; the value is YAML.

    Raises:
        ConfigError: for another text.
    """
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*", key):
        raise ConfigError(f"{override!r} is not an override: section.key=value expected, as optim.lr=5e-4")
    try:
        return key, parse_yaml(text)
    except ParseError as error:
        raise ConfigError(f"{override!r}: {error}") from None


def put(content: dict[str, Any], key: str, value: Any, source: str | Path) -> None:
    """Put a value at a dotted key of a nested mapping, the content of `source`.

    Raises:
        ConfigError: if a part of the key is a value and no section, or if a phase alone gives the section.
    """
    *path, last = key.split(".")
    place: Any = content
    for depth, part in enumerate(path):
        if isinstance(place, list):  # of sections, by number
            place = place[int(part)] if part.isdigit() and int(part) < len(place) else None
        else:
            if place.get(part) is None:  # a section that may be left out
                if depth == 1:
                    _check_no_phase_gives(content, key, source)
                place[part] = {}
            place = place[part]
        if not isinstance(place, dict | list):
            raise ConfigError(f"{source}: {part!r} is a value, not a section, as {key}={value!r:.60} needs")
    if isinstance(place, list):
        raise ConfigError(f"{source}: {last!r} is an entry of a list; give the list, or one key of the entry")
    place[last] = value


def _check_no_phase_gives(content: dict[str, Any], key: str, source: str | Path) -> None:
    """Refuse a key of a section that begins with a phase.

    The section would begin with the run, and the phase keep its own value.

    Raises:
        ConfigError: names the key of the phase.
    """
    section, name, *_ = key.split(".")
    phases = content.get("phases")
    for number, phase in enumerate(phases if isinstance(phases, list) else []):
        given = phase.get(section) if isinstance(phase, dict) else None
        if isinstance(given, dict) and isinstance(given.get(name), dict):
            raise ConfigError(
                f"{source}: {key}: {section}.{name} is null outside of phases, and phases.{number} gives it: give "
                f"phases.{number}.{key}, or all of {section}.{name}"
            )


def _explain(error: dict[str, Any], model: type[Section], noun: str) -> list[str]:
    parts = [str(part) for part in error["loc"]]
    if parts[-1:] in (["str"], ["list[str]"]) and isinstance(error["input"], dict):
        return []  # another member of the union takes a mapping, and says what is wrong inside
    parts = [part for part in parts if not part.startswith("dict[str,")]  # pydantic's name of a member of a union
    key = ".".join(parts)
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return [f"{key}: {line}" if key else line for line in message.split("\n")]
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, parts[:-1])
        near = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return [f"{key}: unknown key (value {error['input']!r}); {hint}allowed here: {', '.join(known)}"]
    if error["type"] == "missing":
        return [f"{key}: missing; every {noun} needs it"]
    _, should, message = error["msg"].rpartition("should ")
    return [f"{key}={error['input']!r}: {should}{message}"]


def _known_keys(model: Any, path: list[str]) -> list[str]:
    """Return the keys of the section at a path below a model."""
    for part in path:
        if get_origin(model) in (dict, list):  # eval.sets: any name, then a section
            model = get_args(model)[-1]
        elif part in getattr(model, "model_fields", {}):
            model = model.model_fields[part].annotation
        else:
            return []
    return list(getattr(model, "model_fields", {}))


def flattened(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as dotted key -> value.

    Mappings in a list have their number as a key.
    """
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            value = {str(number): entry for number, entry in enumerate(value)}
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
