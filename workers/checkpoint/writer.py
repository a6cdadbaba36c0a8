"""Writes and loads checkpoints; a thread writes, commit.json comes last.

    RUN/checkpoints/step-0000000400/model.safetensors    the towers, logit_scale, logit_bias, by open_clip's names
    RUN/checkpoints/step-0000000400/optimizer.pt         the optimizer's state
    RUN/checkpoints/step-0000000400/ema.safetensors      the average of the trained parameters, with train.ema
    RUN/checkpoints/step-0000000400/commit.json          step, samples seen, size and hash of the files, the model
    RUN/best_checkpoint.json                             name and figure of the best checkpoint, for keep_best
    RUN/left_out.json                                    steps whose batches are left out, after a bad loss
    RUN/metrics/0000000200-0000000400.jsonl              the lines of metrics between two checkpoints

A folder without commit.json is not a checkpoint. A resume needs no other state: the order of samples and the random
state of a step are functions of the step.
"""

from __future__ import annotations

import io
import json
import queue
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from sigray.workers.checkpoint.async_writer import BackgroundWriter
from sigray.workers.checkpoint.index import (
    COMMIT,
    EMA_FILE,
    FOLDER,
    METRICS_FOLDER,
    CheckpointError,
    CheckpointInfo,
    DamagedCheckpoint,
    committed_names,
    list_checkpoints,
    read_info,
)
from sigray.workers.checkpoint.lease import Fence
from sigray.workers.config import CheckpointConfig
from sigray.workers.parse import Count, ParseError, as_type, parse_json
from sigray.workers.sharding import gather, shard_like
from sigray.workers.storage import Storage, fingerprint

_WEIGHTS = "model.safetensors"
_OPTIMIZER = "optimizer.pt"
EMA = "ema"
"""Key of a parameter's average in the optimizer's state."""
_BEST = "best_checkpoint.json"
_LEFT_OUT = "left_out.json"
# Data types by safetensors' names, in the order in which the library sorts tensors, last first.
_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_POLL_S = 0.1  # between two checks for files of other ranks


def is_due(config: CheckpointConfig, steps_done: int, saved_step: int, since_saved_s: float) -> bool:
    """Whether to write a checkpoint now: by steps or by time.

    Args:
        saved_step: steps done at the newest checkpoint, or at the start of this attempt.
        since_saved_s: seconds since then.
    """
    steps, seconds = config.save_every_steps, config.save_every_s
    by_steps = steps is not None and steps_done // steps > saved_step // steps
    return steps_done > saved_step and (by_steps or (seconds is not None and since_saved_s >= seconds))


def superseded(infos: Sequence[CheckpointInfo], config: CheckpointConfig, best: str | None = None) -> list[str]:
    """Names of the checkpoints that may be deleted.

    Args:
        infos: of all checkpoints, oldest first.
        best: name of the checkpoint with the best figure so far.
    """
    kept = {info.name for info in infos[-config.keep_newest :]} | {best}
    if config.keep_every_samples is not None:
        milestone = -1
        for info in infos:  # the first at or after each multiple
            if info.samples_seen // config.keep_every_samples > max(milestone, 0):
                milestone = info.samples_seen // config.keep_every_samples
                kept.add(info.name)
    return [info.name for info in infos if info.name not in kept]


def write_safetensors(tensors: dict[str, torch.Tensor], file: Any) -> None:
    """Write the same bytes as `safetensors.torch.save`, without its copies.

    The library copies all weights twice first: twice their size in fresh memory, and as much work as writing them.

    Args:
        tensors: in host memory, contiguous.
        file: to write to.
    """
    dtypes = list(_DTYPES)
    order = sorted(tensors, key=lambda name: (-dtypes.index(tensors[name].dtype), name))
    header = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin = end
        end += tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        if tensors[name].nbytes:
            file.write(tensors[name].reshape(-1).view(torch.uint8).numpy())


def _save_without_checksum(content: Any, file: Any) -> None:
    """`torch.save` without CRC-32: commit.json has a hash, and each costs a core."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, file)
    finally:
        torch.serialization.set_crc32_options(before)


class CheckpointWriter:
    """Saves a run's state beside training. For rank 0.

    `save` copies the state to host memory and returns. A thread writes the copy, commits it and deletes superseded
    checkpoints. This needs host memory for one more copy of the state.

    Args:
        config: checkpoint section of the run.
        model: model section of the run, for commit.json.
        first_step: steps done when this attempt began.
        owner: of the run's lease, see `workers/checkpoint/lease.py`.
        warn: called from the thread when the storage refuses a write.

    Attributes:
        blocked_s: seconds for which `save` has blocked training so far.
        written_s: seconds for which the thread has written so far.
    """

    def __init__(
        self,
        storage: Storage,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: CheckpointConfig,
        model: dict[str, Any],
        *,
        first_step: int = 0,
        owner: str | None = None,
        warn: Callable[[str], None],
    ) -> None:
        self.blocked_s = self.written_s = 0.0
        self._storage, self._module, self._optimizer = storage, module, optimizer
        self._config, self._model, self._warn = config, model, warn
        self._saved_step = first_step
        self._saved_at = time.monotonic()
        self._fence = Fence(storage, owner)
        self._writer = BackgroundWriter("checkpoint", warn, self._fence)
        self._host: dict[str, torch.Tensor] = {}
        self._committed: queue.SimpleQueue[CheckpointInfo] = queue.SimpleQueue()

    def is_due(self, steps_done: int) -> bool:
        """Whether to call `save`; while a checkpoint is being written, the next one waits."""
        since_saved_s = time.monotonic() - self._saved_at
        return not self._writer.is_busy and is_due(self._config, steps_done, self._saved_step, since_saved_s)

    def save(
        self, steps_done: int, samples_seen: int, *, metrics: Sequence[dict[str, float]] = (), after: Iterable[str] = ()
    ) -> None:
        """Write a checkpoint in the background, after the one before is written.

        Args:
            metrics: lines since the last checkpoint.
            after: paths that must be in the storage before this checkpoint is committed.

        Raises:
            OSError: if the one before cannot be written within checkpoint.storage_timeout_s.
        """
        begin = time.monotonic()
        self._writer.wait(self._config.storage_timeout_s)
        weights = {name: self._copy(value, name) for name, value in self._module.state_dict().items()}
        optimizer = self._copy(self._optimizer.state_dict(), "optimizer")
        ema = _without_ema(optimizer, self._module, self._optimizer)
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        history = f"{METRICS_FOLDER}/{self._saved_step:010d}-{steps_done:010d}.jsonl"
        after = list(after)

        def write() -> None:
            began = time.monotonic()
            self._storage.write(history, lines.encode())
            self._write(weights, optimizer, ema, steps_done, samples_seen, after)
            try:
                delete_superseded(self._storage, self._config)
            except OSError as error:
                self._warn(f"old checkpoints could not be deleted; retrying at the next checkpoint: {error}")
            self.written_s += time.monotonic() - began

        self._writer.submit(f"the checkpoint of step {steps_done:,}", write)
        self._saved_step = steps_done
        self._saved_at = time.monotonic()
        self.blocked_s += self._saved_at - begin

    def take_committed(self) -> list[CheckpointInfo]:
        """Checkpoints that became durable since the last call."""
        return [self._committed.get() for _ in range(self._committed.qsize())]

    def wait(self) -> None:
        """Wait until the saved checkpoint is durable; raises as `close`."""
        self._writer.wait(self._config.storage_timeout_s)

    def close(self) -> None:
        """Wait until the saved checkpoint is durable, and end the thread.

        Raises:
            OSError: if the storage refuses for longer than checkpoint.storage_timeout_s.
        """
        self._writer.close(self._config.storage_timeout_s)

    def abandon(self) -> None:
        """Training failed: drop what is not committed."""
        self._writer.abandon()

    def _copy(self, value: Any, path: str) -> Any:
        """A copy in host memory, which is reused: the first touch of memory is slow."""
        if isinstance(value, dict):
            return {key: self._copy(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item, f"{path}.{number}") for number, item in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        host = self._host.get(path)
        if host is None:
            # Not empty_like: for an XLA tensor it returns one without host memory.
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda")
            self._host[path] = host
        return host.copy_(gather(value.detach()))

    def _write(
        self,
        weights: dict[str, torch.Tensor],
        optimizer: Any,
        ema: dict[str, torch.Tensor],
        step: int,
        samples_seen: int,
        after: list[str],
    ) -> None:
        name = f"step-{step:010d}"
        folder = f"{FOLDER}/{name}"
        # A damaged checkpoint of this name may still have its commit.json.
        self._storage.delete(f"{folder}/{COMMIT}")
        writers = {
            _WEIGHTS: partial(write_safetensors, weights),
            _OPTIMIZER: partial(_save_without_checksum, optimizer),
            **({EMA_FILE: partial(write_safetensors, ema)} if ema else {}),
        }
        files = {file: self._storage.write_hashed(f"{folder}/{file}", write) for file, write in writers.items()}
        while not all(map(self._storage.exists, after)):
            time.sleep(_POLL_S)
        self._fence.check()  # again: the files may have taken minutes
        info = CheckpointInfo(name, step, samples_seen, files, self._model)
        # On condition: if another writer has committed, its files may be of another attempt. All is written again.
        self._storage.write_if(f"{folder}/{COMMIT}", json.dumps(asdict(info), indent=1).encode(), None)
        self._committed.put(info)


def _names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters, as its state numbers them."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _without_ema(state: Any, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Take the averages out of the content of `state_dict`; returns them by name."""
    names = enumerate(_names(module, optimizer))
    return {name: state["state"][number].pop(EMA) for number, name in names if EMA in state["state"].get(number, {})}


@dataclass(frozen=True)
class Border:
    """How the phase after a checkpoint differs from the checkpoint's own.

    Attributes:
        init_fresh: patterns of the trained parameters that start fresh.
        resize: name, tensor of the checkpoint, tensor of the model, model -> the tensor in the model's size.
        begins_average: whether the average of the weights begins again, with the weights.
    """

    init_fresh: tuple[str, ...]
    resize: Callable[[str, torch.Tensor, torch.Tensor, nn.Module], torch.Tensor]
    begins_average: bool = False

    def is_fresh(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.init_fresh)


def help_to_save(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give rank 0 this rank's parts of split tensors during `CheckpointWriter.save`."""

    def gather_all(value: Any) -> None:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                gather_all(item)
        elif isinstance(value, torch.Tensor):
            gather(value.detach())

    gather_all(dict(module.state_dict()))
    gather_all(optimizer.state_dict())


def load_weights(
    storage: Storage,
    info: CheckpointInfo,
    module: nn.Module,
    load_tower: Callable[[], object] = lambda: None,
    *,
    ema: bool = False,
    border: Border | None = None,
) -> set[str]:
    """Load a checkpoint's weights into the model.

    Args:
        border: between the checkpoint's phase and the model's, if they differ.
        ema: load the average of the trained parameters; buffers and locked parameters are those of the last step.
        load_tower: loads a locked image tower into the module. Called if the checkpoint lacks that tower, because its
            run read the embeddings from a store.

    Returns:
        Names of the tensors that are not the checkpoint's, but fresh or resized.

    Raises:
        DamagedCheckpoint: for a file that differs from the committed one.
        CheckpointError: for weights of another model.
    """
    from safetensors.torch import load

    tensors = load(_verified(storage, info, _WEIGHTS))
    if ema:
        tensors |= load(_verified(storage, info, EMA_FILE))
    is_stored = "visual" in info.model.get("locked", ()) and not any(name.startswith("visual.") for name in tensors)
    if is_stored:
        load_tower()
    renewed: set[str] = set()
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name, own in module.state_dict().items():
        if border is not None and name in trained and border.is_fresh(name):
            tensors[name] = own
            renewed.add(name)
        elif border is not None and name in tensors and tensors[name].shape != own.shape:
            tensors[name] = border.resize(name, tensors[name], own, module)
            renewed.add(name)
        if is_stored and name.startswith("visual."):
            tensors[name] = own
        elif name in tensors and tensors[name].shape == own.shape:
            tensors[name] = shard_like(tensors[name], own)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{info.uri(storage.uri)} holds another model: {error}") from error
    return renewed


def load_checkpoint(
    storage: Storage,
    info: CheckpointInfo,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    border: Border | None = None,
) -> None:
    """Load a checkpoint's weights and optimizer state; raises as `load_weights`.

    Args:
        border: as `load_weights`. Fresh and resized parameters begin without optimizer state and without average.
    """
    from safetensors.torch import load

    renewed = load_weights(storage, info, module, border=border)
    state = torch.load(io.BytesIO(_verified(storage, info, _OPTIMIZER)), map_location="cpu", weights_only=True)
    keeps_average = info.has_ema and not (border is not None and border.begins_average)
    ema = load(_verified(storage, info, EMA_FILE)) if keeps_average else {}
    for number, name in enumerate(_names(module, optimizer)):
        if name in renewed:
            state["state"].pop(number, None)
        elif name in ema:
            state["state"][number][EMA] = ema[name]
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        # The config has these: those of another phase, or of another kind of device, are in the checkpoint.
        saved |= {key: value for key, value in group.items() if key != "params"}
        for number, parameter in zip(saved["params"], group["params"], strict=True):
            known = state["state"].get(number, {})
            known |= {
                key: shard_like(value, parameter) for key, value in known.items() if value.shape == parameter.shape
            }
    optimizer.load_state_dict(state)


def load_newest(
    storage: Storage, load: Callable[[CheckpointInfo], None], warn: Callable[[str], None]
) -> CheckpointInfo | None:
    """Load the newest undamaged checkpoint; None if the run has no checkpoint.

    Newer damaged checkpoints lose their commit.json, so no reader counts or tries them again.

    Args:
        load: loads a checkpoint, or raises DamagedCheckpoint. Called for the newest first, until one is loaded.
        warn: called for each damaged checkpoint.

    Raises:
        CheckpointError: if all are damaged, or the newest is of another model.
    """
    names = committed_names(storage)
    damaged = []
    for name in reversed(names):
        try:
            info = read_info(storage, name)
            load(info)
        except DamagedCheckpoint as error:
            warn(f"{error}. Loading the checkpoint before it")
            damaged.append(name)
        else:
            for other in damaged:
                storage.delete(f"{FOLDER}/{other}/{COMMIT}")
            return info
    if names:
        raise CheckpointError(
            f"{storage.uri}/{FOLDER}: all {len(names)} checkpoints are damaged ({', '.join(names)}); delete them to "
            "start the run again"
        )
    return None


@dataclass(frozen=True)
class _Best:
    name: str
    figure: float


@dataclass(frozen=True)
class _LeftOut:
    steps: list[Count]


def mark_best(storage: Storage, name: str, figure: float) -> None:
    """Keep this checkpoint until another one is better."""
    storage.write(_BEST, json.dumps({"name": name, "figure": figure}).encode())


def read_best(storage: Storage) -> tuple[str, float] | None:
    """Name and figure of the best checkpoint so far; None if there is none."""
    try:
        best = as_type(_Best, parse_json(storage.read(_BEST)))
    except (FileNotFoundError, ParseError):
        return None
    return best.name, best.figure


def leave_out(storage: Storage, step: int) -> None:
    """Leave the batch of this step (counted from 1) out of training, in every attempt."""
    storage.write(_LEFT_OUT, json.dumps({"steps": sorted({*read_left_out(storage), step})}).encode())


def read_left_out(storage: Storage) -> list[int]:
    """Steps given to `leave_out`, counted from 1.

    Raises:
        CheckpointError: for a file with another content.
    """
    try:
        return as_type(_LeftOut, parse_json(storage.read(_LEFT_OUT))).steps
    except FileNotFoundError:
        return []
    except ParseError as error:
        raise CheckpointError(f"{storage.uri}/{_LEFT_OUT}: {error}") from None


def delete_superseded(storage: Storage, config: CheckpointConfig) -> None:
    """Delete superseded checkpoints, and uncommitted ones before the newest."""
    infos, best = list_checkpoints(storage), read_best(storage)
    old = set(superseded(infos, config, best[0] if best else None))
    known = {info.name for info in infos}
    for name in storage.list(FOLDER):
        is_leftover = name.startswith("step-") and name not in known and bool(infos) and name < infos[-1].name
        if name in old or is_leftover:
            # commit.json first: no reader takes a half-deleted folder for a checkpoint.
            storage.delete(f"{FOLDER}/{name}/{COMMIT}")
            storage.delete_folder(f"{FOLDER}/{name}")


def _verified(storage: Storage, info: CheckpointInfo, file: str) -> bytes:
    path = f"{FOLDER}/{info.name}/{file}"
    try:
        content = storage.read(path)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{storage.uri}/{path} is missing") from error
    expected = info.files.get(file, {})
    if fingerprint(content) != expected:
        raise DamagedCheckpoint(
            f"{storage.uri}/{path} is damaged: {len(content)} bytes, {expected.get('bytes')} expected, or another "
            "XXH3 hash"
        )
    return content
