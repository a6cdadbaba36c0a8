"""Models that a config can name, and the errors for those that it cannot."""

import contextlib
import copy
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigray.orchestrator.run.preflight import check_tokenizer
from sigray.workers.config import ModelConfig
from sigray.workers.model.inputs import shapes
from sigray.workers.model.tokenizer import build_tokenizer
from sigray.workers.model.towers import build_model, check_model, normalize_pixels
from sigray.workers.model.untrusted import open_clip_folder
from tests.helpers.data import TOWERS


def changed(**vision) -> ModelConfig:
    return ModelConfig(towers={**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], **vision}})


def test_named_open_clip_model():
    model = ModelConfig(name="ViT-B-16-SigLIP")
    assert shapes(model) == (224, 64, 32000)
    check_model(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-17", r"no model 'ViT-B-17'; near it: .*ViT-B-16"),
        ("vit-b-16-siglp", r"near it: .*ViT-B-16-SigLIP"),
        ("../model_configs/ViT-B-16", r"no model '../model_configs/ViT-B-16'"),
        ("coca_ViT-B-32", r"^model.name=coca_ViT-B-32: multimodal_cfg: a CoCa model .*: take a model of two towers"),
    ],
)
def test_names_that_cannot_be_used(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_model(ModelConfig(name=name))
    assert "\n" not in str(caught.value)


def test_each_model_of_open_clip_has_two_towers_or_is_refused_by_name():
    refused = []
    for path in (open_clip_folder() / "model_configs").glob("*.json"):
        try:
            size, context_length, vocab_size = shapes(ModelConfig(name=path.stem))
            assert min(size, context_length, vocab_size or 1) > 0
        except ValueError as error:
            refused.append(str(error).partition(": multimodal_cfg: a CoCa model")[0])
    names = ("coca_ViT-B-32", "coca_ViT-L-14", "coca_base", "coca_roberta-ViT-B-32")
    assert sorted(refused) == [f"model.name={name}" for name in names]


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"depth": 3}, "open_clip cannot build this model: .*depth"),
        ({"pool_type": "none"}, r"image_features of two pairs have shape \(2, 5, 16\)"),
        ({"image_size": [16, 32]}, "not square"),
    ],
)
def test_towers_that_cannot_be_used(vision, message):
    with pytest.raises(ValueError, match=message):
        check_model(changed(**vision))


@settings(max_examples=60)
@given(
    st.sampled_from(["embed_dim", "vision_cfg", "text_cfg", "quick_gelu"])
    | st.tuples(
        st.sampled_from(["vision_cfg", "text_cfg"]),
        st.sampled_from(["width", "layers", "heads", "head_width", "image_size", "patch_size", "context_length"])
        | st.sampled_from(["vocab_size", "mlp_ratio", "pool_type", "act_kwargs", "norm_kwargs", "timm_model_name"])
        | st.sampled_from(["pos_embed_type", "attentional_pool", "output_tokens", "embed_cls", "unknown"]),
    ),
    st.sampled_from(
        [0, -1, 10**9, 10**400, 1.5, "12", "", None, True, [], [16], [16, 16, 0], {}, {"a": 1}, "sin_cos_2d"]
    ),
)
def test_any_value_of_the_towers_runs_or_is_refused_at_once(key, value):
    """No traceback, no time, no memory: the meta device has none, but loops and positions in numpy would."""
    towers = copy.deepcopy(TOWERS)
    section, name = (towers, key) if isinstance(key, str) else (towers[key[0]], key[1])
    section[name] = value
    start = time.process_time()
    with contextlib.suppress(ValueError):
        check_model(ModelConfig(towers=towers))
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"image_size": 0}, r"towers.vision_cfg.image_size=0: a whole number from 1 to 8192 expected"),
        ({"layers": 10**9}, r"towers.vision_cfg.layers=1000000000: a whole number from 1 to 1000 expected"),
        ({"patch_size": 17}, r"patch_size=17 is larger than image_size=16"),
        ({"image_size": 8192, "patch_size": 1}, r"into 67108864 patches, at most 16384"),
        ({"timm_model_name": "hf-hub:a/b"}, r"timm_model_name='hf-hub:a/b' names a folder or a repository"),
    ],
)
def test_sizes_are_checked_with_the_config(vision, message):
    with pytest.raises(ValueError, match=message):
        changed(**vision)


def test_weights_load_in_plain_open_clip():
    from open_clip.model import CustomTextCLIP

    module = build_model(ModelConfig(towers=TOWERS))
    plain = CustomTextCLIP(**TOWERS, init_logit_bias=0.0)
    plain.load_state_dict(module.state_dict())
    image, text = torch.randn(2, 3, 16, 16), torch.randint(0, 400, (2, 8))
    torch.testing.assert_close(plain.encode_image(image, normalize=True), module(image, text)["image_features"])


def test_pixels_are_normalised_on_the_device():
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 2, 2, 3)
    model = ModelConfig(towers=TOWERS, image_mean=(0.5, 0.4, 0.3), image_std=(0.5, 0.2, 0.1))
    expected = torch.tensor([(0 - 0.5) / 0.5, (128 / 255 - 0.4) / 0.2, (1 - 0.3) / 0.1])
    torch.testing.assert_close(normalize_pixels(images, model)[0, :, 1, 1], expected)


def test_tokenizer_file_missing_or_too_large(tmp_path):
    model = ModelConfig(towers=TOWERS, tokenizer=str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"model.tokenizer: .*none.json does not exist"):
        build_tokenizer(model, 8, 100)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({str(number): number for number in range(120)})).save(str(tmp_path / "big.json"))
    with pytest.raises(ValueError, match=r"big.json is 119, but text_cfg\.vocab_size is 100: set it to 120 or more"):
        build_tokenizer(model.model_copy(update={"tokenizer": str(tmp_path / "big.json")}), 8, 100)


@pytest.fixture
def words(tmp_path):
    """Writes a tokenizers file of words; gives its path."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    def write(vocabulary: dict[str, int], end: str | None = None) -> str:
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if end is not None:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
            )
        tokenizer.save(str(tmp_path / "words.json"))
        return str(tmp_path / "words.json")

    return write


def test_the_highest_token_counts_and_not_their_number(words):
    model = ModelConfig(towers=TOWERS, tokenizer=words({"a": 0, "gap": 3406}))
    with pytest.raises(ValueError, match=r"words.json is 3406, but text_cfg.vocab_size is 80: set it to 3407 or more"):
        build_tokenizer(model, 8, 80)
    assert build_tokenizer(model, 8, 3407)(["gap"])[0][0] == 3406


def test_open_clips_bpe_needs_its_vocabulary():
    with pytest.raises(ValueError, match=r"BPE has 49408 tokens, text_cfg.vocab_size is 4096: set it to 49408, or"):
        build_tokenizer(ModelConfig(towers=TOWERS), 8, 4096)
    with pytest.raises(ValueError, match="vocab_size is 4096"):  # in `sigray plan`, too
        check_tokenizer(ModelConfig(towers={**TOWERS, "text_cfg": {**TOWERS["text_cfg"], "vocab_size": 4096}}))


@pytest.mark.parametrize(
    "content", ['{"red": 0, "green": 1}', '[{"id": 0, "name": "red"}]', "", "{", "\0", "[" * 10**5]
)
def test_a_file_of_another_kind_is_no_tokenizers_file(content, tmp_path):
    (tmp_path / "vocab.json").write_text(content)
    model = ModelConfig(towers=TOWERS, tokenizer=str(tmp_path / "vocab.json"))
    with pytest.raises(ValueError, match=r"^model.tokenizer: .*vocab.json is no tokenizers file \(.*give a tokenizer"):
        build_tokenizer(model, 8, 49408)


def test_a_text_is_read_at_its_highest_token_only_if_that_ends_it(words):
    """open_clip's default, which its BPE is made for."""

    def check(vocabulary, end, **text):
        towers = {**TOWERS, "text_cfg": {**TOWERS["text_cfg"], **text}}
        check_tokenizer(ModelConfig(towers=towers, tokenizer=words(vocabulary, end)))

    check({"a": 0, "[EOS]": 1}, "[EOS]")
    check({"[EOS]": 0, "a": 1}, "[EOS]", pool_type="last")
    for vocabulary, end in (({"[EOS]": 0, "a": 1}, "[EOS]"), ({"a": 0, "b": 1}, None)):
        with pytest.raises(ValueError, match=r"and 1, the highest of .*words.json, does not end .*pool_type=last"):
            check(vocabulary, end)
    # A run that has begun so goes on.
    model = ModelConfig(towers=TOWERS, tokenizer=words({"a": 0, "b": 1}))
    check_tokenizer(model, is_begun=True)


def test_open_clip_tokenizer_pads_and_cuts():
    tokens = build_tokenizer(ModelConfig(towers=TOWERS), 8, 49408)(["a cat", "word " * 30])
    assert tokens.shape == (2, 8)
    assert tokens.dtype == "int32"
    assert tokens[0].tolist() == [49406, 320, 2368, 49407, 0, 0, 0, 0]
    assert tokens[1][-1] == 49407
