"""Studies: every one that is shipped can be read at every scale, and mistakes are told with key, value and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sigray.orchestrator.config import ConfigError, parse_config
from sigray.tuning.search import Search
from sigray.tuning.study import load_study, parse_study, read_study, trial_name
from sigray.workers.training.phases import phases_of
from tests.helpers.data import TOWERS
from tests.helpers.sweeps import run_content, study_content

STUDIES = sorted(Path("tuning/studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_can_be_read_at_every_scale(path):
    scales = ["demo", *(yaml.safe_load(path.read_text()).get("scales") or {})]
    assert "full" in scales
    for scale in scales:
        study = load_study(path, [f"scale={scale}"])
        assert study.config.expect, "a study states what it expects"
        search = Search(study)
        for number in range(search.num_trials):
            proposal = search.propose(number, [])
            assert proposal is not None
            content = study.trial_content(number, proposal.seed, proposal.budget, proposal.point.overrides)
            config = parse_config(content, f"{path} {scale} trial {number}")
            assert config.train.num_samples == proposal.budget
            assert config.run.name == trial_name(number)
        for claim in study.config.expect:
            points = [search.propose(number, []).point.values for number in range(search.num_trials)]
            for side in (claim.better, claim.worse):
                wanted = side | claim.where
                assert any(wanted.items() <= values.items() for values in points), (
                    f"{claim.text}: no trial has {wanted}"
                )


def test_a_sweep_varies_a_key_of_a_phase_where_the_phase_has_it():
    vision = {"timm_model_name": "siglip_vit_w32_d2_h2_m64_p8_s16", "timm_pool": "map", "timm_proj": "none"}
    towers = {
        "embed_dim": 32,
        "vision_cfg": vision | {"image_size": 16},
        "text_cfg": TOWERS["text_cfg"] | {"width": 32},
    }
    base = run_content() | {"model": {"towers": towers, "heads": {}}}
    base["train"] = base["train"] | {"ema": 100}
    base["phases"] = [{"start": 0.5, "loss": {"distill": {"masked_weight": 0.5}}}]

    def contents(key: str) -> list[dict[str, Any]]:
        study = parse_study(study_content(base=base, space={key: {"grid": [0.5, 2]}}), "study.yaml")
        search = Search(study)
        found = [search.propose(number, []) for number in range(2)]
        return [study.trial_content(0, each.seed, each.budget, each.point.overrides) for each in found if each]

    with pytest.raises(ConfigError, match=r"phases.0 gives it: give phases.0.loss.distill.local_weight"):
        contents("loss.distill.local_weight")
    key = "loss.distill.local_weight"
    weights = [
        phases_of(parse_config(content, "trial"))[1].loss.distill.local_weight
        for content in contents(f"phases.0.{key}")
    ]
    assert weights == [0.5, 2.0]


def test_the_demo_studies_read_what_the_demo_builds():
    assert STUDIES
    for path in STUDIES:
        assert load_study(path).base["data"]["shards"].endswith("data/emoji36/train/*.tar")


def test_overrides_go_where_they_belong(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study_content()))
    study = load_study(
        path,
        ["budget=1800", "optim.weight_decay=0.5", "cluster.num_workers=2", "space.optim.lr={grid: [0.1]}", "seeds=[3]"],
    )
    assert study.config.budget == 1800
    assert study.base["optim"]["weight_decay"] == 0.5
    assert study.base["cluster"]["num_workers"] == 2
    assert study.config.space["optim.lr"].grid == [0.1]
    assert study.config.seeds == [3]


def test_a_scale_merges_overrides_and_space_and_replaces_the_rest(tmp_path):
    path = tmp_path / "study.yaml"
    scales = {
        "full": {"budget": 9000, "overrides": {"optim.beta2": 0.9}, "space": {"loss.name": {"grid": ["softmax"]}}}
    }
    path.write_text(yaml.safe_dump(study_content(overrides={"optim.beta1": 0.8}, scales=scales)))
    study = load_study(path, ["scale=full"])
    assert study.config.budget == 9000
    assert study.config.overrides == {"optim.beta1": 0.8, "optim.beta2": 0.9}
    assert list(study.config.space) == ["optim.lr", "loss.name"]
    assert load_study(path).config.budget == 900


def test_a_study_in_its_folder_needs_no_other_file(tmp_path):
    base = tmp_path / "runs" / "base.yaml"
    base.parent.mkdir()
    base.write_text(yaml.safe_dump(run_content()))
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study_content(base="runs/base.yaml")))
    study = load_study(path)
    base.unlink()
    again = parse_study(yaml.safe_load(study.config.to_yaml()), "study.yaml")
    assert again.config == study.config
    assert again.base == study.base


def test_a_sweep_goes_on_elsewhere(tmp_path):
    study = parse_study(study_content(dir=str(tmp_path / "before")), "study")
    home = tmp_path / "now" / "tiny"
    home.mkdir(parents=True)
    (home / "study.yaml").write_text(study.config.to_yaml())
    moved = read_study(str(home), ["cluster.num_workers=2", "parallel=3"])
    assert (moved.base["cluster"]["num_workers"], moved.config.parallel) == (2, 3)
    assert moved.config.folder == home
    assert read_study(str(home), [f"dir={tmp_path / 'before'}"]).config == study.config


def test_a_copy_of_a_sweep_with_a_storage_is_used_where_it_is(tmp_path):
    places = {"dir": str(tmp_path / "before"), "storage": str(tmp_path / "storage")}
    study = parse_study(study_content(**places), "study")
    for name in ("before", "storage", "copy"):
        home = tmp_path / name / "tiny"
        home.mkdir(parents=True)
        (home / "study.yaml").write_text(study.config.to_yaml())
        found = read_study(str(home)).config
        assert found.folder == tmp_path / ("copy" if name == "copy" else "before") / "tiny"
        assert found.storage_uri == study.config.storage_uri


def test_an_override_of_what_the_trials_vary_is_refused(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study_content(space={"train.global_batch_size": {"grid": [15, 30]}})))
    with pytest.raises(ConfigError, match=r"train.global_batch_size=60: .* give space.train.global_batch_size="):
        load_study(path, ["train.global_batch_size=60"])
    assert load_study(path, ["space.train.global_batch_size={grid: [60]}"]).config.space


def test_a_base_from_the_command_line_is_relative_to_where_that_is(tmp_path, monkeypatch):
    (tmp_path / "studies").mkdir()
    path = tmp_path / "studies" / "study.yaml"
    path.write_text(yaml.safe_dump(study_content(base="none.yaml")))
    other = run_content()
    other["train"]["global_batch_size"] = 30
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(other))
    monkeypatch.chdir(tmp_path)
    assert load_study(path, ["base=mine.yaml"]).base["train"]["global_batch_size"] == 30


def test_rungs_are_the_same_counts_for_all_and_end_with_the_budget():
    def rungs(budget: int = 900, **changes: Any) -> list[int]:
        return parse_study(study_content(budget=budget, **changes), "study").config.rungs_of(budget)

    assert rungs() == [900]
    assert rungs(rungs=[100, 300]) == [100, 300, 900]
    assert rungs(rungs=[100, 900]) == [100, 900]
    assert rungs(scheduler={"name": "asha"}) == [100, 300, 900]
    assert rungs(scheduler={"name": "asha", "eta": 2, "first_rung": 400}) == [450, 900]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrik": 1}, r"metrik: unknown key \(value 1\); did you mean 'metric'"),
        ({"scheduler": {"name": "asha", "etta": 3}}, r"scheduler.etta: unknown key.*did you mean 'eta'"),
        ({"scheduler": {"name": "pbt"}}, r"scheduler.name='pbt': should be 'none', 'asha', 'median' or 'hyperband'"),
        ({"budget": 0}, "budget"),
        ({"rungs": [500, 300]}, r"rungs=\[500, 300\]"),
        ({"rungs": [1000]}, "none above budget=900"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\]: one is given twice"),
        ({"space": {"optim.lr": {"loguniform": [1e-4, 1e-2]}}}, r"space.optim.lr is drawn.*search: \{name: random"),
        ({"search": {"name": "random", "num_trials": 3}}, "has nothing to draw"),
        ({"search": {"name": "random"}}, r"name=random needs num_trials"),
        (
            {
                "search": {"name": "optuna", "num_trials": 3},
                "seeds": [0, 1],
                "space": {"optim.lr": {"uniform": [1, 2]}},
            },
            "optuna takes one",
        ),
        ({"metric": "zero_shot.colours.top2"}, "is no figure of an evaluation; did you mean zero_shot"),
        ({"metric": "zero_shot.shapes.top1"}, "no eval.sets.shapes, but colours, plain"),
        ({"metric": "zero_shot.plain.top1"}, "eval.sets.plain has no classes"),
        (
            {"expect": [{"text": "x", "better": {"optim.lt": 1}, "worse": {"optim.lr": 2}}]},
            "'optim.lt' is no dimension",
        ),
        (
            {"expect": [{"text": "x", "better": {"optim.lr": 1}, "worse": {"optim.lr": 2}, "at": 5}]},
            "none of the rungs",
        ),
        ({"figures": [{"title": "x", "x": "optim.lt"}]}, "'optim.lt' is no dimension"),
        ({"figures": [{"title": "x"}]}, "kind=lines needs x"),
        (
            {"figures": [{"title": "x", "kind": "table", "rows": "optim.lr", "x": "optim.lr"}]},
            "x=optim.lr has no effect",
        ),
        ({"overrides": {"cluster": {"num_workers": 1}}}, "a dotted key such as"),
        ({"overrides": {"train.num_samples": 5}}, "train.num_samples is set by the study's budget"),
        ({"space": {"run.seed": {"grid": [1, 2]}}}, "run.seed is set by the study's seeds"),
        ({"overrides": {"train.global_batch": 5}}, "train.global_batch: unknown key"),
        ({"overrides": {"train.global_batch_size": 5000}}, "larger than train.num_samples=900"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_study(study_content(**changes), "study.yaml")


def test_an_unknown_scale_and_a_missing_base_are_told(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study_content(base="none.yaml")))
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_study(path)
    with pytest.raises(ConfigError, match="scale=huge: there are demo, and no others"):
        load_study(path, ["scale=huge"])
