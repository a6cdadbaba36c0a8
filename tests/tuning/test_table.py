"""The table of results is the state: whatever was lost in memory, the file says it again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from sigray.tuning.decide import Rules
from sigray.tuning.judge import Judge
from sigray.tuning.table import RESULTS, Writer, as_csv, ranking, read_table
from sigray.workers.metrics import REPEAT_S
from sigray.workers.storage import Storage
from tests.helpers.sweeps import FIGURES, decision, result, table_of, trial


def test_a_status_follows_from_what_happened():
    table = table_of(*(trial(number) for number in range(7)))
    for event in (
        {"event": "infeasible", "number": 1, "why": "too large"},
        result(2, 0, 0.2),
        result(3, 0, 0.3),
        decision(3, 0, "stop"),
        result(4, 0, 0.4),
        decision(4, 0, "go on"),
        result(4, 1, 0.5),
        decision(4, 1, "stop"),
        {"event": "failed", "number": 5, "why": "NaN"},
        {"event": "failed", "number": 6, "why": "disk full"},
        {"event": "retry", "number": 6},
    ):
        table.add(event)
    statuses = [table.rows[number].status for number in range(7)]
    assert statuses == ["waiting", "infeasible", "begun", "stopped", "finished", "failed", "waiting"]
    assert table.samples_spent == 300 + 300 + 900
    assert table.counts()["waiting"] == 2
    assert [row.is_over for row in table.rows.values()] == [False, True, False, True, True, True, False]


def test_an_unknown_event_is_an_error():
    with pytest.raises(ValueError, match="unknown event 'guess'"):
        table_of({"event": "guess"})


def test_what_is_written_is_read_again_whole_at_every_moment(tmp_path):
    storage = Storage(tmp_path)
    writer = Writer(storage)
    events = [trial(0), trial(1), result(0, 0, 0.25), decision(0, 0, "go on"), result(1, 0, 0.5)]
    for count, event in enumerate(events, start=1):
        writer.add(event)
        lines = (tmp_path / RESULTS).read_text().splitlines()
        assert [json.loads(line) for line in lines] == events[:count]
    assert read_table(storage) == writer.table == Writer(storage).table


def test_a_rung_is_found_by_its_count_of_samples():
    """A rung falls on the first step at or after it: at 300, a batch of 128 is at 384."""
    row = table_of(trial(0), result(0, 0, 0.2, 384), result(0, 1, 0.4, 1024)).rows[0]
    assert row.at(300).value == 0.2
    assert row.at(384).value == 0.2
    assert row.at(900).value == row.at(None).value == 0.4
    assert table_of(trial(0), result(0, 0, 0.2, 384)).rows[0].at(900) is None


def test_a_rung_that_is_missing_is_not_replaced_by_a_later_one():
    row = table_of(trial(0), result(0, 1, 0.4, 1024)).rows[0]
    assert row.at(300) is None


def test_a_searcher_learns_nothing_from_what_failed():
    events = [trial(0), result(0, 0, 0.5), decision(0, 0, "go on")]
    failed = table_of(*events, {"event": "failed", "number": 0, "why": "NaN"}).rows[0].outcome()
    assert (failed.values, failed.is_over, failed.is_complete) == ([], True, False)
    stopped = table_of(*events[:2], decision(0, 0, "stop")).rows[0].outcome()
    assert (stopped.values, stopped.is_over, stopped.is_complete) == ([0.5], True, False)
    finished = table_of(*events, result(0, 1, 0.6), decision(0, 1, "stop")).rows[0].outcome()
    assert (finished.values, finished.is_over, finished.is_complete) == ([0.5, 0.6], True, True)


def test_ranking_is_by_how_far_then_by_the_mean_over_seeds():
    table = table_of(
        trial(0, seed=0, lr=1),
        trial(1, seed=0, lr=2),
        trial(2, seed=1, lr=1),
        trial(3, seed=1, lr=2),
        trial(4, seed=0, lr=3),
        trial(5, seed=0, lr=9, budget=300),
        *(result(number, 0, 0.1) for number in (0, 1, 2, 3)),
        result(4, 0, 0.99),
        result(5, 0, 1.0),
        *(result(number, 1, value) for number, value in ((0, 0.5), (2, 0.3), (1, 0.6), (3, 0.1))),
    )
    ranked = ranking(table.rows.values())
    assert [one.values["lr"] for one in ranked] == [1, 2, 3]  # 3 did not come as far; 9 has a smaller budget
    assert (ranked[0].mean, ranked[0].rung) == (0.4, 1)


def test_the_final_table_tells_nothing_of_when_and_where():
    events = [trial(0, **{"loss.name": "a,b", "optim.lr": 0.1}), result(0, 0, 1 / 3), decision(0, 0, "stop")]
    csv = as_csv(table_of(*events), 2)
    assert csv.splitlines() == [
        "trial,seed,budget,loss.name,optim.lr,status,samples_seen,rung_1,rung_2",
        '0,0,900,"a,b",0.1,stopped,300,0.3333333333333333,',
    ]
    assert as_csv(table_of(*events, {"event": "stream", "decoded": 5, "served": 9, "cpu_s": 1.0}), 2) == csv


class Sweep:
    """A judge that may die between any two calls, and does where the test says so."""

    def __init__(self, folder: Path, rules: Rules) -> None:
        self._arguments = ("sweep", str(folder), rules, {900: 2})
        self.judge = Judge(*self._arguments)

    def die(self) -> None:
        self.judge = Judge(*self._arguments)

    def ask(self, number: int, rung: int, value: float) -> str:
        return self.judge.decide(number, rung, (300, 900)[rung], value, {"loss": 1.0, "figures": FIGURES})


VALUES = {0: (0.3, 0.4), 1: (0.5, 0.7), 2: (0.1, 0.2), 3: (0.6, 0.6)}


def play(folder: Path, *, dies: bool) -> str:
    sweep = Sweep(folder, Rules("asha", eta=2))
    sweep.judge.add(*(trial(number) for number in VALUES))
    waiting = [(3, 0), (1, 0), (0, 0), (2, 0)]  # the last comes first
    while waiting:
        number, rung = waiting.pop(0)
        answer = sweep.ask(number, rung, VALUES[number][rung])
        if dies:
            sweep.die()
            # It was told, or was about to be: it asks again and hears the same.
            assert answer == "wait" or sweep.ask(number, rung, VALUES[number][rung]) == answer
        if answer == "wait":
            waiting.append((number, rung))
        elif answer == "go on":
            waiting.insert(0, (number, rung + 1))
    return as_csv(sweep.judge.table()[0], 2)


def test_a_judge_that_dies_after_every_word_decides_as_one_that_lives(tmp_path):
    undisturbed = play(tmp_path / "a", dies=False)
    assert play(tmp_path / "b", dies=True) == undisturbed
    outcomes = [line.split(",")[4] for line in undisturbed.splitlines()[1:]]
    assert outcomes == ["finished", "finished", "stopped", "finished"]


def test_a_decision_stands_whatever_comes_later(tmp_path):
    """Out of order: what was told is told again, though by now it would be decided otherwise."""
    sweep = Sweep(tmp_path, Rules("asha", eta=2, in_order=False))
    sweep.judge.add(trial(0), trial(1), trial(2))
    assert sweep.ask(0, 0, 0.1) == "go on"
    assert sweep.ask(1, 0, 0.5) == "go on"
    assert sweep.ask(2, 0, 0.6) == "go on"
    sweep.die()
    assert sweep.ask(0, 0, 0.1) == "go on"
    events = [json.loads(line)["event"] for line in (tmp_path / RESULTS).read_text().splitlines()]
    assert events.count("decision") == events.count("result") == 3


def test_trials_are_compared_within_their_seed_and_budget(tmp_path):
    sweep = Sweep(tmp_path, Rules("asha", eta=2))
    sweep.judge.add(trial(0, seed=0), trial(1, seed=1), trial(2, seed=1))
    assert sweep.ask(0, 0, 0.9) == "go on"
    assert sweep.ask(1, 0, 0.2) == "go on"
    assert sweep.ask(2, 0, 0.1) == "stop"


def test_a_trial_ends_with_the_rungs_of_its_own_budget(tmp_path):
    judge = Judge("sweep", str(tmp_path), Rules("asha", eta=2), {300: 1, 900: 2})
    judge.add(trial(0, budget=300), trial(1, budget=900))
    asked = 300, 0.5, {"loss": 1.0, "figures": FIGURES}
    assert judge.decide(0, 0, *asked) == "stop"  # at its end
    assert judge.decide(1, 0, *asked) == "go on"


def test_a_trial_that_goes_on_after_a_restart_knows_its_rungs(tmp_path):
    sweep = Sweep(tmp_path, Rules())
    sweep.judge.add(trial(0))
    assert sweep.ask(0, 0, 0.5) == "go on"
    sweep.die()
    sweep.judge.assign(0, ["stream"], {"run": {}})
    assert sweep.judge.assignment(0) == ({"run": {}}, ["stream"], [0])


def test_an_interrupted_sweep_lets_a_waiting_trial_go_without_deciding(tmp_path):
    sweep = Sweep(tmp_path, Rules("asha"))
    sweep.judge.add(trial(0), trial(1))
    assert sweep.ask(1, 0, 0.5) == "wait"
    assert sweep.judge.heard(1, {"samples_seen": 300}) is False
    sweep.judge.stop()
    assert sweep.judge.heard(1, {"samples_seen": 300}) is True
    assert sweep.ask(1, 0, 0.5) == "stop"
    assert read_table(Storage(tmp_path)).rows[1].results[0].answer is None


def test_the_dashboard_gets_the_whole_table_again_and_again(tmp_path, monkeypatch):
    """Ray drops a gauge that is not set for 20 s; a state without trials is 0, so that its line falls."""
    told: dict[tuple[str, ...], float] = {}

    def note(self: object, name: str, value: float, **tags: str) -> None:
        told[name.removeprefix("sigray_sweep_"), *tags.values()] = value

    monkeypatch.setattr("sigray.workers.metrics._Exporter.set", note)
    now = 0.0
    monkeypatch.setattr("sigray.tuning.judge.time", SimpleNamespace(monotonic=lambda: now))
    sweep = Sweep(tmp_path, Rules())
    sweep.judge.add(*(trial(number) for number in range(4)), {"event": "infeasible", "number": 3, "why": "too large"})
    sweep.ask(0, 0, 0.5)
    sweep.ask(1, 0, 0.25)
    sweep.judge.heard(1, {"samples_seen": 480})
    sweep.judge.table()
    assert not told
    for _ in range(2):
        told.clear()
        sweep.judge.table({1})
        assert told == {
            ("figure", "trial-000"): 0.5, ("figure", "trial-001"): 0.25, ("best_figure",): 0.5,
            ("samples_seen", "trial-000"): 300, ("samples_seen", "trial-001"): 480,
            ("trials", "waiting"): 2, ("trials", "running"): 1, ("trials", "infeasible"): 1,
            **{("trials", state): 0 for state in ("done", "stopped", "failed")},
        }  # fmt: skip
        told.clear()
        now += REPEAT_S / 2
        sweep.judge.table({1})
        assert not told
        now += REPEAT_S / 2


def test_a_figure_that_is_no_number_is_an_error(tmp_path):
    sweep = Sweep(tmp_path, Rules())
    sweep.judge.add(trial(0))
    with pytest.raises(ValueError, match="trial 0 is nan"):
        sweep.ask(0, 0, float("nan"))
