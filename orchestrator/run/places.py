"""Take the resources of a job as a whole, or hold none while the job waits.

Two jobs of one cluster that each hold data-shard workers, and wait for the resources of training workers, would wait
for each other for ever. So a job takes its whole demand at once, and holds nothing for longer than `HOLD_S` while it
waits. Ray decides what fits; this module only keeps jobs from disturbing each other between the probe and the start:

    ask         take the turn, a mutex of the cluster
    probe       request a placement group of the whole demand: Ray grants all of it or nothing
    start       start data-shard workers and training workers, then pass the turn on
    pass        the demand does not fit: pass the turn on, ask again after a random pause
    give back   stop the data-shard workers, or end the process of a trial

Jobs outside sigray, evaluations and `sigray embed` take no turn. If they take what was probed, Ray Train gives up the
start after `START_S`, and the job gives back.

The turn and the holders are keys of Ray's key-value store, so jobs of different versions agree on no actor. Their
owner changes the values every few seconds. An observer takes an owner for dead if a value has not changed for `_DEAD_S`
of its own clock. A Ray of the job's own has no store: everything fits by construction.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sigray.orchestrator.cluster import pending
from sigray.orchestrator.formatting import format_duration
from sigray.orchestrator.run import ray_death
from sigray.orchestrator.run.progress import Display
from sigray.orchestrator.run_folder import PENDING

HOLD_S = 10.0  # seconds that a job keeps its data-shard workers while it waits for training workers
START_S = 20  # seconds after which Ray Train gives up to place training workers that were probed
_PAUSE_S = (0.5, 2.5)  # bounds of the random pause between two probes: equal ones could meet again and again
_RENEW_S, _DEAD_S = 3.0, 20.0
_TURN_S = 300.0  # longest turn of a process that lives
# Seconds that a placement group waits for resources. Each failed probe doubles them: on a busy machine Ray needs longer
# to see that the probe before has ended, and autoscalers look every few seconds only.
_PROBE_S, _LONGEST_PROBE_S = 1.0, 4.0
_DECISION_S = 60.0  # longest further wait for Ray to say whether it has placed a group
_FIRST_LINE_S, _LINE_S = 5.0, 30.0  # until the first line with the pending reason, and between two
_TURN, _HOLDER, _NAMESPACE = "turn", "holder/", "sigray"

Move = Literal["ask", "probe", "start", "pass", "give back", "wait"]


@dataclass(frozen=True)
class View:
    """What a job that waits for training workers observes.

    Attributes:
        has_turn: whether no other job may start now.
        fits: answer of this turn's probe; None before it.
        holds: whether the job still holds resources.
        waited_s: seconds since the wait began.
        pause_s: seconds until the job may ask again.
    """

    has_turn: bool
    fits: bool | None
    holds: bool
    waited_s: float
    pause_s: float


def next_move(view: View) -> Move:
    """Return what a job does next that waits for training workers."""
    if view.fits is not None:
        return "start" if view.fits else "pass"
    if view.holds and view.waited_s >= HOLD_S:
        return "give back"
    if view.pause_s > 0:
        return "wait"
    return "probe" if view.has_turn else "ask"


class Places:
    """Ask, probe and pass on for one job; a context manager.

    Args:
        name: of the job, for the pending messages of others.
        store: `ray.experimental.internal_kv` on a cluster that the job has joined; None: a Ray of its own.
        is_trial: whether a sweep has taken the turn for the first start, and publishes what the job holds.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self, name: str, store: Any, *, is_trial: bool = False, clock: Callable[[], float] | None = None
    ) -> None:
        self._name, self._store, self._is_trial = name, store, is_trial
        self._now = clock or (lambda: time.monotonic())
        self._me = uuid.uuid4().hex
        self._seen: dict[str, tuple[bytes, float]] = {}  # newest value of each key, and since when
        self._lock = threading.Lock()  # of the thread that renews
        self._num_renewals = 0
        self._held = ""
        self._turn_since: float | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="places", daemon=True)
        self.is_inherited = is_trial  # until the turn passes on
        self.begin()

    def __enter__(self) -> Places:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if not ray_death.find_death():
            self._thread.join()
            self.pass_on()
            self.hold()

    # ------------------------------------------------------------------------------------------------- moves

    def begin(self, pause_s: float = 0.0, *, was_taken: bool = False) -> None:
        """Begin to wait.

        Args:
            pause_s: seconds before the first probe.
            was_taken: whether another job took what was probed. Then the job gives back at once.
        """
        self._begin = self._now() - HOLD_S * was_taken
        self._ask_at = self._now() + max(pause_s, random.uniform(*_PAUSE_S) * was_taken)
        self._probe_s, self._next_line_s = _PROBE_S, _FIRST_LINE_S

    @property
    def waited_s(self) -> float:
        return self._now() - self._begin

    @property
    def has_turn(self) -> bool:
        return self._store is None or self.is_inherited or self._turn_since is not None

    def step(self, holds: bool, probe: Callable[[float], int]) -> tuple[Move, int]:
        """Go on until the job starts, gives back or has to wait.

        Args:
            holds: whether the job holds resources.
            probe: returns how much fits, 0 for nothing; its argument is that of `num_placed`.

        Returns:
            The move, which the caller makes, and the answer of the probe.
        """
        found: int | None = None
        while True:
            fits = None if found is None else found > 0
            holds = holds and self._store is not None
            move = next_move(View(self.has_turn, fits, holds, self.waited_s, self._ask_at - self._now()))
            if move == "probe":
                found = probe(self._probe_s)
                self._probe_s = min(2 * self._probe_s, _LONGEST_PROBE_S)
            elif move == "pass" or (move == "ask" and not self.take()):
                if not self.is_inherited:
                    self.pass_on()
                self._ask_at = self._now() + random.uniform(*_PAUSE_S) * (self._store is not None)
                return "wait", 0
            elif move != "ask":
                return move, found or 0

    def say_pending(self, display: Display, demand: pending.Demand) -> None:
        """Say every `_LINE_S` why the demand is pending, and who holds what.

        Also for what the cluster cannot start by itself: hosts are started by hand, and a changed cluster file comes
        with another `ray up`.
        """
        if self.waited_s > self._next_line_s:
            self._next_line_s += _LINE_S
            text = f"{pending.why_pending(demand, self.holders())} ({format_duration(self.waited_s)})"
            display.say(text, PENDING)

    # ------------------------------------------------------------------------------------ turn and holders

    def take(self) -> bool:
        """Take the turn if no living job has it; return whether this job has it."""
        with self._lock:
            if self._turn_since is None:
                if self._is_dead(_TURN):
                    self._store._internal_kv_del(_TURN, namespace=_NAMESPACE)
                exists = self._put(_TURN, overwrite=False)
                self._turn_since = None if exists else self._now()
            return self._turn_since is not None

    def pass_on(self) -> None:
        """Give the turn up: what was probed has started, or does not fit."""
        self.is_inherited = False
        with self._lock:
            if self._turn_since is not None and self._is_mine():
                self._store._internal_kv_del(_TURN, namespace=_NAMESPACE)
            self._turn_since = None

    def hold(self, *counts: tuple[int | None, str]) -> None:
        """Publish what the job holds, as (2, "trial"); nothing to hold nothing."""
        if self._store is None or self._is_trial:
            return
        texts = [f"{count} {kind}{'s' * (count != 1)}" for count, kind in counts if count]
        with self._lock:
            self._held = f"{self._name} ({', '.join(texts)})" if texts else ""
            if self._held:
                self._put(_HOLDER + self._me)
            else:
                self._store._internal_kv_del(_HOLDER + self._me, namespace=_NAMESPACE)

    def holders(self) -> list[str]:
        """Return what other living jobs hold, as 'run emoji (1 training worker)'."""
        if self._store is None:
            return []
        with self._lock:
            keys = [key.decode() for key in self._store._internal_kv_list(_HOLDER, namespace=_NAMESPACE)]
            living = [key for key in sorted(keys) if key != _HOLDER + self._me and not self._is_dead(key)]
            return [self._seen[key][0].decode().partition("\n")[2] for key in living if key in self._seen]

    def renew(self) -> None:
        """Show that this job lives; called every `_RENEW_S`."""
        with self._lock:
            if self._turn_since is not None:
                if not self._is_mine():
                    self._turn_since = None
                elif self._now() - self._turn_since < _TURN_S:
                    self._put(_TURN)
            if self._held:
                self._put(_HOLDER + self._me)

    def _renew(self) -> None:
        while not self._end.wait(_RENEW_S):
            with contextlib.suppress(Exception):  # while the GCS restarts
                self.renew()

    def _put(self, key: str, overwrite: bool = True) -> bool:
        """Write a new value of a key; return whether the key exists already."""
        self._num_renewals += 1
        value = f"{self._me} {self._num_renewals}\n{self._held}"
        return self._store._internal_kv_put(key, value, overwrite=overwrite, namespace=_NAMESPACE)

    def _is_mine(self) -> bool:
        value = self._store._internal_kv_get(_TURN, namespace=_NAMESPACE)
        return value is not None and value.decode().startswith(self._me)

    def _is_dead(self, key: str) -> bool:
        """Return whether the owner of a key has not renewed its value for long."""
        value = self._store._internal_kv_get(key, namespace=_NAMESPACE)
        seen, since = self._seen.pop(key, (None, self._now()))
        if value is None:
            return False
        self._seen[key] = value, since if value == seen else self._now()
        return self._now() - self._seen[key][1] > _DEAD_S


def num_placed(groups: Sequence[Sequence[dict[str, float]]], timeout_s: float = _PROBE_S) -> int:
    """Return how many of these groups, from the first on, fit the cluster.

    Args:
        groups: the bundles of each placement group.
        timeout_s: seconds until Ray has placed what fits.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    # The sum of free resources does not answer this: they may be spread over several nodes.
    bundles = [[{name: n for name, n in one.items() if n} for one in group] for group in groups]
    made = [placement_group([one for one in group if one], strategy="PACK") for group in bundles]
    end = time.monotonic() + timeout_s
    placed = [_is_placed(group, end) for group in made]
    for group in made:
        remove_placement_group(group)
    for group in made:
        while ray.util.placement_group_table(group).get("state") not in (None, "REMOVED"):
            time.sleep(0.02)
    return [*placed, False].index(False)


def _is_placed(group: Any, end: float) -> bool:
    """Return whether Ray has placed a group by a time.

    Waits longer while Ray is placing it. A group that is removed while Ray places it may keep its resources for ever
    (seen with Ray 2.60 on a busy machine).
    """
    import ray

    while time.monotonic() < end + _DECISION_S:
        table = ray.util.placement_group_table(group)
        if table["state"] == "CREATED":
            return True
        is_refused = table["state"] == "PENDING" and table["stats"]["scheduling_state"] in (
            "NO_RESOURCES",
            "INFEASIBLE",
        )
        if is_refused and time.monotonic() > end:
            break
        time.sleep(0.02)
    return False
