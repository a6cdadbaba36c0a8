"""`sigray data tokenizer`: train a tokenizer on the captions of shards."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sigray.orchestrator.config import folder_of
from sigray.orchestrator.data.inspect import Progress
from sigray.workers.config import DataConfig
from sigray.workers.data.decode import Refused, captions_at
from sigray.workers.data.manifest import read_samples, scan_shards
from sigray.workers.model.tokenizer import train_tokenizer
from sigray.workers.urls import local_or_url


@dataclass
class TrainedTokenizer:
    """A tokenizer that was written, and the lengths that its captions have."""

    path: str  # or URL
    vocab_size: int
    num_captions: int
    num_unusable: int  # samples without a caption
    tokens_median: float  # per caption, [EOS] included
    tokens_95_pct: float

    @property
    def yaml(self) -> str:
        """The lines of a run's YAML that use the tokenizer."""
        return (
            "model:\n"
            f"  tokenizer: {self.path}\n"
            "  towers:\n"
            "    text_cfg:\n"
            f"      vocab_size: {self.vocab_size}\n"
            f"      context_length: {self.tokens_95_pct:.0f}  # 95 % of the captions fit; the others are cut\n"
            "      pool_type: last  # a text is read at its last token\n"
            "      no_causal_mask: true"
        )


def train_caption_tokenizer(
    data: DataConfig,
    path: str,
    *,
    vocab_size: int,
    kind: Literal["bpe", "unigram"],
    lower_case: bool,
    progress: Progress = lambda stage, done, total: None,
) -> TrainedTokenizer:
    """Train a tokenizer on every caption of the shards and write it to a path or URL.

    Captions of all sources count. Memory holds all captions: some shards of a large data set are enough.

    Raises:
        DataError: from the shards; no shard may be damaged.
        ValueError: if there are no captions, or if the vocabulary is too small for them.
        OSError: if the file cannot be written.
    """
    path = local_or_url(path)
    folder, name = folder_of(path)
    folder.check_writable()
    manifest = scan_shards(data.shards, data, lambda done, total: progress("headers", done, total))
    captions: list[str] = []
    num_unusable = 0
    for done, shard in enumerate(manifest.shards):
        progress("shards", done, len(manifest.shards))
        for sample in read_samples(shard, data):
            num_before = len(captions)
            for source in data.captions:
                with contextlib.suppress(Refused):
                    captions += captions_at(source, sample.members)
            num_unusable += len(captions) == num_before
    progress("shards", len(manifest.shards), len(manifest.shards))
    progress("training", 0, 1)
    tokenizer = train_tokenizer(captions, vocab_size=vocab_size, kind=kind, lower_case=lower_case)
    progress("training", 1, 1)
    folder.write(name, tokenizer.to_str(pretty=True).encode())
    some = captions[:: -(-len(captions) // 100_000)]
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(some)]
    median, upper = np.quantile(lengths, [0.5, 0.95], method="higher").tolist()
    return TrainedTokenizer(path, tokenizer.get_vocab_size(), len(captions), num_unusable, median, upper)
