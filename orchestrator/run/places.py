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
of its own clock. A Ray of the job's own has no turn: everything fits by construction.
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

HOLD_S = 5.0  # seconds that a job keeps its data-shard workers while it waits for training workers
START_S = 20  # seconds after which Ray Train gives up to place training workers that were probed
_PAUSE_S = (0.5, 2.5)  # bounds of the random pause between two probes: equal ones could meet again and again
_RENEW_S, _DEAD_S = 3.0, 20.0
_TURN_S = 300.0  # longest turn of a process that lives
_PROBE_S = 1.0  # of a placement group whose resources are free
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


class Board:
    """The cluster's turn, and what each job holds, in Ray's key-value store.

    Args:
        store: `ray.experimental.internal_kv`.
        clock: seconds of a monotonic clock.
    """

    def __init__(self, store: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._me = uuid.uuid4().hex
        self._seen: dict[str, tuple[bytes, float]] = {}  # newest value of each key, and since when
        self._lock = threading.Lock()  # of the thread that renews
        self._num_renewals = 0
        self._text = ""
        self._turn_since: float | None = None

    @property
    def has_turn(self) -> bool:
        return self._turn_since is not None

    def take(self) -> bool:
        """Take the turn if no living job has it; return whether this job has it."""
        with self._lock:
            if not self.has_turn:
                if self._is_dead(_TURN):
                    self._store._internal_kv_del(_TURN, namespace=_NAMESPACE)
                exists = self._store._internal_kv_put(_TURN, self._value(), overwrite=False, namespace=_NAMESPACE)
                self._turn_since = None if exists else self._clock()
            return self.has_turn

    def pass_on(self) -> None:
        """Give the turn up."""
        with self._lock:
            if self.has_turn and self._is_mine():
                self._store._internal_kv_del(_TURN, namespace=_NAMESPACE)
            self._turn_since = None

    def hold(self, text: str) -> None:
        """Publish what this job holds; nothing if the text is empty."""
        with self._lock:
            self._text = text
            if text:
                self._put(_HOLDER + self._me)
            else:
                self._store._internal_kv_del(_HOLDER + self._me, namespace=_NAMESPACE)

    def renew(self) -> None:
        """Show that this job lives; called every `_RENEW_S`."""
        with self._lock:
            if self._turn_since is not None:
                if not self._is_mine():
                    self._turn_since = None
                elif self._clock() - self._turn_since < _TURN_S:
                    self._put(_TURN)
            if self._text:
                self._put(_HOLDER + self._me)

    def holders(self) -> list[str]:
        """Return what the other living jobs hold."""
        with self._lock:
            keys = self._store._internal_kv_list(_HOLDER, namespace=_NAMESPACE)
            others = sorted(key.decode() for key in keys if not key.decode().endswith(self._me))
            living = [key for key in others if not self._is_dead(key)]
            return [self._seen[key][0].decode().partition("\n")[2] for key in living if key in self._seen]

    def _value(self) -> str:
        self._num_renewals += 1
        return f"{self._me} {self._num_renewals}\n{self._text}"

    def _put(self, key: str) -> None:
        self._store._internal_kv_put(key, self._value(), overwrite=True, namespace=_NAMESPACE)

    def _is_mine(self) -> bool:
        value = self._store._internal_kv_get(_TURN, namespace=_NAMESPACE)
        return value is not None and value.decode().startswith(self._me)

    def _is_dead(self, key: str) -> bool:
        """Return whether the owner of a key has not renewed its value for long."""
        value = self._store._internal_kv_get(key, namespace=_NAMESPACE)
        if value is None:
            self._seen.pop(key, None)
            return False
        seen, since = self._seen.get(key, (None, 0.0))
        if value != seen:
            self._seen[key] = value, self._clock()
            return False
        return self._clock() - since > _DEAD_S


class Places:
    """Ask, probe and pass on for one job; a context manager on a joined cluster.

    Args:
        name: of the job, for the pending messages of others.
        is_joined: whether other jobs may run on this Ray.
        has_turn: whether the sweep has taken the turn for this trial's first start.
    """

    def __init__(self, name: str, *, is_joined: bool, has_turn: bool = False) -> None:
        self._name, self._is_trial = name, has_turn
        self._board: Board | None = None
        if is_joined:
            import ray.experimental.internal_kv as store

            self._board = Board(store)
        self._end = threading.Event()
        self.begin()
        self.is_inherited = has_turn

    def __enter__(self) -> Places:
        if self._board is not None:
            self._thread = threading.Thread(target=self._renew, args=(self._board,), name="places", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._board is not None:
            self._thread.join()
            with contextlib.suppress(Exception):  # Ray may be gone
                self._board.pass_on()
                self.hold()

    def _renew(self, board: Board) -> None:
        while not self._end.wait(_RENEW_S):
            with contextlib.suppress(Exception):  # while the GCS restarts
                board.renew()

    def begin(self, pause_s: float = 0.0, *, was_taken: bool = False) -> None:
        """Begin to wait.

        Args:
            pause_s: seconds before the first probe.
            was_taken: whether another job took what was probed. Then the job gives back at once.
        """
        self.up()
        self._found = None
        now = time.monotonic()
        self._begin = now - HOLD_S * was_taken
        self._ask_at = now + max(pause_s, random.uniform(*_PAUSE_S) * was_taken)

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._begin

    def step(self, holds: bool, probe: Callable[[], int]) -> tuple[Move, int]:
        """Go on until the job starts, gives back or has to wait.

        Args:
            holds: whether the job holds resources.
            probe: returns how much fits, 0 for nothing.

        Returns:
            The move, which the caller makes, and the answer of the probe.
        """
        while True:
            has_turn = self._board is None or self.is_inherited or self._board.has_turn
            fits = None if self._found is None else self._found > 0
            pause_s = self._ask_at - time.monotonic()
            move = next_move(View(has_turn, fits, holds and self._board is not None, self.waited_s, pause_s))
            if move == "ask":
                assert self._board is not None
                if not self._board.take():
                    self._pause()
            elif move == "probe":
                self._found = probe()
            elif move == "pass":
                self.up()
                self._found = None
                self._pause()
                return "wait", 0
            else:
                found, self._found = self._found or 0, None
                return move, found

    def up(self) -> None:
        """Pass the turn on: what was probed has started, or does not fit."""
        self.is_inherited = False
        if self._board is not None:
            self._board.pass_on()

    def hold(self, **counts: int) -> None:
        """Publish what the job holds, as `trial=2`; a sweep does so for its trials."""
        if self._board is not None and not self._is_trial:
            texts = [f"{n} {kind.replace('_', '-')}{'s' * (n != 1)}" for kind, n in counts.items() if n]
            self._board.hold(f"{self._name} ({', '.join(texts)})" if texts else "")

    def holders(self) -> list[str]:
        """Return what other jobs hold, as 'run emoji (1 training worker)'."""
        return [] if self._board is None else self._board.holders()

    def _pause(self) -> None:
        self._ask_at = time.monotonic() + random.uniform(*_PAUSE_S) * (self._board is not None)


def num_placed(groups: Sequence[Sequence[dict[str, float]]]) -> int:
    """Return how many of these groups of bundles, from the first on, fit the cluster now."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    # The sum of free resources does not answer this: they may be spread over several nodes.
    bundles = [[{name: n for name, n in one.items() if n} for one in group] for group in groups]
    made = [placement_group([one for one in group if one], strategy="PACK") for group in bundles]
    end = time.monotonic() + _PROBE_S
    placed = [group.wait(timeout_seconds=max(0.05, end - time.monotonic())) for group in made]
    for group in made:
        remove_placement_group(group)
    for group in made:
        while ray.util.placement_group_table(group).get("state") not in (None, "REMOVED"):
            time.sleep(0.02)
    return [*placed, False].index(False)
