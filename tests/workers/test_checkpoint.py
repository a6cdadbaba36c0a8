"""Checkpoints: what is committed comes back bit for bit, what is not is never chosen, what is damaged is named."""

import json

import pytest
import torch

from tests.conftest import TOWERS
from workers.checkpoint import (
    CheckpointError,
    delete_old_checkpoints,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from workers.config import ModelConfig, OptimConfig
from workers.optim import build_optimizer
from workers.storage import Storage, StorageError
from workers.towers import build_model

MODEL = ModelConfig(towers=TOWERS)


def trained(seed: int, steps: int = 2):
    torch.manual_seed(seed)
    module = build_model(MODEL)
    optimizer = build_optimizer(module, OptimConfig())
    for _ in range(steps):
        optimizer.zero_grad()
        output = module(torch.randn(2, 3, 16, 16), torch.randint(0, 400, (2, 8)))
        sum(value.square().sum() for value in output.values()).backward()
        optimizer.step()
    return module, optimizer


def save(storage, step, seed=0):
    return save_checkpoint(
        storage, *trained(seed), step=step, samples_seen=step * 8, model=MODEL.model_dump(mode="json")
    )


def test_comes_back_bit_for_bit(tmp_path):
    storage = Storage(tmp_path)
    module, optimizer = trained(0)
    info = save_checkpoint(storage, module, optimizer, step=3, samples_seen=24, model={})
    other, other_optimizer = trained(1)
    load_checkpoint(storage, info, other, other_optimizer)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    before, after = optimizer.state_dict(), other_optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for number, state in before["state"].items():
        assert all(torch.equal(value, after["state"][number][key]) for key, value in state.items())


def test_what_is_not_committed_is_not_chosen(tmp_path):
    storage = Storage(tmp_path)
    save(storage, 10)
    save(storage, 20)
    (tmp_path / "checkpoints" / "step-0000000020" / "commit.json").unlink()
    assert [info.step for info in list_checkpoints(storage)] == [10]


def test_old_ones_and_what_a_crash_left_are_deleted(tmp_path):
    storage = Storage(tmp_path)
    for step in (10, 20, 30, 40):
        save(storage, step)
    (tmp_path / "checkpoints" / "step-0000000015").mkdir()
    (tmp_path / "checkpoints" / "step-0000000050").mkdir()  # being written
    delete_old_checkpoints(storage, keep_newest=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-0000000030", "step-0000000040", "step-0000000050"]


@pytest.mark.parametrize("damage", [lambda content: content[:-7], lambda content: content[:-1] + b"x"])
def test_damaged_file_is_named(tmp_path, damage):
    storage = Storage(tmp_path)
    info = save(storage, 10)
    file = tmp_path / "checkpoints" / info.name / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"step-0000000010/model\.safetensors is damaged"):
        load_weights(storage, info, trained(1)[0])


def test_another_model_is_named(tmp_path):
    storage = Storage(tmp_path)
    info = save(storage, 10)
    other = build_model(ModelConfig(towers={**TOWERS, "embed_dim": 32}))
    with pytest.raises(CheckpointError, match="step-0000000010 holds another model"):
        load_weights(storage, info, other)


def test_unreadable_commit_is_named(tmp_path):
    storage = Storage(tmp_path)
    info = save(storage, 10)
    (tmp_path / "checkpoints" / info.name / "commit.json").write_text(json.dumps({"step": 10}))
    with pytest.raises(CheckpointError, match="step-0000000010 is not a complete checkpoint"):
        list_checkpoints(storage)


def test_storage_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/below is not writable"):
        Storage(tmp_path / "file" / "below").check_writable()
    with pytest.raises(StorageError, match="gopher://x"):
        Storage("gopher://x/y")


def test_write_leaves_no_half_file(tmp_path):
    storage = Storage(tmp_path)
    storage.write("a/b.txt", b"first")
    storage.write("a/b.txt", b"second")
    assert storage.read("a/b.txt") == b"second"
    assert storage.list("a") == ["b.txt"]
    assert storage.list("none") == []
