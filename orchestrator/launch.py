"""One run from its config to its report: check, start, watch, evaluate, sum up. The driver's whole life in order.

Ray Train's trainer is constructed here and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from orchestrator.backends import torch_config, worker_resources
from orchestrator.config import ConfigError, RunConfig, check_resume
from orchestrator.folder import CONFIG, RunFolder
from orchestrator.monitor import Display, RayHooks, RunMonitor, TensorBoard
from orchestrator.policy import wanted_data_workers
from workers.checkpoint import CheckpointInfo, is_committed, list_checkpoints
from workers.shards import Manifest, in_threads, list_shards, scan_shards
from workers.tar import DataError

if TYPE_CHECKING:
    from workers.feed import BlockSource
    from workers.pool import DataPool
    from workers.train import Hooks, TrainJob

_POLL_S = 0.5
# For a Ray that this run starts itself. Every process of Ray costs about 1 % of a core by being there, and on a small
# machine those are the trainers' cores: nobody scrapes its metrics, reads its task events or sends it preemptions.
LEAN_RAY = {
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


class RunFailed(RuntimeError):
    """A run that ended by an error in the training workers; the message is for the user."""


def train(
    config: RunConfig, console: Console, *, resume_from: RunConfig | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Run a config to its end, or until it is interrupted.

    Args:
        config: what to run.
        console: where progress goes.
        resume_from: the config that the run began with, to go on from its newest checkpoint.
        overwrite: delete an earlier run of the same name first.

    Returns:
        The content of summary.json; `status` is "finished" or "stopped".

    Raises:
        ConfigError, DataError, OSError: for what the user can mend, before anything is started.
        RunFailed: where training itself failed.
    """
    begin = time.monotonic()
    display = Display(console)
    folder = RunFolder(config)
    if resume_from is not None:
        check_resume(resume_from, config)
    elif folder.is_used() and not overwrite:
        raise ConfigError(
            f"{folder.storage.uri} already holds a run: go on with `sigray resume {folder.storage.uri}`, "
            "choose another run.name, or add --overwrite to delete it"
        )
    folder.storage.check_writable()
    with contextlib.ExitStack() as stack:
        if _cluster_address(config):  # a cluster that is there already reads the headers of the shards
            stack.enter_context(_ray(config, display))
        manifest = _scan(config, display)
        if resume_from is not None:
            _check_unchanged(folder.manifest(), manifest)
        _check_model_and_sets(config)
        if resume_from is None and folder.is_used():
            folder.clear()
        folder.begin(config, manifest)
        if not _cluster_address(config):
            stack.enter_context(_ray(config, display))
        run = stack.enter_context(_Run(config, folder, manifest, display))
        try:
            status = run.watch()
            if status == "finished":
                run.finish_evaluations()
        except Exception:
            _sum_up(run, "failed", time.monotonic() - begin)
            raise
        return _sum_up(run, status, time.monotonic() - begin)


def _sum_up(run: _Run, status: str, total_s: float) -> dict[str, Any]:
    """Write summary and report, and bring the run's records to its storage."""
    from orchestrator.report import write_report

    summary = _summary(run, status, total_s)
    run.folder.save_summary(summary)
    write_report(run.folder.path)
    run.folder.upload_records()
    return summary


def evaluate(config: RunConfig, info: CheckpointInfo, console: Console) -> dict[str, Any]:
    """Evaluate one checkpoint as a Ray task and keep the result with the run."""
    display, folder = Display(console), RunFolder(config)
    _check_model_and_sets(config)
    with _ray(config, display):
        import ray

        result = ray.get(_submit_evaluation(config, folder, info))
        _add_baselines(config, result)
    if (folder.path / CONFIG).exists():
        from orchestrator.report import write_report

        folder.save_evaluation(result)
        write_report(folder.path)
    return result


@dataclass
class _Run:
    """The moving parts of a run that has begun: data-shard workers, monitor, Ray Train, evaluations."""

    config: RunConfig
    folder: RunFolder
    manifest: Manifest
    display: Display
    facts: dict[str, Any] = field(default_factory=dict)
    newest_evaluation: dict[str, Any] | None = None
    train_s: float = 0.0  # since the training workers were up for the first time

    def __enter__(self) -> _Run:
        import ray

        from workers.pool import DataPool

        self._monitor: Any = ray.remote(num_cpus=0)(RunMonitor).remote()
        self._pool = DataPool(self.manifest, self.config.data, self.config.model, seed=self.config.run.seed)
        self._lines_since_resize: list[dict[str, float]] = []
        self._tensorboard: TensorBoard | None = None
        self._to_evaluate: list[CheckpointInfo] = []
        self._evaluation: tuple[CheckpointInfo, Any] | None = None  # the one that runs, and its reference
        self._newest_checkpoint: CheckpointInfo | None = None
        self._failure: BaseException | None = None
        self._training_since: float | None = None
        self._thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()
        self.display.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def watch(self) -> str:
        """Follow the run to its end; returns "finished" or "stopped".

        Raises:
            RunFailed, DataError: what ended it.
        """
        begin = time.monotonic()
        with _stop_on_signal(self._ask_to_stop):
            while self._thread.is_alive() and self._failure is None:
                time.sleep(_POLL_S)
                self._take_events()
                self.display.waiting(time.monotonic() - begin)
        self._take_events()
        self.train_s = time.monotonic() - self._training_since if self._training_since is not None else 0.0
        if self._failure is not None:
            raise _explain_failure(self._failure, self.folder, self._newest_checkpoint)
        done = self._newest_checkpoint.step if self._newest_checkpoint else self.facts.get("first_step", 0)
        return "finished" if done >= self.facts.get("num_steps", 0) else "stopped"

    def finish_evaluations(self) -> None:
        """Wait for the figures of the newest checkpoint; also those of a run that had ended before it was resumed."""
        import ray

        if self._newest_checkpoint is None and self.config.eval.sets:
            self._to_evaluate += list_checkpoints(self.folder.storage)[-1:]
            self._evaluate_next()
        while self._evaluation is not None:
            ray.wait([self._evaluation[1]], timeout=_POLL_S)
            self._evaluate_next()
        if self.newest_evaluation is not None:
            _add_baselines(self.config, self.newest_evaluation)
            self.folder.save_evaluation(self.newest_evaluation)

    def _fit(self) -> None:
        try:
            _trainer(self.config, self.folder, self.manifest, self._pool, self._monitor).fit()
        except BaseException as error:
            self._failure = error

    def _ask_to_stop(self) -> None:
        self.display.say("stopping: a last checkpoint is written at the next log interval (again to stop at once)")
        self._monitor.request_stop.remote()

    def _take_events(self) -> None:
        import ray

        for event in ray.get(self._monitor.take.remote()):
            content = event["content"]
            if event["kind"] == "started":
                self._begin_attempt(content)
            elif event["kind"] == "metrics":
                self.folder.append_metrics(content)
                self.display.metrics(content)
                self._resize_pool(content)
                if self._tensorboard is not None:
                    self._tensorboard.metrics(content)
            elif event["kind"] == "checkpoint":
                self._newest_checkpoint = info = CheckpointInfo(**content)
                if self.config.eval.sets:
                    self._to_evaluate.append(info)
            elif event["kind"] == "failed":
                self._failure = content
        self._pool.tend()
        self._evaluate_next()

    def _resize_pool(self, line: dict[str, float]) -> None:
        num_workers = self.config.data.num_workers
        if isinstance(num_workers, int):
            return
        self._lines_since_resize.append(line)
        wanted = wanted_data_workers(self._lines_since_resize, self._pool.size, *num_workers)
        if wanted != self._pool.size:
            self.display.say(
                f"data-shard workers: {self._pool.size} -> {wanted} (data wait {line['data/wait_pct']:.0f} %)"
            )
            self._pool.resize(wanted)
            self._lines_since_resize = []

    def _begin_attempt(self, facts: dict[str, Any]) -> None:
        if self._training_since is None:
            self._training_since = time.monotonic()
        else:
            self.display.say(f"the training workers were restarted and go on from step {facts['first_step']:,}")
        self.facts = facts
        self.folder.cut_metrics(facts["first_step"])
        if self._tensorboard is not None:
            self._tensorboard.close()
        purge_from = facts["first_step"] * facts["global_batch_size"] + 1
        self._tensorboard = TensorBoard(self.folder, purge_from)
        self.display.start(str(self.folder.path), facts, _data_facts(self.manifest))

    def _evaluate_next(self) -> None:
        """One evaluation after the other: each worker process of its own would spend 15 s on imports first."""
        import ray

        if self._evaluation is not None:
            info, reference = self._evaluation
            if not ray.wait([reference], timeout=0)[0]:
                return
            self._evaluation = None
            try:
                self._keep_evaluation(ray.get(reference))
            except ray.exceptions.RayError as error:
                # The run goes on: `sigray eval` repeats it from its checkpoint.
                reason = getattr(error, "cause", error)
                self.display.say(f"the evaluation of {info.name} failed, the run goes on: {reason}")
        while self._to_evaluate and self._evaluation is None:
            info = self._to_evaluate.pop(0)
            if is_committed(self.folder.storage, info):
                self._evaluation = info, _submit_evaluation(self.config, self.folder, info)
            else:
                self.display.say(
                    f"{info.name} was deleted before its turn to be evaluated: "
                    "raise checkpoint.keep_newest or checkpoint.save_every_steps for a figure of each"
                )

    def _keep_evaluation(self, result: dict[str, Any]) -> None:
        self.folder.save_evaluation(result)
        self.display.evaluation(result)
        if self._tensorboard is not None:
            self._tensorboard.evaluation(result)
        if self.newest_evaluation is None or result["step"] >= self.newest_evaluation["step"]:
            self.newest_evaluation = result


def train_job(config: RunConfig, manifest: Manifest, blocks: BlockSource, hooks: Hooks) -> TrainJob:
    """What the training workers of a run need to know of its config."""
    from workers.train import TrainJob

    return TrainJob(
        data=config.data,
        model=config.model,
        train=config.train,
        loss=config.loss,
        optim=config.optim,
        checkpoint=config.checkpoint,
        seed=config.run.seed,
        accelerator=config.cluster.accelerator,
        cpus_per_worker=config.cluster.cpus_per_worker,
        manifest=manifest,
        storage_uri=config.storage_uri,
        blocks=blocks,
        hooks=hooks,
    )


def _trainer(config: RunConfig, folder: RunFolder, manifest: Manifest, pool: DataPool, monitor: Any) -> Any:
    """Ray Train's trainer of a run."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from workers.pool import PoolBlocks
    from workers.train import train_loop_per_worker

    hooks = RayHooks(monitor)
    job = train_job(config, manifest, PoolBlocks(pool.worker_list, config.data.worker_timeout_s), hooks)

    def train_worker(_: dict[str, Any]) -> None:
        try:
            train_loop_per_worker(job)
        except (ValueError, ArithmeticError) as error:  # bad data, a foreign checkpoint, a loss that is not a number
            hooks.failed(error)
            raise

    root, _, name = folder.storage.root.rpartition("/")
    return TorchTrainer(
        train_worker,
        train_loop_config={},
        torch_config=torch_config(config.cluster),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.cluster.num_workers,
            use_gpu=config.cluster.accelerator == "cuda",
            resources_per_worker=worker_resources(config.cluster),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=root,
            storage_filesystem=folder.storage.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )


def _submit_evaluation(config: RunConfig, folder: RunFolder, info: CheckpointInfo) -> Any:
    import ray

    from workers.evaluate import evaluate_checkpoint

    task: Any = ray.remote(num_cpus=1)(evaluate_checkpoint)
    return task.remote(folder.storage.uri, info, config.model, config.data, config.eval)


def _add_baselines(config: RunConfig, result: dict[str, Any]) -> None:
    """Put the pixel neighbour's rate beside the zero-shot figures, where the config asks for it."""
    import ray

    from workers.evaluate import pixel_baseline

    if config.eval.pixel_baseline:
        baselines = ray.get(ray.remote(num_cpus=1)(pixel_baseline).remote(config.data, config.eval))
        for name, baseline in baselines.items():
            result["zero_shot"][name]["pixel_baseline_top1"] = baseline


def _scan(config: RunConfig, display: Display) -> Manifest:
    from workers.pool import in_tasks

    parallel_map = in_tasks if _cluster_address(config) else in_threads
    manifest = scan_shards(config.data.shards, config.data, _ScanProgress(display), parallel_map)

    from workers.data_worker import build_order

    batch = config.train.global_batch_size
    order = build_order(manifest, config.data, config.run.seed)
    for number, (name, dataset) in enumerate(zip(manifest.datasets(), order.datasets, strict=True)):
        share = order.num_of_dataset(number, batch)
        if dataset.num_samples < share:
            raise ConfigError(
                f"train.global_batch_size={batch} takes {share} samples of data.shards{'.' + name if name else ''}, "
                f"which has {dataset.num_samples}: one batch would hold a pair twice and count it as its own negative"
            )
    return manifest


class _ScanProgress:
    """A line when shards have to be read, and one about every ten seconds of it."""

    def __init__(self, display: Display) -> None:
        self._display, self._said = display, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if not done:
            self._display.say(f"reading the headers of {total:,} shards")
        elif time.monotonic() - self._said > 10:
            self._display.say(f"read the headers of {done:,} of {total:,} shards")
        else:
            return
        self._said = time.monotonic()


def _check_unchanged(saved: Manifest, now: Manifest) -> None:
    changed = saved.differences(now)
    if changed:
        shown = "\n  ".join(changed[:20])
        raise DataError(f"the shards changed since the run began, so its order cannot be continued:\n  {shown}")


def _check_model_and_sets(config: RunConfig) -> None:
    """What can be found wrong without a cluster: shapes, tokenizer, held-out sets, and that the towers can be built."""
    from workers.evaluate import read_classes
    from workers.tokenizer import build_tokenizer
    from workers.towers import check_model, shapes

    _, context_length, vocab_size = shapes(config.model)
    build_tokenizer(config.model, context_length, vocab_size)
    for spec in config.eval.sets.values():
        list_shards(spec.shards, config.data.s3)
        if spec.classes:
            read_classes(spec.classes)
    check_model(config.model)


def _cluster_address(config: RunConfig) -> str | None:
    """Of the cluster that the run joins; None: it starts a Ray of its own."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def _ray(config: RunConfig, display: Display) -> Iterator[None]:
    """Join the cluster that is named, or start a Ray of this run's own; leave it at the end."""
    # One result per controller poll: at Ray's default of 2 s every checkpoint would hold all ranks for 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1" if config.cluster.dashboard else "0")
    address = _cluster_address(config)
    if not address and not config.cluster.dashboard:
        for name, value in LEAN_RAY.items():
            os.environ.setdefault(name, value)
    import ray

    if address:
        display.say(f"joining the Ray cluster at {address}")
        ray.init(address=address, log_to_driver=False)
    else:
        num_workers = config.data.num_workers
        num_data_workers = num_workers if isinstance(num_workers, int) else num_workers[1]
        needed = (
            config.cluster.num_workers * config.cluster.cpus_per_worker
            + num_data_workers * config.data.cpus_per_worker
            + 1  # evaluation
        )
        display.say("starting Ray on this machine")
        ray.init(
            address="local",
            # Ray only counts CPUs: on a small machine the data-shard workers and the trainers share the cores.
            num_cpus=max(os.cpu_count() or 1, int(needed + 0.5)),
            resources={
                name: amount * config.cluster.num_workers
                for name, amount in config.cluster.resources_per_worker.items()
            },
            include_dashboard=config.cluster.dashboard,
            log_to_driver=False,
            configure_logging=False,
        )
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _stop_on_signal(ask: Any) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the run to stop, the second ends the driver."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        ask()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explain_failure(error: BaseException, folder: RunFolder, newest: CheckpointInfo | None) -> Exception:
    """The cause of a failed run in the user's terms."""
    causes = list(getattr(error, "worker_failures", {}).values()) or [error]
    for cause in causes:
        if isinstance(cause, ValueError):
            return cause
    advice = (
        f"go on from step {newest.step:,} with `sigray resume {folder.storage.uri}`" if newest else "no checkpoint yet"
    )
    return RunFailed(f"training failed ({advice}):\n{causes[0]}")


def _data_facts(manifest: Manifest) -> dict[str, int]:
    return {"shards": len(manifest.shards), "samples": manifest.num_samples, "bytes": manifest.num_bytes}


def _summary(run: _Run, status: str, total_s: float) -> dict[str, Any]:
    evaluation = run.newest_evaluation or {}
    lines = run.folder.metrics()
    newest = lines[-1] if lines else {}
    return {
        "name": run.config.run.name,
        "status": status,
        "steps": newest.get("step", 0),
        "samples_seen": newest.get("samples_seen", 0),
        "train_s": round(run.train_s, 1),
        "total_s": round(total_s, 1),
        "loss": newest.get("train/loss"),
        "facts": run.facts,
        "data": _data_facts(run.manifest),
        "zero_shot": evaluation.get("zero_shot", {}),
        "retrieval": evaluation.get("retrieval", {}),
        "environment": environment(),
    }


def environment() -> dict[str, str]:
    """Versions, hardware and commit, as every result that is quoted carries them."""
    from importlib.metadata import version

    def commit() -> str:
        root = Path(__file__).resolve().parent.parent
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    def processor() -> str:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.processor()

    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("sigray", "torch", "ray", "open-clip-torch", "webdataset")},
        "hardware": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
    }
