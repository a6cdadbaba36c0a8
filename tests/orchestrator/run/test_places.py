"""No hold and wait: random jobs on a simulated cluster under the real policy, and the turn in a store of this process.

The cluster places a group as a whole or not at all, in any order. The jobs do what the product does at each move.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sigray.orchestrator.run import places
from sigray.orchestrator.run.places import _DEAD_S, HOLD_S, START_S, Places, View, next_move
from tests.helpers.plain_ray import Store

MAX_S = 5_000  # of simulated time; all jobs one after the other need less than a tenth of it


@dataclass
class Cluster:
    """CPUs that are free, those of nodes that may die, and the job that has the turn."""

    free: int
    spare: int = 0
    turn: object = None

    def give(self, amount: int, *, node_dies: bool) -> None:
        """Release resources; if their node dies and no job needs it to fit alone, they are gone."""
        if node_dies and amount <= self.spare:
            self.spare -= amount
        else:
            self.free += amount

    def take(self, amount: int) -> bool:
        if amount > self.free:
            return False
        self.free -= amount
        return True


@dataclass
class Task:
    """An evaluation, its feature worker, or `embed`: waits without the turn, holds nothing until it is placed."""

    size: int
    left_s: int
    is_placed: bool = False
    is_done: bool = False

    def step(self, cluster: Cluster, rng: random.Random) -> None:
        if not self.is_placed:
            self.is_placed = cluster.take(self.size)
        elif self.left_s > 0:
            self.left_s -= 1
        else:
            cluster.free += self.size
            self.is_done = True


@dataclass
class Waiter:
    """The part of a job that asks, probes, starts and gives back: what `Places.step` does."""

    waited_s: float = 0.0
    pause_s: float = 0.0

    def step(self, cluster: Cluster, rng: random.Random, holds: bool, demand: int) -> str:
        self.waited_s += 1
        self.pause_s -= 1
        fits: bool | None = None
        while True:
            move = next_move(View(cluster.turn is self, fits, holds, self.waited_s, self.pause_s))
            if move == "ask" and cluster.turn is None:
                cluster.turn = self
            elif move == "ask":
                self.pause_s = rng.uniform(0.5, 2.5)
            elif move == "probe":
                fits = demand <= cluster.free
            elif move == "pass":
                cluster.turn = None
                self.pause_s = rng.uniform(0.5, 2.5)
                return "wait"
            else:
                return move

    def begin(self, cluster: Cluster, was_taken: bool = False) -> None:
        if cluster.turn is self:
            cluster.turn = None
        self.waited_s, self.pause_s = HOLD_S * was_taken, 2.0 * was_taken


@dataclass
class Run:
    """A run, or a trial of a sweep: data-shard workers, then training workers, evaluations beside them."""

    num_data: int
    size: int
    left_s: int
    evaluation: int = 0
    grows: bool = False
    waiter: Waiter = field(default_factory=Waiter)
    tasks: list[Task] = field(default_factory=list)
    holds_data: bool = False
    starting_s: int | None = None
    is_up: bool = False
    is_done: bool = False

    def step(self, cluster: Cluster, rng: random.Random) -> None:
        for task in self.tasks:
            if not task.is_done:
                task.step(cluster, rng)
        if self.left_s <= 0:
            self.is_done = all(task.is_done for task in self.tasks)
        elif self.is_up:
            self._train(cluster, rng)
        elif self.starting_s is not None:
            self._start(cluster, rng)
        else:
            needed = self.size + (0 if self.holds_data else self.num_data)
            move = self.waiter.step(cluster, rng, self.holds_data, needed)
            if move == "start":
                # Data-shard workers are requested one by one; what was probed may be taken by tasks.
                self.holds_data = self.holds_data or cluster.take(self.num_data)
                self.starting_s = 0
            elif move == "give back":
                self._release(cluster)

    def _start(self, cluster: Cluster, rng: random.Random) -> None:
        assert self.starting_s is not None
        self.starting_s += 1
        if not self.holds_data:
            self.holds_data = cluster.take(self.num_data)
        if rng.random() < 0.5 and self.holds_data and cluster.take(self.size):
            self.is_up, self.starting_s = True, None
            self.waiter.begin(cluster)
        elif self.starting_s > START_S:
            self.starting_s = None
            self.waiter.begin(cluster, was_taken=True)

    def _train(self, cluster: Cluster, rng: random.Random) -> None:
        self.left_s -= 1
        if self.evaluation and rng.random() < 0.1:
            self.tasks.append(Task(self.evaluation, rng.randint(1, 5)))
        # The attempt ends: it is done, a worker died, or more workers fit.
        dies = rng.random() < 0.1
        if self.left_s <= 0 or dies or (self.grows and rng.random() < 0.03):
            self.is_up = False
            cluster.give(self.size, node_dies=dies)
            self.waiter.begin(cluster)
            if self.left_s <= 0:
                self._release(cluster)

    def _release(self, cluster: Cluster) -> None:
        cluster.free += self.num_data * self.holds_data
        self.holds_data = False


@dataclass
class Sweep:
    """Trials that share data-shard workers; at a rung a trial waits for the trials of lower number, then ends."""

    num_data: int
    trial_size: int  # its process, its evaluation and its training workers
    lengths: list[int]
    waiter: Waiter = field(default_factory=Waiter)
    holds_data: bool = False
    running: dict[int, list[int]] = field(default_factory=dict)  # number -> seconds until it is up, seconds held
    passed: set[int] = field(default_factory=set)  # trials beyond the rung
    is_done: bool = False

    def step(self, cluster: Cluster, rng: random.Random) -> None:
        for number in list(self.running):
            self._run_trial(number, cluster, rng)
        left = [number for number, length in enumerate(self.lengths) if length > 0]
        if not left:
            if not self.running:
                cluster.free += self.num_data * self.holds_data
                self.waiter.begin(cluster)
                self.is_done, self.holds_data = True, False
            return
        ready = [number for number in left if number not in self.running and self._may_go_on(number)]
        starting = any(state[0] > 0 for state in self.running.values())
        if not ready or starting:
            return
        needed = self.trial_size + (0 if self.holds_data else self.num_data)
        move = self.waiter.step(cluster, rng, self.holds_data and not self.running, needed)
        if move == "give back":
            cluster.free += self.num_data
            self.holds_data = False
        elif move == "start":
            taken = (0 if self.holds_data else self.num_data) + self.trial_size
            if cluster.take(taken):
                self.holds_data = True
                self.running[ready[0]] = [rng.randint(1, 5), 0]
            else:
                self.waiter.begin(cluster, was_taken=True)

    def _may_go_on(self, number: int) -> bool:
        at_rung = self.lengths[number] <= 5 and number not in self.passed
        return not at_rung or all(self.lengths[other] <= 5 for other in range(number))

    def _run_trial(self, number: int, cluster: Cluster, rng: random.Random) -> None:
        state = self.running[number]
        if state[0] > 0:
            state[0] -= 1
            if state[0] == 0 and not any(one[0] > 0 for one in self.running.values()):
                self.waiter.begin(cluster)
            return
        if self._may_go_on(number):
            if self.lengths[number] <= 5:
                self.passed.add(number)
            self.lengths[number] -= 1
        else:
            state[1] += 1
        if self.lengths[number] <= 0 or state[1] > 60 or rng.random() < 0.02:  # done, released at the rung, or dead
            del self.running[number]
            cluster.give(self.trial_size, node_dies=rng.random() < 0.2)
            if not any(one[0] > 0 for one in self.running.values()):
                self.waiter.begin(cluster)


runs = st.builds(Run, st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(0, 2), st.booleans())
sweeps = st.builds(Sweep, st.integers(1, 3), st.integers(2, 4), st.lists(st.integers(6, 20), min_size=1, max_size=4))
tasks = st.builds(Task, st.integers(1, 3), st.integers(1, 30))
jobs_strategy = st.lists(st.one_of(runs, sweeps, tasks), min_size=1, max_size=5)


def whole(job: Run | Sweep | Task) -> int:
    if isinstance(job, Task):
        return job.size
    return job.num_data + (job.size if isinstance(job, Run) else job.trial_size)


def simulate(jobs: list[Run | Sweep | Task], cluster: Cluster, rng: random.Random) -> None:
    """Run jobs to their end, beside programs that are not of sigray, some of them between a probe and its start."""
    total, spare, num_outsiders = cluster.free, cluster.spare, 40
    for _ in range(MAX_S):
        open_jobs = [job for job in jobs if not job.is_done]
        if num_outsiders and rng.random() < 0.2:
            num_outsiders -= 1
            jobs = [*jobs, Task(rng.randint(1, min(3, total - spare)), rng.randint(1, 30))]
        if not open_jobs:
            assert cluster.free == total + cluster.spare - spare, "resources leak"
            return
        rng.shuffle(open_jobs)
        for job in open_jobs:
            job.step(cluster, rng)
            assert 0 <= cluster.free <= total
    waiting = [job for job in jobs if not job.is_done]
    assert waiting == [], f"wait for ever on {total} CPUs"


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(jobs_strategy, st.integers(0, 12), st.integers(0, 2**32))
def test_every_job_ends(jobs, spare, seed):
    simulate(jobs, Cluster(max(map(whole, jobs)) + spare, spare), random.Random(seed))


def test_the_reproduction_ends():
    """4 CPUs: a sweep and a run, each with a data-shard worker, wait for a training worker's place."""
    for seed in range(20):
        simulate([Sweep(1, 3, [10, 10]), Run(1, 2, 20, holds_data=False)], Cluster(4), random.Random(seed))


def test_a_crowd_ends():
    """Nodes die, and what is left fits the jobs one after the other only; without giving back, most seeds hang."""
    for seed in range(20):
        jobs = [Sweep(1, 3, [10] * 4), Sweep(1, 3, [10] * 4), Run(1, 3, 30), Run(1, 3, 30)]
        simulate(jobs, Cluster(16, spare=12), random.Random(seed))


@settings(max_examples=50)
@given(runs, runs, st.integers(0, 2**32))
def test_jobs_that_fit_together_run_together(first, second, seed):
    """As long as each needs more time than starts take."""
    first.left_s = second.left_s = 400
    first.evaluation = second.evaluation = 0
    cluster, rng = Cluster(whole(first) + whole(second)), random.Random(seed)
    for _ in range(400):
        first.step(cluster, rng)
        second.step(cluster, rng)
        if first.is_up and second.is_up:
            return
    raise AssertionError("they never ran together")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_one_job_has_the_turn():
    store, clock = Store(), Clock()
    first, second = Places("a job", store, clock=clock), Places("a job", store, clock=clock)
    assert first.take()
    assert first.take()
    assert not second.take()
    second.pass_on()  # it has none
    assert not second.take()
    first.pass_on()
    assert second.take()


def test_the_turn_of_a_dead_job_is_taken_over():
    store, clock = Store(), Clock()
    dead, other = Places("a job", store, clock=clock), Places("a job", store, clock=clock)
    assert dead.take()
    for _ in range(int(_DEAD_S)):
        assert not other.take()
        clock.now += 1
    clock.now += 1
    assert other.take()
    dead.renew()  # it was not dead, only slow
    assert not dead.has_turn
    assert other.take()


def test_the_turn_of_a_living_job_stays_and_its_hold_is_named():
    store, clock = Store(), Clock()
    first, second = Places("a job", store, clock=clock), Places("a job", store, clock=clock)
    first.hold((1, "data-shard worker"), (2, "trial"), (0, "run"))
    assert first.take()
    for _ in range(100):
        clock.now += 3
        first.renew()
        assert not second.take()
        assert second.holders() == ["a job (1 data-shard worker, 2 trials)"]
    for _ in range(2):
        clock.now += _DEAD_S + 1
        found = second.holders()
    assert found == []
    first.hold()
    assert first.holders() == []


def test_a_turn_has_an_end():
    store, clock = Store(), Clock()
    hangs, other = Places("a job", store, clock=clock), Places("a job", store, clock=clock)
    assert hangs.take()
    while not other.take():
        clock.now += 3
        hangs.renew()
        assert clock.now < 100 + places._TURN_S + 2 * _DEAD_S
    assert clock.now > 100 + places._TURN_S
