"""`sigray embed`: write the image embeddings of a locked tower into a store.

Workers are Ray actors, at most as many as the config has training workers. Only workers that are up get shards, so the
others may wait for resources. A shard is the unit of work: Ray repeats a shard if its worker dies. After the death of
this process, the next one skips the shards that the store holds.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from rich.console import Console

from sigray.orchestrator.address import cluster_address
from sigray.orchestrator.cluster import pending
from sigray.orchestrator.config import RunConfig
from sigray.orchestrator.formatting import format_duration
from sigray.orchestrator.resources import worker_resources
from sigray.orchestrator.run.own_ray import check_start
from sigray.orchestrator.run.places import Places
from sigray.orchestrator.run.preflight import open_store, scan, with_inputs
from sigray.orchestrator.run.progress import Display
from sigray.orchestrator.run.ray_session import ray_session
from sigray.orchestrator.run.summary import environment
from sigray.workers.data.embedding_store import Part, StoredShard, stored_name
from sigray.workers.data.manifest import Shard
from sigray.workers.data.tar import DataError
from sigray.workers.evaluation.datasets import check_set, probe_set, scan_set
from sigray.workers.evaluation.set_checks import check_sets

_LINE_S = 10.0  # seconds between two lines of progress
_MIN_READ = 1024  # samples; with fewer, the rate of refused samples is not checked


def embed(config: RunConfig, console: Console) -> str:
    """Embed the missing shards of data.shards and eval.sets; return a sentence.

    Raises:
        ConfigError: if embeddings.store is not set.
        StoreError: if another tower or preprocessing made the store.
        DataError: if a shard is damaged, or more than data.max_bad_fraction of the images are refused.
        StorageError: if the store cannot be written.
    """
    begin = time.monotonic()
    display = Display(console)
    check_start(config, num_workers=config.cluster.worker_range[1])
    config = with_inputs(config, display.say)
    without_store = config.embeddings.model_copy(update={"store": None})
    source = scan(config.model_copy(update={"embeddings": without_store}), display)
    sets = list(config.eval.sets.items())
    sets += [(name, probe_set(spec)) for name, spec in sets if spec.linear_probe is not None]
    for name, spec in sets:
        check_set(name, spec, config.data, is_stored=True)
    check_sets(config.eval, config.data)
    held_out = [scan_set(name, spec, config.data) for name, spec in sets]
    if config.model.init_from is not None:
        from sigray.workers.model.init_weights import check_initial_weights

        display.say(check_initial_weights(config.model).text())
    store, key, store_format = open_store(config)
    store.begin(key, store_format)
    wanted: dict[tuple[Part, str], Shard] = {("train", shard.url): shard for shard in source.shards}
    wanted |= {("eval", shard.url): shard for manifest in held_out for shard in manifest.shards}
    done = {part: store.complete(part) for part in ("train", "eval")}
    missing = [(part, shard) for (part, _), shard in wanted.items() if stored_name(shard) not in done[part]]
    # The largest come first, so that no worker ends long after the others.
    missing.sort(key=lambda item: (-item[1].num_samples, item[1].url))
    num_images = sum(shard.num_samples for shard in wanted.values())
    if missing:
        to_do = sum(shard.num_samples for _, shard in missing)
        display.say(
            f"store    {store.uri}: {len(wanted) - len(missing):,} of {len(wanted):,} shards are there, "
            f"{to_do:,} images to do, {store_format.num_views} view(s) of {store_format.dim} x {store_format.dtype}"
        )
        with ray_session(config, display):
            import ray.experimental.internal_kv

            kept = ray.experimental.internal_kv if cluster_address(config) else None
            began = time.monotonic()
            with Places(f"embed {store.uri}", kept) as places:
                num_workers = _embed_all(config, missing, display, places)
            seconds = time.monotonic() - began
        store.add_history(
            {"num_images": to_do, "seconds": round(seconds, 1), "num_workers": num_workers, **environment()}
        )
    return (
        f"embeddings of {num_images:,} images in {len(wanted):,} shards: {store.uri} "
        f"({format_duration(time.monotonic() - begin)}, {len(missing):,} shards of it new)"
    )


def _embed_all(config: RunConfig, missing: list[tuple[Part, Shard]], display: Display, places: Places) -> int:
    """Embed all shards in actors of the cluster; return how many actors were up."""
    import ray

    from sigray.workers.data.embed import Embedder
    from sigray.workers.data.pool import as_raised

    cluster = config.cluster
    resources = worker_resources(cluster)
    actor_class: Any = ray.remote(
        num_cpus=resources.pop("CPU"),
        num_gpus=resources.pop("GPU", 0),
        resources=resources,
        # The work is a function of the shard: a repetition gives the same file.
        max_restarts=-1,
        max_task_retries=-1,
    )(Embedder)
    starting: dict[Any, Any] = {}  # actors that are not up yet, by the reference that resolves when they are
    for _ in missing[: cluster.worker_range[1]]:
        actor = actor_class.remote(
            config.model,
            config.data,
            config.embeddings,
            accelerator=cluster.accelerator,
            precision=config.train.precision,
            num_devices=cluster.devices_per_worker,
            num_threads=cluster.cpus_per_worker,
        )
        starting[actor.__ray_ready__.remote()] = actor
    progress = _Progress(sum(shard.num_samples for _, shard in missing), config.data.max_bad_fraction, display)
    waiting = missing[::-1]
    running: dict[Any, Any] = {}
    up: set[Any] = set()
    num_up = 0

    def submit(actor: Any) -> None:
        if waiting:
            part, shard = waiting.pop()
            running[actor.embed.remote(shard, part)] = actor
        elif actor in up and actor not in running.values():
            up.remove(actor)
            ray.kill(actor)  # others may wait for its resources

    while waiting or running:
        finished, _ = ray.wait([*running, *starting], timeout=_LINE_S)
        for reference in finished:
            if reference in starting:
                actor = starting.pop(reference)
                ray.get(reference)
                up.add(actor)
                num_up += 1
                submit(actor)  # prefetch, so that the actor does not wait for this process
            else:
                actor = running.pop(reference)
                try:
                    progress.add(ray.get(reference))
                except ray.exceptions.RayTaskError as error:
                    raise as_raised(error) from None
            submit(actor)
        places.hold((len(up), "embedding worker"))
        if up or running:
            progress.show()
        else:
            places.say_pending(display, pending.demand_of(cluster, 1))
    for actor in [*up, *starting.values()]:
        ray.kill(actor)
    return num_up


class _Progress:
    """Count embedded and refused images, and show the counts."""

    def __init__(self, num_images: int, max_bad_fraction: float, display: Display) -> None:
        self._num_images, self._max_bad_fraction, self._display = num_images, max_bad_fraction, display
        self._num_done = 0
        self._refused = Counter[str]()
        self._begin = self._shown = time.monotonic()

    def add(self, stored: StoredShard) -> None:
        """Count a shard that is in the store.

        Raises:
            DataError: if too many images were refused, with the reasons.
        """
        self._num_done += stored.num_samples
        self._refused.update(stored.refused)
        if self._refused.total() > self._max_bad_fraction * max(self._num_done, _MIN_READ):
            table = "\n  ".join(f"{count} x {reason}" for reason, count in self._refused.most_common())
            raise DataError(
                f"{self._refused.total()} of {self._num_done} images refused, more than data.max_bad_fraction "
                f"{self._max_bad_fraction}, the last of {stored.source}:\n  {table}"
            )

    def show(self) -> None:
        now = time.monotonic()
        if now - self._shown < _LINE_S and self._num_done < self._num_images:
            return
        self._shown = now
        rate = self._num_done / (now - self._begin)
        left = format_duration((self._num_images - self._num_done) / rate) if rate else "unknown"
        refused = f", {self._refused.total():,} refused" if self._refused else ""
        self._display.say(
            f"embedded {self._num_done:9,} of {self._num_images:,} images  {rate:7,.0f} images/s  {left} left{refused}"
        )
