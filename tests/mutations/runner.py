"""Put faults into copies of a tree, one at a time, and run the tests that each names.

A worker is a copy and a server (`server.py`) that runs pytest in it; two work at once. The copies stay: a fault is
written into one, and taken out again after its tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import py_compile
import queue
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

from tests.mutations.fault import AnyFault
from tests.mutations.server import processes_with
from tests.mutations.source import changed

# Imports of the product and its tests that take longest: a fork has them from the start.
_LIBRARIES = (
    "torch torch.distributed torch.multiprocessing torch.utils.checkpoint torchvision open_clip timm numpy pyarrow.fs "
    "ray ray.train ray.tune ray.util ray.util.state hypothesis yaml pydantic jinja2 matplotlib.figure optuna PIL.Image "
    "transformers tokenizers webdataset boto3 botocore.session safetensors.torch rich.console rich.table rich.progress "
    "simplejpeg xxhash regex ftfy tensorboard torch.utils.tensorboard"
)
LIBRARIES = _LIBRARIES.split()
NUM_WORKERS = 2
_START_S = 300
_BASELINE_S = 600
_NOT_FOUND = re.compile(r"^ERROR: not found: (.*)$", re.MULTILINE)
_MARK = "SIGRAY_MUTATIONS"
_SERVER = Path(__file__).with_name("server.py")


@dataclass(frozen=True)
class Verdict:
    """The result of a fault's tests.

    Attributes:
        caught: whether a test failed by an assertion.
        seconds: duration of its tests.
        says: the test that caught the fault; otherwise why no test did.
    """

    caught: bool
    seconds: float
    says: str


def copy_tree(tree: Path, copy: Path) -> None:
    """Copy what git knows of a tree, changes and new files included, and compile it.

    Bytecode is tied to the contents of its source: a file that a fault changed within the same second is seen.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=tree, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        source, target = tree / name, copy / name
        if not source.exists():  # deleted, but not yet committed
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
            continue
        shutil.copy2(source, target)
        if target.suffix == ".py":
            with contextlib.suppress(py_compile.PyCompileError):
                py_compile.compile(
                    str(target), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
                )


class Worker:
    """A copy of the tree, and the server that forks to run tests in it."""

    def __init__(self, copy: Path, libraries: Sequence[str]) -> None:
        self.copy, self._libraries = copy, libraries
        self._mark = uuid.uuid4().hex
        self._server: subprocess.Popen[str] | None = None

    def run(
        self, tests: Sequence[str], timeout_s: float, *, stop: bool = False, options: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Run tests in the copy as it is now; the answer is `server.py`'s."""
        if self._server is None:
            self._start()
        request = {"tests": list(tests), "timeout_s": timeout_s, "stop": stop, "options": list(options)}
        answer = self._ask(request, timeout_s + 30)
        if answer is None or answer["ended"]:
            self.close()  # and the processes that the tests left; the next tests start a new one
        return answer or {"seen": [], "log": "", "ended": "the server ended"}

    @contextlib.contextmanager
    def having(self, fault: AnyFault) -> Iterator[None]:
        path, text = changed(self.copy, fault)
        before = (self.copy / path).read_bytes()
        (self.copy / path).write_text(text)
        try:
            yield
        finally:
            (self.copy / path).write_bytes(before)

    def close(self) -> None:
        """End the server and every process that it started."""
        server, self._server = self._server, None
        if server is None:
            return
        for _ in range(10):
            if not (marked := list(processes_with(f"{_MARK}={self._mark}"))):
                break
            for pid in marked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        server.wait()
        cast(Any, server.stdin).close()
        cast(Any, server.stdout).close()

    def _start(self) -> None:
        environment = os.environ | {
            _MARK: self._mark,
            "PYTHONPATH": os.pathsep.join([str(self.copy / "src"), str(self.copy)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",  # two workers on two cores: a thread that waits must not spin
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [sys.executable, "-P", str(_SERVER), json.dumps(list(self._libraries))]
        self._server = subprocess.Popen(
            command,
            cwd=self.copy,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if self._libraries else None,
            text=True,
            start_new_session=True,
        )
        if self._line(_START_S) != "ready\n":
            self.close()
            raise RuntimeError("the process that imports the libraries did not start")

    def _ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        assert self._server is not None
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        line = self._line(timeout_s)
        return json.loads(line) if line else None

    def _line(self, timeout_s: float) -> str:
        """Return the server's next line; empty if it ended or wrote nothing in time."""
        assert self._server is not None
        assert self._server.stdout is not None
        ready = select.select([self._server.stdout], [], [], timeout_s)[0]
        return self._server.stdout.readline() if ready else ""


@contextlib.contextmanager
def workers(tree: Path, folder: Path, libraries: Sequence[str] = LIBRARIES) -> Iterator[list[Worker]]:
    """Two workers with copies of the tree in a folder."""
    copies = [folder / f"copy-{number}" for number in range(NUM_WORKERS)]
    for copy in copies:
        copy_tree(tree, copy)
    made = [Worker(copy, libraries) for copy in copies]
    try:
        yield made
    finally:
        for worker in made:
            worker.close()


def passed_tests(report: Path) -> dict[str, float]:
    """Return the seconds of each test that passed, by its name, from pytest's JUnit report."""
    seconds: dict[str, float] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if not any(child.tag in ("failure", "error", "skipped") for child in case):
            parts = case.attrib["classname"].split(".")
            num_modules = next(number for number, part in enumerate(parts, 1) if part.startswith("test_"))
            file = "/".join(parts[:num_modules]) + ".py"
            seconds["::".join([file, *parts[num_modules:], case.attrib["name"]])] = float(case.attrib["time"])
    return seconds


def baseline(
    made: Sequence[Worker], tests: Iterable[str], passed: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, str]]:
    """Run each test once without a fault, those of a file together.

    Args:
        passed: seconds of tests that are green and do not run. A name of several examples counts by all of them: it
            runs if none of them passed.

    Returns:
        Seconds of each test that is green, and why another one is not.
    """
    by_file: dict[str, list[str]] = defaultdict(list)
    seconds: dict[str, float] = {}
    red: dict[str, str] = {}
    for test in sorted(set(tests)):
        if known := [passed[name] for name in passed if _belongs(name, test)]:
            seconds[test] = sum(known)
        else:
            by_file[test.partition("::")[0]].append(test)

    def run(worker: Worker, file: str) -> None:
        answer = worker.run(by_file[file], _BASELINE_S)
        # A name that is not there keeps pytest from running the others.
        missing = {found.removeprefix(f"{worker.copy}/") for found in _NOT_FOUND.findall(answer["log"])}
        if there := [test for test in by_file[file] if test not in missing] if missing else []:
            answer = worker.run(there, _BASELINE_S)
        for test in by_file[file]:
            seen = [line for line in answer["seen"] if _belongs(line["test"], test)]
            failed = [line for line in seen if line["outcome"] == "failed"]
            passed = [line for line in seen if line["outcome"] == "passed" and line["phase"] == "call"]
            if passed and not failed and not answer["ended"]:
                seconds[test] = sum(line["seconds"] for line in seen)
            elif failed:
                red[test] = f"red without a fault: {failed[0]['test']}: {failed[0]['says'] or failed[0]['printed']}"
            elif test in missing:
                red[test] = "there is no such test"
            elif seen and not answer["ended"]:
                red[test] = "skipped"
            else:
                red[test] = f"did not run: {answer['ended'] or _end_of(answer['log'])}"

    _share(made, list(by_file), run)
    return seconds, red


def judge(
    made: Sequence[Worker],
    faults: Sequence[AnyFault],
    seconds: dict[str, float],
    done: Callable[[AnyFault, Verdict], None],
) -> None:
    """Put in one fault after the other; call `done` with each verdict, from either worker's thread."""

    def run(worker: Worker, fault: AnyFault) -> None:
        tests = sorted(fault.tests, key=lambda test: seconds[test])
        timeout_s = 60 + 5 * sum(seconds[test] for test in tests)
        began = time.monotonic()
        with worker.having(fault):
            answer = worker.run(tests, timeout_s, stop=True)
        done(fault, verdict(answer, time.monotonic() - began))

    # The longest first: one alone at the end would leave the other worker idle.
    _share(made, sorted(faults, key=lambda fault: -sum(seconds[test] for test in fault.tests)), run)


def verdict(answer: dict[str, Any], seconds: float) -> Verdict:
    """Judge a run of a fault's tests."""
    by_assertion = [line for line in answer["seen"] if line["by_assertion"]]
    if by_assertion:
        return Verdict(True, seconds, by_assertion[0]["test"])
    crashed = [line for line in answer["seen"] if line["outcome"] == "failed"]
    if crashed:
        first = crashed[0]
        return Verdict(False, seconds, f"crash in {first['phase']}: {first['says'] or first['printed']}")
    if answer["ended"]:
        return Verdict(False, seconds, answer["ended"])
    if any(line["outcome"] == "passed" and line["phase"] == "call" for line in answer["seen"]):
        return Verdict(False, seconds, "its tests are green")
    return Verdict(False, seconds, f"crash before any test: {_end_of(answer['log'])}")


def _share(made: Sequence[Worker], items: Sequence[Any], run: Callable[[Worker, Any], None]) -> None:
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    stopped = threading.Event()

    def work(worker: Worker) -> None:
        with contextlib.suppress(queue.Empty):
            while not stopped.is_set():
                item = waiting.get_nowait()
                try:
                    run(worker, item)
                except BaseException:
                    stopped.set()
                    raise

    with ThreadPoolExecutor(len(made)) as pool:
        for future in [pool.submit(work, worker) for worker in made]:
            future.result()


def _belongs(ran: str, named: str) -> bool:
    """Whether a name means a test that ran: the test, an example of it, or its file or class."""
    return ran == named or ran.startswith((f"{named}[", f"{named}::"))


def _end_of(log: str) -> str:
    return " / ".join(log.split("\n")[-6:]).strip()[-300:]
