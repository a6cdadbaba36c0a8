"""Data-shard worker and loader: the towers get the order's samples from any worker."""

import dataclasses
import io
import tarfile
from collections import Counter

import numpy as np
import pytest

from sigray.workers.data.decode import Decoder, sample_random
from sigray.workers.data.manifest import read_samples
from sigray.workers.data.order import LaneSlice
from sigray.workers.data.tar import DataError
from sigray.workers.data.views import Pixels
from sigray.workers.data.worker import DataWorker, build_order
from sigray.workers.model.inputs import shapes
from sigray.workers.model.tokenizer import build_tokenizer
from tests.helpers.batches import batches, manifest_of
from tests.helpers.data import drawn_sample, write_tar
from tests.helpers.reference import samples_of


def test_block_holds_the_samples_of_the_order(data_config, model_config):
    manifest = manifest_of(data_config)
    worker = DataWorker(manifest, data_config, model_config, seed=5)
    order = build_order(manifest, data_config, 5)
    samples = [list(read_samples(shard, data_config)) for shard in manifest.shards]
    decoder = Decoder(data_config, 16)
    for lane, number in [(0, 0), (2, 3), (1, 9), (0, 1), (0, 13), (2, 2)]:  # any order of questions
        block = worker.block(lane, number)
        piece = LaneSlice(lane, number * 4, number * 4 + 4)
        for row, ref in enumerate(samples_of(order, piece)):
            expected, sample = np.empty((16, 16, 3), np.uint8), samples[ref.shard][ref.index]
            decoder.decode_image(sample.members, expected, sample_random(5, ref.epoch, ref.shard, ref.index))
            np.testing.assert_array_equal(block.images[row], expected)
            assert block.samples[row].tolist() == [ref.epoch, ref.shard, ref.index]
            assert block.keys[row] == sample.key
        assert block.images.dtype == np.uint8
        assert block.tokens.shape == (4, 8)
        assert block.tokens.dtype == np.int32


@pytest.mark.parametrize("batch", [5, 12, 24])
def test_batches_are_the_same_on_any_number_of_ranks(data_config, model_config, batch):
    whole = batches(data_config, model_config, batch=batch)
    assert len(whole) == 12
    for world_size in (size for size in (2, 3, 5) if batch % size == 0):
        parts = [
            batches(data_config, model_config, batch=batch, rank=r, world_size=world_size) for r in range(world_size)
        ]
        for step, expected in enumerate(whole):
            assert expected.step == step
            for name in ("images", "tokens"):
                joined = np.concatenate([getattr(part[step], name).numpy() for part in parts])
                np.testing.assert_array_equal(joined, getattr(expected, name).numpy())


def test_feed_resumes_at_every_step(data_config, model_config):
    whole = batches(data_config, model_config, batch=12)
    assert len(whole) == 12
    for first in range(1, len(whole)):
        rest = batches(data_config, model_config, batch=12, first=first)
        assert [batch.step for batch in rest] == [batch.step for batch in whole[first:]]
        for expected, actual in zip(whole[first:], rest, strict=True):
            np.testing.assert_array_equal(actual.images.numpy(), expected.images.numpy())
            np.testing.assert_array_equal(actual.tokens.numpy(), expected.tokens.numpy())


def test_each_row_of_batches_that_are_held_is_its_samples(data_config, model_config):
    """With the centre for a crop, a sample has one image in all epochs, and no two samples have the same."""
    data, images = data_config.model_copy(update={"crop": "center"}), {}
    for batch in batches(data, model_config, batch=12, last=20):
        for (_, shard, index), image in zip(batch.samples.tolist(), batch.images, strict=True):
            images.setdefault((shard, index), set()).add(image.numpy().tobytes())
    assert [len(found) for found in images.values()] == [1] * 76
    assert len(set.union(*images.values())) == 76


def test_every_position_can_be_resumed(data_config, model_config, monkeypatch):
    """Batches of one: a cursor may stand between any two samples. A fresh worker each time, but for the tokenizer."""
    tokenizer = build_tokenizer(model_config, *shapes(model_config)[1:])
    monkeypatch.setattr("sigray.workers.data.worker.build_tokenizer", lambda *_: tokenizer)
    whole = batches(data_config, model_config, batch=1, last=100)
    manifest = manifest_of(data_config)
    assert len(whole) > manifest.num_samples
    for first in range(1, len(whole)):
        worker = DataWorker(manifest, data_config, model_config, seed=5)
        last = min(first + 6, len(whole))
        rest = batches(data_config, model_config, batch=1, first=first, last=last, worker=worker)
        assert [batch.samples.tolist() for batch in rest] == [batch.samples.tolist() for batch in whole[first:last]]
        for expected, actual in zip(whole[first:last], rest, strict=True):
            np.testing.assert_array_equal(actual.images.numpy(), expected.images.numpy())
            np.testing.assert_array_equal(actual.tokens.numpy(), expected.tokens.numpy())


@pytest.mark.parametrize("change", [{"block_size": 7}, {"cache_mib": 0}, {"prefetch_batches": 1}, {"shared_blocks": 3}])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_speed_settings_do_not_change_a_batch(data_config, model_config, change, crop):
    data_config = data_config.model_copy(update={"crop": crop})
    expected = batches(data_config, model_config, batch=12, last=20)  # three epochs: the cache is used
    assert len(expected) == 20
    other = batches(data_config.model_copy(update=change), model_config, batch=12, last=20)
    for want, got in zip(expected, other, strict=True):
        np.testing.assert_array_equal(got.images.numpy(), want.images.numpy())
        np.testing.assert_array_equal(got.tokens.numpy(), want.tokens.numpy())


@pytest.mark.parametrize("num_kept", [1, 3])
def test_the_newest_blocks_of_a_lane_are_kept(data_config, model_config, num_kept):
    """For ranks that share a block, and runs that read one stream at their own pace."""
    data = data_config.model_copy(update={"shared_blocks": num_kept})
    worker, size = DataWorker(manifest_of(data), data, model_config, seed=5), data.block_size
    for number in range(num_kept + 1):
        worker.block(0, number)
    assert worker.num_decoded == (num_kept + 1) * size
    for number in range(num_kept, 0, -1):
        worker.block(0, number)
    assert worker.num_decoded == (num_kept + 1) * size
    worker.block(0, 0)
    assert worker.num_decoded == (num_kept + 2) * size


def test_cache_takes_no_more_than_it_may(data_config, model_config, monkeypatch):
    data = data_config.model_copy(update={"cache_mib": 1, "crop": "center"})
    worker = DataWorker(manifest_of(data), data, model_config, seed=5)
    worker._cache._free_bytes = 5700  # three samples of 16 x 16 x 3 bytes and what is around them
    for number in range(6):
        worker.block(0, number)
    assert len(worker._cache._samples) == 3


@pytest.mark.parametrize("crop", ["center", "random"])  # the first keeps decoded images
def test_a_request_may_ask_for_another_image_size(data_config, model_config, crop):
    data = data_config.model_copy(update={"crop": crop})
    worker = DataWorker(manifest_of(data), data, model_config, seed=5)
    for size in (None, 24, 24, None, 32):
        model = model_config.model_copy(update={"image_size": size})
        alone = DataWorker(manifest_of(data), data, model, seed=5)
        for lane, number in ((0, 0), (0, 8), (1, 0)):  # of two epochs
            found, expected = worker.block(lane, number, (), size and Pixels(size)), alone.block(lane, number)
            np.testing.assert_array_equal(found.images, expected.images)
            np.testing.assert_array_equal(found.tokens, expected.tokens)


def folder_with_bad_samples(folder, bad, num_good=60):
    samples = [drawn_sample(number) for number in range(num_good)]
    for number, change in bad.items():
        samples[number].update(change)
        samples[number] = {key: value for key, value in samples[number].items() if value is not None}
    write_tar(folder / "a.tar", samples)
    return folder


def test_bad_samples_are_counted_and_replaced(tmp_path, data_config, model_config):
    bad = {3: {"png": b"no image"}, 17: {"txt": None}, 31: {"txt": "  "}, 40: {"png": None}, 41: {"txt": b"\xff\xfe"}}
    folder = folder_with_bad_samples(tmp_path, bad)
    data = data_config.model_copy(update={"shards": str(folder), "max_bad_fraction": 0.2})
    manifest = manifest_of(data)
    assert manifest.shards[0].num_samples == 60
    worker = DataWorker(manifest, data, model_config, seed=5)
    blocks = [worker.block(lane, number) for lane in range(3) for number in range(5)]
    assert sum((block.refused for block in blocks), Counter()) == {
        "unreadable image": 1,
        "no caption": 1,
        "empty caption": 1,
        "no image": 1,
        "caption is not UTF-8": 1,
    }
    stood_in = [
        (own, key)
        for block in blocks
        for (_, _, own), key in zip(
            block.samples[block.replaced],
            [key for key, is_other in zip(block.keys, block.replaced, strict=True) if is_other],
            strict=True,
        )
    ]
    assert sorted(own for own, _ in stood_in) == sorted(bad)
    assert not {key for _, key in stood_in} & {f"sample{number:05d}" for number in bad}
    keys = {reason: key for block in blocks for reason, key in block.refused_keys.items()}
    assert keys["unreadable image"].endswith("a.tar sample00003")
    again = DataWorker(manifest, data, model_config, seed=5)
    for lane in (2, 1, 0):
        for number in range(5):
            np.testing.assert_array_equal(again.block(lane, number).images, blocks[lane * 5 + number].images)


def test_a_stand_in_is_drawn_with_the_numbers_of_the_refused_sample(tmp_path, data_config, model_config):
    folder = folder_with_bad_samples(tmp_path, {number: {"png": None} for number in (3, 17, 31)})
    data = data_config.model_copy(update={"shards": str(folder)})
    manifest, decoder = manifest_of(data), Decoder(data, 16)
    members = {sample.key: sample.members for sample in read_samples(manifest.shards[0], data)}
    worker, found = DataWorker(manifest, data, model_config, seed=5), Counter()
    for block in (worker.block(lane, number) for lane in range(3) for number in range(10)):
        for row in np.flatnonzero(block.replaced):
            epoch, shard, index = block.samples[row].tolist()
            expected = np.empty((16, 16, 3), np.uint8)
            decoder.decode_image(members[block.keys[row]], expected, sample_random(5, epoch, shard, index))
            np.testing.assert_array_equal(block.images[row], expected)
            found[epoch] += 1
    assert found == {0: 3, 1: 3}


def test_a_sample_with_doubled_members_stands_in_for_none(tmp_path, data_config, model_config):
    """Four of five samples have two texts each: which one belongs to the image is not known."""
    good = set()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(60):
            sample = drawn_sample(number)
            members = [("png", sample["png"]), ("txt", sample["txt"].encode())]
            if number % 5:
                members.append(("txt", b"another text"))
            else:
                good.add(sample["__key__"])
            for ending, content in members:
                info = tarfile.TarInfo(f"{sample['__key__']}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    data = data_config.model_copy(update={"shards": str(tmp_path)})
    worker = DataWorker(manifest_of(data), data, model_config, seed=5)
    blocks = [worker.block(lane, number) for lane in range(3) for number in range(5)]
    assert {key for block in blocks for key in block.keys} == good
    assert sum(block.refused["duplicate key"] for block in blocks) == 48
    assert sum(int(block.replaced.sum()) for block in blocks) == 48


def test_too_many_bad_samples_stop_the_run_with_the_reasons(tmp_path, data_config, model_config):
    bad = {number: {"png": b"no image"} for number in range(0, 60, 4)} | {2: {"txt": None}}
    data = data_config.model_copy(update={"shards": str(folder_with_bad_samples(tmp_path, bad))})
    with pytest.raises(DataError, match=r"more than data.max_bad_fraction 0.01") as error:
        batches(data, model_config, batch=12)
    assert "x unreadable image, first" in str(error.value)


def test_window_without_any_usable_sample(tmp_path, data_config, model_config):
    bad = {number: {"png": b"no image"} for number in range(60)}
    data = data_config.model_copy(update={"shards": str(folder_with_bad_samples(tmp_path, bad))})
    with pytest.raises(DataError, match="neighbouring samples is usable, among them .*a.tar key sample"):
        batches(data, model_config, batch=12)


def test_count_that_differs_from_the_manifest_is_named(tmp_path, data_config):
    path = write_tar(tmp_path / "a.tar", [drawn_sample(number) for number in range(40)])
    data = data_config.model_copy(update={"shards": str(path)})
    manifest = manifest_of(data)
    short = dataclasses.replace(manifest.shards[0], num_samples=41)
    with pytest.raises(DataError, match="40 samples read, 41 in the manifest"):
        list(read_samples(short, data_config))
