"""The contestants of `benchmarks/stream.py`, each run alone in a fresh process: python -m benchmarks.stream_peers NAME.

A contestant is an endless iterator over batches of B = 256 pairs, (images, tokens), that the process which iterates
owns. All of them read the same tars, crop at random as open_clip does by default (0.9 to 1 of the area), resize to
224 pixels with an antialiased bicubic filter and tokenize with open_clip's vocabulary at context length 77:

    sigray            two data-shard workers, Ray actors, and a Loader: shuffled, ledger and cursor kept
    stream            the same as a library: `sigray.stream` without Ray, two processes
    floor             two bare processes: tar parser, decoder and tokenizer of sigray, straight into one batch that is
                      overwritten by the next; not shuffled, nothing handed over but the news of a batch
    open_clip         open_clip_train's own data pipeline as shipped (PIL, float32, normalised), two loader workers
    webdataset        webdataset and DataLoader, two loader workers, with sigray's decoder and tokenizer in them
    stateful          the same with torchdata's StatefulDataLoader, which can resume
    ray_data          ray.data.read_webdataset(decoder=None) with sigray's decoder and tokenizer in map_batches
    ray_data_fused    the same with whole blocks in map_batches, for which Ray Data reads and decodes in one task
    ray_data_default  the same with Ray Data's default decoder and torchvision's transform of the PIL image

The last line of the output is JSON; see `measure` for what counts.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing.connection
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.photo_tars import NUM_SHARDS, SHARD_SAMPLES, ensure_photos
from sigray.workers.config import DataConfig, ModelConfig

BATCH, NUM_WORKERS, SEED = 256, 2, 0
MODEL = ModelConfig(name="ViT-B-32")
SIZE, CONTEXT, VOCABULARY = 224, 77, 49408  # of that model
# Batches before the clock starts, for all: loader workers and Ray Data's tasks then run, their queues have filled, and
# each process has touched the shared memory that it goes on to use, which costs more than what is copied there.
WARM_UP_BATCHES = 64
ROUND_BATCHES = 4  # of sigray: block_size 128 of 8 lanes; a multiple of what any other delivers at once
WAKE_UP_BATCHES = 14  # of a turn, before its clock starts: more than what is ready when a contestant is halted
FILL_S = 3.0  # until all that sigray asks for ahead is ready: a halted worker that owes a block would be taken for slow
MEMORY_BATCHES = 12  # after the clock has stopped
CHECKPOINT_STEPS = 50  # between two writes of the ledger
SHARED_BLOCKS = 4  # of each lane, kept for the slower reader
# The first touch of the object store's memory costs more than what is copied there, and two readers touch more of it.
SHARED_EPOCHS = 6

Batch = tuple[Any, Any]


def data_config(paths: list[Path], **fields: Any) -> DataConfig:
    """The data section that every contestant with sigray's decoder has."""
    return DataConfig(shards=[str(path) for path in paths], num_workers=NUM_WORKERS, cache_mib=0, **fields)


@functools.cache
def worker_tools() -> tuple[Any, Callable[[list[str]], Any]]:
    """sigray's decoder and tokenizer, one of each per process."""
    from sigray.workers.data.decode import Decoder
    from sigray.workers.model.tokenizer import build_tokenizer

    data = data_config([Path("unused.tar")])
    return Decoder(data, SIZE), build_tokenizer(MODEL, CONTEXT, VOCABULARY)


def decode_pairs(samples: Iterable[Mapping[str, Any]], places: Iterable[int], images: np.ndarray) -> Any:
    """Members by ending to rows of `images` (n, S, S, 3) uint8; returns the tokens (n, T)."""
    from sigray.workers.data.decode import sample_random

    decoder, tokenizer = worker_tools()
    captions = []
    for members, place, out in zip(samples, places, images, strict=False):
        draws = sample_random(SEED, 0, 0, place)
        captions.append(decoder.choose_caption(members, draws))
        decoder.decode_image(members, out, draws)
    return tokenizer(captions)


# sigray


def sigray(paths: list[Path]) -> Iterator[Batch]:
    """What one training worker of a run does for its batches, but training."""
    from sigray.workers.storage import Storage
    from sigray.workers.training.ledger import Ledger

    stream = SigrayStream(paths)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Storage(folder), rank=0, first_step=0, warn=print)
        try:
            for batch in stream.loader():
                yield batch.images, batch.tokens
                ledger.add(batch)
                batch.release()
                if (batch.step + 1) % CHECKPOINT_STEPS == 0:  # the cursor is this number
                    ledger.write(batch.step + 1)
        finally:
            stream.close()


def stream(paths: list[Path]) -> Iterator[Batch]:
    import sigray

    shards = [str(path) for path in paths]
    with sigray.stream(
        shards, global_batch_size=BATCH, seed=SEED, model=MODEL, num_workers=NUM_WORKERS, cache_mib=0
    ) as batches:
        for step, batch in enumerate(batches, start=1):
            if step % CHECKPOINT_STEPS == 0:
                batches.state_dict()
            yield batch["images"], batch["tokens"]


class SigrayStream:
    """A Ray of this process, the data-shard workers of a run, and readers of their stream."""

    def __init__(self, paths: list[Path], **fields: Any) -> None:
        import ray

        from sigray.workers.data.manifest import scan_shards
        from sigray.workers.data.pool import DataPool, listed
        from sigray.workers.data.worker import build_order, image_kind

        start_ray()
        self._data = data_config(paths, **fields)
        manifest = scan_shards(self._data.shards, self._data)
        self._order, self._image_kind = build_order(manifest, self._data, SEED), image_kind(manifest, MODEL)
        self._pool = DataPool(manifest, self._data, MODEL, seed=SEED)
        self._pool.start()
        actors = listed(self._pool.registry.actors.remote())
        self.worker_pids = ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors])

    def loader(self, num_batches: int = 2**40) -> Any:
        """One reader from the stream's beginning."""
        from sigray.workers.data.loader import Loader
        from sigray.workers.data.pool import PoolBlocks

        return Loader(
            self._order,
            PoolBlocks(self._pool.registry, self._data.worker_timeout_s),
            self._data,
            image_kind=self._image_kind,
            global_batch_size=BATCH,
            rank=0,
            world_size=1,
            first_step=0,
            last_step=num_batches,
        )

    def close(self) -> None:
        import ray

        ray.shutdown()


def shared(paths: list[Path], num_readers: int, num_batches: int) -> dict[str, float]:
    """CPU seconds of the data-shard workers while `num_readers` readers take the same batches of one stream.

    A whole stream from its first batch to its last, so that no work is under way when the counting begins and ends.
    """
    stream = SigrayStream(paths, shared_blocks=SHARED_BLOCKS)
    counts = [0] * num_readers

    def read(number: int) -> None:
        for batch in stream.loader(num_batches):
            check(batch.images, batch.tokens)
            batch.release()
            counts[number] += 1

    before, begin = sum(map(cpu_s, stream.worker_pids)), time.perf_counter()
    readers = [threading.Thread(target=read, args=(number,)) for number in range(num_readers)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    seconds, used = time.perf_counter() - begin, sum(map(cpu_s, stream.worker_pids)) - before
    stream.close()
    assert counts == [num_batches] * num_readers, counts
    return {"samples": num_batches * BATCH, "seconds": seconds, "worker_cpu_s": used}


# The floor


class Floor:
    """Two bare processes that can be halted."""

    def __init__(self, paths: list[Path]) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes: list[Any] = []
        self._news: list[Any] = []
        for number in range(NUM_WORKERS):
            receiver, sender = context.Pipe(duplex=False)
            share = paths[number::NUM_WORKERS]
            self._processes.append(context.Process(target=floor_process, args=(share, sender), daemon=True))
            self._processes[-1].start()
            sender.close()  # so that the end of the process is the end of the pipe: EOFError
            self._news.append(receiver)

    def __iter__(self) -> Iterator[Batch]:
        nothing = np.empty((BATCH, SIZE, SIZE, 3), np.uint8), np.empty((BATCH, CONTEXT), np.int32)
        while True:
            ready: list[Any] = multiprocessing.connection.wait(self._news)
            for receiver in ready:
                receiver.recv()
                yield nothing

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def close(self) -> None:
        for process in self._processes:
            process.kill()  # also a halted process
            process.join()


def floor(paths: list[Path]) -> Iterator[Batch]:
    with contextlib.closing(Floor(paths)) as processes:
        yield from processes


def in_turns(paths: list[Path], num_turns: int, seconds: float) -> list[dict[str, float]]:
    """Samples per second of sigray and of the floor, in alternating windows of some seconds.

    On shared machines the same work takes 20 % longer in one minute than in the next, so that contestants that run
    after each other say little about a difference of 5 %. Here both are up, and the processes of the one that has not
    its turn are halted, Ray's own among them.
    """
    stream = sigray(paths)
    consume(stream, WARM_UP_BATCHES)
    of_ray = tree()[1:]
    time.sleep(FILL_S)
    signal_all(of_ray, signal.SIGSTOP)
    bare = Floor(paths)
    batches = iter(bare)
    consume(batches, WARM_UP_BATCHES)
    signal_all(bare.pids, signal.SIGSTOP)
    contestants = (("sigray", of_ray, stream, FILL_S), ("floor", bare.pids, batches, 0))
    turns = []
    try:
        for number in range(num_turns):
            found = {}
            for name, pids, iterator, fill_s in contestants[:: -1 if number % 2 else 1]:  # another one begins each time
                signal_all(pids, signal.SIGCONT)
                consume(iterator, WAKE_UP_BATCHES)
                found[name] = rate(iterator, seconds)
                time.sleep(fill_s)
                signal_all(pids, signal.SIGSTOP)
            turns.append(found)
    finally:  # a halted process would outlive this one
        bare.close()
        signal_all(of_ray, signal.SIGCONT)
        stream.close()  # type: ignore[attr-defined]
    return turns


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # a process of Ray's that has ended meanwhile
            os.kill(pid, number)


def consume(batches: Iterator[Batch], count: int) -> None:
    for _ in itertools.islice(batches, count):
        pass


def rate(batches: Iterator[Batch], seconds: float) -> float:
    """Samples per second over some seconds at least, see `over_rounds`."""
    return over_rounds(deliveries(batches, seconds))


def deliveries(batches: Iterator[Batch], seconds: float) -> list[float]:
    """When batches came: now, and each one until so many seconds are over."""
    arrivals = [time.perf_counter()]
    while arrivals[-1] - arrivals[0] < seconds:
        check(*next(batches))
        arrivals.append(time.perf_counter())
    return arrivals


def over_rounds(arrivals: list[float]) -> float:
    """Samples per second, from the time that whole rounds of batches took, each pair of deliveries so far apart.

    Some contestants deliver in bursts: sigray as many batches as a block of each lane holds, the floor one of each
    process. Where the measurement cuts a burst must not matter, as it does for a count, or a line through all of them.
    """
    count = ROUND_BATCHES * max(1, (len(arrivals) - 1) // 2 // ROUND_BATCHES)
    times = np.array(arrivals)
    return BATCH * count / float(np.mean(times[count:] - times[:-count]))


def floor_process(paths: list[Path], news: Any) -> None:
    from sigray.workers.data.pool import keep_freed_memory
    from sigray.workers.data.tar import LocalFile, read_tar

    torch.set_num_threads(1)
    keep_freed_memory()
    images = np.empty((BATCH, SIZE, SIZE, 3), np.uint8)

    def members() -> Iterator[Mapping[str, Any]]:
        for path in itertools.cycle(paths):
            for sample in read_tar(LocalFile(path)):
                yield sample.members

    samples = members()
    for step in itertools.count():
        decode_pairs(itertools.islice(samples, BATCH), itertools.count(step * BATCH), images)
        news.send(step)


# Peers


def open_clip(paths: list[Path]) -> Iterator[Batch]:
    """In an environment of its own, with webdataset 0.2.86: see benchmarks/stream.py."""
    import open_clip as peer
    import webdataset
    from open_clip_train.data import get_data

    assert webdataset.__version__ == "0.2.86", webdataset.__version__
    arguments = SimpleNamespace(
        train_data=brace_pattern(paths),
        train_num_samples=10**9,  # the pipeline repeats its shards until then
        train_data_upsampling_factors=None,
        dataset_type="webdataset",
        dataset_resampled=False,
        batch_size=BATCH,
        workers=NUM_WORKERS,
        world_size=1,
        seed=SEED,
        val_data=None,
        imagenet_val=None,
        imagenet_v2=None,
    )
    transforms = tuple(peer.image_transform(SIZE, is_train=is_train) for is_train in (True, False))
    tokenizer = peer.get_tokenizer(MODEL.name)
    yield from get_data(arguments, transforms, tokenizer=tokenizer)["train"].dataloader


def webdataset(paths: list[Path]) -> Iterator[Batch]:
    import webdataset as wds

    yield from wds.WebLoader(webdataset_batches(paths), batch_size=None, num_workers=NUM_WORKERS)


def stateful(paths: list[Path]) -> Iterator[Batch]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(webdataset_batches(paths), batch_size=None, num_workers=NUM_WORKERS)
    for step, batch in enumerate(loader, start=1):
        if step % CHECKPOINT_STEPS == 0:
            loader.state_dict()
        yield batch


def webdataset_batches(paths: list[Path]) -> Any:
    import webdataset as wds

    def collate(samples: list[dict[str, Any]]) -> Batch:
        images = np.empty((len(samples), SIZE, SIZE, 3), np.uint8)
        # Decoded here and not sample by sample: no image is copied into the batch.
        tokens = decode_pairs(samples, (random.getrandbits(32) for _ in samples), images)
        return torch.from_numpy(images), torch.as_tensor(tokens)

    return (
        wds.WebDataset([str(path) for path in paths], shardshuffle=len(paths), seed=SEED)
        .shuffle(1000, initial=1000)
        .batched(BATCH, collation_fn=collate, partial=False)
        .repeat()
    )


def ray_data(paths: list[Path], map_size: int | None = BATCH, default_decoder: bool = False) -> Iterator[Batch]:
    start_ray()
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    # The same shards again and again: a stream that does not end inside the measurement.
    dataset = ray.data.read_webdataset(
        [str(path) for path in paths] * 40, decoder=True if default_decoder else None, shuffle="files"
    )
    transform = ray_transform_default if default_decoder else ray_transform
    dataset = dataset.map_batches(transform, batch_size=map_size, batch_format="numpy")
    try:
        for batch in dataset.iter_batches(batch_size=BATCH, batch_format="numpy", prefetch_batches=2):
            yield batch["images"], batch["tokens"]
    finally:
        ray.shutdown()


def ray_transform(batch: dict[str, Any]) -> dict[str, Any]:
    images = np.empty((len(batch["jpg"]), SIZE, SIZE, 3), np.uint8)
    samples = ({"jpg": jpeg, "txt": text} for jpeg, text in zip(batch["jpg"], batch["txt"], strict=True))
    tokens = decode_pairs(samples, (random.getrandbits(32) for _ in images), images)
    return {"images": images, "tokens": np.asarray(tokens)}


def ray_transform_default(batch: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image
    from torchvision.transforms import InterpolationMode, RandomResizedCrop

    crop = RandomResizedCrop(SIZE, scale=(0.9, 1.0), interpolation=InterpolationMode.BICUBIC)
    images = np.stack([np.asarray(crop(Image.fromarray(pixels))) for pixels in batch["jpg"]])
    return {"images": images, "tokens": np.asarray(worker_tools()[1](list(batch["txt"])))}


def start_ray() -> None:
    """A Ray of this process alone, as `sigray train` starts one."""
    import ray

    ray.init(
        address="local", num_cpus=NUM_WORKERS, include_dashboard=False, log_to_driver=False, configure_logging=False
    )


def brace_pattern(paths: list[Path]) -> str:
    return str(paths[0].parent / f"photos-{{000..{NUM_SHARDS - 1:03d}}}.tar")


CONTESTANTS: dict[str, Callable[[list[Path]], Iterator[Batch]]] = {
    "sigray": sigray,
    "stream": stream,
    "floor": floor,
    "open_clip": open_clip,
    "webdataset": webdataset,
    "stateful": stateful,
    "ray_data": ray_data,
    "ray_data_fused": functools.partial(ray_data, map_size=None),
    "ray_data_default": functools.partial(ray_data, default_decoder=True),
}


# Measuring


def measure(batches: Iterator[Batch], seconds: float) -> dict[str, float]:
    """Samples per second after the delivery of batch WARM_UP_BATCHES, over `seconds` at least.

    The rate is that of `over_rounds`. CPU seconds are those of this process and all its descendants in that
    time; memory is theirs too, each page counted once (PSS), the highest value while some more batches are delivered
    afterwards.
    """
    consume(batches, WARM_UP_BATCHES)
    before = tree_cpu_s()
    arrivals = deliveries(batches, seconds)
    cpu_seconds, measured_s = tree_cpu_s() - before, arrivals[-1] - arrivals[0]
    peak = max(tree_memory()["pss_mib"] for _ in itertools.islice(batches, MEMORY_BATCHES))
    return {
        "samples_per_s": over_rounds(arrivals),
        "cpu_s_per_s": cpu_seconds / measured_s,
        "peak_pss_mib": peak,
        "samples": BATCH * (len(arrivals) - 1),
        "seconds": measured_s,
    }


def measure_memory(batches: Iterator[Batch], num_samples: int) -> list[dict[str, float]]:
    """Memory of this process and all its descendants after every 4,096 samples."""
    series = []
    for number, batch in enumerate(batches, start=1):
        check(*batch)
        if number % 16 == 0:
            series.append({"samples": number * BATCH, **tree_memory()})
        if number * BATCH >= num_samples:
            return series
    raise AssertionError("the stream ended")


def check(images: Any, tokens: Any) -> None:
    """That a batch is one: 256 pairs of 224 x 224 pixels, channels first or last, and of 77 tokens."""
    assert tuple(images.shape) in {(BATCH, SIZE, SIZE, 3), (BATCH, 3, SIZE, SIZE)}, images.shape
    assert tuple(tokens.shape) == (BATCH, CONTEXT), tokens.shape


def tree() -> list[int]:
    """This process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found = [os.getpid()]
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    return found


def tree_cpu_s() -> float:
    return sum(map(cpu_s, tree()))


def cpu_s(pid: int) -> float:
    """User and system time of a process and of its children that have ended."""
    fields = _stat(pid)
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def tree_memory() -> dict[str, float]:
    """MiB of this process and all its descendants.

    The sum of their resident sizes (RSS), the same with each page counted once (PSS), and that without the pages of
    mapped files, which the kernel takes back when it needs them.
    """
    sums = dict.fromkeys(("Rss", "Pss", "Pss_File"), 0.0)
    for pid in tree():
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        for line in lines:
            key, _, rest = line.partition(":")
            if key in sums:
                sums[key] += int(rest.split()[0]) / 1024
    return {"rss_mib": sums["Rss"], "pss_mib": sums["Pss"], "own_mib": sums["Pss"] - sums["Pss_File"]}


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*CONTESTANTS, "shared", "in_turns"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--turns", type=int, default=20, help="of `in_turns`")
    parser.add_argument("--readers", type=int, default=1, help="of `shared`")
    parser.add_argument("--epochs", type=int, default=0, help="measure memory instead, over as many times all samples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths = ensure_photos(options.data)
    if options.name == "shared":
        result: Any = shared(paths, options.readers, SHARED_EPOCHS * NUM_SHARDS * SHARD_SAMPLES // BATCH)
        print(json.dumps(result), flush=True)
        return
    if options.name == "in_turns":
        print(json.dumps(in_turns(paths, options.turns, options.seconds)), flush=True)
        os._exit(0)
    batches = CONTESTANTS[options.name](paths)
    if options.epochs:
        result = measure_memory(batches, options.epochs * NUM_SHARDS * SHARD_SAMPLES)
    else:
        result = measure(batches, options.seconds)
    # Before the end of it all: Ray Data may end the process where its stream is left in the middle.
    print(json.dumps(result), flush=True)
    batches.close()  # type: ignore[attr-defined]
    os._exit(0)  # loader workers and their queues are of no more interest


if __name__ == "__main__":
    # Under its own name: what stands in __main__ travels to Ray's workers by value, and would be built for every task.
    from benchmarks import stream_peers

    stream_peers.main()
