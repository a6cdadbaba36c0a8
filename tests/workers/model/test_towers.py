"""Models that a config can name, and the errors for those that it cannot."""

import pytest
import torch

from sigray.workers.config import ModelConfig
from sigray.workers.model.inputs import shapes
from sigray.workers.model.tokenizer import build_tokenizer
from sigray.workers.model.towers import build_model, check_model, normalize_pixels
from tests.helpers.data import TOWERS


def changed(**vision) -> ModelConfig:
    return ModelConfig(towers={**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], **vision}})


def test_named_open_clip_model():
    model = ModelConfig(name="ViT-B-16-SigLIP")
    assert shapes(model) == (224, 64, 32000)
    check_model(model)


def test_unknown_name_tells_what_is_near():
    with pytest.raises(ValueError, match=r"no model 'ViT-B-17'; near it: .*ViT-B-16"):
        check_model(ModelConfig(name="ViT-B-17"))


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


def test_open_clip_tokenizer_pads_and_cuts():
    tokens = build_tokenizer(ModelConfig(towers=TOWERS), 8, 49408)(["a cat", "word " * 30])
    assert tokens.shape == (2, 8)
    assert tokens.dtype == "int32"
    assert tokens[0].tolist() == [49406, 320, 2368, 49407, 0, 0, 0, 0]
    assert tokens[1][-1] == 49407
