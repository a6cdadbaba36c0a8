"""`sigray profile`: time the parts of a training step (traces, table, picture)."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from sigray.orchestrator.config import ConfigError, RunConfig, parse_config
from sigray.orchestrator.reports.drawing import INK, RULE, SERIES, png
from sigray.workers.parse import as_type, parse_json
from sigray.workers.storage import Storage
from sigray.workers.training.phases import phases_of
from sigray.workers.training.profile import FOLDER, PARTS, Profile, RankProfile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE, TIMELINE = "step.png", "ray_timeline.json"
_COLORS = {
    "data wait": (SERIES[5], 1.0),
    "to device": (SERIES[4], 1.0),
    "forward": (SERIES[0], 1.0),
    "loss: tiles": (SERIES[1], 1.0),
    "loss: ring": (SERIES[1], 0.5),
    "backward": (SERIES[0], 0.55),
    "device program": (SERIES[0], 0.3),
    "gradient all-reduce": (SERIES[3], 1.0),
    "optimizer": (SERIES[2], 1.0),
    "metrics": (SERIES[2], 0.5),
    "checkpoint": (SERIES[3], 0.5),
    "other": (RULE, 1.0),
}


@dataclass(frozen=True)
class Split:
    """Time of a step by part.

    Attributes:
        device: device of the ranks.
        ranks: seconds of each part of the mean step, by rank; "checkpoint" counts checkpoints during these steps.
        step_s: mean wall time of a step, over ranks.
        plain_step_s: median time of the steps without profiling; None: too few.
        checkpoint_s: longest pause of a rank for the checkpoint after the steps.
        num_steps: profiled steps, without the step of the checkpoint.
    """

    device: str
    ranks: list[dict[str, float]]
    step_s: float
    plain_step_s: float | None
    checkpoint_s: float
    num_steps: int


def profile_config(config: RunConfig, profile: Profile) -> RunConfig:
    """Return the config of the run to profile: another name, no evaluations.

    Raises:
        ConfigError: if the run, or its first phase, has fewer steps than the profile.
    """
    num_steps = phases_of(config)[0].end_step
    if num_steps < profile.total:
        samples = config.train.num_samples
        key = f"phases.0.start={config.phases[0].start:g}" if config.phases else f"train.num_samples={samples}"
        raise ConfigError(
            f"{key} are {num_steps} steps, and a profile takes {profile.total}: {profile.warm_up} to warm up, "
            f"{profile.steps} to profile, one for a checkpoint"
        )
    content = config.model_dump(mode="json")
    content["run"]["name"] = f"{config.run.name}-profile"
    content["eval"] = {}
    content["checkpoint"]["keep_best"] = None
    return parse_config(content, f"the profile of {config.run.name}")


def profile_run(config: RunConfig, profile: Profile, console: Console) -> tuple[Split, Path]:
    """Train and profile; return the times and the folder with traces and picture.

    Raises:
        ConfigError: if the run has fewer steps than the profile.
        RunFailed: if the run failed, or was stopped before the profile was complete.
    """
    wanted = profile_config(config, profile)
    from sigray.orchestrator.run.driver import train
    from sigray.orchestrator.run.policy import RunFailed
    from sigray.orchestrator.run_folder import WRITTEN, RunFolder, clear_folder

    train(wanted, console, overwrite=True, profile=profile)
    folder = RunFolder(wanted)
    clear_folder(folder.storage, [name for name in WRITTEN if name.startswith("checkpoints")])  # only their time counts
    ranks = read_profiles(folder.storage, folder.path)
    if not ranks:
        raise RunFailed(f"no rank has written a profile to {folder.storage.uri}: the run ended too early")
    split = split_of(ranks)
    place = folder.path / FOLDER
    png(lambda figure: draw(figure, split), place / PICTURE)
    if str(folder.path) != folder.storage.uri:
        for file in (file for file in (place / PICTURE, place / TIMELINE) if file.exists()):
            folder.storage.upload(file, f"{FOLDER}/{file.name}")
    return split, place


def read_profiles(storage: Storage, path: Path) -> list[RankProfile]:
    """Return the profiles by rank; copy the files of a remote storage to `path`."""
    found = []
    for name in storage.list(FOLDER):
        if not storage.is_local:
            (path / FOLDER).mkdir(parents=True, exist_ok=True)
            storage.download(f"{FOLDER}/{name}", path / FOLDER / name)
        if name.endswith("-steps.json"):
            found.append(as_type(RankProfile, parse_json(storage.read(f"{FOLDER}/{name}"))))
    return sorted(found, key=lambda one: one.rank)


def split_of(ranks: list[RankProfile]) -> Split:
    """Return the mean step of each rank, without the last one and its checkpoint."""
    means = []
    for rank in ranks:
        steps = rank.steps[:-1] or rank.steps
        means.append({part: sum(step[part] for step in steps) / len(steps) for part in PARTS})
    plain = [rank.plain_step_s for rank in ranks if rank.plain_step_s is not None]
    return Split(
        device=ranks[0].device,
        ranks=means,
        step_s=statistics.mean(sum(mean.values()) for mean in means),
        plain_step_s=statistics.mean(plain) if plain else None,
        checkpoint_s=max(rank.steps[-1]["checkpoint"] for rank in ranks),
        num_steps=len(ranks[0].steps) - 1,
    )


def table(split: Split) -> Table:
    """Return a table of the parts of the mean step; their sum is the step."""
    made = Table(box=None, padding=(0, 2, 0, 0))
    several = len(split.ranks) > 1
    for column in ("", "ms", "% of the step", *(["least and most, by rank"] if several else [])):
        made.add_column(column, justify="right" if column else "left")
    for part in [part for part in PARTS if any(rank[part] for rank in split.ranks)]:
        values = [rank[part] for rank in split.ranks]
        mean = statistics.mean(values)
        row = [part, f"{1000 * mean:,.1f}", f"{100 * mean / split.step_s:.1f}"]
        made.add_row(*row, *([f"{1000 * min(values):,.1f} to {1000 * max(values):,.1f}"] if several else []))
    made.add_row("step", f"{1000 * split.step_s:,.1f}", "100.0", style="bold")
    return made


def remarks(split: Split, config: RunConfig) -> list[str]:
    """Return lines to print below the table."""
    lines = [f"mean of {split.num_steps} steps on {len(split.ranks)} training worker(s), {split.device}"]
    if split.plain_step_s is not None:
        lines.append(f"a step without profiling takes {1000 * split.plain_step_s:,.1f} ms (median)")
    step_s = split.plain_step_s or split.step_s
    steps, seconds = config.checkpoint.save_every_steps, config.checkpoint.save_every_s
    between = [time for time in (steps and steps * step_s, seconds) if time is not None]
    share = f", {100 * split.checkpoint_s / (min(between) + split.checkpoint_s):.2g} % of the time" if between else ""
    lines.append(f"a checkpoint holds training up for {1000 * split.checkpoint_s:,.1f} ms{share}")
    return lines


def draw(figure: Figure, split: Split) -> None:
    """Draw a bar for each rank, its parts in the order of a step."""
    parts = [part for part in PARTS if any(rank[part] for rank in split.ranks)]
    figure.set_size_inches(7.2, 1.3 + 0.34 * len(split.ranks))
    height = figure.get_size_inches()[1]
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.5 / height, top=1 - 0.55 / height)
    axes = figure.subplots()
    for part in parts:
        color, alpha = _COLORS[part]
        left = [1000 * sum(rank[other] for other in PARTS[: PARTS.index(part)]) for rank in split.ranks]
        width = [1000 * rank[part] for rank in split.ranks]
        axes.barh(range(len(split.ranks)), width, left=left, color=color, alpha=alpha, height=0.7, label=part)
    axes.set_yticks(range(len(split.ranks)), [f"rank {rank}" for rank in range(len(split.ranks))])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlabel("ms of a step")
    where: Any = "lower left"
    axes.legend(loc=where, bbox_to_anchor=(0, 1.02), ncols=6, frameon=False, fontsize=7.5, labelcolor=INK,
                handlelength=1.0, columnspacing=1.2, borderaxespad=0)  # fmt: skip
