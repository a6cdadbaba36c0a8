"""Stream objects from S3 over failures, and cache them on a local disk.

The module is long because it holds a client of its own for GETs, beside the streams and the cache.

`S3Stream` reads an object by ranged GETs, in one of two ways. How long the reader waits decides which:

    directly        The reader receives blocks of 2 MiB from the connection itself, in ranges of 64 MiB. Nothing costs
                    less: no thread, few requests, and the bytes are still in the core's cache when they are parsed.
                    A stream begins so, and continues so while the reader waits less than 84 ms for 8 MiB (100 MB/s).
    over threads    Threads prefetch parts of 8 MiB: two at first, and one more each time that the reader waits 21 ms
                    for a part, up to `s3.num_connections`. A store that gives each connection 30 ms and 60 MB/s, as
                    Amazon's does, is soon read over all connections.

A failure inside a part is retried inside the part: another GET begins at the first missing byte. boto3 retries a 503,
but never a body that breaks off, and waits 60 s for one that stalls. Every GET carries If-Match with the ETag of the
run's manifest: an object that is replaced during a run is an error and never a mixture. `after_failure`, a pure
function, decides what to do after a failure; the thread acts.

boto3 lists the objects and signs each once (a presigned URL, which covers neither Range nor If-Match, for ten minutes).
The GETs are written here, and bodies go from the socket into buffers that are used again. Client CPU per GB over
loopback, medians of benchmarks/s3.py on two busy cores: boto3 `Body.read(1 MiB)` 0.32 s, directly 0.33 s, over threads
0.40 s; over threads through botocore's session and urllib3 it was 0.7 s. The difference comes from buffers of 8 MiB,
which do not fit into a core's cache (0.05 s), and from requests.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import http.client
import mmap
import os
import queue
import random
import re
import select
import socket
import ssl
import threading
import time
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import SplitResult, unquote, urlsplit

from sigray.workers.config import StoresConfig
from sigray.workers.data.tar import DataError, cut_short

PART_BYTES = 8 << 20
"""Bytes of a ranged GET: 140 ms at 60 MB/s, so 30 ms of latency are a sixth of it."""
FIRST_PARTS = 2
_BLOCK_BYTES = 2 << 20  # one large page
_DIRECT_PARTS = 8  # in a range that is read directly, after the first range was fast
_MAX_IDLE = 64
# The rate of a fast connection to a waiting reader: three times what a core decodes (35 kB a sample), and more than one
# connection to Amazon's store delivers. Threads aim at four times this rate.
_FAST_BYTES_PER_S = 100e6
_SIGNED_FOR_S = 3600
_SIGN_AGAIN_S = 600
_MAX_WAIT_S = 10.0
# Kind of a failure that is retried -> seconds of the first wait; the wait doubles with each further failure.
_FIRST_WAIT_S = {
    "reset": 0.1,
    "stall": 0.1,
    "no connection": 0.2,
    "server error": 0.2,
    "wrong answer": 0.2,
    "slow down": 0.5,
}
_DENIED = (301, 307, 400, 401, 403)  # 400 is S3's answer to expired credentials, and to the wrong region
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")


@dataclass(frozen=True)
class ObjectInfo:
    """One object as listed. `etag` is without its quotation marks."""

    url: str
    num_bytes: int
    etag: str


@dataclass(frozen=True)
class Failure:
    """Why a GET failed."""

    kind: str  # a key of `_FIRST_WAIT_S`, denied, gone, replaced or no ranges
    message: str
    status: int = 0
    code: str = ""


def after_failure(kind: str, failures: Counter[str], silent_s: float, deadline_s: float, jitter: float) -> float | None:
    """Return the seconds until a failed GET is retried; None: give up.

    None if no retry can help, or after the deadline. A retry after "denied" needs a new signature.

    Args:
        kind: of the failure.
        failures: number by kind since the part's last byte, this failure included.
        silent_s: seconds since the part's last byte.
        deadline_s: give up after so many.
        jitter: uniform in 0 to 1, so that many clients of a busy store do not retry at the same time.
    """
    if kind == "denied" and failures[kind] == 1:
        return 0.0  # credentials may be new, or the bucket's region now known
    if kind not in _FIRST_WAIT_S or silent_s >= deadline_s:
        return None
    wait_s = min(_MAX_WAIT_S, _FIRST_WAIT_S[kind] * 2 ** min(failures.total() - 1, 16))
    return min(jitter * wait_s, deadline_s - silent_s)


def split_s3_url(url: str) -> tuple[str, str]:
    """Return the bucket and the key (or prefix) of an s3:// URL.

    Raises:
        DataError: the URL names no bucket.
    """
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise DataError(f"{url!r} names no bucket: s3://BUCKET/PREFIX expected")
    return bucket, key


@dataclass
class _Answer:
    """The head of an answer, and the body's bytes that were received with it."""

    origin: str  # scheme and host
    connection: socket.socket
    status: int
    headers: dict[str, str]  # names in lower case
    begun: bytes  # of the body


class _Connections:
    """A pool of connections to one store.

    http.client connects, through the proxy and with the certificates that boto3 would use. Requests are written and
    heads of answers are read here: a GET costs 0.2 ms of CPU, against 0.5 in http.client and 1.0 in botocore's session.
    Body bytes go from the socket to their place without a buffer in between.
    """

    def __init__(self, endpoint: str, ca_bundle: str | None, timeout_s: float) -> None:
        from botocore.httpsession import get_cert_path
        from botocore.utils import get_environ_proxies

        self._timeout_s = timeout_s
        self._tls = ssl.create_default_context(cafile=ca_bundle or get_cert_path(True))
        self._proxies = {scheme: urlsplit(proxy) for scheme, proxy in get_environ_proxies(endpoint).items()}
        self._idle: dict[str, list[socket.socket]] = defaultdict(list)  # by scheme and host

    def get(self, url: str, headers: dict[str, str]) -> _Answer:
        """Send a GET and read the head of its answer.

        Raises:
            _NotConnected: the store cannot be reached.
            OSError: the store was reached and sent no answer.
        """
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        proxy = self._proxies.get(parts.scheme)
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        headers = {"Host": parts.netloc, "Accept-Encoding": "identity"} | headers
        if proxy and parts.scheme == "http":
            target = url
            headers |= _authorization(proxy)
        lines = [f"GET {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        request = "\r\n".join(lines).encode("latin-1")
        while True:
            connection = self._take(origin)
            is_fresh = connection is None
            connection = connection or self._connect(parts, proxy)
            try:
                connection.sendall(request)
                return _read_head(origin, connection)
            except OSError as error:
                connection.close()
                if is_fresh or isinstance(error, TimeoutError):
                    raise
                # The store closed the connection while it was idle: not a failure.

    def keep(self, answer: _Answer) -> None:
        """Return the connection of a fully read answer to the pool."""
        idle = self._idle[answer.origin]
        is_over = bool(answer.begun) or answer.headers.get("connection", "").lower() == "close"
        if is_over or len(idle) >= _MAX_IDLE:
            answer.connection.close()
        else:
            idle.append(answer.connection)

    def _take(self, origin: str) -> socket.socket | None:
        with contextlib.suppress(IndexError):
            while True:
                connection = self._idle[origin].pop()
                poll = select.poll()
                poll.register(connection, select.POLLIN)
                if not poll.poll(0):
                    return connection
                connection.close()  # readable without a request: its end
        return None

    def _connect(self, parts: SplitResult, proxy: SplitResult | None) -> socket.socket:
        to = proxy or parts
        host = to.hostname or ""
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(host, to.port, timeout=self._timeout_s, context=self._tls)
            if proxy:
                connection.set_tunnel(parts.hostname or "", parts.port, _authorization(proxy))
        else:
            connection = http.client.HTTPConnection(host, to.port, timeout=self._timeout_s)  # type: ignore[assignment]
        try:
            connection.connect()
        except OSError as error:
            connection.close()
            raise _NotConnected(str(error)) from error
        return connection.sock


def _authorization(proxy: SplitResult) -> dict[str, str]:
    if not proxy.username:
        return {}
    user = base64.b64encode(f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()).decode()
    return {"Proxy-Authorization": f"Basic {user}"}


def _read_head(origin: str, connection: socket.socket) -> _Answer:
    received = b""
    while b"\r\n\r\n" not in received:
        piece = connection.recv(1 << 14)
        if not piece or len(received) > 1 << 16:
            raise ConnectionError(f"the answer ends after {len(received)} bytes of its head")
        received += piece
    head, _, begun = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    status = re.match(r"HTTP/1\.\d (\d{3})", first)
    if not status:
        raise ConnectionError(f"no HTTP answer but {first[:40]!r}")
    fields = (line.partition(":") for line in lines)
    headers = {name.lower(): value.strip() for name, _, value in fields}
    return _Answer(origin, connection, int(status[1]), headers, begun)


def _read_error(answer: _Answer) -> bytes:
    """Read at most 16 KiB of an error's body."""
    body = answer.begun
    length = min(int(answer.headers.get("content-length", 1 << 14)), 1 << 14)
    with contextlib.suppress(OSError):
        while len(body) < length and b"</Error>" not in body and (piece := answer.connection.recv(1 << 14)):
            body += piece
    return body


class _NotConnected(OSError):
    """No connection could be made; the message is the system's."""


def _failure(error: OSError, missing: str) -> Failure:
    if isinstance(error, TimeoutError):
        return Failure("stall", f"no {missing} in time")
    return Failure("no connection" if isinstance(error, _NotConnected) else "reset", str(error) or type(error).__name__)


class _Store:
    """What streams of one process share for one config: boto3's client, connections."""

    def __init__(self, s3: StoresConfig) -> None:
        import boto3
        import botocore.session
        from botocore import UNSIGNED
        from botocore.config import Config

        core = botocore.session.Session(profile=s3.profile)
        # Stand-alone stores support path-style addresses only.
        style = "path" if s3.s3_endpoint or os.environ.get("AWS_ENDPOINT_URL") else "auto"
        self.client = boto3.session.Session(botocore_session=core).client(
            "s3",
            endpoint_url=s3.s3_endpoint,
            region_name=s3.region,
            config=Config(
                s3={"addressing_style": style},
                signature_version=UNSIGNED if s3.anonymous else "s3v4",
                retries={"mode": "standard", "max_attempts": 5},
                connect_timeout=s3.read_timeout_s,
                read_timeout=s3.read_timeout_s,
                max_pool_connections=32,
                # Else a presigned URL carries a signed header that requests checksums of whole objects.
                response_checksum_validation="when_required",
                request_checksum_calculation="when_required",
            ),
        )
        self.endpoint: str = self.client.meta.endpoint_url
        self.connections = _Connections(self.endpoint, core.get_config_variable("ca_bundle"), s3.read_timeout_s)
        self.num_parts = 0  # the next stream starts with so many threads


_stores: dict[tuple[object, ...], _Store] = {}
_stores_lock = threading.Lock()


def _store(url: str, s3: StoresConfig) -> _Store:
    from botocore.exceptions import BotoCoreError

    # Connections do not survive a fork, and boto3 reads the variables only once.
    variables = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
    key = (os.getpid(), s3, *variables)
    with _stores_lock:
        try:
            if key not in _stores:
                _stores[key] = _Store(s3)
            return _stores[key]
        except (BotoCoreError, ValueError) as error:  # boto3 raises ValueError for an endpoint that is no URL
            raise DataError(
                f"{url}: no S3 client can be made: {error}; check data.stores.s3_endpoint, data.stores.region, "
                "data.stores.profile and the AWS_ variables"
            ) from error


@contextlib.contextmanager
def _client(url: str, s3: StoresConfig) -> Iterator[Any]:
    """Yield boto3's client; raise its errors as DataErrors with reason and remedy."""
    from botocore.exceptions import BotoCoreError, ClientError

    client = _store(url, s3).client
    try:
        yield client
    except (BotoCoreError, ClientError) as error:
        raise _explained(error, url, s3) from error


def list_objects(url_prefix: str, s3: StoresConfig, *, is_flat: bool = False) -> Iterator[ObjectInfo]:
    """Yield all objects whose URL begins with a prefix, page by page.

    Args:
        is_flat: leave out the keys with a slash after the prefix.

    Raises:
        DataError: the store cannot be reached or refuses.
    """
    bucket, prefix = split_s3_url(url_prefix)
    with _client(url_prefix, s3) as client:
        paginate = client.get_paginator("list_objects_v2").paginate
        for page in paginate(Bucket=bucket, Prefix=prefix, **({"Delimiter": "/"} if is_flat else {})):
            for item in page.get("Contents", []):
                yield ObjectInfo(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"'))


def stat(url: str, s3: StoresConfig) -> ObjectInfo:
    """Return size and ETag of one object.

    Raises:
        DataError: the object is missing, or the store cannot be reached or refuses.
    """
    from botocore.exceptions import ClientError

    bucket, key = split_s3_url(url)
    with _client(url, s3) as client:
        try:
            answer = client.head_object(Bucket=bucket, Key=key)
        except ClientError:
            # The answer to a HEAD has no body, which would tell a missing bucket from a missing object.
            client.get_object(Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].close()
            raise
    return ObjectInfo(url, answer["ContentLength"], answer["ETag"].strip('"'))


def read_object(url: str, s3: StoresConfig, max_bytes: int | None = None) -> bytes:
    """Return the content of a small object, or its first bytes.

    Raises:
        DataError: as `stat`.
    """
    bucket, key = split_s3_url(url)
    with _client(url, s3) as client:
        return client.get_object(Bucket=bucket, Key=key)["Body"].read(max_bytes)


def _explained(error: Exception, url: str, s3: StoresConfig) -> DataError:
    """Return the user's error for a failure of boto3."""
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return _refused(url, s3, status, str(error.response.get("Error", {}).get("Code", "")))
    if isinstance(error, (exceptions.ConnectionError, exceptions.HTTPClientError)):
        return _unreachable(url, s3, str(error))
    credentials = exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.CredentialRetrievalError
    if isinstance(error, (*credentials, exceptions.TokenRetrievalError, exceptions.SSOError)):
        return DataError(f"{url}: no S3 credentials: {error}; {_credentials(s3)}")
    return DataError(f"{url}: {error}")


def _refused(url: str, s3: StoresConfig, status: int, code: str) -> DataError:
    """Return the user's error for an answer of the store other than success."""
    endpoint = _shown_endpoint(url, s3)
    if code == "NoSuchBucket":
        bucket, _ = split_s3_url(url)
        return DataError(
            f"{url}: there is no bucket {bucket!r} at {endpoint}; check the URL and data.stores.s3_endpoint"
        )
    if code in _EXPIRED:
        return DataError(f"{url}: the S3 credentials have expired ({code}): renew them; {_credentials(s3)}")
    if status == 404:
        return DataError(f"{url}: there is no such object at {endpoint}")
    if status in _DENIED:
        return DataError(f"{url}: access denied by {endpoint} ({status} {code}); {_credentials(s3)}")
    return DataError(f"{url}: {endpoint} answers {status} {code}")


def _shown_endpoint(url: str, s3: StoresConfig) -> str:
    """Return the endpoint without name and password, which AWS_ENDPOINT_URL may hold."""
    return re.sub(r"//[^/]*@", "//", _store(url, s3).endpoint)


def _unreachable(url: str, s3: StoresConfig, reason: str) -> DataError:
    endpoint = _shown_endpoint(url, s3)
    return DataError(
        f"{url}: cannot reach the store {endpoint}: {reason.split('?')[0]}; check the network, "
        "data.stores.s3_endpoint and AWS_ENDPOINT_URL"
    )


def _credentials(s3: StoresConfig) -> str:
    if s3.anonymous:
        return "requests are not signed (data.stores.anonymous=true): is the bucket public?"
    used = f"profile {s3.profile!r} was used" if s3.profile else "data.stores.profile is not set"
    return (
        f"{used}: set data.stores.profile or the AWS_ variables (AWS_PROFILE, or AWS_ACCESS_KEY_ID with "
        "AWS_SECRET_ACCESS_KEY and, for temporary ones, AWS_SESSION_TOKEN), or data.stores.anonymous=true for a public "
        "bucket"
    )


@dataclass(eq=False)
class _Part:
    """A byte range of the object and the buffer to fill with it."""

    begin: int
    end: int
    end_asked: int  # of the range to request; the unread rest is in `answer` afterwards
    buffer: mmap.mmap  # at least as long
    answer: _Answer | None = None
    num_filled: int = 0
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)  # complete, failed or dropped
    dropped: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _socket: socket.socket | None = None

    def watch(self, connection: socket.socket | None) -> None:
        """Set the connection that `drop` shuts down; None if it may carry another part."""
        with self._lock:
            self._socket = connection

    def drop(self) -> None:
        """Cancel the download: a thread that waits for its bytes closes the connection."""
        self.dropped.set()
        with self._lock:
            if self._socket is not None:
                with contextlib.suppress(OSError):  # it is already closed
                    self._socket.shutdown(socket.SHUT_RDWR)


def _end(parts: deque[_Part], work: queue.SimpleQueue[_Part | None]) -> None:
    """Drop the parts and end the threads."""
    while parts:
        parts.popleft().drop()
    work.put(None)


def _new_buffer(num_bytes: int) -> mmap.mmap:
    """Return memory for a part.

    In large pages the kernel's copy costs less: 0.27 s of CPU per GB instead of 0.32.
    """
    buffer = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


TRAFFIC: Counter[str] = Counter()
"""Of this process: "bytes" read from S3, and retries by kind of failure."""


@dataclass
class _Fetcher:
    """Downloads parts of one object, in the threads of a stream."""

    info: ObjectInfo
    s3: StoresConfig
    _draw: Callable[[], float]
    _clock: Callable[[], float]
    _sleep: Callable[[threading.Event, float], object]

    def __post_init__(self) -> None:
        self.store = _store(self.info.url, self.s3)
        self.retries: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._signed = ""
        self._signed_at = -float("inf")

    def run(self, work: queue.SimpleQueue[_Part | None]) -> None:
        """Fetch parts until the queue gives None, which stays for the other threads."""
        while (part := work.get()) is not None:
            self.fetch(part)
            del part  # so that its buffer can be reused or freed while this thread waits
        work.put(None)

    def fetch(self, part: _Part, failure: Failure | None = None) -> None:
        """Fill a part, with retries; a final error is in `part.error`.

        Args:
            part: to fill.
            failure: of an earlier try.
        """
        try:
            failures: Counter[str] = Counter()
            last_byte_at = self._clock()
            while not part.dropped.is_set():
                signed = self._url()
                reached = part.num_filled
                failure = failure or self._get(part, signed)
                if failure is None:
                    return
                now = self._clock()
                if part.num_filled > reached:
                    failures.clear()
                    last_byte_at = now - (self.s3.read_timeout_s if failure.kind == "stall" else 0.0)
                failures[failure.kind] += 1
                silent_s = now - last_byte_at
                wait_s = after_failure(failure.kind, failures, silent_s, self.s3.deadline_s, self._draw())
                if wait_s is None:
                    part.error = self._error(part, failure, failures, silent_s)
                    return
                with self._lock:
                    self.retries[failure.kind] += 1
                    TRAFFIC[failure.kind] += 1
                if failure.kind == "denied":
                    self._url(signed)
                self._sleep(part.dropped, wait_s)
                failure = None
        except BaseException as error:  # the reader raises it
            part.error = error
        finally:
            part.done.set()

    def _get(self, part: _Part, signed: str) -> Failure | None:
        """Send one GET for the missing bytes; None if the part is complete or dropped."""
        first = part.begin + part.num_filled
        last = part.end_asked - 1
        headers = {"Range": f"bytes={first}-{last}", "If-Match": f'"{self.info.etag}"'}
        try:
            answer = self.store.connections.get(signed, headers)
        except OSError as error:
            return _failure(error, "answer")
        part.watch(answer.connection)
        failure = self._check_head(answer, first, last) or self.fill(part, answer)
        part.watch(None)
        if part.num_filled < part.end - part.begin:
            answer.connection.close()
        elif part.end < part.end_asked:
            part.answer = answer
        else:
            self.store.connections.keep(answer)
        return failure

    def fill(self, part: _Part, answer: _Answer) -> Failure | None:
        """Read a body until the part is full or dropped."""
        before = part.num_filled
        with memoryview(part.buffer) as buffer, buffer[: part.end - part.begin] as view:
            begun = answer.begun[: len(view) - before]
            answer.begun = answer.begun[len(begun) :]
            view[before : before + len(begun)] = begun
            part.num_filled += len(begun)
            try:
                while part.num_filled < len(view) and not part.dropped.is_set():
                    count = answer.connection.recv_into(view[part.num_filled :])
                    if not count:
                        return Failure("reset", "closed early")
                    part.num_filled += count
            except OSError as error:
                return _failure(error, "byte")
            finally:
                with self._lock:
                    TRAFFIC["bytes"] += part.num_filled - before
        return None

    def _check_head(self, answer: _Answer, first: int, last: int) -> Failure | None:
        """Return None if the answer's body is the requested one."""
        status = answer.status
        headers = answer.headers
        if status == 200:
            return Failure("no ranges", "200 instead of 206", status)
        if status != 206:
            found = re.search(rb"<Code>([^<]+)</Code>", _read_error(answer))
            code = found.group(1).decode(errors="replace") if found else ""
            return Failure(_kind_of(status, code), f"{status} {code}".strip(), status, code)
        etag = headers.get("etag", "").strip('"')
        if etag and etag != self.info.etag:  # some stores ignore If-Match
            return Failure("replaced", f"ETag {etag}", status)
        wanted = f"bytes {first}-{last}/{self.info.num_bytes}"
        sent = headers.get("content-range")
        if sent != wanted:
            return Failure("wrong answer", f"Content-Range {sent!r} instead of {wanted!r}", status)
        length = headers.get("content-length")
        if length != str(last - first + 1):
            return Failure("wrong answer", f"Content-Length {length} instead of {last - first + 1}", status)
        return None

    def _url(self, refused: str | None = None) -> str:
        """Return the object's presigned URL, newer than the one that the store refused."""
        from botocore.exceptions import BotoCoreError, ClientError

        with self._lock:
            if refused != self._signed and self._clock() - self._signed_at <= _SIGN_AGAIN_S:
                return self._signed  # if one was refused: another part has already signed again
            bucket, key = split_s3_url(self.info.url)
            if refused:
                with contextlib.suppress(BotoCoreError, ClientError):
                    self.store.client.head_object(Bucket=bucket, Key=key)  # its answer tells boto3 the region
            try:
                self._signed = self.store.client.generate_presigned_url(
                    "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=_SIGNED_FOR_S
                )
            except BotoCoreError as error:
                raise _explained(error, self.info.url, self.s3) from error
            self._signed_at = self._clock()
            return self._signed

    def _error(self, part: _Part, failure: Failure, failures: Counter[str], silent_s: float) -> DataError:
        url = self.info.url
        endpoint = self.store.endpoint
        remedy = "put the object of the manifest back, or start a new run on the new data"
        if failure.kind in ("replaced", "gone"):
            what = {"replaced": "was replaced since", "gone": "is gone, though it was there when"}[failure.kind]
            return DataError(f"{url} {what} the run's manifest was made: {remedy}")
        if failure.kind == "no ranges":
            return DataError(
                f"{url}: the store {endpoint} ignores ranges (it answers a Range request with the whole object), which "
                "sigray needs to resume after a broken connection: use a store with ranges, or copy the shards"
            )
        if failure.kind == "denied":
            return _refused(url, self.s3, failure.status, failure.code)
        tried = ", ".join(f"{count} x {kind}" for kind, count in failures.most_common())
        if set(failures) == {"no connection"}:
            return _unreachable(url, self.s3, f"{failure.message} (tried {failures.total()} times in {silent_s:.0f} s)")
        return DataError(
            f"{url}: no byte from {endpoint} for {silent_s:.0f} s (data.stores.deadline_s={self.s3.deadline_s:g}) "
            f"at byte {part.begin + part.num_filled} of {self.info.num_bytes}, tried {failures.total()} times: {tried}; last: "
            f"{failure.message}"
        )


def _kind_of(status: int, code: str) -> str:
    """Return the kind of failure of an answer without the bytes."""
    if status in (429, 503) or code in ("SlowDown", "ServiceUnavailable", "TooManyRequests"):
        return "slow down"
    if status >= 500 or status == 408 or code == "RequestTimeout":
        return "server error"
    return {404: "gone", 412: "replaced", **dict.fromkeys(_DENIED, "denied")}.get(status, "wrong answer")


class S3Stream:
    """One object as a `ByteSource`, for one reading thread.

    `read` returns views if the bytes lie in one buffer. The views stay valid, since a buffer with views is not reused.
    Memory: the part that is being read and at most `s3.num_connections` prefetched ones.

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
        s3: StoresConfig,
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
        self._fetcher = _Fetcher(info, s3, draw, clock, sleep)
        self.retries = self._fetcher.retries
        # The number of threads that the store's last object needed.
        self.num_parts = min(s3.num_connections, self._fetcher.store.num_parts)
        self._max_parts = s3.num_connections
        self._part_bytes = part_bytes
        self._clock = clock
        self._answer: _Answer | None = None  # without threads: of the range that is being read
        self._range_end = start
        self._range_parts = 1  # the first range shows whether the store is fast; the next ones may then be long
        self._waited_s = 0.0  # for the bytes up to `_decide_at`
        self._decide_at = start + part_bytes  # byte at which to decide about threads
        self._view = memoryview(b"")
        self._view_begin = self._view_end = start
        self._buffer: mmap.mmap | None = None  # of the view
        self._free: list[mmap.mmap] = []
        self._prefetched: deque[_Part] = deque()
        self._next = start  # first byte of the next part to request
        self._is_first_part = True  # the reader always waits for the first part, which says nothing about the store
        self._has_waited = False
        self._work: queue.SimpleQueue[_Part | None] = queue.SimpleQueue()
        self._num_threads = 0
        # A stream that is dropped without `close` stops its downloads.
        self._end = weakref.finalize(self, _end, self._prefetched, self._work)
        self._start_parts()

    def read(self, count: int) -> bytes | memoryview:
        """Return the next `count` bytes.

        Raises:
            DataError: "cut short: ..." if the object ends earlier; the object was replaced, is gone, cannot be reached
                or is refused; no byte comes for `s3.deadline_s`.
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
        part = _Part(position, position + count, position + count, mmap.mmap(-1, max(count, 1)))
        if count:
            self._fetcher.fetch(part)
        if part.error is not None:
            raise part.error
        return memoryview(part.buffer).toreadonly()[:count]

    def skip(self, count: int) -> None:
        """Pass over bytes; parts before the new position are dropped or not requested."""
        self.position += count

    def close(self) -> None:
        """Stop the downloads; views that were read stay valid."""
        # If the reader never waited for a thread, the store is fast or the reader slow: the next one reads directly.
        self._fetcher.store.num_parts = self.num_parts if self._has_waited or self._is_first_part else 0
        self._end()
        self._disconnect()
        self._release_view()
        self._free.clear()
        self._next = self._range_end = self.num_bytes

    def _read_across(self, count: int) -> bytes | memoryview:
        """Return bytes that do not all lie in the current part."""
        if self.position + count > self.num_bytes:
            raise cut_short(self.num_bytes)
        if not count:
            return b""
        if self.position >= self._view_end:
            self._advance()
            if self.position + count <= self._view_end:
                return self.read(count)
        whole = bytearray(count)
        num_copied = 0
        while num_copied < count:
            if self.position >= self._view_end:
                self._advance()
            piece = self._view[self.position - self._view_begin :][: count - num_copied]
            whole[num_copied : num_copied + len(piece)] = piece
            num_copied += len(piece)
            self.position += len(piece)
        return memoryview(whole).toreadonly()

    def _advance(self) -> None:
        """Make the part or block at the position the current one."""
        assert self._end.alive, "read after close"
        self._release_view()
        if not self.num_parts and self._next >= self._decide_at:
            if self._waited_s > self._part_bytes / _FAST_BYTES_PER_S:
                self._disconnect()
                self._free.clear()  # these have the size of blocks
                self._next = max(self._next, self.position)
                self.num_parts = min(FIRST_PARTS, self._max_parts)
            self._waited_s = 0.0
            self._decide_at = self._next + self._part_bytes
        part = self._next_part() if self.num_parts else self._next_block()
        self._buffer = part.buffer
        self._view = memoryview(part.buffer).toreadonly()[: part.end - part.begin]
        self._view_begin, self._view_end = part.begin, part.end
        self._start_parts()

    def _next_block(self) -> _Part:
        """Read the block at the position, without threads."""
        began = self._clock()
        num_bytes = min(_BLOCK_BYTES, self._part_bytes)
        buffer = self._free.pop() if self._free else _new_buffer(num_bytes)
        if self.position >= self._range_end:
            self._disconnect()
            self._next = self.position
            self._range_end = min(self.position + self._range_parts * self._part_bytes, self.num_bytes)
            self._range_parts = _DIRECT_PARTS
        while True:
            block = _Part(self._next, min(self._next + num_bytes, self._range_end), self._range_end, buffer)
            failure = self._fetcher.fill(block, self._answer) if self._answer is not None else None
            if block.num_filled < block.end - block.begin:
                self._disconnect()
                self._fetcher.fetch(block, failure)
                if block.error is not None:
                    raise block.error
                self._answer = block.answer
            self._next = block.end
            if block.end == self._range_end and self._answer is not None:
                self._fetcher.store.connections.keep(self._answer)
                self._answer = None
            if block.end > self.position:
                self._waited_s += self._clock() - began
                return block

    def _next_part(self) -> _Part:
        """Wait for the part at the position."""
        while self._prefetched and self._prefetched[0].end <= self.position:
            passed = self._prefetched.popleft()
            if passed.done.is_set():
                self._free.append(passed.buffer)
            passed.drop()
        if not self._prefetched and self._next < self.position:
            self._next = self.position
            self._is_first_part = True
        self._start_parts()
        part = self._prefetched[0]
        if self._is_first_part:
            part.done.wait()
        elif not part.done.wait(self._part_bytes / _FAST_BYTES_PER_S / 4):
            self._has_waited = True
            if self.num_parts < self._max_parts:
                self.num_parts += 1
                self._start_parts()
            part.done.wait()
        self._is_first_part = False
        if part.error is not None:
            raise part.error
        return self._prefetched.popleft()

    def _disconnect(self) -> None:
        if self._answer is not None:
            self._answer.connection.close()
        self._answer = None

    def _release_view(self) -> None:
        """Release the current part's buffer for reuse, unless views of it exist."""
        self._view.release()
        self._view = memoryview(b"")
        self._view_begin = self._view_end = self.position
        if self._buffer is not None:
            with contextlib.suppress(BufferError):  # a mapping with views refuses a resize, even to its own length
                self._buffer.resize(len(self._buffer))
                self._free.append(self._buffer)
        self._buffer = None

    def _start_parts(self) -> None:
        """Request parts until `num_parts` are prefetched."""
        while len(self._prefetched) < self.num_parts and self._next < self.num_bytes:
            end = min(self._next + self._part_bytes, self.num_bytes)
            part = _Part(self._next, end, end, self._free.pop() if self._free else _new_buffer(self._part_bytes))
            self._next = end
            self._prefetched.append(part)
            self._work.put(part)
            if self._num_threads < self.num_parts:
                self._num_threads += 1
                threading.Thread(target=self._fetcher.run, args=(self._work,), name="s3-part", daemon=True).start()


class ShardCache:
    """A folder of local copies of objects, shared by the processes of a host.

    Every change is made under a lock on the folder. Space is reserved before a download begins, so the folder never
    grows above `max_bytes`; the least recently used copies are evicted. A download holds a lock on its file: a file
    without a lock belongs to a dead process and is deleted.

    Args:
        folder: is made if it does not exist. Other files in it stay as they are.
        max_bytes: of all copies together.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes

    def path_of(self, info: ObjectInfo, s3: StoresConfig) -> Path:
        """Return the local copy of an object, and download it first if needed.

        Open the copy at once: another process may evict it. An open file stays readable after that; if the copy was
        evicted before it was opened, call this again.

        Raises:
            DataError: as `S3Stream.read`; the object is larger than the cache; the disk is full.
        """
        if info.num_bytes > self.max_bytes:
            raise DataError(
                f"{info.url} has {info.num_bytes} bytes, more than the whole shard cache {self.folder} may have "
                f"({self.max_bytes}): raise data.shard_cache_gib, or stream the shards with data.shard_cache=null"
            )
        path = self.folder / (hashlib.sha256(f"{info.url} {info.etag}".encode()).hexdigest()[:32] + ".tar")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                if self._touched(path, info.num_bytes):
                    return path
                with self._locked():
                    file = self._reserve(path, info.num_bytes)
                if file is None:
                    time.sleep(0.1)  # another process downloads it, or has reserved all the space
                    continue
                with file:
                    self._download(file, info, s3)
                    with self._locked():  # else another process might not count its bytes
                        os.replace(file.name, path)
                return path
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(
                    f"{info.url}: the disk of the shard cache {self.folder} is full: free some space or lower "
                    f"data.shard_cache_gib ({self.max_bytes / 2**30:.3g} now)"
                ) from error
            raise DataError(f"{info.url}: the shard cache {self.folder} cannot be used: {error}") from error

    def _download(self, file: IO[bytes], info: ObjectInfo, s3: StoresConfig) -> None:
        """Fill the reserved file; delete it on any error."""
        try:
            with contextlib.closing(S3Stream(info, s3)) as stream:
                for position in range(0, info.num_bytes, 1 << 20):
                    file.write(stream.read(min(1 << 20, info.num_bytes - position)))
            file.flush()
            os.fsync(file.fileno())  # else a copy may have the right size and zeros in it after a power loss
        except BaseException:
            os.unlink(file.name)
            raise

    def _touched(self, path: Path, num_bytes: int) -> bool:
        """Return whether the copy exists, and mark it as just used."""
        try:
            os.utime(path)
            return path.stat().st_size == num_bytes
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _reserve(self, path: Path, num_bytes: int) -> IO[bytes] | None:
        """Evict copies and return an open, locked file of that size; None: try later."""
        if self._touched(path, num_bytes):
            return None
        wanted = path.with_suffix(".part")
        copies: list[tuple[int, int, Path]] = []  # time of last use (ns), bytes, path
        num_used = 0
        for other in self.folder.iterdir():
            if not re.fullmatch(r"[0-9a-f]{32}\.(tar|part)", other.name):
                continue
            with contextlib.suppress(FileNotFoundError):  # a download failed meanwhile
                if other.suffix == ".part" and _is_abandoned(other):
                    other.unlink()
                    continue
                status = other.stat()
                num_used += status.st_size
                if other.suffix == ".tar":
                    copies.append((status.st_mtime_ns, status.st_size, other))
        if wanted.exists():
            return None
        copies.sort()
        if num_used - sum(size for _, size, _ in copies) + num_bytes > self.max_bytes:
            return None
        while num_used + num_bytes > self.max_bytes:
            _, size, oldest = copies.pop(0)
            oldest.unlink(missing_ok=True)
            num_used -= size
        file = open(wanted, "xb")  # noqa: SIM115 - the caller closes it
        fcntl.flock(file, fcntl.LOCK_EX)
        os.ftruncate(file.fileno(), num_bytes)
        return file


def _is_abandoned(path: Path) -> bool:
    """Return whether no process holds a lock on a file."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
