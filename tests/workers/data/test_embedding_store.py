"""The embedding store: its bytes, what it refuses, and that training from it is training with the live tower."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sigray.orchestrator.config import ConfigError, load_config
from sigray.orchestrator.run.preflight import check_store
from sigray.workers.config import DataConfig, EmbeddingsConfig, EvalConfig, EvalSet, ModelConfig
from sigray.workers.data.decode import Decoder, Refused
from sigray.workers.data.embed import _view_random
from sigray.workers.data.embedding_store import (
    EmbeddingReader,
    EmbeddingStore,
    StoredShard,
    StoreError,
    StoreFormat,
    read_embeddings,
    store_key,
    stored_name,
)
from sigray.workers.data.loader import Loader
from sigray.workers.data.manifest import Manifest, scan_shards
from sigray.workers.data.worker import DataWorker, build_order, image_kind
from sigray.workers.evaluation.evaluate import evaluate_checkpoint
from sigray.workers.evaluation.features import EvaluationJob
from sigray.workers.model.image_towers import OnnxTower, load_image_tower, tower_sha256
from sigray.workers.model.towers import normalize_pixels
from tests.helpers.bare import OneWorker, train_bare
from tests.helpers.data import TOWERS, drawn_sample, encode_image, write_tar
from tests.helpers.stored import KINDS
from tests.helpers.stores import make_store, make_tower

SIZES = [24, 7, 32, 13]
BROKEN = 11  # a sample whose image cannot be read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training shards with a broken image, a held-out shard and its classes."""
    folder, number = tmp_path_factory.mktemp("store"), 0
    for shard, size in enumerate(SIZES):
        samples = [drawn_sample(number + index) for index in range(size)]
        if shard == 0:
            samples[BROKEN]["png"] = b"no image"
        write_tar(folder / "train" / f"shard-{shard}.tar", samples)
        number += size
    write_tar(folder / "held_out" / "shard-0.tar", [drawn_sample(1000 + index) for index in range(9)])
    classes = [{"id": name, "name": f"{name} field"} for name in ("red", "green", "blue", "black")]
    (folder / "classes.json").write_text(json.dumps(classes))
    return folder


@pytest.fixture
def data(folder: Path) -> DataConfig:
    return DataConfig(
        shards=str(folder / "train"), num_lanes=3, shuffle_window=10, block_size=4, crop="center", max_bad_fraction=1
    )


@pytest.fixture
def model() -> ModelConfig:
    return ModelConfig(towers=TOWERS, image_tower="tests.helpers.stores:make_tower", locked=["visual"])


def batches(manifest: Manifest, data: DataConfig, model: ModelConfig, first: int = 0, last: int = 14) -> list:
    return list(
        Loader(
            build_order(manifest, data, 5),
            OneWorker(DataWorker(manifest, data, model, seed=5)),
            data.model_copy(update={"prefetch_batches": 2}),
            image_kind=image_kind(manifest, model),
            global_batch_size=12,
            rank=0,
            world_size=1,
            first_step=first,
            last_step=last,
        )
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-6), ("fp16", 1e-3), ("bf16", 8e-3)])
def test_batches_are_those_of_the_live_tower(data, model, tmp_path, dtype, tolerance):
    """Same samples, captions, replacements; the images' embeddings within the rounding of the dtype."""
    source = scan_shards(data.shards, data)
    stored = make_store(tmp_path, data, model, dtype=dtype).manifest(source, data)
    assert [shard.num_samples for shard in stored.shards] == SIZES
    live, tower = batches(source, data, model), make_tower()
    from_store = batches(stored, data, model)
    assert any(batch.replaced.any() for batch in live)
    for want, got in zip(live, from_store, strict=True):
        assert got.keys == want.keys
        np.testing.assert_array_equal(got.samples, want.samples)
        np.testing.assert_array_equal(got.replaced, want.replaced)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        with torch.no_grad():
            features = nn.functional.normalize(tower(normalize_pixels(want.images, model)), dim=-1)
        torch.testing.assert_close(got.images.float(), features, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_at_every_step(data, model, new_place, kind):
    stored = make_store(new_place(kind), data, model).manifest(scan_shards(data.shards, data), data)
    whole = batches(stored, data, model)
    assert len(whole) == 14
    for first in range(1, len(whole)) if kind == "local" else (5, 13):
        for want, got in zip(whole[first:], batches(stored, data, model, first=first), strict=True):
            assert torch.equal(got.images, want.images)
            assert torch.equal(got.tokens, want.tokens)


def test_views_are_crops_and_each_epoch_draws_one(data, model, tmp_path):
    rng = np.random.default_rng(0)
    pictures = {f"noise{n}": encode_image(rng.integers(0, 256, (24, 24, 3), np.uint8)) for n in range(24)}
    write_tar(tmp_path / "0.tar", [{"__key__": key, "png": png, "txt": key} for key, png in pictures.items()])
    data = data.model_copy(update={"shards": str(tmp_path), "crop": "random", "crop_scale": (0.3, 0.9)})
    stored = make_store(tmp_path / "store", data, model, str(tmp_path / "0.tar"), dtype="fp32", num_views=3)
    manifest = stored.manifest(scan_shards(data.shards, data), data)
    tower, decoder, views = make_tower(), Decoder(data, 16), {}
    for key, png in pictures.items():
        images = np.empty((3, 16, 16, 3), np.uint8)
        for view in range(3):
            decoder.decode_image({"png": png}, images[view], _view_random(key, view))
        with torch.no_grad():
            views[key] = nn.functional.normalize(tower(normalize_pixels(torch.from_numpy(images), model)), dim=-1)
    (shard,) = scan_shards(data.shards, data).shards
    assert sum(row is not None for row in read_embeddings(stored, shard, data)) == 24  # one view of each, of the centre
    drawn: dict[str, set[int]] = {key: set() for key in pictures}
    for batch in batches(manifest, data, model, last=2 * 12):  # twelve epochs
        for key, row in zip(batch.keys, batch.images, strict=True):
            distances = (views[key] - row).abs().amax(dim=1)
            assert distances.min() < 1e-6
            drawn[key].add(int(distances.argmin()))
    assert all(len(found) > 1 for found in drawn.values())
    assert set.union(*drawn.values()) == {0, 1, 2}


def config_of(folder: Path, tmp_path: Path, *overrides: str):
    import yaml

    content = {
        "run": {"name": "small", "dir": str(tmp_path), "seed": 5},
        "data": {
            "shards": str(folder / "train"),
            "num_lanes": 3,
            "shuffle_window": 10,
            "block_size": 4,
            "crop": "center",
            "max_bad_fraction": 1,
        },
        "model": {"towers": TOWERS, "image_tower": "tests.helpers.stores:make_tower", "locked": ["visual"]},
        "train": {"num_samples": 12 * 30, "global_batch_size": 12, "log_every_steps": 1},
        "embeddings": {"store": str(tmp_path / "store"), "dtype": "fp32"},
        "optim": {"lr": 1e-2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_config(path, list(overrides))


def test_losses_and_figures_are_those_of_the_live_tower(folder, tmp_path, data, model):
    """A run with the tower in every step, and one from its embeddings: losses, text tower, evaluation."""
    make_store(tmp_path / "store", data, model, str(folder / "held_out"), dtype="fp32")
    spec = EvalSet(shards=str(folder / "held_out"), classes=str(folder / "classes.json"))
    losses, figures, visual = {}, {}, {}
    for name, store in (("live", "null"), ("stored", str(tmp_path / "store"))):
        config = config_of(folder, tmp_path, f"run.name={name}", f"embeddings.store={store}")
        done = train_bare(0, 1, config)
        losses[name] = list(done["losses"].values())
        from sigray.workers.checkpoint.index import list_checkpoints
        from sigray.workers.storage import Storage

        info = list_checkpoints(Storage(config.storage_uri))[-1]
        figures[name] = evaluate_checkpoint(
            EvaluationJob(
                config.storage_uri, info, config.model, data, EvalConfig(sets={"held": spec}), config.embeddings
            )
        )
        if name == "stored":  # the same checkpoint with the live tower: its weights come with the config
            live = evaluate_checkpoint(
                EvaluationJob(
                    config.storage_uri, info, config.model, data, EvalConfig(sets={"held": spec}), EmbeddingsConfig()
                )
            )
            assert live["zero_shot"] == figures[name]["zero_shot"]
            assert live["retrieval"] == figures[name]["retrieval"]
        weights = Storage(config.storage_uri).read(f"checkpoints/{info.name}/model.safetensors")
        visual[name] = b"visual." in weights[:10000]
    assert len(losses["live"]) == 30
    np.testing.assert_allclose(losses["stored"], losses["live"], rtol=2e-5)
    assert losses["live"][-1] < losses["live"][0]
    assert figures["stored"]["zero_shot"] == figures["live"]["zero_shot"]
    assert visual == {"live": True, "stored": False}


def test_other_tools_read_it(data, model, tmp_path):
    import webdataset
    from safetensors.torch import load

    store = make_store(tmp_path, data, model, dtype="bf16")
    source = scan_shards(data.shards, data)
    url = store.url("train", stored_name(source.shards[0]))
    samples = list(webdataset.WebDataset(url, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"sample{n:05d}" for n in range(SIZES[0])]
    assert samples[0]["txt"] == b"red field number 0"
    rows = load(samples[0]["embedding.safetensors"])["embedding"]
    assert rows.shape == (1, 16)
    assert rows.dtype == torch.bfloat16
    assert rows.float().norm() == pytest.approx(1, abs=1e-2)
    assert samples[BROKEN]["refused.txt"] == b"unreadable image"


@pytest.mark.parametrize("kind", KINDS)
def test_made_again_it_is_the_same_bit_for_bit(data, model, new_place, kind):
    stores = [make_store(new_place(kind), data, model) for _ in range(2)]
    names = stores[0].complete("train").keys()
    assert len(names) == len(SIZES)
    for name in names:
        for ending in ("tar", "json"):
            one, other = (store.storage.read(f"train/{name}.{ending}") for store in stores)
            assert one == other


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
@pytest.mark.parametrize(("num_views", "dim"), [(1, 16), (3, 768), (128, 1280)])
def test_a_member_begins_as_safetensors_own_files_do(name, dtype, num_views, dim):
    from safetensors.torch import save

    rows = torch.zeros(num_views, dim, dtype=dtype)
    store_format = StoreFormat(name, dim, num_views)
    assert store_format.prefix() + bytes(store_format.num_bytes) == save({"embedding": rows})


def test_what_cannot_be_read_is_refused():
    store_format = StoreFormat("fp16", 4, 2)
    reader = EmbeddingReader(store_format)
    rows = torch.arange(8, dtype=torch.float16).reshape(2, 4)
    content = store_format.prefix() + rows.numpy().tobytes()
    assert reader.read({"embedding.safetensors": memoryview(content)}, 1).tolist() == [4, 5, 6, 7]
    for members, reason in [
        ({}, "no embedding"),
        ({"refused.txt": b"image too large"}, "image too large"),
        ({"refused.txt": b"reason of its own " * 9}, "unreadable embedding"),
        ({"embedding.safetensors": content[:-1]}, "unreadable embedding"),
        ({"embedding.safetensors": content + b"\0"}, "unreadable embedding"),
        ({"embedding.safetensors": content.replace(b"F16", b"I16")}, "unreadable embedding"),
        ({"embedding.safetensors": content.replace(b"[2,4]", b"[4,2]")}, "unreadable embedding"),
    ]:
        with pytest.raises(Refused, match=reason):
            reader.read(members, 0)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("data", {"crop_scale": (0.5, 1.0)}),
        ("data", {"crop_ratio": (0.5, 2.0)}),
        ("data", {"crop": "center"}),
        ("data", {"max_image_pixels": 1000}),
        ("data", {"image_keys": ["png"]}),
        ("data", {"captions": {"cls": 1.0}}),
        ("model", {"image_mean": (0.1, 0.5, 0.5)}),
        ("model", {"image_std": (0.1, 0.5, 0.5)}),
        ("embeddings", {"dtype": "fp32"}),
        ("embeddings", {"num_views": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_stores_key_holds_whatever_changes_its_numbers(section, change):
    configs = {
        "data": DataConfig(shards="tars", crop="random", crop_scale=(0.9, 1.0)),
        "model": ModelConfig(towers=TOWERS),
        "embeddings": EmbeddingsConfig(store="store", num_views=2),
    }
    before = store_key(**configs, sha256="a", precision="fp32")
    configs[section] = configs[section].model_copy(update=change)
    assert store_key(**configs, sha256="a", precision="fp32") != before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["data.crop=random"], "crop: the store has 'center', this config 'random'"),
        (["train.precision=bf16"], "precision: the store has 'fp32', this config 'bf16'"),
        (["embeddings.dtype=fp16"], "dtype: the store has 'fp32', this config 'fp16'"),
        (["model.image_mean=[0.1,0.5,0.5]"], "image_mean: the store has [0.5, 0.5, 0.5]"),
        (["model.towers.vision_cfg.image_size=24"], "image_size: the store has 16, this config 24"),
        (["data.captions={txt: 1, cls: 1}"], "members: the store has ['json', 'txt']"),
        (["model.image_tower=tests.helpers.stores:other_tower"], "tower_sha256"),
    ],
)
def test_a_store_of_something_else_is_refused(folder, tmp_path, data, model, change, named):
    make_store(tmp_path / "store", data, model, dtype="fp32")
    check_store(config_of(folder, tmp_path))
    with pytest.raises(StoreError) as error:
        check_store(config_of(folder, tmp_path, *change))
    assert named in str(error.value)
    assert "sigray embed" in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_headers_of_a_store_are_read_as_the_caller_asks(data, model, new_place, kind):
    source, files = scan_shards(data.shards, data), []
    store = make_store(new_place(kind), data, model)
    store.manifest(source, data, lambda function, items: (files.extend(items), map(function, items))[1])
    assert [file.url for file in files] == [store.url("train", stored_name(shard)) for shard in source.shards]


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_that_does_not_fit_the_data_is_refused(data, model, tmp_path, new_place, kind):
    place = new_place(kind)
    (tmp_path / "shards").mkdir()
    for number in range(3):
        write_tar(tmp_path / "shards" / f"{number}.tar", [drawn_sample(10 * number + index) for index in range(5)])
    data = data.model_copy(update={"shards": str(tmp_path / "shards")})
    with pytest.raises(StoreError, match="holds no store yet: make it with `sigray embed`"):
        EmbeddingStore(place).format()
    store = make_store(place, data, model)
    store.manifest(scan_shards(data.shards, data), data)
    write_tar(tmp_path / "shards" / "1.tar", [drawn_sample(50 + index) for index in range(5)])
    write_tar(tmp_path / "shards" / "9.tar", [drawn_sample(70 + index) for index in range(5)])
    source = scan_shards(data.shards, data)
    with pytest.raises(StoreError, match=r"lacks 2 of 4 shards, .*1\.tar first"):
        store.manifest(source, data)
    store = make_store(place, data, model)  # only those two are new
    assert len(store.complete("train")) == 5
    name = stored_name(source.shards[2])
    content = store.storage.read(f"train/{name}.tar")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        samples = [member for member in tar.getmembers() if member.name.startswith("sample00020")]
    store.storage.write(f"train/{name}.tar", content[samples[-1].offset_data + 512 :])
    with pytest.raises(StoreError, match=r"holds 4 samples, .*2\.tar 5: delete both files"):
        store.manifest(source, data)
    store.storage.delete(f"train/{name}.tar")
    with pytest.raises(ValueError, match="shards that cannot be read, 1"):
        store.manifest(source, data)
    index = json.loads(store.storage.read("store.json"))
    store.storage.write("store.json", json.dumps(index | {"version": 0}).encode())
    with pytest.raises(StoreError, match="is of version 0, this sigray reads 1"):
        store.format()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.locked=[]"], r"needs a locked image tower: set model.locked=\[visual\]"),
        (["embeddings.num_views=2"], "would store a view many times: set data.crop=random"),
        (["train.label_noise={kind: image, fraction: 0.1}"], "embeddings.store holds none: text or alignment"),
        (["model.image_tower=tower.pt", "model.locked=[]", "embeddings.store=null"], "is a file and cannot be trained"),
    ],
)
def test_configs_that_cannot_work(folder, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        config_of(folder, tmp_path, *overrides)


def test_towers_from_files(tmp_path):
    tower, images = make_tower().eval(), torch.randn(3, 3, 16, 16)
    torch.jit.script(tower).save(str(tmp_path / "tower.pt"))
    loaded = load_image_tower(str(tmp_path / "tower.pt"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), tower(images))
    with pytest.raises(ValueError, match=r"there is no file .*missing.pt"):
        load_image_tower(str(tmp_path / "missing.pt"))
    (tmp_path / "text.pt").write_text("no tower")
    with pytest.raises(ValueError, match="text.pt is not a TorchScript file"):
        load_image_tower(str(tmp_path / "text.pt"))
    for name, reason in [
        ("tests.helpers.stores", "is neither package.module:function nor a file"),
        ("tests.workers.nowhere:tower", "No module named"),
        ("tests.helpers.stores:nothing", "has no attribute"),
        ("sigray.workers.data.embedding_store:StoredShard", "missing 7 required"),
        ("tests.helpers.stores:dict", "has no attribute 'dict'"),
        ("builtins:dict", "gave a dict, a torch.nn.Module expected"),
    ]:
        with pytest.raises(ValueError, match=reason):
            load_image_tower(name)


def test_a_tower_from_an_onnx_file(tmp_path):
    pytest.importorskip("onnx", reason="needs onnx and onnxruntime (the export extra)")
    pytest.importorskip("onnxruntime", reason="needs onnx and onnxruntime (the export extra)")
    tower, images, path = make_tower().eval(), torch.randn(3, 3, 16, 16), str(tmp_path / "tower.onnx")
    torch.onnx.export(tower, (images,), path, input_names=["images"], dynamic_axes={"images": {0: "b"}}, dynamo=False)
    loaded = load_image_tower(path)
    assert isinstance(loaded, OnnxTower)
    torch.testing.assert_close(loaded(images[:2]), tower(images[:2]).detach(), atol=1e-5, rtol=1e-5)
    assert tower_sha256(loaded) == tower_sha256(load_image_tower(path))


def test_a_samples_captions_are_kept(data, model, tmp_path):
    """Of the members only those that captions and classes stand in."""
    store = make_store(tmp_path, data, model)
    stored = store.manifest(scan_shards(data.shards, data), data)
    worker = DataWorker(stored, data.model_copy(update={"captions": {"json:class": 1.0}}), model, seed=0)
    assert worker.block(0, 0).tokens.any()
    assert isinstance(next(iter(store.complete("train").values())), StoredShard)
