"""Each key of a run's YAML at the far end of the wiring: what a small run did with the value that was set.

`tests/mutations/keys.py` names, for each key, the test that fails if the run reads the key's default instead. Expected
values are constants: a fault in a section would also change an expectation that is computed from the section.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore.store
import pytest
import ray.train.torch  # noqa: F401 - before anything of Ray is replaced
import torch
from rich.console import Console

import sigray.workers.data.decode
import sigray.workers.data.embed
import sigray.workers.data.pool
import sigray.workers.data.shard_cache
import sigray.workers.data.store_stream
import sigray.workers.data.worker
import sigray.workers.device
import sigray.workers.evaluation.evaluate
import sigray.workers.evaluation.features
import sigray.workers.stores
import sigray.workers.training.train
from sigray.orchestrator.config import RunConfig
from sigray.orchestrator.data.audit import audit_run
from sigray.orchestrator.run import driver, monitor, places, policy, preflight, records, supervisor
from sigray.orchestrator.run.embed import embed
from sigray.orchestrator.run.evaluations import evaluates_at_start
from sigray.orchestrator.run.preflight import with_inputs
from sigray.orchestrator.run.ray_session import ray_session
from sigray.orchestrator.run.supervisor import PoolAutoscaler
from sigray.orchestrator.run.trial import Rungs
from sigray.orchestrator.run.worker_group import train_job
from sigray.orchestrator.run_folder import RunFolder
from sigray.workers.checkpoint.async_writer import BackgroundWriter
from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.checkpoint.writer import read_best, read_left_out
from sigray.workers.config import LabelNoise, ModelConfig
from sigray.workers.data.embedding_store import EmbeddingStore, StoreFormat
from sigray.workers.data.label_noise import Noise
from sigray.workers.data.loader import Batch
from sigray.workers.data.manifest import Shard, open_shard, scan_shards
from sigray.workers.data.order import StreamOrder
from sigray.workers.data.pool import DataPool, PoolBlocks
from sigray.workers.data.store_stream import StoreStream
from sigray.workers.data.tar import DataError
from sigray.workers.data.worker import Block, DataWorker
from sigray.workers.model.decoder import Decoder
from sigray.workers.model.tokenizer import build_tokenizer
from sigray.workers.model.towers import build_model
from sigray.workers.storage import Storage
from sigray.workers.training.step import StepResult, Trainer
from sigray.workers.training.student import Student
from sigray.workers.training.train import train_loop_per_worker
from tests.helpers.bare import OneWorker, Recorder
from tests.helpers.data import COLOURS, TOWERS, drawn_sample, encode_image, write_dataset, write_tar
from tests.helpers.plain_ray import NoCallback, PlainRay


class Enough(ValueError):
    """Ends a run that has shown what a test wants to see."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 40 and 24 samples in `train`."""
    folder = tmp_path_factory.mktemp("keys")
    write_dataset(folder / "train", [40, 24])
    return folder


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def configure(folder: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A run over `folder`, with these sections put over small ones."""

    def make(**sections: dict[str, Any]) -> RunConfig:
        content: dict[str, Any] = {
            "run": {"name": "small", "dir": str(tmp_path / "runs"), "trackers": []},
            "data": {"shards": str(folder / "train"), "block_size": 8, "num_lanes": 2, "shuffle_window": 16},
            "model": {"towers": copy.deepcopy(TOWERS)},
            "train": {"num_samples": 48, "global_batch_size": 8},
        }
        for name, section in sections.items():
            content[name] = content.get(name, {}) | section
        return RunConfig.model_validate(content)

    return make


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> PlainRay:
    return PlainRay(monkeypatch)


def drive(config: RunConfig) -> dict[str, Any]:
    """The whole run."""
    return driver.train(config, Console(file=io.StringIO())).summary


def end_at_once(_: Callable[[dict[str, Any]], None]) -> None:
    """In the place of a training worker."""
    raise Enough


class Spy:
    """What a training worker made of its job.

    Attributes:
        trainers: its Trainer.
        batches: those that entered a step.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trainers: list[Trainer] = []
        self.batches: list[Batch] = []
        self.before_step: Callable[[Trainer, Batch], None] = lambda trainer, batch: None
        self.after_step: Callable[[Batch, StepResult], None] = lambda batch, result: None
        spy = self

        class Watched(Trainer):
            def __init__(self, *arguments: Any, **named: Any) -> None:
                super().__init__(*arguments, **named)
                spy.trainers.append(self)

            def step(self, batch: Batch) -> StepResult:
                spy.before_step(self, batch)
                spy.batches.append(copy.copy(batch))
                spy.batches[-1].images = batch.images.clone()  # the loop releases the batch after the step
                result = super().step(batch)
                spy.after_step(batch, result)
                return result

        monkeypatch.setattr(sigray.workers.training.train, "Trainer", Watched)

    @property
    def trainer(self) -> Trainer:
        return self.trainers[-1]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def train_here(
    config: RunConfig,
    source: Any = None,
    last_step: int | None = None,
    rungs: frozenset[int] = frozenset(),
    *,
    saves_start: bool = False,
) -> Recorder:
    """One training worker without a process group; `source` in the place of a data-shard worker in this process."""
    manifest, recorder = scan_shards(config.data.shards, config.data), Recorder(last_step)
    source = source or OneWorker(DataWorker(manifest, config.data, config.model, seed=config.run.seed))
    job = train_job(config, 1, manifest, source, recorder, rungs=rungs)
    train_loop_per_worker(dataclasses.replace(job, saves_start=saves_start))
    return recorder


# What Ray is asked for.


def test_ray_is_asked_for_the_workers_that_the_config_wants(configure, plain, monkeypatch):
    timeouts = []

    class Watched(PoolBlocks):
        def __init__(self, registry: Any, timeout_s: float, subscriber: str | None = None) -> None:
            timeouts.append(timeout_s)
            super().__init__(registry, timeout_s, subscriber)

    monkeypatch.setattr("sigray.workers.data.pool.PoolBlocks", Watched)
    plain.train = end_at_once
    config = configure(
        data={
            "num_workers": [2, 3],
            "cpus_per_worker": 2.5,
            "resources_per_worker": {"reads": 1},
            "worker_timeout_s": 33,
        },
        cluster={
            "num_workers": 2,
            "cpus_per_worker": 30,
            "resources_per_worker": {"trains": 2},
            "train_callbacks": ["tests.helpers.plain_ray:NoCallback"],
            "dashboard": True,
        },
        eval={"num_workers": 20, "cpus_per_worker": 5},
    )
    with contextlib.suppress(Enough):
        drive(config)
    (started,) = plain.started
    assert started["num_cpus"] == 168  # 3 x 2.5 to decode, 2 x 30 to train, 20 x 5 to evaluate
    assert started["resources"] == {"reads": 3, "trains": 4}
    assert started["include_dashboard"] is True
    assert os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "1"  # what the dashboard shows of it
    workers_of_data = plain.options_of("DataWorkerActor")
    assert [(one["num_cpus"], one["resources"]) for one in workers_of_data] == [(2.5, {"reads": 1})] * 2
    assert timeouts == [33]
    resources = {"CPU": 30.0, "trains": 2.0}
    assert plain.groups[0] == [resources] * 2 + [{"CPU": 2.5, "reads": 1}] * 2
    scaling = plain.trainers[0]["scaling_config"]
    assert (scaling.num_workers, scaling.resources_per_worker) == (2, resources)
    assert [type(one) for one in plain.trainers[0]["run_config"].callbacks or ()] == [NoCallback]


def test_a_sweep_has_room_for_all_its_trials(configure, plain):
    config = configure(
        data={"num_workers": 3, "cpus_per_worker": 2.5, "resources_per_worker": {"reads": 1}},
        cluster={"num_workers": 2, "cpus_per_worker": 30, "resources_per_worker": {"trains": 2}},
        eval={"num_workers": 20, "cpus_per_worker": 5},
    )
    with ray_session(config, types.SimpleNamespace(say=lambda *_: None), num_trials=3):
        pass
    (started,) = plain.started
    # Two streams of 3 x 2.5; of each trial 2 x 30 to train, 20 x 5 to evaluate and half a CPU for its driver.
    assert started["num_cpus"] == 497
    assert started["resources"] == {"reads": 6, "trains": 12}


def test_a_trial_reads_on_from_its_block(configure, plain):
    expected: list[int] = []
    pool = types.SimpleNamespace(subscribe=expected.append)
    trial = types.SimpleNamespace(pool=pool, rungs=(), passed=frozenset())
    config = configure(data={"num_lanes": 2, "block_size": 4})
    Rungs(config, RunFolder(config), None, trial).subscribe(10)
    assert expected == [10]  # 80 samples, 40 of each lane


def test_the_data_shard_workers_stay_within_their_range(configure, plain):
    config = configure(data={"num_workers": [2, 3]})
    manifest = scan_shards(config.data.shards, config.data)
    pool = DataPool(manifest, config.data, config.model, seed=0)
    pool.start()
    autoscaler = PoolAutoscaler(pool, config.data.num_workers, types.SimpleNamespace(say=lambda *_: None))
    for _ in range(30):  # the training workers wait all the time
        autoscaler.metrics({"data/wait_pct": 90.0, "data/busy_workers": 2.0})
    assert pool.size == 3


def test_a_cluster_that_is_there_is_joined(configure, plain):
    plain.train = end_at_once
    with contextlib.suppress(Enough):
        drive(configure(cluster={"address": "10.0.0.1:6379"}))
    assert [started["address"] for started in plain.started] == ["10.0.0.1:6379"]


@pytest.mark.parametrize(
    ("cluster", "opened", "uses_gpu", "backend"),
    [
        ({"accelerator": "cuda", "num_workers": 2}, ("cuda", 0, "bf16", 1), True, "TorchConfig"),
        ({"accelerator": "xla_cpu", "devices_per_worker": 2}, ("xla_cpu", 0, "bf16", 2), False, "GlooConfig"),
    ],
)
def test_training_workers_open_their_devices(configure, plain, monkeypatch, cluster, opened, uses_gpu, backend):
    seen = []

    def open_device(*arguments: Any, splits_weights: bool) -> None:
        seen.append((*arguments, splits_weights))
        raise Enough

    monkeypatch.setattr(sigray.workers.training.train, "open_device", open_device)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with contextlib.suppress(Enough):
        drive(configure(cluster=cluster, train={"precision": "bf16"}, sharding={"weights": "split"}))
    assert seen == [(*opened, True)]
    assert plain.trainers[0]["scaling_config"].use_gpu is uses_gpu
    assert type(plain.trainers[0]["backend_config"]).__name__ == backend


def test_a_slice_is_reserved_as_a_whole(configure, plain):
    plain.train = end_at_once
    slices = {"tpu_type": "TPU-V4", "tpu_topology": "2x2x2"}
    with contextlib.suppress(Enough):
        drive(configure(cluster={"accelerator": "xla_cpu", "devices_per_worker": 2, "num_workers": 2, **slices}))
    scaling = plain.trainers[0]["scaling_config"]
    assert (scaling.use_tpu, scaling.accelerator_type, scaling.topology) == (True, "TPU-V4", "2x2x2")
    assert scaling.resources_per_worker == {"CPU": 1.0, "TPU": 4.0}


def test_a_named_device_refuses_what_does_not_fit(configure, plain):
    plain.train = end_at_once
    towers = copy.deepcopy(TOWERS)
    towers["text_cfg"] |= {"width": 16_384, "layers": 16}  # 800 GB with AdamW's state
    with pytest.raises(ValueError, match="l4"):
        drive(configure(model={"towers": towers}, cluster={"accelerator": "cuda", "device": "l4"}))


# What ends and restarts a run.


def test_failures_within_an_hour_are_counted(configure, plain, monkeypatch):
    monkeypatch.setattr(policy, "_FIRST_PAUSE_S", 0.0)
    attempts = []

    def fail(_: Callable[[dict[str, Any]], None]) -> None:
        attempts.append(len(attempts))
        raise ConnectionError(f"number {len(attempts)}")

    plain.train = fail
    with pytest.raises(policy.RunFailed):
        drive(configure(cluster={"max_failures_per_hour": 2}))
    assert len(attempts) == 3


def test_training_workers_that_hang_are_killed(configure, plain, spy):
    def hang(trainer: Trainer, batch: Batch) -> None:
        until = time.monotonic() + 5
        while not plain.killed and time.monotonic() < until:
            time.sleep(0.01)
        raise Enough

    spy.before_step = hang
    with contextlib.suppress(Enough):
        drive(configure(cluster={"hang_timeout_s": 0.3}, data={"worker_timeout_s": 0.2}))
    assert plain.killed[:1] == ["training worker"]


class Clock:
    """In the place of `time` in the driver: sleeping takes none."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.5)
        time.sleep(0.001)  # threads of the run


@pytest.mark.parametrize("patience_s", [40, 3])
def test_a_run_shrinks_after_some_patience(configure, plain, monkeypatch, patience_s):
    clock = Clock()
    monkeypatch.setattr(supervisor, "time", clock)
    monkeypatch.setattr(places, "time", clock)
    started_at: list[float] = []

    def train(_: Callable[[dict[str, Any]], None]) -> None:
        started_at.append(clock.now)
        raise Enough

    plain.train, plain.num_free = train, 2  # a training worker and a data-shard worker
    begin = clock.now
    with contextlib.suppress(Enough):
        drive(configure(cluster={"num_workers": [1, 2], "shrink_after_s": patience_s, "grow_after_s": 70}))
    assert plain.trainers[0]["scaling_config"].num_workers == 1
    assert patience_s <= started_at[0] - begin <= patience_s + 8  # a probe may take four seconds


@pytest.mark.parametrize("after_s", [35, 95])
def test_a_run_grows_after_some_training(configure, plain, monkeypatch, after_s):
    clock, begun_at, asked_at = Clock(), [], []
    monkeypatch.setattr(supervisor, "time", clock)
    monkeypatch.setattr(places, "time", clock)

    class Watched(monitor.RunMonitor):
        def begin(self, request: Any) -> None:
            begun_at.append(clock.now)
            plain.num_free = 1000
            super().begin(request)

        def request(self, request: Any) -> None:
            asked_at.append(clock.now)
            super().request(request)

    monkeypatch.setattr(driver, "RunMonitor", Watched)

    def train(_: Callable[[dict[str, Any]], None]) -> None:
        while not asked_at and clock.now - begun_at[0] < 200:
            time.sleep(0.001)
        raise Enough

    plain.train, plain.num_free = train, 2
    with contextlib.suppress(Enough):
        drive(configure(cluster={"num_workers": [1, 2], "shrink_after_s": 0, "grow_after_s": after_s}))
    assert asked_at
    assert after_s <= asked_at[0] - begun_at[0] <= after_s + 12  # there is a look each ten seconds


def test_a_loss_that_leaps_is_left_out(configure, plain, spy):
    def leap(batch: Batch, result: StepResult) -> None:
        if batch.step == 21:
            result.loss *= 3

    spy.after_step = leap
    config = configure(
        train={
            "num_samples": 48,
            "global_batch_size": 2,
            "log_every_steps": 24,
            "on_bad_loss": "rewind",
            "max_loss_ratio": 2,
        },
        optim={"lr": 1e-9},
    )
    with contextlib.suppress(FloatingPointError, ValueError, policy.RunFailed):
        drive(config)
    assert read_left_out(Storage(config.storage_uri)) == [22]


# What a training worker does.


def test_steps_lines_and_checkpoints(configure, monkeypatch, tmp_path):
    # While a checkpoint is written the next is not begun; here the run waits instead.
    monkeypatch.setattr(BackgroundWriter, "is_busy", property(lambda writer: writer.wait(60)))
    config = configure(
        run={"name": "named", "storage": str(tmp_path / "storage")},
        train={"num_samples": 96, "log_every_steps": 5},
        checkpoint={"save_every_steps": 4, "keep_newest": 1, "keep_every_samples": 60},
    )
    recorder = train_here(config)
    assert recorder.facts["global_batch_size"] == 8
    assert [line["step"] for line in recorder.lines] == [4, 5, 8, 10, 12]
    assert [info.step for info in recorder.checkpoints] == [4, 8, 12]
    # 64 samples were the first at or after 60.
    assert [info.step for info in list_checkpoints(Storage(str(tmp_path / "storage" / "named")))] == [8, 12]


def test_a_run_lies_where_the_config_says(configure, plain, monkeypatch, tmp_path):
    told: list[tuple[Any, ...]] = []
    for module, name in ((records, "RunMetrics"), (sigray.workers.data.pool, "WorkerMetrics")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *some, own=own: (told.append(some), own(*some))[1])
    plain.train = end_at_once
    run = {"name": "named", "dir": str(tmp_path / "here"), "storage": str(tmp_path / "there")}
    with contextlib.suppress(Enough):
        drive(configure(run=run, checkpoint={"save_every_s": 77}))
    assert (tmp_path / "here" / "named" / "events.jsonl").exists()
    assert (tmp_path / "there" / "named" / "config.yaml").exists()
    assert sorted(told) == [("named",), ("named", 77)]


def test_trackers_are_checked_and_fed(configure, plain, monkeypatch):
    told: list[list[str]] = []
    monkeypatch.setattr(preflight, "check_trackers", told.append)
    started = lambda folder, names, say, **_: (told.append(names), contextlib.nullcontext())[1]  # noqa: E731
    monkeypatch.setattr(driver, "TrackerProcess", started)
    plain.train = end_at_once
    with contextlib.suppress(Enough):
        drive(configure(run={"trackers": ["mlflow", "wandb"]}))
    assert told == [["mlflow", "wandb"]] * 2


def test_checkpoints_by_time(configure):
    config = configure(train={"log_every_steps": 2}, checkpoint={"save_every_steps": None, "save_every_s": 1e-6})
    assert train_here(config).checkpoints[0].step == 2


def test_the_best_checkpoint_is_marked(configure, plain, folder, tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps([{"id": name, "name": name} for name in COLOURS]))
    held_out = {"shards": str(folder / "train"), "classes": str(tmp_path / "classes.json")}
    config = configure(
        train={"num_samples": 16},
        eval={"sets": {"held_out": held_out}},
        checkpoint={"keep_best": "zero_shot.held_out.top5"},
    )
    drive(config)
    best = read_best(Storage(config.storage_uri))
    assert best is not None
    assert best[0] == "step-0000000002"


def test_the_initial_weights_are_evaluated(configure, plain, folder):
    """At 0 samples, once, beside the bits of a run without: a resume repeats only what no driver has evaluated."""
    sets = {"held_out": {"shards": str(folder / "train")}}
    summaries = {}
    for name, at_start in {"with": True, "without": None}.items():
        config = configure(
            run={"name": name}, train={"num_samples": 16, "ledger": True}, eval={"sets": sets, "at_start": at_start}
        )
        drive(config)
        summaries[name] = list_checkpoints(Storage(config.storage_uri))
        if name == "with":
            started = config
    assert [info.step for info in summaries["with"]] == [0, 2]
    assert summaries["with"][0].samples_seen == 0
    assert [info.step for info in summaries["without"]] == [2]
    assert summaries["with"][-1].files == summaries["without"][-1].files
    first = started.folder / "evaluations" / "step-0000000000.json"
    assert json.loads(first.read_text())["samples_seen"] == 0
    assert audit_run(started).audit.is_exact
    for is_lost in (False, True):
        times = first.stat().st_mtime_ns
        if is_lost:
            first.unlink()
        drive(started)
        assert (first.stat().st_mtime_ns != times) == is_lost
    assert [info.step for info in list_checkpoints(Storage(started.storage_uri))] == [0, 2]


def test_when_the_initial_weights_are_evaluated(configure):
    sets, weights = {"held_out": {"shards": "held"}}, {"init_from": "a.safetensors"}
    for sections, is_trial, expected in [
        ({"eval": {"sets": sets}}, False, False),
        ({"eval": {"sets": sets}, "model": weights}, False, True),
        ({"eval": {"sets": sets}, "model": weights}, True, False),
        ({"eval": {"sets": sets, "at_start": True}}, True, True),
        ({"eval": {"sets": sets, "at_start": False}, "model": weights}, False, False),
        ({"model": weights}, False, False),
    ]:
        assert evaluates_at_start(configure(**sections), is_trial=is_trial) == expected


def test_a_run_goes_on_from_its_initial_weights(configure):
    """A driver that died before the second checkpoint: nothing is saved twice, and no bit differs."""
    config = configure(train={"num_samples": 24, "log_every_steps": 1}, checkpoint={"save_every_steps": 100})
    whole = train_here(config, saves_start=True)
    storage = Storage(config.storage_uri)
    expected = list_checkpoints(storage)[-1].files
    assert [info.step for info in whole.checkpoints] == [0, 3]
    storage.delete("checkpoints/step-0000000003/commit.json")
    again = train_here(config, saves_start=True)
    assert [info.step for info in again.checkpoints] == [3]
    assert [line["train/loss"] for line in again.lines] == [line["train/loss"] for line in whole.lines]
    assert list_checkpoints(storage)[-1].files == expected


def test_the_storage_may_refuse_for_so_long(configure, monkeypatch):
    seen = []
    for name in ("wait", "close"):
        plain_one = getattr(BackgroundWriter, name)

        def watched(writer: Any, timeout_s: float, plain_one: Any = plain_one, name: str = name) -> None:
            seen.append((writer._thread.name, name, timeout_s))
            plain_one(writer, timeout_s)

        monkeypatch.setattr(BackgroundWriter, name, watched)
    config = configure(checkpoint={"storage_timeout_s": 77}, train={"ledger": True, "num_samples": 24})
    train_here(config, rungs=frozenset({2}))
    assert {(name, timeout_s) for _, name, timeout_s in seen} == {("wait", 77), ("close", 77)}
    assert len({thread for thread, _, _ in seen}) == 2  # that of checkpoints and that of the ledger


def test_every_pair_is_written_to_the_ledger(configure):
    config = configure(train={"ledger": True, "num_samples": 16})
    train_here(config)
    assert list(Path(config.storage_uri).glob("ledger/*"))


def test_threads_of_a_training_worker(configure):
    assert (
        "3 threads" in train_here(configure(cluster={"cpus_per_worker": 3}, train={"num_samples": 8})).facts["device"]
    )


def first_block(trainer: Trainer) -> torch.nn.Module:
    return trainer.module.get_submodule("visual.transformer.resblocks.0")


@pytest.mark.parametrize("name", ["activation_checkpointing", "micro_batch_size", "precision"])
def test_how_a_step_goes_through_the_towers(configure, spy, name):
    calls: list[tuple[int, torch.dtype]] = []
    value: Any = {"activation_checkpointing": True, "micro_batch_size": 4, "precision": "bf16"}[name]

    def watch(trainer: Trainer, batch: Batch) -> None:
        first_block(trainer).mlp.c_fc.register_forward_hook(lambda _, __, out: calls.append((len(out), out.dtype)))

    spy.before_step = watch
    recorder = train_here(configure(train={name: value, "num_samples": 8}))
    fp32 = torch.float32
    expected = {
        "activation_checkpointing": [(8, fp32), (8, fp32)],
        "micro_batch_size": [(4, fp32)] * 4,  # two micro-batches, twice each
        "precision": [(8, torch.bfloat16)],
    }
    assert calls == expected[name]
    assert recorder.facts["micro_batch_size"] == (4 if name == "micro_batch_size" else 8)


def test_blocks_are_compiled(configure, monkeypatch):
    seen = []

    def compile_nothing(function: Any) -> Any:
        """`tests/workers/training/test_step.py` compares a compiled model with the plain one."""
        seen.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    train_here(configure(train={"compile_blocks": True, "num_samples": 8}))
    assert len(seen) == 2  # each tower has one block


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({"tile_size": 3}, ("ring_sigmoid_loss", 3, "all", 1.0)),
        ({"negatives": "hardest", "negatives_fraction": 0.25}, ("ring_sigmoid_loss", None, "hardest", 0.25)),
        ({"name": "softmax", "tile_size": 5}, ("ring_softmax_loss", 5)),
        ({"negatives": "random"}, ("ring_sigmoid_loss", None, "random", 1.0)),
    ],
)
def test_the_loss_that_is_computed(configure, monkeypatch, loss, expected):
    seen = []
    for name in ("ring_sigmoid_loss", "ring_softmax_loss"):
        own = getattr(sigray.workers.device, name)

        def watched(*features: Any, own: Any = own, name: str = name, **settings: Any) -> Any:
            negatives = settings.get("negatives")
            chosen = (negatives.keep, negatives.fraction) if negatives is not None else ()
            seen.append((name, settings["tile_size"], *chosen))
            return own(*features, **settings)

        monkeypatch.setattr(sigray.workers.device, name, watched)
    train_here(configure(loss=loss, train={"num_samples": 8}))
    assert seen == [expected]


def test_the_decoder_that_captions(configure, monkeypatch):
    own = Decoder.forward
    seen: list[Any] = []

    def watched(decoder: Any, image_tokens: Any, tokens: Any, is_parallel: Any, *rest: Any) -> Any:
        block = decoder.blocks[0]
        heads = len(decoder.blocks), decoder.norm.normalized_shape, block.self_attention.heads
        seen.append((*heads, block.mlp_in.bias is not None, is_parallel.tolist()))
        return own(decoder, image_tokens, tokens, is_parallel, *rest)

    monkeypatch.setattr(Decoder, "forward", watched)
    decoder = {"layers": 2, "width": 24, "heads": 4, "bias": True}
    loss = {"caption_weight": 0.5, "caption_parallel": 1.0}
    lines = train_here(configure(model={"decoder": decoder}, loss=loss, train={"num_samples": 8})).lines
    assert seen == [(2, (24,), 4, True, [True] * 8)]
    total = lines[-1]["train/contrastive_loss"] + 0.5 * lines[-1]["train/caption_loss"]
    assert lines[-1]["train/loss"] == pytest.approx(total)


def test_the_student_and_its_views(configure, monkeypatch):
    wanted = {
        "local_weight": 0.5,
        "masked_weight": 0.7,
        "num_local_views": 2,
        "local_size": 8,
        "global_scale": (0.5, 0.9),
        "local_scale": (0.1, 0.3),
        "mask_fraction": 0.25,
        "predicts": "all",
        "teacher": "heads",
        "student_temperature": 0.2,
        "teacher_temperature": 0.05,
        "balance": "sinkhorn",
        "center_momentum": 0.8,
    }
    own = Student.__init__
    seen: list[Any] = []

    def watched(student: Any, module: Any, model: Any, config: Any, *rest: Any) -> None:
        head = module.distiller.local_head
        seen.append(([len(head.mlp[0].bias), *head.prototypes.shape], {key: getattr(config, key) for key in wanted}))
        own(student, module, model, config, *rest)

    monkeypatch.setattr(Student, "__init__", watched)
    vision = {"timm_model_name": "siglip_vit_w16_d1_h2_m32_p8_s16", "timm_pool": "map", "timm_proj": "none"}
    towers = TOWERS | {"vision_cfg": vision | {"image_size": 16}}
    heads = {"hidden": 24, "bottleneck": 12, "prototypes": 20}
    lines = train_here(
        configure(
            model={"towers": towers, "heads": heads},
            loss={"distill": wanted},
            train={"num_samples": 8, "ema": 64},
        )
    ).lines
    assert seen == [([24, 20, 12], wanted)]
    terms = [lines[-1][f"train/{name}_loss"] for name in ("contrastive", "local", "masked")]
    assert lines[-1]["train/loss"] == pytest.approx(terms[0] + 0.5 * terms[1] + 0.7 * terms[2])


def test_a_softmax_has_no_bias_in_its_logits(configure):
    """Features have unit norm and the scale begins at 10."""
    lines = train_here(
        configure(loss={"name": "softmax"}, model={"init_logit_bias": -1000.0}, train={"num_samples": 8})
    ).lines
    assert abs(lines[-1]["train/positive_logit_mean"]) <= 10.1


def test_learning_rates_of_a_run(configure):
    """Four steps of eight samples of warm-up, then a cosine over sixteen steps that ends with the run."""
    config = configure(train={"num_samples": 160, "log_every_steps": 1}, optim={"lr": 0.02, "num_warmup_samples": 32})
    rates = [line["train/learning_rate"] for line in train_here(config).lines]
    by_hand = [0.02 * (8 * step + 1) / 33 for step in range(4)]
    by_hand += [0.01 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert rates == pytest.approx(by_hand)


def test_a_constant_learning_rate(configure):
    config = configure(train={"log_every_steps": 1}, optim={"lr": 0.02, "schedule": "constant"})
    assert [line["train/learning_rate"] for line in train_here(config).lines] == [0.02] * 6


def test_rsqrt_and_a_cooldown(configure):
    optim = {"lr": 0.02, "schedule": "rsqrt", "num_timescale_samples": 16, "num_cooldown_samples": 16}
    rates = [
        line["train/learning_rate"] for line in train_here(configure(train={"log_every_steps": 1}, optim=optim)).lines
    ]
    falls = [1, 1, 1, 1, 1, 0.5]
    assert rates == pytest.approx([0.02 * fall / math.sqrt(1 + step / 2) for step, fall in enumerate(falls)])


def test_the_optimizer_of_a_run(configure, spy):
    optim = {"beta1": 0.8, "beta2": 0.7, "eps": 1e-5, "weight_decay": 0.25, "grad_clip_norm": 1e-3}
    optim |= {"weight_decay_on": "kernels", "layer_decay": {"text": 0.5}}
    groups = [
        {"match": r"visual\..*", "lr_scale": 0.5, "weight_decay": 0.125},
        {"match": r"text\..*", "lr_scale": 2.0},
    ]
    train_here(configure(optim={**optim, "groups": groups}, train={"num_samples": 8}))
    optimizer = spy.trainer.optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    rates = {round(group["lr"] / group.get("lr_scale", 1.0), 12) for group in optimizer.param_groups}
    assert rates == {0.001}
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.7), 1e-5)}
    names = {id(parameter): name for name, parameter in spy.trainer.module.named_parameters()}
    matrices = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.ndim > 1
    }
    assert {matrices[name] for name in matrices if name.startswith("visual.")} == {(0.5, 0.125), (0.5, 0.0)}
    assert matrices["visual.conv1.weight"] == (0.5, 0.125)
    assert matrices["visual.positional_embedding"] == (0.5, 0.0)
    assert matrices["text.text_projection"] == (2.0, 0.25)
    assert matrices["text.transformer.resblocks.0.mlp.c_fc.weight"] == (1.0, 0.25)
    assert matrices["text.token_embedding.weight"] == (0.5, 0.0)
    # After the first step the momentum is 1 - beta1 of the clipped gradients.
    momentum = torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()])
    assert momentum.norm().item() == pytest.approx(0.2 * 1e-3, rel=1e-3)  # clipping divides by norm + 1e-6


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("lion", "Lion", {"betas": (0.8, 0.7), "weight_decay": 0.25}),
        ("adafactor", "AdafactorBigVision", {"momentum": 0.8, "beta2_cap": 0.7, "weight_decay": 0.25}),
    ],
    ids=["lion", "adafactor"],
)
def test_other_optimizers(configure, spy, name, kind, settings):
    optim = {"name": name, "beta1": 0.8, "beta2": 0.7, "weight_decay": 0.25}
    train_here(configure(optim=optim, train={"num_samples": 8}))
    optimizer = spy.trainer.optimizer
    assert type(optimizer).__name__ == kind
    assert {name: optimizer.param_groups[0][name] for name in settings} == settings


# The stream.


def samples_by_hand(sizes: list[list[int]], weights: tuple[float, ...], batch: int, steps: int) -> np.ndarray:
    """(steps * batch, 3) of a run with seed 7, three lanes and windows of ten, by the order's own class."""
    order = StreamOrder(sizes, weights, seed=7, num_lanes=3, shuffle_window=10)
    return np.concatenate([order.places(part) for step in range(steps) for part in order.rank_part(step, batch, 0, 1)])


def test_the_order_and_the_first_weights_follow_the_config(configure, plain, spy):
    weights = []

    def remember(trainer: Trainer, batch: Batch) -> None:
        if not weights:
            weights.append(copy.deepcopy(trainer.module.state_dict()))

    spy.before_step = remember
    config = configure(
        run={"seed": 7},
        data={"num_lanes": 3, "shuffle_window": 10, "block_size": 4},
        train={"num_samples": 96, "global_batch_size": 12},
    )
    drive(config)
    assert np.array_equal(
        np.concatenate([batch.samples for batch in spy.batches]), samples_by_hand([[40, 24]], (1.0,), 12, 8)
    )
    torch.manual_seed(7)
    fresh = build_model(ModelConfig(towers=TOWERS)).state_dict()
    assert all(torch.equal(weights[0][name], fresh[name]) for name in fresh)
    # The crops and captions are of this seed too: of one sample, by hand.
    assert {handle.actor._seed for handle in plain.handles["DataWorkerActor"]} == {7}


def test_mixed_datasets_keep_their_weights(configure, spy, folder):
    names = ["shard-000.tar", "shard-001.tar"]
    shards = {
        name: {"shards": str(folder / "train" / name), "weight": weight}
        for name, weight in zip(names, (1, 3), strict=True)
    }
    config = configure(
        run={"seed": 7},
        data={"shards": shards, "num_lanes": 3, "shuffle_window": 10, "block_size": 4},
        train={"global_batch_size": 12},
    )
    train_here(config)
    samples = np.concatenate([batch.samples for batch in spy.batches])
    assert np.array_equal(samples, samples_by_hand([[40], [24]], (1.0, 3.0), 12, 4))
    assert (samples[:, 1] == 1).mean() == 0.75


@pytest.mark.parametrize(("kind", "fraction"), [("text", 0.5), ("image", 0.25)])
def test_labels_are_corrupted_as_asked(configure, spy, kind, fraction):
    noise = {"kind": kind, "fraction": fraction}
    for name, label_noise in (("clean", None), ("noisy", noise)):
        train = {"label_noise": label_noise, "num_samples": 64, "global_batch_size": 64}
        train_here(configure(run={"name": name, "seed": 7}, train=train))
    clean, noisy = spy.batches
    changed = {
        "text": (clean.tokens != noisy.tokens).any(1).sum().item(),
        "image": (clean.images != noisy.images).flatten(1).any(1).sum().item(),
    }
    by_hand = clean.images.numpy().copy(), clean.tokens.numpy().copy()
    Noise(LabelNoise.model_validate(noise), 7, TOWERS["text_cfg"]["vocab_size"], 0).corrupt(clean.samples, *by_hand)
    assert np.array_equal(noisy.images, by_hand[0])
    assert np.array_equal(noisy.tokens, by_hand[1])
    assert changed.pop(kind) == pytest.approx(64 * fraction, abs=8)  # two standard deviations of 64 draws
    assert set(changed.values()) == {0}


class SlowSource:
    """Blocks that come once they are let go; remembers what was asked for before the first was waited for."""

    shares_memory = False

    def __init__(self, worker: DataWorker) -> None:
        self._worker, self.asked, self.waits = worker, list[tuple[int, int]](), threading.Event()
        self.asked_before = list[tuple[int, int]]()

    def request(self, lane: int, number: int, places: Any, pixels: Any) -> None:
        self.asked.append((lane, number))

    def wait(self, lane: int, number: int, handle: None) -> Block:
        if not self.waits.is_set():
            self.asked_before = list(self.asked)
            self.waits.set()
        return self._worker.block(lane, number)


def test_blocks_that_are_asked_for_ahead(configure):
    config = configure(data={"prefetch_batches": 2, "block_size": 4}, train={"num_samples": 160})
    manifest = scan_shards(config.data.shards, config.data)
    source = SlowSource(DataWorker(manifest, config.data, config.model, seed=0))
    with contextlib.suppress(ValueError):
        train_here(config, source, last_step=10)
    # A batch takes four samples of each lane: a block. Two are prefetched, and one is in use.
    assert source.asked_before == [(lane, number) for number in range(3) for lane in range(2)]


def test_bad_samples_above_the_rate_stop_the_run(configure, tmp_path):
    samples = [drawn_sample(number) for number in range(16)]
    samples[3]["png"] = b"no image"
    write_tar(tmp_path / "bad" / "bad.tar", samples)
    with pytest.raises(ValueError, match=r"1 of \d+ samples refused, more than data.max_bad_fraction 0.0005"):
        train_here(configure(data={"shards": str(tmp_path / "bad"), "max_bad_fraction": 0.0005}))


def data_worker(config: RunConfig) -> DataWorker:
    return DataWorker(scan_shards(config.data.shards, config.data), config.data, config.model, seed=config.run.seed)


def test_members_that_are_read(configure, tmp_path):
    def sample(number: int) -> dict[str, bytes | str]:
        image = {ending: encode_image(np.full((20, 20, 3), value, np.uint8)) for ending, value in IMAGES.items()}
        fields = {"names": {"en": "an apple", "sw": "tofaa"}}
        return {"__key__": f"{number:03d}", "txt": "not this", "json": json.dumps(fields), **image}

    IMAGES = {"jpg": 0, "png": 200}
    write_tar(tmp_path / "two" / "two.tar", [sample(number) for number in range(64)])
    data = {"shards": str(tmp_path / "two"), "image_keys": ["png"], "num_lanes": 1, "shuffle_window": 64}
    data |= {"captions": {"json:names.{language}": 1.0}, "languages": {"en": 1.0, "sw": 7.0}, "block_size": 64}
    config = configure(data=data)
    block = data_worker(config).block(0, 0)
    assert block.images.min() == 200
    tokens = build_tokenizer(config.model, 8, 49408)(["an apple", "tofaa"])
    counts = [(block.tokens == row).all(1).sum() for row in tokens]
    assert sum(counts) == 64
    assert counts[0] == pytest.approx(8, abs=7)  # an eighth of 64, to within 2.6 standard deviations


def test_crops(configure, monkeypatch):
    seen, own = [], sigray.workers.data.decode.random_box

    def watched(height: int, width: int, scale: Any, ratio: Any, uniforms: Any) -> Any:
        seen.append((tuple(scale), tuple(ratio)))
        return own(height, width, scale, ratio, uniforms)

    monkeypatch.setattr(sigray.workers.data.decode, "random_box", watched)
    data_worker(configure(data={"crop_scale": [0.2, 0.4], "crop_ratio": [1.5, 1.75]})).block(0, 0)
    assert set(seen) == {((0.2, 0.4), (1.5, 1.75))}
    seen.clear()
    data_worker(configure(data={"crop": "center"})).block(0, 0)
    assert not seen


def test_images_with_too_many_pixels_are_refused(configure, tmp_path):
    samples = [drawn_sample(number, 20 + 2 * (number == 5)) for number in range(16)]
    write_tar(tmp_path / "large" / "large.tar", samples)
    data = {"shards": str(tmp_path / "large"), "max_image_pixels": 483, "num_lanes": 1, "block_size": 16}
    assert data_worker(configure(data=data)).block(0, 0).refused.total() == 1


def test_a_tar_without_closing_blocks_is_accepted(configure, tmp_path):
    tar = write_tar(tmp_path / "open" / "open.tar", [drawn_sample(number) for number in range(16)])
    tar.write_bytes(tar.read_bytes().rstrip(b"\0") + bytes(-len(tar.read_bytes().rstrip(b"\0")) % 512))
    data = {"shards": str(tmp_path / "open"), "allow_unclosed": True, "num_lanes": 1, "block_size": 16}
    try:
        found = data_worker(configure(data=data)).block(0, 0).refused
    except DataError as error:
        found = error
    assert not found


def test_blocks_that_a_data_shard_worker_keeps(configure):
    worker = data_worker(configure(data={"block_size": 4, "shared_blocks": 2}))
    for number in (0, 1, 0, 1):
        worker.block(0, number)
    assert worker.num_decoded == 8


@pytest.mark.parametrize("cache_mib", [0, 1])
def test_decoded_images_are_kept_for_the_next_epoch(configure, monkeypatch, cache_mib):
    num_decoded, own = [], sigray.workers.data.decode.Decoder.decode_image

    def watched(*arguments: Any) -> None:
        num_decoded.append(1)
        own(*arguments)

    monkeypatch.setattr(sigray.workers.data.decode.Decoder, "decode_image", watched)
    data = {"crop": "center", "cache_mib": cache_mib, "num_lanes": 1, "block_size": 64, "shuffle_window": 64}
    worker = data_worker(configure(data=data))
    for number in range(2):
        worker.block(0, number)
    assert len(num_decoded) == (64 if cache_mib else 128)


# Stores and caches.


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What obstore's constructors got, by scheme; a profile of AWS, and no other credentials."""
    (tmp_path / "credentials").write_text("[elsewhere]\naws_access_key_id = KEY\naws_secret_access_key = SECRET\n")
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "token")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    calls: list[dict[str, Any]] = []
    for name in ("S3Store", "GCSStore", "AzureStore"):
        made = getattr(obstore.store, name)
        monkeypatch.setattr(
            obstore.store, name, lambda *places, make=made, **given: calls.append(given) or make(*places, **given)
        )
    monkeypatch.setattr(sigray.workers.stores, "_open", collections.OrderedDict())
    return calls


def test_how_a_bucket_is_reached(configure, monkeypatch, opened):
    here = "http://127.0.0.1:9"
    asked = {"s3_endpoint": here, "gs_endpoint": f"{here}/gs", "az_endpoint": f"{here}/az", "region": "eu-north-1"}
    asked |= {"profile": "elsewhere", "read_timeout_s": 7.5, "num_connections": 3, "deadline_s": 11}
    silent = []

    def after_failure(kind: str, failures: Any, silent_s: float, deadline_s: float, draw: float) -> None:
        silent.append(deadline_s)

    monkeypatch.setattr(sigray.workers.data.store_stream, "after_failure", after_failure)
    for scheme in ("s3", "gs", "az"):
        data = configure(data={"stores": asked, "shards": f"{scheme}://bucket/prefix"}).data
        with contextlib.closing(
            open_shard(Shard(f"{scheme}://bucket/prefix/one.tar", 1 << 30, 8, "etag-1"), data)
        ) as stream:
            assert isinstance(stream, StoreStream)
            assert stream._max_parts == 3
            with pytest.raises(DataError):  # no server listens there
                stream.read(10)
    assert silent == [11] * 3
    s3, gs, az = opened
    assert (s3.get("endpoint"), gs.get("base_url"), az.get("endpoint")) == (here, f"{here}/gs", f"{here}/az")
    assert s3["region"] == "eu-north-1"
    assert s3["credential_provider"]()["access_key_id"] == "KEY"
    for given in opened:
        assert given["client_options"]["read_timeout"] == given["client_options"]["connect_timeout"]
        assert given["client_options"]["read_timeout"].total_seconds() == 7.5
        assert not given["skip_signature"]


def test_who_pays_for_requests(configure, monkeypatch, opened):
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "payer")
    stores = configure(data={"stores": {"requester_pays": True, "profile": "elsewhere", "region": "r"}}).data.stores
    for scheme in ("s3", "gs"):
        sigray.workers.stores.open_store(f"{scheme}://bucket/x", stores)
    assert opened[0]["request_payer"]
    assert opened[1]["client_options"].get("default_headers") == {"x-goog-user-project": "payer"}


def test_presigned_urls_come_from_the_file_of_the_config(configure, monkeypatch, tmp_path):
    urls: list[str] = []
    made = obstore.store.HTTPStore
    monkeypatch.setattr(obstore.store, "HTTPStore", lambda url, **given: urls.append(url) or made(url, **given))
    (tmp_path / "signed").write_text("https://h/a.tar?sig=1\nhttps://h/b.tar?sig=2\n")
    stores = configure(data={"stores": {"signed_urls": str(tmp_path / "signed")}}).data.stores
    sigray.workers.stores.open_store("https://h/b.tar", stores)
    assert urls == ["https://h/b.tar?sig=2"]


def test_a_public_bucket_is_asked_without_a_signature(configure, opened):
    stores = configure(data={"stores": {"anonymous": True, "region": "r", "profile": "elsewhere"}}).data.stores
    for scheme in ("s3", "gs", "az"):
        sigray.workers.stores.open_store(f"{scheme}://bucket/x", stores)
    assert [given["skip_signature"] for given in opened] == [True] * 3
    assert "credential_provider" not in opened[0]


def test_remote_shards_are_kept_where_the_config_says(configure, monkeypatch, folder, tmp_path):
    """The cache of its own, and a path of it in the place of a download."""
    seen, one = [], str(folder / "train" / "shard-000.tar")

    class Cache:
        def __init__(self, folder: str, max_bytes: int) -> None:
            seen.append((folder, max_bytes))

        def path_of(self, info: Any, stores: Any) -> str:
            return one

    monkeypatch.setattr(sigray.workers.data.shard_cache, "ShardCache", Cache)
    cache = str(tmp_path / "cache")
    public = {"anonymous": True, "endpoint": "http://127.0.0.1:9"}  # by the former name, as in runs begun before
    data = configure(data={"shard_cache": cache, "shard_cache_gib": 0.5, "shards": "s3://b/p", "s3": public}).data
    source = open_shard(Shard("s3://b/p/one.tar", Path(one).stat().st_size, 40, "1-etag"), data)
    assert not isinstance(source, StoreStream)
    assert bytes(source.read(512)) == Path(one).read_bytes()[:512]
    assert seen == [(cache, 2**29)]


# Evaluation.


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Twelve samples: two fields with a class, and captions in three."""
    samples = []
    for number in range(12):
        fields = {
            "class": [*COLOURS][(number + 1) % 4],
            "kind": [*COLOURS][number % 4],
            "captions": {"en": {"name": f"wrong {number}"}},
            "names": {"en": f"number {number}", "sw": f"namba {number}"},
            "alt": f"alternative {number}",
        }
        samples.append(drawn_sample(number) | {"json": json.dumps(fields)})
    write_tar(tmp_path / "held" / "held.tar", samples)
    (tmp_path / "classes.txt").write_text("\n".join(COLOURS))
    (tmp_path / "classes.json").write_text(json.dumps([{"id": name, "name": name} for name in COLOURS]))
    return tmp_path


def test_what_an_evaluation_measures_and_how(configure, plain, monkeypatch, held_out):
    opened, own_device = [], sigray.workers.evaluation.features.open_device
    monkeypatch.setattr(
        sigray.workers.evaluation.features,
        "open_device",
        lambda accelerator, *rest: (opened.append(accelerator), own_device("cpu", *rest))[1],
    )
    labels, own_labels = [], sigray.workers.evaluation.evaluate.class_labels
    monkeypatch.setattr(
        sigray.workers.evaluation.evaluate,
        "class_labels",
        lambda ids, *rest: (labels.append(list(ids)), own_labels(ids, *rest))[1],
    )
    texts: list[str] = []
    sizes: list[int] = []
    threads: set[int] = set()
    own_texts, own_images = (
        sigray.workers.evaluation.features.Encoder.texts,
        sigray.workers.evaluation.features.Encoder.images,
    )
    monkeypatch.setattr(
        sigray.workers.evaluation.features.Encoder,
        "texts",
        lambda self, some: (sizes.append(len(some)), texts.extend(some), own_texts(self, some))[2],
    )
    cuts, own_cut = [], sigray.workers.evaluation.features.cut
    monkeypatch.setattr(
        sigray.workers.evaluation.features,
        "cut",
        lambda name, spec, data, size, **named: (cuts.append(size), own_cut(name, spec, data, size, **named))[1],
    )
    monkeypatch.setattr(
        sigray.workers.evaluation.features.Encoder,
        "images",
        lambda self, some: (sizes.append(len(some)), threads.add(torch.get_num_threads()), own_images(self, some))[2],
    )
    spec = {
        "shards": str(held_out / "held"),
        "classes": str(held_out / "classes.json"),
        "class_field": "kind",
        "templates": ["a {}", "the {}"],
        "retrieval": False,
        "linear_probe": str(held_out / "held"),
        "languages": ["en", "sw"],
        "language_captions": "json:names.{language}",
    }
    pairs = {"shards": str(held_out / "held")}
    evaluation = {"sets": {"held_out": spec, "pairs": pairs}, "batch_size": 5, "num_workers": 2, "cpus_per_worker": 3}
    evaluation |= {"accelerator": "cuda", "pixel_baseline": True, "num_sheet_images": 3}
    # The pixel neighbour reads the training data, which has the class in another field.
    config = configure(
        data={"shards": str(held_out / "held"), "captions": {"json:alt": 1.0}},
        train={"num_samples": 12, "global_batch_size": 12},
        cluster={"accelerator": "cpu"},
        eval=evaluation,
    )
    summary = drive(config)
    assert set(opened) == {"cuda"}
    (task,), (helper,) = plain.options_of("evaluate_checkpoint"), plain.options_of("FeatureWorker")
    assert (task["num_cpus"], task["num_gpus"], helper["num_cpus"], helper["num_gpus"]) == (3, 1, 3, 1)
    assert threads == {3}
    assert labels == [[[*COLOURS][number % 4] for number in range(12)]]
    assert {f"{word} {name}" for word in ("a", "the") for name in COLOURS} <= set(texts)
    assert {"namba 3", "alternative 3"} <= set(texts)
    assert not any("wrong" in text for text in texts)
    assert max(sizes) == 5
    assert set(cuts) == {5}
    assert set(summary["retrieval"]) == {"pairs"}
    assert "held_out" in summary["linear_probe"]
    assert summary["zero_shot"]["held_out"].get("pixel_baseline_top1") == 1
    (result,) = [json.loads(path.read_text()) for path in (config.folder / "evaluations").glob("*.json")]
    assert len(result["sheets"]["held_out"]) == 3
    assert set(result["languages"]["held_out"]) == {"en", "sw"}


# The model.


def small_tower() -> torch.nn.Module:
    """(b, 3, 16, 16) -> (b, 16); for `model.image_tower`."""
    return torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 16))


def test_the_model_that_is_trained(configure, spy):
    seen = {}

    def look(trainer: Trainer, batch: Batch) -> None:
        module = trainer.module
        seen["log_scale"], seen["bias"] = module.logit_scale.item(), module.logit_bias.item()
        seen["trained"] = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        module.get_submodule("visual").register_forward_pre_hook(lambda _, inputs: seen.update(pixels=inputs[0]))
        raw = batch.images[0, 0, 0].float() / 255
        seen["expected"] = (raw - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.4, 0.6, 0.7])

    spy.before_step = look
    towers = copy.deepcopy(TOWERS) | {"embed_dim": 24}
    towers["text_cfg"]["layers"] = 3
    model = {"towers": towers, "locked": ["visual"], "trained_blocks": {"text": 1}, "token_bottleneck": 4}
    model |= {"init_logit_scale": 1.5, "init_logit_bias": -3.0}
    model |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.6, 0.7], "image_size": 24}
    train_here(configure(model=model, train={"num_samples": 8}))
    assert (seen["log_scale"], seen["bias"]) == (1.5, -3.0)
    assert spy.trainer.module.text.text_projection.shape == (16, 24)
    parts = {name.partition(".")[0] for name in seen["trained"]}
    assert parts == {"logit_scale", "logit_bias", "text"}
    blocks = {name.split(".")[3] for name in seen["trained"] if "resblocks" in name}
    assert blocks == {"2"}
    assert sum(name.endswith("token_embedding.weight") for name in dict(spy.trainer.module.named_parameters())) == 0
    assert seen["pixels"].shape == (8, 3, 24, 24)
    assert seen["pixels"][0, :, 0, 0].tolist() == pytest.approx(seen["expected"].tolist(), abs=1e-5)


def start_weights(path: Path) -> dict[str, torch.Tensor]:
    """Writes weights of the small towers whose bias is -5."""
    from safetensors.torch import save_file

    state = build_model(ModelConfig(towers=TOWERS)).state_dict()
    state["logit_bias"] = torch.tensor(-5.0)
    save_file(state, path)
    return state


@pytest.mark.parametrize("fresh", [[], ["logit_bias"]])
def test_weights_to_begin_with(configure, spy, tmp_path, fresh):
    path = tmp_path / "start.safetensors"
    state, seen = start_weights(path), {}
    spy.before_step = lambda trainer, batch: seen.update(copy.deepcopy(trainer.module.state_dict()))
    train_here(configure(model={"init_from": str(path), "init_fresh": fresh}, train={"num_samples": 8}))
    name = "text.positional_embedding"
    assert torch.equal(seen[name], state[name])
    assert seen["logit_bias"].item() == (-10 if fresh else -5)


def test_a_run_begins_with_the_inputs_of_its_weights_and_keeps_them(configure, plain, tmp_path):
    plain.train = end_at_once
    start_weights(tmp_path / "model.safetensors")
    inputs = tmp_path / "open_clip_config.json"
    inputs.write_text(json.dumps({"model_cfg": TOWERS, "preprocess_cfg": {"resize_mode": "squash"}}))
    config = configure(model={"init_from": str(tmp_path / "model.safetensors")})

    def recorded() -> str | None:
        with contextlib.suppress(Enough):
            drive(config)
        return RunFolder(config).saved_config().model.image_resize

    assert recorded() == "squash"
    inputs.write_text(inputs.read_text().replace("squash", "longest"))
    assert recorded() == "squash"


def test_a_run_that_reads_a_store_keeps_the_images_of_the_store(configure, tmp_path):
    store = EmbeddingStore(str(tmp_path / "store"))
    store.begin({"image_mean": [0.1, 0.2, 0.3], "image_resize": "squash"}, StoreFormat("fp32", 16, 1))
    config = configure(
        model={"name": "ViT-B-32", "towers": None, "locked": ["visual"], "init_from": "no/file"},
        embeddings={"store": str(tmp_path / "store")},
    )
    config = config.model_copy(update={"model": config.model.model_copy(update={"init_from": None})})
    model = with_inputs(config, lambda remark: None).model
    assert (model.image_mean, model.image_std, model.image_resize) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "squash")


def test_a_tower_of_a_function(configure, spy):
    train_here(configure(model={"image_tower": "tests.test_keys_arrive:small_tower"}, train={"num_samples": 8}))
    assert isinstance(spy.trainer.module.visual, torch.nn.Sequential)


def test_the_tokenizer_of_a_file(configure, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "field", "number"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = data_worker(configure(model={"tokenizer": str(tmp_path / "tokenizer.json")})).block(0, 0).tokens
    assert tokens.max() <= 3  # "red field number 7"


def test_another_tokenizer_than_the_configs_is_refused(configure, tmp_path):
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(path))
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    found = []
    for sha256 in (right, "0" * 64):
        try:
            data_worker(configure(model={"tokenizer": str(path), "tokenizer_sha256": sha256}))
            found.append("")
        except ValueError as error:
            found.append(str(error))
    assert ["is not the file that the model was trained with" in each for each in found] == [False, True]


def test_inputs_as_the_config_says(configure, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["[UNK]", "[PAD]", "-", "red", "field", "RED"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    pixels = np.random.default_rng(0).integers(90, 256, (20, 40, 3), dtype=np.uint8)
    sample = {"png": encode_image(pixels), "txt": "RED field"}
    write_tar(tmp_path / "wide" / "wide.tar", [{"__key__": f"{number:03d}", **sample} for number in range(8)])
    model = {"image_resize": "longest", "image_interpolation": "bilinear", "image_fill": 7, "text_clean": "lower"}
    model |= {"text_pad_id": 2, "text_pad_side": "left", "tokenizer": str(tmp_path / "tokenizer.json")}
    data = {"shards": str(tmp_path / "wide"), "num_lanes": 1, "crop": "center"}
    block = data_worker(configure(data=data, model=model)).block(0, 0)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(tensor, (8, 16), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    assert np.array_equal(block.images[0][4:12], expected.numpy())
    assert (block.images[0][[0, 3, 12, 15]] == 7).all()
    assert block.tokens[0].tolist() == [*[2] * (block.tokens.shape[1] - 2), 3, 4]


def test_embeddings_are_stored_and_read_as_the_config_says(configure, plain, spy, monkeypatch, tmp_path):
    sizes, own = [], sigray.workers.data.embed.Embedder._forward
    monkeypatch.setattr(
        sigray.workers.data.embed.Embedder,
        "_forward",
        lambda self, images: (sizes.append(len(images)), own(self, images))[1],
    )
    opened, own_device = [], sigray.workers.evaluation.features.open_device
    for module in (sigray.workers.data.embed, sigray.workers.training.train):

        def open_device(*arguments: Any, **named: Any) -> Any:
            opened.append(arguments)
            return own_device("cpu", *arguments[1:], **named)

        monkeypatch.setattr(module, "open_device", open_device)
    config = configure(
        model={"image_tower": "tests.test_keys_arrive:small_tower", "locked": ["visual"]},
        train={"precision": "tf32"},
        embeddings={"store": str(tmp_path / "store"), "dtype": "fp32", "num_views": 2, "batch_size": 10},
        cluster={
            "accelerator": "cuda",
            "devices_per_worker": 1,
            "cpus_per_worker": 3,
            "resources_per_worker": {"trains": 2},
            "num_workers": 2,
        },
    )
    try:
        embed(config, Console(file=io.StringIO()))
    except ValueError as error:
        raise AssertionError(f"nothing is stored: {error}") from error
    asked = {(one["num_cpus"], one["num_gpus"], one["resources"]["trains"]) for one in plain.options_of("Embedder")}
    assert asked == {(3, 1, 2)}
    assert opened == [("cuda", 0, "tf32", 1)] * 2
    assert len(plain.options_of("Embedder")) == 2
    assert torch.get_num_threads() == 3
    assert max(sizes) == 10  # five images, twice each
    with contextlib.suppress(KeyError):  # where the tower is run in the step all the same
        drive(config)
    assert spy.batches[0].images.shape == (8, 16)
    assert spy.batches[0].images.dtype == torch.float32
    store = json.loads((config.folder / "manifest.json").read_text())["store"]
    assert store == {"dtype": "fp32", "dim": 16, "num_views": 2}


def test_images_that_cannot_be_embedded_stop_it_above_the_rate(configure, plain, tmp_path):
    samples = [drawn_sample(number) for number in range(16)]
    samples[3]["png"] = b"no image"
    write_tar(tmp_path / "bad" / "bad.tar", samples)
    config = configure(
        data={"shards": str(tmp_path / "bad"), "max_bad_fraction": 0.0005},
        model={"image_tower": "tests.test_keys_arrive:small_tower", "locked": ["visual"]},
        embeddings={"store": str(tmp_path / "store")},
    )
    with pytest.raises(DataError, match="max_bad_fraction"):
        embed(config, Console(file=io.StringIO()))


# A resume.


def test_a_resume_refuses_the_same_datasets_in_another_order(configure, plain, folder):
    """The order of samples goes through the datasets by number."""
    plain.train = end_at_once
    names = ["shard-000.tar", "shard-001.tar"]
    shards = {name: {"shards": str(folder / "train" / name), "weight": 1} for name in names}
    with contextlib.suppress(Enough):
        drive(configure(data={"shards": shards}))
    with pytest.raises(ValueError, match=r"datasets were shard-000.tar, shard-001.tar, now shard-001.tar, shard-000"):
        drive(configure(data={"shards": dict(reversed(shards.items()))}))
