"""RunConfig: one YAML, typed and checked before anything starts. Imports no torch and no Ray.

    run data model train optim eval cluster checkpoint

The sections that configure the workers stand in `workers/config.py`.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, model_validator

from workers.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LocalOrUri,
    LossConfig,
    ModelConfig,
    NonNegativeInt,
    OptimConfig,
    PositiveInt,
    Section,
    TrainConfig,
)


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
    accelerator: Literal["cpu", "cuda"] = "cpu"
    """What the training workers compute on: cpu (gloo) or cuda (nccl, one GPU each)."""
    num_workers: PositiveInt = 1
    """Training workers."""
    cpus_per_worker: PositiveInt = 1
    """CPUs that Ray reserves for each training worker, and threads that it computes with."""
    resources_per_worker: dict[str, float] = {}
    """Further Ray resources of each training worker, for example {training: 1} where the cluster file declares it."""
    max_failures: NonNegativeInt = 2
    """Restarts of the training workers after one died; they go on from the newest checkpoint."""
    dashboard: bool = False
    """Serve Ray's dashboard on 127.0.0.1:8265 for a Ray that this run starts itself."""


class RunConfig(Section):
    """A whole run. See examples/ for complete files."""

    run: RunSection
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    cluster: ClusterConfig = ClusterConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _fields_agree(self) -> RunConfig:
        batch, workers = self.train.global_batch_size, self.cluster.num_workers
        problems = []
        if batch % workers:
            near = max(workers, batch // workers * workers)
            problems.append(
                f"train.global_batch_size={batch} does not divide by cluster.num_workers={workers}: "
                f"{near} or {near + workers} would"
            )
        micro, part = self.train.micro_batch_size, batch // workers
        if micro is not None and part % micro:
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
        if batch > self.train.num_samples:
            problems.append(
                f"train.global_batch_size={batch} is larger than train.num_samples={self.train.num_samples}: "
                "the run would not make one step"
            )
        if self.optim.num_warmup_samples > self.train.num_samples:
            problems.append(
                f"optim.num_warmup_samples={self.optim.num_warmup_samples} is larger than "
                f"train.num_samples={self.train.num_samples}: the run would end before its learning rate is reached"
            )
        if self.eval.pixel_baseline and not any(spec.classes for spec in self.eval.sets.values()):
            problems.append("eval.pixel_baseline=true needs a set with classes in eval.sets, and there is none")
        if problems:
            raise ValueError("\n".join(problems))
        return self

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
    "train",
    "loss",
    "optim",
)
_FREE_ON_RESUME = ("train.log_every_steps", "train.micro_batch_size", "loss.tile_size")


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file and put dotted overrides (`train.global_batch_size=512`, values in YAML) over it.

    Raises:
        ConfigError: for a missing or unreadable file, an unknown key, a wrong type, fields that contradict.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a mapping of sections expected ({', '.join(RunConfig.model_fields)})")
    for text in overrides:
        _apply(content, text)
    return parse_config(content, str(path))


def override(config: RunConfig, overrides: list[str], source: str) -> RunConfig:
    """A config with dotted overrides put over it; raises as `load_config`."""
    content = config.model_dump(mode="json")
    for text in overrides:
        _apply(content, text)
    return parse_config(content, source)


def parse_config(content: dict[str, Any], source: str) -> RunConfig:
    """Check a config given as a mapping; raises as `load_config`, naming `source`."""
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in _explain(dict(item))]
        raise ConfigError("\n".join([f"{source} cannot be run:", *(f"  {line}" for line in lines)])) from None


def check_resume(saved: RunConfig, wanted: RunConfig) -> None:
    """Refuse a resume that would be another run.

    Raises:
        ConfigError: naming each key that must not change, with both values.
    """
    before, after = (_flatten(config.model_dump(mode="json")) for config in (saved, wanted))
    lines = [
        f"{key}: the run was started with {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and _is_under(key, FIXED_ON_RESUME) and not _is_under(key, _FREE_ON_RESUME)
    ]
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        raise ConfigError(
            f"{saved.folder} cannot be resumed with another model, data order or recipe:\n{shown}\n"
            "Leave these as they were, or start a new run with `sigray train` and another run.name"
        )


def json_schema() -> str:
    """The JSON schema of a run's YAML, for completion in editors."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)


def _apply(content: dict[str, Any], override: str) -> None:
    """Put one `section.key=value` into a nested mapping."""
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*", key):
        raise ConfigError(
            f"{override!r} is not an override: section.key=value expected, as train.global_batch_size=512"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML: {error}") from error
    *path, last = key.split(".")
    place = content
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{override!r}: {part!r} is a value, not a section")
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
