"""Stream objects from a store over failures.

obstore moves the bytes; the order, the retries and the version are kept here. How long the reader waits decides how
many ranges of an object are read at once:

    directly        One GET of 16 MiB and one of the rest, whose chunks the reader takes itself. Nothing costs less. A
                    stream begins so, and continues so while the reader waits less than 224 ms for 16 MiB (75 MB/s).
    over threads    Threads prefetch parts of 16 MiB: two at first, and one more each time that the reader waits 56 ms
                    for a part, up to `stores.num_connections`. Amazon's store gives each connection 30 ms and 60 MB/s:
                    it is soon read over all connections, and the next object of its bucket at once. A part that came
                    faster than 75 MB/s shows that one connection is enough: the stream reads directly again.

After a failure another GET begins at the first missing byte. Every GET carries If-Match with the ETag of the run's
manifest, and the answer's ETag is compared: an object that is replaced during a run is an error and never a mixture.
`after_failure`, a pure function, decides what to do after a failure.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

import numpy as np
import obstore
from obstore.exceptions import BaseError

from sigray.workers.config import StoresConfig
from sigray.workers.data.tar import DataError, cut_short
from sigray.workers.stores import (
    Failure,
    ObjectInfo,
    StoreError,
    endpoint_of,
    error_of,
    etag_of,
    kind_of,
    open_store,
    shown_url,
    split_url,
)

PART_BYTES = 16 << 20
"""Bytes of a ranged GET: 280 ms at 60 MB/s, so 30 ms of latency are a tenth of it."""
FIRST_PARTS = 2
_CHUNK_BYTES = 1 << 18  # fit a core's cache: 0.53 CPU s/GB, 0.68 with 1 MiB
# The rate of a fast connection to a waiting reader: twice what a core decodes (35 kB a sample), and more than one
# connection to Amazon's store delivers. Threads aim at four times this rate.
_FAST_BYTES_PER_S = 75e6
# glibc gives freed memory back to the kernel above twice the largest block that was ever freed; this one is never
# touched. Without it, parts cost 130,000 page faults a GB: 0.6 CPU s on a virtual machine.
np.empty(PART_BYTES, np.uint8)
_MAX_WAIT_S = 10.0
# Kind of a failure that is retried -> seconds of the first wait; the wait doubles with each further failure.
_FIRST_WAIT_S = {
    "cut": 0.1,
    "stalled": 0.1,
    "unreachable": 0.2,
    "server error": 0.2,
    "wrong answer": 0.2,
    "throttled": 0.5,
}

TRAFFIC: Counter[str] = Counter()
"""Of this process: "bytes" read from stores, and retries by kind of failure."""
_traffic_lock = threading.Lock()
_num_parts: dict[tuple[object, ...], int] = {}
"""Number of parts that the last object of a bucket needed."""


def after_failure(kind: str, failures: Counter[str], silent_s: float, deadline_s: float, jitter: float) -> float | None:
    """Return the seconds until a failed GET is retried; None: give up.

    None if no retry can help, or after the deadline. A retry after "denied" or "expired" needs new credentials.

    Args:
        kind: of the failure.
        failures: number by kind since the range's last byte, this failure included.
        silent_s: seconds since the range's last byte.
        deadline_s: give up after so many.
        jitter: uniform in 0 to 1, so that many clients of a busy store do not retry at the same time.
    """
    if kind in ("denied", "expired") and failures[kind] == 1:
        return 0.0
    if kind not in _FIRST_WAIT_S or silent_s >= deadline_s:
        return None
    wait_s = min(_MAX_WAIT_S, _FIRST_WAIT_S[kind] * 2 ** min(failures.total() - 1, 16))
    return min(jitter * wait_s, deadline_s - silent_s)


class _GivenUp(Exception):
    """A failure that was seen in an answer's head, not in obstore."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass
class _Source:
    """GETs of one object, with retries."""

    info: ObjectInfo
    stores: StoresConfig
    chunk_bytes: int
    draw: Callable[[], float]
    clock: Callable[[], float]
    sleep: Callable[[threading.Event, float], object]
    retries: Counter[str] = field(default_factory=Counter)

    def chunks(self, begin: int, end: int, dropped: threading.Event) -> Iterator[bytes]:
        """Yield the bytes of a range, in order, until it ends or is dropped.

        Raises:
            DataError: no retry can help, or no byte came for `stores.deadline_s`.
        """
        failures: Counter[str] = Counter()
        last_byte_at = self.clock()
        renews = False
        while begin < end:
            try:
                for chunk in self._get(begin, end, renews):
                    if _is_over(dropped):
                        return
                    begin += len(chunk)
                    failures.clear()
                    renews = False
                    with _traffic_lock:
                        TRAFFIC["bytes"] += len(chunk)
                    yield chunk
                    last_byte_at = self.clock()
                failure = Failure("cut", message="closed early")
            except _GivenUp as error:
                failure = error.failure
            except (BaseError, FileNotFoundError) as error:
                failure = kind_of(error)
            if begin >= end or _is_over(dropped):
                return
            failures[failure.kind] += 1
            silent_s = self.clock() - last_byte_at
            wait_s = after_failure(failure.kind, failures, silent_s, self.stores.deadline_s, self.draw())
            if wait_s is None:
                raise self._error(begin, failure, failures, silent_s)
            with _traffic_lock:
                self.retries[failure.kind] += 1
                TRAFFIC[failure.kind] += 1
            renews = failure.kind in ("denied", "expired")
            self.sleep(dropped, wait_s)

    def _get(self, begin: int, end: int, renews: bool) -> Iterator[bytes]:
        """Send one GET and yield its chunks."""
        info = self.info
        try:
            store, key = open_store(info.url, self.stores, max_retries=0, fresh=renews)
        except StoreError as error:
            raise DataError(str(error)) from error
        options: obstore.GetOptions = {"range": (begin, end)}
        if info.etag and not info.etag.startswith("W/"):  # a weak ETag never matches
            options["if_match"] = f'"{info.etag}"'
        answer = obstore.get(store, key, options=options)
        if etag_of(answer.meta) != info.etag or answer.meta["size"] != info.num_bytes:  # some stores ignore If-Match
            raise _GivenUp(Failure("changed", message=f"ETag {etag_of(answer.meta)}, {answer.meta['size']} bytes"))
        yield from answer.stream(self.chunk_bytes)

    def _error(self, position: int, failure: Failure, failures: Counter[str], silent_s: float) -> DataError:
        url = shown_url(self.info.url)
        at = endpoint_of(self.info.url, self.stores)
        remedy = "put the object of the manifest back, or start a new run on the new data"
        if failure.kind == "changed":
            return DataError(f"{url} was replaced since the run's manifest was made: {remedy}")
        if failure.kind == "missing":
            return DataError(f"{url} is gone, though it was there when the run's manifest was made: {remedy}")
        tried = ", ".join(f"{count} x {kind}" for kind, count in failures.most_common())
        if failure.kind not in _FIRST_WAIT_S or set(failures) == {"unreachable"}:
            error = error_of(self.info.url, failure, self.stores)
            return DataError(f"{error} (tried {failures.total()} times in {silent_s:.0f} s)")
        return DataError(
            f"{url}: no byte from {at} for {silent_s:.0f} s (data.stores.deadline_s={self.stores.deadline_s:g}) "
            f"at byte {position} of {self.info.num_bytes}, tried {failures.total()} times: "
            f"{tried}; last: {failure.message}"
        )


@dataclass(eq=False)
class _Part:
    """A byte range that a thread receives."""

    begin: int
    end: int
    dropped: threading.Event = field(default_factory=threading.Event)
    chunks: Future[list[bytes]] = field(default_factory=Future)
    is_fast = False  # one connection is enough, says the time that it took

    def receive(self, source: _Source) -> None:
        begin = source.clock()
        try:
            chunks = list(source.chunks(self.begin, self.end, self.dropped))
            self.is_fast = source.clock() - begin < (self.end - self.begin) / _FAST_BYTES_PER_S
            self.chunks.set_result(chunks)
        except BaseException as error:  # the reader raises it
            self.chunks.set_exception(error)


class StoreStream:
    """One object as a `ByteSource`, for one reading thread.

    `read` returns views if the bytes lie in one chunk; the views stay valid. Memory: the chunk or
    part that is being read, and at most `stores.num_connections` parts.

    Args:
        info: the object, as listed: an object of another ETag is an error.
        start: first byte.
        part_bytes: of one ranged GET.
        draw: random numbers from 0 to 1, for the waits between tries.
        clock: seconds.
        sleep: wait for so many seconds, or until the event is set.

    Attributes:
        position: of the next byte.
        retries: number of repeated requests, by kind of failure.
        num_parts: parts to prefetch in threads now; 0: the reader reads directly.
    """

    def __init__(
        self,
        info: ObjectInfo,
        stores: StoresConfig,
        start: int = 0,
        *,
        part_bytes: int = PART_BYTES,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[threading.Event, float], object] = threading.Event.wait,
    ) -> None:
        self.url = info.url
        self.position = start
        self.num_bytes = info.num_bytes
        self._source = _Source(info, stores, min(_CHUNK_BYTES, part_bytes), draw, clock, sleep)
        self.retries = self._source.retries
        self._bucket = (*split_url(info.url)[:2], stores)
        self.num_parts = min(stores.num_connections, _num_parts.get(self._bucket, 0))
        self._max_parts = stores.num_connections
        self._part_bytes = part_bytes
        self._clock = clock
        self._direct: Iterator[bytes] | None = None  # chunks up to `_range_end`
        self._range_end = start
        self._waited_s = 0.0  # for the bytes up to `_decide_at`
        self._decide_at = start + part_bytes  # byte at which to decide about threads
        self._view = memoryview(b"")
        self._view_begin = self._view_end = start
        self._next = start  # first byte after the newest chunk
        self._received: deque[bytes] = deque()  # chunks after `_next`
        self._asked = start  # first byte of the next part to request
        self._parts: deque[_Part] = deque()
        # The parts that are requested with the first one say nothing: the reader always waits for it.
        self._judged_from = self.num_bytes
        self._is_judged = self._has_waited = False
        # A stream that is dropped without `close` stops its downloads.
        self._end = weakref.finalize(self, _drop, self._parts)
        self._start_parts()

    def read(self, count: int) -> bytes | memoryview:
        """Return the next `count` bytes.

        Raises:
            DataError: "cut short: ..." if the object ends earlier; the object was replaced, is gone, cannot be reached
                or is refused; no byte comes for `stores.deadline_s`.
        """
        begin = self.position
        end = begin + count
        if end > self._view_end or begin < self._view_begin:
            return self._read_across(count)
        self.position = end
        return self._view[begin - self._view_begin : end - self._view_begin]

    def content_at(self, position: int, count: int) -> bytes | memoryview:
        """Return bytes from anywhere, if need be by a GET of their own."""
        if position == self.position:
            return self.read(count)
        if self._view_begin <= position and position + count <= self._view_end:
            return self._view[position - self._view_begin :][:count]
        return b"".join(self._source.chunks(position, position + count, threading.Event()))

    def skip(self, count: int) -> None:
        """Pass over bytes; parts before the new position are dropped or not requested."""
        self.position += count

    def close(self) -> None:
        """Stop the downloads; views that were read stay valid."""
        # If the reader never waited for a thread, the store is fast or the reader slow: the next one reads directly.
        _num_parts[self._bucket] = self.num_parts if self._has_waited or not self._is_judged else 0
        self._end()
        self._direct = None
        self._received.clear()
        self._view = memoryview(b"")
        self._view_begin = self._view_end = self.position

    def _read_across(self, count: int) -> bytes | memoryview:
        """Return bytes that do not all lie in the current chunk."""
        if self.position + count > self.num_bytes:
            raise cut_short(self.num_bytes)
        pieces: list[memoryview] = []
        while count:
            if not self._view_begin <= self.position < self._view_end:
                self._advance()
            piece = self._view[self.position - self._view_begin :][:count]
            pieces.append(piece)
            self.position += len(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _advance(self) -> None:
        """Make the chunk at the position the current one."""
        assert self._end.alive, "read after close"
        self._view = memoryview(b"")
        self._view_begin = self._view_end = self.position
        while self._next <= self.position:
            if not self._received:
                while self._parts and self._parts[0].end <= self.position:
                    self._parts.popleft().dropped.set()
                self._received.extend(self._from_part() if self.num_parts or self._parts else self._directly())
            chunk = self._received.popleft()
            self._next += len(chunk)
        self._view = memoryview(chunk)
        self._view_begin = self._next - len(chunk)
        self._view_end = self._next

    def _directly(self) -> list[bytes]:
        """Return the chunk at `_next`, without threads; passes over a long skip."""
        if self._next >= self._decide_at:
            if self._waited_s > self._part_bytes / _FAST_BYTES_PER_S:
                self._direct = None
                self._range_end = self._next
                self.num_parts = min(FIRST_PARTS, self._max_parts)
                return self._from_part()
            self._waited_s = 0.0
            self._decide_at = self._next + self._part_bytes
        if self._next >= self._range_end or self.position - self._next > self._part_bytes:
            self._next = self.position
            # The first range shows whether the store is fast; the next one may then be long.
            first_end = min(self._next + self._part_bytes, self.num_bytes)
            self._range_end = self.num_bytes if self._direct else first_end
            self._direct = self._source.chunks(self._next, self._range_end, threading.Event())
        assert self._direct is not None  # `_next >= _range_end` at first
        begin = self._clock()
        chunk = next(self._direct)
        self._waited_s += self._clock() - begin
        return [chunk]

    def _from_part(self) -> list[bytes]:
        """Return the chunks of the part at the position."""
        if not self._parts:
            self._asked = self.position
            self._judged_from = self.num_bytes
        self._start_parts()
        part = self._parts[0]
        is_judged = part.begin >= self._judged_from
        if is_judged and not wait([part.chunks], self._part_bytes / _FAST_BYTES_PER_S / 4).done:
            self._has_waited = True
            self.num_parts = min(self.num_parts + 1, self._max_parts)
            self._start_parts()
        chunks = part.chunks.result()
        self._next = part.begin
        self._parts.popleft()
        self._is_judged |= is_judged
        self._judged_from = min(self._judged_from, self._asked)
        if part.is_fast:
            self.num_parts = 0  # what is requested comes from the threads; then the reader reads directly
            self._waited_s = 0.0
            self._decide_at = self._asked + self._part_bytes
        self._start_parts()
        return chunks

    def _start_parts(self) -> None:
        """Request parts until `num_parts` are prefetched."""
        while len(self._parts) < self.num_parts and self._asked < self.num_bytes:
            part = _Part(self._asked, min(self._asked + self._part_bytes, self.num_bytes))
            self._asked = part.end
            self._parts.append(part)
            # Not an executor's thread: the end of the process would wait for a store that stalls.
            threading.Thread(target=part.receive, args=(self._source,), name="store-part", daemon=True).start()


def _is_over(dropped: threading.Event) -> bool:
    # The interpreter waits at its end for the threads of executors, which may read a stream.
    return dropped.is_set() or not threading.main_thread().is_alive()


def _drop(parts: deque[_Part]) -> None:
    """Stop the threads after their next chunk."""
    while parts:
        parts.popleft().dropped.set()
