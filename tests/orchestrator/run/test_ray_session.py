"""A run's own Ray leaves no processes after its shutdown, and no other process is killed."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from sigray.orchestrator.run import ray_session


def sleeper(name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["bash", "-c", f"exec -a '{name}' sleep 60"])


@pytest.fixture
def processes():
    started = [sleeper("ray::TrainController"), sleeper("somebody else")]
    deadline = time.monotonic() + 5
    while len(ray_session._ray_processes()) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)  # until bash has taken its new name
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_only_rays_own_workers_are_ended(processes, monkeypatch):
    monkeypatch.setattr(ray_session, "_EXIT_TIMEOUT_S", 0.2)
    hung, other = processes
    found = ray_session._ray_processes()
    assert list(found) == [hung.pid]
    ray_session._end(found)
    assert hung.wait(timeout=5) == -9
    assert other.poll() is None


def test_what_ends_by_itself_is_waited_for_and_a_reused_id_is_left_alone(processes, monkeypatch):
    monkeypatch.setattr(ray_session, "_EXIT_TIMEOUT_S", 60.0)
    hung, other = processes
    ray_session._end({other.pid: "started at another time", hung.pid: "so too"})  # returns at once
    assert (hung.poll(), other.poll()) == (None, None)
    found = ray_session._ray_processes()
    hung.kill()
    hung.wait()
    ray_session._end(found)
    with pytest.raises(ProcessLookupError):
        os.kill(hung.pid, 0)
