"""Embedding stores of small image towers, without Ray."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from sigray.workers.config import DataConfig, EmbeddingsConfig, ModelConfig
from sigray.workers.data.embed import Embedder
from sigray.workers.data.embedding_store import (
    EmbeddingStore,
    StoreFormat,
    store_key,
)
from sigray.workers.data.manifest import scan_shards
from sigray.workers.model.image_towers import tower_sha256
from sigray.workers.model.towers import build_model


class Tower(nn.Module):
    """A small image tower: (b, 3, S, S) -> (b, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 5, stride=3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(images)).mean(dim=(2, 3))


def make_tower() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Tower()


def make_store(
    uri: str | Path, data: DataConfig, model: ModelConfig, held_out: str | None = None, **settings: object
) -> EmbeddingStore:
    """As `sigray embed` makes it, without Ray."""
    embeddings = EmbeddingsConfig(store=str(uri), batch_size=8, **settings)
    embedder = Embedder(model, data, embeddings, accelerator="cpu", precision="fp32", num_devices=None, num_threads=1)
    store = EmbeddingStore(str(uri))
    tower = build_model(model).visual
    key = store_key(model, data, embeddings, sha256=tower_sha256(tower), precision="fp32")
    store.begin(key, StoreFormat(embeddings.dtype, 16, embeddings.num_views))
    for shard in scan_shards(data.shards, data).shards:
        embedder.embed(shard, "train")
    for shard in scan_shards(held_out, data).shards if held_out else ():
        embedder.embed(shard, "eval")
    return store


def other_tower() -> nn.Module:
    torch.manual_seed(4)
    return Tower()
