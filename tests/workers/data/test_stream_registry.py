"""Readers of a shared stream keep pace: each block is decoded once for all that are together, and all come on."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigray.workers.data.stream_registry import StreamRegistry, evicts_needed_block


@pytest.mark.parametrize(
    ("number", "others", "window", "answer"),
    [
        (0, [-1], 2, False),
        (1, [-1], 2, False),
        (2, [-1], 2, True),  # blocks 1 and 2 would be kept, and the other one needs 0
        (2, [0], 2, False),
        (2, [0, -1], 2, True),
        (3, [], 2, False),
        (9, [-1], 2, False),  # it is on its own already
        (5, [9], 2, False),  # nobody waits for those ahead
    ],
)
def test_leaves_behind(number, others, window, answer):
    assert evicts_needed_block(number, others, window) is answer


class Lane:
    """What a data-shard worker keeps of a lane, as `DataWorker.block` does."""

    def __init__(self, window: int) -> None:
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._window, self.num_decoded = window, 0

    def block(self, number: int) -> None:
        if number not in self._kept:
            self.num_decoded += 1
            self._kept[number] = None
            if len(self._kept) > self._window:
                self._kept.popitem(last=False)


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 40), st.integers(0, 10_000))
def test_each_block_is_decoded_once_whoever_is_faster(num_readers, window, num_blocks, seed):
    generator = random.Random(seed)
    listed, lane = StreamRegistry(window), Lane(window)
    speeds = [generator.random() + 0.01 for _ in range(num_readers)]
    for reader in range(num_readers):
        listed.subscribe(str(reader), 0)
    position = [0] * num_readers
    questions = 0
    while min(position) < num_blocks:
        reader = generator.choices(range(num_readers), speeds)[0]
        if position[reader] == num_blocks:
            listed.unsubscribe(str(reader))
        elif listed.may_request(str(reader), position[reader]):
            lane.block(position[reader])
            position[reader] += 1
        questions += 1
        assert questions < 100_000, "all wait"
    assert lane.num_decoded == num_blocks


def test_without_pace_the_slower_reader_has_blocks_decoded_again():
    """That the test above tests something."""
    listed, lane = StreamRegistry(), Lane(2)
    for reader in "ab":
        listed.subscribe(reader, 0)
        for number in range(10):
            assert listed.may_request(reader, number)
            lane.block(number)
    assert lane.num_decoded == 20


def test_a_reader_that_is_lost_or_leaves_holds_nobody_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("sigray.workers.data.stream_registry.time.monotonic", lambda: now[0])
    listed = StreamRegistry(2)
    listed.subscribe("slow", 0)
    listed.subscribe("fast", 0)
    assert [listed.may_request("fast", number) for number in range(3)] == [True, True, False]
    now[0] = 100
    assert not listed.may_request("fast", 2)
    now[0] = 121
    assert listed.may_request("fast", 2)
    listed.subscribe("slow", 1)
    assert not listed.may_request("fast", 3)  # it has come back
    listed.unsubscribe("slow")
    assert listed.may_request("fast", 3)


def test_a_reader_that_waits_is_not_taken_for_lost(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("sigray.workers.data.stream_registry.time.monotonic", lambda: now[0])
    listed = StreamRegistry(1)
    for reader in ("first", "second", "third"):
        listed.subscribe(reader, 0)
    assert listed.may_request("first", 0)
    for second in range(0, 100, 10):
        now[0] = second
        assert not listed.may_request("first", 1)
    assert listed.may_request("second", 0)
    now[0] = 125  # third is lost; first is not, though it was last let through at 0
    assert listed.may_request("second", 1)
    assert not listed.may_request("second", 2)
    assert listed.may_request("first", 1)
