"""What does reading from S3 cost the client, and what does it gain where a connection is slow?

A real S3 server on the loopback device (SeaweedFS, `tests/helpers/s3.py`), objects of 256 MiB, contestants in one
process, alternating:

    fast store   CPU seconds of the client (all its threads) per GB and MB/s: boto3's `Body.read(1 MiB)`, the cheapest
                 plain client measured; `S3Stream` read 1 MiB at a time; and the tar of 35 kB samples read through
                 `sigray.workers.data.tar.read_tar`. `cpu_over_boto3` is the 1 MiB reads' ratio.
    slow store   behind a proxy in its own process that answers 30 ms late and at 60 MB/s per connection, as Amazon's S3
                 does: MB/s of one plain boto3 stream and of `S3Stream`, which has the default of 4 connections.
                 `speedup_slow_store` is over objects read one after another, as shards are.

Both figures are medians over the repetitions of ratios within one repetition.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
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
from botocore.config import Config

from benchmarks.common import report
from sigray.workers.config import StoresConfig
from sigray.workers.data.s3 import ObjectInfo, S3Stream, split_s3_url, stat
from sigray.workers.data.tar import read_tar
from tests.helpers.faultproxy import throttled
from tests.helpers.s3 import BUCKET, s3_server

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
    bucket, key = split_s3_url(info.url)
    body, count = client.get_object(Bucket=bucket, Key=key)["Body"], 0
    while piece := body.read(MIB):
        count += len(piece)
    return count


def sigray_stream(s3: StoresConfig, info: ObjectInfo) -> int:
    count = 0
    with contextlib.closing(S3Stream(info, s3)) as stream:
        while stream.position < info.num_bytes:
            count += len(stream.read(min(MIB, info.num_bytes - stream.position)))
    assert not stream.retries, stream.retries
    return count


def sigray_tar(s3: StoresConfig, info: ObjectInfo) -> int:
    with contextlib.closing(S3Stream(info, s3)) as stream:
        return sum(sum(map(len, sample.members.values())) for sample in read_tar(stream))


def read_all(read: Callable[[ObjectInfo], int], infos: list[ObjectInfo]) -> int:
    return sum(map(read, infos))


def timed(run: Callable[[], int], num_bytes: int) -> tuple[float, float]:
    """CPU seconds per GB (1e9 bytes) and MB/s (1e6 bytes)."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return cpu / num_bytes * 1e9, num_bytes / wall / 1e6


def measure_fast(endpoint: str, infos: list[ObjectInfo], num_repetitions: int) -> list[dict[str, float]]:
    s3, plain = StoresConfig(s3_endpoint=endpoint), plain_client(endpoint)
    contestants: dict[str, Callable[[ObjectInfo], int]] = {
        "boto3": lambda info: boto3_stream(plain, info),
        "sigray": lambda info: sigray_stream(s3, info),
        "tar": lambda info: sigray_tar(s3, info),
    }
    for run in contestants.values():  # the server's cache, connections
        for info in infos:
            run(info)
    repetitions = []
    for _ in range(num_repetitions):
        repetition: dict[str, float] = {}
        for name, run in contestants.items():
            cpu, rate = timed(functools.partial(read_all, run, infos), sum(info.num_bytes for info in infos))
            repetition |= {f"{name}_cpu_s_per_gb": cpu, f"{name}_mb_per_s": rate}
        repetitions.append(repetition)
        print(" ".join(f"{key}={value:.4g}" for key, value in repetition.items()), flush=True)
    return repetitions


def measure_slow(endpoint: str, infos: list[ObjectInfo], num_repetitions: int) -> list[dict[str, float]]:
    s3, plain = StoresConfig(s3_endpoint=endpoint), plain_client(endpoint)
    repetitions = []
    for _ in range(num_repetitions):
        # One object is enough for the plain stream: it learns nothing from it.
        _, plain_rate = timed(lambda: boto3_stream(plain, infos[0]), infos[0].num_bytes)
        cpu, rate = timed(lambda: sum(sigray_stream(s3, info) for info in infos), sum(info.num_bytes for info in infos))
        repetitions.append(
            {"slow_boto3_mb_per_s": plain_rate, "slow_sigray_mb_per_s": rate, "slow_sigray_cpu_s_per_gb": cpu}
        )
        print(" ".join(f"{key}={value:.4g}" for key, value in repetitions[-1].items()), flush=True)
    return repetitions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="of each of two objects")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder)) as variables:
        os.environ |= variables
        endpoint, content = variables["AWS_ENDPOINT_URL"], build_tar(options.mib * MIB)
        infos = []
        for key in ("0.tar", "1.tar"):
            plain_client(endpoint).put_object(Bucket=BUCKET, Key=key, Body=content)
            infos.append(stat(f"s3://{BUCKET}/{key}", StoresConfig(s3_endpoint=endpoint)))
        with contextlib.closing(S3Stream(infos[0], StoresConfig(s3_endpoint=endpoint))) as stream:
            assert hashlib.md5(stream.read(infos[0].num_bytes)).digest() == hashlib.md5(content).digest()
        fast = measure_fast(endpoint, infos, options.repetitions)
        with throttled(endpoint, LATENCY_S, BYTES_PER_S) as slow_endpoint:
            slow = measure_slow(slow_endpoint, infos, max(5, options.repetitions // 2))
    figures = {
        "cpu_over_boto3": statistics.median(r["sigray_cpu_s_per_gb"] / r["boto3_cpu_s_per_gb"] for r in fast),
        "speedup_slow_store": statistics.median(r["slow_sigray_mb_per_s"] / r["slow_boto3_mb_per_s"] for r in slow),
    }
    report("s3", fast + slow, figures, options.save)


if __name__ == "__main__":
    main()
