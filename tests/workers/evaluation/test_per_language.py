"""Many languages: the bottlenecked embedding and its fold, language weights, figures by language."""

import copy
import json
from collections import Counter

import pytest
import torch

from sigray.orchestrator.config import parse_config
from sigray.workers.config import DataConfig, EvalSet, ModelConfig
from sigray.workers.data.decode import Decoder, sample_random
from sigray.workers.evaluation.datasets import load_set
from sigray.workers.evaluation.evaluate import figures_by_language, mean_over_languages
from sigray.workers.model.bottleneck import BottleneckEmbedding, fold_bottleneck
from sigray.workers.model.export import compare, export_open_clip
from sigray.workers.model.towers import build_model, check_model, num_parameters
from tests.helpers.data import TOWERS, drawn_sample, write_tar

NARROW = ModelConfig(towers=TOWERS, token_bottleneck=4)


def test_a_bottleneck_is_a_table_of_low_rank():
    embedding = BottleneckEmbedding(50, 4, 16)
    tokens = torch.randint(0, 50, (3, 7))
    torch.testing.assert_close(embedding(tokens), embedding.folded()[tokens])
    assert torch.linalg.matrix_rank(embedding.folded()) == 4
    wide = BottleneckEmbedding(20_000, 64, 96).folded()
    assert float(wide.std()) == pytest.approx(0.02, rel=0.1)  # as open_clip's table


def test_parameters_and_gradients():
    full, narrow = (build_model(ModelConfig(towers=TOWERS, token_bottleneck=size)) for size in (None, 4))
    vocabulary, width = TOWERS["text_cfg"]["vocab_size"], TOWERS["text_cfg"]["width"]
    assert num_parameters(full) - num_parameters(narrow) == vocabulary * width - (vocabulary * 4 + 4 * width)
    narrow(torch.randn(2, 3, 16, 16), torch.randint(0, 400, (2, 8)))["text_features"].sum().backward()
    assert narrow.text.token_embedding.table.weight.grad.abs().max() > 0
    assert narrow.text.token_embedding.expand.weight.grad.abs().max() > 0
    assert check_model(NARROW).text.token_embedding.table.weight.is_meta


def test_plain_open_clip_loads_the_folded_model(tmp_path):
    torch.manual_seed(0)
    module = build_model(NARROW)
    assert "text.token_embedding.weight" in fold_bottleneck(module)
    export_open_clip(module, NARROW, tmp_path)
    found = compare("open_clip", tmp_path, module, NARROW, ["a cat", "two dogs and one ball"])
    assert found.image_difference == 0
    assert found.text_difference < 1e-5
    assert found.other_tokens == ()


def test_what_is_no_bottleneck_is_refused():
    with pytest.raises(ValueError, match="token_bottleneck=16 is no bottleneck: the text tower's width is 16"):
        build_model(ModelConfig(towers=TOWERS, token_bottleneck=16))


LANGUAGES = {"en": 3.0, "de": 1.0}
SOURCE = "json:captions.{language}.name"


def test_languages_are_drawn_by_weight():
    data = DataConfig(shards="none", captions={SOURCE: 2, "txt": 2}, languages=LANGUAGES)
    assert data.captions == {"json:captions.en.name": 1.5, "json:captions.de.name": 0.5, "txt": 2}
    members = {
        "txt": b"txt",
        "json": json.dumps({"captions": {"en": {"name": "en"}, "de": {"name": "de"}}}).encode(),
    }
    decoder = Decoder(data, 8)
    drawn = Counter(decoder.choose_caption(members, sample_random(0, 0, 0, index)) for index in range(4000))
    # Binomial: a standard deviation of 0.8 % of 4000 draws at a half.
    assert drawn["txt"] / 4000 == pytest.approx(0.5, abs=0.03)
    assert drawn["en"] / 4000 == pytest.approx(0.375, abs=0.03)
    assert drawn["de"] / 4000 == pytest.approx(0.125, abs=0.03)


def test_a_saved_config_is_read_again():
    content = {
        "run": {"name": "a"},
        "data": {"shards": "tars", "captions": {SOURCE: 1}, "languages": LANGUAGES},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 100, "global_batch_size": 10},
    }
    config = parse_config(copy.deepcopy(content), "a")
    assert parse_config(config.model_dump(mode="json"), "again") == config
    del content["data"]["languages"]
    with pytest.raises(ValueError, match="data.languages is empty"):
        parse_config(content, "a")


def test_figures_by_language_by_hand(tmp_path):
    """Four images of two classes; German lacks for one of them. Texts are encoded as a table says."""
    names = {"red": {"en": "red", "de": "rot"}, "green": {"en": "green", "de": "gruen"}}
    samples = []
    for number in range(4):
        sample = drawn_sample(number % 2)
        colour = list(names)[number % 2]
        captions = {language: {"name": name} for language, name in names[colour].items()}
        captions["en"]["name"] = [colour, f"{colour} thing"]
        if number == 3:
            del captions["de"]
        samples.append(sample | {"__key__": f"s{number}", "json": json.dumps({"class": colour, "captions": captions})})
    write_tar(tmp_path / "set.tar", samples)
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps([{"id": name, "name": name} for name in names]))
    spec = EvalSet(shards=str(tmp_path / "set.tar"), classes=str(classes), languages=["en", "de", "fr"])
    loaded = load_set(spec, DataConfig(shards=str(tmp_path)), 8)
    assert loaded.translations == [
        [["red", "red thing"], ["rot"], []],
        [["green", "green thing"], ["gruen"], []],
        [["red", "red thing"], ["rot"], []],
        [["green", "green thing"], [], []],
    ]
    features = torch.tensor([[1.0, 0], [0, 1.0], [0.8, 0.6], [0.6, 0.8]])
    table = {"red": [1.0, 0], "green": [0, 1.0], "rot": [0, 1.0], "gruen": [1.0, 0]}  # the German names are swapped
    table |= {"red thing": [-1.0, 0], "green thing": [0, -1.0]}
    figures = figures_by_language(
        features,
        loaded.translations,
        loaded.class_ids,
        spec,
        lambda texts: torch.tensor([table[text] for text in texts]),
    )
    assert list(figures) == ["en", "de"]
    assert figures["en"]["zero_shot"]["top1"] == figures["en"]["retrieval"]["merged_image_to_text_r1"] == 1
    assert figures["de"]["zero_shot"]["top1"] == figures["de"]["retrieval"]["merged_image_to_text_r1"] == 0
    assert (figures["en"]["zero_shot"]["num_images"], figures["de"]["zero_shot"]["num_images"]) == (4, 3)
    sizes = [
        tuple(figures[language]["retrieval"][f"num_{each}"] for each in ("images", "captions", "distinct_captions"))
        for language in figures
    ]
    assert sizes == [(4, 8, 4), (3, 3, 2)]
    mean = mean_over_languages(figures)
    assert (mean["num_languages"], mean["num_images"], mean["num_distinct_captions"]) == (2, 3, 2)
    assert mean["merged_image_to_text_r1"] == 0.5
