"""What an evaluation would find wrong with a held-out set is found by a few samples, and named by key and content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sigray.tuning.cli import main
from sigray.tuning.feasible import _check_sets
from sigray.workers.config import DataConfig, EvalConfig, EvalSet, StoresConfig
from sigray.workers.data.embedding_store import EmbeddingStore, StoreError
from sigray.workers.data.tar import DataError
from sigray.workers.evaluation import set_checks
from sigray.workers.evaluation.set_checks import check_sets
from tests.helpers.data import COLOURS, TOWERS, drawn_sample, write_dataset, write_small_run, write_tar
from tests.helpers.s3 import BUCKET

BROKEN = {"png": b"no image"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good shards; a tar of each kind of flaw; classes by name, by number, and too few."""
    folder = tmp_path_factory.mktemp("sets")
    write_dataset(folder / "good", [40, 40])
    samples = [drawn_sample(number) for number in range(40)]
    write_tar(folder / "broken.tar", [sample | BROKEN for sample in samples])
    write_tar(folder / "no_class.tar", [{key: sample[key] for key in ("__key__", "png", "txt")} for sample in samples])
    either = [{"__key__": f"{number}", **({"png": sample["png"]} if number % 2 else {"txt": "a"})}
              for number, sample in enumerate(samples)]  # fmt: skip
    write_tar(folder / "either.tar", either)
    # What evaluations count and leave out is no reason to refuse a set.
    (folder / "some").mkdir()
    write_tar(folder / "some" / "0.tar", [])
    write_tar(folder / "some" / "1.tar", [sample | (BROKEN if number else {}) for number, sample in enumerate(samples)])
    sorted_by_class = sorted(samples, key=lambda sample: json.loads(str(sample["json"]))["class"])
    for number in range(10):
        some = [sample | {"cls": list(COLOURS)[number // 3]} for sample in sorted_by_class[:40]]
        write_tar(folder / "sorted" / f"{number}.tar", [{k: v for k, v in one.items() if k != "json"} for one in some])
    for name, ids in {"classes": list(COLOURS), "few": ["red", "green", "blue"]}.items():
        (folder / f"{name}.json").write_text(json.dumps([{"id": one, "name": one} for one in ids]))
    (folder / "names.txt").write_text("\n".join(COLOURS))
    for colour in ("red", "pink"):
        (folder / "images" / colour).mkdir(parents=True)
        (folder / "images" / colour / "0.png").write_bytes(samples[0]["png"])  # type: ignore[arg-type]
        (folder / "broken" / colour).mkdir(parents=True)
        (folder / "broken" / colour / "0.png").write_bytes(b"no image")
    (folder / "cut.tar").write_bytes((folder / "good" / "shard-000.tar").read_bytes()[:3000])
    return folder


def check(
    folder: Path, data: dict[str, Any], *, store: str | None = None, only_here: bool = False, **spec: Any
) -> None:
    named = {key: str(folder / spec[key]) for key in ("shards", "linear_probe", "classes")
             if key in spec and not str(spec[key]).startswith(("s3://", "subfolders"))}  # fmt: skip
    sets = {"x": EvalSet(**{"shards": str(folder / "good"), **spec, **named})}
    check_sets(EvalConfig(sets=sets), DataConfig(**{"shards": "none", **data}), store, only_here=only_here)


HAVE = "json, json:class, json:number, png, txt"


@pytest.mark.parametrize(
    ("spec", "data", "message"),
    [
        ({"classes": "classes.json", "class_field": "kind"}, {},
         rf"^eval.sets.x.class_field=kind: no class in the first 32 samples of .*000.tar and 1 other.*: {HAVE}\. "),
        ({"classes": "classes.json", "shards": "no_class.tar"}, {},
         r"class_field=class: no class in the first 32 samples of .*/no_class.tar; samples have: png, txt"),
        ({"classes": "classes.json", "linear_probe": "no_class.tar"}, {},
         "class_field=class: no class .*/no_class.tar"),
        ({"linear_probe": "broken.tar", "classes": "classes.json"}, {},
         "data.image_keys=.*: unreadable image .*broken.tar"),
        ({"classes": "few.json"}, {}, "eval.sets.x: class 'black' of a sample is not in the classes file"),
        ({"classes": "names.txt"}, {}, "class 'black' .* nor are 3 other classes. The file's 4 ids begin with '0'"),
        ({"classes": "few.json", "shards": "sorted"}, {}, "class 'black' of a sample"),
        ({"classes": "none.json"}, {}, "eval classes .*none.json"),
        ({}, {"captions": {"json:text": 1.0}},
         f"^data.captions=json:text: no caption in .*: {HAVE}. .* eval.sets.x.retrieval"),
        ({"languages": ["de"]}, {}, "eval.sets.x.language_captions=json:captions.{language}.name: no caption"),
        ({}, {"image_keys": ["gif"]}, f"^data.image_keys=gif: no image in the first 32 samples of .*: {HAVE}"),
        ({"shards": "broken.tar"}, {}, "data.image_keys=jpg,jpeg,png,webp: unreadable image in the first 32 samples"),
        ({"shards": "either.tar"}, {}, "eval.sets.x: no usable sample among .* lacks something: 16 no image"),
        ({"shards": "cut.tar"}, {}, "eval.sets.x: shards that cannot be read, 1:\n.*cut.tar: cut short"),
        ({"shards": "gone.tar"}, {}, "eval.sets.x: shards that cannot be read, 1:\n.*gone.tar"),
        ({"shards": "some/0.tar"}, {}, "x: no usable sample among the first 0 .* no sample is there"),
        ({"shards": "images", "classes": "classes.json", "retrieval": False}, {}, "class 'pink' of a sample"),
        ({"shards": "broken", "classes": "subfolders", "retrieval": False}, {},
         "unreadable image in the first 2 .*/broken;"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_set_is_named(folder, spec, data, message):
    with pytest.raises(DataError, match=message):
        check(folder, data, **spec)


def test_sets_that_can_be_evaluated_pass(folder):
    for spec in [
        {},
        {"classes": "classes.json", "linear_probe": "some"},
        {"shards": "some"},  # an empty shard, and one with a single good sample
        {"shards": "no_class.tar"},
        {"shards": "sorted", "classes": "classes.json", "retrieval": False},
        {"shards": "images", "classes": "subfolders", "retrieval": False},
        {"languages": ["class", "xx"], "language_captions": "json:{language}"},
    ]:
        check(folder, {}, **spec)


def test_a_plan_checks_only_what_is_here(folder):
    for shards in ("gone.tar", "gone/{0..9}.tar", "s3://bucket/x.tar"):
        check(folder, {}, shards=shards, only_here=True)
    with pytest.raises(DataError, match="class_field=kind"):
        check(folder, {}, classes="classes.json", class_field="kind", only_here=True)


def test_a_store_must_hold_the_set(folder, tmp_path):
    with pytest.raises(StoreError, match=r"lacks .*shard-000.tar, .*shard-001.tar of eval.sets.x: run `sigray embed`"):
        check(folder, {}, store=EmbeddingStore(str(tmp_path)).uri)


def test_a_set_in_s3_is_read_by_its_first_bytes(folder, s3_variables, monkeypatch, tmp_path):
    import boto3

    for name, value in s3_variables.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").upload_file(str(folder / "broken.tar"), BUCKET, "sets/broken.tar")
    cached = {"stores": StoresConfig(), "shard_cache": str(tmp_path / "cache")}
    with pytest.raises(DataError, match=f"unreadable image in the first 32 samples of s3://{BUCKET}/sets/broken.tar"):
        check(folder, cached, shards=f"s3://{BUCKET}/sets/broken.tar")
    assert not (tmp_path / "cache").exists()


def test_every_command_names_it_before_ray_starts(folder, tmp_path, capsys, monkeypatch):
    sets = {"x": {"shards": str(folder / "good"), "classes": str(folder / "classes.json"), "class_field": "kind"}}
    train = {"num_samples": 640, "global_batch_size": 32}
    model = {"towers": TOWERS, "locked": ["visual"]}
    run = str(write_small_run(tmp_path, eval={"sets": sets}, train=train, model=model))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({
        "name": "tiny", "dir": str(tmp_path / "sweeps"), "base": run, "metric": "zero_shot.x.top1", "budget": 640,
        "space": {"optim.lr": {"grid": [1e-3, 1e-2]}},
    }))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    original, num_checks = set_checks._check_set, []
    monkeypatch.setattr(set_checks, "_check_set", lambda *given: num_checks.append(given) or original(*given))
    (tmp_path / "x.safetensors").write_bytes(b"")  # its tensors come later
    stored = ["embeddings.store=store", "model.init_from=x.safetensors"]
    for command in (["train", run], ["plan", run, "--device", "l4"], ["embed", run, *stored], ["sweep", "study.yaml"]):
        num_checks.clear()
        assert main(command) == 2
        assert "eval.sets.x.class_field=kind: no class in the first 32 samples" in capsys.readouterr().err
        assert len(num_checks) == (2 if command[0] == "sweep" else 1)  # each of two trials has its reason


def test_trials_with_the_same_sets_read_them_once(folder, monkeypatch):
    original, num_checks = set_checks._check_set, []
    monkeypatch.setattr(set_checks, "_check_set", lambda *given: num_checks.append(given) or original(*given))
    evaluation = EvalConfig(sets={"x": EvalSet(shards=str(folder / "good"))})
    for data in [DataConfig(shards="none")] * 3 + [DataConfig(shards="none", image_keys=["png"])]:
        _check_sets(evaluation.model_dump_json(), data.model_dump_json(), None)
    assert len(num_checks) == 2
