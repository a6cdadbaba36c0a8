"""Signals that stop a command: Ctrl-C, SIGTERM, and the SIGHUP of a lost terminal."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt() -> None:
    """End the command as Ctrl-C does.

    Raises:
        KeyboardInterrupt
    """
    raise KeyboardInterrupt


@contextlib.contextmanager
def on_stop_signal(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` at the first signal that stops a command; the next one interrupts.

    An ignored SIGHUP stays ignored, as under `nohup`. A shell has its background processes ignore SIGINT, too, but
    then SIGINT comes from a person who wants the command to stop.
    """
    with _handlers_kept() as before:

        def handle(number: int, frame: Any) -> None:
            for other in before:
                signal.signal(other, signal.default_int_handler)
            act()

        for number in before:
            signal.signal(number, handle)
        yield


@contextlib.contextmanager
def blocked_for_children() -> Iterator[None]:
    """Have processes that start now block the signals, also those that they start.

    systemd, Slurm and `timeout` send a signal to all processes at once, but only the driver knows how to end a run.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        with _handlers_kept():
            yield
    except SystemExit as error:  # of a handler that `ray.init` sets
        raise KeyboardInterrupt from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _handlers_kept() -> Iterator[dict[signal.Signals, Any]]:
    """Set the handlers back at the end; only the main thread may set them."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
        if handlers[signal.SIGHUP] == signal.SIG_IGN:
            del handlers[signal.SIGHUP]
        before = {number: one for number, one in handlers.items() if one is not None}
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
