"""Evaluate the checkpoints of a run beside training, and mark the best one."""

from __future__ import annotations

from typing import Any

from sigray.orchestrator.config import RunConfig
from sigray.orchestrator.resources import evaluation_resources
from sigray.orchestrator.run.observer import Observer
from sigray.orchestrator.run.policy import RunFailed
from sigray.orchestrator.run.progress import Display
from sigray.orchestrator.run.records import RunRecords
from sigray.orchestrator.run.trial import Rungs
from sigray.orchestrator.run_folder import RunFolder
from sigray.workers.checkpoint.index import CheckpointInfo, is_committed, list_checkpoints
from sigray.workers.checkpoint.writer import mark_best, read_best
from sigray.workers.training.phases import has_trained_decoder, phase_of_checkpoint, phases_of

_MAX_TRIES = 3  # of the evaluation of a rung, which a trial cannot do without
_WAIT_S = 0.5


class Evaluations:
    """The queue of checkpoints to evaluate.

    One evaluation runs at a time: worker processes of its own would cost each evaluation 15 s of imports.

    Attributes:
        newest: result of the newest evaluated checkpoint; None before the first.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        records: RunRecords,
        rungs: Rungs,
        display: Display,
        observer: Observer | None,
    ) -> None:
        self._config, self._folder, self._display = config, folder, display
        self._records, self._rungs, self._observer = records, rungs, observer
        # Of the initial weights, if an earlier driver died before it evaluated them.
        first = list_checkpoints(folder.storage)[:1] if config.eval.sets else []
        self._queue = [info for info in first if info.step == 0 and not folder.has_evaluation(info.step)]
        self._running: tuple[CheckpointInfo, Any] | None = None  # and the reference of its task
        self._num_failures = 0  # in a row
        self._saw_checkpoint = False
        self.newest: dict[str, Any] | None = None

    def add(self, info: CheckpointInfo) -> None:
        """Queue a checkpoint, if the run has held-out sets."""
        self._saw_checkpoint = True
        if self._config.eval.sets:
            self._queue.append(info)

    def poll(self) -> None:
        """Take the result of the running evaluation, if it is there, and start the next.

        Raises:
            RunFailed: if the evaluation of a rung failed each time.
        """
        import ray

        if self._running is not None:
            info, reference = self._running
            if not ray.wait([reference], timeout=0)[0]:
                return
            self._running = None
            try:
                result = ray.get(reference)
            except ray.exceptions.RayError as error:
                self._failed(info, error)
            else:
                self._num_failures = 0
                self._records.evaluation(result)
                if self._observer is not None:
                    self._observer.evaluation(result)
                self._mark_best(result)
                if self.newest is None or result["step"] >= self.newest["step"]:
                    self.newest = result
                self._rungs.evaluated(result)
        while self._queue and self._running is None:
            info = self._queue.pop(0)
            if is_committed(self._folder.storage, info):
                self._running = info, submit_evaluation(self._config, self._folder, info)
            else:
                self._display.say(
                    f"{info.name} was deleted before its evaluation: raise checkpoint.keep_newest or "
                    "checkpoint.save_every_steps to evaluate each checkpoint"
                )

    def finish(self) -> None:
        """Evaluate the rest of the queue.

        A run that had ended before its resume saves no checkpoint: its newest one is evaluated.
        """
        import ray

        if not self._saw_checkpoint:
            for info in list_checkpoints(self._folder.storage)[-1:]:
                self.add(info)
            self.poll()
        while self._running is not None:
            ray.wait([self._running[1]], timeout=_WAIT_S)
            self.poll()

    def _failed(self, info: CheckpointInfo, error: Exception) -> None:
        """Try the evaluation of a rung again; a run without it goes on."""
        reason = getattr(error, "cause", error)
        if not self._rungs.needs_evaluation(info.step):
            self._display.say(f"the evaluation of {info.name} failed, `sigray eval` repeats it: {reason}")
            return
        self._num_failures += 1
        if self._num_failures == _MAX_TRIES:
            raise RunFailed(f"the evaluation of {info.name} failed each time: {reason}") from error
        self._queue.insert(0, info)

    def _mark_best(self, result: dict[str, Any]) -> None:
        """Mark the checkpoint as best if its figure exceeds that of the best so far."""
        path = self._config.checkpoint.keep_best
        if path is None:
            return
        figure: Any = result
        for name in path.split("."):
            figure = figure.get(name) if isinstance(figure, dict) else None
        if not isinstance(figure, float | int):
            self._display.say(f"checkpoint.keep_best={path} is no figure of the evaluation: nothing is marked as best")
            return
        best = read_best(self._folder.storage)
        if best is None or figure > best[1]:
            mark_best(self._folder.storage, f"step-{result['step']:010d}", figure)


def evaluates_at_start(config: RunConfig, *, is_trial: bool) -> bool:
    """Return whether a run evaluates its initial weights."""
    is_default = config.model.init_from is not None and not is_trial
    return bool(config.eval.sets) and (is_default if config.eval.at_start is None else config.eval.at_start)


def submit_evaluation(config: RunConfig, folder: RunFolder, info: CheckpointInfo) -> Any:
    """Start the evaluation of a checkpoint as a Ray task; return the task's reference."""
    import ray

    from sigray.workers.evaluation.evaluate import evaluate_checkpoint
    from sigray.workers.evaluation.features import EvaluationJob

    phases = phases_of(config)
    model = phase_of_checkpoint(phases, info.step).model
    captions = has_trained_decoder(phases, info.step)
    job = EvaluationJob(folder.storage.uri, info, model, config.data, config.eval, config.embeddings, captions=captions)
    resources = evaluation_resources(config.eval)
    task: Any = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))(evaluate_checkpoint)
    return task.remote(job)


def add_baselines(config: RunConfig, result: dict[str, Any]) -> None:
    """Add the pixel neighbour's rate to the zero-shot figures, if configured."""
    import ray

    from sigray.workers.evaluation.evaluate import pixel_baseline

    if config.eval.pixel_baseline:
        task = ray.remote(num_cpus=1)(pixel_baseline).remote(config.data, config.eval)
        for name, baseline in ray.get(task).items():
            result["zero_shot"][name]["pixel_baseline_top1"] = baseline
