"""A tokenizers file of a few words, and towers for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.helpers.data import TOWERS

LAST = {"pool_type": "last", "no_causal_mask": True}


def towers(**text: Any) -> dict[str, Any]:
    return {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], **text}}


def words_file(path: Path, *, first: int = 3, eos: int = 2, added: dict[str, int] | None = None) -> str:
    """Write a tokenizers file of [PAD] 0, [UNK] 1, [EOS] and words from `first` on; each text ends with [EOS]."""
    words = {"[PAD]": 0, "[UNK]": 1, "[EOS]": eos, "a": first, "b": first + 1, "two": first + 2, "words": first + 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", eos)])
    tokenizer.add_special_tokens(list(added or {}))
    assert all(tokenizer.token_to_id(name) == number for name, number in (added or {}).items())
    tokenizer.save(str(path))
    return str(path)
