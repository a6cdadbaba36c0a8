"""`sigray.stream`: the batches of `sigray train` in any loop, on any number of ranks and workers, through deaths."""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sigray
from sigray.workers.data import stream as module
from sigray.workers.data import stream_workers
from sigray.workers.data.extras import Extras
from sigray.workers.data.tar import DataError
from sigray.workers.data.worker import DataWorker
from tests.helpers.bare import OneWorker
from tests.helpers.batches import batches
from tests.helpers.data import drawn_sample, write_dataset, write_tar
from tests.helpers.processes import descendants_named
from tests.helpers.ranks import RankGroup

BATCH = 12
ORDER = {"num_lanes": 3, "shuffle_window": 10, "block_size": 4}


@pytest.fixture
def make(data_config, model_config) -> Callable[..., sigray.Stream]:
    """A stream over the shards of `data_config`."""

    def make(**changes: Any) -> Any:
        shards = changes.pop("shards", data_config.shards)
        keys = {"global_batch_size": BATCH, "num_samples": 12 * BATCH, "seed": 5, "model": model_config.model_dump()}
        return sigray.stream(shards, **(keys | ORDER | changes))

    return make


@pytest.fixture
def in_process(monkeypatch) -> None:
    """The data-shard worker decodes in this process: for what no process has a part in."""

    class OneDecoder(stream_workers.Workers):
        kind = "processes"

        def __init__(self, arguments, seed, extras, world_size):
            self.blocks = OneWorker(DataWorker(*arguments, seed=seed, extras=extras), shares_memory=True)

    monkeypatch.setattr(module, "start_workers", OneDecoder)


def rows(batch: dict[str, Any]) -> tuple[bytes, bytes, list[str]]:
    return batch["images"].numpy().tobytes(), batch["tokens"].numpy().tobytes(), batch["__key__"]


def joined(parts: list[list[dict[str, Any]]]) -> list[tuple[bytes, bytes, list[str]]]:
    """The global batches of all ranks' parts."""
    found = []
    for of_step in zip(*parts, strict=True):
        images, tokens, keys = zip(*map(rows, of_step), strict=True)
        found.append((b"".join(images), b"".join(tokens), list(itertools.chain(*keys))))
    return found


@pytest.fixture
def expected(data_config, model_config) -> list[tuple[bytes, bytes, list[str]]]:
    """What `sigray train` would train on, from a loader and one data-shard worker in this process."""
    found = batches(data_config.model_copy(update=ORDER), model_config, batch=BATCH)
    return [(b.images.numpy().tobytes(), b.tokens.numpy().tobytes(), b.keys) for b in found]


def test_processes_give_the_batches_of_a_run(make, expected):
    with make(num_workers=2) as stream:
        assert stream.kind == "processes"
        own = descendants_named(os.getpid(), f"{sys.executable} -P -m sigray.workers.data.processes")
        assert sorted(own) == sorted(stream._workers.blocks.pids)
        assert len(own) == 2
        assert joined([list(stream)]) == expected


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_a_batch(make, in_process, expected, world_size):
    parts = [list(make(rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert joined(parts) == expected


def test_a_killed_process_is_replaced(make, expected):
    found = []
    with make(num_workers=2, prefetch_batches=1) as stream:
        pids = set(stream._workers.blocks.pids)
        try:
            for number, batch in enumerate(stream):
                found.append(rows(batch))
                if number in (0, 5):
                    os.kill(stream._workers.blocks.pids[number % 2], signal.SIGKILL)
        except (RuntimeError, DataError) as error:
            raise AssertionError("a process was not replaced") from error
        assert len(pids - set(stream._workers.blocks.pids)) == 2
    assert found == expected


def test_a_stream_goes_on_from_every_state(make, in_process, expected):
    """Each state through JSON, and the next stream on another number of ranks."""
    stream = make()
    states = [stream.state_dict()]
    for _ in stream:
        states.append(stream.state_dict())
    for seen in (0, 1, 5, 11, 12):
        state = states[seen]
        assert len(json.dumps(state)) < 4096
        text = json.dumps(state)
        parts = [list(make(rank=rank, world_size=2, state=json.loads(text))) for rank in (0, 1)]
        assert joined(parts) == expected[seen:]


def test_a_loop_that_is_left_goes_on(make, in_process, expected):
    stream = make()
    first = [rows(batch) for batch, _ in zip(stream, range(3), strict=False)]
    assert stream.state_dict()["samples_seen"] in (3 * BATCH, 4 * BATCH)  # zip takes one more
    taken = stream.state_dict()["samples_seen"] // BATCH
    rest = [rows(batch) for batch in stream]
    assert first + rest == expected[:3] + expected[taken:]
    with pytest.raises(RuntimeError, match="the stream is closed"):
        iter(stream)


def test_load_state_dict_moves_the_next_loop_and_ends_this_one(make, in_process, expected):
    stream = make()
    begin = stream.state_dict()
    loop = iter(stream)
    next(loop)
    stream.load_state_dict(begin)
    with pytest.raises(RuntimeError, match="load_state_dict"):
        next(loop)
    assert [rows(batch) for batch in stream] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed=6, but the state is of seed=5"),
        ({"num_lanes": 2}, "num_lanes=2, but the state is of num_lanes=3"),
        ({"shuffle_window": 11}, "shuffle_window=11"),
        ({"global_batch_size": 10}, "the state's 36 samples seen are no multiple"),
    ],
)
def test_a_state_of_another_order_is_refused(make, in_process, change, message):
    stream = make()
    for _ in range(3):
        next(iter(stream))
    with pytest.raises(ValueError, match=message):
        make(state=stream.state_dict(), **change)


def test_a_smaller_batch_goes_on_with_the_same_samples(make, in_process):
    stream = make()
    next(iter(stream))
    state = stream.state_dict()
    whole = [row for batch in stream for row in batch["samples"].tolist()]
    halves = [row for batch in make(state=state, global_batch_size=6) for row in batch["samples"].tolist()]
    assert sorted(halves) == sorted(whole)


def test_another_manifest_is_refused_by_shard(tmp_path, make, in_process):
    folder = tmp_path / "shards"
    for number in range(3):
        write_tar(folder / f"{number}.tar", [drawn_sample(20 * number + index) for index in range(20)])
    kept = tmp_path / "manifest.json"
    keys = {"shards": str(folder), "manifest": kept}
    stream = make(**keys)
    next(iter(stream))
    state = stream.state_dict()
    assert kept.exists()
    next(iter(make(state=state, **keys)))
    write_tar(folder / "1.tar", [drawn_sample(100 + index) for index in range(20)])
    with pytest.raises(DataError, match=r"1\.tar: content changed"):
        make(**keys)
    with pytest.raises(DataError, match=r"1\.tar is not what it was when the state was made"):
        make(shards=str(folder), state=state)
    write_tar(folder / "3.tar", [drawn_sample(200)])
    with pytest.raises(DataError, match=r"3\.tar: new"):
        make(**keys)
    with pytest.raises(DataError, match="the state is of 3 shards, the stream has 4"):
        make(shards=str(folder), state=state)
    kept.write_text("[]")
    with pytest.raises(DataError, match=r"manifest=.*manifest\.json"):
        make(**keys)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rank": 2, "world_size": 2}, ValueError, "rank=2: .* at most 1"),
        ({"rank": "0", "world_size": 2}, ValueError, "rank='0': a whole number"),
        ({"global_batch_size": 8.0}, ValueError, "global_batch_size=8.0: a whole number"),
        ({"global_batch_size": True}, ValueError, "global_batch_size=True: a whole number"),
        ({"seed": -1}, ValueError, "seed=-1: a whole number"),
        ({"seed": 2**32}, ValueError, "seed=4294967296: .* at most 4294967295"),
        ({"members": "npy"}, ValueError, "members='npy': a list"),
        ({"members": [3]}, ValueError, r"members=\[3\]: a list"),
        ({"members": ["__key__"]}, ValueError, "other values of this name"),
        ({"members": ["image"]}, ValueError, "other values of this name"),
        ({"map": 3}, ValueError, "map=3: a function"),
        ({"map": threading.Lock().__enter__}, ValueError, "cannot be sent to data-shard workers"),
        ({"rank": 0}, ValueError, "give both or neither"),
        ({"world_size": 5, "rank": 0}, ValueError, "does not divide by world_size=5"),
        ({"global_batch_size": 500}, ValueError, "global_batch_size=500 takes 500 samples"),
        ({"num_lane": 3}, ValueError, "num_lane"),
        ({"members": ["mask.pkl"]}, ValueError, "runs code from the tar"),
        ({"members": ["pth"]}, ValueError, "runs code from the tar"),
        ({"members": ["images"]}, ValueError, "other values of this name"),
        ({"num_samples": 0}, ValueError, "num_samples=0"),
        ({"state": {"epoch": 1}}, ValueError, "what state_dict"),
        ({"state": [1]}, ValueError, "what state_dict"),
        ({"state": {"version": 1, "samples_seen": "x", "order": {}}}, ValueError, "what state_dict"),
        ({"shards": "/nowhere/*.tar"}, DataError, "shards: .*nowhere"),
        ({"model": "ViT-B-99"}, ValueError, "ViT-B-99"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_starts(make, change, error, message):
    with pytest.raises(error, match=message):
        make(**change)
    assert not descendants_named(os.getpid(), f"{sys.executable} -P -m sigray.workers.data.processes")


def npy(value: Any, allow_pickle: bool = False) -> bytes:
    content = io.BytesIO()
    np.save(content, value, allow_pickle=allow_pickle)
    return content.getvalue()


@pytest.fixture
def rich(tmp_path, data_config) -> Any:
    """Shards with further members; of the second, some are missing or damaged."""
    samples = [drawn_sample(n) | {"npy": npy(np.arange(n)), "cls": str(n), "seg.bin": bytes([n])} for n in range(24)]
    write_tar(tmp_path / "rich" / "a.tar", samples[:12])
    del samples[15]["npy"]
    samples[17]["cls"] = "no number"
    samples[18]["npy"] = npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)  # a pickle in disguise
    write_tar(tmp_path / "rich" / "b.tar", samples[12:])
    return {"shards": str(tmp_path / "rich"), "num_samples": 24, "max_bad_fraction": 1.0}


def test_members_are_decoded_and_keep_their_sample(make, in_process, rich):
    stream = make(members=["npy", "cls", "json", "seg.bin"], num_lanes=1, shuffle_window=24, **rich)
    seen = []
    for batch in stream:
        assert len(batch["__key__"]) == BATCH
        for row, key in enumerate(batch["__key__"]):
            number = int(key[-5:])
            seen.append(number)
            assert batch["json"][row]["number"] == batch["cls"][row] == number
            assert batch["seg.bin"][row] == bytes([number])
            assert batch["npy"][row] is None if number == 15 else batch["npy"][row].tolist() == list(range(number))
            assert batch["__url__"][row].endswith("a.tar" if number < 12 else "b.tar")
    assert len(seen) == 24
    assert {15, 0, 23} < set(seen)
    assert not {17, 18} & set(seen)  # refused, and replaced by others
    assert {reason: count for reason, (count, _) in stream.refused.items()} == {
        "unreadable cls member": 1,
        "unreadable npy member": 1,
    }


DARKER = """
import numpy as np

def darker(sample):
    if sample["__key__"] == "sample00007":
        return None
    noise = np.random.default_rng(sample["__seed__"]).integers(0, 9)
    image = (sample["image"] // 2 + noise).astype(np.uint8)
    return sample | {"image": image, "caption": "dark " + sample["caption"], "noise": int(noise)}
"""


def test_a_map_function_changes_samples_in_the_workers(tmp_path, make, rich, monkeypatch):
    """From a module beside the user's script; the same on any number of workers, through a death."""
    Path(tmp_path, "user_maps.py").write_text(DARKER)
    monkeypatch.syspath_prepend(tmp_path)
    darker = __import__("user_maps").darker
    keys = rich | {"crop": "center", "shards": rich["shards"] + "/a.tar"}
    plain = {key: image for batch in make(**keys) for key, image in zip(batch["__key__"], batch["images"], strict=True)}
    found = []
    for num_workers in (1, 2):
        stream = make(map=darker, num_workers=num_workers, **keys)
        rows_found = {}
        for number, batch in enumerate(stream):
            if number == 0:
                os.kill(stream._workers.blocks.pids[0], signal.SIGKILL)
            for row, key in enumerate(batch["__key__"]):
                image = batch["images"][row].numpy()
                np.testing.assert_array_equal(image, plain[key].numpy() // 2 + batch["noise"][row])
                rows_found[tuple(batch["samples"][row].tolist())] = (key, image.tobytes(), batch["noise"][row])
        assert stream.refused["refused by darker"][0] == 2  # in two epochs
        found.append(rows_found)
    assert found[0] == found[1]
    assert len({noise for _, _, noise in found[0].values()}) > 3  # drawn for each sample and epoch


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda sample: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda sample: {}, "return the sample, a dict with `image`"),
        (lambda sample: [], "return the sample, a dict with `image`"),
        (lambda sample: sample | {"image": sample["image"][:2]}, r"image: \(16, 16, 3\) uint8 expected, \(2, 16, 3\)"),
        (lambda sample: sample | {"image": sample["image"] / 2}, "uint8 expected, .* float64 returned"),
        (lambda sample: sample | {"caption": 3}, "caption: a text expected, int returned"),
        (lambda sample: sample | {"tokens": 3}, "other values of this name"),
    ],
)
def test_an_error_of_a_map_function_names_key_and_shard(make, in_process, rich, function, message):
    with pytest.raises(DataError, match=rf"[ab]\.tar key sample000\d\d: map=.*lambda.*{message}"):
        list(make(map=function, **rich))


def test_a_value_that_cannot_be_sent_is_an_error(make, rich):
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        list(make(map=lambda sample: sample | {"code": lambda: 0}, **rich))


def test_a_map_function_may_keep_the_image_it_was_given(make, in_process, rich):
    def two_views(sample):
        return sample | {"first": sample["image"], "image": 255 - sample["image"]}

    for batch in make(map=two_views, **rich):
        np.testing.assert_array_equal(np.stack(batch["first"]), 255 - batch["images"].numpy())


def test_a_value_that_cannot_be_read_back_is_an_error(tmp_path, make, rich, monkeypatch):
    """Such as an exception with two arguments, which pickles."""
    Path(tmp_path, "two_arguments.py").write_text(
        "class Two(Exception):\n    def __init__(self, a, b):\n        super().__init__(a)\n"
        "def add(sample):\n    return sample | {'why': Two(1, 2)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="cannot be unpickled"):
        list(make(map=__import__("two_arguments").add, **rich))


def test_a_closed_stream_ends_its_loop(make):
    """Closed inside the loop, and while another thread waits for a batch."""
    stream = make()
    loop = iter(stream)
    next(loop)
    time.sleep(1)  # the prefetch is complete
    stream.close()
    with pytest.raises(RuntimeError, match="has ended this loop"):
        next(loop)
    slow = make(map=lambda sample: time.sleep(60))
    threading.Timer(1, slow.close).start()
    assert list(slow) == []
    with pytest.raises(RuntimeError, match="the stream is closed"):
        iter(stream)


def test_a_new_loop_does_not_wait_for_blocks_of_the_old_one(make, rich):
    """Dozens of blocks are outstanding when the first loop is left."""

    def count(sample):
        count.calls = getattr(count, "calls", 0) + 1
        time.sleep(0.02)
        return sample | {"calls": count.calls}

    stream = make(map=count, prefetch_batches=20, **(rich | {"num_samples": 480}))
    begin = stream.state_dict()
    first = next(iter(stream))
    stream.load_state_dict(begin)
    again = next(iter(stream))
    assert rows(again) == rows(first)
    assert max(again["calls"]) < max(first["calls"]) + 12 * BATCH  # of 20 batches that were requested
    stream.close()


def test_values_of_cached_images_are_mapped_once(make, in_process, rich):
    """The cache keeps the image before the map: a second epoch is as dark as the first."""
    keys = rich | {"shards": rich["shards"] + "/a.tar", "num_samples": 36, "crop": "center", "members": ["json"]}
    seen: dict[str, set[int]] = {}
    for batch in make(map=lambda s: s | {"image": s["image"] // 2, "level": int(s["image"].max() // 2)}, **keys):
        for key, image in zip(batch["__key__"], batch["images"], strict=True):
            seen.setdefault(key, set()).add(int(image.max()))
    assert all(len(levels) == 1 for levels in seen.values())


def test_a_pickled_member_is_never_loaded(make, in_process, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    samples = [drawn_sample(n) | {"npy": pickle.dumps(Evil()), "json": "{}"} for n in range(12)]
    write_tar(tmp_path / "evil.tar", samples)
    with pytest.raises(DataError, match="none of 4 neighbouring samples"):
        list(make(shards=str(tmp_path / "evil.tar"), members=["npy"], num_samples=12, max_bad_fraction=1.0))
    assert not (tmp_path / "owned").exists()
    with pytest.raises(ValueError, match="runs code"):
        Extras(("pickle",))


def left_alive(pids: list[int]) -> list[int]:
    """Those of the processes that are still there after at most ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        pids = [pid for pid in pids if os.path.exists(f"/proc/{pid}/cmdline") and b"sigray" in cmdline(pid)]
        if not pids:
            break
        time.sleep(0.02)
    return pids


def cmdline(pid: int) -> bytes:
    try:
        return open(f"/proc/{pid}/cmdline", "rb").read()
    except OSError:
        return b""


def take_one(stream: Any) -> list[int]:
    pids = stream._workers.blocks.pids
    for _ in stream:
        break
    return pids


def fail_after_one(stream: Any) -> list[int]:
    pids = stream._workers.blocks.pids
    with pytest.raises(ZeroDivisionError), stream:
        next(iter(stream))["images"] / (1 // 0)
    return pids


def read_all(stream: Any) -> list[int]:
    pids = stream._workers.blocks.pids
    for _ in stream:
        pass
    assert not left_alive(pids)  # though the stream is still there
    return pids


@pytest.mark.parametrize("use", [take_one, fail_after_one, read_all])
def test_the_processes_end_with_the_loop(make, use):
    pids = use(make())
    gc.collect()
    assert pids
    assert not left_alive(pids)


def test_a_process_that_cannot_start_is_an_error(make, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="process ended 3 times"):
        list(make())


def read_in_group(rank: int, world_size: int, folder: str, model: dict[str, Any], num_workers: int) -> Any:
    """This rank's rows, a digest each, and the largest state."""
    found, size = [], 0
    with sigray.stream(folder, global_batch_size=200, num_samples=10_000, model=model, num_workers=num_workers) as own:
        for batch in own:
            pairs = zip(batch["images"].numpy(), batch["tokens"].numpy(), batch["__key__"], strict=True)
            found.append([hashlib.sha256(i.tobytes() + t.tobytes() + k.encode()).hexdigest() for i, t, k in pairs])
            size = max(size, len(json.dumps(own.state_dict())))
    return found, size


def test_ten_thousand_samples_are_the_same_for_any_group(tmp_path, model_config, minutes):
    write_dataset(tmp_path / "train", [1500, 2500, 400, 3600, 2000])
    found = []
    for world_size, num_workers in ((1, 1), (1, 3), (2, 2), (4, 3)):
        with RankGroup(world_size) as group:
            parts = group.run(read_in_group, str(tmp_path / "train"), model_config.model_dump(), num_workers)
        assert max(size for _, size in parts) < 4096
        found.append([list(itertools.chain(*of_step)) for of_step in zip(*(rows for rows, _ in parts), strict=True)])
    assert len(set(itertools.chain(*found[0]))) == 10_000  # an epoch: each sample once
    assert all(other == found[0] for other in found)


def fail_in_group(rank: int, world_size: int, shards: str, model: dict[str, Any]) -> list[str]:
    messages = []
    own = {"rank": 0, "world_size": 2}
    for changes in (
        {"seed": rank},
        {"num_lanes": 2 + rank},
        {"shards": "/nowhere/{0..1}.tar"},
        {"state": {"at": 1}},
        own,
        {"block_size": "x" if rank else 4},
        {"map": len} if rank else {},
    ):
        try:
            sigray.stream(**({"shards": shards, "global_batch_size": 10, "model": model} | changes))
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_an_error_is_raised_on_all_ranks(rank_groups, data_config, model_config):
    for messages in rank_groups(2).run(fail_in_group, data_config.shards, model_config.model_dump()):
        assert "seed is 0 on process 0 and 1 on process 1" in messages[0]
        assert "data is" in messages[1]
        assert messages[2].startswith("DataError: shards: ")
        assert "what state_dict" in messages[3]
        assert "rank is [0, 0] on the processes" in messages[4]
        assert "block_size" in messages[5]
        assert 'map is null on process 0 and "len" on process 1' in messages[6]
