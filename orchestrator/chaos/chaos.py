"""`sigray chaos`: compare a run that suffers faults with one that does not.

    undisturbed   `sigray train` as it is; done once for a config
    disturbed     the same command, with faults at random moments; a driver that ends is started again
    comparison    weights, optimizer state, losses, and the ledger of the disturbed run

`faults.py` draws and injects the faults, `comparison.py` compares. The schedule and the comparison are pure functions.
Only descendants of drivers that this command started are signalled (`processes.py`).
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from sigray.orchestrator.chaos.comparison import FILE, audit_differences, differences, read_outcome, rounding, verdict
from sigray.orchestrator.chaos.faults import KINDS, Hit, ScheduledFault, choose_kinds, draw
from sigray.orchestrator.chaos.supervised import Supervised
from sigray.orchestrator.config import ConfigError, RunConfig, load_config
from sigray.orchestrator.formatting import format_duration
from sigray.orchestrator.run_folder import SUMMARY, read_run
from sigray.orchestrator.tables import rows_table

UNDISTURBED, DISTURBED = "undisturbed", "disturbed"
# The watchdogs of the disturbed run. The trainers' is longer by more than a data-shard worker needs to start (20 s on
# two busy cores): if the data hangs, the run must replace the data-shard worker, not the trainers that wait for it.
_TRAINER_TIMEOUT_S, _DATA_TIMEOUT_S = 40.0, 10.0
_LONGEST_S = 120.0  # that a fault may last before the next one comes


@dataclass(frozen=True)
class Fault:
    """An injected fault, as chaos.json has it."""

    time_s: float  # since the disturbed run began
    kind: str
    pid: int | None
    step: int  # of the run at that time


@dataclass
class Result:
    """The content of chaos.json."""

    config: str
    overrides: list[str]
    seed: int
    kinds: list[str]
    num_wanted: int  # faults
    undisturbed_s: float = 0.0
    disturbed_s: float = 0.0
    num_restarts: int = 0
    num_attempts: int = 0
    steps_repeated: int = 0
    left_behind: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    verdict: str = ""


def chaos(
    path: str,
    overrides: list[str],
    console: Console,
    *,
    out: Path | None = None,
    seed: int = 0,
    num_faults: int = 20,
    every_s: float = 20.0,
    kinds: Sequence[str] | None = None,
    stuck_s: float = 900.0,
) -> Result:
    """Run a config undisturbed and disturbed, and compare the two runs.

    Args:
        path, overrides: the config, as `sigray train` takes it.
        console: for progress.
        out: folder of both runs; by default {run.dir}/{run.name}-chaos.
        seed, num_faults, every_s, kinds: which faults, see `draw`.
        stuck_s: give up a run that makes no progress for so many seconds.

    Raises:
        ConfigError: for what the user can fix.
        RuntimeError: if a run does not reach its end.
    """
    base = load_config(path, overrides)
    chosen = choose_kinds(base, kinds)
    out = (out or Path(base.run.dir) / f"{base.run.name}-chaos").absolute()
    out.mkdir(parents=True, exist_ok=True)
    result = Result(str(path), list(overrides), seed, chosen, num_faults)

    def say(message: str) -> None:
        console.print(message, soft_wrap=True)

    def supervised(name: str, words: list[str], **options: Any) -> Supervised:
        words = [*overrides, *common_overrides(base, out, name), *words]
        config = load_config(path, words)
        command = [str(Path(sys.executable).with_name("sigray")), "train", str(path), *words]
        return Supervised(config, command, out / f"{name}.log", say, stuck_s=stuck_s, **options)

    undisturbed = supervised(UNDISTURBED, [], max_idle_drivers=0)
    disturbed = supervised(DISTURBED, disturbed_overrides(base, chosen, num_faults))
    faults = [draw(seed, number, chosen, every_s) for number in range(num_faults)]
    try:
        if _is_finished(undisturbed.config):
            say(f"undisturbed: done before, in {undisturbed.config.folder}")
        else:
            say(f"undisturbed: {undisturbed.config.folder}")
            with undisturbed:
                undisturbed.follow(lambda: False)
        _run_disturbed(disturbed, faults, result, say)
        result.undisturbed_s = _read_summary(undisturbed.config)["total_s"]
        why_rounding = rounding(disturbed.config)
        expected = read_outcome(undisturbed.config)
        result.differences = differences(expected, read_outcome(disturbed.config), is_exact=not why_rounding)
        result.differences += audit_differences(disturbed.config)
        result.verdict = verdict(result.differences, len(expected.losses), why_rounding)
    except (RuntimeError, ValueError) as error:
        result.verdict = f"not compared: {error}"
        raise
    finally:
        (out / FILE).write_text(json.dumps(asdict(result), indent=1))
    return result


def common_overrides(config: RunConfig, out: Path, name: str) -> list[str]:
    """Return the overrides of both runs, in the folder `out`, besides the user's."""
    forced = {"run.dir": str(out), "run.name": name, "train.ledger": True, "cluster.address": None}
    if config.run.storage is not None:
        forced["run.storage"] = f"{config.run.storage.rstrip('/')}/{out.name}"
    return _as_overrides(forced)


def disturbed_overrides(config: RunConfig, kinds: Sequence[str], num_faults: int) -> list[str]:
    """Return the disturbed run's own overrides; its weights depend on none of them."""
    # The faults must not use up the failures that a run may have by itself.
    forced: dict[str, Any] = {"cluster.max_failures_per_hour": config.cluster.max_failures_per_hour + num_faults}
    if "trainer-hang" in kinds:
        forced["cluster.hang_timeout_s"] = _TRAINER_TIMEOUT_S
    if "data-worker-hang" in kinds or "trainer-hang" in kinds:  # the one must be found before the other
        forced["data.worker_timeout_s"] = min(config.data.worker_timeout_s, _DATA_TIMEOUT_S)
    return _as_overrides(forced)


def _as_overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]  # JSON is YAML


def _run_disturbed(run: Supervised, faults: list[ScheduledFault], result: Result, say: Callable[[str], None]) -> None:
    say(f"disturbed: {run.config.folder}, {len(faults)} faults of {', '.join(result.kinds)}")
    with run:
        try:
            for fault in _inject_all(run, faults):
                result.faults.append(fault)
                when = f"fault {len(result.faults)} of {len(faults)} after {format_duration(fault.time_s)}"
                hit = f", pid {fault.pid}" if fault.pid is not None else ""
                say(f"{when}, step {fault.step:,}: {KINDS[fault.kind].what}{hit}")
            run.follow(lambda: False)
        finally:
            result.disturbed_s = round(run.since_s, 1)
            result.num_restarts, result.left_behind = run.num_restarts, run.left_behind
            result.num_attempts, result.steps_repeated = run.reader.num_attempts, run.reader.num_repeated


def _inject_all(run: Supervised, faults: Sequence[ScheduledFault]) -> Iterator[Fault]:
    """Inject one fault after the other; the run makes progress between two of them.

    Ends early if the run does.
    """
    reader = run.reader
    num_attempts = num_lines = 0

    def has_progress() -> bool:
        return reader.num_attempts >= num_attempts and reader.num_lines > num_lines and reader.num_in_attempt > 0

    for fault in faults:
        hit = _inject(run, fault) if run.follow(has_progress) else None
        if hit is None:
            return
        run.touch()
        yield Fault(round(run.since_s, 1), fault.kind, hit.pid, reader.step)
        _follow_to_end_of(hit, run)
        num_attempts = reader.num_attempts + KINDS[fault.kind].ends_attempt
        num_lines = reader.num_lines


def _inject(run: Supervised, fault: ScheduledFault) -> Hit | None:
    """Inject a fault when it is due and possible; return None if the run ends before."""
    due = time.monotonic() + fault.wait_s
    hits: list[Hit] = []

    def is_done() -> bool:
        if time.monotonic() >= due and (hit := KINDS[fault.kind].inject(run, fault.choice)):
            hits.append(hit)
        return bool(hits)

    return hits[0] if run.follow(is_done) else None


def _follow_to_end_of(hit: Hit, run: Supervised) -> None:
    begin = time.monotonic()
    try:
        run.follow(lambda: hit.is_over() or time.monotonic() - begin > _LONGEST_S)
    finally:
        hit.undo()


def _is_finished(config: RunConfig) -> bool:
    """Return whether this very run is finished already."""
    try:
        return read_run(str(config.folder)) == config and _read_summary(config)["status"] == "finished"
    except (ConfigError, FileNotFoundError):
        return False


def _read_summary(config: RunConfig) -> dict[str, Any]:
    return json.loads((config.folder / SUMMARY).read_text())


def result_table(result: Result) -> Group:
    """Return the faults by kind, and their costs."""
    counts = Counter(fault.kind for fault in result.faults)
    rows = [(KINDS[kind].what, f"{counts[kind]:,}") for kind in result.kinds]
    rows += [
        ("faults", f"{len(result.faults):,} of {result.num_wanted:,}"),
        ("drivers started again", f"{result.num_restarts:,}"),
        ("attempts of the training workers", f"{result.num_attempts:,}"),
        ("steps done again", f"{result.steps_repeated:,}"),
        ("time undisturbed", format_duration(result.undisturbed_s)),
        ("time disturbed", format_duration(result.disturbed_s)),
    ]
    notes = [f"Outlived the run: {', '.join(result.left_behind)}"] if result.left_behind else []
    if len(result.faults) < result.num_wanted:
        notes.insert(0, "The run ended before all faults came: raise train.num_samples, or lower --every-s.")
    return Group(rows_table(rows, justify="right"), *(Text(note) for note in notes))
