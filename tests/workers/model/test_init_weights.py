"""Weights to begin with: each tensor is accounted for, and what does not fit is told with a remedy."""

import copy

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file

from sigray.orchestrator.config import parse_config
from sigray.workers.config import ModelConfig
from sigray.workers.model.init_weights import check_initial_weights, load_initial_weights
from sigray.workers.model.towers import build_model
from tests.helpers.bare import train_bare
from tests.helpers.data import TOWERS

BASE = ModelConfig(towers=TOWERS)


def changed(vision=None, text=None, **model) -> ModelConfig:
    towers = copy.deepcopy(TOWERS)
    towers["vision_cfg"] |= vision or {}
    towers["text_cfg"] |= text or {}
    return ModelConfig(towers=towers, **model)


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(1)
    module = build_model(BASE)
    save_file(module.state_dict(), tmp_path / "start.safetensors")
    return str(tmp_path / "start.safetensors"), module.state_dict()


def test_all_of_a_checkpoint(file):
    path, weights = file
    module = build_model(changed(init_from=path))
    found = load_initial_weights(module, changed(init_from=path))
    assert sorted(found.matched) == sorted(weights)
    assert found.text() == f"weights from {path}: {len(weights)} of {len(weights)} tensors match"
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pt_file_of_open_clips_clip_class(tmp_path, wrapped):
    """Its text tower's parts stand at the top, and its training writes a dict with `module.` before each name."""
    plain = CLIP(**TOWERS, init_logit_scale=2.5)
    state = plain.state_dict()
    if wrapped:
        state = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    torch.save(state, tmp_path / "clip.pt")
    model = changed(init_from=str(tmp_path / "clip.pt"))
    module = build_model(model)
    found = load_initial_weights(module, model)
    assert found.missing == ["logit_bias"]
    assert module.logit_bias.item() == model.init_logit_bias
    assert module.logit_scale.item() == 2.5
    images, tokens = torch.randn(2, 3, 16, 16), torch.randint(0, 400, (2, 8))
    torch.testing.assert_close(module.encode_image(images), plain.encode_image(images))
    torch.testing.assert_close(module.encode_text(tokens), plain.encode_text(tokens))


def test_positional_embeddings_are_resized_as_open_clip_does(file):
    path, _ = file
    model = changed({"image_size": 32}, {"context_length": 12}, init_from=path)
    module = build_model(model)
    found = load_initial_weights(module, model)
    assert found.resized == {
        "visual.positional_embedding": ((5, 32), (17, 32)),
        "text.positional_embedding": ((8, 16), (12, 16)),
    }
    peer = CustomTextCLIP(**model.towers, init_logit_bias=0.0)
    open_clip.factory.load_checkpoint(peer, path)
    for name, tensor in peer.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name
    assert "resized: visual.positional_embedding [5, 32] -> [17, 32]" in found.text()


@pytest.mark.parametrize(
    ("change", "number", "line", "fresh"),
    [
        ({"text": {"vocab_size": 50}}, 1, "text.token_embedding.weight: [49408, 16] in the file, [50, 16] here",
         [r"text\.token_embedding\..*"]),
        ({"text": {"mlp_ratio": 2.0, "layers": 2}}, 3, "text.transformer.resblocks.0.mlp.c_fc.bias: [64] in the file",
         [rf"text\.transformer\.resblocks\.\d+\.mlp\.c_{end}" for end in (r"fc\..*", r"proj\.weight")]),
        ({"vision": {"width": 48, "head_width": 24}}, 20, "visual.conv1.weight: [32, 3, 8, 8]", [r"visual\..*"]),
    ],
)  # fmt: skip
def test_another_shape_is_refused_with_a_remedy_for_these_tensors_only(file, change, number, line, fresh):
    """The patterns of the remedy match none that fits, and load the rest."""
    path, weights = file
    with pytest.raises(ValueError, match=f": {number} tensors have another shape") as raised:
        check_initial_weights(changed(**change, init_from=path))
    assert line in str(raised.value)
    shown = "', '".join(fresh)
    assert str(raised.value).endswith(f"model.init_fresh=['{shown}']")
    found = check_initial_weights(changed(**change, init_from=path, init_fresh=fresh))
    assert len(found.matched) == len(weights) - number


def test_fresh_by_pattern(file):
    path, weights = file
    model = changed(text={"vocab_size": 50}, init_from=path, init_fresh=[r"text\..*", "logit_.*"])
    torch.manual_seed(2)
    module = build_model(model)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = load_initial_weights(module, model)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, weights[name] if name.startswith("visual.") else before[name]), name
    assert {"logit_scale", "text.token_embedding.weight"} <= set(found.asked_fresh)
    with pytest.raises(ValueError, match=r"init_fresh='vision.*' matches no parameter"):
        check_initial_weights(changed(init_from=path, init_fresh=["vision.*"]))


def test_more_and_less_than_the_model_has(file, tmp_path):
    _, weights = file
    state = {name: tensor for name, tensor in weights.items() if name != "text.ln_final.bias"}
    save_file(state | {"text.extra": torch.zeros(2)}, tmp_path / "other.safetensors")
    found = check_initial_weights(changed(init_from=str(tmp_path / "other.safetensors")))
    assert (found.missing, found.unused) == (["text.ln_final.bias"], ["text.extra"])
    assert "fresh, not in the file: text.ln_final.bias" in found.text()


class Evil:
    def __reduce__(self):
        return eval, ("1 / 0",)


def test_files_that_cannot_be_used(tmp_path, file):
    def refuse(path, match):
        with pytest.raises(ValueError, match=match):
            check_initial_weights(changed(init_from=str(path)))

    refuse(tmp_path / "none.pt", "there is no file or folder .*none.pt")
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    refuse(tmp_path / "evil.pt", "cannot be read as safetensors, or by torch.load with weights_only")
    torch.save([1, 2], tmp_path / "list.pt")
    refuse(tmp_path / "list.pt", "no mapping of names to tensors")
    torch.save({"backbone.conv": torch.zeros(1)}, tmp_path / "other.pt")
    refuse(tmp_path / "other.pt", "none of its 1 tensors is one of the model's: backbone.conv there")
    with pytest.raises(ValueError, match="has no effect without init_from"):
        changed(init_fresh=["text.*"])


def test_a_run_begins_with_them_and_a_resumed_one_does_not_ask_for_them(tmp_path, tar_folder, file):
    """With a rate of nearly zero the loss of a step is that of the weights which it began with."""
    path, _ = file

    def losses(name, last_step=None, **model):
        content = {
            "run": {"name": name, "dir": str(tmp_path)},
            "data": {"shards": str(tar_folder), "num_lanes": 3, "shuffle_window": 10, "block_size": 4},
            "model": {"towers": TOWERS, **model},
            "train": {"num_samples": 48, "global_batch_size": 12, "log_every_steps": 1},
            "optim": {"lr": 1e-12, "weight_decay": 0},
        }
        return train_bare(0, 1, parse_config(content, "test"), last_step)["losses"]

    fresh, begun = losses("fresh"), losses("begun", 2, init_from=path)
    assert fresh[1] != begun[1]
    moved = path.replace("start", "moved")
    (tmp_path / "start.safetensors").rename(moved)
    rest = losses("begun", init_from=path)
    assert list(rest) == [3, 4]
    (tmp_path / "moved.safetensors").rename(path)
    whole = losses("whole", init_from=path)
    assert whole == begun | rest
