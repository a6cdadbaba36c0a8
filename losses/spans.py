"""Names for the parts of a step in a trace of torch.profiler; nothing at all while nobody profiles.

Spans may lie in each other: time counts for the innermost. What reads them is `workers/training/profile.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import record_function

PREFIX = "sigray/"
_NOTHING = contextlib.nullcontext(False)
_state: dict[str, Any] = {"on": False, "settle": None}


def span(name: str) -> contextlib.AbstractContextManager[bool]:
    """Everything inside belongs to a part of the step; tells whether anybody profiles."""
    return _span(name) if _state["on"] else _NOTHING


@contextlib.contextmanager
def _span(name: str) -> Iterator[bool]:
    with record_function(PREFIX + name):
        yield True
        if _state["settle"] is not None:
            _state["settle"]()


@contextlib.contextmanager
def recording(settle: Callable[[], None] | None) -> Iterator[None]:
    """Have `span` name its part, in all threads of this process.

    Args:
        settle: waits for the device at the end of each span, so that what it computes counts where it was asked for.
    """
    _state.update(on=True, settle=settle)
    try:
        yield
    finally:
        _state.update(on=False, settle=None)
