"""One driver per run: a second one is refused, a dead one's lease ends, a lost lease is noticed."""

import json
import os
import socket
import threading
import time

import pytest

from sigray.workers.checkpoint import lease as lease_module
from sigray.workers.checkpoint.lease import Fence, Lease, RunHeld, RunLease, RunTakenOver, is_free, read_lease
from sigray.workers.storage import ChangedError, Storage
from tests.helpers.stored import KINDS, SCHEMES

LIFETIME_S, RENEW_S = lease_module._LIFETIME_S, lease_module._RENEW_S  # before `quick` changes one


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("sigray.workers.checkpoint.lease._SETTLE_S", 0.01)
    monkeypatch.setattr("sigray.workers.checkpoint.lease._RENEW_S", 0.05)


def lease(**fields) -> Lease:
    return Lease(**{"owner": "other", "host": "far", "boot": "b", "pid": 7, "expires": 100.0, **fields})


@pytest.mark.parametrize(
    ("held", "now", "alive", "free"),
    [
        (None, 50, True, True),
        (lease(), 50, True, False),
        (lease(), 50, False, False),  # a pid of another machine says nothing
        (lease(), 100, True, True),
        (lease(host="here", boot="now"), 50, True, False),
        (lease(host="here", boot="now"), 50, False, True),
        (
            lease(host="here", boot="before"),
            50,
            False,
            False,
        ),  # another machine of that name
    ],
)
def test_when_a_run_may_be_taken(held, now, alive, free):
    assert is_free(held, now, "here", "now", lambda pid: alive) is free


@pytest.fixture(params=KINDS)
def storage(request, new_place):
    return Storage(new_place(request.param))


def test_a_second_driver_is_refused_and_told_whom(storage):
    with RunLease(storage), pytest.raises(RunHeld, match=rf"process {os.getpid()} on {socket.gethostname()}"):
        RunLease(storage).__enter__()
    assert not storage.exists("lease.json")
    with RunLease(storage):
        pass


class Raced(Storage):
    """Another driver, which found the run free in the same moment, writes its lease after ours."""

    def write_if(self, path, content, version):
        super().write_if(path, content, version)
        super().write(path, json.dumps(lease(expires=time.time() + 60).__dict__).encode())


def test_of_two_that_start_at_once_the_last_to_write_has_it(tmp_path):
    with pytest.raises(RunHeld, match="is being run by process 7 on far"):
        RunLease(Raced(tmp_path)).__enter__()
    assert json.loads((tmp_path / "lease.json").read_text())["owner"] == "other"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("before", [None, lease(expires=1.0), "{"])
def test_of_several_that_start_at_once_in_a_store_one_has_it(new_place, scheme, before):
    """No run, the lease of a driver that died, and a lease that cannot be read."""
    storage = Storage(new_place(scheme))
    if before:
        storage.write("lease.json", (before if before == "{" else json.dumps(before.__dict__)).encode())
    barrier, held, refused = threading.Barrier(6), [], []

    def start():
        mine = RunLease(storage)
        barrier.wait()
        try:
            mine.__enter__()
        except RunHeld as error:
            refused.append(str(error))
        else:
            held.append(mine)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (mine,) = held
    assert len(refused) == 5
    assert read_lease(storage).owner == mine.owner
    mine.__exit__()


def test_a_renewal_does_not_replace_the_lease_of_another(storage):
    held, taken = RunLease(storage), json.dumps(lease().__dict__).encode()
    held.renew()
    _, version = storage.read_version("lease.json")
    storage.read_version = lambda path: (json.dumps(lease(owner=held.owner).__dict__).encode(), version)  # read before
    storage.write("lease.json", taken)
    if storage.is_local:
        del storage.read_version
        held.renew()
        assert held._is_lost
    else:
        with pytest.raises(ChangedError):
            held.renew()
    assert storage.read("lease.json") == taken


def test_it_is_renewed(storage):
    with RunLease(storage):
        first = read_lease(storage).expires
        deadline = time.monotonic() + 30
        while read_lease(storage).expires == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


class Clock:
    """Time that passes while the renewing thread waits; notes what was left of the lease each time it is over."""

    def __init__(self, path) -> None:
        self._path, self._now, self.left_s = path, 1000.0, []

    def time(self) -> float:
        return self._now

    def wait(self, seconds: float) -> bool:
        """As `threading.Event.wait`; set after ten renewals."""
        self._now += seconds
        self.left_s.append(json.loads(self._path.read_text())["expires"] - self._now)
        return len(self.left_s) > 10


def test_two_renewals_may_fail_before_a_lease_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "_RENEW_S", RENEW_S)
    clock, held = Clock(tmp_path / "lease.json"), RunLease(Storage(tmp_path))
    monkeypatch.setattr(lease_module, "time", clock)
    held._stop = clock
    held.renew()
    held._renew()
    assert len(clock.left_s) == 11
    # Three renewals fit into a lifetime: after one interval at least two thirds of it are left.
    assert min(clock.left_s) >= LIFETIME_S * 2 / 3
    assert max(clock.left_s) < LIFETIME_S


def test_a_driver_whose_run_was_taken_over_is_told_and_leaves_the_lease(storage):
    taken = json.dumps(lease(expires=time.time() + 60).__dict__).encode()
    with RunLease(storage) as held:
        held.check()
        deadline = time.monotonic() + 30
        while not held._is_lost and time.monotonic() < deadline:
            storage.write("lease.json", taken)  # again: a renewal may just have been on its way
            time.sleep(0.01)
        with pytest.raises(RunTakenOver, match="another driver has taken over"):
            held.check()
    assert storage.read_version("lease.json")[0] == taken


def test_a_dead_drivers_lease_is_taken_at_once_on_its_machine(tmp_path):
    """The lease of a process that was killed: no waiting for its end."""
    pid = os.fork()
    if not pid:
        try:
            RunLease(Storage(tmp_path)).__enter__()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert json.loads((tmp_path / "lease.json").read_text())["pid"] == pid
    with RunLease(Storage(tmp_path)) as held:
        held.check()


def test_the_fence_lets_through_the_owner_alone(storage):
    with RunLease(storage) as held:
        Fence(storage, held.owner).check()
        Fence(storage, None).check()
        with pytest.raises(RunTakenOver, match="writes nothing more"):
            Fence(storage, "before").check()
    Fence(storage, "before").check()  # no lease: its own driver has just ended
