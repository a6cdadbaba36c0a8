"""The driver of a sweep, from study to report, in the order in which it happens.

    check -> propose -> skip infeasible trials -> [ Ray Tune runs trials, which stop themselves ] -> report

    driver: sigray sweep           this file
      |-- Judge (actor)            the table of results; decides at rungs                  tuning/judge.py
      |-- data-shard workers       of each stream that trials share                        workers/data/pool.py
      '-- Ray Tune: trials (actors), as many as the free resources allow
            '-- a whole `sigray train` each, with its own worker group, checkpoints and evaluations

Ray Tune starts the trials and restarts a trial whose process died. It receives results but decides nothing. It would
stop a trial by killing it, which leaks the resources of the training workers (Ray #54305), and it loses its state when
it is restored (Ray #30838). Here a trial asks the `Judge` at its rungs and ends by itself. The table holds the whole
state of a sweep and is on disk before any process acts on it.

The file is long because the driver's three tasks (checks, Ray Tune's callbacks, capacity) share one table.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sigray.orchestrator.address import cluster_address
from sigray.orchestrator.carried_files import FILES, keep_carried
from sigray.orchestrator.config import ConfigError, RunConfig, check_resume, parse_config
from sigray.orchestrator.plain_console import PlainConsole
from sigray.orchestrator.resources import evaluation_resources, worker_resources
from sigray.orchestrator.run.driver import train
from sigray.orchestrator.run.own_ray import check_start
from sigray.orchestrator.run.preflight import scan
from sigray.orchestrator.run.progress import Display
from sigray.orchestrator.run.ray_session import ray_session
from sigray.orchestrator.run.signals import on_stop_signal
from sigray.orchestrator.run.trial import TRIAL_CPUS, rung_step
from sigray.orchestrator.run_folder import REPORT, WRITTEN, check_inputs, check_kind, clear_folder, left_message
from sigray.tuning.capacity import Demand, Node, count_trials
from sigray.tuning.feasible import feasible
from sigray.tuning.judge import Judge
from sigray.tuning.live import LiveTable, results_table, words
from sigray.tuning.search import Search
from sigray.tuning.study import STUDY, Study, read_study, trial_name
from sigray.tuning.table import RESULTS, Row, Table, Writer
from sigray.workers.checkpoint.lease import LEASE_FILE, RunHeld, RunLease
from sigray.workers.data.manifest import Manifest
from sigray.workers.storage import Storage

if TYPE_CHECKING:
    from sigray.workers.data.pool import DataPool, SharedPool
    from sigray.workers.training.job import Answer

_TABLE_INTERVAL_S = 1.0  # between two updates of the table
_CAPACITY_INTERVAL_S = 5.0  # between two looks at the cluster's free resources
_RESTARTS = 2  # of a trial whose process died
_LEASE_WAIT_S = 90.0  # a trial waits so long for the lease of a driver of the same run that may be dying
_MAX_WHY = 400  # characters of a reason in the table
# What a sweep writes: `--overwrite` deletes nothing else.
_WRITTEN = (
    STUDY, RESULTS, LEASE_FILE, REPORT, "trials.csv", "best.yaml", "tune.log", "figures/*.png", "trials/trial-*.log",
    "trials", "figures", f"{FILES}/*/*", *(f"trials/trial-*/{name}" for name in WRITTEN),
)  # fmt: skip
_SLACK_BLOCKS = 3  # by which subscribers of a stream may differ, besides what they prefetch


def sweep(study: Study, console: Console | None = None, *, overwrite: bool = False, retry: bool = False) -> Table:
    """Run a study to its end, or until it is interrupted; resume a sweep that began.

    Args:
        study: as `load_study` returns it.
        console: progress goes there; by default standard output.
        overwrite: delete an earlier sweep of the same name first.
        retry: run failed trials again.

    Returns:
        The table. If the sweep was interrupted, some trials are not over.

    Raises:
        ConfigError, OSError: for what the user can repair, before anything starts.
        RuntimeError: if no trial reached a result.
    """
    from sigray.tuning.report import write_report

    # Ray Tune prints to standard output: while it runs that is redirected to a file, and our console is not.
    display = Display(PlainConsole(file=(console or PlainConsole()).file))
    config = study.config
    base = _base(study)
    check_start(base, num_evaluations=base.eval.num_workers)
    storage = Storage(config.storage_uri)
    storage.check_writable()
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(RunLease(storage))
        if overwrite:
            left = _clear(study, storage)
            if left:
                display.say(left_message(left))
        is_begun = storage.exists(STUDY)
        if is_begun:
            _check_same(study, storage)
            display.say(f"{storage.uri} holds this sweep already: resuming it (--overwrite starts again)")
        if cluster_address(base):
            stack.enter_context(ray_session(base, display))
        driver = _Sweep(study, storage, display, lease)
        try:
            if not is_begun:
                storage.delete(RESULTS)  # of a driver that died before it wrote the study
            driver.prepare()
        except ConfigError:
            if not is_begun:
                storage.delete(RESULTS)
            raise
        if retry:
            driver.retry()
        if not is_begun:
            storage.write(STUDY, config.to_yaml().encode())
            keep_carried(config.model_dump(mode="json"), storage)
        config.folder.mkdir(parents=True, exist_ok=True)
        (config.folder / STUDY).write_text(config.to_yaml())
        if not driver.is_done:
            if not cluster_address(base):
                stack.enter_context(ray_session(base, display, driver.num_local_trials))
            stack.enter_context(driver)
            driver.run()
        write_report(study, storage, driver.table)
        failed = [row for row in driver.table.rows.values() if row.status == "failed"]
        if failed and not any(row.results for row in driver.table.rows.values()):
            raise RuntimeError(f"no trial reached a result; trial {failed[0].number}: {failed[0].error}")
        return driver.table


def plan(study: Study, console: Console) -> Any:
    """A table for the terminal of the trials known in advance, infeasible ones marked."""
    with tempfile.TemporaryDirectory(prefix="sigray-plan-") as folder:
        driver = _Sweep(study, Storage(folder), Display(console))
        driver.prepare()
        return results_table(driver.table, study)


@dataclass
class _Sweep:
    """The state of a sweep's driver."""

    study: Study
    storage: Storage
    display: Display
    lease: RunLease | None = None  # None if no trial will run
    is_stopping: bool = False
    _manifests: dict[str, Manifest] = field(default_factory=dict)
    _configs: dict[int, RunConfig] = field(default_factory=dict)  # of the trials that can run
    _running: dict[str, int] = field(default_factory=dict)  # Ray Tune's id -> number
    _pools: dict[str, DataPool] = field(default_factory=dict)
    _judge: Any = None
    table: Table = field(default_factory=Table)

    # ---------------------------------------------------------------------------------- before anything starts

    def prepare(self) -> None:
        """Propose all trials that are known in advance, and find the infeasible ones.

        Raises:
            ConfigError: if no trial can run.
        """
        self._search = Search(self.study)
        self._writer = Writer(self.storage)
        self.table = self._writer.table
        for row in self.table.rows.values():
            why = "" if row.is_over else self._check(row)
            if why:
                raise ConfigError(f"trial {row.number} cannot continue: {why}")
        if not self._search.needs_results:
            while len(self.table.rows) < self._search.num_trials:
                self._propose_next()
        infeasible = [row for row in self.table.rows.values() if row.status == "infeasible"]
        if infeasible and len(infeasible) == self._search.num_trials:
            raise ConfigError(f"no trial of the study can run; trial {infeasible[0].number}: {infeasible[0].error}")

    def retry(self) -> None:
        """Mark failed trials to run again.

        Raises:
            ConfigError: if one of them cannot run any more; then none is marked.
        """
        failed = [row for row in self.table.rows.values() if row.status == "failed"]
        for row in failed:
            why = self._check(row)
            if why:
                raise ConfigError(f"trial {row.number} failed and cannot run again: {why}")
        self._add(*({"event": "retry", "number": row.number} for row in failed))
        self.display.say(
            f"trials to run again: {', '.join(str(row.number) for row in failed) or 'none, no trial has failed'}"
        )

    @property
    def is_done(self) -> bool:
        rows = self.table.rows.values()
        return len(rows) == self._search.num_trials and all(row.is_over for row in rows)

    @property
    def num_local_trials(self) -> int:
        """Number of trials that keep the processors of this machine's own Ray busy.

        Trials on accelerators may be fewer: see `_capacity_now`.
        """
        base = _base(self.study).cluster
        places = len(os.sched_getaffinity(0)) // (base.worker_range[1] * base.cpus_per_worker)
        return max(1, min(self.study.config.parallel or places, self._search.num_trials))

    def _propose_next(self) -> bool:
        """Write the next trial into the table; False if it has to wait for results."""
        number = len(self.table.rows)
        outcomes = [self.table.rows[other].outcome() for other in range(number)]
        proposal = self._search.propose(number, outcomes)
        if proposal is None:
            return False
        point = proposal.point
        event = {"event": "trial", "number": number, "seed": proposal.seed, "budget": proposal.budget}
        self._add(event | {"values": point.values, "overrides": point.overrides})
        row = self.table.rows[number]
        why = self._check(row)
        if why:
            self._add({"event": "infeasible", "number": number, "why": why})
            self.display.say(f"trial {number} cannot run and is skipped ({words(row.values)}): {why}")
        return True

    def _check(self, row: Row) -> str:
        """Keep the config of a feasible trial; returns the reason if it cannot run."""
        content = self.study.trial_content(row.number, row.seed, row.budget, row.overrides)
        found = feasible(content, self.study.config.rungs_of(row.budget), self._manifest)
        if isinstance(found, str):
            return found
        self._configs[row.number] = found
        return ""

    def _manifest(self, config: RunConfig) -> Manifest:
        data = config.model_dump(mode="json")["data"]
        key = json.dumps([data[name] for name in ("shards", "s3", "image_keys", "captions")])
        if key not in self._manifests:
            self._manifests[key] = scan(config, self.display)
        return self._manifests[key]

    def _add(self, *events: dict[str, Any]) -> None:
        """Write events to the table; once the `Judge` runs, only that actor writes."""
        if self._judge is None:
            self._writer.add(*events)
        else:
            import ray

            ray.get(self._judge.add.remote(*events))
            self.table, _ = ray.get(self._judge.table.remote())

    # -------------------------------------------------------------------------------------------- while it runs

    def __enter__(self) -> _Sweep:
        import ray

        from sigray.workers.data.pool import start_here

        config = self.study.config
        num_rungs = {budget: len(config.rungs_of(budget)) for budget in config.budgets}
        self._judge = start_here(Judge, config.name, self.storage.uri, config.rules, num_rungs)
        self._foreign = _used_by_others()
        self._capacity, self._capacity_at = 0, 0.0
        self._looked_at = 0.0
        self._live = LiveTable(self.display, self.study)
        ray.get(self._judge.table.remote())
        return self

    def __exit__(self, *_: object) -> None:
        self._live.close()
        for pool in self._pools.values():
            pool.close()

    def run(self) -> None:
        """Let Ray Tune run the trials until all are over or the sweep is interrupted."""
        # We show our own table. Ray Tune shall write no log folders, handle no Ctrl-C and change no working directory.
        os.environ.update(
            TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", TUNE_DISABLE_SIGINT_HANDLER="1", RAY_CHDIR_TO_TRIAL_DIR="0"
        )
        from ray import tune

        from sigray.tuning.tune_adapter import Trials, Watch

        watch = Watch(self)
        scratch = tempfile.mkdtemp(prefix="sigray-tune-")
        trainable: Any = tune.with_resources(
            tune.with_parameters(_run_trial, judge=self._judge, study=self.study),
            # Evaluations run in the trial's placement group: a trial starts them without a placement of their own.
            tune.PlacementGroupFactory([{"CPU": TRIAL_CPUS}, *self._evaluation_demand()]),
        )
        # Ray Tune would warn that the files of its disabled loggers are missing.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        tuner = tune.Tuner(
            trainable,
            # Reuse the processes of trials: each spends ten seconds on imports.
            tune_config=tune.TuneConfig(search_alg=Trials(self), num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                verbose=0,
                callbacks=[watch],
                stop=watch,
                failure_config=tune.FailureConfig(max_failures=_RESTARTS),
            ),
        )
        self._live.start(self.table, self._capacity_now(), self.num_streams)
        log = self.study.config.folder / "tune.log"
        with on_stop_signal(self._ask_to_stop), log.open("a") as file, contextlib.redirect_stdout(file):
            tuner.fit()
        self._note_costs(*self._pools.values())
        self.look(at_once=True)
        shutil.rmtree(scratch, ignore_errors=True)

    def next_trial(self, trial_id: str) -> int | str | None:
        """Number of the next trial; None to ask again later, "FINISHED" at the end."""
        if self.is_stopping:
            return "FINISHED"
        if len(self._running) >= self._capacity_now():
            return None
        while True:
            at_work = set(self._running.values())
            waiting = (row for row in self.table.rows.values() if not row.is_over and row.number not in at_work)
            row = next(waiting, None)
            if row is not None:
                break
            if len(self.table.rows) == self._search.num_trials:
                return "FINISHED"
            if not self._propose_next():
                return None
        self._running[trial_id] = row.number
        self._assign_stream(row.number)
        return row.number

    def trial_ended(self, trial_id: str, error: str | None) -> None:
        """Record the end of a trial's process; `error` says why if it died too often."""
        number = self._running.pop(trial_id, None)
        self.look(at_once=True)
        if number is not None and not self.table.rows[number].is_over and not self.is_stopping:
            why = error or "its process ended before its last rung"
            self._add({"event": "failed", "number": number, "why": why})
            self.look(at_once=True)

    def trial_restarts(self, trial_id: str) -> None:
        """Report that Ray Tune restarts a trial whose process died."""
        number = self._running[trial_id]
        self.display.say(f"trial {number}: its process died and restarts from the newest checkpoint")

    def look(self, at_once: bool = False) -> None:
        """Update and show the table. Ray Tune calls this several times a second."""
        import ray

        if not at_once and time.monotonic() - self._looked_at < _TABLE_INTERVAL_S:
            return
        self._looked_at = time.monotonic()
        if self.lease is not None:
            self.lease.check()
        running = set(self._running.values())
        self.table, lines = ray.get(self._judge.table.remote(running))
        self._live.show(self.table, lines, running)
        for pool in self._pools.values():
            pool.poll()

    @property
    def num_streams(self) -> int:
        return len({self._stream_key(config) for config in self._configs.values()})

    def _ask_to_stop(self) -> None:
        self.is_stopping = True
        self.display.say(
            "stopping: each trial writes a checkpoint at its next log interval (Ctrl-C again stops at once)"
        )
        self._judge.stop.remote()

    def _capacity_now(self) -> int:
        """Trials that may run at once."""
        if time.monotonic() - self._capacity_at > _CAPACITY_INTERVAL_S:
            self._capacity_at = time.monotonic()
            parallel = self.study.config.parallel
            most = min(self._search.num_trials, parallel or self._search.num_trials)
            if not cluster_address(_base(self.study)):
                most = min(most, self.num_local_trials)
            data = _base(self.study).data
            pool = [{"CPU": data.cpus_per_worker}] * _num_data_workers(data.num_workers)
            # Two streams are open at once while one seed ends and the next begins.
            pools = Demand([], pool * min(2, max(1, self.num_streams)))
            count = count_trials(_nodes(self._foreign), pools, self._trial_demand(), most)
            # A cluster may grow, or start empty: then a waiting trial names its pending reason.
            self._capacity = parallel or max(1, count)
        return self._capacity

    def _trial_demand(self) -> Demand:
        """Of the largest trial."""
        clusters = [config.cluster for config in self._configs.values()] or [_base(self.study).cluster]
        cluster = max(clusters, key=lambda one: one.worker_range[1] * sum(worker_resources(one).values()))
        workers = [worker_resources(cluster)] * cluster.worker_range[1]
        return Demand(workers, [*self._evaluation_demand(), {"CPU": TRIAL_CPUS}])

    def _evaluation_demand(self) -> list[dict[str, float]]:
        """Of a trial's evaluations, which share one config."""
        evaluation = _base(self.study).eval
        return [evaluation_resources(evaluation)] * evaluation.num_workers

    def _assign_stream(self, number: int) -> None:
        """Assign a stream to a trial; start its data-shard workers with the first trial."""
        import ray

        from sigray.workers.data.pool import DataPool

        config = self._configs[number]
        key = self._stream_key(config)
        if key not in self._pools:
            self._close_finished_pools()
            window = self._window(config, key)
            num_workers = _num_data_workers(config.data.num_workers)
            blocks = max(config.data.shared_blocks, 2 * window)  # two groups of subscribers at different positions
            data = config.data.model_copy(update={"num_workers": num_workers, "shared_blocks": blocks})
            self._pools[key] = DataPool(
                self._manifest(config),
                data,
                config.model,
                seed=config.run.seed,
                window=window,
                run=self.study.config.name,
            )
            self._pools[key].start()
        ray.get(self._judge.assign.remote(number, [self._pools[key].registry], config.model_dump(mode="json")))

    def _window(self, config: RunConfig, key: str) -> int:
        """Blocks of a lane within which subscribers keep pace: prefetch and some slack."""
        data = config.data
        sharing = [other for other in self._configs.values() if self._stream_key(other) == key]
        round_size = data.total_lanes * data.block_size
        ahead = max(other.train.global_batch_size * (other.data.prefetch_batches + 1) for other in sharing)
        return -(-ahead // round_size) + _SLACK_BLOCKS

    def _stream_key(self, config: RunConfig) -> str:
        """A key of all settings that decide samples, images and tokens of a stream."""
        from sigray.workers.model.inputs import shapes

        data = config.data.model_dump(mode="json")
        for name in ("num_workers", "cpus_per_worker", "prefetch_batches", "shared_blocks", "worker_timeout_s"):
            data.pop(name)
        return json.dumps([data, config.run.seed, shapes(config.model), config.model.tokenizer], sort_keys=True)

    def _close_finished_pools(self) -> None:
        """Close the pools of streams that no trial will read any more."""
        if self._search.needs_results:
            return
        waiting = [row.number for row in self.table.rows.values() if not row.is_over]
        wanted = {self._stream_key(self._configs[number]) for number in waiting if number in self._configs}
        for key in self._pools.keys() - wanted:
            pool = self._pools.pop(key)
            self._note_costs(pool)
            pool.close()

    def _note_costs(self, *pools: DataPool) -> None:
        """Record the costs of streams in the table."""
        import ray

        for pool in pools:
            with contextlib.suppress(ray.exceptions.RayError):  # a data-shard worker that is just being replaced
                self._add({"event": "stream"} | pool.usage())


# --------------------------------------------------------------------------------------- in a trial's process


class _SweepTrial:
    """A trial as `train` sees it, see `sigray.orchestrator.run.trial.Trial`."""

    def __init__(
        self, judge: Any, number: int, study: Study, rungs: list[int], batch: int, passed: list[int], pool: SharedPool
    ) -> None:
        self._judge, self._number, self.pool = judge, number, pool
        self._metric = study.config.metric
        self.name = f"{study.config.name}/{trial_name(number)}"
        self._rung_of_step = {rung_step(samples, batch): rung for rung, samples in enumerate(rungs)}
        self.rungs = tuple(rungs)
        self.passed = frozenset(step for step, rung in self._rung_of_step.items() if rung in passed)

    def record(self, line: dict[str, float]) -> bool:
        import ray

        return ray.get(self._judge.heard.remote(self._number, line))

    def decide(self, evaluation: dict[str, Any], line: dict[str, float]) -> Answer:
        import ray
        from ray import tune

        value = figure_of(evaluation, self._metric)
        rung = self._rung_of_step[evaluation["step"]]
        seen = evaluation["samples_seen"]
        loss = line.get("train/loss")
        figures = {task: evaluation[task] for task in ("zero_shot", "retrieval", "multilingual")}
        asked = self._judge.decide.remote(self._number, rung, seen, value, {"loss": loss, "figures": figures})
        answer: Answer = ray.get(asked)
        if answer != "wait":
            tune.report({"samples_seen": seen, "figure": value, "loss": loss})
        return answer


def _run_trial(config: dict[str, Any], *, judge: Any, study: Study) -> None:
    """What Ray Tune runs: one `sigray train`, its output in a file.

    Args:
        config: {"number"} of the trial.
        judge: handle of the `Judge`.
    """
    import ray

    from sigray.workers.data.pool import SharedPool

    number = config["number"]
    content, stream, passed = ray.get(judge.assignment.remote(number))
    run = parse_config(content, trial_name(number))
    rungs = study.config.rungs_of(run.train.num_samples)
    pool = SharedPool(stream[0], trial_name(number))
    trial = _SweepTrial(judge, number, study, rungs, run.train.global_batch_size, passed, pool)
    log = run.folder.parent / f"{trial_name(number)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as file:
        try:
            _train(run, PlainConsole(file=file, width=160), trial)
        except ray.exceptions.RayActorError:
            raise  # the judge or the driver died: no fault of the trial
        except Exception as error:
            traceback.print_exc(file=file)
            why = str(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {error}"
            ray.get(judge.add.remote({"event": "failed", "number": number, "why": shortened(why, log.name)}))


def shortened(why: str, log: str) -> str:
    """The beginning of a reason, which from Ray can have hundreds of lines."""
    text = " ".join(line.strip() for line in why.splitlines() if line.strip())
    return text if len(text) <= _MAX_WHY else f"{text[:_MAX_WHY]}... (all of it: trials/{log})"


def _train(run: RunConfig, console: Console, trial: _SweepTrial) -> None:
    """Call `train`, after the lease of a dying driver of the same run has expired."""
    deadline = time.monotonic() + _LEASE_WAIT_S
    while True:
        try:
            train(run, console, trial=trial)
            return
        except RunHeld:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def figure_of(evaluation: dict[str, Any], metric: str) -> float:
    """The value of a metric in an evaluation; SET in zero_shot.SET.top1 may have dots."""
    task, _, rest = metric.partition(".")
    name, _, figure = rest.rpartition(".")
    return float(evaluation[task][name][figure])


# ------------------------------------------------------------------------------------------------------ helpers


def _base(study: Study) -> RunConfig:
    return parse_config(study.base, study.config.name)


def _num_data_workers(num_workers: int | tuple[int, int]) -> int:
    """Number of data-shard workers of a stream: the upper bound, as trials share it."""
    return num_workers if isinstance(num_workers, int) else num_workers[1]


def _check_same(study: Study, storage: Storage) -> None:
    """Refuse to resume another study under the same name.

    Raises:
        ConfigError: naming what differs.
    """
    saved = read_study(storage.uri)
    before, after = saved.config.model_dump(mode="json"), study.config.model_dump(mode="json")
    lines = [
        f"{key}: the sweep was started with {before[key]}, now {after[key]}"
        for key in ("metric", "budget", "rungs", "seeds", "space", "search", "scheduler")
        if before[key] != after[key]
    ]
    old, new = (_base(each).eval.model_copy(update={"num_workers": 1}) for each in (saved, study))
    if old != new:
        lines.append("eval: the sweep was started with other held-out sets")
    try:
        check_resume(_base(saved), _base(study))  # cluster and storage may change
    except ConfigError as error:
        lines += [line.strip() for line in str(error).splitlines() if line.startswith("  ")]
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        raise ConfigError(
            f"{storage.uri} holds another study of this name:\n{shown}\n"
            "Choose another name, or start again with --overwrite"
        )


def _clear(study: Study, storage: Storage) -> list[str]:
    """Delete an earlier sweep and its runs; return the other files in the folder.

    Raises:
        ConfigError: before anything is deleted, if the folder holds something else.
    """
    places = [Storage(uri) for uri in sorted({str(study.config.folder), storage.uri})]
    for place in places:
        check_inputs(place, {key: value for key, value in study.base.items() if key != "run"})
        if place.exists(STUDY):
            check_kind(place, STUDY, {"base", "space", "metric"})
    return [path for place in places for path in clear_folder(place, _WRITTEN)]


def _nodes(foreign: dict[str, dict[str, float]]) -> list[Node]:
    """The nodes of the cluster with the resources that other jobs do not hold."""
    import ray

    return [Node(_less(node, foreign), node.get("Labels") or {}) for node in ray.nodes() if node["Alive"]]


def _used_by_others() -> dict[str, dict[str, float]]:
    """Resources in use on each node before the sweep starts."""
    import ray
    from ray._private.state import available_resources_per_node  # Ray has no public function for this

    free = available_resources_per_node()
    return {node["NodeID"]: _less(node, free) for node in ray.nodes() if node["Alive"]}


def _less(node: dict[str, Any], amounts: dict[str, dict[str, float]]) -> dict[str, float]:
    """The resources of one of Ray's nodes, less amounts by node id and resource."""
    less = amounts.get(node["NodeID"], {})
    return {name: amount - less.get(name, 0) for name, amount in node["Resources"].items()}
