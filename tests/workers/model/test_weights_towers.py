"""`model.init_from` alone: towers from the config beside the weights, the whole way to an export; refusals by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from sigray.orchestrator.config import parse_config
from sigray.orchestrator.run.preflight import with_inputs
from sigray.workers.config import ModelConfig
from sigray.workers.model.export import EXPORTERS
from sigray.workers.model.init_weights import build_initial_model, check_initial_weights
from sigray.workers.model.inputs import shapes
from sigray.workers.model.tower_traits import tower_traits
from sigray.workers.model.towers import build_model
from sigray.workers.model.trained_inputs import take_inputs
from sigray.workers.model.weights_source import find_weights
from sigray.workers.model.weights_towers import DEFAULTS, weights_model
from sigray.workers.siglip_vits import TIMM_SHAPES, SiglipVit, resized, siglip_vit
from tests.helpers import pretrained
from tests.helpers.pretrained import LENGTH, SIZE, WORDS, their_features, transformers_model

PIXELS = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(1, WORDS - 1, (3, LENGTH), generator=torch.Generator().manual_seed(1))
TOKENS[:, -1] = WORDS - 1  # the highest id, which CLIP pools
ACTS = {"gelu": "", "gelu_pytorch_tanh": "_gelu_tanh", "quick_gelu": "_quick_gelu"}


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {f"w{number}": number for number in range(WORDS - 1)} | {"</s>": WORDS - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", WORDS - 1)])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("kind", "act"),
    [("siglip", act) for act in ACTS] + [("siglip2", "gelu_pytorch_tanh"), ("clip", "gelu"), ("clip", "quick_gelu")],
)
def test_a_folder_of_transformers_alone_and_back(tmp_path, kind, act):
    """Features at most 1e-6 apart, and after the export the bits of the source."""
    theirs = transformers_model(kind, act)
    theirs.save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    bias = {"init_logit_bias": None} if kind == "clip" else {}
    model, remarks = take_inputs(ModelConfig(init_from=str(tmp_path / "in"), **bias), {})
    assert (remarks, model.tokenizer) == ([], str(tmp_path / "in" / "tokenizer.json"))
    found = check_initial_weights(model)
    assert (found.missing, found.unused, found.resized) == ([], [], {})
    module = build_initial_model(model).eval()
    with torch.inference_mode():
        images, texts = module.encode_image(PIXELS, normalize=True), module.encode_text(TOKENS, normalize=True)
        for own, other in zip((images, texts), their_features(theirs, kind, TOKENS, PIXELS), strict=True):
            torch.testing.assert_close(own, normalize(other, dim=-1), atol=1e-6, rtol=0)
    (tmp_path / "out").mkdir()
    EXPORTERS["transformers"](module, model, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if kind == "siglip2" and name.endswith(
            "patch_embedding.weight"
        ):  # a linear layer there, (row, column, channel)
            tensor = tensor.reshape(-1, 8, 8, 3).permute(0, 3, 1, 2)
        assert torch.equal(after[name], tensor), name
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {written[f"{side}_config"]["hidden_act"] for side in ("vision", "text")} == {act}
    # sigray reads its own export, and the model section of a run's config.yaml.
    again, _ = take_inputs(ModelConfig(init_from=str(tmp_path / "out"), **bias), {})
    assert again.towers == model.towers
    assert ModelConfig(**yaml.safe_load(yaml.safe_dump(model.model_dump(mode="json")))) == model


def test_an_end_token_that_is_not_the_highest_is_kept(tmp_path):
    """CLIP reads a text at this token; the export says it again."""
    transformers_model("clip").save_pretrained(tmp_path)
    edit(tmp_path / "config.json", "text_config", eos_token_id=7)
    write_tokenizer(tmp_path)
    model, _ = take_inputs(ModelConfig(init_from=str(tmp_path), init_logit_bias=None), {})
    theirs = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    tokens = TOKENS.clone()
    tokens[:, 3] = 7
    module = build_initial_model(model).eval()
    with torch.inference_mode():
        expected = normalize(theirs(input_ids=tokens, pixel_values=PIXELS).text_embeds, dim=-1)
        torch.testing.assert_close(module.encode_text(tokens, normalize=True), expected, atol=1e-6, rtol=0)
    (tmp_path / "out").mkdir()
    EXPORTERS["transformers"](module, model, tmp_path / "out")
    assert transformers.CLIPConfig.from_pretrained(tmp_path / "out").text_config.eos_token_id == 7


@pytest.mark.parametrize(
    ("form", "towers"), [("open_clip", "CLIP"), ("safetensors", "CLIP"), ("safetensors", "SIGLIP")]
)
def test_an_export_alone(tmp_path, form, towers):
    write_tokenizer(tmp_path)
    given = ModelConfig(towers=getattr(pretrained, towers), tokenizer=str(tmp_path / "tokenizer.json"))
    trained = pretrained.randomize(build_model(given))
    (tmp_path / "out").mkdir()
    EXPORTERS[form](trained, given, tmp_path / "out")
    model, _ = take_inputs(ModelConfig(init_from=str(tmp_path / "out")), {})
    assert (model.towers, model.image_resize) == (given.towers, "shortest")
    own = build_initial_model(model).state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("vit_base_patch16_siglip_224", 384, "vit_base_patch16_siglip_384"),
        ("vit_base_patch16_siglip_224", 320, "siglip_vit_w768_d12_h12_m3072_p16_s320"),
        ("vit_so400m_patch14_siglip_378", 224, "vit_so400m_patch14_siglip_224"),
        ("vit_so400m_patch16_siglip_256", 320, "siglip_vit_w1152_d27_h16_m4304_p16_s320_gelu_tanh"),
        ("siglip_vit_w64_d4_h4_m256_p8_s32_quick_gelu", 48, "siglip_vit_w64_d4_h4_m256_p8_s48_quick_gelu"),
        ("vit_base_patch16_siglip_gap_224", 384, "vit_base_patch16_siglip_gap_224"),  # no tower of SigLIP's
        ("convnext_base", 384, "convnext_base"),
    ],
)
def test_the_name_of_a_tower_for_another_image_size(name, size, expected):
    assert resized(name, size) == expected


def test_towers_for_another_image_size_differ_in_their_positions_alone():
    for towers in (pretrained.SIGLIP, pretrained.CLIP):
        before, after = (build_model(ModelConfig(towers=towers, image_size=size)) for size in (None, 2 * SIZE))
        there = after.state_dict()
        changed = {name for name, tensor in before.state_dict().items() if tensor.shape != there[name].shape}
        assert len(changed) == 1
        assert "pos" in changed.pop()
        assert after.encode_image(torch.zeros(1, 3, 2 * SIZE, 2 * SIZE)).shape == (1, towers["embed_dim"])


def test_a_checkpoint_of_a_run_alone(tmp_path):
    """Name or towers of the run's config.yaml, and the bottleneck that its tensors have."""
    step = tmp_path / "run" / "checkpoints" / "step-0000000004"
    step.mkdir(parents=True)
    section = {"towers": pretrained.CLIP, "token_bottleneck": 4, "tokenizer": "open_clip"}
    module = pretrained.randomize(build_model(ModelConfig(**section)))
    save_file(module.state_dict(), step / "model.safetensors")
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"model": section}))
    for place in (step, step / "model.safetensors"):
        model, _ = take_inputs(ModelConfig(init_from=str(place)), {})
        assert (model.towers, model.token_bottleneck) == (pretrained.CLIP, 4)
        assert not check_initial_weights(model).missing
    # The checkpoint of a phase has an image size of its own.
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"model": section | {"image_size": 48}}))
    assert take_inputs(ModelConfig(init_from=str(step)), {})[0].image_size == 48
    (step / "commit.json").write_text(json.dumps({"model": section | {"image_size": 64}}))
    for given, expected in ((None, 64), (32, 32)):
        model, _ = take_inputs(ModelConfig(init_from=str(step), image_size=given), {})
        assert shapes(model)[0] == expected
    named = {"name": "ViT-B-16-SigLIP", "tokenizer": "open_clip"}
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"model": named}))
    assert weights_model(find_weights(str(step))).name == "ViT-B-16-SigLIP"


def test_a_run_that_goes_on_keeps_its_towers_without_the_weights(tmp_path):
    transformers_model("siglip").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    content = {
        "run": {"name": "a"},
        "data": {"shards": "x.tar"},
        "model": {"init_from": str(tmp_path)},
        "train": {"num_samples": 8, "global_batch_size": 8},
    }
    config = parse_config(content, "a")
    begun = with_inputs(config, print)
    assert begun.model.towers["vision_cfg"] == pretrained.SIGLIP["vision_cfg"]
    assert parse_config(yaml.safe_load(begun.to_yaml()), "b") == begun
    edit(tmp_path / "config.json", "vision_config", hidden_act="quick_gelu")
    assert with_inputs(config, print, begun) == begun
    (tmp_path / "model.safetensors").unlink()
    assert with_inputs(config, print, begun) == begun


def edit(path: Path, section: str | None, **fields: Any) -> None:
    content = json.loads(path.read_text())
    (content[section] if section else content).update(fields)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("kind", "section", "fields", "match"),
    [
        (
            "siglip",
            "text_config",
            {"hidden_act": "relu"},
            "text_config.hidden_act='relu': towers here have one of gelu",
        ),
        ("siglip", "vision_config", {"hidden_act": "silu"}, "vision_config.hidden_act='silu'"),
        ("siglip", "vision_config", {"layer_norm_eps": 1e-5}, "vision_config.layer_norm_eps=1e-05: .* have 1e-06"),
        ("siglip", "vision_config", {"vision_use_head": False}, "vision_use_head=False"),
        ("siglip", "vision_config", {"num_channels": 1}, "num_channels=1"),
        ("siglip", "text_config", {"projection_size": 16}, "projection_size=16: the image tower gives 32 numbers"),
        ("siglip", "text_config", {"num_attention_heads": 3}, "num_attention_heads=3: hidden_size=32 is no multiple"),
        ("siglip", "text_config", {"hidden_size": "big"}, "hidden_size='big': a whole number"),
        ("siglip", "vision_config", {"num_hidden_layers": 10**6}, "no towers that can be used: .*layers=1000000"),
        ("siglip2", "vision_config", {"num_patches": 17}, "num_patches=17: no square"),
        ("clip", "text_config", {"hidden_act": "gelu"}, "text_config.hidden_act='gelu': .* quick_gelu both or neither"),
        ("siglip", None, {"vision_config": 3}, "vision_config is no mapping"),
        ("siglip", None, {"model_type": "siglip_text_model"}, "model_type=siglip_text_model has no vision tower"),
    ],
)
def test_what_towers_cannot_express_is_refused_by_name(tmp_path, kind, section, fields, match):
    transformers_model(kind).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    edit(tmp_path / "config.json", section, **fields)
    with pytest.raises(ValueError, match=match) as error:
        take_inputs(ModelConfig(init_from=str(tmp_path)), {})
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "alone does not say its towers .*set model.name or model.towers"),
        ({"config.json": {"architecture": "vit"}}, "alone does not say its towers .format timm"),
        ({"open_clip_config.json": {"model_cfg": 3}}, "model_cfg in open_clip_config.json is no mapping"),
        ({"open_clip_config.json": {"model_cfg": {"embed_dim": 3}}}, "towers needs the keys"),
        ({"config.json": {"model": {"towers": pretrained.CLIP, "image_tower": "a.b:c"}, "preprocessing": {}}},
         "trained with model.image_tower=a.b:c, and no code"),
        ({"config.json": {"model_type": "siglip"}}, "has no tokenizer.json"),
        ({"open_clip_config.json":
            {"model_cfg": pretrained.CLIP | {"text_cfg": {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}}}},
         "has no tokenizer.json, and its model has another tokenizer than CLIP's"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_say_its_model_is_refused(tmp_path, files, match):
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "model.safetensors")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=match):
        take_inputs(ModelConfig(init_from=str(tmp_path)), {})


def changed(towers: dict[str, Any], section: str | None = None, **fields: Any) -> dict[str, Any]:
    towers = copy.deepcopy(towers)
    (towers[section] if section else towers).update(fields)
    return towers


def epsilon(towers: dict[str, Any]) -> dict[str, Any]:
    return changed(towers, "text_cfg", norm_kwargs={"eps": 1e-5})


@pytest.mark.parametrize(
    ("kind", "act", "towers", "match"),
    [
        ("siglip", "gelu_pytorch_tanh", pretrained.SIGLIP,
         "says activation 'gelu_pytorch_tanh' of the visual tower, and model.towers has 'gelu'"),
        ("siglip", "gelu", pretrained.towers("gelu_tanh"), "'gelu' of the visual .* has 'gelu_pytorch_tanh'"),
        ("clip", "gelu", pretrained.CLIP, "activation 'gelu' of the visual tower, and model.towers has 'quick_gelu'"),
        ("clip", "quick_gelu", changed(pretrained.CLIP, quick_gelu=False), "'quick_gelu' of .* has 'gelu'"),
        ("siglip", "gelu", epsilon(pretrained.SIGLIP), "norm epsilon '1e-06' of the text tower, .* has '1e-05'"),
        ("siglip", "gelu", changed(pretrained.SIGLIP, "text_cfg", pool_type="first"), "pooling 'last' of the text"),
        ("siglip", "gelu", changed(pretrained.SIGLIP, "text_cfg", no_causal_mask=False), "mask 'none' of the text"),
        ("clip", "quick_gelu", changed(pretrained.CLIP, "vision_cfg", pool_type="avg"), "pooling 'tok' of the visual"),
        ("siglip", "relu", pretrained.SIGLIP, "vision_config.hidden_act='relu'"),
    ],
)  # fmt: skip
def test_towers_that_compute_something_else_than_the_weights_did_are_an_error(tmp_path, kind, act, towers, match):
    transformers_model(kind, act).save_pretrained(tmp_path)
    model = ModelConfig(towers=towers, init_from=str(tmp_path))
    with pytest.raises(ValueError, match=match) as error:
        check_initial_weights(model)
    assert str(tmp_path) in str(error.value)
    fresh = ModelConfig(towers=towers, init_from=str(tmp_path), init_fresh=[r"visual\..*"])
    if "visual" in match and act == "gelu" and kind == "siglip":
        check_initial_weights(fresh)  # a tower that takes no weights may differ


def test_towers_of_a_model_that_sigray_does_not_build_can_be_taken(tmp_path):
    """As those of a CoCa: there is nothing to compare with, and `towers` must be given."""
    config = {"model_cfg": pretrained.CLIP | {"multimodal_cfg": {"width": 8}}, "preprocess_cfg": {"size": SIZE}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(build_model(ModelConfig(towers=pretrained.CLIP)).state_dict(), tmp_path / "open_clip_model.safetensors")
    assert not check_initial_weights(ModelConfig(towers=pretrained.CLIP, init_from=str(tmp_path))).missing
    with pytest.raises(ValueError, match="describes no towers that can be used: .*multimodal_cfg"):
        take_inputs(ModelConfig(init_from=str(tmp_path)), {})


def test_towers_of_another_program_that_agree_are_no_error(tmp_path):
    """Resized embeddings, and towers written in other words."""
    transformers_model("siglip").save_pretrained(tmp_path)
    towers = changed(pretrained.towers(image_size=64), "text_cfg", mlp_ratio=4, act_kwargs={"approximate": "none"})
    assert check_initial_weights(ModelConfig(towers=towers, init_from=str(tmp_path))).resized


def test_the_defaults_are_those_of_transformers():
    """A config.json leaves out what has its default; transformers need not be installed to read it."""
    kinds = {"siglip": "Siglip", "siglip2": "Siglip2", "clip": "CLIP"}
    for (family, side), own in DEFAULTS.items():
        theirs = getattr(transformers, f"{kinds[family]}{side.capitalize()}Config")().to_dict()
        for field, value in own.items():
            assert theirs[field] == (768 if field == "projection_size" else value), (family, side, field)


def test_timms_own_names_stand_for_timms_own_shapes():
    """So their exports for open_clip work; a shape that timm has is named by timm."""
    widths = {"base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096)}
    widths |= {"so400m": (1152, 27, 16, 4304), "giantopt": (1536, 40, 16, 6144)}
    names = {}
    for (size, patch, act), image_sizes in TIMM_SHAPES.items():
        for image_size in image_sizes:
            shape = SiglipVit(*widths[size], patch, image_size, act)
            assert siglip_vit(shape.name) is None
            names[shape.name] = shape
    assert names.keys() == {name for name in timm.list_models("vit_*_siglip_[0-9]*")}
    for name, shape in names.items():
        if shape.width > 768 and shape.image_size not in (256, 378):
            continue  # the others differ in the image size alone; built on the meta device, each takes 0.2 s
        with torch.device("meta"):
            tower = timm.create_model(name, num_classes=0)
        block = tower.blocks[0]
        assert (block.mlp.fc1.in_features, len(tower.blocks), block.attn.num_heads) == (
            shape.width,
            shape.depth,
            shape.heads,
        )
        assert (block.mlp.fc1.out_features, tower.patch_embed.patch_size[0]) == (shape.mlp, shape.patch_size)
        assert tower.patch_embed.img_size[0] == shape.image_size
        traits = {"activation": "gelu" if shape.act == "gelu" else "gelu_pytorch_tanh", "norm epsilon": "1e-06"}
        assert traits.items() <= tower_traits(tower).items()


def test_a_config_of_a_large_siglip_gets_timms_name(tmp_path):
    """And the tower of open_clip's own config, but for its activation, which the config of transformers names."""
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "model.safetensors")
    sides = {"vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "gelu"}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"} | sides))
    model = weights_model(find_weights(str(tmp_path)))
    assert model.towers["vision_cfg"]["timm_model_name"] == "vit_base_patch16_siglip_224"
    assert shapes(model) == (224, 64, 32000)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    model = weights_model(find_weights(str(tmp_path)))
    assert model.towers["vision_cfg"]["timm_model_name"] == "siglip_vit_w768_d12_h12_m3072_p16_s224_gelu_tanh"


def test_an_mlp_of_any_size_is_open_clips_ratio(tmp_path):
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "model.safetensors")
    for width, inside in ((1152, 4304), (768, 3072), (48, 97), (7, 5), (999, 1000)):
        text = {"hidden_size": width, "intermediate_size": inside, "num_attention_heads": 1, "projection_size": 768}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "text_config": text}))
        ratio = weights_model(find_weights(str(tmp_path))).towers["text_cfg"]["mlp_ratio"]
        assert int(width * ratio) == inside
        assert width != 1152 or ratio == 3.7362  # as in open_clip's config


@pytest.mark.parametrize(
    ("name", "size", "match"),
    [
        ("siglip_vit_w64_d4_h4_m256_p8", 32, "holds no shape: write siglip_vit_w64_d4_h4_m256_p8_s32"),
        ("siglip_vit_w64_d4_h4_m256_p8_s32_relu", 32, "holds no shape"),
        ("siglip_vit_w64_d4_h3_m256_p8_s32", 32, "width 64 is no multiple of its 3 heads"),
        ("siglip_vit_w64_d4_h4_m256_p8_s32", 64, "image_size=64, and .* has images of 32 pixels"),
        ("siglip_vit_w99999_d4_h1_m256_p8_s32", 32, "width=99999: a whole number from 1 to"),
        ("siglip_vit_w64_d4_h4_m0_p8_s32", 32, "its MLP needs 1 to"),
        ("siglip_vit_w64_d4_h4_m256_p64_s32", 32, "patch_size=64 is larger than image_size=32"),
    ],
)
def test_a_name_without_a_usable_shape_is_refused(name, size, match):
    towers = changed(pretrained.SIGLIP, "vision_cfg", timm_model_name=name, image_size=size)
    with pytest.raises(ValueError, match=match):
        ModelConfig(towers=towers)


def test_a_shape_that_open_clip_cannot_name_is_not_exported_for_it(tmp_path):
    """open_clip of this process would load it, and plain open_clip would not."""
    model = ModelConfig(towers=pretrained.SIGLIP)
    with pytest.raises(ValueError, match="plain open_clip knows no image tower siglip_vit_.*: take --format transf"):
        EXPORTERS["open_clip"](build_model(model), model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_way_of_the_fine_tuning_page(tmp_path):
    """The small SigLIP of the examples: written by transformers, read by init_from alone, exported, classified with."""
    sections = {name: yaml.safe_load(Path(f"examples/{name}.yaml").read_text())["model"] for name in (
        "small_siglip", "emoji_finetune")}  # fmt: skip
    write_tokenizer(tmp_path)
    small = ModelConfig(**sections["small_siglip"] | {"tokenizer": str(tmp_path / "tokenizer.json")})
    module = pretrained.randomize(build_model(small))
    (tmp_path / "small").mkdir()
    EXPORTERS["transformers"](module, small, tmp_path / "small")
    for kind in (transformers.AutoModel, transformers.AutoProcessor):
        kind.from_pretrained(tmp_path / "small").save_pretrained(tmp_path / "again")
    assert sections["emoji_finetune"] == {"init_from": "data/small_siglip"}
    model, remarks = take_inputs(ModelConfig(init_from=str(tmp_path / "again")), {})
    assert (remarks, model.text_clean) == ([], "none")
    assert model.towers["vision_cfg"] == small.towers["vision_cfg"]
    assert not check_initial_weights(model).missing
    own = build_initial_model(model)
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in module.state_dict().items())
    (tmp_path / "out").mkdir()
    EXPORTERS["transformers"](own, model, tmp_path / "out")
    classify = transformers.pipeline("zero-shot-image-classification", model=str(tmp_path / "out"))
    image = Image.fromarray(np.full((40, 40, 3), 90, np.uint8))
    answers = classify(image, candidate_labels=["w1", "w2"], hypothesis_template="{}")
    assert {each["label"] for each in answers} == {"w1", "w2"}
