"""Views against their definition in the docs, each decoded by itself; and that the image is as it is without views."""

import dataclasses
import io
import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from sigray.workers.config import DataConfig, LabelNoise
from sigray.workers.data.buffers import Place, SharedBuffer
from sigray.workers.data.extras import Extras
from sigray.workers.data.label_noise import Noise
from sigray.workers.data.loader import Loader
from sigray.workers.data.manifest import read_samples
from sigray.workers.data.processes import ProcessBlocks
from sigray.workers.data.views import Pixels, Views, split
from sigray.workers.data.worker import DataWorker, build_order, image_kind
from tests.golden import definition
from tests.helpers.bare import OneWorker
from tests.helpers.batches import batches, manifest_of
from tests.helpers.data import write_tar

SEED = 5
PIXELS = Pixels(16, Views(num_local=3, local_size=7, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4)))
ALONE = Pixels(16)
BAD = {4: b"no image", 17: None}  # the images of two samples
BLOCKS = [(lane, number) for lane in range(2) for number in range(6)]  # two epochs


def encoded(number: int) -> bytes:
    """Noise, so that any other box shows: JPEG, PNG, or a JPEG that its EXIF orientation turns."""
    random = np.random.default_rng(number)
    image = Image.fromarray(random.integers(0, 256, (*random.integers(20, 60, 2), 3), np.uint8))
    turned, buffer = Image.Exif(), io.BytesIO()
    turned[0x0112] = 6
    image.save(buffer, "PNG" if number % 3 == 0 else "JPEG", exif=turned if number % 3 == 1 else Image.Exif())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("photos")
    samples = [
        {"__key__": f"{number:03d}", "png": BAD.get(number, encoded(number)), "txt": f"photo {number}"}
        for number in range(24)
    ]
    samples = [{key: value for key, value in sample.items() if value is not None} for sample in samples]
    write_tar(folder / "a.tar", samples[:10])
    write_tar(folder / "b.tar", samples[10:])
    return DataConfig(
        shards=str(folder), num_lanes=2, shuffle_window=8, block_size=4, crop_scale=(0.5, 1.0), max_bad_fraction=1.0
    )


@pytest.fixture
def worker(data, model_config) -> DataWorker:
    return DataWorker(manifest_of(data), data, model_config, seed=SEED)


def by_hand(content: bytes, place: tuple[int, int, int], data: DataConfig, pixels: Pixels) -> np.ndarray:
    """The row of a sample by docs/data.md: each part from the encoded image, by Pillow and torchvision."""
    views = pixels.views
    wanted = [
        ("crop", data.crop_scale, pixels.image_size),
        ("global view", views.global_scale, pixels.image_size),
        *((f"local view {number}", views.local_scale, views.local_size) for number in range(views.num_local)),
    ]
    row = b""
    for purpose, scale, size in wanted:
        decoded = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
        numbers = definition.uniforms(SEED, place, purpose)
        box = definition.crop_box(*decoded.shape[:2], scale, data.crop_ratio, numbers)
        part = tv.resized_crop(
            torch.from_numpy(decoded).permute(2, 0, 1),
            *box,
            size=[size, size],
            interpolation=InterpolationMode.BICUBIC,
            antialias=True,
        )
        row += part.permute(1, 2, 0).numpy().tobytes()
    return np.frombuffer(row, np.uint8)


def contents_of(data) -> dict[str, bytes]:
    """Encoded images by key."""
    manifest = manifest_of(data)
    return {
        sample.key: bytes(sample.members.get("png", b""))
        for shard in manifest.shards
        for sample in read_samples(shard, data)
    }


def test_a_row_is_its_parts_decoded_one_by_one(data, worker):
    """A replaced row too: its numbers are those of the refused sample."""
    contents = contents_of(data)
    replaced = Counter()
    for place in BLOCKS:
        block = worker.block(*place, (), PIXELS)
        assert block.images.shape == (4, PIXELS.num_bytes)
        for row, key, ref in zip(block.images, block.keys, block.samples.tolist(), strict=True):
            np.testing.assert_array_equal(row, by_hand(contents[key], tuple(ref), data, PIXELS))
        replaced.update(ref[0] for ref in block.samples[block.replaced].tolist())
    assert replaced == {0: 2, 1: 2}


@pytest.mark.parametrize("crop", ["center", "random"])
def test_views_leave_the_rest_of_a_block_as_it_is(data, model_config, crop):
    data = data.model_copy(update={"crop": crop})
    manifest = manifest_of(data)
    worker, alone = (DataWorker(manifest, data, model_config, seed=SEED) for _ in range(2))
    for place in BLOCKS:
        found, expected = worker.block(*place, (), PIXELS), alone.block(*place)
        np.testing.assert_array_equal(split(found.images, PIXELS)[0], expected.images)
        for name in ("tokens", "samples", "replaced", "keys", "refused"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_views_are_drawn_anew_in_each_epoch(data, model_config):
    """Also with the centre for an image, which is kept decoded, and no two views have one box."""
    data = data.model_copy(update={"crop": "center"})
    worker = DataWorker(manifest_of(data), data, model_config, seed=SEED)
    images, views = Counter(), Counter()
    for block in (worker.block(*place, (), PIXELS) for place in BLOCKS):
        parts = split(block.images[~block.replaced], PIXELS)
        images.update(image.tobytes() for image in parts[0])
        views.update(view.tobytes() for part in (parts[1], parts[2].reshape(-1, 7, 7, 3)) for view in part)
    assert [*images.values()] == [2] * 22
    assert [*views.values()] == [1] * 2 * 22 * 4


@pytest.mark.parametrize("changes", [{}, {"shared_blocks": 9}])
def test_any_worker_gives_the_same_views_in_any_order(data, model_config, worker, changes):
    """After requests for other pixels too, as those of another phase: kept blocks are those of their pixels."""
    other_views = dataclasses.replace(PIXELS, views=dataclasses.replace(PIXELS.views, local_scale=(0.2, 0.3)))
    all_pixels = [None, PIXELS, ALONE, other_views, Pixels(24, PIXELS.views)]
    expected = {
        (place, pixels): DataWorker(worker._manifest, data, model_config, seed=SEED).block(*place, (), pixels).images
        for place, pixels in itertools.product(BLOCKS[::4], all_pixels)
    }
    assert expected[BLOCKS[0], PIXELS].tobytes() != expected[BLOCKS[0], other_views].tobytes()
    worker = DataWorker(worker._manifest, data.model_copy(update=changes), model_config, seed=SEED)
    for place, pixels in [*reversed(expected), *expected]:
        images = worker.block(*place, (), pixels).images
        np.testing.assert_array_equal(images, expected[place, pixels])
        assert images.shape[1:] == image_kind(worker._manifest, model_config, pixels).shape
    if changes:  # None and ALONE are the same
        assert worker.num_decoded == 4 * 4 * len(BLOCKS[::4])


def test_views_are_written_to_the_places_of_a_request(worker):
    expected = worker.block(1, 2, (), PIXELS).images
    buffer = SharedBuffer((9, *PIXELS.shape), np.dtype(np.uint8))
    places = [Place(buffer.address, row=6, first=0, count=3), Place(buffer.address, row=1, first=3, count=1)]
    assert worker.block(1, 2, places, PIXELS).images.shape == (0, PIXELS.num_bytes)
    np.testing.assert_array_equal(buffer.array[[6, 7, 8, 1]], expected)
    assert not buffer.array[[0, *range(2, 6)]].any()


def by_value(worker, shares_memory):
    return OneWorker(worker)


def test_batches_have_the_same_views_on_any_number_of_ranks(data, model_config, worker):
    """Written in place or not; the worker of a phase without views goes on with views, from any step."""
    arguments = {"batch": 6, "last": 8, "worker": worker}
    before = batches(data, model_config, pixels=ALONE, **arguments)
    whole = batches(data, model_config, pixels=PIXELS, **arguments)
    assert [batch.images.shape for batch in whole] == [(6, PIXELS.num_bytes)] * 8
    for want, got in zip(before, whole, strict=True):
        assert torch.equal(split(got.images, PIXELS)[0], want.images)
        assert torch.equal(got.tokens, want.tokens)
    parts = [
        batches(data, model_config, pixels=PIXELS, rank=rank, world_size=2, first=3, source=source, **arguments)
        for rank, source in enumerate((OneWorker, by_value))
    ]
    for want, *own in zip(whole[3:], *parts, strict=True):
        assert torch.equal(torch.cat([part.images for part in own]), want.images)


def test_noise_replaces_the_image_as_without_views_and_the_views(data, model_config, worker):
    noise = Noise(LabelNoise(kind="image", fraction=0.5), SEED, 49408, 0)
    kinds = [{"noise": noise, "pixels": ALONE}, {"noise": noise, "pixels": PIXELS}, {"pixels": PIXELS}]
    before, noisy, clean = (batches(data, model_config, batch=12, last=4, worker=worker, **kind) for kind in kinds)
    changed = Counter()
    for alone, got, untouched in zip(before, noisy, clean, strict=True):
        assert torch.equal(split(got.images, PIXELS)[0], alone.images)
        differs = [(got.images[row] != untouched.images[row]).float().mean().item() > 0.9 for row in range(12)]
        parts = zip(split(got.images, PIXELS)[1:], split(untouched.images, PIXELS)[1:], strict=True)
        for part, other in parts:  # both or none of a row's views
            assert [(part[row] != other[row]).float().mean().item() > 0.9 for row in range(12)] == differs
            assert [torch.equal(part[row], other[row]) for row in range(12)] == [not each for each in differs]
        changed.update(differs)
    assert changed[True] == pytest.approx(24, abs=8)  # two standard deviations


def test_parts_of_rows_are_views_of_their_memory():
    rows = torch.arange(2 * PIXELS.num_bytes).reshape(2, -1)
    images, global_views, local_views = split(rows, PIXELS)
    assert (images.shape, global_views.shape) == ((2, 16, 16, 3), (2, 16, 16, 3))
    assert local_views.shape == (2, 3, 7, 7, 3)
    parts = [images.flatten(1), global_views.flatten(1), local_views.flatten(1)]
    assert torch.equal(torch.cat(parts, dim=1), rows)
    assert {part.untyped_storage().data_ptr() for part in (images, global_views, local_views)} == {
        rows.untyped_storage().data_ptr()
    }
    with pytest.raises(AssertionError):
        split(rows[:, 1:], PIXELS)
    with pytest.raises(AssertionError):
        split(rows, ALONE)


def test_a_process_decodes_the_pixels_of_a_request(data, model_config, worker):
    blocks = ProcessBlocks(pickle.dumps(((worker._manifest, data, model_config), {"seed": SEED})), 1, timeout_s=300)
    try:
        handles = [blocks.request(0, 1, (), pixels) for pixels in (PIXELS, None)]
        for pixels, handle in zip((PIXELS, None), handles, strict=True):
            found, expected = blocks.wait(0, 1, handle), worker.block(0, 1, (), pixels)
            np.testing.assert_array_equal(found.images, expected.images)
    finally:
        blocks.close()


def test_extras_and_stores_of_embeddings_have_no_views(data, model_config, worker):
    extended = DataWorker(worker._manifest, data, model_config, seed=SEED, extras=Extras())
    assert len(extended.block(0, 0, (), ALONE).images) == 4
    for _ in range(2):
        with pytest.raises(AssertionError, match="extras take images without views"):
            extended.block(0, 0, (), PIXELS)
    with pytest.raises(AssertionError, match="the store has embeddings, and no pixels"):
        image_kind(dataclasses.replace(worker._manifest, store={}), model_config, PIXELS)


def test_a_loader_takes_no_other_shape_than_that_of_its_pixels(data, model_config, worker):
    with pytest.raises(AssertionError, match="num_local=3"):
        Loader(
            build_order(worker._manifest, data, SEED),
            OneWorker(worker),
            data,
            image_kind=image_kind(worker._manifest, model_config),
            pixels=PIXELS,
            global_batch_size=6,
            rank=0,
            world_size=1,
            first_step=0,
            last_step=1,
        )
