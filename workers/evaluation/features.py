"""Features of held-out sets and of texts, part by part, by one or more workers.

    n  images of a set, or texts      b  of a part      D  embedding dimension

A part (`workers/evaluation/datasets.py`) is one batch of the towers, and every worker has the same number of threads.
So the features are the same bits with any number of workers. Workers return features and captions, and no images except
those of the sheet.

The evaluation's own task is a worker too. It computes parts from the start, and other workers join when they are up.
So if the cluster has no free resources for them, the evaluation is slower but does not wait. A worker that dies or
sends no result in time is replaced, and its parts are computed again.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from sigray.workers.checkpoint.index import CheckpointInfo
from sigray.workers.checkpoint.writer import load_weights
from sigray.workers.config import DataConfig, EmbeddingsConfig, EvalConfig, EvalSet, ModelConfig
from sigray.workers.data.embedding_store import EmbeddingStore, read_embeddings
from sigray.workers.data.manifest import Shard
from sigray.workers.data.pool import as_raised
from sigray.workers.data.tar import DataError
from sigray.workers.device import Device, open_device
from sigray.workers.evaluation.datasets import LoadedSet, Part, check_usable, cut, load
from sigray.workers.model.decoder import read_image_tokens
from sigray.workers.model.init_weights import build_trained_model
from sigray.workers.model.inputs import image_inputs, shapes, tower_config
from sigray.workers.model.tokenizer import (
    CaptionEnds,
    Tokenizer,
    build_detokenizer,
    build_tokenizer,
    find_caption_ends,
)
from sigray.workers.model.towers import build_model, normalize_pixels
from sigray.workers.storage import Storage

_PREFETCH = 2  # parts of a worker at once, so that it does not wait for this process between two
_TIMEOUT_FACTOR = 4.0  # a part is lost after this multiple of the longest part here
_TIMEOUT_S = 60.0  # and at least this time


@dataclass(frozen=True)
class EvaluationJob:
    """A checkpoint, and the sections of the config that define its evaluation."""

    storage_uri: str  # of the run
    info: CheckpointInfo
    model: ModelConfig
    data: DataConfig
    evaluation: EvalConfig
    embeddings: EmbeddingsConfig
    ema: bool = False  # the average of the weights, not the last ones
    captions: bool = False  # write captions for the images of the sheets; the model has a decoder


class Encoder:
    """Features from a model, batch by batch, without a graph."""

    def __init__(
        self, module: Any, model: ModelConfig, tokenizer: Tokenizer, batch_size: int, device: Device | None = None
    ) -> None:
        self._device = device or open_device("cpu", 0, "fp32")
        self._module: Any = self._device.place(module.eval())
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size

    @torch.inference_mode()
    def images(self, images: np.ndarray) -> Tensor:
        """(n, S, S, 3) uint8 -> (n, D) of unit norm, on the host."""
        features = []
        for batch in torch.from_numpy(images).split(self._batch_size):
            pixels = normalize_pixels(batch.to(self._device.torch_device), self._model)
            features.append(self._module.encode_image(pixels, normalize=True).cpu())
        return torch.cat(features)

    @torch.inference_mode()
    def captions(self, images: np.ndarray, ends: CaptionEnds) -> np.ndarray:
        """(n, S, S, 3) uint8 -> (n, T) int32, as `Decoder.generate`; n at most a batch."""
        pixels = normalize_pixels(torch.from_numpy(images).to(self._device.torch_device), self._model)
        image_tokens = read_image_tokens(self._module.visual, pixels)
        return self._module.decoder.generate(image_tokens, ends).cpu().numpy()

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Tensor:
        """n strings -> (n, D) of unit norm, on the host."""
        batches = torch.from_numpy(self._tokenizer(texts)).to(self._device.torch_device).split(self._batch_size)
        return torch.cat([self._module.encode_text(batch, normalize=True).cpu() for batch in batches])


@dataclass
class SetFeatures:
    """Features and other values of the images of a set, or of a part of it."""

    features: Tensor  # (n, D) of unit norm
    captions: list[list[str]]  # n; of an image, all its captions
    class_ids: list[str]  # n
    translations: list[list[list[str]]]  # n; by language of the set
    refused: Counter[str]  # samples that are not usable, by reason
    shown: dict[int, np.ndarray] = field(default_factory=dict)  # row -> (S, S, 3) uint8, for the sheet
    written: dict[int, str] = field(default_factory=dict)  # row -> the decoder's caption of a shown image


class FeatureWorker:
    """The towers of one checkpoint; with a store, image features come from the store."""

    def __init__(self, job: EvaluationJob) -> None:
        model, evaluation = job.model, job.evaluation
        torch.set_num_threads(evaluation.cpus_per_worker)
        self._data, self._batch_size = job.data, evaluation.batch_size
        self._image_size, context_length, vocab_size = shapes(model)
        self._dim = tower_config(model)["embed_dim"]
        self._inputs = image_inputs(model)
        self._store = EmbeddingStore(job.embeddings.store) if job.embeddings.store is not None else None
        if self._store is None:
            module = build_trained_model(Storage(job.storage_uri), job.info, model, ema=job.ema)
        else:
            module = build_model(model, stored_embeddings=True)
            load_weights(Storage(job.storage_uri), job.info, module, ema=job.ema)
        tokenizer = build_tokenizer(model, context_length, vocab_size)
        device = open_device(evaluation.accelerator, 0, "fp32")
        self._encoder = Encoder(module, model, tokenizer, evaluation.batch_size, device)
        if job.captions:
            self._ends = find_caption_ends(model, tokenizer)
            self._detokenize = build_detokenizer(model, context_length, self._ends)
        self._writes_captions = job.captions

    def pid(self) -> int:
        """Id of the process; answers when the worker is up."""
        return os.getpid()

    def texts(self, texts: list[str]) -> Tensor:
        """A batch of texts -> (b, D) of unit norm."""
        return self._encoder.texts(texts)

    def images(self, part: Part, spec: EvalSet) -> SetFeatures:
        """The features of a part.

        Raises:
            DataError: for a shard that changed or is damaged.
            StoreError: if the store lacks the shard.
        """
        samples = part.samples(self._data)
        found = []
        while batch := list(islice(samples, self._batch_size)):
            loaded = load(batch, spec, self._data, self._image_size, self._inputs)
            features = torch.empty(0, self._dim)
            if loaded.places:
                features = self._encoder.images(loaded.images) if self._store is None else self._stored(part, loaded)
            shown = {row: loaded.images[row] for row, place in enumerate(loaded.places) if place in part.shown}
            written = self._write_captions(shown) if shown and self._writes_captions else {}
            of_samples = loaded.captions, loaded.class_ids, loaded.translations
            found.append(SetFeatures(features, *of_samples, loaded.refused, shown, written))
        return _join(found)

    def _write_captions(self, images: dict[int, np.ndarray]) -> dict[int, str]:
        tokens = self._encoder.captions(np.stack(list(images.values())), self._ends)
        return dict(zip(images, self._detokenize(tokens), strict=True))

    def _stored(self, part: Part, loaded: LoadedSet) -> Tensor:
        """(n, D) of unit norm, from the store.

        Raises:
            DataError: if the store refused an image that is usable now.
        """
        assert self._store is not None
        assert isinstance(part.source, Shard)  # check_set refuses folders of images
        first = loaded.places[0]
        stored = read_embeddings(self._store, part.source, self._data, first)
        rows = list(islice(stored, loaded.places[-1] + 1 - first))
        found = [row for place in loaded.places if (row := rows[place - first]) is not None]
        if len(found) < len(loaded.places):
            raise DataError(
                f"{self._store.uri} lacks the embeddings of {len(loaded.places) - len(found)} images of "
                f"{part.source.url} that can be read now: delete its eval folder and run `sigray embed` again"
            )
        return torch.nn.functional.normalize(torch.from_numpy(np.stack(found)), dim=-1)


class WorkerGroup:
    """This process and `eval.num_workers` - 1 Ray actors; a context manager."""

    def __init__(self, job: EvaluationJob) -> None:
        self._job = job
        self._evaluation = job.evaluation
        self._starting: dict[Any, Any] = {}  # actors that are not up yet, by the reference to their pid
        self._helpers: list[Any] = []
        self._longest_s = 0.0  # of the parts that this process computed

    def __enter__(self) -> WorkerGroup:
        self._threads_before = torch.get_num_threads()
        try:
            self._here = FeatureWorker(self._job)
        except BaseException:
            torch.set_num_threads(self._threads_before)
            raise
        for _ in range(self._evaluation.num_workers - 1):
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads_before)
        for actor in [*self._helpers, *self._starting.values()]:
            ray.kill(actor)

    def images(self, name: str, spec: EvalSet, num_shown: int = 0) -> SetFeatures:
        """The features of a set.

        Args:
            num_shown: number of images, evenly spread, to keep for the sheet. Unusable images are not replaced by
                others.

        Raises:
            DataError: if shards are missing or damaged, or no sample is usable.
        """
        is_stored = self._job.embeddings.store is not None
        parts = cut(name, spec, self._job.data, self._evaluation.batch_size, num_shown=num_shown, is_stored=is_stored)
        found = _join(self._map("images", [(part, spec) for part in parts]))
        check_usable(spec, len(found.captions), found.refused)
        return found

    def texts(self, texts: list[str]) -> Tensor:
        """n strings -> (n, D) of unit norm."""
        size = self._evaluation.batch_size
        return torch.cat(self._map("texts", [(texts[start : start + size],) for start in range(0, len(texts), size)]))

    def prompts(self, names: list[str], templates: list[str]) -> Tensor:
        """C names -> (C, D): normalised mean of prompt features (CLIP, section 3.1.4)."""
        features = self.texts([template.replace("{}", name) for template in templates for name in names])
        return torch.nn.functional.normalize(features.unflatten(0, (len(templates), len(names))).sum(dim=0), dim=-1)

    def _map(self, method: str, items: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method for each item, spread over the workers.

        Returns:
            Results in the order of the items.
        """
        results: dict[int, Any] = {}
        waiting = deque(range(len(items)))
        running: dict[Any, tuple[int, Any]] = {}
        while len(results) < len(items):
            self._add_started()
            for _ in range(_PREFETCH):
                for helper in self._helpers:
                    # The last item is for this process, so a list of one is not sent.
                    if len(waiting) > 1 and sum(actor is helper for _, actor in running.values()) < _PREFETCH:
                        number = waiting.popleft()
                        running[getattr(helper, method).remote(*items[number])] = number, helper
            if waiting:
                number = waiting.popleft()
                begin = time.monotonic()
                results[number] = getattr(self._here, method)(*items[number])
                self._longest_s = max(self._longest_s, time.monotonic() - begin)
            if running:
                self._gather(results, waiting, running)
        return [results[number] for number in range(len(items))]

    def _gather(self, results: dict[int, Any], waiting: deque[int], running: dict[Any, tuple[int, Any]]) -> None:
        """Take the results of other workers; wait for one if this process is idle.

        Parts of a worker that died or sent no result in time are computed again.
        """
        timeout_s = 0.0 if waiting else max(_TIMEOUT_S, _TIMEOUT_FACTOR * self._longest_s)
        finished, unfinished = ray.wait(list(running), timeout=timeout_s)
        lost = set() if finished or waiting else {running[unfinished[0]][1]}
        for reference in finished:
            number, helper = running.pop(reference)
            try:
                results[number] = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise as_raised(error) from None
            except ray.exceptions.RayError:
                waiting.appendleft(number)
                lost.add(helper)
        for helper in lost:
            for reference in [reference for reference, (_, actor) in running.items() if actor is helper]:
                waiting.appendleft(running.pop(reference)[0])
            if helper in self._helpers:
                self._helpers.remove(helper)
                ray.kill(helper)
                self._start()

    def _start(self) -> None:
        actor_class: Any = ray.remote(FeatureWorker)
        num_gpus = 1 if self._evaluation.accelerator == "cuda" else 0
        actor = actor_class.options(num_cpus=self._evaluation.cpus_per_worker, num_gpus=num_gpus).remote(self._job)
        self._starting[actor.pid.remote()] = actor

    def _add_started(self) -> None:
        """Add the workers that are up by now.

        Raises:
            RuntimeError: if a worker cannot load the model, although this process could.
        """
        if not self._starting:
            return
        for reference in ray.wait(list(self._starting), num_returns=len(self._starting), timeout=0)[0]:
            actor = self._starting.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayActorError as error:
                if error.actor_init_failed:
                    raise RuntimeError(f"an evaluation worker cannot load the model on its machine: {error}") from None
                self._start()
            else:
                self._helpers.append(actor)


def _join(parts: list[SetFeatures]) -> SetFeatures:
    """Join parts in their order."""
    if not parts:
        return SetFeatures(torch.empty(0, 0), [], [], [], Counter())
    first = 0
    shown: dict[int, np.ndarray] = {}
    written: dict[int, str] = {}
    for part in parts:
        shown |= {first + row: image for row, image in part.shown.items()}
        written |= {first + row: text for row, text in part.written.items()}
        first += len(part.captions)
    return SetFeatures(
        torch.cat([part.features for part in parts]),
        [captions for part in parts for captions in part.captions],
        [class_id for part in parts for class_id in part.class_ids],
        [languages for part in parts for languages in part.translations],
        sum((part.refused for part in parts), Counter()),
        shown,
        written,
    )
