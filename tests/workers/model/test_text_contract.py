"""The text tower and its tokenizer: what would make features wrong in silence is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sigray.orchestrator.run.preflight import check_tokenizer
from sigray.workers.config import ModelConfig
from sigray.workers.model.inputs import shapes
from sigray.workers.model.tokenizer import build_tokenizer, check_tokenizer_keys
from sigray.workers.model.towers import check_model, layer_scales
from tests.helpers.data import TOWERS
from tests.helpers.words import LAST, towers, words_file


def check(model: ModelConfig) -> None:
    """Check as each run does."""
    module = check_model(model)
    check_tokenizer_keys(model)
    check_tokenizer(model, module.get_submodule("text"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hf_tokenizer_name", "bert-base-uncased"),
        ("tokenizer_kwargs", {"clean": "canonicalize"}),
        ("tokenizer_kwargs", {"strip_sep_token": True}),
        ("tokenizer_mode", "clips"),
    ],
)
def test_towers_that_name_a_tokenizer_are_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"text_cfg.{key}=.* remove the key and set model.tokenizer to"):
        check(ModelConfig(towers=towers(**{key: value})))
    # With a file, its name may stay, and what the config of the run itself says of cleaning.
    file = words_file(tmp_path / "tokenizer.json")
    model = ModelConfig(towers=towers(**LAST, **{key: value}), tokenizer=file, text_clean="canonicalize")
    if key == "hf_tokenizer_name" or value == {"clean": "canonicalize"}:
        check(model)
    else:
        with pytest.raises(ValueError, match=f"text_cfg.{key}="):
            check(model)


@pytest.mark.parametrize("value", [None, {}, "", {"clean": "lower"}])
def test_towers_that_say_what_is_done_anyway_pass(value):
    check(ModelConfig(towers=towers(tokenizer_kwargs=value, hf_tokenizer_name=None)))


@pytest.mark.parametrize(
    ("text", "is_file", "message"),
    [
        ({"pool_type": "first"}, False, "pool_type=first reads a text at its first token, which sees no other"),
        ({"pool_type": "first"}, True, "pool_type=first reads a text at its first token, which sees no other"),
        ({"pool_type": "first", "no_causal_mask": True}, False, None),
        ({"pool_type": "eos"}, False, r"at token 2 \(text_cfg.eos_id\), .* its texts end with 49407"),
        ({"pool_type": "eos", "eos_id": 49407}, False, None),
        ({"pool_type": "eos"}, True, None),
        ({"pool_type": "eos", "eos_id": 3}, True, r"at token 3 .* its texts end with 2"),
        ({"pool_type": "eos", "eos_id": 5}, True, r"at token 5"),
        ({}, False, None),
        ({}, True, "pool_type=argmax .* and 6, the highest of"),
        (LAST, True, None),
    ],
)
def test_a_text_is_read_at_its_end_or_refused(tmp_path, text, is_file, message):
    file = words_file(tmp_path / "tokenizer.json") if is_file else None
    model = ModelConfig(towers=towers(**text), tokenizer=file)
    if message is None:
        check(model)
    else:
        with pytest.raises(ValueError, match=message):
            check(model)
        check_tokenizer(model, is_begun=True)  # a run that began goes on


def test_a_file_whose_end_is_its_highest_token_may_be_read_there(tmp_path):
    check(ModelConfig(towers=towers(), tokenizer=words_file(tmp_path / "tokenizer.json", eos=9)))


def bert(folder: Path, **config: Any) -> str:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    content = {"model_type": "bert", "max_position_embeddings": 16, "vocab_size": 60, "pad_token_id": 0}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content | shape | config))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "tokens", "message"),
    [
        ({}, "open_clip", "open_clip's BPE has 49408 tokens, text_cfg.vocab_size is 60"),
        ({"vocab_size": 49408}, "open_clip", None),
        ({"vocab_size": 5}, "file", "the highest token of .*tokenizer.json is 6, but text_cfg.vocab_size is 5"),
        ({}, "file", None),
        ({"pad_token_id": 7}, "file", r"leaves out token 7 as a pad, and the tokens of 'a' are \[3, 2, 0, 0\]"),
    ],
)
def test_a_text_tower_of_transformers_has_the_tokenizers_rows_and_pads(tmp_path, config, tokens, message):
    """Its config has both; text_cfg has neither."""
    text = {"context_length": 8, "hf_model_name": bert(tmp_path, **config), "hf_model_pretrained": False}
    file = words_file(tmp_path / "tokenizer.json")
    model = ModelConfig(towers={**TOWERS, "text_cfg": text}, tokenizer=file if tokens == "file" else None)
    assert shapes(model)[2] is None
    if message is None:
        check(model)
    else:
        with pytest.raises(ValueError, match=message):
            check(model)


def test_blocks_of_a_text_tower_of_transformers_are_known(tmp_path):
    text = {"context_length": 8, "hf_model_name": bert(tmp_path), "hf_model_pretrained": False}
    module = check_model(model := ModelConfig(towers={**TOWERS, "text_cfg": text}))
    scales = layer_scales(module, model, {"text": 0.5})
    assert scales["text.transformer.encoder.layer.0.output.dense.weight"] == 0.5
    assert scales["text.transformer.embeddings.word_embeddings.weight"] == 0.25
    assert scales["text.proj.0.weight"] == 1


def test_pads_of_an_appended_token_are_masked(tmp_path):
    file = words_file(tmp_path / "tokenizer.json")
    check(ModelConfig(towers=towers(embed_cls=True, no_causal_mask=True), tokenizer=file))
    with pytest.raises(ValueError, match="leaves out token 7 as a pad"):
        check(ModelConfig(towers=towers(embed_cls=True, no_causal_mask=True, pad_id=7), tokenizer=file))


def local_dir(folder: Path, text: dict[str, Any], file: str | None = None) -> ModelConfig:
    """Write a folder that `model.name` may name."""
    config = towers(**LAST, **text)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    if file is not None:
        content = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return ModelConfig(name=f"local-dir:{folder}")


def test_tokens_of_open_clips_tokenizers_have_rows(tmp_path):
    """Of its BPE with options, and of those of transformers."""
    more = {"tokenizer_kwargs": {"additional_special_tokens": ["<x>"]}}
    with pytest.raises(
        ValueError, match=r"the highest token of local-dir:.* is 49408, but text_cfg.vocab_size is 49408"
    ):
        check(local_dir(tmp_path, more))
    check(local_dir(tmp_path, more | {"vocab_size": 49409}))
    named = {"hf_tokenizer_name": "any", "vocab_size": 80}
    file = words_file(tmp_path / "tokenizer.json", first=3400)
    with pytest.raises(ValueError, match=r"the highest token of local-dir:.* is 3403, but text_cfg.vocab_size is 80"):
        check(local_dir(tmp_path, named, file))
    check(local_dir(tmp_path, named | {"vocab_size": 3404}, file))


def test_a_special_token_without_a_row_is_unknown(tmp_path):
    """SentencePiece's <extra_id_0> and the like, which no text has, unless it spells one."""
    file = words_file(tmp_path / "tokenizer.json", added={"<extra_id_0>": 7})
    model = local_dir(tmp_path, {"hf_tokenizer_name": "any", "vocab_size": 7}, file)
    check(model)
    assert build_tokenizer(model, 4, 7)(["a <extra_id_0>"]).tolist() == [[3, 1, 2, 0]]
