"""A sweep from its study to its report: the driver's whole life in order.

    check -> propose -> leave out what cannot run -> [ Ray Tune runs trials, which stop themselves ] -> report

    driver: sigray sweep           this file
      |-- Judge (actor)            the table of results; decides at rungs                  tuning/judge.py
      |-- data-shard workers       of each stream that trials share                        workers/data/pool.py
      '-- Ray Tune: trials (actors), as many as there is room for
            '-- a whole `sigray train` each, with its own worker group, checkpoints and evaluations

Ray Tune starts the trials and starts one again whose process died. It is told of results and decides nothing: it would
stop a trial by killing it, which leaves the training workers' places taken (Ray #54305), and it forgets what it knew
when it is restored (Ray #30838). Here a trial asks at its rungs and ends by itself, and all that a sweep knows is its
table, which is on disk before anybody acts on it.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from sigray.orchestrator.config import ConfigError, RunConfig, check_resume, parse_config
from sigray.orchestrator.run.backends import worker_resources
from sigray.orchestrator.run.driver import (
    TRIAL_CPUS,
    evaluation_resources,
    ray_of_run,
    rung_step,
    scan,
    stop_on_signal,
    train,
)
from sigray.orchestrator.run.lease import RunHeld, RunLease
from sigray.orchestrator.run.monitor import Display
from sigray.tuning.capacity import Demand, Node, count_trials
from sigray.tuning.feasible import feasible
from sigray.tuning.judge import Judge
from sigray.tuning.live import LiveTable, results_table, words
from sigray.tuning.search import Search
from sigray.tuning.study import STUDY, Study, parse_study, trial_name
from sigray.tuning.table import RESULTS, Row, Table, Writer
from sigray.workers.data.manifest import Manifest
from sigray.workers.storage import Storage

if TYPE_CHECKING:
    from sigray.workers.data.pool import DataPool, SharedPool
    from sigray.workers.training.train import Answer

_LOOK_S = 1.0  # between two looks at the table
_CAPACITY_S = 5.0  # and at the cluster
_RESTARTS = 2  # of a trial whose process died
_HELD_S = 90.0  # for which a trial waits for a driver of the same run that may be dying
_LONGEST_WHY = 400  # characters in the table
_SLACK_BLOCKS = 3  # that readers of a stream may differ by besides what they ask for ahead


def sweep(study: Study, console: Console, *, overwrite: bool = False, retry: bool = False) -> Table:
    """Run a study to its end, or until it is interrupted. A sweep that has begun already goes on.

    Args:
        overwrite: delete an earlier sweep of the same name first.
        retry: run trials that failed once more.

    Returns:
        The table; some trials are not over where the sweep was interrupted.

    Raises:
        ConfigError, OSError: for what the user can mend, before anything is started.
        RuntimeError: where not one trial came to a result.
    """
    from sigray.tuning.report import write_report

    # Ray Tune prints what it likes: its words go to a file, and ours past it.
    display, config = Display(Console(file=console.file)), study.config
    storage = Storage(config.storage_uri)
    storage.check_writable()
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(RunLease(storage))
        if overwrite:
            _clear(study, storage)
            lease.renew()
        is_begun = storage.exists(STUDY)
        if is_begun:
            _check_same(study, storage)
            display.say(f"{storage.uri} holds this sweep already: going on with it (--overwrite begins anew)")
        if _address(study):
            stack.enter_context(ray_of_run(_base(study), display))
        driver = _Sweep(study, storage, display, lease)
        try:
            if not is_begun:
                storage.delete(RESULTS)  # of a driver that died before it had begun
            driver.prepare()
        except ConfigError:
            if not is_begun:
                storage.delete(RESULTS)
            raise
        if retry:
            driver.retry()
        if not is_begun:
            storage.write(STUDY, config.to_yaml().encode())
        config.folder.mkdir(parents=True, exist_ok=True)
        (config.folder / STUDY).write_text(config.to_yaml())
        if not driver.is_done:
            if not _address(study):
                stack.enter_context(ray_of_run(_base(study), display, driver.num_local_trials))
            stack.enter_context(driver)
            driver.run()
        write_report(study, storage, driver.table)
        failed = [row for row in driver.table.rows.values() if row.status == "failed"]
        if failed and not any(row.results for row in driver.table.rows.values()):
            raise RuntimeError(f"no trial came to a result; trial {failed[0].number}: {failed[0].error}")
        return driver.table


def plan(study: Study, console: Console) -> Any:
    """The trials that are known beforehand and which of them cannot run, as a table for the terminal."""
    with tempfile.TemporaryDirectory(prefix="sigray-plan-") as folder:
        storage = Storage(folder)
        driver = _Sweep(study, storage, Display(console))
        driver.prepare()
        return results_table(driver.table, study)


@dataclass
class _Sweep:
    """The moving parts of a sweep."""

    study: Study
    storage: Storage
    display: Display
    lease: RunLease | None = None  # None where nothing will be run
    is_stopping: bool = False
    _manifests: dict[str, Manifest] = field(default_factory=dict)
    _configs: dict[int, RunConfig] = field(default_factory=dict)  # of the trials that can run
    _running: dict[str, int] = field(default_factory=dict)  # Ray Tune's id -> number
    _pools: dict[str, DataPool] = field(default_factory=dict)
    _table: Table = field(default_factory=Table)

    # ------------------------------------------------------------------------------ before anything is started

    def prepare(self) -> None:
        """Propose all trials that are known beforehand, and find those that cannot run.

        Raises:
            ConfigError: where none can.
        """
        self._search = Search(self.study)
        self._writer: Any = Writer(self.storage)
        self._table = self._writer.table
        for row in self._in_order():
            why = "" if row.is_over else self._check(row)
            if why:
                raise ConfigError(f"trial {row.number} cannot go on: {why}")
        if not self._search.needs_results:
            while len(self._table.rows) < self._search.num_trials:
                self._propose_next()
        infeasible = [row for row in self._table.rows.values() if row.status == "infeasible"]
        if infeasible and len(infeasible) == self._search.num_trials:
            raise ConfigError(f"no trial of the study can run; trial {infeasible[0].number}: {infeasible[0].error}")

    def retry(self) -> None:
        """Have trials that failed tried again.

        Raises:
            ConfigError: where one cannot run any more; none is tried then.
        """
        failed = [row for row in self._in_order() if row.status == "failed"]
        for row in failed:
            if why := self._check(row):
                raise ConfigError(f"trial {row.number} failed and cannot be tried again: {why}")
        self._add(*({"event": "retry", "number": row.number} for row in failed))
        self.display.say(
            f"tried again: {', '.join(str(row.number) for row in failed) or 'nothing, no trial has failed'}"
        )

    @property
    def table(self) -> Table:
        return self._table

    @property
    def is_done(self) -> bool:
        rows = self._table.rows.values()
        return len(rows) == self._search.num_trials and all(row.is_over for row in rows)

    @property
    def num_local_trials(self) -> int:
        """How many trials this machine's own Ray shall have room for: as many as keep its processors busy.

        Where they compute on something else, there may be room for fewer: see `_capacity_now`.
        """
        base = _base(self.study).cluster
        places = len(os.sched_getaffinity(0)) // (base.worker_range[1] * base.cpus_per_worker)
        return max(1, min(self.study.config.parallel or places, self._search.num_trials))

    def _propose_next(self) -> bool:
        """Write the next trial into the table; False where it has to wait for results."""
        number = len(self._table.rows)
        outcomes = [self._table.rows[other].outcome() for other in range(number)]
        proposal = self._search.propose(number, outcomes)
        if proposal is None:
            return False
        self._add(
            {
                "event": "trial",
                "number": number,
                "seed": proposal.seed,
                "budget": proposal.budget,
                "values": proposal.point.values,
                "overrides": proposal.point.overrides,
            }
        )
        row = self._table.rows[number]
        why = self._check(row)
        if why:
            self._add({"event": "infeasible", "number": number, "why": why})
            self.display.say(f"trial {number} cannot run and is left out ({words(row.values)}): {why}")
        return True

    def _check(self, row: Row) -> str:
        """Keep the config of a trial that can run; why not, where it cannot."""
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
        self._writer.add(*events)

    # -------------------------------------------------------------------------------------------- while it runs

    def __enter__(self) -> _Sweep:
        import ray

        from sigray.workers.data.pool import start_here

        config = self.study.config
        num_rungs = {budget: len(config.rungs_of(budget)) for budget in config.budgets}
        self._judge = start_here(Judge, config.name, self.storage.uri, config.rules, num_rungs)
        self._writer = _JudgeWriter(self)  # from here on only the judge writes
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
        """Have Ray Tune run the trials until all are over, or until the sweep is interrupted."""
        # Ours: a table instead of its own, no folders and loggers, no killing at the first Ctrl-C, no change of folder.
        for name, value in {
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
            "TUNE_DISABLE_SIGINT_HANDLER": "1",
            "RAY_CHDIR_TO_TRIAL_DIR": "0",
        }.items():
            os.environ[name] = value
        from ray import tune

        from sigray.tuning.tune_adapter import Trials, Watch

        scratch = tempfile.mkdtemp(prefix="sigray-tune-")
        trainable: Any = tune.with_resources(
            tune.with_parameters(_run_trial, judge=self._judge, study=self.study),
            # What a trial's process starts without saying where runs in its places: its evaluations.
            tune.PlacementGroupFactory([{"CPU": TRIAL_CPUS}, *self._evaluation_demand()]),
        )
        # It misses the files of the loggers that are switched off, and traces what we tell.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        tuner = tune.Tuner(
            trainable,
            # Processes of trials are used again: each spends ten seconds on imports.
            tune_config=tune.TuneConfig(search_alg=Trials(self), num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                verbose=0,
                callbacks=[Watch(self)],
                failure_config=tune.FailureConfig(max_failures=_RESTARTS),
            ),
        )
        self._live.start(self._table, self._capacity_now(), self.num_streams)
        log = self.study.config.folder / "tune.log"
        with stop_on_signal(self._ask_to_stop), log.open("a") as file, contextlib.redirect_stdout(file):
            tuner.fit()
        self._note_streams()
        self.look(at_once=True)
        shutil.rmtree(scratch, ignore_errors=True)

    def next_trial(self, trial_id: str) -> int | str | None:
        """For Ray Tune: the number of the next trial, None while there is none, "FINISHED" where none will come."""
        if self.is_stopping:
            return "FINISHED"
        if len(self._running) >= self._capacity_now():
            return None
        while True:
            at_work = set(self._running.values())
            row = next((row for row in self._in_order() if not row.is_over and row.number not in at_work), None)
            if row is not None:
                break
            if len(self._table.rows) == self._search.num_trials:
                return "FINISHED"
            if not self._propose_next():
                return None
        self._running[trial_id] = row.number
        self._seat(row.number)
        return row.number

    def trial_ended(self, trial_id: str, error: str | None) -> None:
        """For Ray Tune: a trial's process has nothing more to do; where it died too often, `error` says how."""
        import ray

        number = self._running.pop(trial_id, None)
        self.look(at_once=True)
        if number is not None and not self._table.rows[number].is_over and not self.is_stopping:
            why = error or "it ended without coming to its end"
            ray.get(self._judge.add.remote({"event": "failed", "number": number, "why": why}))
            self.look(at_once=True)

    def trial_restarts(self, trial_id: str) -> None:
        """For Ray Tune: a trial's process died and is started again."""
        number = self._running[trial_id]
        self.display.say(f"trial {number}: its process died and is started again; it goes on from its checkpoint")

    def look(self, at_once: bool = False) -> None:
        """Bring the table up to date and show it. Called several times a second."""
        import ray

        if not at_once and time.monotonic() - self._looked_at < _LOOK_S:
            return
        self._looked_at = time.monotonic()
        if self.lease is not None:
            self.lease.check()
        self._table, lines = ray.get(self._judge.table.remote())
        self._live.show(self._table, lines, set(self._running.values()))
        for pool in self._pools.values():
            pool.tend()

    @property
    def num_streams(self) -> int:
        return len({self._stream_key(config) for config in self._configs.values()})

    def _in_order(self) -> Iterator[Row]:
        for number in sorted(self._table.rows):
            yield self._table.rows[number]

    def _ask_to_stop(self) -> None:
        self.is_stopping = True
        self.display.say("stopping: each trial writes a checkpoint at its next log interval (again to stop at once)")
        self._judge.stop.remote()

    def _capacity_now(self) -> int:
        """Trials that may run at once."""
        if time.monotonic() - self._capacity_at > _CAPACITY_S:
            self._capacity_at = time.monotonic()
            parallel = self.study.config.parallel
            most = min(self._search.num_trials, parallel or self._search.num_trials)
            if not _address(self.study):
                most = min(most, self.num_local_trials)
            count = count_trials(_nodes(self._foreign), self._pools_demand(), self._trial_demand(), most)
            # A cluster may grow, or start with nothing: then the trial itself says what it waits for.
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

    def _pools_demand(self) -> Demand:
        data = _base(self.study).data
        pool = [{"CPU": data.cpus_per_worker}] * _num_data_workers(data.num_workers)
        # Trials of two streams run side by side while one seed ends and the next begins.
        return Demand([], pool * min(2, max(1, self.num_streams)))

    def _seat(self, number: int) -> None:
        """Give a trial its stream; its data-shard workers start with the first that reads it."""
        import ray

        from sigray.workers.data.pool import DataPool

        config = self._configs[number]
        key = self._stream_key(config)
        if key not in self._pools:
            self._close_finished_pools()
            window = self._window(config, key)
            data = config.data.model_copy(
                update={
                    "num_workers": _num_data_workers(config.data.num_workers),
                    # Of two groups of readers at different places of the stream.
                    "shared_blocks": max(config.data.shared_blocks, 2 * window),
                }
            )
            self._pools[key] = DataPool(self._manifest(config), data, config.model, seed=config.run.seed, window=window)
        ray.get(self._judge.seat.remote(number, [self._pools[key].worker_list], config.model_dump(mode="json")))

    def _window(self, config: RunConfig, key: str) -> int:
        """Blocks of a lane within which the readers of a stream keep pace: as many as one asks for ahead, and a few."""
        data = config.data
        sharing = [other for other in self._configs.values() if self._stream_key(other) == key]
        round_size = data.num_lanes * len(self._manifest(config).datasets()) * data.block_size
        ahead = max(other.train.global_batch_size * (other.data.prefetch_batches + 1) for other in sharing)
        return -(-ahead // round_size) + _SLACK_BLOCKS

    def _stream_key(self, config: RunConfig) -> str:
        """Runs with the same one read the same blocks: what decides about samples, images and tokens."""
        from sigray.workers.model.inputs import shapes

        data = config.data.model_dump(mode="json")
        for name in ("num_workers", "cpus_per_worker", "prefetch_batches", "shared_blocks", "worker_timeout_s"):
            data.pop(name)
        return json.dumps([data, config.run.seed, shapes(config.model), config.model.tokenizer], sort_keys=True)

    def _close_finished_pools(self) -> None:
        """Those that no trial will read any more."""
        if self._search.needs_results:
            return
        wanted = {
            self._stream_key(self._configs[row.number])
            for row in self._table.rows.values()
            if not row.is_over and row.number in self._configs
        }
        for key in self._pools.keys() - wanted:
            self._note_stream(self._pools[key])
            self._pools.pop(key).close()

    def _note_streams(self) -> None:
        for pool in self._pools.values():
            self._note_stream(pool)

    def _note_stream(self, pool: DataPool) -> None:
        """Write down what a stream has cost."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):  # a data-shard worker that is just being replaced
            ray.get(self._judge.add.remote({"event": "stream"} | pool.usage()))


class _JudgeWriter:
    """Adds events by the judge, once it runs, and keeps the driver's table."""

    def __init__(self, driver: _Sweep) -> None:
        self._driver = driver

    def add(self, *events: dict[str, Any]) -> None:
        import ray

        ray.get(self._driver._judge.add.remote(*events))
        self._driver._table, _ = ray.get(self._driver._judge.table.remote())


# --------------------------------------------------------------------------------------- in a trial's process


class _SweepTrial:
    """A trial as `launch.train` sees it; see `sigray.orchestrator.run.driver.Trial`."""

    def __init__(
        self,
        judge: Any,
        number: int,
        config: RunConfig,
        metric: str,
        rungs: list[int],
        passed: list[int],
        pool: SharedPool,
    ) -> None:
        self._judge, self._number, self._metric, self.pool = judge, number, metric, pool
        batch = config.train.global_batch_size
        self._rung_of_step = {rung_step(samples, batch): rung for rung, samples in enumerate(rungs)}
        self.rungs = tuple(rungs)
        self.passed = frozenset(step for step, rung in self._rung_of_step.items() if rung in passed)

    def heard(self, line: dict[str, float]) -> bool:
        import ray

        return ray.get(self._judge.heard.remote(self._number, line))

    def decide(self, evaluation: dict[str, Any], line: dict[str, float]) -> Answer:
        import ray
        from ray import tune

        value = figure_of(evaluation, self._metric)
        rung = self._rung_of_step[evaluation["step"]]
        more = {
            "loss": line.get("train/loss"),
            "figures": {task: evaluation[task] for task in ("zero_shot", "retrieval", "multilingual")},
        }
        asked = self._judge.decide.remote(self._number, rung, evaluation["samples_seen"], value, more)
        answer: Answer = ray.get(asked)
        if answer != "wait":
            tune.report({"samples_seen": evaluation["samples_seen"], "figure": value, "loss": more["loss"]})
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
    content, stream, passed = ray.get(judge.seat_of.remote(number))
    run = parse_config(content, trial_name(number))
    rungs = study.config.rungs_of(run.train.num_samples)
    pool = SharedPool(stream[0], trial_name(number))
    trial = _SweepTrial(judge, number, run, study.config.metric, rungs, passed, pool)
    log = run.folder.parent / f"{trial_name(number)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1) as file:
        try:
            _train(run, Console(file=file, width=160), trial)
        except ray.exceptions.RayActorError:
            raise  # the judge or the driver is gone: this is nothing that the trial has done
        except Exception as error:
            traceback.print_exc(file=file)
            why = str(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {error}"
            ray.get(judge.add.remote({"event": "failed", "number": number, "why": shortened(why, log.name)}))


def shortened(why: str, log: str) -> str:
    """The first lines of a reason; Ray's can have hundreds. The rest is in the log."""
    text = " ".join(line.strip() for line in why.splitlines() if line.strip())
    return text if len(text) <= _LONGEST_WHY else f"{text[:_LONGEST_WHY]}... (all of it: trials/{log})"


def _train(run: RunConfig, console: Console, trial: _SweepTrial) -> None:
    """`train`; where a driver of the same run is just dying, after it is dead."""
    deadline = time.monotonic() + _HELD_S
    while True:
        try:
            train(run, console, trial=trial)
        except RunHeld:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
        else:
            return


def figure_of(evaluation: dict[str, Any], metric: str) -> float:
    """The study's figure in an evaluation; metric as zero_shot.SET.top1, and a set's name may have dots."""
    task, _, rest = metric.partition(".")
    name, _, figure = rest.rpartition(".")
    return float(evaluation[task][name][figure])


# ------------------------------------------------------------------------------------------------------ helpers


def _base(study: Study) -> RunConfig:
    return parse_config(study.base, study.config.name)


def _address(study: Study) -> str | None:
    return study.base["cluster"]["address"] or os.environ.get("RAY_ADDRESS") or None


def _num_data_workers(num_workers: int | tuple[int, int]) -> int:
    """A shared stream has the most: it is read by several trials."""
    return num_workers if isinstance(num_workers, int) else num_workers[1]


def _check_same(study: Study, storage: Storage) -> None:
    """Refuse to go on with another study under the same name.

    Raises:
        ConfigError: naming what differs.
    """
    saved = parse_study(yaml.safe_load(storage.read(STUDY)), f"{storage.uri}/{STUDY}")
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
        check_resume(_base(saved), _base(study))  # where and on what it runs may change
    except ConfigError as error:
        lines += [line.strip() for line in str(error).splitlines() if line.startswith("  ")]
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        raise ConfigError(
            f"{storage.uri} holds another study of this name:\n{shown}\n"
            "Choose another name, or begin anew with --overwrite"
        )


def _clear(study: Study, storage: Storage) -> None:
    """Delete an earlier sweep, its runs and all; nothing else that may lie in the folder."""
    for folder in {str(study.config.folder), storage.uri}:
        home = Storage(folder)
        for name in (STUDY, RESULTS):
            home.delete(name)
        if home.exists("trials"):
            home.delete_folder("trials")


def _nodes(foreign: dict[str, dict[str, float]]) -> list[Node]:
    """The machines of the cluster, less what others hold."""
    import ray

    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            used = foreign.get(node["NodeID"], {})
            free = {name: amount - used.get(name, 0) for name, amount in node["Resources"].items()}
            nodes.append(Node(free, node.get("Labels") or {}))
    return nodes


def _used_by_others() -> dict[str, dict[str, float]]:
    """What is taken on each node before the sweep has taken anything."""
    import ray
    from ray._private.state import available_resources_per_node  # Ray has no public way

    free = available_resources_per_node()
    return {
        node["NodeID"]: {
            name: amount - free.get(node["NodeID"], {}).get(name, 0) for name, amount in node["Resources"].items()
        }
        for node in ray.nodes()
        if node["Alive"]
    }
