"""Weights in the formats of other libraries: every tensor in its place, and the features that the library gives."""

import functools

import pytest
import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch.nn.functional import normalize

from sigray.workers.config import ModelConfig
from sigray.workers.model.init_weights import load_initial_weights
from sigray.workers.model.towers import build_model
from sigray.workers.model.transformers_names import CLIP, SIGLIP, from_transformers, to_transformers
from sigray.workers.model.weights_source import find_weights
from tests.helpers import pretrained
from tests.helpers.pretrained import LENGTH, SIZE, WORDS, transformers_model

PIXELS = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(1, WORDS - 1, (3, LENGTH), generator=torch.Generator().manual_seed(1))
TOKENS[:, -1] = WORDS - 1  # the highest id, which CLIP pools
TOWERS = {"siglip": pretrained.SIGLIP, "siglip2": pretrained.SIGLIP, "clip": pretrained.CLIP}
TABLES = {"siglip": SIGLIP, "siglip2": SIGLIP, "clip": CLIP}


def model_from(path, towers, **keys) -> ModelConfig:
    return ModelConfig(towers=towers, init_from=str(path), **keys)


def loaded(model: ModelConfig):
    """A model with all of its weights from a file, and the report."""
    torch.manual_seed(0)
    module = build_model(model).eval()
    return module, load_initial_weights(module, model)


def their_features(theirs, kind):
    if kind != "siglip2":
        output = theirs(input_ids=TOKENS, pixel_values=PIXELS)
        return output.image_embeds, output.text_embeds
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    patches = torch.stack([torch.from_numpy(convert_image_to_patches(x.numpy(), 8)) for x in PIXELS])
    shapes = torch.tensor([[SIZE // 8] * 2] * len(PIXELS))
    output = theirs(TOKENS, patches, torch.ones(patches.shape[:2], dtype=torch.int64), shapes)
    return output.image_embeds, output.text_embeds


def check_features(module, image_features, text_features):
    """At most 1e-6 apart, in float32."""
    with torch.inference_mode():
        images, texts = module.encode_image(PIXELS, normalize=True), module.encode_text(TOKENS, normalize=True)
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
        check_features(module, *their_features(theirs, kind))
    back = to_transformers(from_transformers(theirs.state_dict()), TABLES[kind])
    for name, tensor in theirs.state_dict().items():
        if kind == "siglip2" and "patch_embedding" in name:
            continue  # a convolution in SiglipModel, for which the table is
        assert torch.equal(back.pop(name), tensor), name
    assert not {name for name in back if "patch_embedding" not in name}


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


@pytest.mark.parametrize("large", [{"img_size": 64}, {"img_size": 64, "patch_size": 16}, {"patch_size": 16}])
def test_embeddings_of_a_timm_tower_are_resized_as_timm_does(tmp_path, large):
    """Positions by bicubic interpolation, patches by the pseudo-inverse of FlexiViT."""
    torch.save(pretrained.randomize(build_model(ModelConfig(towers=pretrained.SIGLIP))).state_dict(), tmp_path / "a.pt")
    name = pretrained.register("siglip" + "".join(f"_{value}" for value in large.values()), **large)
    towers = pretrained.SIGLIP | {"vision_cfg": pretrained.SIGLIP["vision_cfg"] | {"timm_model_name": name}}
    module, found = loaded(model_from(tmp_path / "a.pt", towers))
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    trunk = {name.removeprefix("visual.trunk."): t for name, t in state.items() if "trunk" in name}
    for name, tensor in checkpoint_filter_fn(trunk, module.visual.trunk).items():
        assert torch.equal(module.visual.trunk.state_dict()[name], tensor), name
    assert not found.missing + found.unused
    assert "resized: visual.trunk.p" in found.text()
