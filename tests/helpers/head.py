"""A real Ray head with a dashboard, on ports of its own, for the tests of jobs and for the pictures in the docs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.s3 import free_ports

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A head that is up.

    Attributes:
        address: of its dashboard.
        cluster: its address for drivers, as cluster.address takes it.
        folder: of its sessions: logs, and the working directories of jobs.
        home: where jobs keep their runs' folders.
        environment: of commands that speak with it.
    """

    address: str
    cluster: str
    folder: Path
    home: Path
    environment: dict[str, str]


@contextlib.contextmanager
def ray_head(home: Path, num_cpus: int = 4, **environment: str) -> Iterator[Head]:
    """Start it, its processes in a group of their own, and end them all.

    Args:
        home: of the head: jobs keep their runs' folders there.
        environment: of the head besides.
    """
    gcs, dashboard, agent, grpc, metrics = free_ports(5)
    # Not below home: the path of a socket may have 107 characters.
    folder = Path(f"/tmp/sigray-head-{os.getpid()}")
    command = [str(BIN / "ray"), "start", "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--block"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"]
    command += [f"--num-cpus={num_cpus}", f"--metrics-export-port={metrics}", "--object-store-memory=200000000"]
    command += [f"--temp-dir={folder}", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1"]
    command += ["--disable-usage-stats"]
    # As clusters/setup.sh has it: `python` of the head is that of the pinned environment.
    # RAY_LOGGER_LEVEL: as the cluster files have it; else Ray logs what --env passes.
    environment = {"RAY_LOGGER_LEVEL": "warning", **environment}
    variables = os.environ | {"RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(home)}
    address = f"http://127.0.0.1:{dashboard}"
    with (home / "ray.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=variables | environment, start_new_session=True)
        try:
            deadline = time.monotonic() + 300
            while True:
                asked = subprocess.run(
                    [str(BIN / "sigray"), "status", "--address", address], env=variables, capture_output=True, text=True
                )
                if asked.returncode == 0:
                    break
                assert process.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < deadline, asked.stderr + Path(log.name).read_text()
                time.sleep(1)
            yield Head(address, f"127.0.0.1:{gcs}", folder, home, variables)
        finally:
            process.send_signal(signal.SIGTERM)  # with --block it ends all that it has started
            process.wait(timeout=60)
            shutil.rmtree(folder, ignore_errors=True)
