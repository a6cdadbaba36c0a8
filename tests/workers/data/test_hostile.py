"""Hostile samples in a data-shard worker: bounded memory, and each sample is refused or used as it should be."""

import multiprocessing
import resource
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from sigray.workers.config import DataConfig
from sigray.workers.data.worker import DataWorker
from tests.helpers.batches import manifest_of
from tests.helpers.data import write_tar
from tests.helpers.hostile import CUT, hostile_samples

_IMAGE_BYTES = 768 << 20  # one image at most, see docs/data.md
_SLACK_BYTES = 96 << 20  # libraries that the first image of a format imports, caches, fragments


def decode_all(shard, model_config):
    """Decode every sample in this process: refusals, cut captions, bytes of memory at most before and after."""
    data = DataConfig(shards=str(shard), image_keys=["png"], captions={"txt": 1, "json:x": 1}, num_lanes=1)
    worker = DataWorker(manifest_of(data), data, model_config, seed=5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    blocks = [worker.block(0, number) for number in range(2)]
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert sorted(block_index for block in blocks for *_, block_index in block.samples.tolist()) == list(range(256))
    first = {reason: key for block in reversed(blocks) for reason, key in block.refused_keys.items()}
    return worker.refused, worker.num_cut, first, before, after


def test_a_worker_survives_200_hostile_samples_in_bounded_memory(tmp_path, model_config):
    samples = hostile_samples(200, 56)
    shard = write_tar(
        tmp_path / "a.tar", [{"__key__": f"{number:03d}", **members} for number, (members, _) in enumerate(samples)]
    )
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        refused, num_cut, first, before, after = process.submit(decode_all, shard, model_config).result()
    expected = Counter(reason for _, reason in samples if reason)
    num_cut_of_own = expected.pop(CUT)
    assert refused == expected
    assert num_cut >= num_cut_of_own  # a replacement's caption may be cut too
    assert first.keys() == {*expected, CUT}
    # The pages of the mapped shard count too; the kernel takes them back.
    assert after - before <= _IMAGE_BYTES + shard.stat().st_size + _SLACK_BYTES, (before, after)
