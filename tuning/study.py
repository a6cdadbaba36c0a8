"""The study of a sweep (STUDY.yaml): search space, budget, metric and claims.

name question base overrides metric budget rungs seeds space search scheduler expect figures
dir storage parallel scale scales
"""

from __future__ import annotations

import copy
import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from sigray.orchestrator.carried_files import find_carried
from sigray.orchestrator.config import (
    ConfigError,
    RunConfig,
    override_of,
    parse_config,
    parse_mapping,
    put,
    read_mapping,
    validate,
)
from sigray.tuning.decide import Rules, Scheduler, geometric_rungs
from sigray.tuning.space import MAX_POINTS, Dimension
from sigray.workers.config import LocalFolder, LocalOrUri, NonNegativeInt, PositiveInt, Section
from sigray.workers.parse import dump_yaml

if TYPE_CHECKING:
    from sigray.workers.storage import Storage

STUDY = "study.yaml"  # in the folder of a sweep
_FIGURES = {
    "zero_shot": ("top1", "top5"),
    "retrieval": tuple(
        f"{merged}{way}_r{k}"
        for merged in ("", "merged_")
        for way in ("image_to_text", "text_to_image")
        for k in (1, 5, 10)
    ),
}
_FIGURES["multilingual"] = _FIGURES["retrieval"]


class SearchConfig(Section):
    name: Literal["grid", "random", "optuna"] = "grid"
    """How trials are chosen.

    grid: every combination of grid and cases. random: num_trials draws of the other dimensions, each crossed with the
    grids. optuna: num_trials proposals of its TPE sampler, each from the results of earlier trials."""
    num_trials: Annotated[int, Field(gt=0, le=MAX_POINTS)] | None = None
    """Number of draws or proposals for each seed."""
    seed: NonNegativeInt = 0
    """Seed of the draws, independent of the seeds of the runs."""
    num_startup_trials: PositiveInt = 8
    """optuna: number of random trials before the first proposal."""
    lag: PositiveInt = 4
    """optuna: number of trials that may run at once.

    Proposal n uses the results of trials 0 to n - lag and waits for them, so that it does not depend on timing."""

    @model_validator(mode="after")
    def _num_trials_where_needed(self) -> SearchConfig:
        if (self.num_trials is None) != (self.name == "grid"):
            needs = "takes no" if self.name == "grid" else "needs"
            raise ValueError(f"name={self.name} {needs} num_trials (num_trials={self.num_trials})")
        return self


class SchedulerConfig(Section):
    name: Scheduler = "none"
    """none: every trial runs to the end. asha, median, hyperband: stop weak trials."""
    eta: Annotated[int, Field(ge=2)] = 3
    """asha, hyperband: one in eta trials goes on, to a rung of eta times the samples."""
    first_rung: PositiveInt | None = None
    """Samples seen at the first rung at least; by default a ninth of the budget."""
    min_trials: PositiveInt = 3
    """median: number of other trials at a rung before a trial can stop there."""
    in_order: bool = True
    """Whether a trial is compared only with trials of lower number.

    true: it waits for them, so decisions do not depend on timing. false: it is compared with all trials that reached
    the rung and never waits; another sweep of the study may decide differently."""


class Claim(Section):
    """A claim: which of two sides is better."""

    text: str
    """The claim as a sentence."""
    better: Annotated[dict[str, Any], Field(min_length=1)]
    """{DIMENSION: VALUE} of the side that should be better."""
    worse: Annotated[dict[str, Any], Field(min_length=1)]
    """{DIMENSION: VALUE} of the other side, compared at equal other values and seed."""
    where: dict[str, Any] = {}
    """Only trials with these values."""
    than_where: dict[str, Any] | None = None
    """The claim becomes that the difference is larger at `where` than at these values."""
    at: PositiveInt | None = None
    """Samples seen at one of the rungs; by default the end of each budget."""


class FigureConfig(Section):
    """A figure of the report that answers the study's question."""

    title: str
    kind: Literal["lines", "table"] = "lines"
    """lines: the metric over x, a line for each series. table: rows by columns."""
    x: str | None = None
    """lines: the dimension on the x axis."""
    series: str | None = None
    """lines: the dimension with one line for each value."""
    rows: str | None = None
    """table: the dimension of the rows."""
    columns: str | None = None
    """table: the dimension of the columns; by default one column with the metric."""
    where: dict[str, Any] = {}
    """Only trials with these values."""
    every_rung: bool = False
    """lines: a panel for each rung instead of the last rung only."""

    @model_validator(mode="after")
    def _axes_of_its_kind(self) -> FigureConfig:
        needed, foreign = ("x", ("rows", "columns")) if self.kind == "lines" else ("rows", ("x", "series"))
        if getattr(self, needed) is None:
            raise ValueError(f"kind={self.kind} needs {needed}")
        for name in foreign:
            if getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)} has no effect with kind={self.kind}")
        return self


class StudyConfig(Section):
    """A study. tuning/studies/ has complete examples."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the sweep; its folder is {dir}/{name}."""
    question: str = ""
    """The question of the study, in a sentence."""
    base: str | dict[str, Any]
    """The run to vary: a run's YAML, relative to the study's file, or its content."""
    overrides: dict[str, Any] = {}
    """Dotted keys of the run and their values, for all trials."""
    metric: str
    """The metric that ranks trials, higher is better.

    zero_shot.SET.top1, retrieval.SET.image_to_text_r10, or multilingual.SET.image_to_text_r1, the mean over the
    languages of the set. merged_image_to_text_r10 merges equal captions."""
    budget: PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)]
    """Samples seen by a trial in its whole run (train.num_samples).

    With several budgets, each has its own search, and the learning rate schedule ends with the budget."""
    rungs: list[PositiveInt] = []
    """Samples seen at which trials are evaluated and may be stopped.

    By default the rungs of the scheduler."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0]
    """Values of run.seed: the search runs once for each, the report shows the spread."""
    space: Annotated[dict[str, Dimension], Field(min_length=1)]
    """The search space, see docs/sweeps.md."""
    search: SearchConfig = SearchConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    expect: list[Claim] = []
    """Claims; the report gives a verdict on each."""
    figures: list[FigureConfig] = []
    """Figures of the report, in addition to the standard ones."""
    dir: LocalFolder = "sweeps"
    """Local folder of all sweeps."""
    storage: LocalOrUri | None = None
    """Shared folder, or URL of a store, for results and checkpoints; null: `dir`.
    URLs are s3://BUCKET/PREFIX, gs://BUCKET/PREFIX and az://CONTAINER/PREFIX."""
    parallel: PositiveInt | None = None
    """Maximum number of concurrent trials; null: as many as the free resources allow.

    With an autoscaling cluster, the number of trials that it shall grow to."""
    scale: str = "demo"
    """demo: the study as it stands; or the name of one of `scales`."""
    scales: dict[str, dict[str, Any]] = {}
    """Named variants of the study: {full: {base: ..., budget: ..., overrides: ...}}.

    overrides and space are merged, other keys replaced."""

    @model_validator(mode="after")
    def _fields_agree(self) -> StudyConfig:
        problems = []
        if self.budgets != sorted(set(self.budgets)):
            problems.append(f"budget={self.budget}: rising counts of samples expected")
        if self.rungs != sorted(set(self.rungs)) or (self.rungs and self.rungs[-1] > self.budgets[-1]):
            problems.append(f"rungs={self.rungs}: rising counts of samples, none above budget={self.budget}, expected")
        if len(set(self.seeds)) < len(self.seeds):
            problems.append(f"seeds={self.seeds}: one is given twice")
        drawn = [name for name, one in self.space.items() if one.kind in ("choice", "uniform", "loguniform")]
        if self.search.name == "grid" and drawn:
            problems.append(
                f"space.{drawn[0]} is drawn ({self.space[drawn[0]].kind}), which search.name=grid does not do: "
                "write grid, or search: {name: random, num_trials: 20}"
            )
        if self.search.name != "grid" and not drawn:
            problems.append(
                f"search.name={self.search.name} has nothing to draw in the space: write search: {{name: grid}}"
            )
        if self.search.name == "optuna" and len(self.seeds) > 1:
            problems.append(
                f"seeds={self.seeds}: search.name=optuna takes one seed; repeat its best trial with a grid over seeds"
            )
        for number, claim in enumerate(self.expect):
            for part in ("better", "worse", "where", "than_where"):
                problems += [
                    f"expect.{number}.{part}: {name!r} is no dimension of the space ({', '.join(self.space)})"
                    for name in (getattr(claim, part) or {})
                    if name not in self.space
                ]
            rungs = sorted({rung for budget in self.budgets for rung in self.rungs_of(budget)})
            if claim.at is not None and claim.at not in rungs:
                problems.append(f"expect.{number}.at={claim.at} is none of the rungs {rungs}")
        for number, figure in enumerate(self.figures):
            problems += [
                f"figures.{number}: {name!r} is no dimension of the space ({', '.join(self.space)})"
                for name in (figure.x, figure.series, figure.rows, figure.columns, *figure.where)
                if name is not None and name not in self.space
            ]
        for key, value in self.overrides.items():
            if "." not in key:
                problems.append(f"overrides.{key}={value!r}: a dotted key such as train.global_batch_size expected")
        for key in ("train.num_samples", "run.seed", "run.name", "run.dir", "run.storage"):
            if key in self.overrides or key in self.space:
                remedy = {"train.num_samples": "budget", "run.seed": "seeds"}.get(key, "name, dir and storage")
                problems.append(f"{key} is set by the study's {remedy}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def budgets(self) -> list[int]:
        return [self.budget] if isinstance(self.budget, int) else self.budget

    def rungs_of(self, budget: int) -> list[int]:
        """Samples seen at each rung of a trial; the last one is its budget."""
        if self.rungs:
            return [*(rung for rung in self.rungs if rung < budget), budget]
        if self.scheduler.name == "none":
            return [budget]
        return geometric_rungs(budget, self.scheduler.eta, self.scheduler.first_rung or budget // 9)

    @property
    def rules(self) -> Rules:
        scheduler = self.scheduler
        return Rules(scheduler.name, scheduler.eta, scheduler.min_trials, scheduler.in_order)

    @property
    def folder(self) -> Path:
        """The sweep's local folder, absolute."""
        return Path(self.dir, self.name)

    @property
    def storage_uri(self) -> str:
        """Where results and checkpoints live: {storage}/{name}."""
        return f"{(self.storage or self.dir).rstrip('/')}/{self.name}"

    def to_yaml(self) -> str:
        return dump_yaml(self.model_dump(mode="json", exclude_none=True))


@dataclass(frozen=True)
class Study:
    """A study and its base run.

    Attributes:
        config: with the content of the base run, so that it needs no other file.
        base: the resolved config of the base run, with overrides.
    """

    config: StudyConfig
    base: dict[str, Any]

    def base_of(self, budget: int) -> dict[str, Any]:
        """The base run with a budget; expressions read this config."""
        content = copy.deepcopy(self.base)
        content["train"]["num_samples"] = budget
        return content

    def trial_content(self, number: int, seed: int, budget: int, overrides: dict[str, Any]) -> dict[str, Any]:
        """The config of one trial, not yet checked."""
        content = self.base_of(budget)
        for key, value in overrides.items():
            put(content, key, value, self.config.name)
        content["run"] |= {"name": trial_name(number), "dir": str(self.config.folder / "trials"), "seed": seed}
        if self.config.storage:
            content["run"]["storage"] = f"{self.config.storage_uri}/trials"
        return content


def trial_name(number: int) -> str:
    return f"trial-{number:03d}"


def load_study(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Study:
    """Read a study's YAML and apply dotted overrides.

    `budget=1000` or `scale=full` change the study; `optim.lr=1e-3` and other keys of a run go to its overrides;
    `space.optim.lr={grid: [...]}` changes a dimension.

    Raises:
        ConfigError: for a missing or unreadable file, an unknown key, a wrong type, fields that contradict.
    """
    return parse_study(read_study_file(path, overrides), str(path))


def read_study_file(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a study's content with scale, overrides and base run, not yet checked.

    Raises:
        ConfigError: for a missing or unreadable file, or an unknown scale.
    """
    content = read_mapping(path, "a mapping expected")
    given = [override_of(text) for text in overrides]
    scale = dict(given).get("scale", content.get("scale", "demo"))
    scales = _mapping(content, "scales", path)
    if scale != "demo":
        if str(scale) not in scales:
            raise ConfigError(f"{path}: scale={scale}: there are demo, {', '.join(scales) or 'and no others'}")
        variant = _mapping(scales, str(scale), path)
        for key, value in variant.items():
            is_merged = key in ("overrides", "space")
            content[key] = _mapping(content, key, path) | _mapping(variant, key, path) if is_merged else value
    _put_overrides(content, given, path)
    base = content.get("base")
    if isinstance(base, str):
        # Relative to the working directory if given on the command line, else to the study's file.
        if "base" not in dict(given) and "://" not in base and not os.path.isabs(base):
            base = f"{str(path).rpartition('/')[0]}/{base}" if "://" in str(path) else str(Path(path).parent / base)
        content["base"] = read_mapping(base, "a mapping expected")
    return content


def read_study(place: str | Storage, overrides: list[str] | tuple[str, ...] = ()) -> Study:
    """The study of a sweep that began, from its folder or storage.

    Args:
        place: the folder, or a storage whose class bounds the reads.
        overrides: as of `load_study`.

    Raises:
        ConfigError: if there is no sweep.
    """
    from sigray.workers.storage import Storage

    try:
        home = place if isinstance(place, Storage) else Storage(place)
        text = home.read(STUDY)
    except OSError as error:
        uri = place if isinstance(place, str) else place.uri
        raise ConfigError(
            f"{uri} is no sweep: it holds no {STUDY} to read ({error}). Give the folder that `sigray sweep` named"
        ) from error
    source = f"{home.uri}/{STUDY}"
    content = parse_mapping(text, source, "a study expected")
    if isinstance(place, str):  # the pages read folders of unknown origin, and no files besides
        content = find_carried(content, lambda: home)
    recorded = f"{content.get('storage')}/{content.get('name')}"
    parent, _, content["name"] = home.uri.rpartition("/")
    if not home.is_local or os.path.abspath(recorded) != home.uri:
        content["dir" if home.is_local else "storage"] = parent  # the folder may have moved
    _put_overrides(content, [override_of(text) for text in overrides], source)
    return parse_study(content, source)


def _mapping(content: dict[str, Any], key: str, source: str | Path) -> dict[str, Any]:
    """Return the mapping at a key, empty without one."""
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: {key}: a mapping expected (found {value!r:.60})")
    return value


def _put_overrides(content: dict[str, Any], given: list[tuple[str, Any]], source: str | Path) -> None:
    """Apply overrides to the study, or to its run."""
    for key, value in given:
        first, _, rest = key.partition(".")
        if key in _mapping(content, "space", source):
            raise ConfigError(f"{key}={value}: {source} tries values of this key: give space.{key}={{grid: [...]}}")
        if first in RunConfig.model_fields:
            content["overrides"] = _mapping(content, "overrides", source) | {key: value}
        elif first in ("overrides", "space") and rest:
            content[first] = _mapping(content, first, source) | {rest: value}
        else:
            put(content, key, value, source)


def parse_study(content: dict[str, Any], source: str) -> Study:
    """Check a study's content; raises as `load_study`, naming `source`.

    Its base must be the content of a run.
    """
    config = validate(StudyConfig, content, source, "study", "is no study")
    if not isinstance(config.base, dict):
        raise ConfigError(f"{source}: base={config.base!r}: the content of a run expected")
    run = copy.deepcopy(config.base)
    run["run"] = _mapping(run, "run", f"{source}: the base run") | {"name": config.name}
    put(run, "train.num_samples", config.budgets[-1], source)
    for key, value in config.overrides.items():
        put(run, key, value, source)
    base = parse_config(run, f"{source}: the base run")
    _check_metric(config.metric, base, source)
    return Study(config, base.model_dump(mode="json"))


def split_metric(metric: str) -> tuple[str, str, str]:
    """Return task, set and figure of a metric; the name of a set may have dots."""
    task, _, rest = metric.partition(".")
    name, _, figure = rest.rpartition(".")
    return task, name, figure


def _check_metric(metric: str, base: RunConfig, source: str) -> None:
    task, name, figure = split_metric(metric)
    sets = base.eval.sets
    place = f"{source}: metric={metric}"
    if task not in _FIGURES or figure not in _FIGURES[task]:
        known = [f"{task}.SET.{figure}" for task, figures in _FIGURES.items() for figure in figures]
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{place} is no figure of an evaluation{hint}. There are {', '.join(known)}")
    if name not in sets:
        raise ConfigError(f"{place}: the base run has no eval.sets.{name}, but {', '.join(sets) or 'none'}")
    if task == "zero_shot" and not sets[name].classes:
        raise ConfigError(f"{place}: eval.sets.{name} has no classes")
    if task == "retrieval" and not sets[name].retrieval:
        raise ConfigError(f"{place}: eval.sets.{name} has retrieval=false")
    if task == "multilingual" and not sets[name].languages:
        raise ConfigError(f"{place}: eval.sets.{name} names no languages")
