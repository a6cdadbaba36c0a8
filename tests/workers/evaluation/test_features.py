"""An evaluation by several workers is that by one, whatever dies; a folder of images is read as its tar."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sigray.workers.checkpoint.index import CheckpointInfo, list_checkpoints
from sigray.workers.checkpoint.writer import CheckpointWriter
from sigray.workers.config import (
    CheckpointConfig,
    DataConfig,
    EmbeddingsConfig,
    EvalConfig,
    EvalSet,
    ModelConfig,
    OptimConfig,
)
from sigray.workers.data.tar import DataError
from sigray.workers.evaluation import features
from sigray.workers.evaluation.datasets import (
    ImageFile,
    Part,
    check_set,
    classes_of,
    cut,
    list_images,
    load_set,
    read_classes,
)
from sigray.workers.evaluation.evaluate import class_labels, evaluate_checkpoint
from sigray.workers.evaluation.features import EvaluationJob, WorkerGroup
from sigray.workers.model.towers import build_model
from sigray.workers.storage import Storage
from sigray.workers.training.optim import build_optimizer
from tests.helpers.data import COLOURS, TOWERS, drawn_sample, write_tar
from tests.helpers.stores import make_store

BROKEN = 5  # a held-out sample whose image cannot be read
LIVE = ModelConfig(towers=TOWERS, decoder={"layers": 1})
LOCKED = ModelConfig(towers=TOWERS, image_tower="tests.helpers.stores:make_tower", locked=["visual"])
NAMES = {"red": "rot", "green": "gruen", "blue": "blau", "black": "schwarz"}


def sample(number: int) -> dict[str, bytes | str]:
    """As `drawn_sample`, its name in two languages; every third lacks the German one."""
    colour = list(COLOURS)[number % len(COLOURS)]
    captions = {"en": {"name": colour}} | ({"de": {"name": NAMES[colour]}} if number % 3 else {})
    return drawn_sample(number) | {"json": json.dumps({"class": colour, "captions": captions})}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out shards of 26 and 13 samples, one of 50 to fit a probe on, classes."""
    folder = tmp_path_factory.mktemp("features")
    samples = [sample(number) for number in range(39)]
    samples[BROKEN]["png"] = b"no image"
    write_tar(folder / "held_out" / "0.tar", samples[:26])
    write_tar(folder / "held_out" / "1.tar", samples[26:])
    write_tar(folder / "fit" / "0.tar", [sample(100 + number) for number in range(50)])
    (folder / "classes.json").write_text(json.dumps([{"id": name, "name": f"{name} field"} for name in COLOURS]))
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, CheckpointInfo]]:
    """Of fresh towers, and of fresh text towers for a store."""
    made = {}
    for name, model in {"live": LIVE, "stored": LOCKED}.items():
        torch.manual_seed(0)
        module = build_model(model, stored_embeddings=name == "stored")
        if model.decoder is not None:
            torch.nn.init.normal_(module.decoder.head.weight)
        storage = Storage(tmp_path_factory.mktemp(name))
        optimizer = build_optimizer(module, OptimConfig(), {})
        writer = CheckpointWriter(
            storage, module, optimizer, CheckpointConfig(), model.model_dump(mode="json"), warn=pytest.fail
        )
        writer.save(1, 1)
        writer.close()
        made[name] = storage.uri, list_checkpoints(storage)[0]
    return made


@pytest.fixture(scope="module")
def store(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingsConfig:
    uri = tmp_path_factory.mktemp("embeddings")
    for part in ("held_out", "fit"):
        make_store(uri, data_of(folder), LOCKED, str(folder / part), dtype="fp32")
    return EmbeddingsConfig(store=str(uri), dtype="fp32")


def data_of(folder: Path) -> DataConfig:
    return DataConfig(shards=str(folder / "fit"), crop="center")


def everything(folder: Path, **settings: Any) -> EvalConfig:
    spec = EvalSet(
        shards=str(folder / "held_out"),
        classes=str(folder / "classes.json"),
        templates=["a {}", "{}, drawn"],
        linear_probe=str(folder / "fit"),
        languages=["en", "de"],
    )
    return EvalConfig(sets={"a": spec}, batch_size=4, num_sheet_images=7, **settings)


class Watched:
    """Makes evaluations wait for their first workers, so that each gets parts; counts, keeps and disturbs.

    Attributes:
        num_here: image parts that this process computed.
        num_starts: of other workers.
        features: of each set that was read.
        disturb: called before an image part is computed here, with its number and the pid of another worker.
        also: called with the workers after each set.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begin()
        look, start, images = WorkerGroup._add_started, WorkerGroup._start, WorkerGroup.images

        def wait_and_look(workers: WorkerGroup) -> None:
            if "images" not in vars(workers._here):  # on the worker of this process alone: Ray sends the class as it is
                import ray

                workers._here.images = partial(self._images, workers, workers._here.images)
                if workers._starting:
                    ray.wait(list(workers._starting), num_returns=len(workers._starting), timeout=300)
            look(workers)

        def count_start(workers: WorkerGroup) -> None:
            self.num_starts += 1
            start(workers)

        def keep_features(workers: WorkerGroup, *arguments: Any, **settings: Any) -> Any:
            found = images(workers, *arguments, **settings)
            self.features.append(found.features)
            self.also(workers)
            return found

        monkeypatch.setattr(WorkerGroup, "_add_started", wait_and_look)
        monkeypatch.setattr(WorkerGroup, "_start", count_start)
        monkeypatch.setattr(WorkerGroup, "images", keep_features)

    def begin(self, disturb: Callable[[int, int], None] | None = None) -> None:
        self.num_here, self.num_starts, self.disturb = 0, 0, disturb
        self.features: list[torch.Tensor] = []
        self.also: Callable[[WorkerGroup], None] = lambda workers: None

    def _images(self, workers: WorkerGroup, images: Callable[..., Any], *arguments: Any) -> Any:
        self.num_here += 1
        if self.disturb is not None:
            if self.num_here == 1:
                import ray

                self._pid = ray.get(workers._helpers[0].pid.remote())
            self.disturb(self.num_here, self._pid)
        return images(*arguments)


def stop(number: int, pid: int) -> None:
    if number == 1:
        os.kill(pid, signal.SIGSTOP)


def stop_and_kill(number: int, pid: int) -> None:
    """What it is given between the two is lost."""
    stop(number, pid)
    if number == 3:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["live", "stored"])
def test_figures_are_the_same_with_any_number_of_workers(
    name, folder, checkpoints, store, ray_driver, monkeypatch, tmp_path
):
    """From the live tower, one of three workers is killed; from the store, one of two stops for good."""
    watched, data = Watched(monkeypatch), data_of(folder)
    model, embeddings = {"live": (LIVE, EmbeddingsConfig()), "stored": (LOCKED, store)}[name]
    num_parts = 7 + 4 + 13  # of 26, 13 and 50 samples, in fours

    def evaluate(num_workers: int) -> dict[str, Any]:
        evaluation = everything(folder, num_workers=num_workers)
        captions = model.decoder is not None
        return evaluate_checkpoint(
            EvaluationJob(*checkpoints[name], model, data, evaluation, embeddings, captions=captions)
        )

    watched.begin()
    alone, features_alone = evaluate(1), watched.features
    assert (watched.num_here, watched.num_starts) == (num_parts, 0)
    assert alone["zero_shot"]["a"]["num_refused"] == alone["retrieval"]["a"]["num_refused"] == 1
    assert alone["linear_probe"]["a"]["num_fit"] == 50
    assert alone["languages"]["a"].keys() == {"en", "de"}
    assert len(alone["sheets"]["a"]) == 6  # of seven, one is broken
    written = {entry["caption"] for entry in alone["sheets"]["a"] if "caption" in entry}
    assert len(written) > 3 if name == "live" else not written
    assert 0 < alone["retrieval"]["a"]["image_to_text_r10"] < 1

    for num_workers in (2, 3):
        disturb = {("live", 3): stop_and_kill, ("stored", 2): stop}.get((name, num_workers))
        monkeypatch.setattr(features, "_TIMEOUT_S", 1.0 if disturb is stop else 60.0)
        watched.begin(disturb)
        if (name, num_workers) == ("live", 2):
            watched.also = partial(an_error_comes_through, data=data, path=tmp_path / "0.tar")
        assert evaluate(num_workers) == alone
        assert all(torch.equal(*pair) for pair in zip(features_alone, watched.features, strict=True))
        assert watched.num_here < num_parts, "the others had no part"
        assert watched.num_starts == num_workers - 1 + (disturb is not None)


def an_error_comes_through(workers: WorkerGroup, data: DataConfig, path: Path) -> None:
    spec = EvalSet(shards=str(write_tar(path, [sample(number) for number in range(40)])))
    parts = cut("a", spec, data, 4)
    write_tar(path, [sample(number) for number in range(41)])
    calls = [(part, spec) for part in parts]
    workers._here.images = lambda part, spec: features.SetFeatures(torch.empty(0, 16), [], [], [], Counter())
    with pytest.raises(DataError, match="changed since the run's manifest was made"):
        workers._map("images", calls)
    del workers._here.images


def test_the_callers_threads_change_nothing_and_stay(folder, checkpoints):
    before, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            found.append(
                evaluate_checkpoint(
                    EvaluationJob(*checkpoints["live"], LIVE, data_of(folder), everything(folder), EmbeddingsConfig())
                )
            )
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def make_folder(folder: Path, numbers: range) -> list[dict[str, bytes | str]]:
    """A folder of images by class; returns their samples in its order."""
    samples = []
    for number in sorted(numbers, key=lambda number: (list(COLOURS)[number % len(COLOURS)], number)):
        one = drawn_sample(number)
        colour = list(COLOURS)[number % len(COLOURS)]
        path = folder / f"{colour}_field" / f"{number:05d}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(one["png"])
        samples.append({"__key__": one["__key__"], "png": one["png"], "json": json.dumps({"class": f"{colour}_field"})})
    (folder / ".cache").mkdir()
    (folder / "black_field" / "notes.md").write_text("no image")
    return samples


def test_a_folder_of_images_is_measured_as_its_tar(checkpoints, tmp_path):
    figures = []
    for part, numbers in {"held_out": range(30), "fit": range(100, 140)}.items():
        write_tar(tmp_path / f"{part}.tar", make_folder(tmp_path / part, numbers))
    names = [{"id": f"{colour}_field", "name": f"{colour} field"} for colour in sorted(COLOURS)]
    (tmp_path / "classes.json").write_text(json.dumps(names))
    for ending, classes in ((".tar", str(tmp_path / "classes.json")), ("", "subfolders")):
        spec = EvalSet(
            shards=str(tmp_path / f"held_out{ending}"),
            linear_probe=str(tmp_path / f"fit{ending}"),
            classes=classes,
            templates=["a {}", "{}, drawn"],
            retrieval=False,
        )
        data, evaluation = DataConfig(shards="none"), EvalConfig(sets={"a": spec}, batch_size=8)
        figures.append(
            evaluate_checkpoint(EvaluationJob(*checkpoints["live"], LIVE, data, evaluation, EmbeddingsConfig()))
        )
    assert figures[0] == figures[1]
    assert figures[0]["zero_shot"]["a"]["num_images"] == 30
    assert figures[0]["linear_probe"]["a"]["num_fit"] == 40
    assert len(figures[0]["sheets"]["a"]) == 24


def test_what_is_wrong_with_a_folder_of_images_is_named(tmp_path):
    make_folder(tmp_path / "images", range(8))
    data, folder = DataConfig(shards="none"), str(tmp_path / "images")
    right = EvalSet(shards=folder, classes="subfolders", retrieval=False)
    assert [file.class_id for file in check_set("a", right, data)[::2]] == [
        f"{colour}_field" for colour in sorted(COLOURS)
    ]
    for change, message in [
        ({"classes": None}, "a: .* set classes=subfolders, or to a JSON list"),
        ({"retrieval": True}, "a: .* which has no captions: set retrieval=false"),
        ({"languages": ["en"]}, r"a: .* which has no captions: set languages=\[\]"),
        ({"shards": [folder, "x.tar"]}, "images is a folder of images: it must be the only pattern"),
    ]:
        with pytest.raises(DataError, match=message):
            check_set("a", right.model_copy(update=change), data)
    with pytest.raises(DataError, match="a: embeddings.store holds tars"):
        check_set("a", right, data, is_stored=True)
    (tmp_path / "images" / "pink").mkdir()
    with pytest.raises(DataError, match="no file of the subfolder pink ends in jpg, jpeg, png, webp"):
        list_images(folder, data)
    write_tar(tmp_path / "0.tar", [drawn_sample(0)])
    with pytest.raises(DataError, match="subfolders needs a folder with a subfolder"):
        classes_of(right.model_copy(update={"shards": str(tmp_path / "0.tar")}))
    (tmp_path / "images" / "red_field" / "00000.PNG").unlink()
    gone = Part((ImageFile(f"{folder}/red_field/00000.PNG", "red_field"),), 0, 1)
    with pytest.raises(DataError, match="00000.PNG: No such file or directory"):
        list(gone.samples(data))


def test_tars_with_cls_members_and_a_list_of_names(tmp_path):
    """As webdataset's classification sets are: no captions, numbers for classes, a file with a name in each line."""
    samples = [
        {"__key__": f"s{number}", "png": drawn_sample(number)["png"], "cls": f"{number % 4}\n"} for number in range(9)
    ]
    write_tar(tmp_path / "tars" / "0.tar", samples)
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in COLOURS))
    spec = EvalSet(shards=str(tmp_path / "tars"), classes=str(tmp_path / "names.txt"), retrieval=False)
    loaded = load_set(spec, DataConfig(shards="none"), 8)
    labels = class_labels(loaded.class_ids, read_classes(spec.classes), "a")
    assert labels.tolist() == [number % 4 for number in range(9)]
    assert [entry["name"] for entry in read_classes(spec.classes)] == list(COLOURS)
    with pytest.raises(DataError, match="no usable pair"):
        load_set(spec.model_copy(update={"retrieval": True}), DataConfig(shards="none"), 8)


class OneHot(WorkerGroup):
    """Each text has a dimension of its own, in the order in which they were first given."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def texts(self, texts: list[str]) -> torch.Tensor:
        self.known += [text for text in texts if text not in self.known]
        return torch.eye(6)[[self.known.index(text) for text in texts]]


def test_prompts_are_the_mean_over_templates_of_one_name():
    workers = OneHot()
    found = workers.prompts(["cat", "dog", "emu"], ["a {}", "the {}"])
    for name, row in zip(["cat", "dog", "emu"], found, strict=True):
        assert {text for text, value in zip(workers.known, row, strict=True) if value} == {f"a {name}", f"the {name}"}
        assert row.norm() == pytest.approx(1)


def test_parts_and_sheets_do_not_depend_on_shards_being_whole(folder):
    """Each sample in one part, none larger than a batch, the sheet's spread over all."""
    spec = everything(folder).sets["a"]
    parts = cut("a", spec, data_of(folder), 4, num_shown=7)
    assert [(part.start, part.stop) for part in parts[:2]] == [(0, 4), (4, 8)]
    keys = [sample.key for part in parts for sample in part.samples(data_of(folder))]
    assert keys == [f"sample{number:05d}" for number in range(39)]
    shown = [f"sample{number + (0 if part in parts[:7] else 26):05d}" for part in parts for number in part.shown]
    assert shown == [f"sample{index * 39 // 7:05d}" for index in range(7)]
