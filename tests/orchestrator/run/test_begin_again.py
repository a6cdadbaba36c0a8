"""A run of a name that is taken: finished, trained longer, with another storage; a start that fails leaves nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from sigray.orchestrator.config import ConfigError, RunConfig, load_config
from sigray.orchestrator.run import driver
from sigray.workers.config import OptimConfig
from sigray.workers.training.optim import learning_rate
from tests.helpers.data import write_small_run
from tests.helpers.plain_ray import PlainRay

BATCH = 16


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> PlainRay:
    return PlainRay(monkeypatch)


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    train = {"num_samples": 4 * BATCH, "global_batch_size": BATCH, "log_every_steps": 1}
    return write_small_run(tmp_path, train=train, optim={"lr": 0.01}, checkpoint={"save_every_steps": 2})


def drive(path: Path, *overrides: str, **options: Any) -> tuple[dict[str, Any], str]:
    """Summary and output of `sigray train`."""
    shown = io.StringIO()
    result = driver.train(load_config(path, overrides), Console(file=shown, width=500), **options)
    return result.summary, shown.getvalue()


def lines(config: RunConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]


def test_a_finished_run_answers_at_once(run_yaml, plain):
    first, _ = drive(run_yaml)
    assert (first["status"], len(plain.started)) == ("finished", 1)
    again, said = drive(run_yaml)
    assert again == first
    assert len(plain.started) == 1
    assert f"sigray resume {load_config(run_yaml).storage_uri} train.num_samples=N` trains it to more than 64" in said
    drive(run_yaml, "eval.batch_size=7")
    assert len(plain.started) == 2


def test_the_result_has_counts_and_the_newest_checkpoint(run_yaml, plain):
    seen: list[float] = []
    observer = SimpleNamespace(must_stop=False, line=lambda line: seen.append(line["step"]), evaluation=None)
    config = load_config(run_yaml)
    result = driver.train(config, Console(file=io.StringIO()), observer=observer)
    assert (result.status, result.steps, result.samples_seen) == ("finished", 4, 4 * BATCH)
    assert result.checkpoint == f"{config.storage_uri}/checkpoints/step-0000000004"
    assert result.loss == lines(config)[-1]["train/loss"]
    assert result.folder == config.folder
    assert result.summary == json.loads((config.folder / "summary.json").read_text())
    assert seen == [1, 2, 3, 4]
    reported = [metrics["checkpoint_uri"] for metrics, _ in plain.reports]
    assert reported[-1] == result.checkpoint
    again = driver.train(config, Console(file=io.StringIO()))
    assert (again.checkpoint, again.loss, again.ray_result) == (result.checkpoint, result.loss, None)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_finished_run_is_trained_longer(run_yaml, plain, schedule):
    """The samples continue exactly; the learning rate is that of the larger number from there on."""
    options = [f"optim.schedule={schedule}", "optim.num_warmup_samples=16"]
    longer = f"train.num_samples={8 * BATCH}"
    drive(run_yaml, *options)
    summary, said = drive(run_yaml, *options, longer)
    assert (summary["status"], summary["samples_seen"]) == ("finished", 8 * BATCH)
    whole = load_config(run_yaml, [*options, longer, "run.name=whole"])
    driver.train(whole, Console(file=io.StringIO()))
    found, expected = lines(load_config(run_yaml)), lines(whole)
    assert [line["samples_seen"] for line in found] == [BATCH * step for step in range(1, 9)]
    assert [line["train/learning_rate"] for line in found[4:]] == [line["train/learning_rate"] for line in expected[4:]]
    if schedule == "constant":
        assert "the run goes on as if it had begun with the larger number" in said
        assert [line["train/loss"] for line in found] == [line["train/loss"] for line in expected]
    else:
        optim = OptimConfig(lr=0.01, schedule="cosine", num_warmup_samples=16)
        then, now = (learning_rate(optim, 64, end) for end in (64, 128))
        assert (then, round(now, 4)) == (0, 0.0061)
        assert "from 64 samples on, the learning rate is that of optim.schedule=cosine" in said
        assert f"to the larger number: {now:.3g} there instead of 0" in said
    with pytest.raises(ConfigError, match="train.num_samples: the run was started with 128, now 64: it can only be"):
        drive(run_yaml, *options)


def test_a_stop_before_the_workers_start_keeps_what_was_found(run_yaml, plain, monkeypatch):
    first, _ = drive(run_yaml)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "ray_session", interrupted)
    stopped, _ = drive(run_yaml, f"train.num_samples={8 * BATCH}")
    assert (stopped["status"], stopped["samples_seen"]) == ("stopped", 4 * BATCH)
    assert stopped["facts"]
    for name in ("facts", "train_s", "total_s", "zero_shot", "retrieval"):
        assert stopped[name] == first[name], name


def test_another_storage_beside_an_old_run_is_refused(run_yaml, plain, tmp_path):
    drive(run_yaml)
    old, new = load_config(run_yaml).storage_uri, tmp_path / "new"
    with pytest.raises(ConfigError) as raised:
        drive(run_yaml, f"run.storage={new}")
    assert f"{old} holds a run of this name with checkpoints in {old}, and {new}/small holds none" in str(raised.value)
    assert not (new / "small").exists()
    summary, _ = drive(run_yaml, f"run.storage={new}", overwrite=True)
    assert summary["status"] == "finished"
    assert drive(run_yaml, f"run.storage={new}")[0] == summary


def test_a_start_that_fails_leaves_no_folder(run_yaml, plain, tmp_path):
    missing = f"data.shards={tmp_path}/none-{{000..003}}.tar"
    too_large = "train.global_batch_size=512"
    for change in (missing, too_large, "model.towers.text_cfg.context_length=0"):
        with pytest.raises((ValueError, OSError)):
            drive(run_yaml, change, "train.num_samples=512", f"run.storage={tmp_path}/storage")
        assert not (tmp_path / "runs" / "small").exists()
        assert not (tmp_path / "storage" / "small").exists()
