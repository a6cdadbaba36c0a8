"""RunConfig: one YAML, typed and checked before anything starts. Imports no torch and no Ray.

    run data model train loss optim sharding eval cluster checkpoint

The sections that configure the workers stand in `workers/config.py`.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, model_validator

from sigray.orchestrator.batch import micro_batch, usable_sizes
from sigray.orchestrator.planning.devices import DEVICES, DeviceName
from sigray.orchestrator.secrets import secrets_of
from sigray.workers.config import (
    Accelerator,
    CheckpointConfig,
    DataConfig,
    EmbeddingsConfig,
    EvalConfig,
    LocalOrUri,
    LossConfig,
    ModelConfig,
    NonNegativeInt,
    OptimConfig,
    PositiveInt,
    Section,
    ShardingConfig,
    TrainConfig,
)

FILES = "sigray-files"
"""Folder of the small files that a submitted job carries, each below the hash of its content."""


class ConfigError(ValueError):
    """A config that cannot be run; one line per problem, each with key, value and what is allowed."""


class RunSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its folder is {dir}/{name}. Letters, digits, dot, dash, underscore."""
    dir: LocalOrUri = "runs"
    """Local folder of all runs: config, metrics, TensorBoard files, summary and report."""
    storage: LocalOrUri | None = None
    """Where checkpoints go: a folder that all hosts see, or s3://bucket/prefix. By default `dir`."""
    seed: NonNegativeInt = 0
    """Decides weights, order of samples and dropout."""


class ClusterConfig(Section):
    address: str | None = None
    """Address of a running Ray cluster (`auto`, or host:port); null starts a Ray of this run's own on this machine."""
    accelerator: Accelerator = "cpu"
    """What the training workers compute on: cpu (gloo); cuda (nccl, one GPU each); tpu (torch-xla, one host with its
    chips each); xla_cpu: torch-xla's own CPU devices, to rehearse a TPU run on any machine."""
    devices_per_worker: PositiveInt | None = None
    """Devices of each training worker: of xla_cpu, as many are made (4 by default); of tpu, the chips that each host
    must have, by default what it has. cpu and cuda workers have one."""
    tpu_type: str | None = None
    """Generation of a TPU slice that is reserved as a whole, as Ray names it: TPU-V4, TPU-V5LITEPOD, TPU-V5P, TPU-V6E.
    With xla_cpu it rehearses the reservation."""
    tpu_topology: str | None = None
    """The slice's topology, such as 2x2x2 (four chips a host: two hosts); num_workers is the number of its hosts."""
    device: DeviceName | None = None
    """Sort of device, for `sigray plan`, and to refuse what cannot fit before anything starts: tpu-v4, tpu-v5e,
    tpu-v5p, tpu-v6e, a100-40, a100-80, h100, h200 or l4. Null: not known; with cpu workers it is this machine."""
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Training workers: a number, or [least, most]. With a range the run goes on with fewer where machines die, and
    takes more where there is room again; the global batch and the order of samples stay the same."""
    shrink_after_s: Annotated[float, Field(ge=0)] = 10
    """With a range: seconds to wait for room for the largest number before a smaller one is taken."""
    grow_after_s: Annotated[float, Field(ge=0)] = 60
    """With a range: seconds of training before a run of fewer workers looks for room for more. Growing writes a
    checkpoint and starts the training workers anew."""
    cpus_per_worker: PositiveInt = 1
    """CPUs that Ray reserves for each training worker, and threads that it computes with."""
    resources_per_worker: dict[str, float] = {}
    """Further Ray resources of each training worker, for example {training: 1} where the cluster file declares it."""
    max_failures_per_hour: NonNegativeInt = 10
    """Restarts of the training workers within an hour, preemptions not counted; they go on from the newest checkpoint.
    Bad input, a loss that is not a number and too little memory end the run at once."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 1800
    """Training workers from which nothing is heard for so long, no line of metrics and no checkpoint, are killed and
    started again."""
    dashboard: bool = False
    """Serve Ray's dashboard on 127.0.0.1:8265 for a Ray that this run starts itself."""

    @property
    def worker_range(self) -> tuple[int, int]:
        """Training workers at least and at most."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    @model_validator(mode="after")
    def _range_rises(self) -> ClusterConfig:
        least, most = self.worker_range
        if least > most:
            raise ValueError(f"num_workers=[{least}, {most}]: [least, most] expected")
        return self

    @model_validator(mode="after")
    def _devices_fit(self) -> ClusterConfig:
        if self.devices_per_worker not in (None, 1) and not self.uses_xla:
            raise ValueError(
                f"devices_per_worker={self.devices_per_worker}: a {self.accelerator} worker has one device; take more "
                "workers by num_workers"
            )
        kind = DEVICES.get(self.device) if self.device is not None else None
        if kind is not None and self.accelerator not in kind.accelerators:
            raise ValueError(
                f"device={self.device} needs accelerator={' or '.join(kind.accelerators)}, not {self.accelerator}"
            )
        if (self.tpu_type is None) != (self.tpu_topology is None):
            raise ValueError(
                f"tpu_type={self.tpu_type} and tpu_topology={self.tpu_topology} belong together: give both or neither"
            )
        if self.tpu_type is not None and not self.uses_xla:
            raise ValueError(f"tpu_type={self.tpu_type} needs accelerator=tpu, not {self.accelerator}")
        if self.accelerator == "tpu" and self.tpu_type is None:
            if self.worker_range != (1, 1):
                raise ValueError(
                    f"num_workers={self.num_workers} TPU hosts form a slice: give tpu_type and tpu_topology, or "
                    "num_workers=1"
                )
            if self.devices_per_worker is None:
                raise ValueError("accelerator=tpu needs tpu_type and tpu_topology, or devices_per_worker of one host")
        return self

    @property
    def uses_xla(self) -> bool:
        """Whether the training workers compute under torch-xla."""
        return self.accelerator in ("tpu", "xla_cpu")

    @property
    def num_devices(self) -> int | None:
        """Devices of each training worker, as far as the config says; None: what a TPU host has."""
        if self.accelerator == "tpu":
            return self.devices_per_worker
        return self.devices_per_worker or (4 if self.accelerator == "xla_cpu" else 1)


class RunConfig(Section):
    """A whole run. See examples/ for complete files."""

    run: RunSection
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    sharding: ShardingConfig = ShardingConfig()
    eval: EvalConfig = EvalConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _fields_agree(self) -> RunConfig:
        batch, micro = self.train.global_batch_size, self.train.micro_batch_size
        (least, most), workers = self.cluster.worker_range, self.cluster.num_workers
        problems = []
        if not usable_sizes(least, most, batch):
            near = max(most, batch // most * most)
            problems.append(
                f"train.global_batch_size={batch} does not divide by cluster.num_workers={workers}: "
                f"{near} or {near + most} would"
            )
        elif micro is not None and isinstance(workers, int) and batch // workers % micro:
            part = batch // workers
            divisors = [size for size in range(1, part + 1) if part % size == 0]
            nearest = [
                *[size for size in divisors if size < micro][-1:],
                *[size for size in divisors if size > micro][:1],
            ]
            problems.append(
                f"train.micro_batch_size={micro} does not divide the {part} pairs of each training worker "
                f"(train.global_batch_size={batch} over cluster.num_workers={workers}): "
                f"{' or '.join(map(str, nearest))} would"
            )
        else:
            problems += self._device_problems()
        if batch > self.train.num_samples:
            problems.append(
                f"train.global_batch_size={batch} is larger than train.num_samples={self.train.num_samples}: "
                "the run would not make one step"
            )
        if self.optim.name == "adafactor" and self.sharding.weights == "split":
            problems.append(
                "optim.name=adafactor cannot run with sharding.weights=split: it needs whole rows and columns of a "
                "gradient; adamw and lion can"
            )
        if self.optim.num_warmup_samples > self.train.num_samples:
            problems.append(
                f"optim.num_warmup_samples={self.optim.num_warmup_samples} is larger than "
                f"train.num_samples={self.train.num_samples}: the run would end before its learning rate is reached"
            )
        if self.cluster.hang_timeout_s <= self.data.worker_timeout_s:
            problems.append(
                f"cluster.hang_timeout_s={self.cluster.hang_timeout_s:g} is not above data.worker_timeout_s="
                f"{self.data.worker_timeout_s:g}: a data-shard worker that hangs would have all training workers killed"
            )
        problems += self._embeddings_problems()
        if self.eval.pixel_baseline and not any(spec.classes for spec in self.eval.sets.values()):
            problems.append("eval.pixel_baseline=true needs a set with classes in eval.sets, and there is none")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _embeddings_problems(self) -> list[str]:
        """Why embeddings.store cannot stand for the image tower."""
        if self.embeddings.store is None:
            return []
        problems = []
        if "visual" not in self.model.locked:
            problems.append(
                f"embeddings.store={self.embeddings.store} needs a locked image tower: set model.locked=[visual]"
            )
        vision = (self.model.towers or {}).get("vision_cfg", {})
        if not (self.model.image_tower or self.model.init_from or vision.get("timm_model_pretrained")):
            problems.append(
                f"embeddings.store={self.embeddings.store} of a tower with fresh weights would be of no use: set "
                "model.image_tower or model.init_from"
            )
        if self.embeddings.num_views > 1 and self.data.crop == "center":
            problems.append(
                f"embeddings.num_views={self.embeddings.num_views} with data.crop=center would store one view so many "
                "times: set data.crop=random, or num_views=1"
            )
        noise = self.train.label_noise
        if noise is not None and noise.kind in ("image", "image_text", "all"):
            problems.append(
                f"train.label_noise.kind={noise.kind} corrupts images, and embeddings.store holds none: text or "
                "alignment can be had"
            )
        return problems

    def _device_problems(self) -> list[str]:
        """What does not divide over a worker's devices, and what they cannot compute."""
        num_devices, problems = self.cluster.num_devices, []
        if self.cluster.uses_xla and self.loss.negatives in ("hardest", "easiest"):
            problems.append(
                f"loss.negatives={self.loss.negatives} cannot run with cluster.accelerator={self.cluster.accelerator}: "
                "all or random can"
            )
        if self.cluster.uses_xla and self.train.compile_blocks:
            problems.append(
                f"train.compile_blocks is torch.compile's, and cluster.accelerator={self.cluster.accelerator} compiles "
                "everything by itself: leave it out"
            )
        if num_devices is None:
            return problems
        least, most = self.cluster.worker_range
        for size in usable_sizes(least, most, self.train.global_batch_size):
            part = self.train.global_batch_size // size
            micro = self.micro_batch_size(size) or part
            key, pairs = ("train.micro_batch_size", micro) if micro < part else ("train.global_batch_size", part)
            if pairs % num_devices:
                problems.append(
                    f"{key}: {pairs} pairs of each of {size} training worker(s) do not divide over its {num_devices} "
                    "devices (cluster.devices_per_worker)"
                )
        return problems

    def micro_batch_size(self, num_workers: int) -> int | None:
        """train.micro_batch_size for so many training workers; None for their whole part.

        With a range of workers it is the largest that divides the part and is within the configured one, or within the
        part of the largest number of workers: fewer workers do not need more memory.
        """
        least, most = self.cluster.worker_range
        batch, micro = self.train.global_batch_size, self.train.micro_batch_size
        if least == most:
            return micro
        part, largest = batch // num_workers, usable_sizes(least, most, batch)[0]
        size = micro_batch(part, micro or batch // largest, self.cluster.num_devices or 1)
        return size if size < part else None

    @property
    def folder(self) -> Path:
        """The run's local folder, absolute."""
        return Path(self.run.dir, self.run.name)

    @property
    def storage_uri(self) -> str:
        """Where the run's checkpoints live: {storage}/{name}."""
        return f"{(self.run.storage or self.run.dir).rstrip('/')}/{self.run.name}"

    def to_yaml(self) -> str:
        """The resolved config, every default written out; loads to an equal RunConfig."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# A run's order of samples, its optimisation problem and its model: another value is another run.
FIXED_ON_RESUME = (
    "run.seed",
    "data.shards",
    "data.num_lanes",
    "data.shuffle_window",
    "data.image_keys",
    "data.captions",
    "data.crop",
    "data.crop_scale",
    "data.crop_ratio",
    "data.max_image_pixels",
    "model",
    "embeddings",
    "train",
    "loss",
    "optim",
)
_FREE_ON_RESUME = (
    "embeddings.batch_size",
    "train.log_every_steps",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.compile_blocks",
    "train.on_bad_loss",
    "train.max_loss_ratio",
    "loss.tile_size",
)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file and put dotted overrides (`train.global_batch_size=512`, values in YAML) over it.

    Raises:
        ConfigError: for a missing or unreadable file, an unknown key, a wrong type, fields that contradict.
    """
    content = read_mapping(path, f"a mapping of sections expected ({', '.join(RunConfig.model_fields)})")
    for text in overrides:
        _apply(content, text)
    return parse_config(content, str(path))


def read_mapping(path: str | Path, expected: str) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Args:
        expected: what the error says of a file that holds something else.

    Raises:
        ConfigError: for a missing or unreadable file, or another content.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: {expected}")
    return content


def override(config: RunConfig, overrides: list[str], source: str) -> RunConfig:
    """A config with dotted overrides put over it; raises as `load_config`."""
    content = config.model_dump(mode="json")
    for text in overrides:
        _apply(content, text)
    return parse_config(content, source)


def parse_config(content: dict[str, Any], source: str) -> RunConfig:
    """Check a config given as a mapping; raises as `load_config`, naming `source`."""
    refuse_secrets(content, source)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _explain(dict(item))]
        raise ConfigError("\n".join([f"{source} cannot be run:", *(f"  {line}" for line in lines)])) from None


def refuse_secrets(content: Any, source: str) -> None:
    """Credentials have no place in what is saved with a run.

    Raises:
        ConfigError: naming the keys, not the secrets.
    """
    secrets = list(secrets_of(content))
    if secrets:
        shown = "\n".join(f"  {line}" for line in secrets)
        raise ConfigError(
            f"{source} holds what must not be saved with a run:\n{shown}\nGive credentials by the environment, by "
            "data.s3.profile, or by the role of the machines"
        )


def check_resume(saved: RunConfig, wanted: RunConfig) -> None:
    """Refuse a resume that would be another run.

    Raises:
        ConfigError: naming each key that must not change, with both values.
    """
    before, after = (
        {key: _content_name(value) for key, value in _flatten(config.model_dump(mode="json")).items()}
        for config in (saved, wanted)
    )
    lines = [
        f"{key}: the run was started with {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and _is_under(key, FIXED_ON_RESUME) and not _is_under(key, _FREE_ON_RESUME)
    ]
    orders = [_by_weight(config.data.captions) for config in (saved, wanted)]
    if orders[0] != orders[1] and saved.data.captions == wanted.data.captions:
        # The draw of a caption goes through sources of equal weight in their order.
        lines.append(f"data.captions: the run was started with the order {orders[0]}, now {orders[1]}")
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        raise ConfigError(
            f"{saved.folder} cannot be resumed with another model, data order or recipe:\n{shown}\n"
            "Leave these as they were, or start a new run with `sigray train` and another run.name, or with --overwrite"
        )


def _by_weight(captions: dict[str, float]) -> list[str]:
    """The sources, heaviest first."""
    return sorted(captions, key=lambda source: -captions[source])


def _content_name(value: Any) -> Any:
    """A file that a job carries is what it holds, wherever the job was unpacked."""
    return value.rpartition(f"/{FILES}/")[2] if isinstance(value, str) else value


def json_schema() -> str:
    """The JSON schema of a run's YAML, for completion in editors."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)


def _apply(content: dict[str, Any], override: str) -> None:
    """Put one `section.key=value` into a nested mapping."""
    put(content, *override_of(override))


def override_of(override: str) -> tuple[str, Any]:
    """Key and value of `section.key=value`, the value in YAML.

    Raises:
        ConfigError: for anything else.
    """
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*", key):
        raise ConfigError(
            f"{override!r} is not an override: section.key=value expected, as train.global_batch_size=512"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML: {error}") from error
    return key, value


def put(content: dict[str, Any], key: str, value: Any) -> None:
    """Put a value at a dotted key of a nested mapping.

    Raises:
        ConfigError: where a part of the key is a value and no section.
    """
    *path, last = key.split(".")
    place = content
    for part in path:
        if place.get(part) is None:  # a section that may be left out
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise ConfigError(f"{key}={value!r}: {part!r} is a value, not a section")
    place[last] = value


def _explain(error: dict[str, Any]) -> list[str]:
    """A pydantic error as lines that name key, value and what is allowed."""
    parts = [str(part) for part in error["loc"]]
    key = ".".join(parts)
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return [f"{key}: {line}" if key else line for line in message.split("\n")]
    if error["type"] == "extra_forbidden":
        known = _known_keys(parts[:-1])
        near = difflib.get_close_matches(parts[-1], known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return [f"{key}: unknown key (value {error['input']!r}); {hint}allowed here: {', '.join(known)}"]
    if error["type"] == "missing":
        return [f"{key}: missing; every run needs it"]
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return [f"{key}={error['input']!r}: should be {message}"]


def _known_keys(path: list[str]) -> list[str]:
    """The keys that the section at a path has."""
    model: Any = RunConfig
    for part in path:
        if get_origin(model) is dict:  # eval.sets: any name, then a section
            model = get_args(model)[1]
        elif part in getattr(model, "model_fields", {}):
            model = model.model_fields[part].annotation
        else:
            return []
    return list(getattr(model, "model_fields", {}))


def _flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _is_under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
