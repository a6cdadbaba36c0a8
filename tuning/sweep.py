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
import itertools
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
from sigray.orchestrator.cluster import pending
from sigray.orchestrator.config import ConfigError, RunConfig, check_resume, parse_config
from sigray.orchestrator.plain_console import PlainConsole
from sigray.orchestrator.resources import evaluation_resources, worker_resources
from sigray.orchestrator.run.driver import train
from sigray.orchestrator.run.own_ray import check_start
from sigray.orchestrator.run.places import Places, num_placed
from sigray.orchestrator.run.preflight import scan
from sigray.orchestrator.run.progress import Display
from sigray.orchestrator.run.ray_session import ray_session
from sigray.orchestrator.run.signals import on_stop_signal
from sigray.orchestrator.run.tracker_process import check_trackers
from sigray.orchestrator.run.trial import TRIAL_CPUS, rung_step
from sigray.orchestrator.run_folder import REPORT, WRITTEN, check_inputs, check_kind, clear_folder, left_message
from sigray.tuning.feasible import feasible
from sigray.tuning.judge import Judge
from sigray.tuning.live import LiveTable, results_table, words
from sigray.tuning.search import Search
from sigray.tuning.study import STUDY, Study, read_study, split_metric, trial_name
from sigray.tuning.table import RESULTS, Row, Table, Writer
from sigray.workers.checkpoint.lease import LEASE_FILE, RunHeld, RunLease
from sigray.workers.data.manifest import Manifest
from sigray.workers.storage import Storage

if TYPE_CHECKING:
    from sigray.tuning.result import SweepResult
    from sigray.workers.config import DataConfig
    from sigray.workers.data.pool import DataPool, SharedPool
    from sigray.workers.training.job import Answer

_TABLE_INTERVAL_S = 1.0  # between two updates of the table
_MAX_STARTS = 8  # trials that start at the same time on a cluster
_RESTARTS = 2  # of a trial whose process died
_LEASE_WAIT_S = 90.0  # a trial waits so long for the lease of a driver of the same run that may be dying
_MAX_WHY = 400  # characters of a reason in the table
# What a sweep writes: `--overwrite` deletes nothing else.
_WRITTEN = (
    STUDY, RESULTS, LEASE_FILE, REPORT, "trials.csv", "best.yaml", "tune.log", "figures/*.png", "trials/trial-*.log",
    "trials", "figures", f"{FILES}/*/*", *(f"trials/trial-*/{name}" for name in WRITTEN),
)  # fmt: skip
_SLACK_BLOCKS = 3  # by which subscribers of a stream may differ, besides what they prefetch


def sweep(study: Study, console: Console | None = None, *, overwrite: bool = False, retry: bool = False) -> SweepResult:
    """Run a study to its end, or until it is interrupted; resume a sweep that began.

    Args:
        study: as `load_study` returns it.
        console: progress goes there; by default standard output.
        overwrite: delete an earlier sweep of the same name first.
        retry: run failed trials again.

    Returns:
        Status, trials, the best configuration. If the sweep was interrupted, some trials are not over.

    Raises:
        ConfigError, OSError: for what the user can repair, before anything starts.
        RuntimeError: if no trial reached a result.
    """
    from sigray.tuning.report import write_report
    from sigray.tuning.result import result_of

    # Ray Tune prints to standard output: while it runs that is redirected to a file, and our console is not.
    display = Display(PlainConsole(file=(console or PlainConsole()).file))
    config = study.config
    base = _base(study)
    check_start(base, num_evaluations=base.eval.num_workers)
    check_trackers(base.run.trackers)
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
        return result_of(study, driver.table)


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
    _granted: int = 0  # trials that fit the cluster and are not handed out yet
    _starting: set[int] = field(default_factory=set)  # trials whose training workers are not up yet
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
        """Number of trials that keep the processors of this machine's own Ray busy."""
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
        key = json.dumps([data[name] for name in ("shards", "stores", "image_keys", "captions")])
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
        import ray.experimental.internal_kv

        from sigray.workers.data.pool import start_here

        config = self.study.config
        num_rungs = {budget: len(config.rungs_of(budget)) for budget in config.budgets}
        self._judge = start_here(Judge, config.name, self.storage.uri, config.rules, num_rungs)
        base = _base(self.study)
        self._is_joined = cluster_address(base) is not None
        self._most = config.parallel or self._search.num_trials  # trials at once, if they fit
        if not self._is_joined and config.parallel is None:
            devices = {name: n for name, n in worker_resources(base.cluster).items() if name in ("GPU", "TPU") and n}
            num_workers = [int(ray.cluster_resources().get(name, 0) // n) for name, n in devices.items()]
            fitting = [count // base.cluster.worker_range[1] for count in num_workers]
            self._most = max(1, min([self.num_local_trials, *fitting]))
        store = ray.experimental.internal_kv if self._is_joined else None
        self._places = Places(f"sweep {config.name}", store).__enter__()
        self._looked_at = 0.0
        self._live = LiveTable(self.display, self.study)
        ray.get(self._judge.table.remote())
        return self

    def __exit__(self, *_: object) -> None:
        self._live.close()
        self._places.__exit__()
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

        scratch = tempfile.mkdtemp(prefix="sigray-tune-")
        trainable: Any = tune.with_resources(
            tune.with_parameters(_run_trial, judge=self._judge, study=self.study, is_joined=self._is_joined),
            # Evaluations run in the trial's placement group: a trial starts them without a placement of their own.
            tune.PlacementGroupFactory([{"CPU": TRIAL_CPUS}, *self._evaluation_demand()]),
        )
        # Ray Tune would warn that the files of its disabled loggers are missing.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        self._live.start(self.table, self._most, self.num_streams)
        log = self.study.config.folder / "tune.log"
        with on_stop_signal(self._ask_to_stop), log.open("a") as file, contextlib.redirect_stdout(file):
            for number in itertools.count():
                watch = Watch(self)
                # Reuse the processes of trials: each spends ten seconds on imports. Not on a cluster: Ray Tune keeps
                # the resources of an idle process, for which other jobs may wait.
                config = tune.TuneConfig(search_alg=Trials(self), num_samples=-1, reuse_actors=not self._is_joined)
                run_config = tune.RunConfig(
                    name=f"tune-{number}",
                    storage_path=scratch,
                    verbose=0,
                    callbacks=[watch],
                    stop=watch,
                    failure_config=tune.FailureConfig(max_failures=_RESTARTS),
                )
                self._num_started = 0
                tune.Tuner(trainable, tune_config=config, run_config=run_config).fit()
                if self.is_done or self.is_stopping:
                    break
        self._note_costs(*self._pools.values())
        self.look(at_once=True)
        shutil.rmtree(scratch, ignore_errors=True)

    def next_trial(self, trial_id: str) -> int | str | None:
        """Number of the next trial; None to ask again later, "FINISHED" at the end."""
        self.look()  # Ray Tune calls nothing else while no trial runs
        if self.is_stopping or self.is_done:
            return "FINISHED"
        if len(self._running) >= self._most:
            return None
        if self._is_joined and self._starting and not self._granted:
            return None  # the turn ends when their training workers are up
        rows = self._waiting_rows()
        if not rows:
            self._granted = 0
            self._begin_to_wait()
        if not rows or (self._is_joined and not self._granted and not self._may_start(rows)):
            # Ray Tune takes no step while no trial runs, and frees the last process in a step or at its end.
            return "FINISHED" if self._is_joined and self._num_started and not self._running else None
        self._num_started += 1
        number = rows[0].number
        self._granted = max(0, self._granted - 1)
        self._running[trial_id] = number
        self._starting.add(number)
        self._assign_stream(number)
        self._publish()
        return number

    def _waiting_rows(self) -> list[Row]:
        """Trials that can run and do not; if there are none, the next proposal."""
        while True:
            at_work = set(self._running.values())
            rows = [row for row in self.table.rows.values() if not row.is_over and row.number not in at_work]
            ready = [row for row in rows if not row.is_undecided]
            if ready or len(self.table.rows) == self._search.num_trials or not self._propose_next():
                return ready

    def _may_start(self, rows: list[Row]) -> bool:
        """Probe how many trials fit the cluster; give back, or say why none fits."""
        import ray

        from sigray.workers.data.pool import first_workers

        groups: list[list[dict[str, float]]] = []
        streams = set(self._pools)
        for row in rows[: min(_MAX_STARTS, self._most - len(self._running))]:
            config = self._configs[row.number]
            shared = [] if self._stream_key(config) in streams else first_workers(_shared_data(config))
            streams.add(self._stream_key(config))
            groups.append([*self._trial_demand(config), *shared])
        # An autoscaler sees what is probed. Beside a running trial, the cluster grows for `parallel` only.
        if self._running and self.study.config.parallel is None:
            free = ray.available_resources()
            names = {name for one in groups[0] for name in one}
            if any(free.get(name, 0) < sum(one.get(name, 0) for one in groups[0]) for name in names):
                return False
        holds = bool(self._pools) and not self._running
        move, self._granted = self._places.step(holds, lambda timeout_s: num_placed(groups, timeout_s))
        if move == "give back":
            self._close(*self._pools)
            self._publish()
        elif move != "start" and not self._running:
            config = self._configs[rows[0].number]
            others = groups[0][len(self._trial_demand(config)) :]
            demand = pending.demand_of(config.cluster, config.cluster.worker_range[0], others)
            self._places.say_pending(self.display, demand)
        return move == "start"

    def _publish(self) -> None:
        """Publish to other jobs what this sweep holds."""
        num_data_workers = sum(pool.size for pool in self._pools.values())
        self._places.hold((num_data_workers, "data-shard worker"), (len(self._running), "trial"))

    def _begin_to_wait(self) -> None:
        if not self._starting and not self._granted:
            self._places.pass_on()
            self._places.begin()

    def trial_ended(self, trial_id: str, error: str | None) -> None:
        """Record the end of a trial's process; `error` says why if it died too often.

        A process without an error and without a result at the end had to wait: the trial starts again later.
        """
        number = self._running.pop(trial_id, None)
        self.look(at_once=True)
        if error and number is not None and not self.table.rows[number].is_over and not self.is_stopping:
            self._add({"event": "failed", "number": number, "why": error})
            self.look(at_once=True)
        self._publish()
        self._begin_to_wait()

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
        for row in self.table.rows.values():
            if row.is_undecided and row.number not in running:
                self._judge.settle.remote(row.number, len(row.results) - 1)
        self.table, lines = ray.get(self._judge.table.remote(running))
        self._live.show(self.table, lines, running)
        # A trial's first line is empty: its training workers are up.
        if self._starting and not self._starting & running - lines.keys():
            self._starting = set()
            self._begin_to_wait()
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

    def _trial_demand(self, config: RunConfig) -> list[dict[str, float]]:
        """Ray resources of each process of a trial."""
        # An elastic trial starts smaller if the largest group has not fitted for a while.
        size = config.cluster.worker_range[self._places.waited_s < config.cluster.shrink_after_s]
        return [*[worker_resources(config.cluster)] * size, *self._evaluation_demand(), {"CPU": TRIAL_CPUS}]

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
            blocks = max(config.data.shared_blocks, 2 * window)  # two groups of subscribers at different positions
            data = _shared_data(config).model_copy(update={"shared_blocks": blocks})
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
        from sigray.workers.model.inputs import image_inputs, shapes, text_inputs

        data = config.data.model_dump(mode="json")
        for name in ("num_workers", "cpus_per_worker", "prefetch_batches", "shared_blocks", "worker_timeout_s"):
            data.pop(name)
        model = config.model
        inputs = [shapes(model), model.name, model.tokenizer, repr(image_inputs(model)), repr(text_inputs(model))]
        return json.dumps([data, config.run.seed, *inputs], sort_keys=True)

    def _close_finished_pools(self) -> None:
        """Close the pools of streams that no trial will read any more."""
        if self._search.needs_results:
            return
        waiting = [row.number for row in self.table.rows.values() if not row.is_over]
        wanted = {self._stream_key(self._configs[number]) for number in waiting if number in self._configs}
        self._close(*self._pools.keys() - wanted)

    def _close(self, *keys: str) -> None:
        for key in keys:
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
        self,
        judge: Any,
        number: int,
        study: Study,
        rungs: list[int],
        batch: int,
        passed: list[int],
        pool: SharedPool,
        is_joined: bool,
    ) -> None:
        self._judge, self._number, self.pool = judge, number, pool
        self._metric = study.config.metric
        self.name = f"{study.config.name}/{trial_name(number)}"
        self._rung_of_step = {rung_step(samples, batch): rung for rung, samples in enumerate(rungs)}
        self.rungs = tuple(rungs)
        self.is_joined = is_joined
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


def _run_trial(config: dict[str, Any], *, judge: Any, study: Study, is_joined: bool) -> None:
    """What Ray Tune runs: one `sigray train`, its output in a file.

    Args:
        config: {"number"} of the trial.
        judge: handle of the `Judge`.
        is_joined: as `Trial.is_joined`.
    """
    import ray

    from sigray.workers.data.pool import SharedPool

    number = config["number"]
    content, stream, passed = ray.get(judge.assignment.remote(number))
    run = parse_config(content, trial_name(number))
    rungs = study.config.rungs_of(run.train.num_samples)
    pool = SharedPool(stream[0], trial_name(number))
    trial = _SweepTrial(judge, number, study, rungs, run.train.global_batch_size, passed, pool, is_joined)
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
    """The value of a metric in an evaluation."""
    task, name, figure = split_metric(metric)
    return float(evaluation[task][name][figure])


# ------------------------------------------------------------------------------------------------------ helpers


def _base(study: Study) -> RunConfig:
    return parse_config(study.base, study.config.name)


def _shared_data(config: RunConfig) -> DataConfig:
    """The data section of a stream: trials share it, so it has the most workers."""
    num_workers = config.data.num_workers
    most = num_workers if isinstance(num_workers, int) else num_workers[1]
    return config.data.model_copy(update={"num_workers": most})


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
