"""Which data-shard workers are up, and how far each reader of their stream has come, so that readers keep pace.

A file of its own, without torch: the small actor that runs it is up at once and takes 0.06 GB, with torch 0.35.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

# A reader that asks for nothing for so long has died or hangs, and the others go on without it. As long as the training
# workers of a run may take to start on a busy machine.
_LOST_S = 120.0


def leaves_behind(number: int, others: Iterable[int], window: int) -> bool:
    """Whether a reader that asks for a block has it decoded at the cost of one that another reader still needs.

    Args:
        number: of the block in its lane; the reader has asked for those before it, or begins with it.
        others: the newest block that each other reader has asked for; -1 before its first.
        window: newest blocks of a lane that are kept. A reader that is further behind is on its own already.
    """
    return any(other + window < number <= other + window + 1 for other in others)


class WorkerList:
    """The actors that are up, and how far each reader has come. Runs as a Ray actor with no CPU of its own.

    It has the actors as a reference to their list (itself in a list, which Ray leaves alone): with their handles would
    come their class, and torch with it.

    Args:
        window: blocks of a lane within which readers keep pace; None: each goes as fast as it can.
    """

    def __init__(self, window: int | None = None) -> None:
        self._window = window
        self._readers: dict[str, tuple[int, float]] = {}  # newest block that was asked for, and when

    def put(self, reference: list[Any]) -> None:
        self._reference = reference

    def get(self) -> list[Any]:
        return self._reference

    def expect(self, reader: str, number: int) -> None:
        """A reader will begin with this block; the others wait for it."""
        self._readers[reader] = number - 1, time.monotonic()

    def leave(self, reader: str) -> None:
        """Nobody waits for this reader any more, until it asks again."""
        self._readers.pop(reader, None)

    def may_ask(self, reader: str, number: int) -> bool:
        """Whether a reader may ask for a block now; noted if so."""
        now = time.monotonic()
        others = [at for name, (at, since) in self._readers.items() if name != reader and now - since < _LOST_S]
        if self._window is not None and leaves_behind(number, others, self._window):
            # It waits for others and does not hang itself.
            self._readers[reader] = number - 1, now
            return False
        self._readers[reader] = number, now
        return True
