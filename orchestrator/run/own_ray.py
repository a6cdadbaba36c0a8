"""Accelerators, folder and token of a Ray that a run starts on this machine."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from sigray.orchestrator.address import check_address, cluster_address
from sigray.orchestrator.config import ConfigError, RunConfig
from sigray.orchestrator.resources import evaluation_resources, worker_resources
from sigray.orchestrator.run.progress import Display
from sigray.workers.storage import Storage

# Ray's sockets are at SESSION/sockets/plasma_store below this folder, and a socket's path has at most 107 bytes.
_MAX_FOLDER_BYTES = 107 - len("/session_2026-11-29_23-35-34_123456_1234567/sockets/plasma_store")
_MIN_FREE_BYTES = 64 << 20  # logs of a Ray, not its spilled objects
_SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
# They point at another Ray, for processes that this one starts.
_OF_OTHERS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR")


def check_start(config: RunConfig, *, num_workers: int | None = None, num_evaluations: int = 0) -> None:
    """Refuse an address where no Ray answers, and devices that this machine lacks.

    Such a run could never start. A cluster that is joined may grow, also by hand; a Ray that the run starts cannot.

    Args:
        num_workers: training workers at the same time; None: the least of cluster.num_workers.
        num_evaluations: workers of an evaluation at the same time as the training workers.

    Raises:
        ConfigError: names the key, what is missing and a remedy.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return  # a trial, or a program that uses Ray itself
    check_address(config)
    if cluster_address(config) is not None:
        return
    cluster = config.cluster
    workers = cluster.worker_range[0] if num_workers is None else num_workers
    training = worker_resources(cluster)
    evaluation = evaluation_resources(config.eval)
    needed = {
        kind: workers * training.get(kind, 0) + num_evaluations * evaluation.get(kind, 0) for kind in ("GPU", "TPU")
    }
    if not any(needed.values()):
        return
    here = machine_accelerators()
    for kind, amount in needed.items():
        if amount <= here[kind]:
            continue
        keys = [f"cluster.accelerator={cluster.accelerator} for {workers} training worker(s)"] if workers else []
        if num_evaluations and kind in evaluation:
            keys.append(f"eval.accelerator={config.eval.accelerator} for {num_evaluations} evaluation worker(s)")
        variable = "CUDA_VISIBLE_DEVICES" if kind == "GPU" else "TPU_VISIBLE_CHIPS"
        hidden = f" ({variable}={os.environ[variable]})" if variable in os.environ else ""
        raise ConfigError(
            f"{' and '.join(keys)} needs {amount:g} {kind}, and this machine has {here[kind]:g}{hidden}: set "
            "cluster.address=HOST:6379 of a Ray cluster that has them, or choose another accelerator or fewer workers"
        )


def machine_accelerators() -> dict[str, float]:
    """Return the GPUs and TPU chips that a Ray on this machine would offer."""
    from ray._private.accelerators import get_accelerator_manager_for_resource as manager_of

    found = {}
    for kind in ("GPU", "TPU"):
        manager: Any = manager_of(kind)
        visible = manager.get_current_process_visible_accelerator_ids()
        num_here = manager.get_current_node_num_accelerators()
        found[kind] = float(num_here if visible is None else min(num_here, len(visible)))
    return found


def own_folder(display: Display) -> str | None:
    """Prepare the environment of a Ray that starts here; return a new folder for it.

    None stands for Ray's default folder. Batch systems set a TMPDIR that is too long for a socket, and users of
    containers may have no home for Ray's token.

    Raises:
        ConfigError: no folder can hold Ray's files; names each with its reason.
    """
    for name in _OF_OTHERS:
        os.environ.pop(name, None)
    if not _has_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # for this Ray alone
    usual = os.path.join(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")
    why = _why_unusable(usual)
    if why is None:
        return None
    reasons = {usual: why, **{place: _why_unusable(place) for place in _SHORT_PLACES}}
    place = next((place for place, why in reasons.items() if why is None), None)
    if place is None:
        lines = "".join(f"\n  {place}: {why}" for place, why in reasons.items())
        raise ConfigError(f"no folder can hold Ray's files; free one, or set RAY_TMPDIR to a short path:{lines}")
    folder = tempfile.mkdtemp(prefix="sigray-", dir=place)  # mode 0700
    display.say(f"Ray's files are in {folder} until the end, because {usual} {why}")
    return folder


def _why_unusable(folder: str) -> str | None:
    """Return why a folder cannot hold Ray's files; None if it can."""
    if len(os.fsencode(folder)) > _MAX_FOLDER_BYTES:
        return f"is longer than the {_MAX_FOLDER_BYTES} bytes that its sockets leave"
    try:
        Storage(folder).check_writable()
    except OSError as error:
        return f"is not writable ({error.__cause__ or error})"
    free = shutil.disk_usage(folder).free
    return f"has only {free / 2**20:.0f} MiB free" if free < _MIN_FREE_BYTES else None


def _has_token() -> bool:
    """Return whether Ray has a token, or can write one below the home."""
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return True
    try:
        path = Path.home() / ".ray" / "auth_token"
        if not os.access(path, os.R_OK):
            Storage(path.parent).check_writable()
    except (RuntimeError, OSError):  # no home
        return False
    return True
