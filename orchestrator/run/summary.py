"""Sum up a run: outcome, facts of its data, environment."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

from sigray.orchestrator.config import RunConfig
from sigray.orchestrator.run_folder import RunFolder
from sigray.workers.data.manifest import Manifest


def summarize(
    config: RunConfig,
    folder: RunFolder,
    manifest: Manifest,
    status: str,
    facts: dict[str, Any],
    evaluation: dict[str, Any] | None,
    *,
    train_s: float,
    total_s: float,
) -> dict[str, Any]:
    """Return the content of summary.json.

    Args:
        status: finished, stopped or failed.
        facts: start-up facts of the newest attempt.
        evaluation: result of the newest evaluated checkpoint.
        train_s, total_s: seconds since the training workers were up, and since the driver began.
    """
    newest = folder.newest_line()
    return {
        "name": config.run.name,
        "status": status,
        "steps": newest.get("step", 0),
        "samples_seen": newest.get("samples_seen", 0),
        "last_line_step": max((line["step"] for line in folder.metrics()), default=0),
        "train_s": round(train_s, 1),
        "total_s": round(total_s, 1),
        "loss": newest.get("train/loss"),
        "facts": facts,
        "data": data_facts(manifest),
        "embeddings": _embedding_facts(config),
        **{
            task: (evaluation or {}).get(task, {}) for task in ("zero_shot", "retrieval", "linear_probe", "without_ema")
        },
        "environment": environment(),
    }


def data_facts(manifest: Manifest) -> dict[str, Any]:
    """Return the numbers of a manifest, and what its tars hold that is not used."""
    facts = {"shards": len(manifest.shards), "samples": manifest.num_samples, "bytes": manifest.num_bytes}
    unusable = manifest.unusable()
    return facts | ({"unusable": dict(unusable)} if unusable else {})


def _embedding_facts(config: RunConfig) -> dict[str, float]:
    """Return images and seconds of the run's embedding store; empty without one."""
    if config.embeddings.store is None:
        return {}
    from sigray.workers.data.embedding_store import EmbeddingStore

    history = EmbeddingStore(config.embeddings.store).history()
    return {name: sum(getattr(entry, name) for entry in history) for name in ("num_images", "seconds")}


def environment() -> dict[str, str]:
    """Return date, commit, versions and hardware, which every quoted result carries."""
    from importlib.metadata import version

    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("sigray", "torch", "ray", "open-clip-torch", "webdataset")},
        "hardware": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
    }


def _commit() -> str:
    """Return the commit of sigray's source, or "unknown".

    SIGRAY_COMMIT in the environment names the commit of files without their history, as in an image. An installed
    sigray may be inside a user's own repository, whose commit says nothing about sigray: git has to track this file.
    """
    if os.environ.get("SIGRAY_COMMIT"):
        return os.environ["SIGRAY_COMMIT"]
    file = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    """Return the model name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
