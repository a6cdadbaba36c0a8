"""What a decoder writes below the images of a sheet: image by image, token by token, from the whole text before."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sigray.workers.checkpoint.index import list_checkpoints
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
from sigray.workers.evaluation.evaluate import evaluate_checkpoint
from sigray.workers.evaluation.features import EvaluationJob
from sigray.workers.model.decoder import ImageTokens
from sigray.workers.model.tokenizer import load_tokenizer_file, train_tokenizer
from sigray.workers.model.towers import build_model, normalize_pixels
from sigray.workers.storage import Storage
from sigray.workers.training.optim import build_optimizer
from tests.helpers.data import COLOURS, TOWERS, drawn_sample, write_tar

END = 2  # [EOS] of `train_tokenizer`


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelConfig, dict[bool, dict[str, Any]]]:
    """A model whose decoder says something, and its evaluations with and without captions."""
    folder = tmp_path_factory.mktemp("captions")
    samples = [drawn_sample(number, TOWERS["vision_cfg"]["image_size"]) for number in range(21)]
    write_tar(folder / "tars" / "0.tar", samples)
    train_tokenizer([str(each["txt"]) for each in samples], vocab_size=400, kind="unigram").save(str(folder / "t.json"))
    (folder / "classes.json").write_text(json.dumps([{"id": name, "name": name} for name in COLOURS]))
    towers = TOWERS | {"text_cfg": TOWERS["text_cfg"] | {"vocab_size": 400}}
    model = ModelConfig(towers=towers, tokenizer=str(folder / "t.json"), decoder={"bias": True})
    torch.manual_seed(0)
    module = build_model(model)
    torch.nn.init.normal_(module.decoder.head.weight)
    module.decoder.head.bias.data[END] = 8.0
    storage = Storage(folder / "run")
    optimizer = build_optimizer(module, OptimConfig(), {})
    writer = CheckpointWriter(storage, module, optimizer, CheckpointConfig(), {}, warn=pytest.fail)
    writer.save(1, 1)
    writer.close()
    (info,) = list_checkpoints(storage)
    shards = str(folder / "tars")
    sets = {
        "named": EvalSet(shards=shards, classes=str(folder / "classes.json"), templates=["a {}"], retrieval=False),
        "plain": EvalSet(shards=shards),
    }
    config = EvalConfig(sets=sets, batch_size=8, num_sheet_images=10)
    data = DataConfig(shards=shards, crop="center")
    found = {
        captions: evaluate_checkpoint(
            EvaluationJob(storage.uri, info, model, data, config, EmbeddingsConfig(), captions=captions)
        )
        for captions in (True, False)
    }
    return module, model, found


def caption_of(module: Any, model: ModelConfig, pixels: np.ndarray) -> list[int]:
    """The likeliest tokens of one image, up to the end."""
    image_tokens = ImageTokens(module.visual)
    module.visual(normalize_pixels(torch.from_numpy(pixels)[None], model))
    seen = image_tokens.take()
    tokens: list[int] = []
    while len(tokens) < 8 and END not in tokens:
        length = len(tokens) + 1
        states = module.decoder.read(seen, torch.tensor([[0, *tokens]]), torch.ones(1, 1, length, length).tril().bool())
        tokens.append(int(module.decoder.head(states)[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("name", ["named", "plain"])
def test_captions_are_those_of_each_image_alone(evaluated, name):
    module, model, found = evaluated
    sheet = found[True]["sheets"][name]
    assert len(sheet) == 10
    file = load_tokenizer_file(str(model.tokenizer))
    lengths = set()
    for entry in sheet:
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(entry["png_base64"]))))
        tokens = caption_of(module, model, pixels)
        lengths.add(len(tokens))
        assert entry["caption"] == file.decode(tokens).strip()
    assert len(lengths) > 2, "all captions end alike"
    assert len({entry["caption"] for entry in sheet}) > 2


def test_a_set_without_classes_shows_its_own_captions(evaluated):
    _, _, found = evaluated
    colours = list(COLOURS)
    numbers = [index * 21 // 10 for index in range(10)]
    expected = [[f"{colours[number % 4]} field number {number}"] for number in numbers]
    assert [entry["captions"] for entry in found[True]["sheets"]["plain"]] == expected
    assert all(entry.keys() == {"png_base64", "captions", "caption"} for entry in found[True]["sheets"]["plain"])


def test_all_else_is_the_same_without_captions(evaluated):
    _, _, found = evaluated
    with_them, without = found[True], found[False]
    assert without["sheets"].keys() == {"named"}
    names = [
        {key: value for key, value in entry.items() if not key.startswith("caption")}
        for entry in with_them["sheets"]["named"]
    ]
    assert names == without["sheets"]["named"]
    rest = [{key: value for key, value in result.items() if key != "sheets"} for result in (with_them, without)]
    assert rest[0] == rest[1]
