"""A captioning decoder stays out of exports, or comes along and into the next run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sigray.orchestrator.cli.main import main
from sigray.orchestrator.config import RunConfig, parse_config
from sigray.orchestrator.run.preflight import with_inputs
from sigray.orchestrator.run_folder import RunFolder
from sigray.workers.checkpoint.writer import CheckpointWriter
from sigray.workers.config import DecoderConfig, ModelConfig
from sigray.workers.data.manifest import scan_shards
from sigray.workers.model.export import compare
from sigray.workers.model.init_weights import build_initial_model, check_initial_weights
from sigray.workers.model.towers import build_model, num_parameters
from sigray.workers.model.trained_inputs import take_inputs
from sigray.workers.training.optim import build_optimizer
from tests.helpers import pretrained
from tests.helpers.data import TOWERS, drawn_sample, write_tar
from tests.helpers.words import LAST, words_file

GIVEN = {"layers": 1, "width": 24, "heads": 2, "bias": True}
HEADS = {"hidden": 64, "bottleneck": 64, "prototypes": 512}
WORDS = 7


def begin(
    folder: Path,
    towers: dict[str, Any] = TOWERS,
    decoder: dict[str, Any] | None = None,
    heads: dict[str, int] | None = None,
) -> tuple[RunConfig, nn.Module]:
    """A run with a checkpoint of random weights."""
    write_tar(folder / "train" / "0.tar", [drawn_sample(number) for number in range(8)])
    towers = towers | {"text_cfg": towers["text_cfg"] | {"vocab_size": WORDS, **LAST}}
    model = {"towers": towers, "tokenizer": words_file(folder / "words.json")}
    content = {
        "run": {"name": "a", "dir": str(folder / "runs")},
        "data": {"shards": str(folder / "train"), "num_lanes": 1},
        "model": model | {"decoder": decoder, "heads": heads},
        "loss": {"caption_weight": 1 if decoder else 0, "distill": {} if heads else None},
        "train": {"num_samples": 8, "global_batch_size": 8, "ema": 8 if heads else None},
    }
    config = parse_config(content, "the test")
    run = RunFolder(config)
    run.begin(config, scan_shards(config.data.shards, config.data))
    module = pretrained.randomize(build_model(config.model))
    optimizer = build_optimizer(module, config.optim, {})
    writer = CheckpointWriter(run.storage, module, optimizer, config.checkpoint, {}, warn=pytest.fail)
    writer.save(1, 8)
    writer.close()
    return config, module


def export(config: RunConfig, out: Path, *words: str) -> int:
    return main(["export", str(config.folder), "--out", str(out), *words])


@pytest.mark.parametrize(
    ("form", "towers"), [("open_clip", TOWERS), ("transformers", pretrained.SIGLIP)], ids=["open_clip", "transformers"]
)
def test_the_towers_alone_are_exported(form, towers, tmp_path, capsys):
    config, module = begin(tmp_path, towers, GIVEN)
    assert export(config, tmp_path / "out", "--format", form) == 0
    size = num_parameters(module.decoder)
    said = " ".join(capsys.readouterr().out.split())
    assert f"left out: decoder ({size:,} parameters); --format safetensors --with-decoder keeps the decoder" in said
    found = compare(form, tmp_path / "out", module, config.model, ["a two words", "b"])
    assert max(found.image_difference, found.text_difference) < 1e-5
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert not any("decoder" in name for name in load_file(file))


@pytest.mark.parametrize("keeps", [False, True])
def test_safetensors_has_the_decoder_if_it_is_wanted(keeps, tmp_path, capsys):
    config, module = begin(tmp_path, pretrained.SIGLIP, {"layers": 1, "bias": True}, HEADS)
    words = ["--with-decoder"] if keeps else []
    assert export(config, tmp_path / "out", "--format", "safetensors", *words) == 0
    size = num_parameters(module.distiller)
    said = " ".join(capsys.readouterr().out.split())
    assert f"left out: {'' if keeps else f'decoder ({num_parameters(module.decoder):,} parameters), '}distiller" in said
    assert f"distiller ({size:,} parameters)" in said
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    parts = ("visual.", "text.", "logit_", *(["decoder."] if keeps else []))
    expected = {name: tensor for name, tensor in module.state_dict().items() if name.startswith(parts)}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    section = json.loads((tmp_path / "out" / "config.json").read_text())["model"]
    assert section.get("decoder") == ({"layers": 1, "width": 32, "heads": 2, "bias": True} if keeps else None)
    assert ("decoder" in section) == keeps
    assert "heads" not in section
    count = num_parameters(module) - size - (0 if keeps else num_parameters(module.decoder))
    assert f"{num_parameters(module) / 1e6:.1f}" != f"{count / 1e6:.1f}", "the card would say nothing"
    assert f"An image-text model of {count / 1e6:.1f} M parameters" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("place", ["export", "checkpoint"])
def test_a_new_run_begins_with_the_decoder(place, tmp_path):
    """The folder alone says its sizes; a key that is given counts first."""
    config, module = begin(tmp_path, decoder=GIVEN)
    folder = config.folder / "checkpoints" / "step-0000000001"
    if place == "export":
        folder = tmp_path / "out"
        assert export(config, folder, "--format", "safetensors", "--with-decoder") == 0
    model, _ = take_inputs(ModelConfig(init_from=str(folder), decoder={}), {})
    assert model.decoder == DecoderConfig(**GIVEN)
    found = check_initial_weights(model)
    assert set(found.matched) == module.state_dict().keys()
    assert found.missing == found.unused == []
    own = build_initial_model(model).state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in module.state_dict().items())
    other, _ = take_inputs(ModelConfig(init_from=str(folder), decoder={"width": 32}), {})
    assert other.decoder == DecoderConfig(**GIVEN | {"width": 32})
    with pytest.raises(ValueError, match=r"decoder\.positional_embedding: \[8, 24\] in the file, \[8, 32\]"):
        check_initial_weights(other)
    without, _ = take_inputs(ModelConfig(init_from=str(folder)), {})
    assert without.decoder is None
    unused = check_initial_weights(without).unused
    assert set(unused) == {name for name in module.state_dict() if name.startswith("decoder.")}


def test_a_resume_keeps_the_sizes_that_the_weights_gave(tmp_path):
    config, _ = begin(tmp_path, decoder=GIVEN)
    folder = str(config.folder / "checkpoints" / "step-0000000001")
    new = config.model_copy(update={"model": ModelConfig(init_from=folder, decoder={})})
    begun = with_inputs(new, print)
    Path(folder).rename(tmp_path / "gone")
    assert with_inputs(new, print, begun).model == begun.model
    assert begun.model.decoder == DecoderConfig(**GIVEN)


def test_a_decoder_begins_fresh_beside_weights_without_one(tmp_path):
    pretrained.transformers_model("siglip").save_pretrained(tmp_path)
    model, _ = take_inputs(ModelConfig(init_from=str(tmp_path), tokenizer="open_clip", decoder={}), {})
    found = check_initial_weights(model)
    decoder = {name for name in build_model(model).state_dict() if name.startswith("decoder.")}
    assert set(found.missing) == decoder
    assert found.unused == []
    assert "fresh, not in the file: decoder." in found.text()


@pytest.mark.parametrize(
    ("has_decoder", "form", "message"),
    [
        (True, "onnx", "--format onnx has no place for a captioning decoder: --with-decoder needs safetensors"),
        (True, "open_clip", "--format open_clip has no place for"),
        (True, "transformers", "--format transformers has no place for"),
        (False, "safetensors", "was trained without one (model.decoder=null)"),
    ],
)
def test_a_decoder_without_a_place_is_refused(has_decoder, form, message, tmp_path, capsys):
    config, _ = begin(tmp_path, decoder=GIVEN if has_decoder else None)
    assert export(config, tmp_path / "out", "--format", form, "--with-decoder") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
