"""The environment that a summary names."""

from __future__ import annotations

import shutil
import subprocess

from sigray.orchestrator.run import summary


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
