"""The page of a sweep, from tables that are whole, half full or empty."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from sigray.orchestrator.config import load_config
from sigray.tuning.cli import main
from sigray.tuning.report import importances, write_report
from sigray.tuning.study import Study, parse_study
from sigray.tuning.table import Table
from sigray.workers.storage import Storage
from tests.helpers.run_folders import made, write_run
from tests.helpers.sweeps import decision, full_table, result, study_of, table_of, trial


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
    assert "50.5\u00a0%\u00a0±\u00a00.79" in page  # of 2 x 2,000 images
    assert "2\u00a0others are within two standard errors" in page
    assert "chance is 25.0\u00a0%" in page
    assert page.count("<svg") == 4 - 1  # two rungs against the batch, the learning curves
    assert sorted(path.name for path in (study.config.folder / "figures").iterdir()) == [
        "against_the_batch_300.png",
        "against_the_batch_900.png",
        "curves_900.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (study.config.folder / "figures").iterdir())


def texts_of(svg: str) -> list[tuple[float, str]]:
    """The texts that are centred at an x, as the names of ticks are."""
    found = re.findall(r'<text style="[^"]*text-anchor: middle[^"]*" x="([0-9.]+)"[^>]*>([^<]*)<', svg)
    return [(float(x), text) for x, text in found]


@pytest.mark.parametrize("sizes", [[512, 1024, 32768], [2**power for power in range(12, 21)], [3, 5], [10_000, 12_345]])
def test_no_label_of_a_batch_size_is_cut(tmp_path, sizes):
    grid = {"train.global_batch_size": {"grid": sizes}, "optim.beta1": {"grid": [0.5, 0.6][: 10 - len(sizes)]}}
    study = study_of(tmp_path, space=grid, expect=[], figures=[])
    page = page_of(study, full_table(study))
    svg = page[page.index("<svg") : page.index("</svg>")]
    width = float(re.search(r'viewBox="0 0 ([0-9.]+)', svg)[1])
    texts = texts_of(svg)
    names = [text for _, text in texts]
    assert (
        names[names.index("global batch size") - 1]
        == {32768: "32.8k", 2**20: "1.05M", 5: "5", 12_345: "12.3k"}[sizes[-1]]
    )
    assert max(x + 0.6 * 9.5 * len(text) / 2 for x, text in texts) < width
    assert len(texts) <= 9  # seven ticks, the names of the axes
    if len(sizes) < 9:
        assert svg.count("var(--second)") > 1  # a line for each value of the second dimension, a number too


def test_a_trial_below_chance_is_not_called_best(tmp_path):
    study = study_of(tmp_path, expect=[], figures=[])
    page = page_of(study, one_result(0.1))
    assert "None of 1\u00a0configuration is above chance. Highest: " in page
    assert '<tr class="best-row">' not in page
    assert "sigray train" not in page
    assert not (study.config.folder / "best.yaml").exists()
    page = page_of(study, one_result(0.9))
    assert "One configuration so far: " in page
    assert '<tr class="best-row">' in page


@pytest.mark.parametrize(("value", "begin", "has_best"), [(0.1, "None of 1 conf", False), (0.9, "One conf", True)])
def test_the_last_lines_of_a_job_are_the_headline_of_the_page(tmp_path, monkeypatch, capsys, value, begin, has_best):
    space = {"loss.name": {"grid": ["sigmoid"]}}
    study = study_of(tmp_path, expect=[], figures=[], seeds=[0], rungs=[], space=space)
    (event,) = one_result(value).rows.values()
    end = result(0, 0, value, 900) | {"figures": event.results[0].figures}
    lines = [trial(0, **{"loss.name": "sigmoid"}), end, decision(0, 0, "stop")]
    Storage(study.config.storage_uri).write("results.jsonl", "\n".join(map(json.dumps, lines)).encode())
    Storage(study.config.storage_uri).write("study.yaml", study.config.to_yaml().encode())
    monkeypatch.setenv("SIGRAY_JOB_RESULT", "sigray train best.yaml")
    assert main(["sweep", "--resume", study.config.storage_uri]) == 0
    said = capsys.readouterr().out
    assert f"\n{begin}" in said
    assert f"loss sigmoid, {100 * value:.1f} % ± 3.00 after 900 pairs." in said
    assert ("use the result: sigray train best.yaml" in said) == has_best


def one_result(value: float) -> Table:
    figures = {"zero_shot": {"colours": {"top1": value, "chance1": 0.25, "num_images": 100}}}
    values = {"loss.name": "sigmoid", "train.global_batch_size": 2}
    return table_of(trial(0, **values), result(0, 0, value) | {"figures": figures})


def test_losses_of_trials_are_drawn(tmp_path):
    study = study_of(tmp_path)
    for number in (0, 3):
        write_run(made(study.config.folder / "trials" / f"trial-{number:03d}"))
    page = page_of(study, full_table(study))
    assert "2\u00a0trials, coloured by " in page
    assert (study.config.folder / "figures" / "loss_900.png").exists()


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
