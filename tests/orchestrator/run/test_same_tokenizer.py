"""A tokenizer's file that was replaced is noticed wherever the model is read again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sigray.orchestrator.cli.main import main
from sigray.orchestrator.config import RunConfig, load_config
from sigray.orchestrator.run.preflight import with_inputs
from sigray.orchestrator.run_folder import RunFolder
from sigray.workers.config import ModelConfig
from sigray.workers.data.manifest import scan_shards
from sigray.workers.model.export import EXPORTERS
from sigray.workers.model.inputs import shapes
from sigray.workers.model.tokenizer import build_tokenizer
from sigray.workers.model.towers import build_model
from sigray.workers.model.trained_inputs import take_inputs
from tests.helpers.data import write_small_run
from tests.helpers.words import LAST, towers, words_file

OTHER = "is not the file that the model was trained with: its sha256 is"


def replace(path: str) -> None:
    """Give two words each other's token."""
    content = json.loads(Path(path).read_text())
    words = content["model"]["vocab"]
    words["two"], words["words"] = words["words"], words["two"]
    Path(path).write_text(json.dumps(content))


def begun(folder: Path) -> tuple[RunConfig, str]:
    """A run that has begun with a tokenizer's file; returns its config and the file."""
    file = words_file(folder / "tokenizer.json")
    sections: dict[str, Any] = {"train": {"num_samples": 64, "global_batch_size": 8}}
    yaml = write_small_run(folder, model={"towers": towers(**LAST), "tokenizer": file}, **sections)
    config = with_inputs(load_config(str(yaml), []), print)
    RunFolder(config).begin(config, scan_shards(config.data.shards, config.data))
    return config, file


def test_a_run_does_not_go_on_with_another_file(tmp_path, capsys):
    config, file = begun(tmp_path)
    replace(file)
    assert main(["resume", str(config.folder)]) == 2
    assert OTHER in capsys.readouterr().err


def test_a_run_without_a_hash_goes_on_and_says_so(tmp_path):
    config, file = begun(tmp_path)
    saved = config.folder / "config.yaml"
    saved.write_text(re.sub(r"\n  tokenizer_sha256: \w+", "", saved.read_text()))
    replace(file)
    said: list[str] = []
    again = with_inputs(
        config.model_copy(update={"model": model_of(config)}), said.append, RunFolder(config).saved_config()
    )
    assert again.model.tokenizer_sha256 is None
    assert said == [f"the run recorded no hash of {file}: the file counts as it is now"]
    build_tokenizer(again.model, *shapes(again.model)[1:])


def model_of(config: RunConfig) -> ModelConfig:
    """The model as its YAML has it."""
    return ModelConfig(towers=config.model.towers, tokenizer=config.model.tokenizer)


@pytest.mark.parametrize("form", ["open_clip", "safetensors"])
def test_another_file_is_not_exported(tmp_path, form):
    config, file = begun(tmp_path)
    module = build_model(config.model)
    replace(file)
    with pytest.raises(ValueError, match=OTHER):
        EXPORTERS[form](module, config.model, tmp_path)


def test_weights_of_a_checkpoint_bring_the_file_they_were_trained_with(tmp_path):
    config, file = begun(tmp_path)
    copy = tmp_path / "copy.json"
    copy.write_bytes(Path(file).read_bytes())
    place = config.folder / "checkpoints" / "step-0000000001" / "model.safetensors"
    place.parent.mkdir(parents=True)
    save_file({"logit_scale": torch.zeros(())}, place)
    replace(file)
    options: dict[str, Any] = {"towers": config.model.towers, "init_from": str(place)}
    for tokenizer in (None, file):  # the path of the run, with another content
        model, _ = take_inputs(ModelConfig(**options, tokenizer=tokenizer), {})
        with pytest.raises(ValueError, match=OTHER):
            build_tokenizer(model, *shapes(model)[1:])
    model, remarks = take_inputs(ModelConfig(**options, tokenizer=str(copy)), {})
    assert remarks == []
    build_tokenizer(model, *shapes(model)[1:])
    other = words_file(tmp_path / "other.json", eos=7)
    model, remarks = take_inputs(ModelConfig(**options, tokenizer=other), {})
    assert remarks == [f"model.tokenizer={other}, though the weights were trained with {file}"]
    build_tokenizer(model, *shapes(model)[1:])


def test_an_export_brings_its_file(tmp_path):
    config, _ = begun(tmp_path)
    folder = tmp_path / "export"
    folder.mkdir()
    EXPORTERS["safetensors"](build_model(config.model), config.model, folder)
    model, _ = take_inputs(ModelConfig(init_from=str(folder)), {})
    build_tokenizer(model, *shapes(model)[1:])
    replace(str(folder / "tokenizer.json"))
    model, _ = take_inputs(ModelConfig(init_from=str(folder)), {})
    with pytest.raises(ValueError, match=OTHER):
        build_tokenizer(model, *shapes(model)[1:])
