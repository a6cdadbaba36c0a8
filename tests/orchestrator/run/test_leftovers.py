"""What a Ray of our own leaves behind when it was shut down is ended; nothing else is."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from sigray.orchestrator.run import driver as launch


def sleeper(name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["bash", "-c", f"exec -a '{name}' sleep 60"])


@pytest.fixture
def processes():
    started = [sleeper("ray::TrainController"), sleeper("somebody else")]
    deadline = time.monotonic() + 5
    while len(launch._ray_processes()) < 1 and time.monotonic() < deadline:
        time.sleep(0.01)  # until bash has become what it is called
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_only_rays_own_workers_are_ended(processes, monkeypatch):
    monkeypatch.setattr(launch, "_LEFT_S", 0.2)
    hung, other = processes
    found = launch._ray_processes()
    assert list(found) == [hung.pid]
    launch._end(found)
    assert hung.wait(timeout=5) == -9
    assert other.poll() is None


def test_what_ends_by_itself_is_waited_for_and_a_reused_id_is_left_alone(processes, monkeypatch):
    monkeypatch.setattr(launch, "_LEFT_S", 60.0)
    hung, other = processes
    launch._end({other.pid: "started at another time", hung.pid: "so too"})  # returns at once
    assert (hung.poll(), other.poll()) == (None, None)
    found = launch._ray_processes()
    hung.kill()
    hung.wait()
    launch._end(found)
    with pytest.raises(ProcessLookupError):
        os.kill(hung.pid, 0)
