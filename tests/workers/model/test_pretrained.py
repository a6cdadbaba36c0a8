"""Weights in the formats of other libraries: every tensor in its place, and the features that the library gives."""

import functools
import json
import warnings

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from open_clip import OPENAI_DATASET_MEAN
from open_clip.convert import load_big_vision_weights
from open_clip.model import CustomTextCLIP, convert_to_custom_text_state_dict
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch.nn.functional import normalize

from sigray.workers.config import ModelConfig
from sigray.workers.model.export import EXPORTERS
from sigray.workers.model.init_weights import check_initial_weights, load_initial_weights
from sigray.workers.model.towers import build_model
from sigray.workers.model.trained_inputs import take_inputs
from sigray.workers.model.transformers_names import CLIP, SIGLIP, from_transformers, to_transformers
from sigray.workers.model.weights_files import read_weights
from sigray.workers.model.weights_source import find_weights
from sigray.workers.storage import Storage
from tests.golden import big_vision
from tests.helpers import pretrained
from tests.helpers.hub import hub
from tests.helpers.pretrained import LENGTH, SIZE, WORDS, their_features, transformers_model

PIXELS = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(1, WORDS - 1, (3, LENGTH), generator=torch.Generator().manual_seed(1))
TOKENS[:, -1] = WORDS - 1  # the highest id, which CLIP pools
TOWERS = {"siglip": pretrained.SIGLIP, "siglip2": pretrained.SIGLIP, "clip": pretrained.CLIP}
SIGLIP_TANH = pretrained.towers("gelu_tanh")
SIGLIP_TANH["text_cfg"] |= {"act_kwargs": {"approximate": "tanh"}}  # jax has no other GELU by default
TABLES = {"siglip": SIGLIP, "siglip2": SIGLIP, "clip": CLIP}


def model_from(path, towers, **keys) -> ModelConfig:
    return ModelConfig(towers=towers, init_from=str(path), **keys)


def loaded(model: ModelConfig):
    """A model with all of its weights from a file, and the report."""
    torch.manual_seed(0)
    module = build_model(model).eval()
    return module, load_initial_weights(module, model)


def check_features(module, image_features, text_features, pixels=PIXELS, tokens=TOKENS):
    """At most 1e-6 apart, in float32."""
    with torch.inference_mode():
        images, texts = module.encode_image(pixels, normalize=True), module.encode_text(tokens, normalize=True)
    torch.testing.assert_close(images, normalize(image_features, dim=-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(texts, normalize(text_features, dim=-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", list(TOWERS))
def test_a_folder_of_transformers(tmp_path, kind):
    theirs = transformers_model(kind)
    theirs.save_pretrained(tmp_path)
    source = find_weights(str(tmp_path))
    assert (source.format, source.config["model_type"]) == ("transformers", kind)
    assert (source.folder, source.files) == (tmp_path, (tmp_path / "model.safetensors",))
    module, found = loaded(model_from(tmp_path, TOWERS[kind]))
    assert (found.missing, found.unused) == (["logit_bias"] if kind == "clip" else [], [])
    with torch.inference_mode():
        check_features(module, *their_features(theirs, kind, TOKENS, PIXELS))
    back = to_transformers(from_transformers(theirs.state_dict()), TABLES[kind])
    for name, tensor in theirs.state_dict().items():
        if kind == "siglip2" and "patch_embedding" in name:
            continue  # a convolution in SiglipModel, for which the table is
        assert torch.equal(back.pop(name), tensor), name
    assert not {name for name in back if "patch_embedding" not in name}


def test_a_tower_of_another_kind_is_no_tower_with_fresh_weights(tmp_path):
    """SigLIP's text tower would fit these towers, and its image tower would be left out."""
    transformers_model("siglip").save_pretrained(tmp_path)
    towers = pretrained.CLIP | {"embed_dim": 32, "text_cfg": pretrained.SIGLIP["text_cfg"]}
    with pytest.raises(
        ValueError, match=r"its visual tower is of another kind: visual.trunk.* there, .* here"
    ) as error:
        loaded(model_from(tmp_path, towers))
    assert str(error.value).endswith(r"model.init_fresh=['visual\..*']")
    _, found = loaded(model_from(tmp_path, towers, init_fresh=[r"visual\..*"]))
    assert not found.missing


@pytest.mark.parametrize("form", ["sharded", "bin", "file"])
def test_files_of_transformers(tmp_path, form):
    theirs = transformers_model("siglip")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if form == "sharded" else "5GB")
    if form == "bin":
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    source = find_weights(str(tmp_path / "model.safetensors") if form == "file" else str(tmp_path))
    assert (len(source.files) > 2) == (form == "sharded")
    assert source.config["model_type"] == "siglip"
    module, found = loaded(model_from(source.place, pretrained.SIGLIP))
    assert not found.missing + found.unused
    ours = from_transformers(theirs.state_dict())
    assert all(torch.equal(tensor, ours[name]) for name, tensor in module.state_dict().items())


SHAPES = functools.cache(lambda: build_model(ModelConfig(towers=pretrained.CLIP)).state_dict())


def ones(prefix=""):
    return {prefix + name: torch.ones_like(tensor) for name, tensor in SHAPES().items()}


def twos():
    return {name: torch.full_like(tensor, 2) for name, tensor in SHAPES().items()}


@pytest.mark.parametrize(
    ("content", "origin"),
    [
        (lambda: ones(), ""),
        (lambda: {"state_dict": ones(), "epoch": 3}, " (its state_dict)"),
        (lambda: {"model": {"state_dict": ones("module.")}}, " (its model, its state_dict, names without module.)"),
        (lambda: {"model": twos(), "model_ema": ones(), "optimizer": {}}, " (its model_ema, not model)"),
        (lambda: {"state_dict": twos(), "state_dict_ema": ones()}, " (its state_dict_ema, not state_dict)"),
        (lambda: twos() | ones("ema.module."), " (names without ema., not the 63 others, names without module.)"),
        (lambda: ones("module.ema."), " (names without module., names without ema.)"),
        (lambda: ones("_orig_mod.module."), " (names without _orig_mod., names without module.)"),
        (lambda: {name.replace("resblocks.", "resblocks._orig_mod."): t for name, t in ones().items()},
         " (names without _orig_mod.)"),
    ],
)  # fmt: skip
def test_wrappers_and_prefixes_and_which_one_is_taken(tmp_path, content, origin):
    """Every tensor of the right part is 1, every tensor of the other part 2."""
    torch.save(content(), tmp_path / "checkpoint.pt")
    module, found = loaded(model_from(tmp_path / "checkpoint.pt", pretrained.CLIP))
    assert {value for tensor in module.state_dict().values() for value in tensor.unique().tolist()} == {1.0}
    assert found.text() == f"weights from {tmp_path}/checkpoint.pt{origin}: 63 of 63 tensors match"


@pytest.mark.parametrize("large", [{"image_size": 64}, {"image_size": 64, "patch_size": 16}, {"patch_size": 16}])
def test_embeddings_of_a_timm_tower_are_resized_as_timm_does(tmp_path, large):
    """Positions by bicubic interpolation, patches by the pseudo-inverse of FlexiViT."""
    torch.save(pretrained.randomize(build_model(ModelConfig(towers=pretrained.SIGLIP))).state_dict(), tmp_path / "a.pt")
    towers = pretrained.towers(**large)
    module, found = loaded(model_from(tmp_path / "a.pt", towers))
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    trunk = {name.removeprefix("visual.trunk."): t for name, t in state.items() if "trunk" in name}
    for name, tensor in checkpoint_filter_fn(trunk, module.visual.trunk).items():
        assert torch.equal(module.visual.trunk.state_dict()[name], tensor), name
    assert not found.missing + found.unused
    assert "resized: visual.trunk.p" in found.text()


@pytest.mark.parametrize("layout", ["plain", "scan", "bfloat16"])
def test_a_checkpoint_of_big_vision(tmp_path, layout):
    """The features that its own flax model gives; blocks apart or in one tensor."""
    golden = json.loads(big_vision.FILE.read_text())["scan" if layout == "scan" else "plain"]
    weights = big_vision.drawn_weights(golden["shapes"])
    if layout == "bfloat16":  # as big_vision saves it: numpy knows no such type
        weights = {name: (array.view("<u4") >> 16).astype("<u2").view("V2") for name, array in weights.items()}
    path = tmp_path / "siglip.npz"
    np.savez(path, **weights, **{"opt/count": np.zeros(())})
    module, found = loaded(model_from(path, SIGLIP_TANH))
    assert (found.missing, found.unused, found.origin) == ([], [], " (big_vision)")
    inputs, _ = take_inputs(model_from(path, SIGLIP_TANH), {})
    assert (inputs.image_mean, inputs.image_resize) == ((0.5, 0.5, 0.5), "squash")
    if layout == "bfloat16":
        assert {tensor.bfloat16().float().equal(tensor) for tensor in module.state_dict().values()} == {True}
        return
    pixels, tokens = (torch.from_numpy(array) for array in big_vision.drawn_inputs())
    their_features = (torch.tensor(golden[key]) for key in ("image_features", "text_features"))
    check_features(module, *their_features, pixels.permute(0, 3, 1, 2), tokens)
    peer = build_model(ModelConfig(towers=SIGLIP_TANH))
    load_big_vision_weights(peer, str(path))
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in peer.state_dict().items())


def test_a_torchscript_file_of_openai(tmp_path):
    """Half precision, sizes as tensors, and names of the CLIP class; code is not read."""
    plain = open_clip.model.CLIP(**pretrained.CLIP)
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(plain).pop(name, None)
        plain.register_buffer(name, torch.tensor(7))
    pretrained.randomize(plain)
    weights = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer
        script = torch.jit.trace(plain, (PIXELS, TOKENS), strict=False, check_trace=False)
    script.half().save(str(tmp_path / "ViT.pt"))
    module, found = loaded(model_from(tmp_path / "ViT.pt", pretrained.CLIP))
    assert (found.missing, found.unused) == (["logit_bias"], ["attn_mask"])
    inputs, _ = take_inputs(model_from(tmp_path / "ViT.pt", pretrained.CLIP), {})
    assert (inputs.image_mean, inputs.image_resize) == (OPENAI_DATASET_MEAN, "shortest")
    own = module.state_dict()
    assert torch.equal(own["visual.proj"], weights["visual.proj"].half().float())
    assert torch.equal(own["text.token_embedding.weight"], weights["token_embedding.weight"].half().float())


@pytest.mark.parametrize("form", ["timm", "factory"])
def test_an_image_tower_alone(tmp_path, form):
    """A timm checkpoint begins the trunk of a timm tower, or a whole image tower of a factory; the text stays fresh."""
    tower = pretrained.image_tower()
    weights = pretrained.randomize(tower).state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": pretrained.IMAGE_TOWER, "pretrained_cfg": {"std": [1]}})
    )
    image_tower = "tests.helpers.pretrained:image_tower" if form == "factory" else None
    module, found = loaded(model_from(tmp_path, pretrained.SIGLIP, image_tower=image_tower))
    source = find_weights(str(tmp_path))
    assert (source.format, source.config["architecture"]) == ("timm", pretrained.IMAGE_TOWER)
    part, name = (module.visual, "visual") if form == "factory" else (module.visual.trunk, "visual.trunk")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in part.state_dict().items())
    assert found.origin == f" (a tower alone, for {name})"
    assert all(name.startswith(("text.", "logit_")) for name in found.missing)


@pytest.mark.parametrize("name", ["open_clip", "safetensors", "clip_class"])
def test_folders_of_open_clip_and_of_our_export(tmp_path, name):
    model = ModelConfig(towers=pretrained.CLIP)
    trained = pretrained.randomize(build_model(model))
    if name == "clip_class":  # as open_clip's push_to_hf_hub writes it, for a model with the text tower at the top
        plain = pretrained.randomize(open_clip.model.CLIP(**pretrained.CLIP))
        config = {"model_cfg": pretrained.CLIP, "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073]}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        torch.save(plain.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
        trained = CustomTextCLIP(**pretrained.CLIP)
        trained.load_state_dict(convert_to_custom_text_state_dict(plain.state_dict()))
    else:
        EXPORTERS[name](trained, model, tmp_path)
    source = find_weights(str(tmp_path))
    assert source.format == ("sigray" if name == "safetensors" else "open_clip")
    assert "preprocess_cfg" in source.config or source.config["preprocessing"]["size"] == SIZE
    module, found = loaded(model_from(tmp_path, pretrained.CLIP))
    assert found.missing == (["logit_bias"] if name == "clip_class" else [])
    assert all(torch.equal(module.state_dict()[key], tensor) for key, tensor in trained.state_dict().items())


@pytest.mark.parametrize(("files", "message"), [
    ({}, r"the folder .* has no weights \(open_clip_model.safetensors, .*\); it has no files"),
    ({"image.onnx": b"", "config.json": b"{}"}, r"has no weights .*; it has config.json, image.onnx"),
    ({"config.json": b'{"model_type": "bert"}', "model.safetensors": b""}, "model_type 'bert'; sigray reads clip, "),
    ({"model.safetensors.index.json": b'{"weight_map": {"a": "../../secret"}}'}, "is no index of weights"),
    ({"model.safetensors.index.json": b'{"weight_map": {"a": "part-1"}}'}, "lacks part-1, which .*index.json names"),
    ({"config.json": b"[", "model.safetensors": b""}, "config.json: not JSON"),
])  # fmt: skip
def test_a_folder_without_weights_that_can_be_read_says_why(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find_weights(str(tmp_path))


def test_a_repository_of_the_hub_and_its_copy_in_the_cache(tmp_path, monkeypatch):
    theirs = transformers_model("siglip")
    theirs.save_pretrained(tmp_path / "files", max_shard_size="100KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "files").iterdir()} | {"model.onnx": b"not fetched"}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with hub(files) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        source = find_weights("hf-hub:a/b")
        assert {path.name for path in source.folder.iterdir()} == set(files) - {"model.onnx"}
    module, found = loaded(ModelConfig(towers=pretrained.SIGLIP, init_from="hf-hub:a/b"))  # the hub is gone
    assert not found.missing + found.unused
    own = from_transformers(theirs.state_dict())
    assert all(torch.equal(tensor, own[name]) for name, tensor in module.state_dict().items())
    with pytest.raises(ValueError, match=r"hf-hub:c/d cannot be fetched [^\n]*\nOn .* set model.init_from=FOLDER"):
        find_weights("hf-hub:c/d")


@pytest.mark.parametrize("name", ["", "/", "/model.safetensors.index.json"])
def test_a_folder_of_a_store_by_url(tmp_path, monkeypatch, new_place, name):
    """The files stand side by side here, without the ONNX file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    theirs = transformers_model("siglip")
    theirs.save_pretrained(tmp_path / "files", max_shard_size="100KB")
    (tmp_path / "files" / "model.onnx").touch()
    place = new_place("s3")
    for path in (tmp_path / "files").iterdir():
        Storage(place).upload(path, f"siglip/{path.name}")
    url = f"{place}/siglip{name}"
    source = find_weights(url)
    assert (source.place, source.format) == (url, "transformers")
    wanted = {path.name for path in (tmp_path / "files").iterdir()} - {"model.onnx"}
    assert {path.name for path in source.folder.iterdir()} == wanted
    assert source == find_weights(url)
    model, _ = take_inputs(ModelConfig(init_from=url, tokenizer="open_clip"), {})  # the URL alone
    assert model.towers["vision_cfg"] == pretrained.SIGLIP["vision_cfg"]
    own = read_weights(source, []).tensors
    for key, tensor in from_transformers(theirs.state_dict()).items():
        assert torch.equal(own[key], tensor), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to(torch.int8), "is int8, quantized perhaps"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "is float8_e4m3fn, quantized perhaps"),
        (lambda tensor: tensor * float("nan"), "holds NaN or infinity"),
        (lambda tensor: tensor / 0, "holds NaN or infinity"),
        (lambda tensor: tensor.half(), None),
        (lambda tensor: tensor.double(), None),
    ],
    ids=["int8", "fp8", "nan", "infinity", "fp16", "fp64"],
)
def test_numbers_that_are_no_weights_are_refused(tmp_path, change, message):
    module = build_model(ModelConfig(towers=pretrained.CLIP))
    state = module.state_dict()
    name = "visual.conv1.weight"
    save_file(state | {name: change(state[name])}, tmp_path / "model.safetensors")
    model = ModelConfig(towers=pretrained.CLIP, init_from=str(tmp_path))
    if message is None:
        assert name in check_initial_weights(model).matched
    else:
        with pytest.raises(ValueError, match=f"{name} {message}"):
            check_initial_weights(model)


def test_one_part_of_several_is_refused_and_so_is_an_index_that_promises_more(tmp_path):
    state = build_model(ModelConfig(towers=pretrained.CLIP)).state_dict()
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names = sorted(state)
    for part, some in zip(parts, (names[::2], names[1::2]), strict=True):
        save_file({name: state[name] for name in some}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: parts[number % 2] for number, name in enumerate(names)}}))
    model = ModelConfig(towers=pretrained.CLIP, init_from=str(tmp_path))
    assert len(check_initial_weights(model).matched) == len(names)
    with pytest.raises(ValueError, match=rf"{parts[0]} is one file of 2: give their folder, or \*.index.json"):
        check_initial_weights(model.model_copy(update={"init_from": str(tmp_path / parts[0])}))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, parts[0])}))
    with pytest.raises(ValueError, match=f"lack {names[1]}, .* which their index names"):
        check_initial_weights(model)
