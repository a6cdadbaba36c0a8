"""What `sigray.sweep` returns."""

from __future__ import annotations

from sigray.tuning.result import result_of
from tests.helpers.sweeps import full_table, result, study_of, table_of, trial


def test_the_result_of_a_sweep_has_its_trials_and_the_best(tmp_path):
    study = study_of(tmp_path)
    table = full_table(study)
    found = result_of(study, table)
    assert (found.status, found.metric, found.folder) == ("finished", study.config.metric, study.config.folder)
    assert [one.number for one in found.trials] == list(table.rows)
    assert found.best in found.trials
    finished = [one for one in found.trials if one.status == "finished"]
    assert found.best is not None
    assert found.best.figure == table.rows[found.best.number].results[-1].value
    assert {one.samples_seen for one in finished} == {study.config.budget}
    assert found.best.folder == study.config.folder / "trials" / f"trial-{found.best.number:03d}"


def test_an_interrupted_sweep_is_stopped(tmp_path):
    study = study_of(tmp_path)
    found = result_of(study, table_of(trial(0), trial(1), result(0, 0, 0.5, 300)))
    assert (found.status, [one.figure for one in found.trials]) == ("stopped", [0.5, None])
