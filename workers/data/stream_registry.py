"""The registry of a stream: its data-shard workers, its subscribers' positions.

A module without heavy imports: the actor starts at once and takes 0.06 GB.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

# A subscriber that requests nothing for this long is dead or hangs, and the others continue without it. On a busy
# machine the training workers of a run may take this long to start.
_HEARTBEAT_TIMEOUT_S = 120.0


def evicts_needed_block(number: int, others: Iterable[int], window: int) -> bool:
    """Would serving this block evict one that a slower subscriber still needs?

    Args:
        number: of the block in its lane. The subscriber has requested the blocks before it, or begins with it.
        others: the newest block that each other subscriber has requested; -1 before its first.
        window: newest blocks of a lane that are kept. A subscriber further back has its blocks decoded again anyway.
    """
    return any(other + window < number <= other + window + 1 for other in others)


class StreamRegistry:
    """The data-shard workers that are up, and each subscriber's position: a Ray actor.

    It holds the workers as a reference to their list, itself in a list, which Ray does not resolve: their handles would
    import the worker's class with its decoder.

    Args:
        window: blocks of a lane within which subscribers stay together; None: each reads as fast as it can.
        num_readers: processes that call `leave` when they are done.
    """

    def __init__(self, window: int | None = None, num_readers: int = 1) -> None:
        self._window, self._num_readers = window, num_readers
        self._subscribers: dict[str, tuple[int, float]] = {}  # newest block requested, and the time of its heartbeat

    def publish(self, reference: list[Any]) -> None:
        self._reference = reference

    def actors(self) -> list[Any]:
        return self._reference

    def leave(self) -> bool:
        """Whether the reader that leaves is the last one."""
        self._num_readers -= 1
        return self._num_readers == 0

    def subscribe(self, subscriber: str, number: int) -> None:
        """Register a subscriber that begins with this block; the others wait for it."""
        self._subscribers[subscriber] = number - 1, time.monotonic()

    def unsubscribe(self, subscriber: str) -> None:
        """Let no other subscriber wait for this one until it requests a block again."""
        self._subscribers.pop(subscriber, None)

    def may_request(self, subscriber: str, number: int) -> bool:
        """Whether a subscriber may request a block now. If so, note its position."""
        now = time.monotonic()
        others = [
            newest
            for name, (newest, heartbeat) in self._subscribers.items()
            if name != subscriber and now - heartbeat < _HEARTBEAT_TIMEOUT_S
        ]
        if self._window is not None and evicts_needed_block(number, others, self._window):
            # This is a heartbeat too: the subscriber waits for others and does not hang itself.
            self._subscribers[subscriber] = number - 1, now
            return False
        self._subscribers[subscriber] = number, now
        return True
