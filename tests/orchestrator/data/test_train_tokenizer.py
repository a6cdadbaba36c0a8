"""`sigray data tokenizer` on captions of several languages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

from sigray.orchestrator.cli.main import main
from sigray.orchestrator.run.preflight import check_tokenizer
from sigray.workers.config import ModelConfig
from sigray.workers.model.tokenizer import build_tokenizer
from sigray.workers.model.towers import check_model
from tests.helpers.data import TOWERS, drawn_sample, write_tar


@pytest.fixture(autouse=True)
def wide_terminal_and_own_memory(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(capsys, *words: object) -> tuple[int, str, str]:
    code = main(["data", "tokenizer", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def multilingual_tars(folder: Path) -> Path:
    samples = []
    for number in range(60):
        sample = drawn_sample(number)
        captions = {"de": f"Rotes Feld Nummer {number}", "ja": [f"赤い野原 {number}", "野原"]}
        sample["json"] = json.dumps({"captions": captions} if number else {})
        samples.append(sample)
    write_tar(folder / "a.tar", samples)
    return folder


def test_tokenizer_of_all_sources_trains_and_loads(tmp_path, capsys):
    tars, out_file = multilingual_tars(tmp_path / "tars"), tmp_path / "made" / "tokenizer.json"
    captions = "data.captions={json:captions.de: 1, json:captions.ja: 0.1}"
    code, out, err = run(capsys, tars, out_file, captions, "--kind", "unigram", "--vocab-size", 400)
    assert code == 0, err
    tokenizer = Tokenizer.from_file(str(out_file))
    size = tokenizer.get_vocab_size()
    assert size <= 400
    assert f"{size:,} tokens, from 177 captions; 1 samples without a usable one" in out
    texts = [text for n in range(1, 60) for text in (f"Rotes Feld Nummer {n}", f"赤い野原 {n}", "野原")]
    lengths = [len(tokenizer.encode(text).ids) for text in texts]
    assert f"median {np.median(lengths):.0f}" in out
    assert f"  tokenizer: {out_file}\n" in out
    assert f"      vocab_size: {size}" in out
    model = ModelConfig(towers=TOWERS, tokenizer=str(out_file))
    assert build_tokenizer(model, 8, size)(["Rotes Feld", "野原"]).shape == (2, 8)
    assert [path.name for path in out_file.parent.iterdir()] == ["tokenizer.json"]  # nothing half written
    # Towers that have the printed lines fit.
    printed = yaml.safe_load(out[out.index("model:\n") :])["model"]
    text = printed["towers"]["text_cfg"]
    length = int(np.quantile(lengths, 0.95, method="higher"))
    assert text == {"vocab_size": size, "context_length": length, "pool_type": "last", "no_causal_mask": True}
    towers = {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], **text}}
    model = ModelConfig(towers=towers, tokenizer=printed["tokenizer"])
    check_tokenizer(model, check_model(model).get_submodule("text"))


def test_case_is_kept_where_asked(tmp_path, capsys):
    tars = multilingual_tars(tmp_path / "tars")
    for name, flags in {"low.json": [], "kept.json": ["--keep-case"]}.items():
        captions = "data.captions={json:captions.de: 1}"
        assert run(capsys, tars, tmp_path / name, *flags, captions)[0] == 0
    low, kept = (Tokenizer.from_file(str(tmp_path / name)) for name in ("low.json", "kept.json"))
    assert low.encode("FELD rotes").ids == low.encode("feld Rotes").ids
    assert kept.encode("Rotes").ids != kept.encode("rotes").ids


def test_tokenizer_refuses_what_it_cannot_use(tmp_path, capsys):
    tars, out_file = multilingual_tars(tmp_path / "tars"), tmp_path / "tokenizer.json"
    out_file.write_text("the old one")
    code, _, err = run(capsys, tars, out_file, "--kind", "unigram", "--vocab-size", 20)
    assert code == 2
    assert "vocab_size=20" in err
    (tars / "b.tar").write_bytes((tars / "a.tar").read_bytes()[:2048])
    code, _, err = run(capsys, tars, out_file)
    assert code == 2
    assert "b.tar: cut short" in err
    assert out_file.read_text() == "the old one"
    with pytest.raises(SystemExit) as exit_code:
        main(["data", "tokenizer", str(tars), str(out_file), "--vocab-size", "0"])
    assert exit_code.value.code == 2
