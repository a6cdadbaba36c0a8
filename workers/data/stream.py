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
import operator
import os
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch.distributed as dist
from pydantic import Field

from sigray.workers.config import DataConfig, ModelConfig, member_ending
from sigray.workers.data.extras import RESERVED, Extras, Map
from sigray.workers.data.loader import Batch, BlockSource, Loader
from sigray.workers.data.manifest import Manifest, scan_shards
from sigray.workers.data.order import StreamOrder
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

_LINE_S = 10.0  # between two lines of progress
_NUM_DIGESTS = 64  # of parts of the manifest in a state
_LEAVE_S = 10.0
_ENDLESS = 2**62
_Value = TypeVar("_Value")


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

    def checked() -> tuple[dict[str, Any], DataConfig, ModelConfig, Extras]:
        own_rank, size = _place(rank, world_size)
        batch = _whole("global_batch_size", global_batch_size, 1)
        if batch % size:
            raise ValueError(f"global_batch_size={batch} does not divide by world_size={size}")
        numbers = {
            "rank": own_rank,
            "world_size": size,
            "global_batch_size": batch,
            "seed": _whole("seed", seed, 0, 2**32 - 1),
            "num_samples": None if num_samples is None else _whole("num_samples", num_samples, 1),
        }
        config = DataConfig(shards=os.fspath(shards) if isinstance(shards, os.PathLike) else shards, **data)
        settings = ModelConfig(name=model) if isinstance(model, str) else ModelConfig.model_validate(model)
        return numbers, config, settings, Extras(_endings(members), map)

    numbers, config, settings, extras = _same_on_all_processes(checked, state)
    kept = None if manifest is None else local_or_url(os.fspath(manifest))
    made, settings = _from_rank_0(lambda: (_manifest(config, kept), _with_inputs(settings)))
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
        self._workers: _Workers | None = None

    def start(self, extras: Extras) -> None:
        """Start the data-shard workers."""
        arguments = (self.manifest, self._data, self._model)
        self._workers = _start_workers(arguments, self._seed, extras, self._rank, self._world_size)
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
        return self._loader.reasons if self._loader is not None else self._reasons

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
            self._reasons, self._waited_s = self._loader.reasons, self._loader.wait_s
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


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and world size: as given, of torch.distributed, of the environment."""
    names = ("rank", "world_size")
    values: tuple[Any, Any] = (rank, world_size)
    if values == (None, None) and _has_group():
        values = (dist.get_rank(), dist.get_world_size())
    elif values == (None, None):
        names = ("RANK", "WORLD_SIZE")
        values = (os.environ.get("RANK"), os.environ.get("WORLD_SIZE"))
        if values == (None, None):
            return 0, 1
        values = tuple(int(text) if text and text.isdigit() else text for text in values)  # type: ignore[assignment]
    if None in values:
        raise ValueError(f"{names[0]}={values[0]}, {names[1]}={values[1]}: give both or neither")
    size = _whole(names[1], values[1], 1)
    return _whole(names[0], values[0], 0, size - 1), size


def _whole(name: str, value: Any, least: int, most: int = 2**62) -> int:
    """Return a whole number between bounds as an int of Python's."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= most:
        at_most = "" if most == 2**62 else f" and at most {most}"
        raise ValueError(f"{name}={value!r}: a whole number of at least {least}{at_most} expected")
    return number


def _endings(members: Sequence[str]) -> tuple[str, ...]:
    if isinstance(members, str) or not all(isinstance(ending, str) for ending in members):
        raise ValueError(f'members={members!r}: a list of endings expected, such as ["npy", "json"]')
    endings = tuple(member_ending(ending) for ending in members)
    if taken := [ending for ending in endings if ending in RESERVED]:
        raise ValueError(f"members={taken}: sigray has other values of this name")
    return endings


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


_Checked = tuple[dict[str, Any], DataConfig, ModelConfig, Extras]


def _same_on_all_processes(check: Callable[[], _Checked], state: dict[str, Any] | None) -> _Checked:
    """Return the checked arguments; raise on all processes if one differs."""
    if not _has_group():
        return check()
    error: Exception | None = None
    texts: dict[str, str] = {}
    rank = None
    try:
        numbers, config, settings, extras = found = check()
        rank = numbers["rank"]
        sections = {"data": config.model_dump(mode="json"), "model": settings.model_dump(mode="json")}
        others = {"state": state, "members": extras.members, "map": extras.map_name}
        compared = {**numbers, **sections, **others}
        del compared["rank"]
        texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in compared.items()}
    except Exception as raised:
        error = raised
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, (None if error is None else f"{type(error).__name__}: {error}", rank, texts))
    if error is not None:
        raise error
    for process, (message, _, its) in enumerate(of_all):
        if message is not None:
            raise ValueError(f"process {process}: {message}")
        for name, text in its.items():
            first = of_all[0][2][name]
            if text != first:
                raise ValueError(f"{name} is {first[:300]} on process 0 and {text[:300]} on process {process}")
    ranks = Counter(rank for _, rank, _ in of_all)
    if len(ranks) != numbers["world_size"] or len(set(ranks.values())) != 1:
        raise ValueError(
            f"rank is {sorted(ranks.elements())} on the processes of the group: each of the ranks below "
            f"world_size={numbers['world_size']} must come equally often"
        )
    return found


def _from_rank_0(make: Callable[[], _Value]) -> _Value:
    """Return what process 0 made, on every process of the group; raise what it raised."""
    if not _has_group():
        return make()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = make()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


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
    said_at = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal said_at
        if time.monotonic() - said_at > _LINE_S:
            said_at = time.monotonic()
            print(f"sigray: read the headers of {done:,} of {total:,} shards", file=sys.stderr, flush=True)

    if path is None:
        return scan_shards(data.shards, data, show, key="shards")
    folder, _, name = path.rpartition("/")
    storage = Storage(folder or "/")
    saved: Manifest | None = None
    if storage.exists(name):
        try:
            saved = Manifest.from_json(parse_json(storage.read(name)))
        except ParseError as error:
            raise DataError(f"manifest={path}: {error}") from None
    made = scan_shards(data.shards, data, show, key="shards", is_old=saved is not None and saved.is_old)
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


class _Workers:
    """The data-shard workers as one rank uses them."""

    kind: Literal["actors", "processes"]
    blocks: BlockSource

    def forget(self) -> None:
        """Drop the requests of a loop that has ended."""

    def close(self) -> None:
        """End this rank's use."""


def _start_workers(arguments: Any, seed: int, extras: Extras, rank: int, world_size: int) -> _Workers:
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return _Actors(arguments, seed, extras, world_size)
    return _Processes(arguments, seed, extras, world_size)


def _share(data: DataConfig, world_size: int) -> int:
    """Return how many data-shard workers a rank starts for itself."""
    num_workers = data.num_workers if isinstance(data.num_workers, int) else data.num_workers[-1]
    return -(-num_workers // world_size)


class _Processes(_Workers):
    """A rank's share of the workers, as its own processes."""

    kind = "processes"

    def __init__(self, arguments: Any, seed: int, extras: Extras, world_size: int) -> None:
        from ray import cloudpickle  # by value what is defined in the user's script

        from sigray.workers.data.processes import ProcessBlocks

        data = arguments[1]
        try:
            content = cloudpickle.dumps((arguments, {"seed": seed, "extras": extras}))
        except Exception as error:
            raise ValueError(f"map={extras.map_name} cannot be sent to data-shard workers: {error}") from error
        self.blocks: ProcessBlocks = ProcessBlocks(content, _share(data, world_size), data.worker_timeout_s)

    def forget(self) -> None:
        self.blocks.forget()

    def close(self) -> None:
        self.blocks.close()


_OWNED: list[Any] = []  # pools that other ranks still read: without a handle here, Ray would end their actors


class _Actors(_Workers):
    """Workers under Ray, started by process 0 of a group for all.

    Without a group, each rank starts its share."""

    kind = "actors"

    def __init__(self, arguments: Any, seed: int, extras: Extras, world_size: int) -> None:
        from sigray.workers.data.pool import DataPool, PoolBlocks

        manifest, data, model = arguments
        num_readers = dist.get_world_size() if _has_group() else 1
        num_workers = _share(data, 1 if _has_group() else world_size)
        self._pool: DataPool | None = None

        def start() -> Any:
            _warn_if_short(num_workers, data)
            sized = data.model_copy(update={"num_workers": num_workers})
            self._pool = DataPool(manifest, sized, model, seed=seed, num_readers=num_readers, extras=extras)
            self._pool.start()
            return self._pool.registry

        self._registry = _from_rank_0(start)
        self.blocks = PoolBlocks(self._registry, data.worker_timeout_s)

    def close(self) -> None:
        import ray

        from sigray.workers.data.pool import listed

        if not ray.is_initialized():
            return
        try:
            if ray.get(self._registry.leave.remote(), timeout=_LEAVE_S):
                for actor in listed(self._registry.actors.remote()):
                    ray.kill(actor)
                ray.kill(self._registry)
            elif self._pool is not None:
                _OWNED.append(self._pool)
        except ray.exceptions.RayError:  # the owner has gone, and the actors with it
            pass


def _warn_if_short(num_workers: int, data: DataConfig) -> None:
    """Say what the workers wait for: a job that trains on all CPUs leaves them none."""
    import ray

    needed = num_workers * data.cpus_per_worker
    free = ray.available_resources().get("CPU", 0.0)
    if free < needed:
        logger.warning(
            "sigray.stream: %d data-shard workers need %g CPUs, and %g are free. They start when there are enough. Let "
            "the training workers reserve fewer (ScalingConfig.resources_per_worker), or lower num_workers or "
            "cpus_per_worker",
            num_workers,
            needed,
            free,
        )
