"""Start reading here: what one training worker does, in the order in which it happens.

    set up -> restore -> [ batch -> step -> log -> checkpoint ] until the run is long enough or asked to stop

The loop knows torch.distributed and nothing of Ray: `orchestrator/launch.py` runs it in Ray Train's worker group, and
the tests and `benchmarks/overhead.py` run it in a bare one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from workers.checkpoint import (
    CheckpointInfo,
    delete_old_checkpoints,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from workers.config import CheckpointConfig, DataConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig
from workers.data_worker import build_order
from workers.device import Accelerator, Device, check_collectives, open_device
from workers.feed import BlockSource, Feed
from workers.ledger import Ledger
from workers.shards import Manifest
from workers.step import StepResult, Trainer
from workers.storage import Storage
from workers.towers import num_parameters


class Hooks(Protocol):
    """What the loop tells whoever runs it. Called on every rank, except where said."""

    def started(self, facts: dict[str, Any]) -> None:
        """Rank 0 only: the facts of the start-up block."""

    def record(self, metrics: dict[str, float]) -> bool:
        """Rank 0 only: one line of metrics. Returns True when the run shall stop at this step."""

    def checkpointed(self, info: CheckpointInfo | None, metrics: dict[str, float]) -> None:
        """A checkpoint is committed; its info on rank 0, None on the others. May be a barrier."""


@dataclass
class TrainJob:
    """All that a training worker needs to know."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    loss: LossConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig
    seed: int
    accelerator: Accelerator
    cpus_per_worker: int
    manifest: Manifest
    storage_uri: str
    blocks: BlockSource
    hooks: Hooks


def train_loop_per_worker(job: TrainJob) -> None:
    """Train from the newest checkpoint, or from the start, to the end of the run.

    Raises:
        DataError: when too many samples are refused or a shard changed.
        CheckpointError: when the newest checkpoint is damaged or of another model.
        FloatingPointError: when the features or the loss are not finite numbers.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    torch.set_num_threads(max(1, job.cpus_per_worker))
    # Ray Train and torchrun both set it; the workers of a host see all of its GPUs.
    device = open_device(job.accelerator, int(os.environ.get("LOCAL_RANK", "0")), job.train.precision)
    global_batch_size = job.train.global_batch_size
    num_steps = -(-job.train.num_samples // global_batch_size)
    trainer = Trainer(
        job.model,
        job.optim,
        job.loss,
        device,
        num_samples=num_steps * global_batch_size,
        global_batch_size=global_batch_size,
        micro_batch_size=job.train.micro_batch_size,
        seed=job.seed,
    )
    storage = Storage(job.storage_uri)
    checkpoints = list_checkpoints(storage)
    first_step = 0
    if checkpoints:
        load_checkpoint(storage, checkpoints[-1], trainer.module, trainer.optimizer)
        first_step = checkpoints[-1].step
    check_collectives(device, global_batch_size // world_size)
    feed = Feed(
        build_order(job.manifest, job.data, job.seed),
        job.blocks,
        global_batch_size=global_batch_size,
        block_size=job.data.block_size,
        rank=rank,
        world_size=world_size,
        first_step=first_step,
        last_step=num_steps,
        prefetch_batches=job.data.prefetch_batches,
        max_bad_fraction=job.data.max_bad_fraction,
        pin_memory=device.pins_memory,
    )
    ledger = Ledger(storage, rank, first_step) if job.train.ledger else None
    if rank == 0:
        job.hooks.started(_facts(job, trainer, device, world_size, first_step, num_steps))

    stop = False
    window = _LogWindow(feed, device, global_batch_size)
    for batch in feed:
        result = trainer.step(batch)
        steps_done = batch.step + 1
        window.add(result)
        if ledger is not None:
            ledger.add(batch)
        if steps_done % job.train.log_every_steps == 0 or steps_done == num_steps:
            metrics = window.close(steps_done)
            asked = job.hooks.record(metrics) if rank == 0 else False
            stop = _any_rank(asked, device)
        if steps_done % job.checkpoint.save_every_steps == 0 or steps_done == num_steps or stop:
            info = None
            if ledger is not None:
                ledger.write(steps_done)
                _any_rank(False, device)  # all ranks have written before the checkpoint is committed
            if rank == 0:
                info = save_checkpoint(
                    storage,
                    trainer.module,
                    trainer.optimizer,
                    step=steps_done,
                    samples_seen=steps_done * global_batch_size,
                    model=job.model.model_dump(mode="json"),
                )
                delete_old_checkpoints(storage, job.checkpoint.keep_newest)
            job.hooks.checkpointed(info, {"step": steps_done, "samples_seen": steps_done * global_batch_size})
            window.restart_clock()
        if stop:
            break
    feed.close()


class _LogWindow:
    """The steps between two lines of metrics. The host reads the device in `close` only."""

    def __init__(self, feed: Feed, device: Device, global_batch_size: int) -> None:
        self._feed, self._device, self._global_batch_size = feed, device, global_batch_size
        self._results: list[StepResult] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what has passed: a checkpoint's pause is not training time."""
        self._begin, self._num_timed = time.perf_counter(), 0
        self._wait_s, self._decode_s = self._feed.wait_s, self._feed.decode_s

    def add(self, result: StepResult) -> None:
        self._results.append(result)
        self._num_timed += 1

    def close(self, steps_done: int) -> dict[str, float]:
        """Metrics of the window, averaged over ranks where ranks differ; the loss is that of the last step.

        Raises:
            FloatingPointError: where the loss of any step of the window is NaN or infinite.
        """
        newest = self._results[-1]
        losses = torch.stack([result.loss for result in self._results])
        host = losses.new_tensor(
            [
                self._feed.num_ready,
                self._feed.decode_s - self._decode_s,
                self._feed.wait_s - self._wait_s,
                self._feed.refused.total(),
            ]
        )
        local = torch.cat([losses, host])
        if dist.is_initialized():
            dist.all_reduce(local)
            local[: len(losses) + 1] /= dist.get_world_size()
            local[-2] /= dist.get_world_size()
        *means, num_ready, decode_s, wait_s, num_refused = local.tolist()
        for number, loss in enumerate(means):
            if loss != loss or abs(loss) == float("inf"):
                step = steps_done - len(means) + number + 1
                raise FloatingPointError(f"the loss of step {step} is {loss}: lower optim.lr, or train in fp32")
        elapsed_s = time.perf_counter() - self._begin
        metrics = {
            "step": steps_done,
            "samples_seen": steps_done * self._global_batch_size,
            "train/loss": means[-1],
            "train/logit_scale": float(newest.logit_scale),
            "train/logit_bias": float(newest.logit_bias),
            "train/grad_norm": float(newest.grad_norm),
            "train/learning_rate": newest.learning_rate,
            "throughput/samples_per_s": self._num_timed * self._global_batch_size / elapsed_s,
            "data/wait_pct": 100 * wait_s / elapsed_s,
            "data/queue_batches": num_ready,
            "data/busy_workers": decode_s / elapsed_s,
            "data/refused_samples": num_refused,
            "memory/peak_gib": self._device.peak_memory_gib(),
        }
        self._results = []
        self.restart_clock()
        return metrics


def _any_rank(value: bool, device: Device) -> bool:
    """True on all ranks where it is True on one."""
    if not dist.is_initialized():
        return value
    flag = torch.tensor(float(value), device=device.torch_device)
    dist.all_reduce(flag)
    return bool(flag)


def _facts(
    job: TrainJob, trainer: Trainer, device: Device, world_size: int, first_step: int, num_steps: int
) -> dict[str, Any]:
    def millions(names: Sequence[str]) -> dict[str, float]:
        return {name: num_parameters(getattr(trainer.module, name)) / 1e6 for name in names}

    return {
        "device": device.describe(),
        "world_size": world_size,
        "global_batch_size": job.train.global_batch_size,
        "batch_per_worker": job.train.global_batch_size // world_size,
        "micro_batch_size": job.train.micro_batch_size or job.train.global_batch_size // world_size,
        "parameters_m": {"all": num_parameters(trainer.module) / 1e6, **millions(["visual", "text"])},
        "first_step": first_step,
        "num_steps": num_steps,
        "epochs": num_steps * job.train.global_batch_size / job.manifest.num_samples,
    }
