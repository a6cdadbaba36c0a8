"""The environment that a summary names, and what its tars hold that is not used."""

from __future__ import annotations

import io
import shutil
import subprocess
from dataclasses import replace
from typing import Any

from rich.console import Console

from sigray.orchestrator.run import summary
from sigray.orchestrator.run.progress import Display
from sigray.workers.data.manifest import Manifest, Shard


def test_only_a_commit_of_sigray_is_named(monkeypatch, tmp_path):
    """An installed sigray may be inside a repository of its user."""
    monkeypatch.delenv("SIGRAY_COMMIT", raising=False)
    file = tmp_path / "site-packages" / "summary.py"
    file.parent.mkdir()
    shutil.copy(summary.__file__, file)
    monkeypatch.setattr(summary, "__file__", str(file))

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert summary._commit() == "unknown"
    git("add", "-A")
    git("commit", "-m", "second")
    assert len(summary._commit()) >= 7
    assert summary._commit() != "unknown"
    monkeypatch.setenv("SIGRAY_COMMIT", "abc")
    assert summary._commit() == "abc"


def test_the_first_lines_say_what_is_not_used() -> None:
    shard = Shard("/a.tar", 20480, 5, "mtime-1", unusable={"symbolic links": 3})
    manifest = Manifest((shard, replace(shard, url="/b.tar")))
    facts: dict[str, Any] = {
        "parameters_m": {"all": 1, "visual": 1, "text": 1},
        "weight_decay": "0.0001 on matrices: 0.9 M of 1.0 M parameters",
        "world_size": 1,
        "device": "cpu",
        "epochs": 1,
    }
    facts |= {"global_batch_size": 8, "batch_per_worker": 8, "micro_batch_size": 8, "first_step": 0, "num_steps": 4}
    for each, line in ((manifest, "not used  6 symbolic links"), (Manifest((replace(shard, unusable={}),)), "")):
        out = io.StringIO()
        Display(Console(file=out, width=200)).start("run", facts, summary.data_facts(each))
        assert line in out.getvalue()
        assert ("not used" in out.getvalue()) == bool(line)
