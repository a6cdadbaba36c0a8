"""Every command that takes a path takes a URL: a small run in each store, without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save

from sigray.orchestrator.config import load_config
from sigray.orchestrator.reports.live_server import RUNS, Pages
from sigray.orchestrator.run.preflight import check_model_and_sets
from sigray.orchestrator.run_folder import RunFolder, read_run
from sigray.tuning.cli import main
from sigray.tuning.live_page import SWEEPS
from sigray.tuning.study import STUDY, load_study, read_study
from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.data.manifest import scan_shards
from sigray.workers.evaluation.evaluate import evaluate_checkpoint
from sigray.workers.evaluation.features import EvaluationJob
from sigray.workers.model.towers import build_model
from sigray.workers.storage import Storage
from tests.helpers.bare import train_bare
from tests.helpers.data import COLOURS, TOWERS, write_dataset
from tests.helpers.stored import SCHEMES


def run_content(root: str) -> dict[str, object]:
    """A run of which each file is below a URL."""
    towers = TOWERS | {"text_cfg": TOWERS["text_cfg"] | {"vocab_size": 64, "no_causal_mask": True}}
    towers["text_cfg"]["pool_type"] = "last"
    colours = {"shards": f"{root}/tars", "classes": f"{root}/classes.json"}
    return {
        "run": {"name": "small", "storage": f"{root}/runs"},
        "data": {"shards": f"{root}/tars", "num_lanes": 2, "shuffle_window": 16},
        "model": {"towers": towers, "tokenizer": f"{root}/words.json", "init_from": f"{root}/start.safetensors"},
        "train": {"num_samples": 40, "global_batch_size": 20, "ledger": True},
        "eval": {"sets": {"colours": colours}},
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_command_takes_a_url(new_place, tmp_path, monkeypatch, capsys, minutes, scheme):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    root = new_place(scheme)
    place = Storage(root)

    def said(*words: str, code: int = 0) -> str:
        assert main([*words]) == code, (words, capsys.readouterr().err)
        return " ".join("".join(capsys.readouterr()).split())

    for path in write_dataset(tmp_path / "made", [20, 20]):
        place.upload(path, f"tars/{path.name}")
    place.write("classes.json", json.dumps([{"id": name, "name": name} for name in COLOURS]).encode())
    assert "shards 2: 2 read whole samples 40" in said("data", "inspect", f"{root}/tars")
    words = f"{root}/words.json"
    assert f"{words}: " in said("data", "tokenizer", f"{root}/tars", words, "--vocab-size", "64")
    content = run_content(root)
    place.write("run.yaml", yaml.safe_dump(content).encode())
    config = load_config(f"{root}/run.yaml", [f"run.dir={tmp_path}/local", "model.init_from=null"])
    place.write("start.safetensors", save(build_model(config.model).state_dict()))
    config = load_config(f"{root}/run.yaml", [f"run.dir={tmp_path}/local"])
    assert f"storage: {root}/runs" in said("config", f"{root}/run.yaml")
    check_model_and_sets(config)

    folder = RunFolder(config)
    folder.begin(config, scan_shards(config.data.shards, config.data))
    train_bare(0, 1, config)
    run = f"{root}/runs/small"
    assert read_run(run).model.init_from == f"{root}/start.safetensors"
    (info,) = list_checkpoints(Storage(run))
    job = EvaluationJob(run, info, config.model, config.data, config.eval, config.embeddings)
    folder.save_evaluation(evaluate_checkpoint(job))
    assert "exactly once" in said("data", "audit", run)
    exported = said("export", run, "--format", "safetensors", "--out", f"{root}/models/a")
    assert f"exported: {root}/models/a" in exported
    said("fetch", f"{root}/models/a")
    assert Path("a/model.safetensors").exists()
    assert f"report: {run}/report.html" in said("report", run)
    assert b"<html" in place.read("runs/small/report.html")

    study = {"name": "lr", "base": f"{root}/run.yaml", "storage": f"{root}/sweeps", "budget": 40}
    study |= {"metric": "retrieval.colours.image_to_text_r10", "space": {"optim.lr": {"grid": [0.1, 0.2]}}}
    place.write("study.yaml", yaml.safe_dump(study).encode())
    begun = load_study(f"{root}/study.yaml")
    sweep = f"{root}/sweeps/lr"
    Storage(sweep).write(STUDY, begun.config.to_yaml().encode())
    assert read_study(sweep).config.storage_uri == sweep  # as --resume reads it
    said("sweep", "--report", sweep)
    assert b"<html" in Storage(sweep).read("report.html")

    pages = Pages([f"{root}/runs", f"{root}/sweeps"], [RUNS, SWEEPS])
    for path in ("/api/runs/small", "/api/sweeps/lr"):
        answer = pages.answer(path)
        assert answer.status == 200, answer
    with pytest.raises(SystemExit):
        main(["fetch", f"{root}/models/a", f"{root}/models/b"])
    assert f"{scheme}:// is not read here: give a local path" in capsys.readouterr().err
