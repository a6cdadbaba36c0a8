"""C that is compiled where it runs."""

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sigray.native import build, compiled


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def answer(source: Path, **options) -> int | None:
    library = compiled(source, without="no answer", **options)
    return library and library.answer()


def test_a_change_of_source_or_flags_is_another_library(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert answer(source) == answer(source) == 42
    source.write_text("int answer(void) { return 43; }\n")
    assert answer(source) == 43
    source.write_text("int answer(void) { return NUMBER; }\n")
    assert answer(source, flags=["-DNUMBER=1"]) == 1
    assert answer(source, flags=["-DNUMBER=2"]) == 2
    assert len(list((tmp_path / "cache" / "sigray").glob("answer-*.so"))) == 4
    assert len(list((tmp_path / "cache" / "sigray").iterdir())) == 4


def test_several_processes_at_once_get_a_whole_library(source, tmp_path):
    script = (
        "from pathlib import Path; from sigray.native import compiled; import sys; path = Path(sys.argv[1])\n"
        "print(compiled(path, without='').answer())"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", script, str(source)]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["42\n"] * 4


@pytest.mark.parametrize(
    ("compiler", "message"), [("/nowhere/cc", "/nowhere/cc failed: .*No such file"), ("false", "false failed")]
)
def test_without_a_compiler_there_is_none_and_that_is_said(compiler, message, source, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(UserWarning, match=f"no answer: {message}"):
        assert answer(source) is None


def test_what_the_compiler_says_is_told(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source.write_text("int answer(void) { return nothing; }\n")
    with pytest.warns(UserWarning, match="(?s)no answer: .*nothing.* undeclared"):
        assert answer(source) is None
    assert list((tmp_path / "cache" / "sigray").iterdir()) == []


def test_a_read_only_home_compiles_elsewhere(source, monkeypatch, tmp_path):
    (tmp_path / "sigray").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    built = build("gcc", source, [])
    assert built.parent.parent == tmp_path
    assert ctypes.CDLL(str(built)).answer() == 42
