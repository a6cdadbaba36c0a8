"""The page of a sweep, from tables that are whole, half full or empty."""

from __future__ import annotations

import pytest
import yaml

from sigray.orchestrator.config import load_config
from sigray.tuning.report import importances, write_report
from sigray.tuning.study import Study, parse_study
from sigray.tuning.table import Table
from sigray.workers.storage import Storage
from tests.helpers.sweeps import full_table, study_of, table_of, trial


def page_of(study: Study, table: Table) -> str:
    path = write_report(study, Storage(study.config.storage_uri), table)
    return path.read_text()


def test_the_page_answers_the_question(tmp_path):
    study = study_of(tmp_path)
    page = page_of(study, full_table(study))
    assert "Does &lt;b&gt;it&lt;/b&gt; matter?" in page
    assert '<p class="answer seen">seen</p><p>The sigmoid leads.</p>' in page
    assert '<p class="answer undecided">undecided</p><p>Larger is worse.</p>' in page
    assert "Best of 6\u00a0configurations: " in page
    assert "50.5\u00a0%\u00a0±\u00a00.71" in page
    assert "2\u00a0others are within two standard errors" in page
    assert "chance is 25.0\u00a0%" in page
    assert page.count("<svg") == 4 - 1  # two rungs against the batch, the learning curves
    assert sorted(path.name for path in (study.config.folder / "figures").iterdir()) == [
        "against_the_batch_300.png",
        "against_the_batch_900.png",
        "curves_900.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (study.config.folder / "figures").iterdir())


def test_the_best_trial_is_a_run_of_its_own(tmp_path):
    study = study_of(tmp_path)
    page_of(study, full_table(study))
    config = load_config(study.config.folder / "best.yaml")
    assert config.run.name == "tiny_best"
    assert (config.loss.name, config.train.num_samples) == ("sigmoid", 900)
    assert config.optim.lr == config.train.global_batch_size / 1000
    assert str(tmp_path) not in str(config.storage_uri)


def test_a_sweep_under_way_says_so(tmp_path):
    study = study_of(tmp_path)
    table = table_of(trial(0, **{"loss.name": "sigmoid", "train.global_batch_size": 2}))
    page = page_of(study, table)
    assert "unfinished" in page
    assert "No trial has reached a result." in page
    assert page.count("no data") >= 2
    assert not (study.config.folder / "best.yaml").exists()


def test_trials_without_a_result_are_named_with_the_reason(tmp_path):
    study = study_of(tmp_path)
    table = full_table(study)
    table.rows[0].results, table.rows[0].error = [], "the loss is <nan>"
    table.rows[1].results, table.rows[1].error, table.rows[1].is_infeasible = [], "batch too large", True
    page = page_of(study, table)
    assert "<b>Trial 0, failed</b>" in page
    assert "the loss is &lt;nan&gt;" in page
    assert "<b>Trial 1, infeasible</b>" in page


def test_a_study_without_figures_gets_one_that_suits_its_space(tmp_path):
    study = study_of(tmp_path, figures=[], expect=[])
    assert "The figure against global batch size" in page_of(study, full_table(study))
    only_names = {"loss.name": {"grid": ["sigmoid", "softmax"]}}
    study = study_of(tmp_path, figures=[], expect=[], space=only_names)
    assert page_of(study, full_table(study)).count('<td class="best">') == 1


def test_a_trial_without_the_dimension_is_on_every_line(tmp_path):
    """As the run without noise stands at 0 for each kind of noise."""
    space = {
        "amount": {"cases": {"0": {"optim.beta1": 0.5}, "1": {"optim.beta1": 0.6}}},
        "loss.name": {"grid": ["sigmoid", "softmax"], "when": "optim.beta1 > 0.5"},
    }
    study = study_of(tmp_path, space=space, expect=[], figures=[{"title": "f", "x": "amount", "series": "loss.name"}])
    page = page_of(study, full_table(study))
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert svg.count("var(--first)") > 1
    assert svg.count("var(--second)") > 1


def test_importance_finds_what_decides(tmp_path):
    space = {
        "optim.lr": {"uniform": [0, 1]},
        "loss.name": {"choice": ["sigmoid", "softmax"]},
        "optim.beta1": {"uniform": [0, 0.9]},
    }
    study = study_of(
        tmp_path, space=space, expect=[], figures=[], seeds=[0], search={"name": "random", "num_trials": 30}
    )
    found = importances(study, full_table(study))
    assert max(found, key=found.get) == "loss.name"
    assert sum(found.values()) == pytest.approx(1)
    few = study_of(tmp_path, space=space, expect=[], figures=[], search={"name": "random", "num_trials": 4})
    assert importances(few, full_table(few)) == {}


def test_the_study_on_the_page_can_be_run_again(tmp_path):
    study = study_of(tmp_path)
    again = parse_study(yaml.safe_load(study.config.to_yaml()), "again")
    assert again.config == study.config
