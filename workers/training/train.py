"""Start reading here: what one training worker does, in the order in which it happens.

    set up -> restore -> [ batch -> step -> log -> checkpoint ] until the run is long enough or asked to stop

The loop knows torch.distributed and nothing of Ray: `orchestrator/run/driver.py` runs it in Ray Train's worker group, and
the tests and `benchmarks/overhead.py` run it in a bare one.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from sigray.losses import mean_logits
from sigray.losses.spans import span
from sigray.workers.checkpoint.index import CheckpointInfo, read_info
from sigray.workers.checkpoint.writer import CheckpointWriter, help_to_save, load_checkpoint, load_newest, read_left_out
from sigray.workers.config import (
    Accelerator,
    CheckpointConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ShardingConfig,
    TrainConfig,
)
from sigray.workers.data.label_noise import Noise
from sigray.workers.data.loader import Batch, BlockSource, Loader
from sigray.workers.data.manifest import Manifest
from sigray.workers.data.worker import build_order, image_kind
from sigray.workers.device import Device, check_collectives, open_device
from sigray.workers.model.init_weights import load_initial_weights
from sigray.workers.model.inputs import shapes
from sigray.workers.model.towers import num_parameters
from sigray.workers.storage import Storage
from sigray.workers.training.ledger import Ledger, ledger_files
from sigray.workers.training.profile import Profile, StepProfiler
from sigray.workers.training.step import BadStep, StepResult, Trainer

Request = Literal["go on", "save", "stop"]
"""What the driver wants of the training workers: nothing, a checkpoint now, or a checkpoint and an end."""

Answer = Literal["go on", "stop", "wait"]
"""What the driver says to a run that has come to a rung; after "wait" it is asked again."""

_NUM_RECENT = 100  # losses with which a new one is compared
_ASK_S = 0.3  # between two questions at a rung


class Hooks(Protocol):
    """What the loop tells whoever runs it, and asks. Called on rank 0 only, except where said."""

    def started(self, facts: dict[str, Any]) -> None:
        """The facts of the start-up block."""

    def record(self, metrics: dict[str, float]) -> Request:
        """One line of metrics."""

    def checkpointed(self, info: CheckpointInfo) -> None:
        """A checkpoint is durable."""

    def ask(self, step: int) -> Answer:
        """Whether to go on behind a rung whose checkpoint is durable."""

    def warn(self, message: str) -> None:
        """Something to know that does not end the run. On any rank, from any thread."""


@dataclass
class TrainJob:
    """All that a training worker needs to know."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    loss: LossConfig
    optim: OptimConfig
    sharding: ShardingConfig
    checkpoint: CheckpointConfig
    seed: int
    accelerator: Accelerator
    devices_per_worker: int | None  # of XLA; None: all of the host
    cpus_per_worker: int
    manifest: Manifest
    storage_uri: str
    owner: str | None  # of the run's lease
    blocks: BlockSource
    hooks: Hooks
    rungs: frozenset[int] = frozenset()
    """Steps done at which a checkpoint is written and the driver is asked whether to go on."""
    profile: Profile | None = None
    """Which steps are profiled; the run ends behind them."""


def train_loop_per_worker(job: TrainJob) -> None:
    """Train from the newest checkpoint, or from the start, to the end of the run.

    Raises:
        DataError: when too many samples are refused or a shard changed.
        CheckpointError: when all checkpoints are damaged, or the newest is of another model.
        OSError: when the last checkpoint cannot be written.
        RunTakenOver: when another driver has the run.
        BadStep: when features, loss or gradients are not finite numbers, or the loss leaps.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    torch.set_num_threads(max(1, job.cpus_per_worker))
    # Ray Train and torchrun both set it; the workers of a host see all of its GPUs.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = open_device(
        job.accelerator,
        local_rank,
        job.train.precision,
        job.devices_per_worker,
        splits_weights=job.sharding.weights == "split",
    )
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
        activation_checkpointing=job.train.activation_checkpointing,
        compile_blocks=job.train.compile_blocks,
        stored_embeddings=job.manifest.store is not None,
    )
    storage = Storage(job.storage_uri)
    first_step = _restore(job, storage, trainer, rank)
    if first_step == 0 and job.model.init_from is not None:
        load_initial_weights(trainer.module, job.model)
    check_collectives(device, global_batch_size // world_size)
    if job.profile is not None:  # the schedule of the learning rate is that of the whole run
        num_steps = min(num_steps, job.profile.total)
    loader = Loader(
        build_order(job.manifest, job.data, job.seed),
        job.blocks,
        image_kind=image_kind(job.manifest, job.model),
        global_batch_size=global_batch_size,
        block_size=job.data.block_size,
        rank=rank,
        world_size=world_size,
        first_step=first_step,
        last_step=num_steps,
        prefetch_batches=job.data.prefetch_batches,
        max_bad_fraction=job.data.max_bad_fraction,
        page_lock=device.page_lock if device.pins_memory else None,
        noise=Noise(job.train.label_noise, job.seed, shapes(job.model)[2]) if job.train.label_noise else None,
    )
    saver = _Saver(job, storage, trainer, rank, world_size, first_step)
    if rank == 0:
        job.hooks.started(_facts(job, trainer, device, world_size, first_step, num_steps))

    window = _LogWindow(loader, device, job)
    left_out = set(read_left_out(storage))
    profiler = StepProfiler(job.profile, device, storage, rank)
    try:
        with profiler:
            for batch in loader:
                steps_done, is_last = batch.step + 1, batch.step + 1 == num_steps
                if steps_done not in left_out:
                    window.add(steps_done, trainer.step(batch))
                saver.add(batch)
                request: Request = "go on"
                # A checkpoint is never written before all losses up to it were found good.
                is_rung = steps_done in job.rungs and not is_last
                if steps_done % job.train.log_every_steps == 0 or is_last or is_rung or saver.may_be_due(steps_done):
                    with span("metrics"):
                        metrics = window.close(steps_done)
                        if rank == 0 and metrics:
                            request = job.hooks.record(metrics)
                            saver.add_metrics(metrics)
                        stop = _any_rank(request == "stop", device)
                    if _any_rank(request == "save" or saver.is_due(steps_done), device) or stop or is_last or is_rung:
                        with span("checkpoint"):
                            saver.save(steps_done)
                        if is_rung and not stop:
                            saver.wait()
                            stop = _is_told_to_stop(job, steps_done, rank, device)
                        window.restart_clock()
                    if stop:
                        break
                saver.tell_committed()
                profiler.step_done()
        saver.close()
    except BadStep:
        saver.close()  # what was saved before it is good
        raise
    except BaseException:
        saver.abandon()
        raise
    finally:
        loader.close()


def _restore(job: TrainJob, storage: Storage, trainer: Trainer, rank: int) -> int:
    """Put the newest checkpoint that is whole into the trainer, on every rank the same; returns the steps done."""
    info = load_newest(storage, trainer.module, trainer.optimizer, job.hooks.warn) if rank == 0 else None
    if dist.is_initialized():
        names = [info.name if info else None]
        dist.broadcast_object_list(names)
        if rank and names[0]:
            info = read_info(storage, names[0])
            load_checkpoint(storage, info, trainer.module, trainer.optimizer)
    return info.step if info else 0


class _Saver:
    """What this rank makes durable: its part of the ledger, and on rank 0 the checkpoints."""

    def __init__(
        self, job: TrainJob, storage: Storage, trainer: Trainer, rank: int, world_size: int, first_step: int
    ) -> None:
        self._job, self._trainer, self._world_size = job, trainer, world_size
        self._saved_step = first_step
        self._ledger = Ledger(storage, rank, first_step, job.hooks.warn, job.owner) if job.train.ledger else None
        self._metrics: list[dict[str, float]] = []
        self._writer: CheckpointWriter | None = None
        if rank == 0:
            self._writer = CheckpointWriter(
                storage,
                trainer.module,
                trainer.optimizer,
                job.checkpoint,
                job.model.model_dump(mode="json"),
                first_step=first_step,
                owner=job.owner,
                warn=job.hooks.warn,
            )

    def add(self, batch: Batch) -> None:
        """The batch has entered a loss."""
        if self._ledger is not None:
            self._ledger.add(batch)

    def add_metrics(self, line: dict[str, float]) -> None:
        self._metrics.append(line)

    def may_be_due(self, steps_done: int) -> bool:
        """Whether the ranks should agree on a checkpoint after this step; the same on all of them."""
        steps = self._job.checkpoint.save_every_steps
        return steps is not None and steps_done % steps == 0

    def is_due(self, steps_done: int) -> bool:
        return self._writer is not None and self._writer.is_due(steps_done)

    def save(self, steps_done: int) -> None:
        """Begin a checkpoint. Called on all ranks after the same step."""
        if self._ledger is not None:
            self._ledger.write(steps_done)
        if self._writer is not None:
            ledger = ledger_files(self._saved_step, steps_done, self._world_size) if self._ledger is not None else []
            self._writer.save(
                steps_done, steps_done * self._job.train.global_batch_size, metrics=self._metrics, after=ledger
            )
            self._metrics = []
        elif self._job.sharding.weights == "split":
            help_to_save(self._trainer.module, self._trainer.optimizer)
        self._saved_step = steps_done

    def wait(self) -> None:
        """Until the newest checkpoint is durable and told.

        Raises:
            OSError: where the storage refuses for longer than checkpoint.storage_timeout_s.
        """
        if self._writer is not None:
            self._writer.wait()
        self.tell_committed()

    def tell_committed(self) -> None:
        for info in self._writer.take_committed() if self._writer is not None else ():
            self._job.hooks.checkpointed(info)

    def close(self) -> None:
        """Wait until all is durable.

        Raises:
            OSError: where the storage refuses for longer than checkpoint.storage_timeout_s.
        """
        if self._ledger is not None:
            self._ledger.close(self._job.checkpoint.storage_timeout_s)
        if self._writer is not None:
            self._writer.close()
        self.tell_committed()

    def abandon(self) -> None:
        if self._ledger is not None:
            self._ledger.abandon()
        if self._writer is not None:
            self._writer.abandon()


class _LogWindow:
    """The steps between two lines of metrics. The host reads the device in `close` only."""

    def __init__(self, loader: Loader, device: Device, job: TrainJob) -> None:
        self._loader, self._device, self._global_batch_size = loader, device, job.train.global_batch_size
        self._max_loss_ratio, self._has_bias = job.train.max_loss_ratio, job.loss.name == "sigmoid"
        self._results: list[StepResult] = []
        self._steps: list[int] = []  # of the results, counted from 1
        self._good_losses: deque[float] = deque(maxlen=_NUM_RECENT)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what has passed: the copy for a checkpoint is not training time."""
        self._begin, self._num_timed = time.perf_counter(), 0
        self._wait_s, self._decode_s = self._loader.wait_s, self._loader.decode_s

    def add(self, step: int, result: StepResult) -> None:
        self._steps.append(step)
        self._results.append(result)
        self._num_timed += 1

    def close(self, steps_done: int) -> dict[str, float]:
        """Metrics of the window, averaged over ranks where ranks differ; the loss is that of the last step.

        Empty where all of its steps were left out.

        Raises:
            BadStep: the first of the window's, on every rank.
        """
        if not self._results:
            return {}
        newest = self._results[-1]
        losses = self._device.read([result.loss for result in self._results])
        norms = self._device.read([result.grad_norm for result in self._results])
        scale, bias = self._device.read([newest.logit_scale, newest.logit_bias])
        features = newest.feature_means.tolist()
        host = [
            self._loader.num_ready,
            self._loader.wait_s - self._wait_s,
            self._loader.decode_s - self._decode_s,
            self._loader.refused.total(),
        ]
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        sums = self._device.sum_over_ranks([*features, *losses, *host])
        features = [total / world_size for total in sums[: len(features)]]
        *losses, num_ready, wait_s, decode_s, num_refused = sums[len(features) :]
        means = [total / world_size for total in losses]
        num_ready, wait_s = num_ready / world_size, wait_s / world_size
        for step, loss, norm in zip(self._steps, means, norms, strict=True):
            reason = why_bad(loss, norm, self._good_losses, self._max_loss_ratio)
            if reason:
                raise BadStep(step, f"step {step}: {reason}. Lower optim.lr, or train in fp32")
            self._good_losses.append(loss)
        positive, negative = mean_logits(features, self._global_batch_size, scale, bias if self._has_bias else 0.0)
        elapsed_s = time.perf_counter() - self._begin
        metrics = {
            "step": steps_done,
            "samples_seen": steps_done * self._global_batch_size,
            "train/loss": means[-1],
            "train/logit_scale": scale,
            "train/logit_bias": bias,
            "train/positive_logit_mean": positive,
            **({} if negative is None else {"train/negative_logit_mean": negative}),
            "train/grad_norm": norms[-1],
            "train/learning_rate": newest.learning_rate,
            "throughput/samples_per_s": self._num_timed * self._global_batch_size / elapsed_s,
            "data/wait_pct": 100 * wait_s / elapsed_s,
            "data/queue_batches": num_ready,
            "data/busy_workers": decode_s / elapsed_s,
            "data/refused_samples": num_refused,
            "memory/peak_gib": self._device.peak_memory_gib(),
            "compile/num_programs": self._device.num_programs(),
        }
        self._results, self._steps = [], []
        self.restart_clock()
        return metrics


def why_bad(loss: float, grad_norm: float, before: Sequence[float], max_ratio: float | None) -> str:
    """What is wrong with a step; empty for a good one.

    Args:
        before: losses of the good steps before it, the newest last.
        max_ratio: train.max_loss_ratio.
    """
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the norm of the gradients is {grad_norm}"
    if max_ratio is not None and len(before) >= _NUM_RECENT // 5:
        median = statistics.median(before)
        if loss > max_ratio * median:
            return f"the loss is {loss:.4g}, the median of the {len(before)} steps before it {median:.4g}"
    return ""


def _is_told_to_stop(job: TrainJob, steps_done: int, rank: int, device: Device) -> bool:
    """Ask the driver at a rung until it decides; the same answer on all ranks."""
    while True:
        answer = job.hooks.ask(steps_done) if rank == 0 else "wait"
        # The other ranks hear of it twice a second, so that no collective waits for as long as a decision may take.
        stop, go_on = _any_rank(answer == "stop", device), _any_rank(answer == "go on", device)
        if stop or go_on:
            return stop
        time.sleep(_ASK_S)


def _any_rank(value: bool, device: Device) -> bool:
    """True on all ranks where it is True on one."""
    return device.sum_over_ranks([value])[0] > 0


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
