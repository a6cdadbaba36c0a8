"""Run a frozen tower over whole shards: one worker of `sigray embed`.

    b  images of one forward pass       V  views of an image       D  embedding dimension

The unit of work is a shard. Its result is a function of the shard and the store's key, so the replacement of a dead
worker writes the same bytes. A tar is in the store whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sigray.workers.config import Accelerator, DataConfig, EmbeddingsConfig, ModelConfig, Precision
from sigray.workers.data.decode import Decoder, Refused, SampleRandom
from sigray.workers.data.embedding_store import (
    EmbeddingStore,
    Part,
    StoredShard,
    StoreFormat,
    kept_members,
    stored_name,
    write_tar,
)
from sigray.workers.data.manifest import Shard, read_samples
from sigray.workers.data.tar import TarSample
from sigray.workers.device import open_device
from sigray.workers.model.init_weights import build_initial_model
from sigray.workers.model.inputs import image_inputs, shapes, tower_config
from sigray.workers.model.towers import normalize_pixels


class Embedder:
    """Writes the embeddings of shards to a store.

    Args:
        model, data, embeddings: sections of the config.
        accelerator, precision, num_devices: of the training workers; the tower computes here as it would there.
        num_threads: of this worker, on the CPU.
    """

    def __init__(
        self,
        model: ModelConfig,
        data: DataConfig,
        embeddings: EmbeddingsConfig,
        *,
        accelerator: Accelerator,
        precision: Precision,
        num_devices: int | None,
        num_threads: int,
    ) -> None:
        assert embeddings.store is not None
        torch.set_num_threads(num_threads)
        self._model = model
        self._data = data
        self._embeddings = embeddings
        self._image_size = shapes(model)[0]
        self._store = EmbeddingStore(embeddings.store)
        self._dim = tower_config(model)["embed_dim"]
        self._device = open_device(accelerator, 0, precision, num_devices)
        module = build_initial_model(model).requires_grad_(False).eval()
        self._module: Any = self._device.place(module)

    def embed(self, shard: Shard, part: Part) -> StoredShard:
        """Write the embeddings of one shard.

        Raises:
            DataError: the shard changed or is damaged.
            StorageError: the store cannot be written.
        """
        results: list[tuple[TarSample, Tensor | str]] = []
        num_views = self._embeddings.num_views if part == "train" else 1
        decoder = Decoder(self._data, self._image_size, image_inputs(self._model))
        samples = read_samples(shard, self._data)
        while batch := list(islice(samples, max(1, self._embeddings.batch_size // num_views))):
            results += self._embed_batch(batch, decoder, num_views if part == "train" else None)
        store_format = StoreFormat(self._embeddings.dtype, self._dim, num_views)
        refused = Counter(result for _, result in results if isinstance(result, str))
        content = write_tar(results, store_format, kept_members(self._data))
        source = (shard.url, shard.num_bytes, shard.fingerprint)
        stored = StoredShard(part, *source, len(results), refused.total(), len(content), dict(refused))
        self._store.write(stored_name(shard), stored, content)
        return stored

    def _embed_batch(
        self, samples: list[TarSample], decoder: Decoder, num_crops: int | None
    ) -> Iterator[tuple[TarSample, Tensor | str]]:
        """Yield each sample with its (V, D) embedding on the host, or why it has none."""
        size = self._image_size
        num_views = num_crops or 1
        rows = []
        reasons: dict[int, str] = {}
        for number, sample in enumerate(samples):
            views = np.empty((num_views, size, size, 3), np.uint8)
            try:
                if sample.refusal:
                    raise Refused(sample.refusal)
                for view in range(num_views):
                    random = _view_random(sample.key, view) if num_crops is not None else None
                    decoder.decode_image(sample.members, views[view], random)
            except Refused as reason:
                reasons[number] = str(reason)
                continue
            rows.append(views)
        embeddings = iter(self._forward(np.concatenate(rows)).unflatten(0, (-1, num_views)) if rows else ())
        for number, sample in enumerate(samples):
            # Members may be views of a buffer that is reused.
            kept = {name: bytes(sample.members[name]) for name in kept_members(self._data) if name in sample.members}
            light = TarSample(sample.key, sample.index, sample.position, kept)
            yield light, reasons[number] if number in reasons else next(embeddings)

    @torch.inference_mode()
    def _forward(self, images: np.ndarray) -> Tensor:
        """(b, S, S, 3) uint8 -> (b, D) float32 of unit norm, on the host."""
        # Always the same shape: one program under XLA, and sums in the same order whatever samples were refused.
        full = -(-self._embeddings.batch_size // self._embeddings.num_views) * self._embeddings.num_views
        padded = np.zeros((max(full, len(images)), *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        pixels, _ = self._device.to_device(torch.from_numpy(padded), torch.zeros(len(padded), 1, dtype=torch.int32))
        with self._device.autocast():
            features = self._module.encode_image(normalize_pixels(pixels, self._model))
        return torch.nn.functional.normalize(features.float(), dim=-1)[: len(images)].cpu()


def _view_random(key: str, view: int) -> SampleRandom:
    """Return a view's random numbers, a function of the sample's key and the view."""
    return SampleRandom(hashlib.blake2b(f"{view} {key}".encode(), digest_size=32).digest())
