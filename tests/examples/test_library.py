"""examples/library: the same losses with one process as with two, in every way of training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "library"


def losses(num_processes: int, script: str, *words: str) -> list[float]:
    # USE_TORCH_XLA: accelerate takes torch-xla if it is installed.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "USE_TORCH_XLA": "0"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    command += [str(FOLDER / script), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"loss'?:? '?([\d.]+)", done.stdout)]


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return losses(1, "loop.py", "ddp")


@pytest.mark.parametrize("how", ["ddp", "fsdp2", "all_reduce", "micro_batches"])
def test_a_loop_of_ones_own(how, expected, minutes):
    assert len(expected) == 5
    assert expected[-1] < 0.97 * expected[0]
    assert losses(2, "loop.py", how) == pytest.approx(expected, rel=1e-5)


def test_the_trainer_of_hugging_face(tmp_path, minutes):
    one, two = (losses(number, "hf_trainer.py", str(tmp_path / str(number))) for number in (1, 2))
    assert len(one) == 6  # and their mean
    assert two == pytest.approx(one, rel=1e-3)  # the Trainer prints four digits
