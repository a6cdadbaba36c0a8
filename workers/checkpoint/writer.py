"""Checkpoints in a run's storage: written file by file beside training, committed by one small object last.

    RUN/checkpoints/step-0000000400/model.safetensors    the towers, logit_scale, logit_bias, by open_clip's names
    RUN/checkpoints/step-0000000400/optimizer.pt         AdamW's state
    RUN/checkpoints/step-0000000400/commit.json          step, samples seen, size and hash of the files, the model
    RUN/best_checkpoint.json                             name and figure of the best one, for checkpoint.keep_best
    RUN/left_out.json                                    steps whose batches change nothing, after a bad loss
    RUN/metrics/0000000200-0000000400.jsonl              the lines of metrics between two checkpoints

A folder without commit.json is not a checkpoint. Nothing else is needed to go on: the order of samples is a function
of the step, and so is the random state of a step.
"""

from __future__ import annotations

import io
import json
import queue
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from sigray.workers.checkpoint.async_writer import BackgroundWriter
from sigray.workers.checkpoint.index import (
    COMMIT,
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
from sigray.workers.sharding import gather, shard_like
from sigray.workers.storage import Storage, fingerprint

_WEIGHTS, _OPTIMIZER, _BEST = "model.safetensors", "optimizer.pt", "best_checkpoint.json"
_LEFT_OUT = "left_out.json"
# Names of safetensors' kinds, in the order in which it lays tensors down, last first.
_KINDS = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_OF_THE_DEVICE = "fused", "foreach", "capturable", "lr"
_LOOK_S = 0.1  # between two looks for files of other ranks


def is_due(config: CheckpointConfig, steps_done: int, saved_step: int, since_saved_s: float) -> bool:
    """Whether a checkpoint should be written now: a multiple of the steps was reached, or the time is up.

    Args:
        saved_step: steps done at the newest one, or at the beginning of this attempt.
        since_saved_s: seconds since then.
    """
    steps, seconds = config.save_every_steps, config.save_every_s
    by_steps = steps is not None and steps_done // steps > saved_step // steps
    return steps_done > saved_step and (by_steps or (seconds is not None and since_saved_s >= seconds))


def superseded(infos: Sequence[CheckpointInfo], config: CheckpointConfig, best: str | None = None) -> list[str]:
    """Names of the checkpoints that need not be kept.

    Args:
        infos: all, oldest first.
        best: name of the one with the best figure so far.
    """
    kept = {info.name for info in infos[-config.keep_newest :]} | {best}
    if config.keep_every_samples is not None:
        milestone = -1
        for info in infos:  # the first at or behind each multiple
            if info.samples_seen // config.keep_every_samples > max(milestone, 0):
                milestone = info.samples_seen // config.keep_every_samples
                kept.add(info.name)
    return [info.name for info in infos if info.name not in kept]


def write_safetensors(tensors: dict[str, torch.Tensor], file: Any) -> None:
    """The bytes of `safetensors.torch.save`, which makes two copies of all weights first: twice their size in fresh
    memory, and as much work as writing them.

    Args:
        tensors: in the host's memory, contiguous.
        file: to write to.
    """
    kinds = list(_KINDS)
    order = sorted(tensors, key=lambda name: (-kinds.index(tensors[name].dtype), name))
    header, offset = {}, 0
    for name in order:
        tensor, begin = tensors[name], offset
        offset += tensor.nbytes
        header[name] = {"dtype": _KINDS[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, offset]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        if tensors[name].nbytes:
            file.write(tensors[name].reshape(-1).view(torch.uint8).numpy())


def _save_without_checksum(content: Any, file: Any) -> None:
    """`torch.save` less the CRC-32 of its zip entries: the hash says more, and both cost a core's time."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, file)
    finally:
        torch.serialization.set_crc32_options(before)


class CheckpointWriter:
    """Saves a run's state beside training. For rank 0.

    `save` copies the state to memory of the host and returns; a thread writes the copy, commits it and deletes what
    need not be kept. The host's memory holds the state once more for that.

    Args:
        storage: the run's.
        module, optimizer: whose state is saved.
        config: checkpoint section of the run.
        model: model section of the run, for commit.json.
        first_step: steps done when this attempt began.
        owner: of the run's lease, see `workers/checkpoint/lease.py`.
        warn: told, from the thread, when the storage refuses.

    Attributes:
        blocked_s: seconds for which `save` has held up training so far.
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
        self._saved_step, self._saved_at = first_step, time.monotonic()
        self._fence = Fence(storage, owner)
        self._writer = BackgroundWriter("checkpoint", warn, self._fence)
        self._host: dict[str, torch.Tensor] = {}
        self._committed: queue.SimpleQueue[CheckpointInfo] = queue.SimpleQueue()

    def is_due(self, steps_done: int) -> bool:
        """Whether to call `save`. Not while the last one is being written: it stays due until then."""
        return not self._writer.is_busy and is_due(
            self._config, steps_done, self._saved_step, time.monotonic() - self._saved_at
        )

    def save(
        self,
        steps_done: int,
        samples_seen: int,
        *,
        metrics: Sequence[dict[str, float]] = (),
        after: Iterable[str] = (),
    ) -> None:
        """Write a checkpoint in the background; waits until the one before is written.

        Args:
            metrics: lines since the last checkpoint.
            after: paths that must be in the storage before this one is committed.

        Raises:
            OSError: where the one before cannot be written within checkpoint.storage_timeout_s.
        """
        begin = time.monotonic()
        self._writer.wait(self._config.storage_timeout_s)
        weights = {name: self._copy(value, name) for name, value in self._module.state_dict().items()}
        optimizer = self._copy(self._optimizer.state_dict(), "optimizer")
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        history = f"{METRICS_FOLDER}/{self._saved_step:010d}-{steps_done:010d}.jsonl"
        after = list(after)

        def write() -> None:
            began = time.monotonic()
            self._storage.write(history, lines.encode())
            self._write(weights, optimizer, steps_done, samples_seen, after)
            self._delete_superseded()
            self.written_s += time.monotonic() - began

        self._writer.submit(f"the checkpoint of step {steps_done:,}", write)
        self._saved_step, self._saved_at = steps_done, time.monotonic()
        self.blocked_s += self._saved_at - begin

    def take_committed(self) -> list[CheckpointInfo]:
        """Checkpoints that became durable since the last call."""
        return [self._committed.get() for _ in range(self._committed.qsize())]

    def wait(self) -> None:
        """Until what was saved is durable; raises as `close`."""
        self._writer.wait(self._config.storage_timeout_s)

    def close(self) -> None:
        """Wait for what is being written.

        Raises:
            OSError: where the storage refuses for longer than checkpoint.storage_timeout_s.
        """
        self._writer.close(self._config.storage_timeout_s)

    def abandon(self) -> None:
        """Training failed: leave what is not committed."""
        self._writer.abandon()

    def _copy(self, value: Any, path: str) -> Any:
        """A copy in host memory that is used again at the next checkpoint: the first touch of memory costs."""
        if isinstance(value, dict):
            return {key: self._copy(item, f"{path}.{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item, f"{path}.{number}") for number, item in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        host = self._host.get(path)
        if host is None:
            # Not empty_like: of an XLA tensor it makes one that has no memory of the host's.
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda")
            self._host[path] = host
        return host.copy_(gather(value.detach()))

    def _write(
        self, weights: dict[str, torch.Tensor], optimizer: Any, step: int, samples_seen: int, after: list[str]
    ) -> None:
        name = f"step-{step:010d}"
        folder = f"{FOLDER}/{name}"
        # A damaged one of this name, from which a run could not go on, may still be marked as complete.
        self._storage.delete(f"{folder}/{COMMIT}")
        files = {
            _WEIGHTS: self._storage.write_hashed(f"{folder}/{_WEIGHTS}", lambda file: write_safetensors(weights, file))
        }
        files[_OPTIMIZER] = self._storage.write_hashed(
            f"{folder}/{_OPTIMIZER}", lambda file: _save_without_checksum(optimizer, file)
        )
        while not all(map(self._storage.exists, after)):
            time.sleep(_LOOK_S)
        self._fence.check()  # again: the files may have taken minutes
        info = CheckpointInfo(name, step, samples_seen, files, self._model)
        self._storage.write(f"{folder}/{COMMIT}", json.dumps(asdict(info), indent=1).encode())
        self._committed.put(info)

    def _delete_superseded(self) -> None:
        try:
            delete_superseded(self._storage, self._config)
        except OSError as error:
            self._warn(f"old checkpoints could not be deleted, which is tried again at the next one: {error}")


def help_to_save(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What the other ranks do while rank 0 calls `CheckpointWriter.save`: give it their parts of what is split."""

    def give(value: Any) -> None:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                give(item)
        elif isinstance(value, torch.Tensor):
            gather(value.detach())

    give(dict(module.state_dict()))
    give(optimizer.state_dict())


def load_weights(
    storage: Storage, info: CheckpointInfo, module: nn.Module, load_tower: Callable[[], None] = lambda: None
) -> None:
    """Put a checkpoint's weights into the model.

    Args:
        load_tower: called where the checkpoint has none of a locked image tower's weights, since its run read that
            tower's embeddings from a store; has the module hold them.

    Raises:
        DamagedCheckpoint: for a file that is not what was committed.
        CheckpointError: for weights of another model.
    """
    from safetensors.torch import load

    tensors = load(_verified(storage, info, _WEIGHTS))
    of_store = "visual" in info.model.get("locked", ()) and not any(name.startswith("visual.") for name in tensors)
    if of_store:
        load_tower()
    for name, own in module.state_dict().items():
        if of_store and name.startswith("visual."):
            tensors[name] = own
        elif name in tensors and tensors[name].shape == own.shape:
            tensors[name] = shard_like(tensors[name], own)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{storage.uri}/{FOLDER}/{info.name} holds another model: {error}") from error


def load_checkpoint(
    storage: Storage, info: CheckpointInfo, module: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put a checkpoint's weights and optimizer state back; raises as `load_weights`."""
    load_weights(storage, info, module)
    state = torch.load(io.BytesIO(_verified(storage, info, _OPTIMIZER)), map_location="cpu", weights_only=True)
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        # The run may have been on another kind of device, whose optimizer had another implementation.
        saved |= {key: group[key] for key in _OF_THE_DEVICE if key in group}
        for number, parameter in zip(saved["params"], group["params"], strict=True):
            known = state["state"].get(number, {})
            known |= {
                key: shard_like(value, parameter) for key, value in known.items() if value.shape == parameter.shape
            }
    optimizer.load_state_dict(state)


def load_newest(
    storage: Storage, module: nn.Module, optimizer: torch.optim.Optimizer, warn: Callable[[str], None]
) -> CheckpointInfo | None:
    """Go on from the newest checkpoint that is whole; None where the run has none yet.

    Newer ones that are damaged lose their commit mark: nothing shall count or try them again.

    Args:
        warn: told of each that is damaged.

    Raises:
        CheckpointError: where all are damaged, or the newest is of another model.
    """
    names, damaged = committed_names(storage), []
    for name in reversed(names):
        try:
            info = read_info(storage, name)
            load_checkpoint(storage, info, module, optimizer)
        except DamagedCheckpoint as error:
            warn(f"{error}. The one before it is taken")
            damaged.append(name)
        else:
            for other in damaged:
                storage.delete(f"{FOLDER}/{other}/{COMMIT}")
            return info
    if names:
        raise CheckpointError(
            f"{storage.uri}/{FOLDER}: all {len(names)} checkpoints are damaged ({', '.join(names)}); delete them to "
            "begin the run anew"
        )
    return None


def mark_best(storage: Storage, name: str, figure: float) -> None:
    """Keep this checkpoint until another one is better."""
    storage.write(_BEST, json.dumps({"name": name, "figure": figure}).encode())


def read_best(storage: Storage) -> tuple[str, float] | None:
    """Name and figure of the best checkpoint so far."""
    try:
        best = json.loads(storage.read(_BEST))
        return best["name"], best["figure"]
    except (FileNotFoundError, ValueError, KeyError):
        return None


def leave_out(storage: Storage, step: int) -> None:
    """From now on this step (counted from 1) passes without changing the weights, in whatever attempt."""
    storage.write(_LEFT_OUT, json.dumps({"steps": sorted({*read_left_out(storage), step})}).encode())


def read_left_out(storage: Storage) -> list[int]:
    """The steps that `leave_out` was told, counted from 1."""
    try:
        return json.loads(storage.read(_LEFT_OUT))["steps"]
    except FileNotFoundError:
        return []


def delete_superseded(storage: Storage, config: CheckpointConfig) -> None:
    """Delete what need not be kept; also what was never committed and is older than the newest."""
    infos, best = list_checkpoints(storage), read_best(storage)
    old = set(superseded(infos, config, best[0] if best else None))
    known = {info.name for info in infos}
    for name in storage.list(FOLDER):
        is_leftover = name.startswith("step-") and name not in known and bool(infos) and name < infos[-1].name
        if name in old or is_leftover:
            # The commit mark first: a reader never takes a half-deleted folder for a checkpoint.
            storage.delete(f"{FOLDER}/{name}/{COMMIT}")
            storage.delete_folder(f"{FOLDER}/{name}")


def _verified(storage: Storage, info: CheckpointInfo, file: str) -> bytes:
    path = f"{FOLDER}/{info.name}/{file}"
    try:
        content = storage.read(path)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{storage.uri}/{path} is missing") from error
    if fingerprint(content) != info.files[file]:
        raise DamagedCheckpoint(
            f"{storage.uri}/{path} is damaged: {len(content)} bytes, {info.files[file]['bytes']} expected, or another "
            "XXH3 hash"
        )
    return content
