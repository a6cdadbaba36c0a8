"""examples/ray/torch_trainer.py: a loop of the user's under Ray Train, killed, resumed, resized.

Its `losses.py` is one of the user's, which here also records each rank's rows and loss.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sigray.orchestrator.run.ray_session import LEAN_RAY
from sigray.workers.config import DataConfig, ModelConfig
from tests.helpers.batches import batches
from tests.helpers.data import TOWERS, write_dataset
from tests.helpers.processes import descendants_named
from tests.helpers.start_ray import start_program

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ray"
BATCH, STEPS = 64, 16
LIMIT_S = 900  # of a run, on a machine that is busy with other tests
RECORD = """
import hashlib, json, os, time

import numpy as np
import torch.distributed as dist

import sigray


def pair_loss(model, batch):
    images = batch["images"].permute(0, 3, 1, 2).float() / 127.5 - 1
    image, text, scale, bias = model(images, batch["tokens"])
    loss = sigray.ring_sigmoid_loss(image, text, scale, bias)
    digest = hashlib.sha256(batch["images"].numpy().tobytes() + batch["tokens"].numpy().tobytes()).hexdigest()
    line = {"samples": batch["samples"].tolist(), "digest": digest, "keys": batch["__key__"], "loss": loss.item()}
    with open(os.path.join(os.environ["RECORD"], f"rank-{dist.get_rank()}"), "a") as file:
        file.write(json.dumps(line) + "\\n")
    time.sleep(0.15)
    return loss
"""


class OwnLoop:
    """The user's folder, and what its workers recorded."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.record = folder / "record"
        self.record.mkdir(parents=True)
        shutil.copy(EXAMPLE / "torch_trainer.py", folder)
        (folder / "losses.py").write_text(RECORD)
        self._folder, self._shards = folder, shards

    def start(self, num_workers: int, steps: int) -> subprocess.Popen[str]:
        variables = LEAN_RAY | {"RECORD": str(self.record), "OMP_NUM_THREADS": "1"}
        variables |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
        variables |= {"RAY_ADDRESS": "local"}  # not the cluster that a test beside has started
        words = ["--shards", str(self._shards), "--storage", str(self._folder / "results")]
        words += ["--workers", str(num_workers), "--samples", str(steps * BATCH)]

        def start() -> subprocess.Popen[str]:
            with (self._folder / "log").open("a") as log:
                return subprocess.Popen(
                    [sys.executable, "torch_trainer.py", *words],
                    cwd=self._folder,
                    env=os.environ | variables,
                    stdout=log,
                    stderr=log,
                    text=True,
                )

        return start_program(start, self._folder / "log", "Started a local Ray instance")

    def run(self, num_workers: int, steps: int) -> None:
        self.finish(self.start(num_workers, steps))

    def finish(self, process: subprocess.Popen[str]) -> None:
        """Wait until the run has ended without an error."""
        try:
            code = process.wait(timeout=LIMIT_S)
        finally:
            process.kill()  # its Ray ends with it
        assert code == 0, self.log()

    def log(self) -> str:
        return (self._folder / "log").read_text()[-6000:]

    def lines(self) -> list[dict[str, Any]]:
        """In the order in which each rank wrote them."""
        return [json.loads(line) for path in sorted(self.record.iterdir()) for line in path.read_text().splitlines()]

    def await_lines(self, process: subprocess.Popen[str], count: int) -> None:
        deadline = time.monotonic() + LIMIT_S
        while len(self.lines()) < count:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(self.log())
            time.sleep(0.05)

    def losses(self, expected: dict[tuple[Any, ...], Any]) -> dict[int, dict[int, list[float]]]:
        """Of each step, by the number of ranks that took it, the ranks' losses in the batch's order.

        Checks that each line has the rows of its step, and that a repeated step has the same loss again.
        """
        found: dict[int, dict[int, dict[int, float]]] = {}
        for line in self.lines():
            step, first, last, digest, keys = expected[tuple(map(tuple, line["samples"]))]
            assert (line["digest"], line["keys"]) == (digest, keys)
            of_ranks = found.setdefault(step, {}).setdefault(BATCH // (last - first), {})
            assert of_ranks.setdefault(first, line["loss"]) == line["loss"]
        assert sorted(found) == list(range(STEPS))
        assert all(len(firsts) == ranks for of_step in found.values() for ranks, firsts in of_step.items())
        return {
            step: {ranks: [firsts[first] for first in sorted(firsts)] for ranks, firsts in of_step.items()}
            for step, of_step in found.items()
        }


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_dataset(folder, [300, 200, 250])  # 750 samples: a batch spans two epochs
    return folder


@pytest.fixture(scope="module")
def expected(shards: Path) -> dict[tuple[Any, ...], Any]:
    """Parts of the batches of `sigray train`: samples -> step, first and last row, digest, keys."""
    data = DataConfig(shards=str(shards))
    model = ModelConfig(towers=TOWERS | {"embed_dim": 32})
    found = {}
    for batch in batches(data, model, batch=BATCH, last=STEPS, seed=0):
        for first, last in ((0, BATCH), (0, BATCH // 2), (BATCH // 2, BATCH)):
            content = batch.images[first:last].numpy().tobytes() + batch.tokens[first:last].numpy().tobytes()
            rows = tuple(map(tuple, batch.samples[first:last].tolist()))
            digest = hashlib.sha256(content).hexdigest()
            found[rows] = (batch.step, first, last, digest, batch.keys[first:last])
    return found


def kill_one(process: subprocess.Popen[str], name: str) -> None:
    os.kill(descendants_named(process.pid, name)[0], signal.SIGKILL)


@pytest.fixture(scope="module")
def calm(own_ray: None, tmp_path_factory: pytest.TempPathFactory, shards: Path, expected: Any) -> Any:
    """Losses of an undisturbed run."""
    loop = OwnLoop(tmp_path_factory.mktemp("calm") / "own", shards)
    loop.run(2, STEPS)
    return loop.losses(expected)


def test_kills_change_no_batch_and_no_loss(tmp_path, shards, expected, calm):
    loop = OwnLoop(tmp_path / "own", shards)
    process = loop.start(2, STEPS)
    loop.await_lines(process, 2 * 3)
    kill_one(process, "ray::DataWorkerActor")
    loop.await_lines(process, 2 * 8)
    kill_one(process, "ray::RayTrainWorker")
    loop.finish(process)
    assert len(loop.lines()) > 2 * STEPS  # steps after a checkpoint were repeated
    assert loop.losses(expected) == calm  # the same bits


def test_another_number_of_workers_changes_no_batch(tmp_path, shards, expected, calm):
    loop = OwnLoop(tmp_path / "own", shards)
    for num_workers, steps in ((2, 6), (1, 11), (2, STEPS)):
        loop.run(num_workers, steps)
    for step, of_step in loop.losses(expected).items():
        for losses in of_step.values():
            assert np.mean(losses) == pytest.approx(np.mean(calm[step][2]), rel=1e-6)
