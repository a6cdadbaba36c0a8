"""Faults on purpose: one run left alone, one run in which things die, and whether both ended with the same weights.

    undisturbed   `sigray train` as it is; done once for a config
    disturbed     the same command, with faults at random moments; a driver that ends is started again
    compare       weights, optimizer state, losses, and the ledger of the disturbed one

What is drawn and what is compared are pure functions. Processes are found in /proc. Only those that descend from a
driver that was started here are signalled, by pid and start time: a pid alone may be another process by then.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from sigray.orchestrator.config import ClusterConfig, ConfigError, RunConfig, load_config
from sigray.orchestrator.formatting import format_duration
from sigray.orchestrator.run.folder import SUMMARY, RunFolder, read_run
from sigray.workers.checkpoint.index import FOLDER as CHECKPOINTS
from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.data.tar import DataError

FILE = "chaos.json"
UNDISTURBED, DISTURBED = "undisturbed", "disturbed"
TOLERANCE = 1e-3  # of the last loss, relative, where the run need not repeat its bits
# The watchdogs of the disturbed run. That of the trainers is the longer one by more than a data-shard worker needs to
# start (20 s on two busy cores): a run whose data hangs shall replace the reader, not the trainers that wait for it.
_TRAINER_TIMEOUT_S, _DATA_TIMEOUT_S = 40.0, 10.0
_POLL_S = 0.25
_LEAVE_S = 10.0  # for Ray's processes to end after their driver
_REFUSE_S = 6.0  # for which the first checkpoint is refused
_LONGEST_S = 120.0  # that a fault may last before the next one comes
_NUM_REFUSED = 5  # checkpoints to come that are refused
_MAX_IDLE_LIVES = 3  # drivers in a row that end without a step
_NUM_LOG_LINES = 25  # that an error shows


# ------------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Plan:
    """A fault to come."""

    kind: str
    wait_s: float  # after the run has got on from the last one
    choice: float  # in [0, 1): which of those that could be hit


def draw(seed: int, number: int, kinds: Sequence[str], every_s: float) -> Plan:
    """The fault of a number, counted from 0. Kinds come in rounds: each once before one comes again.

    Args:
        kinds: to draw from.
        every_s: mean of the waits.
    """
    turn, place = divmod(number, len(kinds))
    kind = random.Random(f"{seed}/round/{turn}").sample(list(kinds), len(kinds))[place]
    source = random.Random(f"{seed}/fault/{number}")
    return Plan(kind, min(source.expovariate(1 / every_s), 3 * every_s), source.random())


def impossible(config: RunConfig) -> dict[str, str]:
    """Kinds that this run cannot have, and why."""
    reasons = {}
    if "hang_timeout_s" not in ClusterConfig.model_fields:
        reasons["trainer-hang"] = "this version has no watchdog over training workers"
    if not config.eval.sets:
        reasons["evaluation"] = "the run has no eval.sets"
    if "://" in config.storage_uri:
        reasons["storage"] = "only a local storage can be made to refuse"
    if config.checkpoint.keep_newest < 2:
        reasons["truncate"] = f"checkpoint.keep_newest={config.checkpoint.keep_newest} keeps none to fall back to"
    return reasons


def choose_kinds(config: RunConfig, wanted: Sequence[str] | None) -> list[str]:
    """The kinds to draw from: those that are wanted, or all that the run can have.

    Raises:
        ConfigError: for one that does not exist or that the run cannot have.
    """
    reasons = impossible(config)
    if wanted is None:
        return [kind for kind in KINDS if kind not in reasons]
    for kind in wanted:
        if kind not in KINDS:
            raise ConfigError(f"--kinds: {kind!r} is none of {', '.join(KINDS)}")
        if kind in reasons:
            raise ConfigError(f"--kinds: {kind} is not possible here: {reasons[kind]}")
    if not wanted:
        raise ConfigError(f"--kinds is empty: some of {', '.join(KINDS)} expected")
    return list(dict.fromkeys(wanted))


def common_overrides(config: RunConfig, out: Path, name: str) -> list[str]:
    """What both runs have beside the user's overrides.

    Args:
        config: of the user.
        out: folder of both runs.
    """
    forced = {"run.dir": str(out), "run.name": name, "train.ledger": True, "cluster.address": None}
    if config.run.storage is not None:
        forced["run.storage"] = f"{config.run.storage.rstrip('/')}/{out.name}"
    return _as_overrides(forced)


def disturbed_overrides(config: RunConfig, kinds: Sequence[str], num_faults: int) -> list[str]:
    """What the disturbed run has besides: nothing that its weights could depend on."""
    # The faults are not to use up what a run may fail by itself.
    forced: dict[str, Any] = {
        "cluster.max_failures_per_hour": config.cluster.max_failures_per_hour + num_faults,
    }
    if "trainer-hang" in kinds:
        forced["cluster.hang_timeout_s"] = _TRAINER_TIMEOUT_S
    if "data-worker-hang" in kinds or "trainer-hang" in kinds:  # the one must be found before the other
        forced["data.worker_timeout_s"] = min(config.data.worker_timeout_s, _DATA_TIMEOUT_S)
    return _as_overrides(forced)


def _as_overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]  # JSON is YAML


# ----------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Outcome:
    """What a run has left behind."""

    step: int  # of its newest checkpoint
    files: dict[str, dict[str, Any]]  # of that checkpoint: name -> bytes, xxh3_128
    losses: list[tuple[int, float]]  # step and loss, as metrics.jsonl has them


def rounding(config: RunConfig) -> str:
    """Why the two runs need not agree bit for bit; empty where they must."""
    if config.cluster.accelerator == "cuda":
        return "cluster.accelerator=cuda sums in any order"
    least, most = config.cluster.worker_range
    if least != most:
        return f"cluster.num_workers=[{least}, {most}] sums in another order after a resize"
    return ""


def differences(undisturbed: Outcome, disturbed: Outcome, *, is_exact: bool) -> list[str]:
    """Where the disturbed run ended otherwise, the gravest first; empty where it did not.

    Args:
        is_exact: compare bits; else the last losses, to `TOLERANCE`.
    """
    found = []
    if undisturbed.step != disturbed.step:
        found.append(f"the last checkpoint is of step {disturbed.step:,}, undisturbed {undisturbed.step:,}")
    elif is_exact:
        for name, expected in undisturbed.files.items():
            if disturbed.files.get(name) != expected:
                found.append(f"{name} of step {disturbed.step:,} has other bytes")
    expected_losses, losses = dict(undisturbed.losses), dict(disturbed.losses)
    counts = Counter(step for step, _ in disturbed.losses)
    found += [f"step {step:,} is logged {count} times" for step, count in counts.items() if count > 1]
    found += [f"step {step:,} is not logged" for step in expected_losses if step not in losses]
    found += [f"step {step:,} is logged, which it is not undisturbed" for step in losses if step not in expected_losses]
    compared = sorted(expected_losses.keys() & losses.keys())
    for step in compared if is_exact else compared[-1:]:
        now, before = losses[step], expected_losses[step]
        if now != before and (is_exact or not abs(now - before) <= TOLERANCE * abs(before)):
            found.append(f"the loss of step {step:,} is {now!r}, undisturbed {before!r}")
    return found


def verdict(found: Sequence[str], num_losses: int, why_rounding: str) -> str:
    """One sentence for a list of differences."""
    if found:
        more = f" (and {len(found) - 1:,} more, see {FILE})" if len(found) > 1 else ""
        return f"different: {found[0]}{more}"
    if why_rounding:
        return (
            f"alike: the last losses agree to {TOLERANCE:g}, {num_losses:,} losses logged once each; ledger exact. "
            f"Weights may differ in rounding: {why_rounding}"
        )
    return f"identical: weights, optimizer and {num_losses:,} losses; ledger exact"


class LogReader:
    """What a run's output says of its progress, read piece by piece.

    Attributes:
        num_attempts: times that training workers came up.
        num_lines: steps logged, those that were done again included.
        num_in_attempt: of the newest attempt.
        step: the newest one.
        num_repeated: steps that were logged and done again, or to be done again.
    """

    def __init__(self) -> None:
        self.num_attempts = self.num_lines = self.num_in_attempt = self.step = self.num_repeated = 0
        self._rest = ""

    def feed(self, text: str) -> None:
        """The next piece of output; it may end within a line."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if match := re.match(r"steps +([\d,]+) to [\d,]+\s*$", line):
                first_step = _number(match[1])
                self.num_attempts += 1
                self.num_repeated += max(0, self.step - first_step)
                self.step, self.num_in_attempt = first_step, 0
            elif match := re.match(r"step +([\d,]+)  samples ", line):
                self.num_lines += 1
                self.num_in_attempt += 1
                self.step = _number(match[1])


def _number(text: str) -> int:
    return int(text.replace(",", ""))


# ----------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    """A line of the process table."""

    pid: int
    parent: int
    started: int  # clock ticks since boot: with the pid it names one process for ever
    state: str  # as ps has it: T is stopped, Z is dead but not yet waited for
    command: str

    @property
    def program(self) -> str:
        """Its first word, without folders."""
        return self.command.split(" ", 1)[0].rpartition("/")[2]


def read_process(pid: int) -> Process | None:
    """One process of this machine, None where there is none."""
    try:
        # The name in brackets may hold anything, brackets too.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Process(pid, int(fields[1]), int(fields[19]), fields[0], command)


def is_alive(process: Process) -> bool:
    """Whether it is there still, and not another one with its pid."""
    now = read_process(process.pid)
    return now is not None and now.started == process.started and now.state != "Z"


def descendants(processes: Mapping[int, Process], ancestors: set[int]) -> set[int]:
    """Pids of the ancestors and all below them."""
    family = set(ancestors)
    while grown := {pid for pid, process in processes.items() if process.parent in family} - family:
        family |= grown
    return family


class Family:
    """A process and all that descend from it, known beyond its death: the children of the dead get another parent.

    Args:
        pid: of a child of this process.
    """

    def __init__(self, pid: int) -> None:
        process = read_process(pid)
        self._known = {pid: process} if process is not None else {}

    def look(self) -> list[Process]:
        """Those that live. To be called often: who is born and orphaned between two looks is not seen."""
        found = (read_process(int(entry)) for entry in os.listdir("/proc") if entry.isdigit())
        now = {process.pid: process for process in found if process is not None}
        before = {pid for pid, process in self._known.items() if pid in now and now[pid].started == process.started}
        self._known = {pid: now[pid] for pid in descendants(now, before) if pid in now and now[pid].state != "Z"}
        return sorted(self._known.values(), key=lambda process: process.pid)

    def kill(self) -> None:
        """End all that live."""
        deadline = time.monotonic() + _LEAVE_S
        while (alive := self.look()) and time.monotonic() < deadline:
            for process in alive:
                send(process, signal.SIGKILL)
            time.sleep(0.05)


def send(process: Process, number: signal.Signals) -> bool:
    """Signal a process, never another one that has its pid by now. Returns whether it was there."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not is_alive(process):  # looked at after the handle was taken, so the handle is of this one
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


class Supervised:
    """A run in the background, through as many drivers as it takes.

    Args:
        config: of the run.
        command: that starts it, and goes on with it.
        log: file for its output.
        say: told of every restart.
        stuck_s: without a step, an attempt or a fault for so long it is given up.
        max_idle_lives: drivers in a row that may end without a step.

    Attributes:
        family: of the driver that lives.
        reader: what the output has said so far.
        num_restarts: of the driver.
        left_behind: commands of processes that outlived the last driver.
    """

    def __init__(
        self,
        config: RunConfig,
        command: list[str],
        log: Path,
        say: Callable[[str], None],
        *,
        stuck_s: float,
        max_idle_lives: int = _MAX_IDLE_LIVES,
    ) -> None:
        self.config, self.reader = config, LogReader()
        self.num_restarts, self.left_behind = 0, list[str]()
        self._command, self._log, self._say = command, log, say
        self._stuck_s, self._max_idle_lives = stuck_s, max_idle_lives
        self._num_idle_lives = 0

    def __enter__(self) -> Supervised:
        self._log.write_text("")
        self._output = self._log.open(errors="replace")
        self._start("--overwrite")
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._output.close()

    @property
    def since_s(self) -> float:
        """Since the first driver was started."""
        return time.monotonic() - self._begin

    def follow(self, until: Callable[[], bool]) -> bool:
        """Go on with the run until something is so; returns False where the run came to its end before.

        Raises:
            ConfigError: where `sigray train` refuses to start.
            RuntimeError: where the run does not get on.
        """
        while True:
            self.family.look()
            code = self._process.poll()  # before its output is read: then that is all of it
            before = self._got_on()
            self.reader.feed(self._output.read())
            if self._got_on() != before:
                self.touch()
            if code == 0:
                self._expect_the_end_of_all()
                return False
            if code is not None:
                self._restart(code)
            elif until():
                return True
            if time.monotonic() - self._touched > self._stuck_s:
                raise RuntimeError(f"the run made no step for {self._stuck_s:.0f} s:\n{self._last_lines()}")
            time.sleep(_POLL_S)

    def touch(self) -> None:
        """Count the time until the run is given up from here."""
        self._touched = time.monotonic()

    def find(self, is_wanted: Callable[[Process], bool], choice: float) -> Process | None:
        """One of the family's processes, None where there is none."""
        found = [process for process in self.family.look() if is_wanted(process)]
        return found[int(choice * len(found))] if found else None

    def kill(self) -> int:
        """Kill the driver, and its Ray with it. Returns the driver's pid."""
        self.family.look()
        self._process.kill()
        self._process.wait()
        self.family.kill()
        return self._process.pid

    def _start(self, *options: str) -> None:
        hidden = ("RAY_ADDRESS", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        environment |= {"COLUMNS": "160", "TERM": "dumb"}
        with self._log.open("a") as output:
            output.write("" if options else f"\n--- driver {self.num_restarts + 1}\n")
            output.flush()
            # A session of its own: Ctrl-C is for this process, which then ends the run.
            self._process = subprocess.Popen(
                [*self._command, *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        self.family = Family(self._process.pid)
        self._lines_before = self.reader.num_lines
        if options:
            self._begin = time.monotonic()
        self.touch()

    def _restart(self, code: int) -> None:
        self.family.kill()
        is_idle = self.reader.num_lines == self._lines_before
        self._num_idle_lives = self._num_idle_lives + 1 if is_idle else 0
        if is_idle and code == 2:
            raise ConfigError(f"`sigray train` refuses (exit code 2):\n{self._last_lines()}")
        if self._num_idle_lives >= self._max_idle_lives:
            raise RuntimeError(f"`sigray train` ended with exit code {code}:\n{self._last_lines()}")
        self.num_restarts += 1
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        self._say(f"  the driver {how}; starting it again at step {self.reader.step:,}")
        self._start()

    def _expect_the_end_of_all(self) -> None:
        """The run is over: Ray's processes follow the driver, or are remembered and ended."""
        deadline = time.monotonic() + _LEAVE_S
        while (alive := self.family.look()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self.left_behind += [process.command[:120] for process in alive]
        self.family.kill()

    def _got_on(self) -> tuple[int, int]:
        return self.reader.num_attempts, self.reader.num_lines

    def _last_lines(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-_NUM_LOG_LINES:]
        return "\n".join([*lines, f"(the end of {self._log})"])


# --------------------------------------------------------------------------------------------------------- kinds


@dataclass(frozen=True)
class Hit:
    """A fault that was injected."""

    pid: int | None = None
    is_over: Callable[[], bool] = lambda: True  # before it is, no other fault comes
    undo: Callable[[], None] = lambda: None  # called when it is, or when it has lasted too long


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        what: it does, for the user.
        ends_attempt: whether all training workers start anew.
        inject: does it; None where it is not possible at the moment.
    """

    what: str
    ends_attempt: bool
    inject: Callable[[Supervised, float], Hit | None]


def _signalled(
    number: signal.Signals, is_wanted: Callable[[Process], bool]
) -> Callable[[Supervised, float], Hit | None]:
    """Kill or stop a process; over when it is gone: a stopped one must be found and replaced by the run."""

    def inject(run: Supervised, choice: float) -> Hit | None:
        process = run.find(lambda process: is_wanted(process) and process.state != "T", choice)
        if process is None or not send(process, number):
            return None
        return Hit(process.pid, lambda: not is_alive(process))

    return inject


def _is_worker(name: str) -> Callable[[Process], bool]:
    """Ray titles a process by its actor or task, and by the method while one runs."""
    return lambda process: re.match(rf"ray::{name}\b", process.command) is not None


def _is_program(name: str) -> Callable[[Process], bool]:
    return lambda process: process.program == name


def _kill_driver(run: Supervised, choice: float) -> Hit | None:
    return Hit(run.kill())


def _truncate(run: Supervised, choice: float) -> Hit | None:
    """Cut the newest checkpoint's weights in half and kill the driver, so that the one before it must be taken."""
    folder = RunFolder(run.config)
    whole = _whole_checkpoints(folder)
    if len(whole) < 2:
        return None
    content = folder.storage.read(whole[-1])
    folder.storage.write(whole[-1], content[: len(content) // 2])
    return Hit(run.kill())


def _whole_checkpoints(folder: RunFolder) -> list[str]:
    """Paths of the weights of those that no earlier fault has cut, oldest first."""
    whole = []
    for info in list_checkpoints(folder.storage):
        path = f"{CHECKPOINTS}/{info.name}/model.safetensors"
        with contextlib.suppress(FileNotFoundError):  # deleted since: newer ones are there
            if len(folder.storage.read(path)) == info.files["model.safetensors"]["bytes"]:
                whole.append(path)
    return whole


def refused_steps(config: RunConfig, step: int) -> list[int]:
    """The steps behind a step whose checkpoints come next, as far as the config tells."""
    num_steps = -(-config.train.num_samples // config.train.global_batch_size)
    every = config.checkpoint.save_every_steps or config.train.log_every_steps
    following = range((step // every + 1) * every, num_steps, every)
    return [*following[:_NUM_REFUSED], num_steps][:_NUM_REFUSED] if step < num_steps else []


def _refuse_storage(run: Supervised, choice: float) -> Hit | None:
    """Put files where the next checkpoints want their folders: each write there fails."""
    folder = Path(run.config.storage_uri) / CHECKPOINTS
    folder.mkdir(exist_ok=True)
    placed: list[tuple[int, Path]] = []
    for step in refused_steps(run.config, run.reader.step):
        path = folder / f"step-{step:010d}"
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            placed.append((step, path))

    reached: list[float] = []

    def is_over() -> bool:
        if run.reader.step >= placed[0][0]:
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() - reached[0] > _REFUSE_S

    def undo() -> None:
        for _, path in placed:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                path.unlink()

    return Hit(None, is_over, undo) if placed else None


_TRAINER, _DATA_WORKER = _is_worker("RayTrainWorker"), _is_worker("DataWorkerActor")
_EVALUATION = _is_worker("(?:evaluate_checkpoint|FeatureWorker)")
KINDS: dict[str, Kind] = {
    "trainer": Kind("kill a training worker", True, _signalled(signal.SIGKILL, _TRAINER)),
    "trainer-hang": Kind("stop a training worker for good", True, _signalled(signal.SIGSTOP, _TRAINER)),
    "data-worker": Kind("kill a data-shard worker", False, _signalled(signal.SIGKILL, _DATA_WORKER)),
    "data-worker-hang": Kind("stop a data-shard worker for good", False, _signalled(signal.SIGSTOP, _DATA_WORKER)),
    "evaluation": Kind("kill an evaluation", False, _signalled(signal.SIGKILL, _EVALUATION)),
    "driver": Kind("kill the driver and its Ray", True, _kill_driver),
    "node": Kind("kill the raylet", True, _signalled(signal.SIGKILL, _is_program("raylet"))),
    "gcs": Kind("kill Ray's gcs_server", True, _signalled(signal.SIGKILL, _is_program("gcs_server"))),
    "storage": Kind("have the storage refuse checkpoints for a while", False, _refuse_storage),
    "truncate": Kind("cut the newest checkpoint in half, kill the driver", True, _truncate),
}


# ------------------------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class Fault:
    """One that was injected, as chaos.json has it."""

    time_s: float  # since the disturbed run began
    kind: str
    pid: int | None
    step: int  # that the run was at


@dataclass
class Result:
    """What chaos.json says."""

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
    """Run a config undisturbed and disturbed, and compare.

    Args:
        path, overrides: the config, as `sigray train` takes it.
        console: where progress goes.
        out: folder of both runs; by default {run.dir}/{run.name}-chaos.
        seed, num_faults, every_s, kinds: which faults, see `draw`.
        stuck_s: a run without progress for so long is given up.

    Raises:
        ConfigError: for what the user can mend.
        RuntimeError: where a run does not come to its end.
    """
    base = load_config(path, overrides)
    chosen = choose_kinds(base, kinds)
    out = (out or Path(base.run.dir) / f"{base.run.name}-chaos").absolute()
    out.mkdir(parents=True, exist_ok=True)
    result = Result(str(path), list(overrides), seed, chosen, num_faults)

    def say(message: str) -> None:
        console.print(message, highlight=False, markup=False, soft_wrap=True)

    def supervised(name: str, words: list[str], **options: Any) -> Supervised:
        words = [*overrides, *common_overrides(base, out, name), *words]
        config = load_config(path, words)
        command = [str(Path(sys.executable).with_name("sigray")), "train", str(path), *words]
        return Supervised(config, command, out / f"{name}.log", say, stuck_s=stuck_s, **options)

    undisturbed = supervised(UNDISTURBED, [], max_idle_lives=0)
    disturbed = supervised(DISTURBED, disturbed_overrides(base, chosen, num_faults))
    plans = [draw(seed, number, chosen, every_s) for number in range(num_faults)]
    try:
        with _sigterm_as_interrupt():
            _run_undisturbed(undisturbed, say)
            _run_disturbed(disturbed, plans, result, say)
        result.undisturbed_s = _read_summary(undisturbed.config)["total_s"]
        _compare(undisturbed.config, disturbed.config, result)
    except (RuntimeError, ValueError) as error:
        result.verdict = f"not compared: {error}"
        raise
    finally:
        (out / FILE).write_text(json.dumps(asdict(result), indent=1))
    return result


def _run_undisturbed(run: Supervised, say: Callable[[str], None]) -> None:
    if _is_finished(run.config):
        say(f"undisturbed: done before, in {run.config.folder}")
        return
    say(f"undisturbed: {run.config.folder}")
    with run:
        run.follow(lambda: False)


def _run_disturbed(run: Supervised, plans: Sequence[Plan], result: Result, say: Callable[[str], None]) -> None:
    say(f"disturbed: {run.config.folder}, {len(plans)} faults of {', '.join(result.kinds)}")
    with run:
        try:
            for fault in inject_all(run, plans):
                result.faults.append(fault)
                hit = f", pid {fault.pid}" if fault.pid is not None else ""
                say(
                    f"fault {len(result.faults)} of {len(plans)} after {format_duration(fault.time_s)}, "
                    f"step {fault.step:,}: {KINDS[fault.kind].what}{hit}"
                )
            run.follow(lambda: False)
        finally:
            result.disturbed_s = round(run.since_s, 1)
            result.num_restarts, result.left_behind = run.num_restarts, run.left_behind
            result.num_attempts, result.steps_repeated = run.reader.num_attempts, run.reader.num_repeated


def inject_all(run: Supervised, plans: Sequence[Plan]) -> Iterator[Fault]:
    """Carry out faults one after the other; between two of them the run gets on. Ends early where the run does."""
    num_attempts = num_lines = 0
    for plan in plans:
        if not _follow_until_it_gets_on(run, num_attempts, num_lines):
            return
        hit = _inject(run, plan)
        if hit is None:
            return
        run.touch()
        yield Fault(round(run.since_s, 1), plan.kind, hit.pid, run.reader.step)
        _let_pass(run, hit)
        num_attempts = run.reader.num_attempts + (1 if KINDS[plan.kind].ends_attempt else 0)
        num_lines = run.reader.num_lines


def _follow_until_it_gets_on(run: Supervised, num_attempts: int, num_lines: int) -> bool:
    """Until it has made a step more than so many, in an attempt of at least this number."""
    reader = run.reader
    return run.follow(
        lambda: reader.num_attempts >= num_attempts and reader.num_lines > num_lines and reader.num_in_attempt > 0
    )


def _inject(run: Supervised, plan: Plan) -> Hit | None:
    """Inject a fault when its time has come and it is possible; None where the run is over before."""
    due = time.monotonic() + plan.wait_s
    hits: list[Hit] = []

    def is_done() -> bool:
        hit = KINDS[plan.kind].inject(run, plan.choice) if time.monotonic() >= due else None
        hits.extend([hit] if hit is not None else [])
        return hit is not None

    return hits[0] if run.follow(is_done) else None


def _let_pass(run: Supervised, hit: Hit) -> None:
    begin = time.monotonic()
    try:
        run.follow(lambda: hit.is_over() or time.monotonic() - begin > _LONGEST_S)
    finally:
        hit.undo()


def _compare(undisturbed: RunConfig, disturbed: RunConfig, result: Result) -> None:
    """Fill in differences and verdict."""
    why_rounding = rounding(disturbed)
    expected = _outcome(undisturbed)
    result.differences = differences(expected, _outcome(disturbed), is_exact=not why_rounding)
    result.differences += _audit(disturbed)
    result.verdict = verdict(result.differences, len(expected.losses), why_rounding)


def _outcome(config: RunConfig) -> Outcome:
    folder = RunFolder(config)
    checkpoints = list_checkpoints(folder.storage)
    losses = [(int(line["step"]), line["train/loss"]) for line in folder.metrics()]
    newest = checkpoints[-1] if checkpoints else None
    return Outcome(newest.step if newest else 0, newest.files if newest else {}, losses)


def _audit(config: RunConfig) -> list[str]:
    from sigray.orchestrator.data.audit import audit_run

    try:
        found = audit_run(config)
    except DataError as error:
        return [str(error)]
    return [] if found.audit.is_exact else [found.verdict]


def _is_finished(config: RunConfig) -> bool:
    """Whether this very run is done already."""
    try:
        return read_run(str(config.folder)) == config and _read_summary(config)["status"] == "finished"
    except (ConfigError, FileNotFoundError):
        return False


def _read_summary(config: RunConfig) -> dict[str, Any]:
    return json.loads((config.folder / SUMMARY).read_text())


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Have SIGTERM end this process as Ctrl-C does: the run that it has started is ended too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def result_table(result: Result) -> Group:
    """Faults by kind, and what they cost."""
    table = Table(box=None, padding=(0, 0, 0, 2), show_header=False)
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    counts = Counter(fault.kind for fault in result.faults)
    rows = {KINDS[kind].what: f"{counts[kind]:,}" for kind in result.kinds}
    rows |= {
        "faults": f"{len(result.faults):,} of {result.num_wanted:,}",
        "drivers started again": f"{result.num_restarts:,}",
        "attempts of the training workers": f"{result.num_attempts:,}",
        "steps done again": f"{result.steps_repeated:,}",
        "time undisturbed": format_duration(result.undisturbed_s),
        "time disturbed": format_duration(result.disturbed_s),
    }
    for title, value in rows.items():
        table.add_row(Text(title), Text(value))
    notes = []
    if len(result.faults) < result.num_wanted:
        notes.append("The run was over before all faults were: raise train.num_samples, or lower --every-s.")
    if result.left_behind:
        notes.append(f"Outlived the run: {', '.join(result.left_behind)}")
    return Group(table, *(Text(note) for note in notes))
