"""Streams and the cache against a real server of each store, with faults between by `tests/helpers/faultproxy.py`."""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigray.workers.config import StoresConfig
from sigray.workers.data import shard_cache, store_stream
from sigray.workers.data.shard_cache import ShardCache
from sigray.workers.data.store_stream import StoreStream, after_failure
from sigray.workers.data.tar import DataError, Tally, read_tar
from sigray.workers.stores import ObjectInfo, StoreError, list_objects, open_store, read_object, stat
from tests.helpers.faultproxy import Fault, FaultProxy, drawn, in_turn, throttled
from tests.helpers.s3 import BUCKET, free_ports
from tests.helpers.stored import ENDPOINTS, SCHEMES, Servers
from tests.helpers.tars import END, header, member
from tests.helpers.web import Site, web_server

PART = 1 << 16
SMALL, LARGE = random.Random(0).randbytes(12_345), random.Random(1).randbytes(40 * PART + 4321)
_SCHEME = ["s3"]  # of the server that runs now


@pytest.fixture(scope="module", autouse=True, params=SCHEMES)
def store(request: pytest.FixtureRequest, servers: Servers) -> Iterator[str]:
    """The server's endpoint; the environment leads to it while this file runs."""
    _SCHEME[0] = request.param
    variables = servers.variables(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        put("small", SMALL)
        put("large", LARGE)
        yield variables[ENDPOINTS[request.param]]


@pytest.fixture
def proxy(store: str) -> Iterator[FaultProxy]:
    with FaultProxy(store) as proxy:
        yield proxy


def url_of(key: str) -> str:
    return f"{_SCHEME[0]}://{BUCKET}/{key}"


def put(key: str, content: bytes) -> ObjectInfo:
    opened, path = open_store(url_of(key))
    opened.put(path, content)
    return info_of(key)


def info_of(key: str) -> ObjectInfo:
    return stat(url_of(key))


def reached_at(endpoint: str, **changes: object) -> StoresConfig:
    """A config that reaches the server over another address."""
    account = "/devstoreaccount1" if _SCHEME[0] == "az" else ""
    return StoresConfig(**{f"{_SCHEME[0]}_endpoint": endpoint + account}, **changes)


def config(proxy: FaultProxy, **changes: object) -> StoresConfig:
    return reached_at(proxy.endpoint, **changes)


def begin_with(num_parts: int, stores: StoresConfig) -> None:
    """The next stream begins with so many threads."""
    store_stream._num_parts[_SCHEME[0], BUCKET, stores] = num_parts


def stream_through(
    proxy: FaultProxy,
    info: ObjectInfo,
    start: int = 0,
    *,
    num_parts: int = 2,
    part_bytes: int = PART,
    **changes: object,
) -> contextlib.closing[StoreStream]:
    """A stream of small parts that hardly waits between two tries and begins with so many threads."""
    stores = config(proxy, **({"read_timeout_s": 5} | changes))
    begin_with(num_parts, stores)
    return contextlib.closing(StoreStream(info, stores, start, part_bytes=part_bytes, draw=lambda: 0.02))


def unsigned_only() -> None:
    if _SCHEME[0] != "gs":
        pytest.skip("the proxy can change only requests without a signature")


@pytest.fixture
def every_store_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_stream, "_FAST_BYTES_PER_S", 1e-3)


def read_all(stream: StoreStream, piece_bytes: int = 50_000) -> bytes:
    pieces = []
    while stream.position < stream.num_bytes:
        pieces.append(bytes(stream.read(min(piece_bytes, stream.num_bytes - stream.position))))
    return b"".join(pieces)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def num_part_threads() -> int:
    return sum(thread.name == "store-part" for thread in threading.enumerate())


def test_objects_are_listed_with_size_and_etag() -> None:
    for number in (2, 0, 1):
        put(f"listed/shard-{number}.tar", bytes(number))
    found = list(list_objects(url_of("listed/shard-")))
    assert [info.url[-5:] for info in found] == ["0.tar", "1.tar", "2.tar"]
    assert [info.num_bytes for info in found] == [0, 1, 2]
    assert found[2] == info_of("listed/shard-2.tar")
    assert not list(list_objects(url_of("nothing")))
    assert read_object(found[2].url) == bytes(2)
    with pytest.raises(StoreError, match="no such object"):
        read_object(url_of("nothing"))


@settings(max_examples=100)
@given(
    start=st.integers(0, len(SMALL)),
    part_bytes=st.integers(500, 20_000),
    num_connections=st.integers(1, 4),
    fast=st.sampled_from([100e6, 1e-3]),
    num_parts=st.integers(0, 4),
    steps=st.lists(st.tuples(st.sampled_from(["read", "skip"]), st.integers(0, 4000)), max_size=20),
)
def test_any_pattern_of_reads_and_skips_gives_the_objects_bytes(
    start: int, part_bytes: int, num_connections: int, fast: float, num_parts: int, steps: list[tuple[str, int]]
) -> None:
    s3 = StoresConfig(num_connections=num_connections)
    begin_with(num_parts, s3)
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(store_stream, "_FAST_BYTES_PER_S", fast)
        patch.setattr(store_stream, "_CHUNK_BYTES", 1000)
        stream = stack.enter_context(
            contextlib.closing(StoreStream(info_of("small"), s3, start, part_bytes=part_bytes))
        )
        position, held = start, []
        for action, count in steps:
            if action == "skip":
                stream.skip(count)
            elif position + count > len(SMALL):
                with pytest.raises(DataError, match="cut short"):
                    stream.read(count)
                break
            else:
                held.append((position, stream.read(count)))
            position += count
            assert stream.position == position
    for position, view in held:  # buffers are not used again under a view, nor freed by close
        assert view == SMALL[position : position + len(view)]


def test_a_hundred_faults_alter_nothing(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    info, rng = info_of("large"), random.Random(5)
    kinds = ["reset", "close", "stall", "503", "429", "500", "hang up", "short", "other range"]
    retries: Counter[str] = Counter()
    num_faults = {True: 0, False: 0}
    for number in range(80):
        directly = number % 8 > 0
        proxy.schedule = drawn(number, 0.8 if directly else 0.4, kinds, PART)  # one GET, or one for each part
        if min(num_faults.values()) >= 60:
            break
        position, before = rng.randrange(PART), proxy.faults.total()
        monkeypatch.setattr(store_stream, "_FAST_BYTES_PER_S", 1e-3 if directly else 100e6)
        monkeypatch.setattr(store_stream, "_CHUNK_BYTES", 20_000)
        with stream_through(proxy, info, position, num_parts=0 if directly else 2, read_timeout_s=0.2) as stream:
            while position < len(LARGE):
                count = min(rng.choice([512, 512, 3000, 35_000, PART, 3 * PART]), len(LARGE) - position)
                if rng.random() < 0.1:
                    stream.skip(count)
                else:
                    assert stream.read(count) == LARGE[position : position + count]
                position += count
            retries += stream.retries
            assert (stream.num_parts == 0) == directly
        num_faults[directly] += proxy.faults.total() - before
    assert min(num_faults.values()) >= 60, num_faults
    assert set(proxy.faults) == set(kinds)
    assert all(retries[kind] >= 5 for kind in ("cut", "stalled", "throttled", "server error", "wrong answer")), retries


@pytest.mark.parametrize("num_parts", [0, 2])
@pytest.mark.parametrize("kind", ["reset", "close", "stall"])
def test_a_broken_part_goes_on_where_it_broke(
    proxy: FaultProxy, kind: str, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(2).randbytes(1 << 20)
    info = put("one-part", content)
    monkeypatch.setattr(store_stream, "_CHUNK_BYTES", 10_000)
    proxy.schedule = in_turn([Fault(kind, 700_000)])
    with stream_through(
        proxy, info, num_parts=num_parts, part_bytes=1 << 20, read_timeout_s=1 if kind == "stall" else 30
    ) as stream:
        assert stream.read(1 << 20) == content
    assert proxy.faults == {kind: 1}
    assert stream.retries == {"stalled" if kind == "stall" else "cut": 1}
    (_, end), (resumed, last) = proxy.ranges
    assert end == last == (1 << 20) - 1
    if kind == "reset":
        assert 0 <= resumed <= 700_000  # a reset takes with it what the kernel had received and the client not yet read
    else:
        assert 690_000 < resumed <= 700_000


@pytest.mark.parametrize("num_parts", [0, 2])
@pytest.mark.usefixtures("every_store_is_fast")
def test_hardly_more_bytes_than_the_object_are_asked_for(proxy: FaultProxy, num_parts: int) -> None:
    info = info_of("large")
    proxy.schedule = in_turn([Fault("close", 30_000), Fault("503"), Fault("hang up"), Fault("close", 50_000)])
    counted = store_stream.TRAFFIC["bytes"]
    with stream_through(proxy, info, num_parts=num_parts) as stream:
        assert read_all(stream) == LARGE
    assert store_stream.TRAFFIC["bytes"] - counted == len(LARGE)
    assert proxy.faults.total() == 4
    assert len(LARGE) <= proxy.num_sent <= len(LARGE) + proxy.faults["close"] * PART


@pytest.mark.parametrize("fault", ["403", "expired"])
def test_a_refused_signature_is_renewed_once(proxy: FaultProxy, fault: str) -> None:
    info = info_of("large")
    proxy.schedule = in_turn([None, None, None, Fault(fault)])
    with stream_through(proxy, info) as stream:
        assert read_all(stream) == LARGE
    assert stream.retries == {"denied" if fault == "403" else "expired": 1}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", "is gone, though it was there.*start a new run"),
        ("403", "access denied.*403 AccessDenied.*(AWS_|GOOGLE_|AZURE_).*data.stores.anonymous"),
        ("expired", "credentials have expired"),
        ("no ranges", "ignores ranges"),
    ],
)
def test_what_no_retry_can_mend_has_its_own_message(proxy: FaultProxy, fault: str, message: str) -> None:
    if fault == "no ranges":
        unsigned_only()
    info = info_of("large")
    with stream_through(proxy, info) as stream:
        wait_until(lambda: len(proxy.ranges) == 2)
        proxy.schedule = lambda: Fault(fault)
        assert stream.read(2 * PART) == LARGE[: 2 * PART]  # what came before is good
        with pytest.raises(DataError, match=f"{info.url}.*{message}"):
            stream.read(1)


def read_what_is_replaced(proxy: FaultProxy, message: str) -> None:
    info = put("replaced", LARGE)
    with stream_through(proxy, info) as stream:
        wait_until(lambda: proxy.num_sent >= 2 * PART)
        put("replaced", LARGE[::-1])
        assert stream.read(2 * PART) == LARGE[: 2 * PART]
        with pytest.raises(DataError, match=message):
            stream.read(1)


def test_a_replaced_object_is_an_error_and_no_mixture(proxy: FaultProxy) -> None:
    read_what_is_replaced(proxy, "was replaced since the run's manifest was made: put .* back")


def test_every_get_asks_for_the_version_of_the_manifest(proxy: FaultProxy) -> None:
    """What comes without being asked for is refused too; but a whole part would be downloaded first, each time."""
    info = info_of("small")
    with stream_through(proxy, info) as stream:
        stream.read(info.num_bytes)
    assert proxy.conditions
    assert set(proxy.conditions) == {f'"{info.etag}"'}


def test_a_store_without_if_match_gives_no_mixture_either(proxy: FaultProxy) -> None:
    unsigned_only()
    proxy.schedule = lambda: Fault("no if-match")
    read_what_is_replaced(proxy, "was replaced")


def test_the_deadline_names_what_was_tried(proxy: FaultProxy) -> None:
    info, now = info_of("small"), 0.0
    proxy.schedule = in_turn([Fault("500"), Fault("hang up"), *[Fault("503")] * 200])
    waits: list[float] = []

    def sleep(dropped: threading.Event, seconds: float) -> None:
        nonlocal now
        now += seconds
        waits.append(seconds)

    s3 = config(proxy, deadline_s=100, read_timeout_s=5)
    with (
        contextlib.closing(StoreStream(info, s3, draw=lambda: 1.0, clock=lambda: now, sleep=sleep)) as stream,
        pytest.raises(DataError, match=r"no byte from .* for 100 s .*tried \d+ times: \d+ x throttled.*503 SlowDown"),
    ):
        stream.read(1)
    assert sum(waits) == pytest.approx(100)
    assert waits[:3] == [0.2, 0.2, 2.0]
    assert max(waits) == 10


def test_a_redirect_to_another_host_gets_no_signature(proxy: FaultProxy) -> None:
    with web_server(Site()) as other:
        proxy.redirects_to, proxy.schedule = other.address, in_turn([Fault("redirect")])
        with pytest.raises(StoreError, match="no such object"):
            stat(url_of("small"), config(proxy))
    (request,) = other.requests
    assert "authorization" not in request.headers
    assert "Signature" not in str(request)


def test_failures_and_what_is_done_about_them() -> None:
    def after(kind: str, silent_s: float = 0, **failures: int) -> float | None:
        counts = Counter({name.replace("_", " "): count for name, count in failures.items()})
        return after_failure(kind, counts, silent_s, 60, 0.5)

    assert after("cut", cut=1) == 0.05
    assert after("cut", cut=3) == 0.2
    assert after("throttled", cut=1, throttled=3) == 2.0
    assert after("stalled", stalled=500) == 5.0
    assert after("stalled", silent_s=59, stalled=500) == 1.0
    assert after("stalled", silent_s=60, stalled=9) is None
    assert after("denied", denied=1) == 0.0
    assert after("denied", denied=2) is None
    for kind in ("missing", "changed", "no ranges"):
        assert after(kind, **{kind.replace(" ", "_"): 1}) is None


def test_listing_and_stat_name_the_cause_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = _SCHEME[0]
    for call in (stat, lambda url: list(list_objects(url))):
        with pytest.raises(StoreError, match=rf"no bucket 'no-such-bucket' at .*data\.stores\.{scheme}_endpoint"):
            call(f"{scheme}://no-such-bucket/key")
    with pytest.raises(StoreError, match="no such object") as missing:
        stat(url_of("missing"))
    assert isinstance(missing.value, FileNotFoundError)
    with pytest.raises(StoreError, match="names no bucket"):
        stat(f"{scheme}:///key")
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    nobody = reached_at(nowhere, deadline_s=0.5)
    with pytest.raises(StoreError, match=rf"cannot reach the store {nowhere}.*refused.*{scheme}_endpoint"):
        stat(url_of("small"), nobody)
    with (
        contextlib.closing(StoreStream(info_of("small"), nobody)) as stream,
        pytest.raises(DataError, match=rf"cannot reach the store {nowhere}.*tried \d+ times"),
    ):
        stream.read(1)
    with pytest.raises(StoreError, match="no client can be made.*'not a url'.*data.stores"):
        stat(url_of("small"), StoresConfig(**{f"{scheme}_endpoint": "not a url"}))
    with pytest.raises(StoreError, match="access denied.*not signed"):
        stat(url_of("small"), StoresConfig(anonymous=True))
    info = info_of("small")
    name, _ = key = {
        "s3": ("AWS_SECRET_ACCESS_KEY", "wrong"),
        "gs": ("GOOGLE_BEARER_TOKEN", "wrong"),
        "az": ("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc="),
    }[scheme]
    monkeypatch.setenv(*key)
    with pytest.raises(StoreError, match=rf"access denied.*40[13] \w+.*{name[:6]}") as denied:
        stat(url_of("small"))
    assert "wrong" not in str(denied.value)
    assert denied.value.__cause__ is None  # obstore's own text repeats the request, with its signature
    with (
        contextlib.closing(StoreStream(info, StoresConfig())) as stream,
        pytest.raises(DataError, match="access denied"),
    ):
        stream.read(1)


def test_memory_is_bounded_and_views_stay_valid(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_stream, "_FAST_BYTES_PER_S", 1e15)  # no part shows a fast store
    info, held = info_of("large"), []
    with stream_through(proxy, info, num_connections=3) as stream:
        while stream.position + 10_000 < len(LARGE):
            position = stream.position
            if position // PART % 5 == 1:  # now and then a consumer that keeps what it read
                held.append((position, stream.read(10_000)))
            else:
                assert stream.read(10_000) == LARGE[position : position + 10_000]
            assert len(stream._parts) <= 3
            assert max(last for _, last in proxy.ranges) < stream.position + (3 + 1) * PART
    for position, view in held:
        assert view == LARGE[position : position + 10_000]


@pytest.mark.usefixtures("every_store_is_fast")
def test_a_fast_store_is_read_directly_in_long_ranges(proxy: FaultProxy) -> None:
    with stream_through(proxy, info_of("large"), num_parts=0) as stream:
        assert read_all(stream) == LARGE
        assert stream.num_parts == 0
        assert num_part_threads() == 0
    assert proxy.ranges == [(0, PART - 1), (PART, len(LARGE) - 1)]
    assert proxy.most_at_once == 1


def test_a_reader_that_never_waits_needs_two_connections_and_then_none(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_stream, "_FAST_BYTES_PER_S", 1e15)  # no part shows a fast store
    with stream_through(proxy, info_of("large")) as stream:
        while stream.position + 1000 < len(LARGE):
            wait_until(lambda: all(part.chunks.done() for part in stream._parts))
            stream.read(1000)
            stream.skip(min(PART // 2, len(LARGE) - stream.position))
        assert stream.num_parts == 2
    assert proxy.most_at_once <= 2  # 1 where the first part is done before the second is asked for
    assert store_stream._num_parts[_SCHEME[0], BUCKET, config(proxy, read_timeout_s=5)] == 0


@pytest.mark.usefixtures("every_store_is_fast")
def test_a_fast_part_ends_the_threads(proxy: FaultProxy) -> None:
    with stream_through(proxy, info_of("large"), num_parts=2) as stream:
        assert stream.num_parts == 2
        assert read_all(stream) == LARGE
        assert stream.num_parts == 0
        assert num_part_threads() == 0
    ends = [PART - 1, 2 * PART - 1, 3 * PART - 1, len(LARGE) - 1]
    assert sorted(proxy.ranges) == list(zip([0, PART, 2 * PART, 3 * PART], ends, strict=True))
    assert store_stream._num_parts[_SCHEME[0], BUCKET, config(proxy, read_timeout_s=5)] == 0


@pytest.mark.usefixtures("every_store_is_fast")
def test_after_a_fast_part_a_skip_may_pass_all_that_is_requested(proxy: FaultProxy) -> None:
    with stream_through(proxy, info_of("large"), num_parts=3) as stream:
        assert stream.read(512) == LARGE[:512]
        assert stream.num_parts == 0
        stream.skip(10 * PART)
        position = stream.position
        assert stream.read(2 * PART) == LARGE[position : position + 2 * PART]


def test_a_slow_store_is_read_over_all_connections_and_remembered(store: str) -> None:
    with throttled(store, latency_s=0.01, bytes_per_s=5e6) as endpoint:
        for first, last in ((0, 4), (4, 4)):
            with contextlib.closing(StoreStream(info_of("large"), reached_at(endpoint), part_bytes=PART)) as stream:
                assert stream.num_parts == first
                assert read_all(stream) == LARGE
                assert stream.num_parts == last


@pytest.mark.parametrize("num_parts", [0, 2])
def test_a_long_skip_does_not_download_what_it_passes(proxy: FaultProxy, num_parts: int) -> None:
    with stream_through(proxy, info_of("large"), num_parts=num_parts) as stream:
        assert stream.read(512) == LARGE[:512]
        stream.skip(30 * PART)
        assert stream.read(512) == LARGE[30 * PART + 512 : 30 * PART + 1024]
        wait_until(lambda: proxy.num_sent >= 2 * PART)
    assert len(proxy.ranges) <= 3 + 3
    assert proxy.num_sent <= (6 if num_parts else 12) * PART
    assert all(last < 4 * PART or first >= 30 * PART for first, last in proxy.ranges)


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_nothing_goes_on_behind_a_stream_that_ended(proxy: FaultProxy, how: str) -> None:
    wait_until(lambda: num_part_threads() == 0)
    proxy.schedule = lambda: Fault("stall", 1000)
    begin_with(2, config(proxy, read_timeout_s=2))
    stream = StoreStream(info_of("large"), config(proxy, read_timeout_s=2), part_bytes=PART)
    wait_until(lambda: proxy.faults["stall"] == 2)
    assert num_part_threads() == 2
    # The end of the process waits for no store that stalls.
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "store-part")
    if how == "closed":
        stream.close()
    else:
        del stream
        gc.collect()
    wait_until(lambda: num_part_threads() == 0)
    assert len(proxy.ranges) == 2


def test_a_tar_is_read_from_a_stream_as_from_a_file(proxy: FaultProxy, tar_folder: Path) -> None:
    content = (tar_folder / "shard-002.tar").read_bytes()
    info = put("shard-002.tar", content)
    proxy.schedule = drawn(1, 0.3, ["reset", "close", "503"], 2000)
    with stream_through(proxy, info, part_bytes=3000) as stream:
        samples = list(read_tar(stream))
    assert [sample.index for sample in samples] == list(range(32))
    assert all(bytes(sample.members["txt"]).startswith((b"red", b"green", b"blue", b"black")) for sample in samples)


def test_a_hard_link_is_read_by_a_get_of_its_own(proxy: FaultProxy) -> None:
    parts = [member(b"%d.bin" % number, b"%d" % number * 2500) for number in range(8)]
    parts += [header(b"link%d.bin" % number, b"1", link=b"%d.bin" % (7 - number)) for number in range(8)]
    info = put("links.tar", b"".join(parts) + END)
    proxy.schedule = drawn(2, 0.3, ["reset", "close", "503"], 2000)
    tally = Tally()
    with stream_through(proxy, info, part_bytes=2048) as stream:
        samples = list(read_tar(stream, tally=tally))
    expected = [b"%d" % number * 2500 for number in (*range(8), *reversed(range(8)))]
    assert [bytes(sample.members["bin"]) for sample in samples] == expected
    with stream_through(proxy, info, part_bytes=2048, start=samples[10].position) as stream:
        rest = list(read_tar(stream, links=tally.links))
    assert [bytes(sample.members["bin"]) for sample in rest] == expected[10:]


# ---- ShardCache


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def test_the_cache_keeps_what_was_used_last(proxy: FaultProxy, tmp_path: Path) -> None:
    objects = [put(f"cached/{number}", random.Random(number).randbytes(1000)) for number in range(4)]
    cache = ShardCache(tmp_path / "cache", 3500)
    paths = [cache.path_of(info, config(proxy)) for info in objects[:3]]
    (tmp_path / "cache" / "notes.txt").write_text("not ours")
    cache.path_of(objects[0], config(proxy))  # now the one used last
    fourth = cache.path_of(objects[3], config(proxy))
    assert contents(tmp_path / "cache") == {paths[0].name, paths[2].name, fourth.name, "notes.txt"}
    assert len(proxy.ranges) == 4
    again = ShardCache(tmp_path / "cache", 3500)  # as after a restart
    assert again.path_of(objects[2], config(proxy)).read_bytes() == random.Random(2).randbytes(1000)
    assert len(proxy.ranges) == 4
    changed = put("cached/2", b"new")
    assert again.path_of(changed, config(proxy)).read_bytes() == b"new"


def test_a_failed_download_leaves_nothing(proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = info_of("small")
    cache = ShardCache(tmp_path, 1 << 20)
    proxy.schedule = in_turn([Fault("404")])
    with pytest.raises(DataError, match="is gone"):
        cache.path_of(info, config(proxy))
    assert contents(tmp_path) == set()
    with pytest.raises(DataError, match=r"12345 bytes, more than the whole shard cache.*data\.shard_cache_gib"):
        ShardCache(tmp_path, 12_344).path_of(info, config(proxy))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shard_cache.os, "fsync", full)
        with pytest.raises(DataError, match=r"disk of the shard cache .* is full.*data\.shard_cache_gib"):
            cache.path_of(info, config(proxy))
    assert contents(tmp_path) == set()
    assert cache.path_of(info, config(proxy)).read_bytes() == SMALL


def use_cache(folder: Path, infos: list[ObjectInfo], s3: StoresConfig, seed: int, max_bytes: int) -> None:
    rng, cache = random.Random(seed), ShardCache(folder, max_bytes)
    for _ in range(60):
        info = rng.choice(infos)
        while True:
            with contextlib.suppress(FileNotFoundError), open(cache.path_of(info, s3), "rb") as file:
                assert file.read() == random.Random(int(info.url[-1])).randbytes(info.num_bytes)
                break
        used = 0
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                used += path.stat().st_size
        assert used <= max_bytes + 5000 * 4, used  # the folder is looked at while others change it


def test_processes_share_a_cache_and_clean_up_after_a_dead_one(proxy: FaultProxy, tmp_path: Path) -> None:
    infos = [put(f"shared/{number}", random.Random(number).randbytes(5000 - number)) for number in range(6)]
    spawn = multiprocessing.get_context("spawn")
    proxy.schedule = lambda: Fault("stall", 1000)
    dying = spawn.Process(target=use_cache, args=(tmp_path, infos, config(proxy), 0, 15_000), daemon=True)
    dying.start()
    wait_until(lambda: proxy.faults["stall"] == 1)
    dying.kill()
    dying.join()
    assert [Path(name).suffix for name in contents(tmp_path)] == [".part"]
    proxy.schedule = drawn(4, 0.2, ["reset", "close", "503"], 4000)
    processes = [
        spawn.Process(target=use_cache, args=(tmp_path, infos, config(proxy), seed, 15_000), daemon=True)
        for seed in (1, 2, 3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert contents(tmp_path)
    assert all(name.endswith(".tar") for name in contents(tmp_path))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 15_000
    assert proxy.faults.total() > 5
