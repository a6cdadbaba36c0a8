"""Tokens become the caption again: of each kind of tokenizer, without special tokens."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sigray.workers.config import ModelConfig
from sigray.workers.model.inputs import shapes
from sigray.workers.model.tokenizer import build_detokenizer, build_tokenizer, find_caption_ends, train_tokenizer
from tests.helpers.captions import captions
from tests.helpers.data import TOWERS
from tests.helpers.words import towers, words_file

CONTEXT_LENGTH = 64


def back(model: ModelConfig, texts: list[str], context_length: int = CONTEXT_LENGTH) -> list[str]:
    """Texts, to tokens and back."""
    tokenize = build_tokenizer(model, context_length, shapes(model)[2])
    return build_detokenizer(model, context_length, find_caption_ends(model, tokenize))(tokenize(texts))


def trained(folder: Path, kind: Any, vocab_size: int = 600) -> ModelConfig:
    file = folder / f"{kind}.json"
    train_tokenizer(captions(), vocab_size=vocab_size, kind=kind).save(str(file))
    return ModelConfig(towers=TOWERS, tokenizer=str(file))


def test_unigram_gives_captions_back(tmp_path):
    texts = [*captions(40), "", "Ünknown — 犬が走る 🐈 ?!"]
    expected = [unicodedata.normalize("NFKC", text).lower() for text in texts]
    assert back(trained(tmp_path, "unigram"), texts) == expected


def test_bpe_gives_its_whole_words_back_and_parts_of_words_apart(tmp_path):
    """Its pieces do not say where a word ends."""
    model = trained(tmp_path, "bpe")
    texts = ["a red house", "The Dog runs", "", "犬が走る", "catx dog"]
    assert back(model, texts) == ["a red house", "the dog runs", "", "犬が走る", "cat x dog"]


def test_clips_bpe_gives_captions_back():
    model = ModelConfig(towers=TOWERS)
    texts = [
        "a photo of two cats",
        "Straße & <b>größer</b>",
        "犬が走る 🐈",
        "unpronounceablywrittenwords",
        "",
        "wow !",
        "two\n lines",
    ]
    expected = [" ".join(text.lower().split()) for text in texts]
    found = back(model, texts)
    expected[1:3] = ["straße & < b > größer </ b >", "犬が走る 🐈"]  # signs stand apart
    assert found == expected
    # A cut caption ends too, and "!" is the token that fills.
    assert back(model, ["a b c d e f g h"], context_length=6) == ["a b c d"]


def test_a_word_piece_file_gives_captions_back(tmp_path):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "house", "##s", "##y"]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(words[:4])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(tmp_path / "pieces.json"))
    model = ModelConfig(towers=TOWERS, tokenizer=str(tmp_path / "pieces.json"))
    assert back(model, ["A house dogs", "doggy housey", "zebra dogs", ""]) == ["a house dogs", "housey", "dogs", ""]


def test_special_tokens_that_a_file_does_not_mark_are_left_out_at_the_end(tmp_path):
    model = ModelConfig(towers=TOWERS, tokenizer=words_file(tmp_path / "words.json"))
    assert back(model, ["a two words", "b", ""]) == ["a two words", "b", ""]


@pytest.mark.parametrize("kind", ["options", "transformers"])
def test_tokenizers_of_named_models_give_captions_back(kind, tmp_path):
    more: dict[str, Any] = {"tokenizer_kwargs": {"additional_special_tokens": ["<x>"]}, "vocab_size": 49409}
    if kind == "transformers":
        words_file(tmp_path / "tokenizer.json")
        content = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "eos_token": "[EOS]"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
        more = {"hf_tokenizer_name": "any", "vocab_size": 80}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": towers(**more)}))
    model = ModelConfig(name=f"local-dir:{tmp_path}")
    assert back(model, ["a two words", "b a b", ""]) == ["a two words", "b a b", ""]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "open_clip"])
def test_numbers_that_are_no_tokens_and_bytes_that_are_no_text(kind, tmp_path):
    """The text tower's table may be larger than the vocabulary, and a decoder may say anything."""
    model = ModelConfig(towers=TOWERS) if kind == "open_clip" else trained(tmp_path, kind)
    tokenize = build_tokenizer(model, 8, 60_000)
    detokenize = build_detokenizer(model, 8, find_caption_ends(model, tokenize))
    (row,) = tokenize(["a dog"])
    end = row.tolist().index(row[row != 0][-1])
    row[end] = 55_000
    assert detokenize(row[None]) == ["a dog"]
    drawn = np.random.default_rng(0).integers(0, 49408 if kind == "open_clip" else 600, size=(50, 8))
    for text in detokenize(drawn):
        text.encode()
        assert not any(name in text for name in ("[PAD]", "[UNK]", "[EOS]", "<start_of_text>", "<end_of_text>", "</w>"))
