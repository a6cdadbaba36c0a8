"""Faults: their schedule, a pure function of a seed, and the effect of each kind."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sigray.orchestrator.chaos.processes import is_alive, send
from sigray.orchestrator.chaos.supervised import Supervised
from sigray.orchestrator.config import ConfigError, RunConfig
from sigray.orchestrator.run_folder import RunFolder
from sigray.workers.checkpoint.index import FOLDER as CHECKPOINTS
from sigray.workers.checkpoint.index import list_checkpoints

_REFUSE_S = 6.0  # during which the first checkpoint is refused
_NUM_REFUSED = 5  # coming checkpoints that are refused


@dataclass(frozen=True)
class ScheduledFault:
    """A fault to inject."""

    kind: str
    wait_s: float  # after the run has made progress since the last fault
    choice: float  # in [0, 1): selects among the possible targets


def draw(seed: int, number: int, kinds: Sequence[str], every_s: float) -> ScheduledFault:
    """Return a fault by its number, counted from 0.

    Kinds come in rounds: each kind comes once before any comes again.

    Args:
        kinds: to draw from.
        every_s: mean of the waits.
    """
    turn, place = divmod(number, len(kinds))
    kind = random.Random(f"{seed}/round/{turn}").sample(list(kinds), len(kinds))[place]
    source = random.Random(f"{seed}/fault/{number}")
    return ScheduledFault(kind, min(source.expovariate(1 / every_s), 3 * every_s), source.random())


@dataclass(frozen=True)
class Hit:
    """An injected fault."""

    pid: int | None = None
    is_over: Callable[[], bool] = lambda: True  # no other fault comes before
    undo: Callable[[], None] = lambda: None  # called when the fault is over or has lasted too long


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        what: its effect, for the user.
        ends_attempt: whether all training workers start again.
        inject: injects it; returns None if it is not possible at the moment.
    """

    what: str
    ends_attempt: bool
    inject: Callable[[Supervised, float], Hit | None]


def choose_kinds(config: RunConfig, wanted: Sequence[str] | None) -> list[str]:
    """Return the kinds to draw from; None: all kinds that the run can have.

    Raises:
        ConfigError: for a kind that does not exist or that the run cannot have.
    """
    impossible = {}
    if not config.eval.sets:
        impossible["evaluation"] = "the run has no eval.sets"
    if "://" in config.storage_uri:
        impossible["storage"] = "only a local storage can be made to refuse"
    if config.checkpoint.keep_newest < 2:
        impossible["truncate"] = f"checkpoint.keep_newest={config.checkpoint.keep_newest} keeps none to fall back to"
    if wanted is None:
        return [kind for kind in KINDS if kind not in impossible]
    for kind in wanted:
        if kind not in KINDS:
            raise ConfigError(f"--kinds: {kind!r} is none of {', '.join(KINDS)}")
        if kind in impossible:
            raise ConfigError(f"--kinds: {kind} is not possible here: {impossible[kind]}")
    if not wanted:
        raise ConfigError(f"--kinds is empty: some of {', '.join(KINDS)} expected")
    return list(dict.fromkeys(wanted))


def _signalled(number: signal.Signals, command: str) -> Callable[[Supervised, float], Hit | None]:
    """Return an injection that signals a process whose command matches.

    It is over when the process is gone: the run must find and replace a stopped one.
    """

    def inject(run: Supervised, choice: float) -> Hit | None:
        family = run.family.look()
        found = [process for process in family if re.match(command, process.command) and process.state != "T"]
        process = found[int(choice * len(found))] if found else None
        if process is None or not send(process, number):
            return None
        return Hit(process.pid, lambda: not is_alive(process))

    return inject


def _truncate(run: Supervised, choice: float) -> Hit | None:
    """Cut the newest checkpoint's weights in half and kill the driver.

    The run must then resume from the checkpoint before.
    """
    storage = RunFolder(run.config).storage
    whole = []  # weights that no earlier fault has cut, oldest first
    for info in list_checkpoints(storage):
        path = f"{CHECKPOINTS}/{info.name}/model.safetensors"
        with contextlib.suppress(FileNotFoundError):  # deleted since: newer checkpoints exist
            if len(storage.read(path)) == info.files["model.safetensors"]["bytes"]:
                whole.append(path)
    if len(whole) < 2:
        return None
    content = storage.read(whole[-1])
    storage.write(whole[-1], content[: len(content) // 2])
    return Hit(run.kill())


def refused_steps(config: RunConfig, step: int) -> list[int]:
    """Return the steps of the next checkpoints, as far as the config says."""
    num_steps = -(-config.train.num_samples // config.train.global_batch_size)
    every = config.checkpoint.save_every_steps or config.train.log_every_steps
    following = range((step // every + 1) * every, num_steps, every)
    return [*following[:_NUM_REFUSED], num_steps][:_NUM_REFUSED] if step < num_steps else []


def _refuse_storage(run: Supervised, choice: float) -> Hit | None:
    """Put files at the paths of the next checkpoints' folders: each write there fails."""
    folder = Path(run.config.storage_uri) / CHECKPOINTS
    folder.mkdir(exist_ok=True)
    placed: dict[int, Path] = {}
    for step in refused_steps(run.config, run.reader.step):
        path = folder / f"step-{step:010d}"
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            placed[step] = path

    reached: list[float] = []

    def is_over() -> bool:
        if run.reader.step >= min(placed):
            reached.append(time.monotonic())
        return bool(reached) and time.monotonic() - reached[0] > _REFUSE_S

    def undo() -> None:
        for path in placed.values():
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                path.unlink()

    return Hit(None, is_over, undo) if placed else None


# Ray titles a process by its actor or task, and by the method while one runs.
_TRAINER, _DATA_WORKER = r"ray::RayTrainWorker\b", r"ray::DataWorkerActor\b"
_EVALUATION = r"ray::(?:evaluate_checkpoint|FeatureWorker)\b"
_RAYLET, _GCS_SERVER = r"([^ ]*/)?raylet( |$)", r"([^ ]*/)?gcs_server( |$)"
KINDS: dict[str, Kind] = {
    "trainer": Kind("kill a training worker", True, _signalled(signal.SIGKILL, _TRAINER)),
    "trainer-hang": Kind("stop a training worker for good", True, _signalled(signal.SIGSTOP, _TRAINER)),
    "data-worker": Kind("kill a data-shard worker", False, _signalled(signal.SIGKILL, _DATA_WORKER)),
    "data-worker-hang": Kind("stop a data-shard worker for good", False, _signalled(signal.SIGSTOP, _DATA_WORKER)),
    "evaluation": Kind("kill an evaluation", False, _signalled(signal.SIGKILL, _EVALUATION)),
    "driver": Kind("kill the driver and its Ray", True, lambda run, _: Hit(run.kill())),
    "node": Kind("kill the raylet", True, _signalled(signal.SIGKILL, _RAYLET)),
    "gcs": Kind("kill Ray's gcs_server", True, _signalled(signal.SIGKILL, _GCS_SERVER)),
    "storage": Kind("have the storage refuse checkpoints for a while", False, _refuse_storage),
    "truncate": Kind("cut the newest checkpoint in half, kill the driver", True, _truncate),
}
