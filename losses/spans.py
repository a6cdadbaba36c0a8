"""Names for the parts of a step in a profile; no cost without one.

Spans stand in a trace of torch.profiler, which `workers/training/profile.py` reads. They may be nested: time counts for
the innermost one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import record_function

PREFIX = "sigray/"
_NOTHING = contextlib.nullcontext(False)
_state: dict[str, Any] = {"on": False, "sync": None}


def span(name: str) -> contextlib.AbstractContextManager[bool]:
    """A context for a part of the step; its value: is there a profile?"""
    return _span(name) if _state["on"] else _NOTHING


@contextlib.contextmanager
def _span(name: str) -> Iterator[bool]:
    with record_function(PREFIX + name):
        yield True
        if _state["sync"] is not None:
            _state["sync"]()


@contextlib.contextmanager
def recording(sync: Callable[[], None] | None) -> Iterator[None]:
    """Record spans, in all threads of this process.

    Args:
        sync: waits for the device at the end of each span, so that the device's time counts for the span that caused
            it.
    """
    _state.update(on=True, sync=sync)
    try:
        yield
    finally:
        _state.update(on=False, sync=None)
