"""The training loop on bare ranks: bad steps are found before anything is saved of them, and can be left out."""

from __future__ import annotations

import math

import pytest
import torch

from sigray.orchestrator.config import load_config
from sigray.workers.checkpoint.index import list_checkpoints, read_metrics
from sigray.workers.checkpoint.writer import leave_out, load_weights
from sigray.workers.data.manifest import scan_shards
from sigray.workers.model.towers import build_model
from sigray.workers.storage import Storage
from sigray.workers.training.ledger import audit
from sigray.workers.training.log_window import why_bad
from sigray.workers.training.step import BadStep, Trainer
from tests.helpers.bare import train_bare
from tests.helpers.data import write_small_run
from tests.helpers.ranks import run_on_ranks

NUM_STEPS, BAD = 12, 7


@pytest.fixture
def config(tmp_path):
    path = write_small_run(
        tmp_path,
        train={"num_samples": NUM_STEPS * 8, "global_batch_size": 8, "log_every_steps": 4, "ledger": True},
        checkpoint={"save_every_steps": 3},
    )
    return load_config(path)


def train_with_a_bad_step(rank, world_size, config, kind):
    """Step BAD (counted from 1) goes wrong; returns the step that the loop named."""
    original = Trainer.step

    def step(self, batch):
        if batch.step + 1 == BAD and kind == "weights":
            with torch.no_grad():
                self.module.get_parameter("logit_bias").fill_(math.nan)
        result = original(self, batch)
        if batch.step + 1 == BAD and kind == "gradient":
            result.grad_norm.fill_(math.inf)
        return result

    Trainer.step = step
    try:
        train_bare(rank, world_size, config)
    except BadStep as error:
        return error.step
    return None


@pytest.mark.parametrize("kind", ["weights", "gradient"])
def test_a_bad_step_is_named_and_no_checkpoint_is_written_behind_it(config, kind):
    """Steps are logged at 4, 8 and 12, checkpoints due at 3, 6, 9: the one at 9 must not be written."""
    assert run_on_ranks(2, train_with_a_bad_step, config, kind) == [BAD, BAD]
    storage = Storage(config.storage_uri)
    infos = list_checkpoints(storage)
    assert infos[-1].step <= 6
    for info in infos:
        module = build_model(config.model)
        load_weights(storage, info, module)
        assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_a_step_that_is_left_out_changes_nothing_in_any_attempt(config):
    """The run that went back and the run that knew from its beginning end with the same weights."""
    run_on_ranks(2, train_with_a_bad_step, config, "weights")
    storage = Storage(config.storage_uri)
    leave_out(storage, BAD)
    resumed = run_on_ranks(2, train_bare, config)[0]
    knowing = load_config(config.folder.parent.parent / "run.yaml", ["run.name=knowing"])
    leave_out(Storage(knowing.storage_uri), BAD)
    expected, other = run_on_ranks(2, train_bare, knowing)
    # Both ranks must report each checkpoint, in one order.
    assert expected["shared"] == expected["committed"] != []
    assert other["shared"] == [None] * len(expected["committed"])
    assert (expected["num_looks"], other["num_looks"]) == (3, 3)  # before the lines of steps 4, 8 and 12
    assert resumed["files"] == expected["files"] != {}
    manifest = scan_shards(config.data.shards, config.data)
    from sigray.workers.data.worker import build_order

    found = audit(storage, manifest, build_order(manifest, config.data, 0), 8)
    assert found.is_exact
    assert found.left_out == [BAD]
    assert [line["step"] for line in read_metrics(storage, NUM_STEPS)] == [3, 4, 6, 8, 9, 12]


def test_a_leap_is_bad_only_against_enough_good_steps():
    before = [2.0] * 20
    assert why_bad(3.9, 1.0, before, 2.0, {}) == ""
    assert "the loss is 4.1, the median of the 20 steps before it 2" in why_bad(4.1, 1.0, before, 2.0, {})
    assert why_bad(4.1, 1.0, before[:19], 2.0, {}) == ""
    assert why_bad(4.1, 1.0, before, None, {}) == ""
    assert "the loss is nan" in why_bad(math.nan, 1.0, [], None, {})
    terms = {"contrastive_loss": 2.0, "caption_loss": math.nan, "local_loss": math.inf}
    assert why_bad(math.nan, 1.0, [], None, terms) == "the loss is nan (caption_loss nan, local_loss inf)"
    assert "the norm of the gradients is inf" in why_bad(1.0, math.inf, [], None, {})


def test_a_bad_step_travels_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(BadStep(7, "step 7: the loss is nan")))
    assert (error.step, str(error)) == (7, "step 7: the loss is nan")
