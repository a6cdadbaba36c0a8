"""The linear probe against Newton's method, and on sets whose answer is known."""

import json

import pytest
import torch

from sigray.workers.checkpoint.index import list_checkpoints
from sigray.workers.checkpoint.writer import CheckpointWriter
from sigray.workers.config import (
    CheckpointConfig,
    DataConfig,
    EmbeddingsConfig,
    EvalConfig,
    EvalSet,
    ModelConfig,
    OptimConfig,
)
from sigray.workers.data.tar import DataError
from sigray.workers.evaluation.evaluate import evaluate_checkpoint
from sigray.workers.evaluation.features import EvaluationJob
from sigray.workers.evaluation.linear_probe import PENALTIES, fit_logistic, linear_probe
from sigray.workers.model.towers import build_model
from sigray.workers.storage import Storage
from sigray.workers.training.optim import build_optimizer
from tests.helpers.data import TOWERS, write_dataset


def newton(features, labels, num_classes, penalty):
    """The slow twin: full Newton steps with the whole Hessian."""
    ones = torch.ones(len(features), 1, dtype=torch.float64)
    inputs = torch.cat([features, ones], dim=1)
    is_penalised = torch.ones(num_classes, inputs.shape[1], dtype=torch.float64)
    is_penalised[:, -1] = 0

    def loss(flat):
        weights = flat.view(num_classes, -1)
        value = torch.nn.functional.cross_entropy(inputs @ weights.T, labels)
        return value + penalty / 2 * (weights**2 * is_penalised).sum()

    flat = torch.zeros(num_classes * inputs.shape[1], dtype=torch.float64)
    for _ in range(10):
        gradient = torch.autograd.functional.jacobian(loss, flat)
        hessian = torch.autograd.functional.hessian(loss, flat)
        flat = flat - torch.linalg.lstsq(hessian, gradient, driver="gelsd").solution
    return flat.view(num_classes, -1)


def clouds(per_class, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(3, 5, dtype=torch.float64)
    rows = centres.repeat_interleave(per_class, dim=0)
    rows = rows + spread * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    return rows, [f"class {number}" for number in range(3) for _ in range(per_class)]


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_the_solution_is_newtons(penalty):
    features, ids = clouds(20, 0.5, seed=0)
    labels = torch.tensor([int(class_id[-1]) for class_id in ids])
    found, expected = (fit(features, labels, 3, penalty) for fit in (fit_logistic, newton))
    # The biases may all move together; logits up to that are what is determined.
    ours, theirs = (features @ w[:, :-1].T + w[:, -1] for w in (found, expected))
    ours, theirs = (logits - logits.mean(dim=1, keepdim=True) for logits in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_clouds_apart_are_named_and_unknown_classes_are_wrong():
    fit, asked = clouds(20, 0.05, seed=0), clouds(10, 0.05, seed=1)
    figures = linear_probe(*fit, *asked)
    assert figures["top1"] == 1
    assert (figures["chance1"], figures["num_classes"], figures["num_fit"]) == (1 / 3, 3, 60)
    assert figures["penalty"] == max(PENALTIES)  # all of them name every image: the largest of equals
    known = [row for row, class_id in enumerate(fit[1]) if class_id != "class 2"]
    figures = linear_probe(fit[0][known], [fit[1][row] for row in known], *asked)
    assert figures["top1"] == pytest.approx(2 / 3)
    assert figures["num_unknown"] == 10


def test_labels_without_meaning_give_chance():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1500, 5, generator=generator)
    ids = [f"class {number}" for number in torch.randint(3, (1500,), generator=generator).tolist()]
    figures = linear_probe(features[:300], ids[:300], features[300:], ids[300:])
    assert figures["top1"] == pytest.approx(1 / 3, abs=0.05)  # a standard deviation is 0.014


def test_one_class_is_refused():
    with pytest.raises(DataError, match="needs two classes to fit on, and there are 1"):
        linear_probe(torch.randn(4, 3), ["a"] * 4, torch.randn(2, 3), ["a", "b"])


def test_a_checkpoint_is_probed(tmp_path):
    """Fresh towers know nothing of names, but colours are linear in their pixels."""
    write_dataset(tmp_path / "train", [80])
    write_dataset(tmp_path / "held_out", [40])
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps([{"id": name, "name": name} for name in ("red", "green", "blue", "black")]))
    model = ModelConfig(towers=TOWERS)
    torch.manual_seed(0)
    module = build_model(model)
    storage = Storage(tmp_path / "run")
    optimizer = build_optimizer(module, OptimConfig(), {})
    writer = CheckpointWriter(
        storage, module, optimizer, CheckpointConfig(), model.model_dump(mode="json"), warn=pytest.fail
    )
    writer.save(1, 1)
    writer.close()
    (info,) = list_checkpoints(storage)
    spec = EvalSet(
        shards=str(tmp_path / "held_out"), classes=str(classes), linear_probe=str(tmp_path / "train"), retrieval=False
    )
    data = DataConfig(shards=str(tmp_path / "train"))
    figures = evaluate_checkpoint(
        EvaluationJob(storage.uri, info, model, data, EvalConfig(sets={"colours": spec}), EmbeddingsConfig())
    )
    probe = figures["linear_probe"]["colours"]
    assert (probe["num_fit"], probe["num_images"], probe["num_classes"]) == (80, 40, 4)
    assert probe["top1"] > 0.9 > figures["zero_shot"]["colours"]["top1"]


def test_a_probe_needs_classes():
    with pytest.raises(ValueError, match="linear_probe needs classes"):
        EvalSet(shards="a", linear_probe="b")
