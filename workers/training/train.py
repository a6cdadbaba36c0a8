"""Start reading here: what one training worker does, in order.

    set up -> for each phase: restore -> [ batch -> step -> log -> checkpoint ] until its end or a request to stop

The loop uses torch.distributed and knows nothing of Ray. `orchestrator/run/worker_group.py` hands it to Ray
Train; the tests and `benchmarks/overhead.py` run it in a bare process group.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from sigray.losses.spans import span
from sigray.workers.checkpoint.writer import read_left_out
from sigray.workers.config import ModelConfig, OptimConfig
from sigray.workers.data.label_noise import Noise
from sigray.workers.data.loader import Counts, Loader
from sigray.workers.data.worker import build_order, image_kind
from sigray.workers.device import Device, check_collectives, open_device
from sigray.workers.model.init_weights import load_initial_weights
from sigray.workers.model.inputs import shapes
from sigray.workers.model.tokenizer import CaptionEnds, build_tokenizer, find_caption_ends
from sigray.workers.model.towers import named_parts, num_parameters
from sigray.workers.storage import Storage
from sigray.workers.training.job import Request, TrainJob
from sigray.workers.training.log_window import LogWindow
from sigray.workers.training.phases import Phase, mixes_of, phases_of
from sigray.workers.training.profile import StepProfiler
from sigray.workers.training.saver import Saver, restore
from sigray.workers.training.step import BadStep, Trainer


def train_loop_per_worker(job: TrainJob) -> None:
    """Train from the newest checkpoint, or from the start, to the end of the run.

    Each phase ends with a checkpoint, from which the next one goes on as a resume would.

    Raises:
        DataError: if too many samples are refused, or a shard changed.
        CheckpointError: if all checkpoints are damaged, or the newest is of another model.
        OSError: if the last checkpoint cannot be written.
        RunTakenOver: if another driver has taken over the run.
        BadStep: if features, loss or gradients are not finite numbers, or the loss leaps.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    torch.set_num_threads(max(1, job.cpus_per_worker))
    # Ray Train and torchrun both set it; the workers of a host see all of its GPUs.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    is_split = job.sharding.weights == "split"
    device = open_device(
        job.accelerator, local_rank, job.train.precision, job.devices_per_worker, splits_weights=is_split
    )
    check_collectives(device, job.train.global_batch_size // world_size)
    storage = Storage(job.storage_uri)
    phases = phases_of(job)
    counts = Counts()
    ended: Phase | None = None
    with StepProfiler(job.profile, device, storage, rank) as profiler:
        while True:
            ended = _train_phase(job, phases, ended, device, storage, profiler, counts, rank, world_size)
            if ended is None:
                return
            gc.collect()  # modules refer to themselves; the weights of a phase go before the next one's come
            if job.train.compile_blocks:
                torch._dynamo.reset()  # a resume compiles for one size too, not for any


def _train_phase(
    job: TrainJob,
    phases: Sequence[Phase],
    before: Phase | None,
    device: Device,
    storage: Storage,
    profiler: StepProfiler,
    counts: Counts,
    rank: int,
    world_size: int,
) -> Phase | None:
    """Train to the end of a phase; return the phase if another follows.

    Args:
        before: the phase that this process has just ended; None: it has not trained yet.
        counts: of the data, over the phases of this process.
    """
    global_batch_size = job.train.global_batch_size

    def build(phase: Phase) -> Trainer:
        return Trainer(
            phase.model,
            phase.optim,
            phase.loss,
            device,
            schedule=phase.schedule,
            global_batch_size=global_batch_size,
            micro_batch_size=job.train.micro_batch_size,
            seed=job.seed,
            phase=phase.number,
            activation_checkpointing=job.train.activation_checkpointing,
            compile_blocks=job.train.compile_blocks,
            stored_embeddings=job.manifest.store is not None,
            caption_ends=_caption_ends(phase.model) if phase.loss.caption_weight else None,
            ema=job.train.ema,
        )

    phase, trainer, restored = restore(storage, phases, build, rank, job.hooks.warn)
    first_step = restored or 0
    if restored is None and job.model.init_from is not None:
        load_initial_weights(trainer.module, job.model)
    num_steps = phases[-1].end_step
    if job.profile is not None:  # after the trainer: the schedule of the learning rate is that of the whole run
        num_steps = min(num_steps, job.profile.total)
    vocab_size: Any = trainer.module.get_submodule("text").vocab_size  # rows of its table
    pad = trainer.caption_ends.pad if trainer.caption_ends is not None else 0  # not known without captions
    pixels = trainer.pixels if job.manifest.store is None else None
    loader = Loader(
        build_order(job.manifest, job.data, job.seed, mixes_of(job)),
        job.blocks,
        job.data,
        image_kind=image_kind(job.manifest, phase.model, pixels),
        pixels=pixels,
        global_batch_size=global_batch_size,
        rank=rank,
        world_size=world_size,
        first_step=first_step,
        last_step=min(phase.end_step, num_steps),
        page_lock=device.page_lock if device.pins_memory else None,
        noise=Noise(job.train.label_noise, job.seed, vocab_size, pad) if job.train.label_noise else None,
        counts=counts,
    )
    saver = Saver(
        job,
        storage,
        trainer,
        device,
        phase=phase,
        rank=rank,
        world_size=world_size,
        first_step=first_step,
        num_steps=num_steps,
    )
    if rank == 0 and before is not None and first_step == before.end_step:
        job.hooks.phase_began(phase.number, first_step)
    elif rank == 0:  # also if the checkpoint of the border is damaged, and an older one goes on
        job.hooks.started(_facts(job, trainer, phases, phase, device, world_size, num_steps, first_step))
    if restored is None and job.saves_start:
        saver.save(0)

    window = LogWindow(loader, device, job, phase)
    left_out = set(read_left_out(storage))
    try:
        for batch in loader:
            steps_done = batch.step + 1
            if steps_done not in left_out:
                window.add(steps_done, trainer.step(batch))
            saver.add(batch)
            batch.release()
            # The losses are checked before each checkpoint: none is written after a bad step.
            if (steps_done + 1) % job.train.log_every_steps == 0:
                job.hooks.look_ahead()
            if steps_done % job.train.log_every_steps == 0 or saver.may_save(steps_done):
                with span("metrics"):
                    metrics = window.close(steps_done)
                    request: Request = saver.record(metrics) if rank == 0 and metrics else "go on"
                if saver.save_if_due(steps_done, request):
                    window.restart_clock()
                if saver.must_stop:
                    break
            saver.report_committed()
            profiler.step_done()
        saver.close()
    except BadStep:
        saver.close()  # the checkpoints before the bad step are good
        raise
    except BaseException:
        saver.abandon()
        raise
    finally:
        loader.close()
    return phase if phase.end_step < num_steps and not saver.must_stop else None


def _caption_ends(model: ModelConfig) -> CaptionEnds:
    _, context_length, vocab_size = shapes(model)
    return find_caption_ends(model, build_tokenizer(model, context_length, vocab_size))


def _weight_decay(optim: OptimConfig, trainer: Trainer) -> str:
    """What decays, and by which of the recipes."""
    counts = [
        (sum(parameter.numel() for parameter in group["params"]), group["weight_decay"] > 0)
        for group in trainer.optimizer.param_groups
    ]
    decayed = sum(count for count, decays in counts if decays) / 1e6
    trained = sum(count for count, _ in counts) / 1e6
    return f"{optim.weight_decay:g} on {optim.weight_decay_on}: {decayed:.1f} M of {trained:.1f} M parameters"


def _facts(
    job: TrainJob,
    trainer: Trainer,
    phases: Sequence[Phase],
    phase: Phase,
    device: Device,
    world_size: int,
    num_steps: int,
    first_step: int,
) -> dict[str, Any]:
    """The start-up block."""
    parts = {name: num_parameters(part) / 1e6 for name, part in named_parts(trainer.module)}
    return {
        "device": device.describe(),
        "world_size": world_size,
        "global_batch_size": job.train.global_batch_size,
        "batch_per_worker": job.train.global_batch_size // world_size,
        "micro_batch_size": job.train.micro_batch_size or job.train.global_batch_size // world_size,
        "parameters_m": {"all": num_parameters(trainer.module) / 1e6, **parts},
        "weight_decay": _weight_decay(phase.optim, trainer),
        "ema": job.train.ema,
        "first_step": first_step,
        "num_steps": num_steps,
        "phases": [
            {"number": each.number, "first_step": each.first_step, "changes": each.changes} for each in phases[1:]
        ],
        "epochs": num_steps * job.train.global_batch_size / job.manifest.num_samples,
    }
