"""Checkpoints in a run's storage: written file by file, committed by one small object last.

    RUN/checkpoints/step-0000000400/model.safetensors    the towers, logit_scale, logit_bias, by open_clip's names
    RUN/checkpoints/step-0000000400/optimizer.pt         AdamW's state
    RUN/checkpoints/step-0000000400/commit.json          step, samples seen, size and SHA-256 of the files, the model

A folder without commit.json is not a checkpoint. Nothing else is needed to go on: the order of samples is a function
of the step, and so is the random state of a step.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workers.storage import Storage

FOLDER = "checkpoints"
_WEIGHTS, _OPTIMIZER, _COMMIT = "model.safetensors", "optimizer.pt", "commit.json"


class CheckpointError(ValueError):
    """A checkpoint that is damaged or belongs to another run; the message names it."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What commit.json says."""

    name: str
    step: int  # steps done
    samples_seen: int
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256
    model: dict[str, Any]  # the run's model section


def save_checkpoint(
    storage: Storage,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    samples_seen: int,
    model: dict[str, Any],
) -> CheckpointInfo:
    """Write a checkpoint of `step` steps and commit it. Called by one rank.

    Raises:
        OSError: from the storage; the checkpoint does not exist then.
    """
    from safetensors.torch import save_file

    name = f"step-{step:010d}"
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder)
        tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
        save_file(tensors, local / _WEIGHTS)
        torch.save(optimizer.state_dict(), local / _OPTIMIZER)
        files = {file.name: _fingerprint(file.read_bytes()) for file in sorted(local.iterdir())}
        for file in files:
            storage.upload(local / file, f"{FOLDER}/{name}/{file}")
    info = CheckpointInfo(name, step, samples_seen, files, model)
    storage.write(f"{FOLDER}/{name}/{_COMMIT}", json.dumps(asdict(info), indent=1).encode())
    return info


def list_checkpoints(storage: Storage) -> list[CheckpointInfo]:
    """The committed checkpoints of a run, oldest first."""
    names = [name for name in storage.list(FOLDER) if storage.exists(f"{FOLDER}/{name}/{_COMMIT}")]
    return sorted((read_info(storage, name) for name in names), key=lambda info: info.step)


def is_committed(storage: Storage, info: CheckpointInfo) -> bool:
    """Whether a checkpoint is there, and not deleted since."""
    return storage.exists(f"{FOLDER}/{info.name}/{_COMMIT}")


def read_info(storage: Storage, name: str) -> CheckpointInfo:
    """commit.json of a checkpoint.

    Raises:
        CheckpointError: where it is not there or not readable.
    """
    try:
        return CheckpointInfo(**json.loads(storage.read(f"{FOLDER}/{name}/{_COMMIT}")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{storage.uri}/{FOLDER}/{name} is not a complete checkpoint: {error}") from error


def load_weights(storage: Storage, info: CheckpointInfo, module: nn.Module) -> None:
    """Put a checkpoint's weights into the model.

    Raises:
        CheckpointError: for a damaged file, or weights of another model.
    """
    from safetensors.torch import load

    tensors = load(_verified(storage, info, _WEIGHTS))
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
    optimizer.load_state_dict(state)


def delete_old_checkpoints(storage: Storage, keep_newest: int) -> None:
    """Keep the newest ones; also remove what was never committed and is older than the newest."""
    committed = [info.name for info in list_checkpoints(storage)]
    keep = set(committed[-keep_newest:])
    for name in storage.list(FOLDER):
        if name not in keep and committed and name < committed[-1]:
            # The commit mark first: a reader never takes a half-deleted folder for a checkpoint.
            storage.delete(f"{FOLDER}/{name}/{_COMMIT}")
            storage.delete_folder(f"{FOLDER}/{name}")


def _verified(storage: Storage, info: CheckpointInfo, file: str) -> bytes:
    content, path = storage.read(f"{FOLDER}/{info.name}/{file}"), f"{storage.uri}/{FOLDER}/{info.name}/{file}"
    if _fingerprint(content) != info.files[file]:
        raise CheckpointError(
            f"{path} is damaged: {len(content)} bytes, {info.files[file]['bytes']} expected, or another SHA-256. "
            f"Delete the folder {info.name} to go on from the checkpoint before it"
        )
    return content


def _fingerprint(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
