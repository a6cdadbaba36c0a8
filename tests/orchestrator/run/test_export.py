"""A trained run, exported and loaded by others in a fresh process: equal features, tokens and zero-shot figure."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sigray.orchestrator.cli.main import main
from sigray.orchestrator.config import RunConfig, parse_config
from sigray.orchestrator.run.export import model_card
from sigray.orchestrator.run_folder import RunFolder
from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.checkpoint.writer import load_weights
from sigray.workers.data.manifest import scan_shards
from sigray.workers.evaluation.datasets import load_set, read_classes
from sigray.workers.evaluation.evaluate import evaluate_checkpoint
from sigray.workers.evaluation.features import Encoder, EvaluationJob
from sigray.workers.model.export import EXPORTERS
from sigray.workers.model.inputs import CLIP_VOCAB_SIZE, shapes
from sigray.workers.model.tokenizer import build_tokenizer, train_tokenizer
from sigray.workers.model.towers import build_model, normalize_pixels
from sigray.workers.storage import Storage
from tests.helpers import pretrained
from tests.helpers.bare import train_bare
from tests.helpers.data import COLOURS, TOWERS, drawn_sample, write_tar
from tests.helpers.s3 import BUCKET

TEMPLATES = ["a {}", "{} field"]
TEXTS = ["a red field", "blue", "something unknown, 17 words long, cut at the context length of the tower"]

# What a user with open_clip and no sigray does: its own loading, preprocessing, tokenizer and zero-shot classifier.
OPEN_CLIP_USER = """
import json, sys
import numpy as np, open_clip, torch
from PIL import Image

asked = json.load(open("asked.json"))
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + asked["folder"])
tokenizer = open_clip.get_tokenizer("local-dir:" + asked["folder"])
model.eval()
images = torch.stack([preprocess(Image.fromarray(image)) for image in np.load("images.npy")])
with torch.no_grad():
    features = model.encode_image(images, normalize=True)
    texts = model.encode_text(tokenizer(asked["texts"]), normalize=True)
classifier = open_clip.build_zero_shot_classifier(model, tokenizer, asked["names"], asked["templates"])
hits = ((features @ classifier).argmax(dim=1) == torch.tensor(asked["labels"])).sum().item()
wide = preprocess(Image.open("wide.png"))
np.savez("answer.npz", images=features, texts=texts, tokens=tokenizer(asked["texts"]), wide=wide)
ours = {"native", "losses", "workers", "orchestrator", "tuning"}
foreign = [name for name in sys.modules if name.split(".")[0] in ours]
print(json.dumps({
    "top1": hits / len(features), "scale": model.logit_scale.exp().item(), "bias": model.logit_bias.item(),
    "foreign": foreign,
}))
"""

ONNX_USER = """
import json, sys
import numpy as np, onnxruntime
from tokenizers import Tokenizer

asked = json.load(open("asked.json"))
folder = asked["folder"]
config = json.load(open(folder + "/config.json"))
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
tokens = np.array([encoding.ids for encoding in tokenizer.encode_batch(asked["texts"])])
mean, std = (np.array(config["preprocessing"][key], np.float32) for key in ("mean", "std"))
pixels = ((np.load("images.npy").astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
run = lambda name, **inputs: onnxruntime.InferenceSession(folder + name).run(["features"], inputs)[0]
images, texts = run("/image.onnx", pixels=pixels), run("/text.onnx", tokens=tokens)
one = run("/image.onnx", pixels=pixels[:1]), run("/text.onnx", tokens=tokens[:1])
np.savez("answer.npz", images=images, texts=texts, tokens=tokens, one_image=one[0], one_text=one[1])
print(json.dumps({"scale": config["logit_scale"], "bias": config["logit_bias"], "torch": "torch" in sys.modules}))
"""


class ExportedRun:
    """A short run without Ray: 40 steps on drawn colours, with a tokenizers file, evaluated."""

    def __init__(self, folder: Path, *, ema: int | None = None, **model: Any) -> None:
        size = TOWERS["vision_cfg"]["image_size"]  # no resizing: open_clip's is Pillow's, which rounds otherwise
        for name, numbers in {"train": range(96), "held_out": range(100, 140)}.items():
            write_tar(folder / name / "shard.tar", [drawn_sample(number, size) for number in numbers])
        captions = [f"a {colour} field number {number}" for number, colour in enumerate(COLOURS)]
        train_tokenizer(captions, vocab_size=64, kind="bpe").save(str(folder / "words.json"))
        classes = [{"id": colour, "name": colour} for colour in COLOURS]
        (folder / "classes.json").write_text(json.dumps(classes))
        colours = {"shards": str(folder / "held_out"), "classes": str(folder / "classes.json"), "templates": TEMPLATES}
        towers = {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], "vocab_size": 64, "no_causal_mask": True}}
        towers["text_cfg"]["pool_type"] = "last"
        content = {
            "run": {"name": "colours", "dir": str(folder / "runs")},
            "data": {"shards": str(folder / "train"), "num_lanes": 3, "shuffle_window": 32, "block_size": 16},
            "model": {
                "towers": towers,
                "tokenizer": str(folder / "words.json"),
                "image_mean": [0.4, 0.5, 0.6],
                **model,
            },
            "train": {"num_samples": 40 * 24, "global_batch_size": 24, "ema": ema},
            "optim": {"lr": 3e-3},
            "eval": {"sets": {"colours": colours}},
        }
        self.folder, self.config = folder, parse_config(content, "the test")
        self.run = RunFolder(self.config)
        self.run.begin(self.config, scan_shards(self.config.data.shards, self.config.data))
        train_bare(0, 1, self.config)
        self.info = list_checkpoints(self.run.storage)[-1]
        self.figures = evaluate_checkpoint(
            EvaluationJob(
                self.config.storage_uri,
                self.info,
                self.config.model,
                self.config.data,
                self.config.eval,
                self.config.embeddings,
            )
        )
        self.run.save_evaluation(self.figures)

    def export(self, form: str) -> Path:
        """By the command line; returns the folder."""
        path = self.folder / form
        assert main(["export", str(self.config.folder), "--format", form, "--out", str(path), "--overwrite"]) == 0
        return path

    def ask(self, script: str, exported: Path, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Run a script in a process of its own, in a folder without sigray; returns what it printed and saved."""
        loaded = load_set(self.config.eval.sets["colours"], self.config.data, shapes(self.config.model)[0])
        names = [entry["name"] for entry in read_classes(str(self.folder / "classes.json"))]
        np.save(folder / "images.npy", loaded.images)
        Image.fromarray(wide_image()).save(folder / "wide.png")
        labels = [names.index(class_id) for class_id in loaded.class_ids]
        asked = {"folder": str(exported), "texts": TEXTS, "names": names, "templates": TEMPLATES, "labels": labels}
        (folder / "asked.json").write_text(json.dumps(asked))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), dict(np.load(folder / "answer.npz"))

    def features(self) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Of the held-out images and of TEXTS, and the tokens, by sigray."""
        module, model = build_model(self.config.model), self.config.model
        load_weights(self.run.storage, self.info, module)
        size, context_length, vocab_size = shapes(model)
        tokenizer = build_tokenizer(model, context_length, vocab_size)
        encoder = Encoder(module, model, tokenizer, 64)
        loaded = load_set(self.config.eval.sets["colours"], self.config.data, size)
        return encoder.images(loaded.images), encoder.texts(TEXTS), tokenizer(TEXTS)


def wide_image() -> np.ndarray:
    """(40, 70, 3): smooth, so that two bicubic filters round alike."""
    rows, columns = np.mgrid[0:40, 0:70]
    return np.stack([rows * 6, columns * 3, (rows + columns) * 2], axis=2).astype(np.uint8)


def logit_parameters(config: RunConfig, run: ExportedRun) -> tuple[float, float]:
    module = build_model(config.model)
    load_weights(run.run.storage, run.info, module)
    return module.logit_scale.exp().item(), module.logit_bias.item()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> ExportedRun:
    return ExportedRun(tmp_path_factory.mktemp("export"))


def test_plain_open_clip_gives_the_same_features_tokens_and_figure(trained, tmp_path, capsys):
    exported = trained.export("open_clip")
    assert "loaded in open_clip: features differ by" in capsys.readouterr().out
    said, answer = trained.ask(OPEN_CLIP_USER, exported, tmp_path)
    images, texts, tokens = trained.features()
    assert said["foreign"] == []
    assert np.array_equal(answer["tokens"], tokens)
    assert np.abs(answer["images"] - images.numpy()).max() < 1e-5
    assert np.abs(answer["texts"] - texts.numpy()).max() < 1e-5
    assert said["top1"] == trained.figures["zero_shot"]["colours"]["top1"]
    assert 0.3 < said["top1"] < 1, "a figure that says nothing of agreement"
    assert (said["scale"], said["bias"]) == pytest.approx(logit_parameters(trained.config, trained))


def test_open_clip_prepares_images_as_sigray_does(trained, tmp_path):
    """Not only mean and std: the side that is resized, and the part that is cut out."""
    from sigray.workers.data.decode import Decoder

    exported = trained.export("open_clip")
    _, answer = trained.ask(OPEN_CLIP_USER, exported, tmp_path)
    size = shapes(trained.config.model)[0]
    ours = np.empty((size, size, 3), np.uint8)
    Decoder(trained.config.data, size).decode_image({"png": (tmp_path / "wide.png").read_bytes()}, ours, None)
    expected = normalize_pixels(torch.from_numpy(ours)[None], trained.config.model)[0].numpy()
    # Two roundings to uint8 of Pillow's bicubic: 2 of 255 levels, each 1 / 0.5 after normalisation.
    assert np.abs(answer["wide"] - expected).max() < 2.01 * 2 / 255


def test_onnxruntime_gives_the_same_features(trained, tmp_path):
    exported = trained.export("onnx")
    said, answer = trained.ask(ONNX_USER, exported, tmp_path)
    images, texts, tokens = trained.features()
    assert said["torch"] is False
    assert np.array_equal(answer["tokens"], tokens)
    assert np.abs(answer["images"] - images.numpy()).max() < 1e-5
    assert np.abs(answer["texts"] - texts.numpy()).max() < 1e-5
    assert np.abs(answer["one_image"] - images[:1].numpy()).max() < 1e-5
    assert np.abs(answer["one_text"] - texts[:1].numpy()).max() < 1e-5
    assert (said["scale"], said["bias"]) == pytest.approx(logit_parameters(trained.config, trained))


def test_safetensors_has_weights_and_model(trained):
    from safetensors.torch import load_file

    exported = trained.export("safetensors")
    module = build_model(trained.config.model)
    load_weights(trained.run.storage, trained.info, module)
    tensors = load_file(exported / "model.safetensors")
    assert tensors.keys() == module.state_dict().keys()
    assert all(torch.equal(tensors[name], own) for name, own in module.state_dict().items())
    content = json.loads((exported / "config.json").read_text())
    assert content["model"]["towers"] == trained.config.model.towers


def test_the_card_tells_data_recipe_and_results(trained):
    card = (trained.export("safetensors") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: safetensors\n")
    assert "| training data | 96 | 1 |" in card
    assert "960 pairs" in card
    assert "adamw, learning rate 0.003" in card
    assert "| captions | `txt` 1 |" in card
    row = trained.figures["zero_shot"]["colours"]
    assert f"| colours | 4 | 40 | {row['top1']:.2%} | 25.00% |" in card


def run_card(card: str, folder: Path, image: Path) -> Any:
    """Run the code that a card shows; returns its probabilities."""
    Image.fromarray(wide_image()).save(image)
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    values: dict[str, Any] = {}
    exec(found[1].replace("FOLDER", str(folder)).replace("cat.jpg", str(image)), values)
    return values["probabilities"]


def test_the_code_of_open_clips_card_runs(trained, tmp_path):
    exported = trained.export("open_clip")
    rates = run_card((exported / "README.md").read_text(), exported, tmp_path / "cat.png")
    assert rates.shape == (1, 2)
    assert ((rates > 0) & (rates < 1)).all()


@pytest.mark.parametrize("towers", ["SIGLIP", "CLIP"])
def test_the_code_of_transformers_card_runs(trained, tmp_path, towers):
    """Also what open_clip's card says of a softmax model."""
    sections = getattr(pretrained, towers)
    sections = sections | {"text_cfg": sections["text_cfg"] | {"vocab_size": CLIP_VOCAB_SIZE}}
    bias = -10.0 if towers == "SIGLIP" else None
    loss = "sigmoid" if towers == "SIGLIP" else "softmax"
    model = {"towers": sections, "image_resize": "squash", "init_logit_bias": bias, "tokenizer": "open_clip"}
    content = {"model": model, "loss": {"name": loss}}
    config = parse_config(trained.config.model_dump(mode="json") | content, "test")
    module = pretrained.randomize(build_model(config.model))
    for form in ("transformers", "open_clip"):
        folder = tmp_path / form
        folder.mkdir()
        if form == "open_clip" and towers == "SIGLIP":
            continue  # plain open_clip does not know its name
        EXPORTERS[form](module, config.model, folder)
        card = model_card(config, trained.info, form, trained.run.manifest(), {}, 1, [])
        rates = run_card(card, folder, tmp_path / "cat.png")
        assert rates.shape == (1, 2)
        assert float(rates.detach().sum()) == pytest.approx(1.0, abs=1e-5) or towers == "SIGLIP"


def test_the_card_has_a_line_for_each_language(trained):
    retrieval, zero_shot = trained.figures["retrieval"]["colours"], trained.figures["zero_shot"]["colours"]
    languages = {"en": {"retrieval": retrieval, "zero_shot": zero_shot}, "sw": {"retrieval": retrieval}}
    config, manifest = trained.config, trained.run.manifest()
    figures = trained.figures | {"languages": {"colours": languages}}
    card = model_card(config, trained.info, "safetensors", manifest, figures, 1, [])
    both_ways = f"{retrieval['image_to_text_r1']:.2%} | {retrieval['text_to_image_r1']:.2%} |"
    assert f"| en | colours | 40 | {zero_shot['top1']:.2%} | 25.00% | {both_ways} " in card
    assert f"| sw | colours | 40 |  |  | {both_ways} " in card
    assert "| language |" not in model_card(config, trained.info, "safetensors", manifest, trained.figures, 1, [])


def test_the_average_of_the_weights_is_exported_unless_the_last_ones_are_wanted(tmp_path, capsys):
    from safetensors.torch import load_file

    run = ExportedRun(tmp_path, ema=400)
    without = run.figures["without_ema"]["zero_shot"]["colours"]
    assert run.figures["zero_shot"]["colours"]["top1"] != without["top1"], "the card would say nothing"
    assert len(run.figures["sheets"]["colours"]) > 0
    checkpoint = Path(run.run.storage.uri, "checkpoints", run.info.name)
    last = load_file(checkpoint / "model.safetensors")
    for words, weights, figures in (
        ([], last | load_file(checkpoint / "ema.safetensors"), run.figures["zero_shot"]["colours"]),
        (["--weights", "last"], last, without),
    ):
        exported = tmp_path / "exported"
        assert main(["export", str(run.config.folder), "--out", str(exported), "--overwrite", *words]) == 0
        found = load_file(exported / "open_clip_model.safetensors")
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], own) for name, own in weights.items())
        assert f"| colours | 4 | 40 | {figures['top1']:.2%} | 25.00% |" in (exported / "README.md").read_text()
        said = "of the last step, not their average" if words else "their average (half-life 400 samples)"
        assert f"weights: {said}" in " ".join(capsys.readouterr().out.split())


def test_an_average_that_the_run_does_not_keep_is_not_exported(trained, tmp_path, capsys):
    out = tmp_path / "exported"
    assert main(["export", str(trained.config.folder), "--weights", "ema", "--out", str(out)]) == 2
    assert "holds no average of the weights (train.ema=None;" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_texts_that_open_clip_cleans_are_counted(trained, tmp_path):
    """U+2019 becomes an apostrophe by ftfy before the tokenizer sees it."""
    from sigray.workers.model.export import compare

    exported = trained.export("open_clip")
    module = build_model(trained.config.model)
    load_weights(trained.run.storage, trained.info, module)
    found = compare("open_clip", exported, module, trained.config.model, ["a red field", "a &amp; field"])
    assert found.other_tokens == ("a &amp; field",)
    assert found.num_texts == 2


def test_an_export_is_not_overwritten_unasked(trained, capsys):
    path = trained.export("safetensors")
    assert main(["export", str(trained.config.folder), "--format", "safetensors", "--out", str(path)]) == 2
    assert "exists: give another --out, or --overwrite" in " ".join(capsys.readouterr().err.split())


def test_an_export_in_a_bucket_is_that_of_a_folder(trained, s3_variables, monkeypatch, capsys):
    for name, value in s3_variables.items():
        monkeypatch.setenv(name, value)
    bucket = Storage(f"s3://{BUCKET}/models/colours")
    words = ["export", str(trained.config.folder), "--format", "safetensors", "--out", bucket.uri]
    assert main(words) == 0
    assert f"exported: {bucket.uri}" in capsys.readouterr().out
    local = Storage(trained.export("safetensors"))
    assert {name: bucket.read(name) for name in bucket.walk()} == {name: local.read(name) for name in local.walk()}
    assert main(words) == 2
    assert f"{bucket.uri} exists: give another --out, or --overwrite" in capsys.readouterr().err
    bucket.write("model.safetensors", b"old")
    assert main([*words, "--overwrite"]) == 0
    assert bucket.read("model.safetensors") == local.read("model.safetensors")
    bucket.write("mine.txt", b"keep")
    assert main([*words, "--overwrite"]) == 2
    assert "is no folder of an export: mine.txt" in capsys.readouterr().err


def test_what_is_no_run_is_told(tmp_path, capsys):
    assert main(["export", str(tmp_path)]) == 2
    assert "is not a run" in " ".join(capsys.readouterr().err.split())


def test_open_clips_own_tokenizer_needs_no_file(tmp_path):
    from sigray.workers.config import ModelConfig
    from sigray.workers.model.export import compare, export_open_clip

    model = ModelConfig(towers={**TOWERS, "text_cfg": {**TOWERS["text_cfg"], "hf_tokenizer_name": "not/used"}})
    module = build_model(model)
    export_open_clip(module, model, tmp_path)
    found = compare("open_clip", tmp_path, module, model, ["a cat", "o\u2019clock &amp; more"])
    assert found.other_tokens == ()
    assert max(found.image_difference, found.text_difference) < 1e-5


def test_a_tokenizer_pads_with_its_own_token(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    from sigray.workers.config import ModelConfig
    from sigray.workers.model.export import export_safetensors

    words = ["[UNK]", "field", "number", "[PAD]"]
    file = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    file.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    file.save(str(tmp_path / "words.json"))
    model = ModelConfig(towers=TOWERS, tokenizer=str(tmp_path / "words.json"))
    (tmp_path / "exported").mkdir()
    export_safetensors(build_model(model), model, tmp_path / "exported")
    exported = Tokenizer.from_file(str(tmp_path / "exported" / "tokenizer.json"))
    expected = [2, 1, 3, 3, 3, 3, 3, 3]
    assert build_tokenizer(model, 8, 64)(["number field"]).tolist() == [expected]
    assert exported.encode("number field").ids == expected
