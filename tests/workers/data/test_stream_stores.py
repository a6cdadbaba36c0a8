"""The stream from a server of each store that keeps failing: the batches of the same tars on disk."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sigray.workers.config import DataConfig, ModelConfig, StoresConfig
from sigray.workers.data.loader import Batch, Loader
from sigray.workers.data.manifest import Manifest, scan_shards
from sigray.workers.data.store_stream import StoreStream
from sigray.workers.data.tar import DataError
from sigray.workers.data.worker import DataWorker, build_order, image_kind
from sigray.workers.storage import Storage
from sigray.workers.stores import open_store
from sigray.workers.training.ledger import Ledger, audit
from tests.helpers.bare import OneWorker
from tests.helpers.data import write_tar
from tests.helpers.faultproxy import FaultProxy, drawn
from tests.helpers.s3 import BUCKET
from tests.helpers.stored import ENDPOINTS, SCHEMES, Servers

PART = 1 << 14
BATCH, SEED, NUM_STEPS = 20, 5, 32  # 640 of 300 samples: two epochs and a bit


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 JPEGs of noise, 10 kB each, in six shards."""
    folder, rng = tmp_path_factory.mktemp("noise"), np.random.RandomState(0)
    for shard in range(6):
        samples = []
        for number in range(50):
            buffer = io.BytesIO()
            Image.fromarray(rng.randint(0, 256, (96, 96, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=90)
            key = f"{shard}-{number}"
            samples.append({"__key__": key, "jpg": buffer.getvalue(), "txt": f"noise {key}"})
        write_tar(folder / f"shard-{shard}.tar", samples)
    return folder


@pytest.fixture(scope="module", params=SCHEMES)
def bucket(request: pytest.FixtureRequest, tars: Path, servers: Servers) -> Iterator[str]:
    """The URL of a bucket with the tars; the environment leads to its server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in servers.variables(request.param).items():
            patch.setenv(name, value)
        bucket = f"{request.param}://{BUCKET}"
        for path in tars.iterdir():
            put(f"{bucket}/tars/{path.name}", path.read_bytes())
        yield bucket


@pytest.fixture
def proxy(bucket: str) -> Iterator[FaultProxy]:
    with FaultProxy(os.environ[ENDPOINTS[bucket[:2]]]) as proxy:
        yield proxy


def put(url: str, content: bytes) -> None:
    store, key = open_store(url)
    store.put(key, content)


def through(proxy: FaultProxy, bucket: str, **changes: object) -> StoresConfig:
    account = "/devstoreaccount1" if bucket.startswith("az") else ""
    return StoresConfig(**{f"{bucket[:2]}_endpoint": proxy.endpoint + account}, **changes)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many GETs for few bytes."""
    monkeypatch.setitem(StoreStream.__init__.__kwdefaults__, "part_bytes", PART)


def data_of(shards: str, stores: StoresConfig) -> DataConfig:
    return DataConfig(shards=shards, num_lanes=3, shuffle_window=30, block_size=8, stores=stores)


def read(manifest: Manifest, data: DataConfig, model: ModelConfig, folder: Path, first_step: int = 0) -> list[Batch]:
    """All batches from a step on; what was read stands in the ledger in `folder`."""
    loader = Loader(
        build_order(manifest, data, SEED),
        OneWorker(DataWorker(manifest, data, model, seed=SEED)),
        data.model_copy(update={"prefetch_batches": 2, "max_bad_fraction": 0}),
        image_kind=image_kind(manifest, model),
        global_batch_size=BATCH,
        rank=0,
        world_size=1,
        first_step=first_step,
        last_step=NUM_STEPS,
    )
    ledger, batches = Ledger(Storage(folder), rank=0, first_step=first_step, warn=print), []
    for batch in loader:
        ledger.add(batch)
        batches.append(batch)
    ledger.write(NUM_STEPS)
    ledger.close(60)
    return batches


def test_a_store_that_keeps_failing_changes_nothing(tars, bucket, proxy, model_config, tmp_path, small_parts):
    """Over 100 faults of ten kinds in two epochs: no sample lost, doubled or altered."""
    local = data_of(str(tars), StoresConfig())
    expected = read(scan_shards(local.shards, local), local, model_config, tmp_path / "local")
    kinds = ("reset", "close", "stall", "503", "429", "500", "hang up", "short", "redirect", "slow head")
    data = data_of(f"{bucket}/tars/", through(proxy, bucket, read_timeout_s=0.3, num_connections=2))
    manifest = scan_shards(data.shards, data)
    proxy.schedule = drawn(seed=1, share=0.3, kinds=kinds, most_bytes=PART)
    batches = read(manifest, data, model_config, tmp_path / "read")
    assert sum(proxy.faults.values()) >= 100, proxy.faults
    assert set(proxy.faults) == set(kinds)
    for want, got in zip(expected, batches, strict=True):
        np.testing.assert_array_equal(got.images.numpy(), want.images.numpy())
        np.testing.assert_array_equal(got.tokens.numpy(), want.tokens.numpy())
        assert got.keys == want.keys
    found = audit(Storage(tmp_path / "read"), manifest, build_order(manifest, data, SEED), BATCH)
    assert found.is_exact
    assert [epoch.num_used for epoch in found.epochs] == [300, 300, 40]


def test_a_resume_reads_no_more_than_a_window_per_lane(bucket, proxy, model_config, tmp_path, monkeypatch, small_parts):
    """Besides the prefetched window and the samples after the mark of the manifest before it: 10 here, not 256."""
    monkeypatch.setattr("sigray.workers.data.manifest._MARK_EVERY", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = data_of(f"{bucket}/tars/", through(proxy, bucket, num_connections=2))
    manifest = scan_shards(data.shards, data)
    order = build_order(manifest, data, SEED)
    sample_bytes = manifest.num_bytes / manifest.num_samples
    for step in (3, 9, 21):
        worker = DataWorker(manifest, data, model_config, seed=SEED)
        before = proxy.num_sent
        for lane in range(3):
            index = order.next_index(lane, step, BATCH)
            window, _ = order.window(lane, index)
            assert len(worker._windows.get(lane, index)[0]) == len(window.permutation) <= 30
        for _, prefetched in worker._windows._prefetched.values():
            prefetched.result()
        # Per lane: two windows in two shards each at most, each with a mark's distance and three parts in flight.
        assert proxy.num_sent - before <= 3 * (2 * 30 * sample_bytes + 4 * (10 * sample_bytes + 3 * PART))
        assert proxy.num_sent - before < 0.9 * manifest.num_bytes


def test_an_object_replaced_under_the_run_is_an_error(tars, bucket, model_config, tmp_path):
    data = data_of(f"{bucket}/replaced/", StoresConfig())
    content = (tars / "shard-0.tar").read_bytes()
    put(f"{bucket}/replaced/a.tar", content)
    manifest = scan_shards(data.shards, data)
    put(f"{bucket}/replaced/a.tar", content[:-1] + b"\1")
    with pytest.raises(DataError, match=r"a.tar was replaced since the run's manifest was made"):
        read(manifest, data, model_config, tmp_path)


def test_the_shard_cache_serves_later_epochs(bucket, proxy, model_config, tmp_path):
    data = data_of(f"{bucket}/tars/", StoresConfig())
    manifest = scan_shards(data.shards, data)
    expected = read(manifest, data, model_config, tmp_path / "streamed")
    cached = data.model_copy(update={"stores": through(proxy, bucket), "shard_cache": str(tmp_path / "cache")})
    batches = read(manifest, cached, model_config, tmp_path / "cached")
    assert proxy.num_sent <= manifest.num_bytes  # each shard once, for two epochs
    for want, got in zip(expected, batches, strict=True):
        np.testing.assert_array_equal(got.images.numpy(), want.images.numpy())
