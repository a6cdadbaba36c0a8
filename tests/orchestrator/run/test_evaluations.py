"""The best checkpoint by the figures of its evaluation."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from sigray.orchestrator.config import RunConfig, parse_config
from sigray.orchestrator.run.evaluations import Evaluations, submit_evaluation
from sigray.orchestrator.run.progress import Display
from sigray.workers.checkpoint.index import CheckpointInfo, list_checkpoints
from sigray.workers.checkpoint.writer import CheckpointWriter, read_best
from sigray.workers.storage import Storage
from tests.helpers.data import TOWERS


def evaluations_of(storage: Storage, **sections: Any) -> tuple[Evaluations, RunConfig, io.StringIO]:
    """A queue of evaluations without processes, its config, and what it says."""
    content = {
        "run": {"name": "small"},
        "data": {"shards": "tars"},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 1000, "global_batch_size": 100},
    }
    config = parse_config(content | sections, "test")
    said = io.StringIO()
    display = Display(Console(file=said, width=500))
    folder: Any = SimpleNamespace(storage=storage)
    nothing: Any = None
    return Evaluations(config, folder, nothing, nothing, display, nothing), config, said


def test_the_best_checkpoint_is_kept(tmp_path):
    """Figures as they come in, and the writer's own pruning after each checkpoint."""
    storage = Storage(tmp_path)
    figure = "zero_shot.colours.top1"
    evaluations, config, said = evaluations_of(storage, checkpoint={"keep_best": figure, "keep_newest": 1})
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters())
    writer = CheckpointWriter(storage, module, optimizer, config.checkpoint, {}, warn=print)
    kept = []
    for step, value in [(10, 0.3), (20, 0.7), (30, 0.7), (40, 0.5), (50, 0.9), (60, None), (70, 0.8)]:
        writer.save(step, step * 100)
        writer.wait()
        kept.append([info.step for info in list_checkpoints(storage)])
        evaluations._mark_best({"step": step, "zero_shot": {"colours": {"top1": value}}})
    writer.close()
    # The newest, which has no figure yet, and the best of those before.
    assert kept == [[10], [10, 20], [20, 30], [20, 40], [20, 50], [50, 60], [50, 70]]
    assert read_best(storage) == ("step-0000000050", 0.9)
    assert said.getvalue().count("is no figure of the evaluation: nothing is marked as best") == 1


def test_without_keep_best_nothing_is_marked(tmp_path):
    evaluations, _, _ = evaluations_of(Storage(tmp_path))
    evaluations._mark_best({"step": 10, "zero_shot": {"colours": {"top1": 0.5}}})
    assert read_best(Storage(tmp_path)) is None


@pytest.mark.parametrize(
    ("loss", "phases", "expected"),
    [
        (1, [], {0: False, 1: True, 10: True}),
        (0, [{"start": 500, "loss": {"caption_weight": 1}}], {0: False, 5: False, 6: True, 10: True}),
        (1, [{"start": 500, "loss": {"caption_weight": 0}}], {0: False, 5: True, 6: True}),
    ],
    ids=["from the start", "later", "at first"],
)
def test_only_a_decoder_that_has_trained_writes_captions(loss, phases, expected, tmp_path, monkeypatch):
    sections = {"model": {"towers": TOWERS, "decoder": {}}, "loss": {"caption_weight": loss}, "phases": phases}
    storage = Storage(tmp_path)
    _, config, _ = evaluations_of(storage, **sections)
    folder: Any = SimpleNamespace(storage=storage)
    monkeypatch.setattr("ray.remote", lambda **_: lambda _: SimpleNamespace(remote=lambda job: job))
    found = {
        step: submit_evaluation(config, folder, CheckpointInfo(f"step-{step}", step, step * 100, {}, {})).captions
        for step in expected
    }
    assert found == expected
