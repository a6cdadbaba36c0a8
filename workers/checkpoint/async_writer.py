"""A thread that writes to a run's storage in order, and retries refused writes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from sigray.workers.checkpoint.lease import Fence

_PAUSES_S = 1.0, 30.0  # after the first refusal, doubled up to the second value
_WARN_AGAIN_S = 300.0


class BackgroundWriter:
    """A thread that carries out writes one after the other.

    The thread has normal priority. With the lowest priority it takes ten times as long on a CPU that trains. And if it
    is preempted while it holds Python's lock, training waits for it. That costs more than its work.

    If the storage refuses a write (OSError: full, read-only, unreachable), the thread retries it until it succeeds; no
    later write overtakes it. What `submit` was given must not change until it is written.

    Args:
        warn: called from the thread when a write is refused, and when it succeeds after that.
        fence: checked before each write.
    """

    def __init__(self, name: str, warn: Callable[[str], None], fence: Fence) -> None:
        self._warn, self._fence = warn, fence
        self._todo: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue()
        self._num_open = 0
        self._changed = threading.Condition()
        self._refusal = ""  # of the current write
        self._bug: BaseException | None = None
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether something given to `submit` is not written yet."""
        return self._num_open > 0

    def submit(self, what: str, write: Callable[[], None]) -> None:
        """Have the thread call `write`.

        Args:
            what: names the write in warnings, as "the checkpoint of step 400".

        Raises:
            Exception: of an earlier write, unless that was an OSError.
        """
        self._raise_bug()
        with self._changed:
            self._num_open += 1
        self._todo.put((what, write))

    def wait(self, timeout_s: float) -> None:
        """Wait until everything is written.

        Raises:
            OSError: if the storage has refused a write until the timeout.
            Exception: any other exception of a write.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: not self._num_open or self._bug, timeout_s)
        self._raise_bug()
        if not done:
            raise OSError(f"{self._refusal or 'a write was still running'}; gave up after {timeout_s:.0f} s")

    def close(self, timeout_s: float) -> None:
        """`wait`, and end the thread."""
        try:
            self.wait(timeout_s)
        finally:
            self.abandon()
        self._thread.join()  # a thread inside native code when the interpreter ends crashes the process

    def abandon(self) -> None:
        """End the thread after the current write; drop the rest."""
        self._abandoned.set()
        self._todo.put(None)

    def _run(self) -> None:
        while (entry := self._todo.get()) is not None:
            try:
                self._persist(*entry)
            except BaseException as error:  # `_raise_bug` raises it in the training thread
                self._bug = error
            with self._changed:
                self._num_open -= 1
                self._changed.notify_all()
            if self._bug or self._abandoned.is_set():
                return

    def _persist(self, what: str, write: Callable[[], None]) -> None:
        pause_s, longest_s = _PAUSES_S
        refused_at = warned_at = 0.0
        while True:
            try:
                self._fence.check()
                write()
            except OSError as error:
                now = time.monotonic()
                refused_at = refused_at or now
                self._refusal = f"{what} could not be written: {error}"
                if not warned_at or now - warned_at > _WARN_AGAIN_S:
                    warned_at = now
                    self._warn(f"{self._refusal}. Training continues, and the write is retried")
            else:
                if refused_at:
                    self._warn(f"{what} is written, after {time.monotonic() - refused_at:.0f} s of refusals")
                    self._refusal = ""
                return
            if self._abandoned.wait(pause_s):
                return
            pause_s = min(2 * pause_s, longest_s)

    def _raise_bug(self) -> None:
        if self._bug is not None:
            raise self._bug
