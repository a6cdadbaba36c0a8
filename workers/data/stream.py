"""The exact stream of `sigray train` for a training loop of the user's own.

    for batch in sigray.stream("s3://bucket/{000..127}.tar", global_batch_size=1024):
        loss = step(batch["images"], batch["tokens"])

The order is that of `workers/data/order.py`: the same global batches on any number of ranks and data-shard workers.
The state is the number of samples seen and what the order was computed from.

    all processes    compare their arguments
    rank 0           makes the manifest; under Ray it owns the data-shard workers of all ranks
    each rank        a `Loader`; without Ray its share of the data-shard workers, as processes of its own
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from sigray.workers.config import DataConfig, ModelConfig
from sigray.workers.data.extras import Extras, Map
from sigray.workers.data.loader import Batch, Loader
from sigray.workers.data.manifest import Manifest, lines_of_progress, scan_shards
from sigray.workers.data.order import StreamOrder
from sigray.workers.data.stream_arguments import Checked, endings, from_rank_0, place, same_on_all_processes, whole
from sigray.workers.data.stream_workers import Workers, start_workers
from sigray.workers.data.tar import DataError
from sigray.workers.data.worker import build_order, check_batch, image_kind
from sigray.workers.model.inputs import shapes
from sigray.workers.model.tokenizer import build_tokenizer
from sigray.workers.model.trained_inputs import take_inputs
from sigray.workers.parse import Count, ParseError, as_type, parse_json
from sigray.workers.storage import Storage
from sigray.workers.texts import ten_lines
from sigray.workers.urls import local_or_url

logger = logging.getLogger(__name__)

_NUM_DIGESTS = 64  # of parts of the manifest in a state
_ENDLESS = 2**62


def stream(
    shards: Any,
    *,
    global_batch_size: int,
    rank: int | None = None,
    world_size: int | None = None,
    state: dict[str, Any] | None = None,
    manifest: str | os.PathLike[str] | None = None,
    seed: int = 0,
    num_samples: int | None = None,
    model: str | dict[str, Any] | ModelConfig = "ViT-B-16-SigLIP",
    members: Sequence[str] = (),
    map: Map | None = None,
    **data: Any,
) -> Stream:
    """Return this rank's part of the global batches of some shards.

    If a process group of torch.distributed is initialised, all of its processes must call this. Data-shard workers
    are Ray actors if this process has joined a Ray, else processes of this machine.

    Args:
        shards: as `data.shards` of a config: a pattern, several, or a mix of datasets.
        global_batch_size: samples of a step over all ranks.
        rank, world_size: of this process among those that share the batches. Default: those of torch.distributed,
            else RANK and WORLD_SIZE of the environment, else one rank.
        state: of `Stream.state_dict`: go on after its samples.
        manifest: file or URL that keeps sizes and fingerprints of the shards. It is written at the first start;
            later starts refuse shards that changed. None: a state refuses them too.
        seed: of the order, crops and captions.
        num_samples: length of the stream, rounded up to whole batches; None: never.
        model: decides image size and tokens: a name of open_clip's, or keys of `model` of a config.
        members: endings of further members, such as npy, json or cls; webdataset decodes them. Never pickle.
        map: changes a sample in the data-shard worker, see `Extras`.
        data: other keys of `data` of a config, such as crop, captions, num_workers.

    Raises:
        ValueError: an argument is wrong, or the processes were given different ones.
        DataError: the shards cannot be used, or changed since the manifest or the state was made.
        OSError: a store refuses, or the manifest cannot be written.
    """

    def checked() -> Checked:
        own_rank, size = place(rank, world_size)
        batch = whole("global_batch_size", global_batch_size, 1)
        if batch % size:
            raise ValueError(f"global_batch_size={batch} does not divide by world_size={size}")
        numbers = {
            "rank": own_rank,
            "world_size": size,
            "global_batch_size": batch,
            "seed": whole("seed", seed, 0, 2**32 - 1),
            "num_samples": None if num_samples is None else whole("num_samples", num_samples, 1),
        }
        config = DataConfig(shards=os.fspath(shards) if isinstance(shards, os.PathLike) else shards, **data)
        settings = ModelConfig(name=model) if isinstance(model, str) else ModelConfig.model_validate(model)
        return numbers, config, settings, Extras(endings(members), map)

    numbers, config, settings, extras = same_on_all_processes(checked, state)
    kept = None if manifest is None else local_or_url(os.fspath(manifest))
    made, settings = from_rank_0(lambda: (_manifest(config, kept), _with_inputs(settings)))
    check_batch(made, config, numbers["seed"], numbers["global_batch_size"])
    found = Stream(made, config, settings, **numbers)
    if state is not None:
        found.load_state_dict(state)
    found.start(extras)
    return found


@dataclass(frozen=True)
class _State:
    """What `Stream.state_dict` returns."""

    version: Literal[1]
    samples_seen: Count
    order: dict[str, Any]
    num_shards: Count
    shards: Annotated[list[str], Field(min_length=_NUM_DIGESTS, max_length=_NUM_DIGESTS)]  # a digest of each part


class Stream:
    """This rank's batches, and how far they have come; made by `stream`.

    A batch is a dict:

        images      (b, S, S, 3) uint8; b = global_batch_size / world_size
        tokens      (b, T) int32
        samples     (b, 3) int64 array: epoch, shard in the manifest, index in the shard
        replaced    (b,) bool array: the row shows another sample, because its own was refused
        __key__     list of b texts; __url__ likewise; each member and each key of `map` likewise

    The data-shard workers end with the loop: after the last batch, after an error of the stream, by `close` and by the
    end of a `with`. They also end when nothing refers to the stream. Those of a Ray live until the last rank has left,
    at most until the process of rank 0 ends.

    Attributes:
        manifest: of the shards.
        num_samples_per_epoch: samples of all shards.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        model: ModelConfig,
        *,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        num_samples: int | None,
    ) -> None:
        self.manifest = manifest
        self.num_samples_per_epoch = manifest.num_samples
        self._data, self._model, self._seed = data, model, seed
        self._global_batch_size = global_batch_size
        self._rank, self._world_size = rank, world_size
        self._last_step = -(-(_ENDLESS if num_samples is None else num_samples) // global_batch_size)
        self._samples_seen = 0
        self._loader: Loader | None = None
        self._reasons: dict[str, tuple[int, str]] = {}
        self._waited_s = 0.0
        self._workers: Workers | None = None

    def start(self, extras: Extras) -> None:
        """Start the data-shard workers."""
        arguments = (self.manifest, self._data, self._model)
        self._workers = start_workers(arguments, self._seed, extras, self._world_size)
        self._end = weakref.finalize(self, self._workers.close)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Read on after the samples seen.

        Raises:
            DataError: a shard changed or broke, too many samples are refused, or the map function failed.
            RuntimeError: the stream is closed; or another loop over it has begun.
        """
        if self._workers is None or not self._end.alive:
            raise RuntimeError("the stream is closed: make another one with state=stream.state_dict()")
        self._end_loop()
        self._loader = Loader(
            self._order(),
            self._workers.blocks,
            self._data,
            image_kind=image_kind(self.manifest, self._model),
            global_batch_size=self._global_batch_size,
            rank=self._rank,
            world_size=self._world_size,
            first_step=self._samples_seen // self._global_batch_size,
            last_step=self._last_step,
        )
        return self._batches(self._loader)

    def _batches(self, loader: Loader) -> Iterator[dict[str, Any]]:
        batches = iter(loader)
        try:
            while True:
                if self._loader is not loader:
                    raise RuntimeError("close, load_state_dict or another loop over this stream has ended this loop")
                try:
                    batch = next(batches, None)
                except Exception:
                    self.close()
                    raise
                if batch is None:
                    break
                self._samples_seen = (batch.step + 1) * self._global_batch_size
                yield _as_dict(batch)
        finally:  # also if the loop is left; another one may go on
            loader.close()
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what resumes the stream after the batches delivered: plain JSON, < 4 kB.

        It is the same on all ranks. Ranks and global_batch_size of the next loop may be others.
        """
        return {
            "version": 1,
            "samples_seen": self._samples_seen,
            "order": self._order_keys(),
            "num_shards": len(self.manifest.shards),
            "shards": _digests(self.manifest),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the samples of a state, in the next loop.

        Raises:
            ValueError: the state is of another order, or between two global batches.
            DataError: the state is of other shards; the message names the first ones.
        """
        try:
            saved = as_type(_State, state)
        except ParseError as error:
            raise ValueError(f"state: expected what state_dict() of a sigray.stream returned: {error}") from None
        own = self._order_keys()
        for name in own | saved.order:
            if own.get(name) != saved.order.get(name):
                was = saved.order.get(name)
                raise ValueError(
                    f"{name}={own.get(name)}, but the state is of {name}={was}: the order would be another"
                )
        _check_shards(self.manifest, saved.num_shards, saved.shards)
        seen = saved.samples_seen
        if seen % self._global_batch_size:
            raise ValueError(
                f"global_batch_size={self._global_batch_size}: the state's {seen} samples seen are no multiple of it"
            )
        self._end_loop()
        self._samples_seen = seen

    @property
    def refused(self) -> dict[str, tuple[int, str]]:
        """Samples replaced and captions cut in the newest loop, by reason.

        With each its count and the first sample."""
        return self._loader.counts.reasons if self._loader is not None else self._reasons

    @property
    def wait_s(self) -> float:
        """Seconds that the newest loop has waited for batches."""
        return self._loader.wait_s if self._loader is not None else self._waited_s

    @property
    def kind(self) -> Literal["actors", "processes"]:
        """What the data-shard workers are."""
        assert self._workers is not None
        return self._workers.kind

    def close(self) -> None:
        """End the loop and this rank's use of the data-shard workers. May be called twice."""
        self._end_loop()
        self._end()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end_loop(self) -> None:
        if self._loader is not None:
            self._reasons = self._loader.counts.reasons
            self._waited_s = self._loader.wait_s
            self._loader.close()
            self._loader = None
            if self._workers is not None:
                self._workers.forget()

    def _order(self) -> StreamOrder:
        return build_order(self.manifest, self._data, self._seed)

    def _order_keys(self) -> dict[str, Any]:
        weights = [part.weight for part in self._data.shards.values()] if isinstance(self._data.shards, dict) else [1.0]
        shares = [weight / sum(weights) for weight in weights]
        own = {"num_lanes": self._data.num_lanes, "shuffle_window": self._data.shuffle_window}
        return {"seed": self._seed, **own, "shares": shares}


def _as_dict(batch: Batch) -> dict[str, Any]:
    found: dict[str, Any] = {"images": batch.images, "tokens": batch.tokens, "samples": batch.samples}
    found["replaced"] = batch.replaced
    for name in dict.fromkeys(name for extra in batch.extras for name in extra):
        found[name] = [extra.get(name) for extra in batch.extras]
    batch.release()  # the memory is used again once nothing views the images
    return found


def _with_inputs(model: ModelConfig) -> ModelConfig:
    """Return the model with the inputs that it expects; build its tokenizer once."""
    taken, remarks = take_inputs(model, {})
    for remark in remarks:
        logger.warning(remark)
    _, context_length, vocab_size = shapes(taken)
    build_tokenizer(taken, context_length, vocab_size)
    return taken


def _manifest(data: DataConfig, path: str | None) -> Manifest:
    """Return the manifest; compare it with that at `path`, or keep it there."""
    progress = lines_of_progress(lambda text: print(f"sigray: {text}", file=sys.stderr, flush=True))
    if path is None:
        return scan_shards(data.shards, data, progress, key="shards")
    folder, _, name = path.rpartition("/")
    storage = Storage(folder or "/")
    saved: Manifest | None = None
    if storage.exists(name):
        try:
            saved = Manifest.from_json(parse_json(storage.read(name)))
        except ParseError as error:
            raise DataError(f"manifest={path}: {error}") from None
    made = scan_shards(data.shards, data, progress, key="shards", is_old=saved is not None and saved.is_old)
    if saved is None:
        storage.write(name, json.dumps(made.to_json()).encode())
    elif changed := saved.differences(made):
        raise DataError(
            f"the shards are not those of manifest={path}:\n  {ten_lines(changed)}\nPut the old ones back, or begin a "
            "new stream with another manifest"
        )
    return made


def _digests(manifest: Manifest) -> list[str]:
    """Return a digest of each of 64 parts of the manifest, in its order."""
    shards = manifest.shards
    bounds = [number * len(shards) // _NUM_DIGESTS for number in range(_NUM_DIGESTS + 1)]
    digests = []
    for first, last in itertools.pairwise(bounds):
        parts = [(s.url, s.num_bytes, s.num_samples, s.fingerprint, s.dataset) for s in shards[first:last]]
        digests.append(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest())
    return digests


def _check_shards(manifest: Manifest, num_shards: int, digests: list[str]) -> None:
    shards = manifest.shards
    if len(shards) != num_shards:
        raise DataError(
            f"the state is of {num_shards} shards, the stream has {len(shards)}, from {shards[0].url} to "
            f"{shards[-1].url}: give the same shards"
        )
    for number, (now, before) in enumerate(zip(_digests(manifest), digests, strict=True)):
        if now != before:
            first = number * len(shards) // _NUM_DIGESTS
            last = (number + 1) * len(shards) // _NUM_DIGESTS - 1
            among = (
                f"one of {shards[first].url} to {shards[last].url} is" if last > first else f"{shards[first].url} is"
            )
            raise DataError(f"{among} not what it was when the state was made: content, name or number of samples")
