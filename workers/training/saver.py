"""When a training worker saves and stops: checkpoints, ledger, requests, rungs."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from sigray.losses.spans import span
from sigray.workers.checkpoint.index import CheckpointInfo
from sigray.workers.checkpoint.writer import Border, CheckpointWriter, help_to_save, load_checkpoint, load_newest
from sigray.workers.data.loader import Batch
from sigray.workers.device import Device
from sigray.workers.model.init_weights import resize
from sigray.workers.storage import Storage
from sigray.workers.training.job import Request, TrainJob
from sigray.workers.training.ledger import Ledger, ledger_files
from sigray.workers.training.phases import Phase, phase_at, phase_of_checkpoint
from sigray.workers.training.step import Trainer

_ASK_S = 0.3  # between two questions at a rung


def restore(
    storage: Storage,
    phases: Sequence[Phase],
    build: Callable[[Phase], Trainer],
    rank: int,
    warn: Callable[[str], None],
) -> tuple[Phase, Trainer, int | None]:
    """Build the trainer of the phase to train, with the newest undamaged checkpoint.

    Returns:
        Phase, trainer, and the checkpoint's step; None without a checkpoint.

    Args:
        build: makes the trainer of a phase. Called again on all ranks if a checkpoint is damaged: it may have loaded a
            part of it.
        warn: called for each damaged checkpoint.
    """
    made: list[tuple[Phase, Trainer]] = []  # at most one

    def make(step: int) -> None:
        if made:
            made.clear()
            gc.collect()  # modules refer to themselves; their weights go before the next ones come
        phase = phase_at(phases, step)
        made.append((phase, build(phase)))

    def load(info: CheckpointInfo) -> None:
        ((phase, trainer),) = made
        before = phase_of_checkpoint(phases, info.step)
        begins_teacher = phase.loss.distill is not None and before.loss.distill is None  # it begins as the student
        border = Border(phase.init_fresh, resize, begins_teacher) if before != phase else None
        load_checkpoint(storage, info, trainer.module, trainer.optimizer, border)
        if border is not None and phase.loss.distill is not None:
            distiller: Any = trainer.module.get_submodule("distiller")
            distiller.reset_centers(lambda name: begins_teacher or border.is_fresh(f"distiller.{name}"))

    def load_first(info: CheckpointInfo) -> None:
        same_on_ranks(info)
        make(info.step)
        load(info)

    info: CheckpointInfo | None = None
    if rank == 0:
        info = load_newest(storage, load_first, warn)
        same_on_ranks(None)
    else:
        while (following := same_on_ranks(None)) is not None:  # the last one is whole
            info = following
            make(info.step)
        if info is not None:
            load(info)
    if info is None:
        make(0)
    ((phase, trainer),) = made
    return phase, trainer, info.step if info else None


def same_on_ranks(value: Any) -> Any:
    """Return the value of rank 0."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


class Saver:
    """Saves with the other ranks: rank 0 the checkpoint, each rank its ledger.

    Reasons to save: the end of a phase or of the run, a rung, `checkpoint.save_every_steps` and `save_every_s`, and the
    driver's request. All ranks take the same decision after the same step.

    Args:
        phase: the phase that the trainer is of; it ends with a checkpoint.
        first_step: steps done when this attempt, or the phase, began.
        num_steps: steps of the run.

    Attributes:
        must_stop: whether the run ends here, by the driver's request or its decision at a rung.
    """

    def __init__(
        self,
        job: TrainJob,
        storage: Storage,
        trainer: Trainer,
        device: Device,
        *,
        phase: Phase,
        rank: int,
        world_size: int,
        first_step: int,
        num_steps: int,
    ) -> None:
        self.must_stop = False
        self._job, self._trainer, self._device = job, trainer, device
        self._world_size, self._num_steps, self._saved_step = world_size, num_steps, first_step
        self._last_step = min(phase.end_step, num_steps)
        self._ledger = Ledger(storage, rank, first_step, job.hooks.warn, job.owner) if job.train.ledger else None
        self._metrics: list[dict[str, float]] = []
        self._num_saved = self._num_shared = 0  # checkpoints of this attempt; the same on all ranks
        self._unshared: deque[CheckpointInfo] = deque()  # durable ones, on rank 0
        self._writer: CheckpointWriter | None = None
        if rank == 0:
            self._writer = CheckpointWriter(
                storage,
                trainer.module,
                trainer.optimizer,
                job.checkpoint,
                phase.model.model_dump(mode="json"),
                first_step=first_step,
                owner=job.owner,
                warn=job.hooks.warn,
            )

    def add(self, batch: Batch) -> None:
        """Note in the ledger that this batch entered a loss."""
        if self._ledger is not None:
            self._ledger.add(batch)

    def record(self, metrics: dict[str, float]) -> Request:
        """Report a line of metrics and keep it for the next checkpoint; on rank 0."""
        self._metrics.append(metrics)
        return self._job.hooks.record(metrics)

    def may_save(self, steps_done: int) -> bool:
        """Whether the ranks may save without a request; the same on all ranks."""
        steps = self._job.checkpoint.save_every_steps
        is_multiple = steps is not None and steps_done % steps == 0
        return is_multiple or steps_done == self._last_step or self._is_rung(steps_done)

    def save_if_due(self, steps_done: int, request: Request) -> bool:
        """Save if any rank has a reason to, and set `must_stop`.

        Returns:
            Whether the ranks saved.
        """
        is_due = self._writer is not None and self._writer.is_due(steps_done)
        sums = self._device.sum_over_ranks([request == "save" or is_due, request == "stop", len(self._unshared)])
        save, self.must_stop = (total > 0 for total in sums[:2])
        self._share(int(sums[2]))
        is_rung = self._is_rung(steps_done)
        if not (save or self.must_stop or is_rung or steps_done == self._last_step):
            return False
        with span("checkpoint"):
            self.save(steps_done)
        if is_rung and not self.must_stop:
            if self._writer is not None:
                self._writer.wait()
            self.report_committed()
            self.must_stop = self._stops_at_rung(steps_done)
        return True

    def save(self, steps_done: int) -> None:
        """Begin a checkpoint. All ranks call this after the same step."""
        has_ledger = self._ledger is not None and steps_done > 0
        if self._ledger is not None and has_ledger:
            self._ledger.write(steps_done)
        if self._writer is not None:
            ledger = ledger_files(self._saved_step, steps_done, self._world_size) if has_ledger else []
            samples_seen = steps_done * self._job.train.global_batch_size
            self._writer.save(steps_done, samples_seen, metrics=self._metrics, after=ledger)
            self._metrics = []
        elif self._job.sharding.weights == "split":
            help_to_save(self._trainer.module, self._trainer.optimizer)
        self._saved_step = steps_done
        self._num_saved += 1

    def report_committed(self) -> None:
        """Report the checkpoints that became durable since the last call."""
        for info in self._writer.take_committed() if self._writer is not None else ():
            self._job.hooks.checkpointed(info)
            self._unshared.append(info)

    def _share(self, count: int) -> None:
        """Share the oldest unshared checkpoints.

        Args:
            count: the same on all ranks.
        """
        for _ in range(count):
            self._job.hooks.share(self._unshared.popleft() if self._unshared else None)
        self._num_shared += count

    def close(self) -> None:
        """Wait until everything is durable.

        Raises:
            OSError: if the storage refuses writes for longer than checkpoint.storage_timeout_s.
        """
        if self._ledger is not None:
            self._ledger.close(self._job.checkpoint.storage_timeout_s)
        if self._writer is not None:
            self._writer.close()
        self.report_committed()
        self._share(self._num_saved - self._num_shared)  # all that were saved are durable

    def abandon(self) -> None:
        """Training failed: drop what is not committed."""
        for writer in (self._ledger, self._writer):
            if writer is not None:
                writer.abandon()

    def _is_rung(self, steps_done: int) -> bool:
        return steps_done in self._job.rungs and steps_done != self._num_steps

    def _stops_at_rung(self, steps_done: int) -> bool:
        """Ask the driver until it decides; returns whether to stop, the same on all ranks."""
        while True:
            answer = self._job.hooks.ask(steps_done) if self._writer is not None else "wait"
            # The ranks exchange the answer every _ASK_S: a single collective would time out before a late decision.
            stop, go_on = self._any_rank(answer == "stop", answer == "go on")
            if stop or go_on:
                return stop
            time.sleep(_ASK_S)

    def _any_rank(self, *values: bool) -> list[bool]:
        """Each value: whether it is True on any rank."""
        return [total > 0 for total in self._device.sum_over_ranks(values)]
