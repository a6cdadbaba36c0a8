"""A run with phases through the command line: trained, evaluated, exported and audited, each phase with its model."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from sigray.orchestrator.cli.main import main
from sigray.orchestrator.run_folder import RunFolder
from tests.helpers.bare import train_bare
from tests.helpers.data import COLOURS, write_dataset
from tests.helpers.phases import FIRST, NUM_STEPS, SECOND, phased_run
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import Sigray


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shared_ray: Any) -> Any:
    """Config of a finished run, and its output."""
    folder = tmp_path_factory.mktemp("phased")
    write_dataset(folder / "held_out", [24])
    (folder / "classes.json").write_text(json.dumps([{"id": name, "name": name} for name in COLOURS]))
    sets = {"colours": {"shards": str(folder / "held_out"), "classes": str(folder / "classes.json")}}
    config = phased_run(folder, eval={"sets": sets}, cluster={"num_workers": 2, "address": shared_ray.address})
    options = ["checkpoint.save_every_steps=1000"]
    run = Sigray(folder / "log", dict(os.environ) | {"COLUMNS": "160"}, "train", str(folder / "run.yaml"), *options)
    assert run.process.wait(300) == 0, run.output()
    return config, run.output()


def test_a_phased_run_says_what_changes(finished):
    config, output = finished
    assert "1 after step 5: image_size=32, weights={'fields': 1.0, 'more': 3.0}, loss.negatives=random" in output
    assert f"phase 2 begins after step {SECOND}: image_size=24" in output
    assert "were restarted" not in output
    page = (config.folder / "report.html").read_text()
    assert "Dotted: a phase begins." in page
    assert "2 after 72 pairs: image_size=24" in page


def test_its_losses_are_those_of_bare_ranks(finished, tmp_path):
    config, _ = finished
    expected = run_on_ranks(2, train_bare, phased_run(tmp_path))[0]["losses"]
    lines = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line["train/loss"] for line in lines} == expected
    assert [line["train/phase"] for line in lines] == [0] * 5 + [1] * 4 + [2] * 3


def test_each_checkpoint_is_evaluated_and_exported_with_the_model_of_its_phase(finished, tmp_path):
    config, _ = finished
    for step, size in ((FIRST, 16), (SECOND, 32), (NUM_STEPS, 24)):
        figures = json.loads((config.folder / f"evaluations/step-{step:010d}.json").read_text())
        assert figures["zero_shot"]["colours"]["num_images"] == 24
        out = tmp_path / str(step)
        checkpoint = f"{config.folder}/checkpoints/step-{step:010d}"
        assert main(["export", checkpoint, "--format", "open_clip", "--out", str(out)]) == 0
        exported = json.loads((out / "open_clip_config.json").read_text())
        assert exported["model_cfg"]["vision_cfg"]["image_size"] == size
        card = (out / "README.md").read_text()
        assert ("negatives random" in card) == (step > FIRST)
        assert ("weights of the run's phase 2: image_size=24" in card) == (step > SECOND)


def test_a_phased_run_is_audited_and_is_finished(finished, capsys):
    config, _ = finished
    assert main(["data", "audit", str(config.folder)]) == 0
    assert "exact: each of 12 steps has its 8 pairs" in capsys.readouterr().out
    assert RunFolder(config).summary()["facts"]["phases"][0]["first_step"] == FIRST
    assert main(["resume", str(config.folder)]) == 0
    assert "the run is finished" in capsys.readouterr().out
