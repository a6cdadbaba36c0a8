"""Check which `sigray` each kind of process imports; `python -m tests.mutations` runs this file in a copy.

No test of the suite. If a fault were in the copy and the process imported the editable install, no test would fail.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import sigray.workers
from tests.helpers.ranks import run_on_ranks

COPY = Path(__file__).parents[2]


def test_pytests_own() -> None:
    _check("pytest", str(sigray.workers.__file__))


def test_a_gloo_rank() -> None:
    _check("gloo rank", run_on_ranks(1, _file)[0])


def test_the_sigray_command(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("sigray")
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(command)!r}, '--help']\n"
        f"try:\n    runpy.run_path({str(command)!r}, run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "import sigray.workers\n"
        "print(sigray.workers.__file__)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    _check("sigray command", done.stdout.splitlines()[-1])


def test_a_ray_worker() -> None:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        _check("Ray worker", ray.get(ray.remote(_file).remote()))
    finally:
        ray.shutdown()


def _file(*_: Any) -> str:
    import sigray.workers

    return str(sigray.workers.__file__)


def _check(kind: str, file: str) -> None:
    print(f"{kind}: {file}")
    assert Path(file).is_relative_to(COPY), f"{kind} imports {file}, not the copy at {COPY} (process {os.getpid()})"
