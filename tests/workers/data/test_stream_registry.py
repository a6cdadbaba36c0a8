"""Subscribers of a stream stay together: each block is decoded once for all, and all of them reach the end."""

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
        (9, [-1], 2, False),  # the other one has its blocks decoded again anyway
        (5, [9], 2, False),  # a slower subscriber waits for none
    ],
)
def test_evicts_needed_block(number, others, window, answer):
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


@settings(max_examples=200)
@given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 40), st.integers(0, 10_000))
def test_each_block_is_decoded_once_at_any_speeds(num_subscribers, window, num_blocks, seed):
    generator = random.Random(seed)
    registry, lane = StreamRegistry(window), Lane(window)
    speeds = [generator.random() + 0.01 for _ in range(num_subscribers)]
    for subscriber in range(num_subscribers):
        registry.subscribe(str(subscriber), 0)
    position = [0] * num_subscribers
    questions = 0
    while min(position) < num_blocks:
        subscriber = generator.choices(range(num_subscribers), speeds)[0]
        if position[subscriber] == num_blocks:
            registry.unsubscribe(str(subscriber))
        elif registry.may_request(str(subscriber), position[subscriber]):
            lane.block(position[subscriber])
            position[subscriber] += 1
        questions += 1
        assert questions < 100_000, "all wait"
    assert lane.num_decoded == num_blocks


def test_without_a_window_a_slower_subscriber_has_blocks_decoded_again():
    """That the test above tests something."""
    registry, lane = StreamRegistry(), Lane(2)
    for subscriber in "ab":
        registry.subscribe(subscriber, 0)
        for number in range(10):
            assert registry.may_request(subscriber, number)
            lane.block(number)
    assert lane.num_decoded == 20


def test_no_subscriber_waits_for_one_that_is_lost_or_unsubscribed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("sigray.workers.data.stream_registry.time.monotonic", lambda: now[0])
    registry = StreamRegistry(2)
    registry.subscribe("slow", 0)
    registry.subscribe("fast", 0)
    assert [registry.may_request("fast", number) for number in range(3)] == [True, True, False]
    now[0] = 100
    assert not registry.may_request("fast", 2)
    now[0] = 121
    assert registry.may_request("fast", 2)
    registry.subscribe("slow", 1)
    assert not registry.may_request("fast", 3)  # it has subscribed again
    registry.unsubscribe("slow")
    assert registry.may_request("fast", 3)


def test_a_waiting_subscriber_is_not_lost(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("sigray.workers.data.stream_registry.time.monotonic", lambda: now[0])
    registry = StreamRegistry(1)
    for subscriber in ("first", "second", "third"):
        registry.subscribe(subscriber, 0)
    assert registry.may_request("first", 0)
    for second in range(0, 100, 10):
        now[0] = second
        assert not registry.may_request("first", 1)
    assert registry.may_request("second", 0)
    now[0] = 125  # third is lost; first is not, though its last block was at 0
    assert registry.may_request("second", 1)
    assert not registry.may_request("second", 2)
    assert registry.may_request("first", 1)
