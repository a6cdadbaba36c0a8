"""Tokenize captions to a fixed length and back; train a tokenizer from them.

    n  captions          T  context length in tokens

A model config names open_clip's own tokenizer or a Hugging Face tokenizer.json. `train_tokenizer` makes such a file:
the same captions give the same bytes, which the trainers of the tokenizers library guarantee for BPE only.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import itertools
import math
import string
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sigray.workers.config import ModelConfig
from sigray.workers.model.inputs import CLIP_VOCAB_SIZE, text_inputs, tokenizer_file, tower_config
from sigray.workers.model.untrusted import LOCAL_DIR, open_clip_folder, reason, refuse_code
from sigray.workers.storage import local_copy

if TYPE_CHECKING:
    import tokenizers
    from tokenizers.normalizers import Sequence as Normalizer

BYTES_PER_TOKEN = 64
"""UTF-8 bytes of a caption that are tokenized, for each token of the context.

SentencePiece's pieces have at most 16 characters, 64 bytes; CLIP's longest token has 32 bytes. Captions have from 1
byte a token (Chinese, CLIP's tokens) to 12, so a cut caption still fills its context, unless it is mostly spaces.
"""

Tokenizer = Callable[[list[str]], np.ndarray]
"""n captions -> (n, T) int32."""

Detokenizer = Callable[[np.ndarray], list[str]]
"""(n, T) ints -> n texts."""

TOKENIZER = "tokenizer.json"  # beside weights, in folders of transformers and open_clip
_NUM_MERGES = 49152 - 256 - 2  # of CLIP's vocabulary; its file holds more
_WORD_END = "</w>"
_CLIP_SPECIAL = ("<start_of_text>", "<end_of_text>")
_NUM_WORDS = 2**16  # whose tokens are cached
_MAX_SIMPLE = 1024  # characters of a caption whose words are cached, to bound the cache's memory
_MAX_WORD = 64  # characters of a word whose tokens are cached, for the same reason
_MAX_OF_A = 4  # tokens of the caption "a", special ones included
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPECIAL = ["[PAD]", "[UNK]", "[EOS]"]  # 0, 1, 2
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # the library's names of the tokens for byte fallback
_SEED_FACTOR = 4  # Unigram training starts from so many pieces for each that it keeps
_KEPT_PER_ROUND = 0.75  # of the pieces, as in SentencePiece


@dataclass(frozen=True)
class CaptionEnds:
    """How a tokenizer fills a short caption, as a captioning decoder must know.

    Attributes:
        pad: the token that fills.
        end: the token that ends a caption; `pad` if no other does.
    """

    pad: int
    end: int

    def weights(self, tokens: np.ndarray) -> np.ndarray:
        """Return (n, T) float32 weights of the tokens of each caption.

        The tokens of a caption share 1 evenly, and the pads after them have 0. An end counts as a token.

        Args:
            tokens: (n, T).
        """
        context_length = tokens.shape[1]
        found = tokens != self.pad
        length = np.where(found.any(axis=1), context_length - found[:, ::-1].argmax(axis=1), 0)
        if self.end == self.pad:
            length = np.minimum(length + 1, context_length)
        counts = np.arange(context_length) < length[:, None]
        return (counts / np.maximum(length, 1)[:, None]).astype(np.float32)


def find_caption_ends(model: ModelConfig, tokenize: Tokenizer) -> CaptionEnds:
    """Return how a model's tokenizer fills captions.

    Args:
        tokenize: as `build_tokenizer` returns it.

    Raises:
        ValueError: if it fills them on the left.
    """
    empty, short = tokenize(["", "a"])
    if text_inputs(model).text_pad_side == "left" or (short[-1] != empty[-1] and short[0] == empty[-1]):
        raise ValueError("model.decoder predicts captions that are filled on the right: set model.text_pad_side=right")
    pad = int(empty[-1])
    last, last_of_empty = (next((int(token) for token in row[::-1] if token != pad), pad) for row in (short, empty))
    return CaptionEnds(pad, last if last == last_of_empty else pad)


def build_tokenizer(model: ModelConfig, context_length: int, vocab_size: int | None) -> Tokenizer:
    """Return the tokenizer that a model config names; it cuts long captions first.

    Args:
        vocab_size: rows of the text tower's table; None: unknown.

    Raises:
        ValueError: the file is missing or no tokenizers file, or a token has no row in the text tower's table.
    """
    tokenize = _named_tokenizer(model, context_length, vocab_size)
    return lambda captions: tokenize([cut_caption(caption, context_length) for caption in captions])


def build_detokenizer(model: ModelConfig, context_length: int, ends: CaptionEnds) -> Detokenizer:
    """Return what turns tokens of the model's tokenizer into texts.

    Texts have single spaces and no special tokens. Numbers that are no tokens are left out. The BPE of
    `train_tokenizer` does not mark where a word ends: the parts of a word stand apart.

    Raises:
        ValueError: as `build_tokenizer`.
    """
    decode = _decoder_of(model, context_length)

    def text(row: list[int]) -> str:
        length = next((place for place in range(len(row), 0, -1) if row[place - 1] != ends.pad), 0)
        if length and row[length - 1] == ends.end:
            length -= 1
        return " ".join(decode(row[:length]).split())

    return lambda tokens: [text(row) for row in tokens.tolist()]


def _decoder_of(model: ModelConfig, context_length: int) -> Callable[[list[int]], str]:
    file = tokenizer_file(model)
    if file is not None:
        return load_tokenizer_file(file).decode
    if is_plain(model):
        from open_clip.tokenizer import SimpleTokenizer

        encode: Any = SimpleTokenizer()
    else:
        encode = build_open_clip_tokenizer(model, context_length)
    if hasattr(encode, "tokenizer"):  # that of transformers
        return functools.partial(encode.tokenizer.decode, skip_special_tokens=True)
    known = encode.decoder.keys() - encode.all_special_ids
    return lambda tokens: encode.decode([token for token in tokens if token in known])


def cut_caption(caption: str, context_length: int) -> str:
    """Return the first characters of a caption, `BYTES_PER_TOKEN` bytes a token.

    Some tokenizers take quadratic time: a word of 60,000 letters took minutes.
    """
    max_bytes = BYTES_PER_TOKEN * context_length
    if 4 * len(caption) <= max_bytes:
        return caption
    content = caption.encode()
    return caption if len(content) <= max_bytes else content[:max_bytes].decode(errors="ignore")


def _named_tokenizer(model: ModelConfig, context_length: int, vocab_size: int | None) -> Tokenizer:
    file = tokenizer_file(model)
    if file is None and is_plain(model):
        _check_vocabulary(model, CLIP_VOCAB_SIZE - 1, vocab_size)
        return _ClipTokenizer(context_length)
    if file is None:
        return _open_clips(model, context_length, vocab_size)
    tokenizer = load_tokenizer_file(file)
    _check_content(model, file)
    _check_vocabulary(model, max(tokenizer.get_vocab().values(), default=0), vocab_size)
    fit_tokenizer(tokenizer, model, context_length)
    clean = _CLEANERS[text_inputs(model).text_clean]

    def tokenize(captions: list[str]) -> np.ndarray:
        return np.array([each.ids for each in tokenizer.encode_batch(list(map(clean, captions)))], dtype=np.int32)

    return tokenize


def _open_clips(model: ModelConfig, context_length: int, vocab_size: int | None) -> Tokenizer:
    encode = build_open_clip_tokenizer(model, context_length)
    inner = getattr(encode, "tokenizer", None)  # that of transformers
    unknown = 0
    if inner is None:
        vocabulary: dict[str, int] = encode.encoder
    else:
        # Special tokens such as <extra_id_0> may be beyond the table: no text gives one, unless it spells its name.
        vocabulary = {name: number for name, number in inner.get_vocab().items() if name not in inner.get_added_vocab()}
        unknown = next((each for each in (inner.unk_token_id, inner.pad_token_id) if each is not None), 0)

    def tokenize(captions: list[str]) -> np.ndarray:
        return encode(captions).numpy().astype(np.int32)

    highest = max(*vocabulary.values(), int(tokenize(["", "a b"]).max()))
    _check_vocabulary(model, highest, vocab_size)

    def in_table(captions: list[str]) -> np.ndarray:
        tokens = tokenize(captions)
        return np.where(tokens <= highest, tokens, np.int32(unknown))

    return in_table


def _check_vocabulary(model: ModelConfig, highest: int, vocab_size: int | None) -> None:
    """Refuse tokens without a row in the text tower's table."""
    if vocab_size is None or highest < vocab_size:
        return
    if tokenizer_file(model) is None and is_plain(model):
        raise ValueError(
            f"model.tokenizer: open_clip's BPE has {CLIP_VOCAB_SIZE} tokens, text_cfg.vocab_size is {vocab_size}: "
            f"set it to {CLIP_VOCAB_SIZE}, or give a tokenizer.json"
        )
    raise ValueError(
        f"model.tokenizer: the highest token of {tokenizer_file(model) or model.name} is {highest}, but "
        f"text_cfg.vocab_size is {vocab_size}: set it to {highest + 1} or more"
    )


def fit_tokenizer(tokenizer: tokenizers.Tokenizer, model: ModelConfig, context_length: int) -> None:
    """Let a file's tokenizer cut and fill captions to the context, as a model expects.

    Raises:
        ValueError: the tokenizer has no token `model.text_pad_id`.
    """
    inputs = text_inputs(model)
    pad = inputs.text_pad_id
    if pad is None:
        pad = tokenizer.token_to_id("[PAD]") or 0
    name = tokenizer.id_to_token(pad)
    if name is None and inputs.text_pad_id is not None:
        raise ValueError(f"model.text_pad_id={pad}: {model.tokenizer} has no token {pad}")
    tokenizer.enable_truncation(context_length)
    tokenizer.enable_padding(
        length=context_length, pad_id=pad, pad_token=name or "[PAD]", direction=inputs.text_pad_side
    )


def load_tokenizer_file(path: str) -> tokenizers.Tokenizer:
    """Return the content of a tokenizer.json.

    Raises:
        ValueError: the file is missing, or not of the tokenizers library.
    """
    from tokenizers import Tokenizer as HFTokenizer

    file = local_copy(path, "model.tokenizer")
    if not file.is_file():
        raise ValueError(f"model.tokenizer: {file.absolute()} does not exist; give a tokenizer.json or 'open_clip'")
    try:
        return HFTokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other type
        raise ValueError(
            f"model.tokenizer: {path} is no tokenizers file ({reason(error)}): give a tokenizer.json as "
            "`sigray data tokenizer` or the tokenizers library writes"
        ) from error


def tokenizer_sha256(path: str) -> str | None:
    """Return the hash of a tokenizer's file; None without a file."""
    file = local_copy(path, "model.tokenizer")
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _check_content(model: ModelConfig, file: str) -> None:
    """Refuse another file under the name of the one that the model was trained with."""
    found = tokenizer_sha256(file)
    if model.tokenizer_sha256 not in (None, found):
        raise ValueError(
            f"model.tokenizer: {file} is not the file that the model was trained with: its sha256 is {found}, "
            f"model.tokenizer_sha256 is {model.tokenizer_sha256}. Put that file back, or start a new run"
        )


def check_pooling(model: ModelConfig, context_length: int, tokenize: Tokenizer) -> None:
    """Refuse a text tower that does not read its tokenizer's texts at their end.

    The pool types are those of open_clip's `text_global_pool`.

    Args:
        tokenize: the model's tokenizer, as `build_tokenizer` returns it.

    Raises:
        ValueError: with the remedy.
    """
    text = tower_config(model)["text_cfg"]
    pool = text.get("pool_type", "argmax")
    if text.get("hf_model_name") or text.get("embed_cls"):  # they pool elsewhere
        return
    remedy = "set text_cfg.pool_type=last, with no_causal_mask=true as in examples/emoji_cpu.yaml"
    if pool == "first" and not text.get("no_causal_mask"):
        raise ValueError(
            "model.towers: text_cfg.pool_type=first reads a text at its first token, which sees no other with a causal "
            f"mask, so that texts with one beginning are one: set text_cfg.no_causal_mask=true, or {remedy}"
        )
    file = tokenizer_file(model)
    if pool == "argmax" and file is not None:
        tokenizer = load_tokenizer_file(file)
        highest = max(tokenizer.get_vocab().values(), default=0)
        ends = {tuple(tokenizer.encode(caption).ids[-1:]) for caption in ("a", "two words")}
        if ends != {(highest,)}:
            raise ValueError(
                f"model.towers: text_cfg.pool_type=argmax (the default) reads a text at its highest token, and "
                f"{highest}, the highest of {file}, does not end each text: {remedy}"
            )
    if pool == "eos":
        eos = text.get("eos_id", 2)
        short, long = tokenize(["a", "two words " * context_length]).tolist()
        end = next((number for number in reversed(short) if number != short[-1]), short[-1])
        if eos not in short or long[-1] != eos or eos in long[:-1]:
            raise ValueError(
                f"model.towers: text_cfg.pool_type=eos reads a text at token {eos} (text_cfg.eos_id), which does not "
                f"end each text of the tokenizer; its texts end with {end}: set text_cfg.eos_id, or {remedy}"
            )


def check_tokenizer_keys(model: ModelConfig) -> None:
    """Refuse keys of `model.towers` that name a tokenizer and are not followed.

    Raises:
        ValueError: with the remedy.
    """
    if model.towers is None:
        return
    text = model.towers["text_cfg"]
    options = dict(text.get("tokenizer_kwargs") or {})
    is_file = tokenizer_file(model) is not None
    if options.get("clean") == (text_inputs(model).text_clean if is_file else "lower"):
        del options["clean"]
    # A file may be that of the name: a copy of an open_clip config names both.
    ignored = {"hf_tokenizer_name": None if is_file else text.get("hf_tokenizer_name")}
    ignored |= {"tokenizer_mode": text.get("tokenizer_mode"), "tokenizer_kwargs": options}
    for key, value in ignored.items():
        if value:
            raise ValueError(
                f"model.towers: text_cfg.{key}={value!r:.100} is followed with model.name only: remove the key and set "
                "model.tokenizer to the tokenizer.json, model.text_clean to how it cleans a text"
            )


def check_pads(context_length: int, tokenize: Tokenizer, masked: int) -> None:
    """Refuse pads that the text tower's attention does not leave out.

    Args:
        tokenize: the model's tokenizer, as `build_tokenizer` returns it.
        masked: the token that the tower takes for a pad.

    Raises:
        ValueError: with the remedy.
    """
    row = tokenize(["a"])[0].tolist()
    if context_length > _MAX_OF_A and masked not in row:
        raise ValueError(
            f"model.text_pad_id: the text tower leaves out token {masked} as a pad, and the tokens of 'a' are "
            f"{row[:_MAX_OF_A]}...: set model.text_pad_id={masked}, if the tokenizer has that token for a pad"
        )


def is_plain(model: ModelConfig) -> bool:
    """Return whether open_clip uses its own BPE, without options, for a model.

    The rule is that of `get_tokenizer` in open_clip 3.3. The user's own towers have its BPE or a file.
    """
    text = tower_config(model)["text_cfg"]
    return model.name is None or not (text.get("hf_tokenizer_name") or text.get("tokenizer_kwargs"))


def build_open_clip_tokenizer(model: ModelConfig, context_length: int) -> Any:
    """Return a named model's tokenizer with its options or files.

    It is that of `open_clip.get_tokenizer`.

    Raises:
        ValueError: its files are missing, or name code.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text = tower_config(model)["text_cfg"]
    options = text.get("tokenizer_kwargs") or {}
    folder = str(model.name).removeprefix(f"{LOCAL_DIR}:")
    # open_clip takes the files beside its config, whatever the config names.
    source = text.get("hf_tokenizer_name") and (folder if folder != model.name else text["hf_tokenizer_name"])
    try:
        if not source:
            return SimpleTokenizer(context_length=context_length, **options)
        refuse_code(source)
        mode = text.get("tokenizer_mode")
        return HFTokenizer(source, context_length, tokenizer_mode=mode, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises one of a dozen types
        raise ValueError(f"model.name={model.name}: its tokenizer cannot be loaded: {reason(error)}") from error


def _letters() -> dict[int, str]:
    """Return the character of each byte; bytes without one get those after Latin-1."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(others)}


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the ids of open_clip's BPE by piece, and its merges in order."""
    content = gzip.decompress((open_clip_folder() / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    lines = content.split("\n")[1 : _NUM_MERGES + 1]  # the first line is a title
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    letters = list(_letters().values())
    pieces = [*letters, *(letter + _WORD_END for letter in letters), *map("".join, merges), *_CLIP_SPECIAL]
    return {piece: number for number, piece in enumerate(pieces)}, merges


class _ClipTokenizer:
    """CLIP's byte pair encoding of lower-case text, with open_clip's vocabulary.

    The tokens equal those of open_clip's SimpleTokenizer, which imports torch (github.com/openai/CLIP). The words of
    simple captions come from a cache: no token spans a space, and cleaning (ftfy, HTML entities) does not change
    printable ASCII without "&". A caption of about 17 words takes 3 us, 43 us without the cache (one core of an EPYC).
    """

    def __init__(self, context_length: int) -> None:
        import regex
        from tokenizers.models import BPE

        self._context_length = context_length
        self._letters = _letters()
        self._ids, merges = clip_vocabulary()
        # The library merges the first pair, then the next. CLIP merges all equal pairs at once, in quadratic time. The
        # result is the same: no two merges give one token, so every merge of a token comes after the token's own.
        self._words = BPE(vocab=self._ids, merges=merges, end_of_word_suffix=_WORD_END)
        words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
        self._pattern = regex.compile("|".join([*_CLIP_SPECIAL, words]), regex.IGNORECASE)
        self._cached_text = functools.lru_cache(_NUM_WORDS)(self._encode)
        self._cached_word = functools.lru_cache(_NUM_WORDS)(self._encode_word)

    def __call__(self, captions: list[str]) -> np.ndarray:
        rows = np.zeros((len(captions), self._context_length), np.int32)
        begin, end = (self._ids[piece] for piece in _CLIP_SPECIAL)
        for row, caption in zip(rows, captions, strict=True):
            is_simple = caption.isascii() and caption.isprintable() and "&" not in caption
            if is_simple and len(caption) <= _MAX_SIMPLE:
                words = caption.lower().split()
                tokens = (self._cached_text(word) if len(word) <= _MAX_WORD else self._encode(word) for word in words)
                ids = list(itertools.islice(itertools.chain.from_iterable(tokens), self._context_length))
            else:
                ids = self._encode(_cleaned(caption))
            ids = [begin, *ids[: self._context_length - 2], end]
            row[: len(ids)] = ids
        return rows

    def _encode(self, text: str) -> list[int]:
        words = self._pattern.findall(text)
        return [n for word in words for n in (self._cached_word if len(word) <= _MAX_WORD else self._encode_word)(word)]

    def _encode_word(self, word: str) -> list[int]:
        if word in _CLIP_SPECIAL:
            return [self._ids[word]]
        return [token.id for token in self._words.tokenize("".join(self._letters[byte] for byte in word.encode()))]


def _corrected(text: str) -> str:
    """Correct encodings by ftfy, and HTML entities twice."""
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _with_single_spaces(text: str) -> str:
    return " ".join(_corrected(text).split())


def _cleaned(text: str) -> str:
    """Clean a text as CLIP does: correct, single spaces, lower case."""
    return _with_single_spaces(text).lower()


def _canonical(text: str) -> str:
    """Clean a text as SigLIP does: as CLIP, and without punctuation."""
    return " ".join(_corrected(text).replace("_", " ").translate(_NO_PUNCTUATION).lower().split())


# By the names of open_clip's `get_clean_fn`, whose rules these are.
_CLEANERS: dict[str, Callable[[str], str]] = {
    "none": str,
    "lower": _cleaned,
    "canonicalize": _canonical,
    "whitespace": _with_single_spaces,
}


def train_tokenizer(
    captions: Iterable[str], *, vocab_size: int, kind: Literal["bpe", "unigram"], lower_case: bool = True
) -> tokenizers.Tokenizer:
    """Train a tokenizer with [PAD] 0, [UNK] 1, and [EOS] 2 after every caption.

    [EOS] also ends a truncated caption, because a tower may pool at the last token.

    Args:
        vocab_size: at most so many tokens; fewer if the captions do not give more.
        kind: bpe splits words at spaces and signs: for languages with spaces between words and few characters, which
            all become tokens; any other character is [UNK]. unigram is for captions in any languages: spaces are part
            of the tokens, and a character without a token falls back to its UTF-8 bytes, so nothing is [UNK].

    Raises:
        ValueError: the captions have no character, or the vocabulary is too small for them.
    """
    from tokenizers import normalizers, processors

    captions = list(captions)
    if not any(map(str.strip, captions)):
        raise ValueError(f"{len(captions)} captions, none with a character: nothing to train a tokenizer from")
    normalizer = normalizers.Sequence([normalizers.NFKC(), *([normalizers.Lowercase()] if lower_case else [])])
    tokenizer = {"bpe": _train_bpe, "unigram": _train_unigram}[kind](captions, vocab_size, normalizer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 2)])
    return tokenizer


def _train_bpe(captions: list[str], vocab_size: int, normalizer: Normalizer) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = HFTokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=_SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    if tokenizer.get_vocab_size() > vocab_size:  # the trainer keeps every character, whatever vocab_size is
        raise ValueError(
            f"vocab_size={vocab_size} is less than the captions' different characters and three special tokens, "
            f"{tokenizer.get_vocab_size()}: raise it, or train kind=unigram, which keeps the frequent ones"
        )
    return tokenizer


def _train_unigram(captions: list[str], vocab_size: int, normalizer: Normalizer) -> tokenizers.Tokenizer:
    """Train Unigram pieces by rounds of segmentation and pruning.

    The library's UnigramTrainer sums floats in the order of a hash map: three runs gave three files (0.23.3). This
    function uses the library's fast parts, the BPE trainer for seeds and the Unigram model for segmentation, and counts
    in integers. Measured on the emoji36 dataset's 61,568 captions in 36 languages: 6 % (vocabulary of 8,000) and 11 %
    (32,000) fewer tokens a caption than the library's, in 0.6 to 0.85 of the time.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer

    num_pieces = vocab_size - len(_SPECIAL) - len(_BYTES)
    if num_pieces < 2:
        raise ValueError(f"vocab_size={vocab_size}: unigram needs more than 260, 256 of which stand for bytes")
    normalizer = normalizers.Sequence([normalizer, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
    metaspace = pre_tokenizers.Metaspace()
    texts = [normalizer.normalize_str(caption) for caption in captions]
    # At most half of the pieces are characters, the most frequent ones. Rarer characters fall back to bytes.
    frequent = Counter("".join(texts).replace(" ", ""))
    characters = sorted(frequent, key=lambda character: (-frequent[character], character))
    rare = str.maketrans(dict.fromkeys(characters[max(1, num_pieces // 2) :], " "))
    texts = [text.translate(rare) for text in texts]
    words = Counter(word for text in texts for word, _ in metaspace.pre_tokenize_str(text))
    alphabet = {character for word in words for character in word}

    seeds = HFTokenizer(models.BPE())
    seeds.pre_tokenizer = metaspace
    seeds.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=_SEED_FACTOR * num_pieces, show_progress=False))
    # With equal scores the best segmentation has the fewest pieces.
    scores = dict.fromkeys(sorted(seeds.get_vocab()), -1.0)
    while True:
        for _ in range(2):
            counts = _count_pieces(scores, words)
            total = sum(counts.values())
            # Unused characters stay pieces; half a count keeps their scores finite.
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
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = metaspace
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return tokenizer


def _count_pieces(scores: dict[str, float], words: Counter[str]) -> Counter[str]:
    """Count the pieces in the best segmentations of all words."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models

    segmenter = HFTokenizer(models.Unigram(list(scores.items()), unk_id=None))
    counts: Counter[str] = Counter()
    for encoding, times in zip(segmenter.encode_batch(list(words)), words.values(), strict=True):
        for piece in encoding.tokens:
            counts[piece] += times
    return counts
