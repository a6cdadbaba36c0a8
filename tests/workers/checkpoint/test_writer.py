"""Checkpoints: what is committed comes back bit for bit, what is not is never chosen, what is damaged is named."""

import copy
import errno
import functools
import io
import json
import os
import re
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from sigray.workers.checkpoint.index import (
    CheckpointError,
    CheckpointInfo,
    DamagedCheckpoint,
    list_checkpoints,
    read_info,
    read_metrics,
)
from sigray.workers.checkpoint.lease import RunTakenOver
from sigray.workers.checkpoint.writer import (
    CheckpointWriter,
    is_due,
    load_checkpoint,
    load_newest,
    load_weights,
    mark_best,
    superseded,
    write_safetensors,
)
from sigray.workers.config import CheckpointConfig, ModelConfig, OptimConfig
from sigray.workers.model.towers import build_model
from sigray.workers.storage import Storage, StorageError, fingerprint
from sigray.workers.training.optim import build_optimizer
from tests.helpers.data import TOWERS
from tests.helpers.faultproxy import Outage
from tests.helpers.stored import ENDPOINTS, KINDS, SCHEMES

MODEL = ModelConfig(towers=TOWERS)


def newest(storage: Storage, parts, warn):
    """Load the newest undamaged checkpoint into a module and its optimizer."""
    return load_newest(storage, lambda info: load_checkpoint(storage, info, *parts), warn)


def trained(seed: int, steps: int = 2):
    """A module and its optimizer, as they were after some steps; the caller's own."""
    return copy.deepcopy(_trained(seed, steps))


@functools.cache
def _trained(seed: int, steps: int):
    torch.manual_seed(seed)
    module = build_model(MODEL)
    optimizer = build_optimizer(module, OptimConfig(), {})
    for _ in range(steps):
        optimizer.zero_grad()
        output = module(torch.randn(2, 3, 16, 16), torch.randint(0, 400, (2, 8)))
        sum(value.square().sum() for value in output.values()).backward()
        optimizer.step()
    return module, optimizer


def writer(storage, seed=0, warn=print, first_step=0, owner=None, **fields):
    module, optimizer = trained(seed)
    config, model = CheckpointConfig(**fields), {"a": "model"}
    return CheckpointWriter(storage, module, optimizer, config, model, first_step=first_step, owner=owner, warn=warn)


def save(storage, *steps, seed=0, **fields):
    """Write checkpoints one after the other; returns the newest one's info."""
    saver = writer(storage, seed, **fields)
    for step in steps:
        saver.save(step, step * 8)
    saver.close()
    return saver.take_committed()[-1]


@pytest.fixture(params=KINDS)
def storage(request, new_place):
    return Storage(new_place(request.param))


def test_comes_back_bit_for_bit(storage):
    module, optimizer = trained(0)
    saver = CheckpointWriter(storage, module, optimizer, CheckpointConfig(), {}, warn=print)
    saver.save(3, 24)
    saver.close()
    (info,) = saver.take_committed()
    other, other_optimizer = trained(1)
    load_checkpoint(storage, info, other, other_optimizer)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    before, after = optimizer.state_dict(), other_optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for number, state in before["state"].items():
        assert all(torch.equal(value, after["state"][number][key]) for key, value in state.items())


def test_others_can_load_the_weights(tmp_path):
    from safetensors.torch import load_file

    info = save(Storage(tmp_path), 10)
    weights = load_file(tmp_path / "checkpoints" / info.name / "model.safetensors")
    assert weights.keys() == trained(0)[0].state_dict().keys()


@given(
    st.dictionaries(
        st.text(max_size=6),
        st.tuples(
            st.sampled_from([torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        max_size=5,
    )
)
def test_weights_are_written_as_the_library_does(shapes):
    """Byte for byte, names of any kind, scalars and empty tensors included."""
    from safetensors.torch import save

    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in shapes.items()}
    file = io.BytesIO()
    write_safetensors(tensors, file)
    assert file.getvalue() == save(tensors)


def test_training_may_go_on_while_it_is_written(tmp_path, monkeypatch):
    """What is written is the state at `save`, although the weights change before the thread gets to it."""
    storage, may_write = Storage(tmp_path), threading.Event()
    original = Storage.write_hashed
    monkeypatch.setattr(Storage, "write_hashed", lambda *words: may_write.wait(60) and original(*words))
    saver = writer(storage)
    before = {name: tensor.clone() for name, tensor in saver._module.state_dict().items()}
    saver.save(3, 24)
    with torch.no_grad():
        for parameter in saver._module.parameters():
            parameter.add_(1.0)
    assert list_checkpoints(storage) == []
    assert not saver.is_due(1000)  # while one is being written
    may_write.set()
    saver.close()
    other = trained(1)[0]
    load_weights(storage, list_checkpoints(storage)[0], other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_is_committed_after_the_files_of_other_ranks(storage):
    saver = writer(storage)
    saver.save(3, 24, after=["ledger/rank-1"])
    deadline = time.monotonic() + 60
    while not storage.exists("checkpoints/step-0000000003/optimizer.pt"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    assert list_checkpoints(storage) == []
    storage.write("ledger/rank-1", b"")
    saver.close()
    assert [info.step for info in list_checkpoints(storage)] == [3]


def test_what_is_not_committed_is_not_chosen(storage):
    save(storage, 10, 20)
    storage.delete("checkpoints/step-0000000020/commit.json")
    assert [info.step for info in list_checkpoints(storage)] == [10]
    assert newest(storage, trained(1), print).step == 10


def test_old_ones_and_what_a_crash_left_are_deleted(storage):
    save(storage, 10, 20, 30)
    storage.write("checkpoints/step-0000000015/model.safetensors", b"")
    storage.write("checkpoints/step-0000000050/model.safetensors", b"")  # being written
    mark_best(storage, "step-0000000010", 0.5)
    save(storage, 40, keep_newest=2)
    kept = {path.split("/")[1] for path in storage.walk() if path.startswith("checkpoints/")}
    assert kept == {f"step-00000000{step}" for step in (10, 30, 40, 50)}


def info_at(step: int) -> CheckpointInfo:
    return CheckpointInfo(f"step-{step:010d}", step, step * 8, {}, {})


def test_milestones_are_kept():
    infos = [info_at(step) for step in range(10, 110, 10)]  # 80 to 800 samples
    config = CheckpointConfig(keep_newest=2, keep_every_samples=200)
    kept = {info.name for info in infos} - set(superseded(infos, config))
    assert kept == {info_at(step).name for step in (30, 50, 80, 90, 100)}  # 240, 400, 640; 720 and 800 are the newest


@given(
    steps=st.lists(st.integers(1, 500), min_size=1, unique=True),
    keep_newest=st.integers(1, 5),
    every=st.one_of(st.none(), st.integers(1, 5000)),
)
def test_deleting_one_by_one_keeps_what_deleting_once_keeps(steps, keep_newest, every):
    config = CheckpointConfig(keep_newest=keep_newest, keep_every_samples=every)
    kept: list[CheckpointInfo] = []
    for step in sorted(steps):
        kept.append(info_at(step))
        old = superseded(kept, config)
        kept = [info for info in kept if info.name not in old]
        assert kept[-1].step == step
    everything = [info_at(step) for step in sorted(steps)]
    old = superseded(everything, config)
    assert kept == [info for info in everything if info.name not in old]


@pytest.mark.parametrize(
    ("config", "steps_done", "saved_step", "since_saved_s", "due"),
    [
        ({"save_every_steps": 10}, 9, 0, 0, False),
        ({"save_every_steps": 10}, 10, 0, 0, True),
        ({"save_every_steps": 10}, 10, 10, 0, False),
        ({"save_every_steps": 10}, 13, 9, 0, True),  # the one at 10 was put off
        ({"save_every_steps": 10}, 19, 13, 0, False),
        ({"save_every_steps": None, "save_every_s": 30}, 5, 0, 29.9, False),
        ({"save_every_steps": None, "save_every_s": 30}, 5, 0, 30, True),
        ({"save_every_steps": None, "save_every_s": 30}, 5, 5, 99, False),  # nothing new to save
        ({"save_every_steps": None, "save_every_s": None}, 500, 0, 1e9, False),
    ],
)
def test_when_one_is_due(config, steps_done, saved_step, since_saved_s, due):
    assert is_due(CheckpointConfig(**config), steps_done, saved_step, since_saved_s) is due


DAMAGES = [lambda content: content[:-7], lambda content: content[:-1] + b"x", lambda content: b""]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("storage", ["local"], indirect=True)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(storage, damage, file):
    warnings = []
    info = save(storage, 10, 20)
    path = f"checkpoints/{info.name}/{file}"
    storage.write(path, damage(storage.read(path)))
    with pytest.raises(DamagedCheckpoint, match=rf"step-0000000020/{file} is damaged".replace(".", r"\.")):
        load_checkpoint(storage, info, *trained(1))
    assert newest(storage, trained(1), warnings.append).step == 10
    assert len(warnings) == 1
    assert f"step-0000000020/{file} is damaged" in warnings[0]
    # The run writes it again when it comes by.
    save(storage, 20)
    assert newest(storage, trained(1), warnings.append).step == 20
    assert len(warnings) == 1


def test_a_damaged_one_loses_its_mark(storage):
    save(storage, 10, 20)
    storage.delete("checkpoints/step-0000000020/optimizer.pt")
    assert newest(storage, trained(1), print).step == 10
    assert [info.step for info in list_checkpoints(storage)] == [10]


def test_a_damaged_one_is_not_counted_among_those_that_are_kept(tmp_path):
    """Of the checkpoints 10 and 20, 20 is damaged; going on from 10, 15 is written, and one is kept."""
    storage = Storage(tmp_path)
    save(storage, 10, 20)
    (tmp_path / "checkpoints" / "step-0000000020" / "optimizer.pt").unlink()
    assert newest(storage, trained(1), print).step == 10
    save(storage, 15, keep_newest=1)
    assert newest(storage, trained(1), print).step == 15


def test_workers_that_a_dead_driver_left_commit_nothing(storage):
    storage.write("lease.json", b'{"owner": "first"}')
    saver = writer(storage, owner="first")
    saver.save(10, 80)
    saver._writer.wait(60)
    storage.write("lease.json", b'{"owner": "second"}')
    saver.save(20, 160)
    with pytest.raises(RunTakenOver, match="another driver"):
        saver.close()
    assert [info.step for info in list_checkpoints(storage)] == [10]


def test_a_run_that_is_lost_while_the_files_are_written_is_not_committed(storage):
    """The fence was open when the write began; the files of a large model take minutes."""
    storage.write("lease.json", b'{"owner": "first"}')
    saver = writer(storage, owner="first")
    saver.save(10, 80, after=["ledger/rank-1"])
    deadline = time.monotonic() + 60
    while not storage.exists("checkpoints/step-0000000010/optimizer.pt"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    storage.write("lease.json", b'{"owner": "second"}')
    storage.write("ledger/rank-1", b"")
    with pytest.raises(RunTakenOver, match="another driver"):
        saver.close()
    assert list_checkpoints(storage) == []


def test_all_damaged_is_an_error_and_not_a_new_run(tmp_path):
    storage = Storage(tmp_path)
    save(storage, 10, 20)
    for path in tmp_path.glob("checkpoints/*/model.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        newest(storage, trained(1), print)


def test_another_model_is_named_and_no_older_one_is_tried(tmp_path):
    storage = Storage(tmp_path)
    save(storage, 10)
    other = build_model(ModelConfig(towers={**TOWERS, "embed_dim": 32}))
    with pytest.raises(CheckpointError, match="step-0000000010 holds another model"):
        newest(storage, (other, build_optimizer(other, OptimConfig(), {})), print)


def test_unreadable_commit_is_named(tmp_path):
    storage, warnings = Storage(tmp_path), []
    info = save(storage, 10, 20)
    (tmp_path / "checkpoints" / info.name / "commit.json").write_text(json.dumps({"step": 20}))
    with pytest.raises(DamagedCheckpoint, match="step-0000000020 is not a complete checkpoint"):
        read_info(storage, info.name)
    assert [info.step for info in list_checkpoints(storage)] == [10]
    assert newest(storage, trained(1), warnings.append).step == 10
    assert "step-0000000020 is not a complete checkpoint" in warnings[0]


def test_a_run_without_checkpoints_begins_at_its_start(tmp_path):
    assert newest(Storage(tmp_path), trained(1), print) is None


@pytest.fixture
def quick(monkeypatch):
    """Storage that is tried again after milliseconds."""
    monkeypatch.setattr("sigray.workers.checkpoint.async_writer._PAUSES_S", (0.01, 0.05))


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "commit.json", "jsonl"])
def test_a_storage_that_refuses_for_a_while_loses_nothing(tmp_path, monkeypatch, quick, reason, file):
    """Full, read-only, away: at any of a checkpoint's files, a part of it written or not."""
    storage, warnings, refusals = Storage(tmp_path), [], iter(range(5))
    save(storage, 10)

    def refuse(path):
        if path.endswith(file) and next(refusals, None) is not None:
            raise OSError(reason, "refused")

    def refusing(original):
        def write(self, path, content):
            refuse(path)
            return original(self, path, content)

        return write

    for name in ("write", "write_hashed"):
        monkeypatch.setattr(Storage, name, refusing(getattr(Storage, name)))
    saver = writer(storage, warn=warnings.append, first_step=10)
    saver.save(20, 160, metrics=[{"step": 15, "loss": 1.0}])
    saver.close()
    assert newest(storage, trained(1), print).step == 20
    assert [line["step"] for line in read_metrics(storage, 20)] == [15]
    assert len(warnings) == 2
    assert "the checkpoint of step 20 could not be written" in warnings[0]
    assert "refused" in warnings[0]
    assert "the checkpoint of step 20 is written" in warnings[1]


def test_a_storage_that_refuses_to_the_end_is_an_error_and_the_older_one_stays(tmp_path, monkeypatch, quick):
    storage = Storage(tmp_path)
    save(storage, 10)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Storage, "write_hashed", refuse)
    saver = writer(storage, storage_timeout_s=0.3)
    saver.save(20, 160)
    with pytest.raises(OSError, match="the checkpoint of step 20 could not be written: .*No space left on device"):
        saver.close()
    assert newest(storage, trained(1), print).step == 10


def test_an_error_of_ours_in_the_thread_reaches_the_training_thread(tmp_path):
    saver = writer(Storage(tmp_path))
    saver._model = {"not": object()}  # no JSON
    saver.save(10, 80)
    with pytest.raises(TypeError):
        saver.close()


def test_metrics_come_back_without_what_was_not_committed(storage):
    saver = writer(storage)
    for step in (10, 20, 30):
        saver.save(step, step * 8, metrics=[{"step": step - 5, "loss": 0.5}, {"step": step, "loss": 0.25}])
    saver.close()
    assert [line["step"] for line in read_metrics(storage, 20)] == [5, 10, 15, 20]


def test_storage_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/below is not writable"):
        Storage(tmp_path / "file" / "below").check_writable()
    with pytest.raises(StorageError, match="gopher://x"):
        Storage("gopher://x/y")


def test_write_leaves_no_half_file(tmp_path):
    storage = Storage(tmp_path)
    storage.write("a/b.txt", b"first")
    storage.write("a/b.txt", b"second")
    assert storage.read("a/b.txt") == b"second"
    assert storage.list("a") == ["b.txt"]
    assert storage.list("none") == []


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 2**20, 2**20 + 4096, 3 * 2**20 - 1])
@pytest.mark.parametrize("piece", [1000, 2**20, 2**23])
def test_a_large_file_is_written_as_it_is(tmp_path, num_bytes, piece):
    content = np.random.default_rng(0).bytes(num_bytes)

    def write(file):
        for start in range(0, num_bytes, piece):
            assert file.write(content[start : start + piece]) == len(content[start : start + piece])

    storage = Storage(tmp_path)
    storage.write("a/b", bytes(2**22))  # which it replaces
    assert storage.write_hashed("a/b", write) == fingerprint(content)
    assert storage.read("a/b") == content
    assert fingerprint(content)["xxh3_128"] == xxhash.xxh3_128(content).hexdigest()


def test_a_disk_that_is_full(tmp_path, quick):
    """The kernel's own ENOSPC: a file that is /dev/full."""
    warnings = []
    full = tmp_path / "checkpoints" / "step-0000000020" / "optimizer.pt"
    saver = writer(Storage(tmp_path), warn=warnings.append)
    save(Storage(tmp_path), 10)
    full.parent.mkdir()
    full.symlink_to("/dev/full")
    saver.save(20, 160)
    deadline = time.monotonic() + 60
    while not warnings:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "the checkpoint of step 20 could not be written" in warnings[0]
    assert "No space left on device" in warnings[0]
    assert newest(Storage(tmp_path), trained(1), print).step == 10
    full.unlink()
    saver.close()
    assert newest(Storage(tmp_path), trained(1), print).step == 20


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("num_bytes", [10_000, 5_000_000])
def test_a_store_that_goes_away_in_mid_upload(monkeypatch, quick, new_place, scheme, num_bytes):
    """Cut after so many bytes of the upload, away until it was noticed, then back."""
    warnings, uri = [], new_place(scheme)
    name = ENDPOINTS[scheme]
    url = urlsplit(os.environ[name])
    with Outage(url.port) as way:
        monkeypatch.setenv(name, way.endpoint + url.path)
        storage = Storage(uri)
        save(storage, 10)
        before = way.num_sent
        saver = writer(storage, warn=warnings.append, first_step=10)
        way.cut_after(num_bytes)
        saver.save(20, 160, metrics=[{"step": 20, "loss": 0.5}])
        deadline = time.monotonic() + 60
        while not warnings:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert way.is_down
        assert before + num_bytes <= way.num_sent
        way.mend()
        assert [info.step for info in list_checkpoints(storage)] == [10]
        saver.close()
        assert "the checkpoint of step 20 could not be written" in warnings[0]
        assert "the checkpoint of step 20 is written" in warnings[1]
        assert newest(storage, trained(1), print).step == 20
        assert [line["step"] for line in read_metrics(storage, 20)] == [20]


def test_files_are_durable_before_the_commit_mark(tmp_path, monkeypatch):
    """Each fsync as it happens: what was synced, how much of it was written, and whether the mark stood there."""
    synced, original = [], os.fsync
    mark = tmp_path / "run" / "checkpoints" / "step-0000000010" / "commit.json"

    def fsync(descriptor):
        original(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        name = re.sub(r"\.[0-9a-f]{32}\.tmp$", "", os.path.relpath(path, tmp_path))
        synced.append((name, path.stat().st_size, mark.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    save(Storage(tmp_path / "run"), 10)
    folder = "run/checkpoints/step-0000000010"
    before = {name: size for name, size, has_mark in synced if not has_mark}
    for file in ("model.safetensors", "optimizer.pt", "commit.json"):
        assert before.get(f"{folder}/{file}") == (mark.parent / file).stat().st_size
    assert {folder, "run/checkpoints", "run", "."} <= before.keys(), "a name on the way to the files is not durable"
    assert folder in {name for name, _, has_mark in synced if has_mark}, "the mark's own name is not durable"
