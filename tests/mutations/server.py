"""A process that has imported the heavy libraries, and forks once for every run of pytest: seconds saved each time.

Run by path, `python -P server.py LIBRARIES` with LIBRARIES a JSON list, in a copy of the tree and with the copy as
PYTHONPATH. It imports nothing of the tree itself, so that a fork sees the tree as it is then. Reads requests and writes
answers as lines of JSON:

    {"tests": [...], "timeout_s": 60, "stop": true, "options": []}
    {"seen": [...], "log": "...", "ended": null or a reason}

`stop`: end at the first failure by an assertion. `options`: pytest's, besides those of every run. `Recorder` describes
`seen`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import inspect
import json
import multiprocessing
import multiprocessing.forkserver
import os
import select
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.config import default_plugins

_RUN = "SIGRAY_MUTATIONS_RUN"


def main() -> None:
    libraries = json.loads(sys.argv[1])
    tree = Path.cwd()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of the libraries must not mix with answers
    for library in libraries:
        importlib.import_module(library)
    # Each fork would import pytest's parts again.
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        plugin.load()
    for name in default_plugins:
        importlib.import_module(f"_pytest.{name}")
    ours = [name for name, module in sys.modules.items() if _is_in(tree, getattr(module, "__file__", None))]
    assert ours in ([], ["__main__"]), f"imported from the tree before the fork: {ours}"
    if hypothesis := sys.modules.get("hypothesis"):
        # The first failing example is enough; to make it small takes longer than to find it.
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        hypothesis.settings.register_profile("mutations", phases=phases, database=None, report_multiple_bugs=False)
        hypothesis.settings.load_profile("mutations")
    inspect.getmodule(main)  # looks at every module once; pydantic asks for each section of the config
    # Tests of several ranks fork them from a fork server; this one has the libraries, and nothing of the tree either.
    multiprocessing.set_forkserver_preload(libraries)
    if libraries:
        multiprocessing.forkserver.ensure_running()
    gc.freeze()  # a collection in a fork would copy the memory of all libraries
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(_in_a_fork(tree, **json.loads(line))) + "\n")
        answers.flush()


def _in_a_fork(tree: Path, tests: list[str], timeout_s: float, stop: bool, options: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        results, log = Path(folder, "results"), Path(folder, "log")
        name = f"{_RUN}={uuid.uuid4().hex}"
        child = os.fork()
        if child == 0:
            os.environ[_RUN] = name.partition("=")[2]
            _run_pytest(tree, [*options, *tests], stop, results, log)
        handle = os.pidfd_open(child)
        in_time = bool(select.select([handle], [], [], timeout_s)[0])
        os.close(handle)
        if not in_time:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for pid in processes_with(name):  # servers or a Ray that a crash left
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ended = f"not done after {timeout_s:.0f} s" if not in_time else f"ended with code {code}" if code else None
        lines = results.read_text().splitlines() if results.exists() else []
        said = log.read_text(errors="replace")[-4000:] if log.exists() else ""
        return {"seen": [json.loads(line) for line in lines], "log": said, "ended": ended}


def processes_with(variable: str) -> Iterator[int]:
    """Yield ids of the other processes with an environment variable, `NAME=value`."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name)


def _run_pytest(tree: Path, arguments: list[str], stop: bool, results: Path, log: Path) -> None:
    """In the fork: never returns."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["pytest"]
        sys.path.insert(0, str(tree))
        # pytest keeps the tests as it rewrites them, by the time of the file: no fault is in those. What else is
        # written is tied to the contents of its source, as `copy_tree` made it.
        sys.dont_write_bytecode = False
        if multiprocessing.forkserver._forkserver._forkserver_pid is not None:  # type: ignore[attr-defined]
            # It is a child of the parent: waiting for it, to see whether it runs, fails here.
            multiprocessing.forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
        # No marks: the caller names the tests. One seed: the same examples each time.
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "timeout=0"]
        if "hypothesis" in sys.modules:
            options.append("--hypothesis-seed=0")
        else:
            options += ["-p", "no:hypothesispytest"]  # which would import it
        with results.open("w", buffering=1) as file:
            pytest.main([*options, "--rootdir", str(tree), *arguments], plugins=[Recorder(tree, stop, file)])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


class Recorder:
    """Writes a line for each phase of a test: id, outcome, whether by an assertion, seconds, output."""

    def __init__(self, tree: Path, stop: bool, file: Any) -> None:
        self._tree, self._stop, self._file = tree, stop, file

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        error = call.excinfo.value if call.excinfo is not None and report.failed else None
        by_assertion = call.when == "call" and error is not None and self._is_assertion(error)
        printed = report.capstdout if call.when == "call" else ""
        self._write(item.nodeid, report.when, report.outcome, by_assertion, report.duration, error, printed)
        if by_assertion and self._stop:
            item.session.shouldstop = "an assertion failed"
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            lines = str(report.longrepr).splitlines() or [""]
            self._write(report.nodeid, "collect", "failed", False, 0, None, lines[-1])

    def _write(
        self,
        test: str,
        phase: str,
        outcome: str,
        by_assertion: bool,
        seconds: float,
        error: BaseException | None,
        printed: str,
    ) -> None:
        says = "" if error is None else " ".join(f"{type(error).__name__}: {error}".split())[:200]
        line = {"test": test, "phase": phase, "outcome": outcome, "by_assertion": by_assertion, "seconds": seconds}
        self._file.write(json.dumps(line | {"says": says, "printed": printed}) + "\n")

    def _is_assertion(self, error: BaseException) -> bool:
        """Whether a test compared a value. An `assert` of the product does not count: it is a crash."""
        if isinstance(error, BaseExceptionGroup):  # Hypothesis, when it finds several
            return any(map(self._is_assertion, error.exceptions))
        if isinstance(error, pytest.fail.Exception):
            return "DID NOT RAISE" in str(error) or "DID NOT WARN" in str(error)
        innermost = [frame.filename for frame in traceback.extract_tb(error.__traceback__)][-1:]
        in_tests = not _is_in(self._tree, *innermost) or _is_in(self._tree / "tests", *innermost)
        return isinstance(error, AssertionError) and in_tests


def _is_in(folder: Path, file: str | None = None) -> bool:
    return file is not None and Path(file).is_relative_to(folder)


if __name__ == "__main__":
    main()
