"""Captions to tokens of fixed length, and a tokenizer trained from the captions of a run.

    n  captions          T  context length in tokens

A model config names open_clip's own tokenizer or a Hugging Face tokenizer.json. `train_tokenizer` makes such a file:
the same captions give the same bytes, which the trainers of the tokenizers library promise for BPE alone.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from workers.config import ModelConfig
from workers.towers import open_clip_folder, tower_config

if TYPE_CHECKING:
    import tokenizers

Tokenizer = Callable[[list[str]], np.ndarray]
"""n captions -> (n, T) int32."""

_NUM_WORDS = 2**16  # whose tokens are remembered
_MAX_SIMPLE = 1024  # characters of a caption whose words are; a bound on their memory
_SPECIAL = ["[PAD]", "[UNK]", "[EOS]"]  # 0, 1, 2
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # the names under which the library falls back to bytes
_SEED_FACTOR = 4  # pieces that Unigram training starts from, for each that it keeps
_KEPT_PER_ROUND = 0.75  # of the pieces, as SentencePiece


def build_tokenizer(model: ModelConfig, context_length: int, vocab_size: int) -> Tokenizer:
    """The tokenizer that a model config names.

    Raises:
        ValueError: where the file is missing or holds more tokens than the text tower has rows.
    """
    if model.tokenizer == "open_clip":
        return _open_clip_tokenizer(model, context_length)
    from tokenizers import Tokenizer as HFTokenizer

    path = Path(model.tokenizer)
    if not path.is_file():
        raise ValueError(f"model.tokenizer: {path.absolute()} does not exist; give a tokenizer.json or 'open_clip'")
    tokenizer = HFTokenizer.from_file(str(path))
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(
            f"model.tokenizer: {path} has {tokenizer.get_vocab_size()} tokens, "
            f"the text tower's text_cfg.vocab_size is {vocab_size}"
        )
    pad = tokenizer.token_to_id("[PAD]") or 0
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(length=context_length, pad_id=pad)

    def tokenize(captions: list[str]) -> np.ndarray:
        return np.array([encoding.ids for encoding in tokenizer.encode_batch(captions)], dtype=np.int32)

    return tokenize


def _open_clip_tokenizer(model: ModelConfig, context_length: int) -> Tokenizer:
    text = tower_config(model)["text_cfg"]
    if is_plain(model.name, text):
        peer = _open_clip_tokenizers()
        options = text.get("tokenizer_kwargs", {}) if model.name else {}
        encode = peer.SimpleTokenizer(context_length=context_length, **options)
    else:
        import open_clip

        peer = open_clip.tokenizer
        encode = open_clip.get_tokenizer(model.name, context_length=context_length)
    return _by_words(encode, peer, context_length) or (lambda captions: encode(captions).numpy().astype(np.int32))


def is_plain(name: str | None, text: dict[str, Any]) -> bool:
    """Whether open_clip takes its own BPE for a model, by its rule (`get_tokenizer`, open_clip 3.3).

    Args:
        name: of the model; None: towers of the user's own.
        text: the config of its text tower.
    """
    return name is None or not (text.get("hf_tokenizer_name") or ":" in name or "siglip" in name.lower())


@functools.cache
def _open_clip_tokenizers() -> Any:
    """open_clip's module of tokenizers; alone, where nobody has imported the package, see `open_clip_folder`."""
    if "open_clip.tokenizer" in sys.modules:
        return sys.modules["open_clip.tokenizer"]
    path = open_clip_folder() / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("sigray_open_clip_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _by_words(encode: Any, peer: Any, context_length: int) -> Tokenizer | None:
    """What open_clip's BPE gives, word by word from a cache where a caption allows it; None for another tokenizer.

    No token of that BPE spans a space, and what it does to a text first (ftfy, HTML entities) leaves printable ASCII
    without "&" as it is. Other captions go its own way. 3 us for a caption of some 17 words in place of 43 (one core of
    an EPYC).

    Args:
        peer: open_clip's module that the tokenizer is from.
    """
    # Exactly this class with these settings: a subclass may do anything.
    is_simple = type(encode) is peer.SimpleTokenizer and encode.reduction_fn is None
    if not is_simple or encode.clean_fn is not peer.get_clean_fn("lower"):
        return None
    encode_word = functools.lru_cache(_NUM_WORDS)(encode.encode)

    def tokenize(captions: list[str]) -> np.ndarray:
        rows = np.zeros((len(captions), context_length), np.int32)
        for row, caption in zip(rows, captions, strict=True):
            is_simple = caption.isascii() and caption.isprintable() and "&" not in caption
            if is_simple and len(caption) <= _MAX_SIMPLE:
                words = map(encode_word, caption.lower().split())
                tokens = list(itertools.islice(itertools.chain.from_iterable(words), context_length))
            else:
                tokens = encode.encode(caption)
            tokens = [encode.sot_token_id, *tokens[: context_length - 2], encode.eot_token_id]
            row[: len(tokens)] = tokens
        return rows

    return tokenize


def train_tokenizer(
    captions: Iterable[str], *, vocab_size: int, kind: Literal["bpe", "unigram"], lower_case: bool = True
) -> tokenizers.Tokenizer:
    """A tokenizer with [PAD] 0, [UNK] 1, and [EOS] 2 after every caption, one that is truncated too: a tower may pool
    at the last token.

    Args:
        vocab_size: tokens at most; fewer where the captions do not give more.
        kind: bpe, words split at spaces and signs: for languages that write words apart and few characters, all of
            which become tokens; another character is [UNK]. unigram: for captions in any languages; spaces are part
            of the tokens, and a character without a token of its own falls back to its UTF-8 bytes, so nothing is
            [UNK].

    Raises:
        ValueError: for captions without a character, or a vocabulary too small for them.
    """
    from tokenizers import normalizers, processors

    captions = list(captions)
    if not any(map(str.strip, captions)):
        raise ValueError(f"{len(captions)} captions, none with a character: nothing to train a tokenizer from")
    normalizer = normalizers.Sequence([normalizers.NFKC(), *([normalizers.Lowercase()] if lower_case else [])])
    tokenizer = {"bpe": _train_bpe, "unigram": _train_unigram}[kind](captions, vocab_size, normalizer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    return tokenizer


def _train_bpe(
    captions: list[str], vocab_size: int, normalizer: tokenizers.normalizers.Sequence
) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = HFTokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=_SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    if tokenizer.get_vocab_size() > vocab_size:  # the trainer takes every character, whatever vocab_size is
        raise ValueError(
            f"vocab_size={vocab_size} is less than the captions' different characters and three special tokens, "
            f"{tokenizer.get_vocab_size()}: raise it, or train kind=unigram, which keeps the frequent ones"
        )
    return tokenizer


def _train_unigram(
    captions: list[str], vocab_size: int, normalizer: tokenizers.normalizers.Sequence
) -> tokenizers.Tokenizer:
    """Unigram pieces by rounds of segmentation and pruning.

    The library's own UnigramTrainer sums floats in the order of a hash map: three runs gave three files (0.23.3). Here
    its fast parts are kept (seeds from its BPE trainer, the best segmentation from its Unigram model) and the counts
    between them are integers. On the 61,568 captions of the emoji dataset in 36 languages its pieces cover a caption
    with 6 % (8,000 tokens) and 11 % (32,000) fewer tokens than the library's, in 0.6 to 0.85 of the time.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer

    num_pieces = vocab_size - len(_SPECIAL) - len(_BYTES)
    if num_pieces < 2:
        raise ValueError(f"vocab_size={vocab_size}: unigram needs more than 260, 256 of which stand for bytes")
    normalizer = normalizers.Sequence([normalizer, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
    metaspace = pre_tokenizers.Metaspace()
    texts = [normalizer.normalize_str(caption) for caption in captions]
    # Half of the pieces at most are characters, the most frequent; others fall back to bytes and are not trained on.
    frequent = Counter("".join(texts).replace(" ", ""))
    characters = sorted(frequent, key=lambda character: (-frequent[character], character))
    rare = str.maketrans(dict.fromkeys(characters[max(1, num_pieces // 2) :], " "))
    texts = [text.translate(rare) for text in texts]
    words = Counter(word for text in texts for word, _ in metaspace.pre_tokenize_str(text))
    alphabet = {character for word in words for character in word}

    seeds = HFTokenizer(models.BPE())
    seeds.pre_tokenizer = metaspace
    seeds.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=_SEED_FACTOR * num_pieces, show_progress=False))
    # With equal scores the best segmentation is the one with the fewest pieces.
    scores = dict.fromkeys(sorted(seeds.get_vocab()), -1.0)
    while True:
        for _ in range(2):
            counts = _count_pieces(scores, words)
            total = sum(counts.values())
            # Characters stay without being used; half a count keeps their scores finite.
            scores = {piece: round(math.log((counts[piece] or 0.5) / total), 6) for piece in scores}
        if len(scores) <= num_pieces:
            break
        longer = sorted(scores.keys() - alphabet, key=lambda piece: (-counts[piece], piece))
        num_kept = max(num_pieces, int(_KEPT_PER_ROUND * len(scores))) - len(alphabet)
        scores = {piece: scores[piece] for piece in sorted(alphabet.union(longer[:num_kept]))}
    best_first = sorted(scores.items(), key=lambda entry: (-entry[1], entry[0]))
    others = [(name, 0.0) for name in _SPECIAL] + [(name, best_first[-1][1]) for name in _BYTES]
    tokenizer = HFTokenizer(models.Unigram(others + best_first, unk_id=1, byte_fallback=True))
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, metaspace
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return tokenizer


def _count_pieces(scores: dict[str, float], words: Counter[str]) -> Counter[str]:
    """How often each piece occurs in the best segmentations of all words."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models

    segmenter = HFTokenizer(models.Unigram(list(scores.items()), unk_id=None))
    counts: Counter[str] = Counter()
    for encoding, times in zip(segmenter.encode_batch(list(words)), words.values(), strict=True):
        for piece in encoding.tokens:
            counts[piece] += times
    return counts
