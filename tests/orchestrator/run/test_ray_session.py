"""Ray's processes end with their driver, a signal to all processes reaches the driver alone, a death is noticed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from ray._private import worker
from ray.exceptions import RayError

from sigray.orchestrator.run import ray_death
from sigray.orchestrator.run.ray_death import RayDied, joined_death, own_death, watched
from sigray.orchestrator.run.ray_processes import kill_marked, marked
from sigray.orchestrator.run.ray_session import _marked, _own_processes
from sigray.orchestrator.run.signals import blocked_for_children, interrupt, on_stop_signal

# A driver that starts a process, which starts another, with a folder; then it waits.
DRIVER = """\
import subprocess, sys, time
from sigray.orchestrator.run.ray_session import _marked, _own_processes
from sigray.orchestrator.run.signals import blocked_for_children

with _own_processes(sys.argv[1]) as mark:
    with blocked_for_children(), _marked(mark):
        subprocess.Popen(["bash", "-c", "sleep 100 & sleep 100"])
    print(mark, flush=True)
    time.sleep(100)
"""


def wait_until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_marked_processes_are_killed_with_their_children_and_no_others(tmp_path):
    other = subprocess.Popen(["sleep", "60"])
    (folder := tmp_path / "ray" / "session").mkdir(parents=True)
    with _own_processes(str(folder.parent)) as mark:
        with _marked(mark):
            parent = subprocess.Popen(["bash", "-c", "sleep 60 & sleep 60"])
        wait_until(lambda: len(marked(mark)) == 3)
        parent.kill()
        parent.wait()
        assert len(marked(mark)) == 2
    assert marked(mark) == []
    assert list(tmp_path.iterdir()) == []
    assert other.poll() is None
    other.kill()
    other.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_processes_end_with_their_driver_and_not_before(number, tmp_path):
    (folder := tmp_path / "ray" / "session").mkdir(parents=True)
    command = [sys.executable, "-c", DRIVER, folder.parent]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    mark = driver.stdout.readline().strip()
    try:
        wait_until(lambda: len(marked(mark)) == 3)
        for pid in marked(mark):
            os.kill(pid, signal.SIGTERM)  # as systemd does
            os.kill(pid, signal.SIGHUP)
        time.sleep(0.2)
        assert len(marked(mark)) == 3
        assert folder.exists()
        driver.send_signal(number)
        driver.wait()
        wait_until(lambda: not marked(mark) and not folder.parent.exists(), timeout_s=10)
    finally:
        kill_marked(mark)
        driver.kill()
        driver.wait()


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Python's own handlers: the tests may run under `nohup`, or in the background of a shell."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_acts_and_the_second_interrupts():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    acted = []
    with on_stop_signal(lambda: acted.append("asked to stop")):
        signal.raise_signal(signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert acted == ["asked to stop"]
    with pytest.raises(KeyboardInterrupt), on_stop_signal(interrupt):
        signal.raise_signal(signal.SIGTERM)
    assert handlers == {number: signal.getsignal(number) for number in handlers}


def test_only_sighup_stays_ignored():
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        with on_stop_signal(interrupt):
            signal.raise_signal(signal.SIGHUP)  # ignored under `nohup`
        with pytest.raises(KeyboardInterrupt), on_stop_signal(interrupt):
            signal.raise_signal(signal.SIGINT)  # ignored by the background processes of a shell
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_handler_that_ray_sets_is_undone():
    before = signal.getsignal(signal.SIGTERM)
    with blocked_for_children():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    with pytest.raises(KeyboardInterrupt), blocked_for_children():
        sys.exit(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_death_of_the_own_ray_interrupts_and_is_named(tmp_path):
    shutil.copy(shutil.which("sleep") or "", tmp_path / "gcs_server")
    started = []

    def wait_for_the_dead(mark: str) -> None:
        assert subprocess.run(["true"]).returncode == 0  # another child may end
        with _marked(mark):
            started.extend(subprocess.Popen([name, "60"]) for name in ("sleep", tmp_path / "gcs_server"))
        started[1].kill()
        time.sleep(30)

    with _own_processes() as mark:
        find = own_death(mark)
        with pytest.raises(RayDied, match="the gcs_server of this run's Ray died"), watched(find):
            wait_for_the_dead(mark)
        assert marked(mark) == []  # at once: they would only wait
    other, ray = started
    assert other.wait(timeout=5) == -signal.SIGKILL
    assert ray_death.find_death() == ""
    with watched(own_death(mark)):  # that death is over
        subprocess.run(["true"])
    ray.wait()


def test_a_death_of_a_joined_ray_interrupts_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_death, "_GCS_TIMEOUT_S", 1.0)
    monkeypatch.setattr(ray_death, "_POLL_S", 0.1)
    path = str(tmp_path / "raylet")
    raylet = socket.socket(socket.AF_UNIX)
    raylet.bind(path)
    raylet.listen()
    gcs, live = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    address = f"127.0.0.1:{gcs.getsockname()[1]}"
    node = SimpleNamespace(raylet_socket_name=path, gcs_address=address, node_ip_address="10.0.0.7")
    monkeypatch.setattr(worker, "_global_node", node)
    said: list[str] = []
    find = joined_death()
    assert find() == ""
    gcs.close()
    with pytest.raises(RayDied, match=f"head node, {address}, gave no answer for"), watched(find, said.append):
        time.sleep(30)
    raylet.close()
    with pytest.raises(RayDied, match=rf"head node, {address}, and then"), watched(joined_death(), said.append):
        time.sleep(30)
    node.gcs_address = f"127.0.0.1:{live.getsockname()[1]}"
    with pytest.raises(RayDied, match=r"^the raylet of node 10\.0\.0\.7"), watched(joined_death(), said.append):
        time.sleep(30)
    assert [text.partition(": when")[2] for text in said] == [" the cluster is up again, the same command goes on"] * 3


def test_an_error_that_a_death_caused_becomes_that_death(monkeypatch):
    deaths = iter(["", "the raylet died", "the raylet died"])  # Ray's error comes before the signal
    monkeypatch.setattr(ray_death, "find_death", lambda: next(deaths))
    with pytest.raises(RayDied, match="the raylet died"), ray_death.raised():
        raise RayError("a connection broke")
    monkeypatch.setattr(ray_death, "find_death", str)
    monkeypatch.setattr(ray_death, "_NOTICE_S", 0.1)
    with pytest.raises(RayError), ray_death.raised():
        raise RayError("a task failed")
