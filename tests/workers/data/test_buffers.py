"""Batches that data-shard workers write in place are those by value; they stay until no tensor views them."""

import contextlib
import dataclasses
import functools
import os
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sigray.workers.config import LabelNoise
from sigray.workers.data import buffers
from sigray.workers.data.buffers import Address, BufferPool, Mappings, Place, SharedBuffer
from sigray.workers.data.label_noise import Noise
from sigray.workers.data.loader import Batch, Loader
from sigray.workers.data.worker import DataWorker, build_order, image_kind
from sigray.workers.device import Device
from tests.helpers.bare import OneWorker
from tests.helpers.batches import batches, manifest_of

WRITER = """
import sys
import numpy as np
from sigray.workers.data.buffers import Address, Mappings, Place
pid, descriptor, name, num_bytes = sys.argv[1:]
place = Place(Address(int(pid), int(descriptor), name, int(num_bytes)), row=3, first=1, count=2)
rows = Mappings().rows([place], (2, 2), np.dtype(np.uint16))
if rows is not None:
    for number, row in rows.items():
        row[:] = 1000 + number
print(None if rows is None else sorted(rows), flush=True)
sys.stdin.read()
"""


def buffer_of_rows(num_rows: int) -> SharedBuffer:
    return SharedBuffer((num_rows, 2, 2), np.dtype(np.uint16))


def place_in(buffer: SharedBuffer, **changes) -> Place:
    return Place(dataclasses.replace(buffer.address, **changes), row=0, first=0, count=1)


def rows_of(mappings: Mappings, place: Place):
    return mappings.rows([place], (2, 2), np.dtype(np.uint16))


def test_another_process_writes_rows_where_they_belong():
    buffer = buffer_of_rows(6)
    buffer.array[:] = 7
    address = [str(field) for field in dataclasses.astuple(buffer.address)]
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, *address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == "[1, 2]\n"
    assert buffer.array[:, 0, 0].tolist() == [7, 7, 7, 1001, 1002, 7]
    array = buffer.array
    del buffer  # the batch outlives its buffer and the writer
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert array[:, 1, 1].tolist() == [7, 7, 7, 1001, 1002, 7]


def test_the_memory_at_an_address_is_the_buffer_or_nothing():
    buffer, other = buffer_of_rows(2), buffer_of_rows(2)
    mappings = Mappings()
    assert rows_of(mappings, place_in(buffer)) is not None
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for changes in (
        {"name": "sigray-of-another-process"},
        {"descriptor": other.address.descriptor},
        {"descriptor": 2**20},
        {"pid": gone.pid},
        {"pid": 1, "descriptor": 0},
    ):
        assert rows_of(mappings, place_in(buffer, **changes)) is None, changes
    assert mappings.rows([place_in(buffer), place_in(other, name="x")], (2, 2), np.dtype(np.uint16)) is None


def test_mappings_of_freed_buffers_are_dropped(monkeypatch):
    opened = []
    monkeypatch.setattr(Address, "open", lambda self, open=Address.open: opened.append(self) or open(self))
    mappings, made = Mappings(), [buffer_of_rows(1) for _ in range(3)]
    for _ in range(2):  # each is looked for once
        assert all(rows_of(mappings, place_in(buffer)) for buffer in made)
    assert opened == [buffer.address for buffer in made]
    del made[:2]
    new = buffer_of_rows(1)
    assert rows_of(mappings, place_in(new)) is not None
    assert set(mappings._found) == {made[0].address, new.address}


def test_a_system_without_such_memory_has_batches_of_its_own(monkeypatch, data_config, model_config):
    expected = batches(data_config, model_config, batch=12)
    monkeypatch.delattr(os, "memfd_create")
    assert buffer_of_rows(2).address is None
    same(expected, batches(data_config, model_config, batch=12, source=RequestedByValue))


def test_a_block_comes_by_value_if_one_of_its_batches_cannot_be_reached(data_config, model_config, monkeypatch):
    expected = batches(data_config, model_config, batch=12)
    made = []

    class OftenOutOfReach(SharedBuffer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self.address)
            self.address = self.address if len(made) % 3 else None

    monkeypatch.setattr(buffers, "SharedBuffer", OftenOutOfReach)
    same(expected, batches(data_config, model_config, batch=12))
    assert len(made) > 3


class RequestedByValue(OneWorker):
    def request(self, lane, number, places, pixels):
        assert not places
        return super().request(lane, number, places, pixels)


class Recorded(OneWorker):
    """Counts how its blocks come."""

    def __init__(self, worker, shares_memory):
        super().__init__(worker, shares_memory)
        self.by_value = self.in_place = 0

    def wait(self, lane, number, handle):
        block = super().wait(lane, number, handle)
        self.by_value, self.in_place = self.by_value + bool(len(block.images)), self.in_place + (not len(block.images))
        return block


class WithStragglers(OneWorker):
    """Some primaries do not answer and a backup does; they write nonsense to their places for ever."""

    def __init__(self, worker, shares_memory, seed=0):
        super().__init__(worker, shares_memory)
        self._random, self._mappings, self._stragglers = random.Random(seed), Mappings(), []
        self.num_stragglers = 0

    def wait(self, lane, number, handle):
        for rows in self._stragglers:
            for row in rows.values():
                row[...] = self._random.randrange(256)
        places, pixels = handle
        if not places or self._random.random() < 0.7:
            return super().wait(lane, number, handle)
        kind = self._worker._image
        self._stragglers.append(self._mappings.rows(places, kind.shape, kind.dtype))
        self.num_stragglers += 1
        # A copy: the worker keeps its block for other requests.
        return dataclasses.replace(super().wait(lane, number, ((), pixels)), has_straggler=True)


def same(expected, found):
    for want, got in zip(expected, found, strict=True):
        for name in ("images", "tokens"):
            np.testing.assert_array_equal(getattr(got, name).numpy(), getattr(want, name).numpy())
        for name in ("samples", "replaced", "keys", "step"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def one_by_one(data, model, make_source, *, shares_memory, world_size=1, rank=0, first=0, batch=12, noise=None):
    """Copies of a loader's batches, each released before the next, so that memory is used again."""
    manifest = manifest_of(data)
    source = make_source(DataWorker(manifest, data, model, seed=5), shares_memory)
    data = data.model_copy(update={"prefetch_batches": 2, "max_bad_fraction": 1.0})
    loader = Loader(
        build_order(manifest, data, 5), source, data, image_kind=image_kind(manifest, model), global_batch_size=batch,
        rank=rank, world_size=world_size, first_step=first, last_step=first + 25, noise=noise,
    )  # fmt: skip
    found = []
    for got in loader:
        found.append(dataclasses.replace(got, images=got.images.clone()))
        got.release()
    return found, source


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    block_size=st.integers(1, 9),
    num_lanes=st.integers(1, 5),
    world_size=st.sampled_from([1, 2, 3, 4]),
    shared_blocks=st.sampled_from([1, 3]),
    first=st.integers(0, 9),
    noise=st.sampled_from([None, "alignment", "image", "all"]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_batches_written_in_place_are_those_by_value(
    data_config, model_config, block_size, num_lanes, world_size, shared_blocks, first, noise, seed, data
):
    rank = data.draw(st.integers(0, world_size - 1))
    config = data_config.model_copy(
        update={"block_size": block_size, "num_lanes": num_lanes, "shared_blocks": shared_blocks}
    )
    kinds = {"world_size": world_size, "rank": rank, "first": first}
    if noise is not None:
        kinds["noise"] = Noise(LabelNoise(kind=noise, fraction=0.5), 5, 49408, 0)
    expected, _ = one_by_one(config, model_config, OneWorker, shares_memory=False, **kinds)
    found, source = one_by_one(config, model_config, Recorded, shares_memory=True, **kinds)
    same(expected, found)
    # If captions move, every rank requests all blocks, and each is decoded once.
    by_value = world_size > 1 and noise in ("alignment", "all")
    assert (source.by_value == 0, source.in_place == 0) == (not by_value, by_value)
    late, source = one_by_one(
        config, model_config, lambda *all: WithStragglers(*all, seed=seed), shares_memory=True, **kinds
    )
    same(expected, late)


def by_value(worker, shares_memory):
    return OneWorker(worker)


@pytest.mark.parametrize(("batch", "world_size"), [(12, 1), (10, 2)])
def test_batches_that_are_handed_out_stay_as_they_are(data_config, model_config, batch, world_size):
    """No batch is released, and stragglers write until the end."""
    for rank in range(world_size):
        kinds = {"batch": batch, "rank": rank, "world_size": world_size}
        expected = batches(data_config, model_config, source=by_value, **kinds)
        assert len(expected) == 12
        for source in (Recorded, WithStragglers):
            same(expected, batches(data_config, model_config, source=source, **kinds))


def test_memory_is_used_again_unless_a_straggler_may_write(data_config, model_config, monkeypatch):
    made = []

    class Counted(SharedBuffer):
        def __init__(self, *arguments):
            made.append(1)
            super().__init__(*arguments)

    monkeypatch.setattr(buffers, "SharedBuffer", Counted)
    _, source = one_by_one(data_config, model_config, Recorded, shares_memory=True)
    usual = len(made)
    # Prefetched: 2 batches, and those that a round of blocks holds, twice; ready or in use: 4.
    assert usual <= 2 + 2 * -(-data_config.block_size * data_config.num_lanes // 12) + 4 < 25
    assert source.by_value == 0
    made.clear()
    _, source = one_by_one(data_config, model_config, WithStragglers, shares_memory=True)
    assert source.num_stragglers > 5
    assert usual < len(made)


def test_memory_that_cannot_be_locked_comes_from_torch(monkeypatch):
    """On hardware: tests/gpu/test_cuda.py."""
    monkeypatch.setattr(buffers, "_pinned", lambda num_bytes: np.zeros(num_bytes, np.uint8))
    asked = []

    def page_lock(memory):
        asked.append(len(memory))
        return len(asked) > 1

    for has_address in (False, True):
        buffer = SharedBuffer((3, 4), np.dtype(np.uint8), page_lock)
        assert (buffer.address is not None, buffer.array.shape) == (has_address, (3, 4))
    assert asked == [12, 12]


def test_memory_is_locked_until_no_batch_views_it(monkeypatch):
    """The calls of CUDA, without CUDA. On hardware: tests/gpu/test_cuda.py."""
    asked, answers = [], [0, 2]
    runtime = SimpleNamespace(
        cudaHostRegister=lambda *arguments: asked.append(arguments) or answers.pop(0),
        cudaHostUnregister=lambda *arguments: asked.append(arguments),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(buffers, "_pinned", lambda num_bytes: np.zeros(num_bytes, np.uint8))
    device = Device(torch.device("cuda", 1), "fp32")
    buffer = SharedBuffer((3, 4), np.dtype(np.uint8), device.page_lock)
    pointer, batch = buffer.array.ctypes.data, torch.from_numpy(buffer.array)[1:]
    assert buffer.address is not None
    assert asked == [(pointer, 12, 1)]
    del buffer
    assert len(asked) == 1
    del batch
    assert asked[1:] == [(pointer,)]
    refused = SharedBuffer((3, 4), np.dtype(np.uint8), device.page_lock)
    assert refused.address is None
    del refused
    assert len(asked) == 3  # nothing is unlocked that was not locked


NUM_ROWS, ROW = 3, (2,)
NUMBER = st.integers(0, 2**16)


@dataclasses.dataclass
class Step:
    """A step under way: its buffer, its twin's batch, and how far each row has come."""

    buffer: SharedBuffer
    expected: np.ndarray  # memory that belongs to this step alone
    primaries: dict[int, np.ndarray]  # rows of which the primary has not answered, and the memory that it writes to
    by_value: set[int]  # rows that came from a backup


class Interleavings(RuleBasedStateMachine):
    """Requests, writes, backups, deliveries and releases in any order. The twin takes new memory for each batch."""

    def __init__(self):
        super().__init__()
        self.pool = BufferPool((NUM_ROWS, *ROW), np.dtype(np.uint8))
        self.steps: list[Step] = []
        self.held: list[tuple[Batch, SharedBuffer, np.ndarray]] = []
        self.views: list[tuple[torch.Tensor, SharedBuffer, torch.Tensor]] = []  # slices that outlive a release
        self.stragglers: list[np.ndarray] = []  # memory that they may write to at any time
        self.made: list[SharedBuffer] = []
        self.peak = self.num_abandoned = self.num_dropped = self.value = 0

    def owned(self):
        return [step.buffer for step in self.steps] + [buffer for _, buffer, _ in self.held]

    def note(self, buffer):
        """A buffer was taken: it has one owner, and there are no more buffers than were in use at some time."""
        viewed = [buffer for _, buffer, _ in self.views]
        assert all(buffer is not other for other in self.owned() + viewed)
        if all(buffer is not other for other in self.made):
            self.made.append(buffer)
        in_use = {id(other) for other in [*self.owned(), *viewed, buffer]}
        self.peak = max(self.peak, len(in_use))
        assert len(self.made) <= self.peak + self.num_abandoned + self.num_dropped

    @precondition(lambda self: len(self.steps) < 3)
    @rule()
    def request(self):
        buffer = self.pool.take()
        self.note(buffer)
        self.value += 1
        expected = np.array([[self.value % 200 + row, self.value // 200] for row in range(NUM_ROWS)], np.uint8)
        primaries = {}
        for row in range(NUM_ROWS):
            buffer.add_writers(1)
            place = Place(buffer.address, row=row, first=0, count=1)
            primaries[row] = Mappings().rows([place], ROW, np.dtype(np.uint8))[0]
        self.steps.append(Step(buffer, expected, primaries, set()))

    @precondition(lambda self: any(step.primaries for step in self.steps))
    @rule(number=NUMBER, is_backup=st.booleans(), is_partial=st.booleans())
    def answer(self, number, is_backup, is_partial):
        """A primary writes and answers; or it writes a part, if anything, and its backup answers first."""
        open_rows = [(step, row) for step in self.steps for row in step.primaries]
        step, row = open_rows[number % len(open_rows)]
        memory = step.primaries.pop(row)
        if not is_backup:
            memory[...] = step.expected[row]
            step.buffer.add_writers(-1)
            return
        if is_partial:
            memory[0] = step.expected[row, 0]
        step.by_value.add(row)
        self.stragglers.append(memory)

    @precondition(lambda self: self.stragglers)
    @rule(number=NUMBER)
    def straggler_writes(self, number):
        self.stragglers[number % len(self.stragglers)][...] = 255

    @precondition(lambda self: any(not step.primaries for step in self.steps))
    @rule()
    def deliver(self):
        step = next(step for step in self.steps if not step.primaries)
        buffer = self.pool.complete(step.buffer)
        if buffer is not step.buffer:
            self.num_abandoned += 1
            self.note(buffer)
        self.steps.remove(step)
        for row in step.by_value:
            buffer.array[row] = step.expected[row]
        images = torch.from_numpy(buffer.hand_out())
        give_back = functools.partial(self.pool.release, buffer)
        nothing = np.zeros(0)
        self.held.append((Batch(0, images, images, nothing, [], nothing, give_back), buffer, step.expected))

    @precondition(lambda self: self.held)
    @rule(number=NUMBER, keeps_slice=st.booleans())
    def release(self, number, keeps_slice):
        batch, buffer, expected = self.held.pop(number % len(self.held))
        batch.tokens = None  # the test's own second reference
        if keeps_slice:
            self.views.append((batch.images[1:], buffer, torch.from_numpy(expected[1:])))
        batch.release()

    @precondition(lambda self: self.views)
    @rule(number=NUMBER)
    def drop_slice(self, number):
        del self.views[number % len(self.views)]

    @precondition(lambda self: self.held)
    @rule(number=NUMBER)
    def drop_without_release(self, number):
        self.num_dropped += 1
        del self.held[number % len(self.held)]

    @invariant()
    def every_view_is_as_it_was_delivered(self):
        for batch, _, expected in self.held:
            np.testing.assert_array_equal(batch.images.numpy(), expected)
        for rows, _, expected in self.views:
            assert torch.equal(rows, expected)


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=80, stateful_step_count=40)


def test_states_follow_each_other_as_the_table_says():
    pool = BufferPool((2, 2), np.dtype(np.uint8))
    buffer = pool.take()
    buffer.add_writers(1)
    for state in ("free", "complete", "held", "released"):  # complete: a writer has not answered
        with pytest.raises(AssertionError):
            buffer.become(state)
    buffer.add_writers(-1)
    with pytest.raises(AssertionError):
        buffer.become("abandoned")  # there is no straggler
    assert pool.complete(buffer) is buffer
    with pytest.raises(AssertionError):
        buffer.add_writers(1)
    buffer.hand_out()
    pool.release(buffer)
    with pytest.raises(AssertionError):
        pool.release(buffer)
    assert pool.take() is buffer


def test_a_released_batch_cannot_be_read_and_its_slices_stay(data_config, model_config):
    manifest = manifest_of(data_config)
    expected = batches(data_config, model_config, batch=12, source=by_value)
    loader = Loader(
        build_order(manifest, data_config, 5), OneWorker(DataWorker(manifest, data_config, model_config, seed=5), True),
        data_config, image_kind=image_kind(manifest, model_config), global_batch_size=12, rank=0, world_size=1,
        first_step=0, last_step=12,
    )  # fmt: skip
    slices = []
    for batch in loader:
        slices.append(batch.images[4:8])
        batch.release()
        with pytest.raises(AttributeError):
            len(batch.images)
        with pytest.raises(AttributeError):  # once is enough
            batch.release()
        assert len(batch.tokens) == len(batch.keys) == 12
    for rows, want in zip(slices, expected, strict=True):
        assert torch.equal(rows, want.images[4:8])


def test_a_whole_block_is_decoded_in_place_and_a_part_is_kept_for_other_requests(data_config, model_config):
    manifest = manifest_of(data_config)
    worker = DataWorker(manifest, data_config, model_config, seed=5)
    want = DataWorker(manifest, data_config, model_config, seed=5).block(1, 2)
    size = data_config.block_size
    buffer = SharedBuffer((size + 1, 16, 16, 3), np.dtype(np.uint8))

    def ask(first, count):
        buffer.array[:] = 0
        block = worker.block(1, 2, [Place(buffer.address, first + 1, first, count)])
        assert block.images.shape == (0, 16, 16, 3)
        np.testing.assert_array_equal(buffer.array[first + 1 : first + 1 + count], want.images[first : first + count])
        assert not buffer.array[: first + 1].any()
        assert not buffer.array[first + 1 + count :].any()
        np.testing.assert_array_equal(block.tokens, want.tokens)
        return worker.num_decoded

    assert ask(0, size) == size
    assert ask(0, size) == 2 * size  # it kept nothing
    assert ask(1, 2) == 3 * size
    assert ask(3, 1) == ask(0, size) == 3 * size  # now it has
    np.testing.assert_array_equal(worker.block(1, 2).images, want.images)
    assert worker.num_decoded == 3 * size
