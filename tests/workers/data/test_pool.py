"""The stream through real data-shard workers under Ray, while they and their reader are killed, stopped and resized.

What must come out is computed without Ray, by one `DataWorker` in this process in which nothing dies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from sigray.orchestrator.cluster.pending import Autoscaler, Demand, cluster_hosts, find_autoscaler, pending_reason
from sigray.workers.config import DataConfig, ModelConfig
from sigray.workers.data.buffers import Place, SharedBuffer
from sigray.workers.data.loader import BlockSource, Loader
from sigray.workers.data.manifest import Manifest, scan_shards
from sigray.workers.data.pool import (
    DataPool,
    DataWorkerActor,
    PoolBlocks,
    in_tasks,
    may_send_backup,
    placement,
    start_here,
)
from sigray.workers.data.stream_registry import StreamRegistry
from sigray.workers.data.tar import DataError
from sigray.workers.data.worker import DataWorker, build_order, image_kind
from sigray.workers.model.tokenizer import train_tokenizer
from sigray.workers.storage import Storage
from sigray.workers.training.ledger import Ledger, audit
from tests.helpers.bare import OneWorker
from tests.helpers.data import TOWERS, drawn_sample, write_dataset, write_tar
from tests.helpers.processes import descendants_named

BATCH, SEED = 24, 5
BY_HAND = Autoscaler(runs=False)


@pytest.fixture
def pools(ray_driver: Any) -> Iterator[Callable[..., DataPool]]:
    """Makes a pool that is gone after the test, processes and all."""
    made: list[DataPool] = []

    def make(manifest: Manifest, data: DataConfig, model: ModelConfig) -> DataPool:
        made.append(DataPool(manifest, data, model, seed=SEED))
        made[-1].start()
        return made[-1]

    yield make
    for pool in made:
        pool.close()
    deadline = time.monotonic() + 30
    while descendants_named(os.getpid(), "ray::DataWorkerActor"):
        assert time.monotonic() < deadline, "data-shard workers outlive their pool"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """With a tokenizer that needs no open_clip: a data-shard worker is then up again in three seconds."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer((f"field number {n}" for n in range(100)), vocab_size=200, kind="bpe").save(str(path))
    return ModelConfig(towers=TOWERS, tokenizer=str(path))


class Group:
    """All training workers of one attempt, up to the loss: loaders in step, ledgers, and a commit every few steps."""

    def read(
        self,
        sources: list[BlockSource],
        manifest: Manifest,
        data: DataConfig,
        model: ModelConfig,
        *,
        folder: str,
        first_step: int,
        last_step: int,
        commit_every: int = 4,
        wait_at_every: int = 0,
    ) -> None:
        """Leaves `commit.json` (steps done, the digest of each global batch) and the ledger in `folder`.

        With `wait_at_every`, says in `waiting` when that many steps have passed, and goes on when the file is gone.
        """
        order, storage = build_order(manifest, data, SEED), Storage(folder)
        loaders = [
            Loader(
                order,
                source,
                data.model_copy(update={"prefetch_batches": 2}),
                image_kind=image_kind(manifest, model),
                global_batch_size=BATCH,
                rank=rank,
                world_size=len(sources),
                first_step=first_step,
                last_step=last_step,
            )
            for rank, source in enumerate(sources)
        ]
        ledgers = [Ledger(storage, rank, first_step, print) for rank in range(len(sources))]
        digests = committed(Path(folder))["digests"][:first_step]
        for parts in zip(*loaders, strict=True):
            if wait_at_every and parts[0].step % wait_at_every == 0:
                Path(folder, "waiting").touch()
                while Path(folder, "waiting").exists():
                    time.sleep(0.02)
            digest = hashlib.sha256()
            for name in ("images", "tokens"):  # of the global batch, however it is cut
                for part in parts:
                    digest.update(getattr(part, name).numpy().tobytes())
            digests.append(digest.hexdigest())
            for ledger, part in zip(ledgers, parts, strict=True):
                ledger.add(part)
                part.release()
            steps_done = parts[0].step + 1
            if steps_done % commit_every == 0 or steps_done == last_step:
                for ledger in ledgers:
                    ledger.write(steps_done)
                for ledger in ledgers:
                    ledger.wait(60)
                storage.write("commit.json", json.dumps({"steps": steps_done, "digests": digests}).encode())


def committed(folder: Path) -> dict[str, Any]:
    path = folder / "commit.json"
    return json.loads(path.read_text()) if path.exists() else {"steps": 0, "digests": []}


def undisturbed(manifest: Manifest, data: DataConfig, model: ModelConfig, folder: Path, num_steps: int) -> list[str]:
    """The digests of all global batches, from one worker in this process."""
    source = OneWorker(DataWorker(manifest, data, model, seed=SEED))
    Group().read([source], manifest, data, model, folder=str(folder), first_step=0, last_step=num_steps)
    return committed(folder)["digests"]


def test_ledger_of_a_stream_in_which_everything_dies(ray_driver, minutes, pools, model, tmp_path):
    """Two epochs; 50 kills of data-shard workers and of the reader; 1 to 4 training workers, 1 to 3 data workers."""
    import ray

    rng = random.Random(7)
    write_dataset(tmp_path / "tars", [150, 90, 160, 80])
    write_tar(tmp_path / "tars" / "bad.tar", [drawn_sample(n) | {"png": b"no image"} for n in range(480, 484)])
    write_dataset(tmp_path / "more", [57])
    parts = {
        "fields": {"shards": str(tmp_path / "tars"), "weight": 2},
        "more": {"shards": str(tmp_path / "more"), "weight": 1},
    }
    data = DataConfig(
        shards=parts,
        num_lanes=4,
        shuffle_window=40,
        block_size=8,
        num_workers=2,
        cpus_per_worker=0,
        max_bad_fraction=0.1,
        worker_timeout_s=30,
    )
    manifest = scan_shards(data.shards, data)
    order = build_order(manifest, data, SEED)
    num_steps = 76
    assert order.num_of_dataset(0, num_steps * BATCH) > 2 * order.datasets[0].num_samples
    folder = tmp_path / "run"
    folder.mkdir()
    expected = undisturbed(manifest, data, model, tmp_path / "undisturbed", num_steps)

    num_kills, attempts, waiting = 0, [], folder / "waiting"
    pool = pools(manifest, data, model)
    group_actor = ray.remote(num_cpus=0, max_restarts=0)(Group)

    def kill(pid: int) -> None:
        nonlocal num_kills
        os.kill(pid, signal.SIGKILL)
        num_kills += 1

    while (first_step := committed(folder)["steps"]) < num_steps:
        world_size = [3, 1, 4, 2][len(attempts) % 4]
        attempts.append((first_step, world_size))
        group = group_actor.remote()
        running = group.read.remote(
            [PoolBlocks(pool.registry, data.worker_timeout_s) for _ in range(world_size)],
            manifest,
            data,
            model,
            folder=str(folder),
            first_step=first_step,
            last_step=num_steps,
            wait_at_every=2,
        )
        num_pauses_to_live = rng.randint(2, 5)
        while not ray.wait([running], timeout=0.02)[0]:
            pool.poll()
            if not waiting.exists():
                continue
            time.sleep(rng.uniform(0, 0.3))  # prefetched blocks are then in any state
            num_pauses_to_live -= 1
            if num_pauses_to_live < 0 and committed(folder)["steps"] > first_step:
                for pid in descendants_named(os.getpid(), "ray::Group"):
                    kill(pid)
                waiting.unlink()
                break
            workers = descendants_named(os.getpid(), "ray::DataWorkerActor")
            for victim in rng.sample(workers, min(rng.choice([1, 2, 3, 3]), len(workers))):
                kill(victim)
            pool.resize(rng.choice([1, 2, 3, 3, 3]))
            waiting.unlink()
        try:
            ray.get(running)
        except ray.exceptions.RayActorError:
            continue

    assert num_kills >= 50
    assert {world_size for _, world_size in attempts} == {1, 2, 3, 4}, attempts
    assert committed(folder)["digests"] == expected
    found = audit(Storage(folder), manifest, order, BATCH)
    assert found.is_exact, found
    over = [(epoch.dataset, epoch.epoch) for epoch in found.epochs if epoch.is_over]
    assert over[:2] == [("fields", 0), ("fields", 1)]
    assert found.epochs[0].num_used == 484
    assert found.epochs[0].num_replaced == 4
    for epoch in found.epochs:
        assert epoch.num_used == epoch.num_samples or not epoch.is_over


def test_headers_are_read_on_the_cluster(ray_driver, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_dataset(tmp_path / "tars", [12, 7, 9])
    data = DataConfig(shards=str(tmp_path / "tars"))
    manifest = scan_shards(data.shards, data, parallel_map=in_tasks)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert manifest == scan_shards(data.shards, data)
    path = Path(manifest.shards[1].url)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"shard-001\.tar: cut short"):
        scan_shards(data.shards, data, parallel_map=in_tasks)


def test_a_block_that_kills_its_workers_is_named(ray_driver, model, data_config):
    """A worker that decodes it dies at once; the requests after it are answered."""
    num_retries = DataWorkerActor.block.__ray_max_task_retries__

    class Worker:
        def __init__(self, *arguments):
            self._worker = DataWorker(*arguments, seed=SEED)

        @ray.method(max_task_retries=num_retries)
        def block(self, lane, number, places, pixels):
            if (lane, number) == (1, 2):
                os._exit(1)
            return self._worker.block(lane, number)

        def describe(self, lane, number):
            return self._worker.describe(lane, number)

    manifest = scan_shards(data_config.shards, data_config)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Worker).remote(manifest, data_config, model)
    registry = start_here(StreamRegistry)
    ray.get(registry.publish.remote([ray.put([actor])]))
    blocks = PoolBlocks(registry, timeout_s=300)
    handles = {place: blocks.request(*place) for place in [(0, 0), (1, 2), (0, 1)]}
    try:
        assert len(blocks.wait(0, 0, handles[0, 0]).keys) == 4
        message = r"lane 1 block 2: .* died 6 times .*samples \d+ to \d+ of .*shard-\d+\.tar"
        with pytest.raises(DataError, match=message):
            blocks.wait(1, 2, handles[1, 2])
        assert len(blocks.wait(0, 1, handles[0, 1]).keys) == 4
    finally:
        for each in (actor, registry):
            ray.kill(each)


def test_few_late_workers_get_backup_requests_at_once_and_slow_ones_none():
    late = [n for n in range(1, 9) if may_send_backup(8 - n, n, 0, 0)]
    assert late == [1, 2, 3, 4]
    assert may_send_backup(1, 1, 0, 0)
    assert not may_send_backup(0, 1, 0, 0)
    # All are slow: the first worker answers before the backup.
    assert [n for n in range(200) if not may_send_backup(7, 1, 5, n)] == list(range(100))


def test_a_hung_worker_is_bypassed_and_replaced(pools, model, tmp_path):
    write_dataset(tmp_path / "tars", [200])
    data = DataConfig(
        shards=str(tmp_path / "tars"),
        num_lanes=6,
        shuffle_window=20,
        block_size=4,
        num_workers=2,
        cpus_per_worker=0,
        worker_timeout_s=6,
    )
    manifest = scan_shards(data.shards, data)
    pool = pools(manifest, data, model)
    source = PoolBlocks(pool.registry, data.worker_timeout_s)
    alone = DataWorker(manifest, data, model, seed=SEED)
    want = alone.block(0, 0).images
    memory = [SharedBuffer(want.shape, want.dtype) for _ in range(120)]
    stragglers: dict[int, np.ndarray] = {}  # contents of the places of stragglers, when a backup had answered

    def check(number: int) -> None:
        for lane in range(6):
            buffer = memory[(6 * number + lane) % len(memory)]
            places = [Place(buffer.address, 0, 0, data.block_size)] if number < 20 and buffer.address else []
            block = source.wait(lane, number, source.request(lane, number, places))
            expected = alone.block(lane, number)
            if block.has_straggler:
                stragglers[6 * number + lane] = buffer.array.copy()
            if len(block.images):
                assert block.has_straggler or not places
                assert (block.images == expected.images).all()
            else:
                assert (buffer.array == expected.images).all()
            assert block.keys == expected.keys

    for number in range(3):
        check(number)
    stragglers.clear()  # on a busy machine a worker may have been slow already
    hung = min(descendants_named(os.getpid(), "ray::DataWorkerActor"))
    os.kill(hung, signal.SIGSTOP)
    begin = time.monotonic()
    try:
        for number in range(3, 8):
            check(number)
        # The other worker answers for the three lanes of the hung one: one wait, long before the timeout.
        assert time.monotonic() - begin < 5
        assert stragglers
        assert not any(before.any() for before in stragglers.values())
        deadline = time.monotonic() + 60
        number = 8
        while hung in descendants_named(os.getpid(), "ray::DataWorkerActor"):
            assert time.monotonic() < deadline, "the hung worker is still there"
            check(number)
            number += 1
            time.sleep(0.3)
    finally:
        if hung in descendants_named(os.getpid(), "ray::DataWorkerActor"):
            os.kill(hung, signal.SIGKILL)
    check(number)
    # Ray repeated the request to the replacement, which wrote the same after the block had come from the backup.
    place = min(stragglers)
    while not memory[place].array.any():
        assert time.monotonic() < deadline + 30, "no worker was a straggler, so this test shows nothing"
        time.sleep(0.1)


def test_workers_on_other_machines_send_images_and_get_no_places_again(pools, model, data_config, monkeypatch):
    # On a busy machine no worker counts as a straggler, so there are no backup requests.
    monkeypatch.setattr("sigray.workers.data.pool._STRAGGLER_FACTOR", 1e9)
    manifest = scan_shards(data_config.shards, data_config)
    pool = pools(manifest, data_config.model_copy(update={"num_workers": 2, "cpus_per_worker": 0}), model)
    source, has_places = PoolBlocks(pool.registry, 240), []
    expected = DataWorker(manifest, data_config, model, seed=SEED).block(0, 0)
    buffer = SharedBuffer(expected.images.shape, expected.images.dtype)
    assert buffer.address is not None
    remote = Place(dataclasses.replace(buffer.address, name="on another machine"), 0, 0, data_config.block_size)
    assert source.shares_memory
    for lane in (0, 0, 1, 1):
        handle = source.request(lane, 0, [remote])
        has_places.append(handle.has_places)
        block = source.wait(lane, 0, handle)
        assert len(block.images)
        assert not block.has_straggler
        assert source.shares_memory == (len(has_places) < 3)
    assert has_places == [True, False, True, False]


def test_two_subscribers_of_a_stream_share_the_decoding(pools, model, tmp_path):
    """Inside the window each block is decoded once, whatever their speeds; outside it a subscriber is served too."""
    write_dataset(tmp_path / "tars", [300])
    data = DataConfig(
        shards=str(tmp_path / "tars"),
        num_lanes=2,
        shuffle_window=20,
        block_size=4,
        num_workers=1,
        cpus_per_worker=0,
        shared_blocks=6,
    )
    manifest = scan_shards(data.shards, data)
    pool = pools(manifest, data, model)
    readers = [PoolBlocks(pool.registry, data.worker_timeout_s) for _ in range(2)]
    alone = DataWorker(manifest, data, model, seed=SEED)

    def read(reader: int, number: int) -> float:
        block = readers[reader].wait(0, number, readers[reader].request(0, number))
        assert (block.images == alone.block(0, number).images).all()
        return block.decode_s

    seen = {}
    for number in range(20):
        seen[number] = read(0, number)
        if number >= 4:
            # The same block: its decode time is that of the first request.
            assert read(1, number - 4) == seen[number - 4]
    assert read(1, 3) != seen[3]  # outside the window: decoded again


def test_hosts_without_accelerators_are_preferred_and_not_required(ray_driver, pools, data_config, model):
    """Two more hosts, one of which says that it has a GPU: three workers of four CPUs on eight, two and four."""
    import ray

    with_gpu = ray_driver.add_node(num_cpus=4, num_gpus=1, object_store_memory=100 * 2**20)
    without = ray_driver.add_node(num_cpus=2, object_store_memory=100 * 2**20)
    ray_driver.wait_for_nodes()
    try:
        manifest = scan_shards(data_config.shards, data_config)
        pool = pools(manifest, data_config.model_copy(update={"num_workers": 3, "cpus_per_worker": 4}), model)
        where = [actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for actor in pool._actors]
        used = Counter(ray.get(where))
        assert used == {ray_driver.head_node.node_id: 2, with_gpu.node_id: 1}
        # What a run that waits would say: four of the GPU host's CPUs are taken by a data-shard worker.
        demands = [Demand(1, {"GPU": 1.0}), Demand(1, {"GPU": 1, "CPU": 1})]
        said = [pending_reason(demand, cluster_hosts(), BY_HAND) for demand in demands]
        assert said == [
            "needs 1 training worker of 1 GPU, has them: waiting for Ray to place them",
            "needs 1 training worker of 1 GPU, 1 CPU, has 1, 0 free: waiting until the others are released",
        ]
        assert find_autoscaler(ray.get_runtime_context().gcs_address) in (None, BY_HAND)
    finally:
        for node in (with_gpu, without):
            ray_driver.remove_node(node)


def test_placement_of_data_shard_workers():
    def host(name: str, alive: bool = True, **resources: float) -> dict[str, Any]:
        labels = {"ray.io/accelerator-type": "A100"} if name.startswith("labelled") else {}
        return {"NodeID": name, "Alive": alive, "Resources": {"CPU": 8.0, **resources}, "Labels": labels}

    cpu, gpu, tpu = host("cpu"), host("gpu", GPU=1.0), host("tpu", TPU=4.0)
    for alike in ([cpu], [cpu, cpu], [gpu, tpu], [cpu, host("dead", alive=False, GPU=1.0)], [cpu, host("none", GPU=0)]):
        assert placement(alike) == "SPREAD"
    mixed = placement([cpu, gpu, tpu, host("labelled")])
    assert mixed.hard == []
    soft = {expression.key: expression.operator for expression in mixed.soft}
    assert soft["ray.io/node-id"].values == ["gpu", "tpu", "labelled"]
    assert type(soft["ray.io/accelerator-type"]).__name__ == "DoesNotExist"
