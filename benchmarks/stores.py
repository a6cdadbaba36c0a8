"""What does reading from a store cost the client, and what does it gain where a connection is slow?

Servers on the loopback device (`tests/helpers/stored.py`), objects of 256 MiB, contestants in one process, alternating:

    fast store   CPU seconds of the client (all its threads) per GB and MB/s: boto3's `Body.read(1 MiB)`, the cheapest
                 plain client measured (s3 only); a bare `obstore.get().stream(1 MiB)`; `StoreStream` read 1 MiB at a
                 time; and the tar of 35 kB samples read through `sigray.workers.data.tar.read_tar`.
                 `cpu_over_boto3` is the 1 MiB reads' ratio on s3, `over_bare_obstore` the least ratio of rates over
                 the stores.
    slow store   behind a proxy in its own process that answers 30 ms late and at 60 MB/s per connection, as Amazon's S3
                 does: MB/s of one plain boto3 stream and of `StoreStream`, which has the default of 4 connections.
                 `speedup_slow_store` is over objects read one after another, as shards are.

The figures are medians over the repetitions of ratios within one repetition.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import obstore
from botocore.config import Config

from benchmarks.common import report
from sigray.workers.config import StoresConfig
from sigray.workers.data.store_stream import StoreStream
from sigray.workers.data.tar import read_tar
from sigray.workers.stores import ObjectInfo, open_store, split_url, stat
from tests.helpers.az import AZURITE
from tests.helpers.faultproxy import throttled
from tests.helpers.s3 import BUCKET
from tests.helpers.stored import Servers

MIB = 1 << 20
LATENCY_S, BYTES_PER_S = 0.030, 60e6
SAMPLE_BYTES = 33_000


def build_tar(num_bytes: int) -> bytes:
    """About so many bytes of samples of three members each."""
    content, buffer = random.Random(0).randbytes(SAMPLE_BYTES), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(num_bytes // 36_000):
            for ending, size in (("jpg", SAMPLE_BYTES), ("txt", 60), ("json", 200)):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size = size
                tar.addfile(member, io.BytesIO(content[:size]))
    return buffer.getvalue()


def plain_client(endpoint: str) -> Any:
    """boto3 at its cheapest: by default it also computes the CRC-32 that the server keeps, at 0.3 s per GB."""
    config = Config(s3={"addressing_style": "path"}, response_checksum_validation="when_required")
    return boto3.client("s3", endpoint_url=endpoint, config=config)


def boto3_stream(client: Any, info: ObjectInfo) -> int:
    _, bucket, key = split_url(info.url)
    body, count = client.get_object(Bucket=bucket, Key=key)["Body"], 0
    while piece := body.read(MIB):
        count += len(piece)
    return count


def sigray_stream(stores: StoresConfig, info: ObjectInfo) -> int:
    count = 0
    with contextlib.closing(StoreStream(info, stores)) as stream:
        while stream.position < info.num_bytes:
            count += len(stream.read(min(MIB, info.num_bytes - stream.position)))
    assert not stream.retries, stream.retries
    return count


def sigray_tar(stores: StoresConfig, info: ObjectInfo) -> int:
    with contextlib.closing(StoreStream(info, stores)) as stream:
        return sum(sum(map(len, sample.members.values())) for sample in read_tar(stream))


def read_all(read: Callable[[ObjectInfo], int], infos: list[ObjectInfo]) -> int:
    return sum(map(read, infos))


def timed(run: Callable[[], int], num_bytes: int) -> tuple[float, float]:
    """CPU seconds per GB (1e9 bytes) and MB/s (1e6 bytes)."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return cpu / num_bytes * 1e9, num_bytes / wall / 1e6


def obstore_stream(info: ObjectInfo) -> int:
    store, key = open_store(info.url)
    return sum(len(chunk) for chunk in obstore.get(store, key).stream(MIB))


def measure_fast(scheme: str, infos: list[ObjectInfo], num_repetitions: int) -> list[dict[str, float]]:
    stores = StoresConfig()
    contestants: dict[str, Callable[[ObjectInfo], int]] = {
        "obstore": obstore_stream,
        "sigray": lambda info: sigray_stream(stores, info),
    }
    if scheme == "s3":
        plain = plain_client(os.environ["AWS_ENDPOINT_URL"])
        contestants["boto3"] = lambda info: boto3_stream(plain, info)
        contestants["tar"] = lambda info: sigray_tar(stores, info)
    for run in contestants.values():  # the server's cache, connections
        for info in infos:
            run(info)
    repetitions = []
    for _ in range(num_repetitions):
        repetition: dict[str, float] = {}
        for name, run in contestants.items():
            cpu, rate = timed(functools.partial(read_all, run, infos), sum(info.num_bytes for info in infos))
            repetition |= {f"{scheme}_{name}_cpu_s_per_gb": cpu, f"{scheme}_{name}_mb_per_s": rate}
        repetitions.append(repetition)
        print(" ".join(f"{key}={value:.4g}" for key, value in repetition.items()), flush=True)
    return repetitions


def measure_slow(endpoint: str, infos: list[ObjectInfo], num_repetitions: int) -> list[dict[str, float]]:
    stores = StoresConfig(s3_endpoint=endpoint)
    plain = plain_client(endpoint)
    repetitions = []
    for _ in range(num_repetitions):
        # One object is enough for the plain stream: it learns nothing from it.
        _, plain_rate = timed(lambda: boto3_stream(plain, infos[0]), infos[0].num_bytes)
        num_bytes = sum(info.num_bytes for info in infos)
        cpu, rate = timed(lambda: sum(sigray_stream(stores, info) for info in infos), num_bytes)
        repetitions.append(
            {"slow_boto3_mb_per_s": plain_rate, "slow_sigray_mb_per_s": rate, "slow_sigray_cpu_s_per_gb": cpu}
        )
        print(" ".join(f"{key}={value:.4g}" for key, value in repetitions[-1].items()), flush=True)
    return repetitions


def ratio(repetitions: list[dict[str, float]], over: str, under: str) -> float:
    return statistics.median(each[over] / each[under] for each in repetitions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="of each of two objects")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    content = build_tar(options.mib * MIB)
    figures: dict[str, float] = {}
    rows: list[dict[str, float]] = []
    over_bare = []
    for scheme in ("s3", "gs", "az") if AZURITE else ("s3", "gs"):
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(Servers(Path(folder))) as servers:
            variables = servers.variables(scheme)
            os.environ |= variables
            infos = []
            for key in ("0.tar", "1.tar"):
                store, path = open_store(f"{scheme}://{BUCKET}/{key}")
                store.put(path, content)
                infos.append(stat(f"{scheme}://{BUCKET}/{key}"))
            with contextlib.closing(StoreStream(infos[0], StoresConfig())) as stream:
                assert stream.read(infos[0].num_bytes) == content
            fast = measure_fast(scheme, infos, options.repetitions)
            rows += fast
            over_bare.append(ratio(fast, f"{scheme}_sigray_mb_per_s", f"{scheme}_obstore_mb_per_s"))
            if scheme == "s3":
                figures["cpu_over_boto3"] = ratio(fast, "s3_sigray_cpu_s_per_gb", "s3_boto3_cpu_s_per_gb")
                with throttled(variables["AWS_ENDPOINT_URL"], LATENCY_S, BYTES_PER_S) as endpoint:
                    slow = measure_slow(endpoint, infos, max(5, options.repetitions // 2))
                rows += slow
                figures["speedup_slow_store"] = ratio(slow, "slow_sigray_mb_per_s", "slow_boto3_mb_per_s")
    report("stores", rows, figures | {"over_bare_obstore": min(over_bare)}, options.save)


if __name__ == "__main__":
    main()
