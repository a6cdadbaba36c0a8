"""A Ray on this machine: demands that it cannot meet are refused, and its folder and token always have a place."""

from __future__ import annotations

import os
import stat
import types
from pathlib import Path
from typing import Any

import pytest

from sigray.orchestrator.config import ConfigError, RunConfig, parse_config
from sigray.orchestrator.run import own_ray
from tests.helpers.data import TOWERS

DISPLAY: Any = types.SimpleNamespace(say=lambda text: None)


def run_config(cluster: dict[str, object], accelerator: str = "cpu") -> RunConfig:
    content = {
        "run": {"name": "a"},
        "data": {"shards": "a.tar"},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 64, "global_batch_size": 64},
        "cluster": cluster,
        "eval": {"accelerator": accelerator},
    }
    return parse_config(content, "run.yaml")


SLICE = {"accelerator": "tpu", "tpu_type": "TPU-V4", "tpu_topology": "2x2x2", "num_workers": 2}
CUDA = {"accelerator": "cuda"}


@pytest.mark.parametrize(
    ("cluster", "here", "missing"),
    [
        ({}, (0, 0), ""),
        ({"resources_per_worker": {"training": 1}}, (0, 0), ""),  # the run's own Ray offers them
        (CUDA, (0, 0), "cluster.accelerator=cuda for 1 training worker(s) needs 1 GPU, and this machine has 0"),
        ({**CUDA, "num_workers": 4}, (3, 0), "for 4 training worker(s) needs 4 GPU, and this machine has 3"),
        ({**CUDA, "num_workers": 4}, (4, 0), ""),
        ({**CUDA, "num_workers": [2, 4]}, (1, 0), "for 2 training worker(s) needs 2 GPU, and this machine has 1"),
        ({**CUDA, "num_workers": [2, 4]}, (2, 0), ""),
        ({"accelerator": "tpu", "devices_per_worker": 4}, (8, 0), "needs 4 TPU, and this machine has 0"),
        ({"accelerator": "tpu", "devices_per_worker": 4}, (0, 4), ""),
        (SLICE, (0, 4), "cluster.accelerator=tpu for 2 training worker(s) needs 8 TPU, and this machine has 4"),
        ({**SLICE, "accelerator": "xla_cpu"}, (0, 0), "needs 8 TPU, and this machine has 0"),
    ],
)
def test_devices_that_this_machine_lacks_are_refused(cluster, here, missing, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(own_ray, "machine_accelerators", lambda: dict(zip(("GPU", "TPU"), here, strict=True)))
    if not missing:
        own_ray.check_start(run_config(cluster))
        return
    with pytest.raises(ConfigError) as raised:
        own_ray.check_start(run_config(cluster))
    assert missing in str(raised.value)
    assert "set cluster.address=HOST:6379 of a Ray cluster that has them" in str(raised.value)


def test_evaluations_count_where_they_run_beside_training(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(own_ray, "machine_accelerators", lambda: {"GPU": 2.0, "TPU": 0.0})
    config = run_config({**CUDA, "num_workers": 2}, "cuda")
    own_ray.check_start(config)  # it waits for the end of training
    own_ray.check_start(config, num_workers=0, num_evaluations=2)
    with pytest.raises(ConfigError, match=r"and eval.accelerator=cuda for 1 evaluation worker\(s\) needs 3 GPU"):
        own_ray.check_start(config, num_evaluations=1)  # a sweep places both together


def test_the_devices_of_this_machine_are_those_that_ray_would_offer(monkeypatch):
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager
    from ray._private.accelerators.tpu import TPUAcceleratorManager

    monkeypatch.setattr("ray._private.accelerators.get_accelerator_manager_for_resource", lambda kind: MANAGERS[kind])
    monkeypatch.setattr(NvidiaGPUAcceleratorManager, "get_current_node_num_accelerators", staticmethod(lambda: 4))
    monkeypatch.setattr(TPUAcceleratorManager, "get_current_node_num_accelerators", staticmethod(lambda: 0))
    MANAGERS = {"GPU": NvidiaGPUAcceleratorManager, "TPU": TPUAcceleratorManager}
    for visible, count in {None: 4, "0,1": 2, "": 0}.items():
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert own_ray.machine_accelerators() == {"GPU": count, "TPU": 0}


def test_addresses_of_another_ray_do_not_reach_it(monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.setenv(name, "127.0.0.1:1")
    own_ray.own_folder(DISPLAY)
    assert not {name for name in os.environ if "127.0.0.1:1" in os.environ[name]}


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("kind", ["long", "no folder", "full"])
def test_a_folder_that_cannot_hold_rays_files_is_replaced(name, kind, monkeypatch, tmp_path):
    given = {"long": tmp_path / ("x" * 60), "no folder": Path("/proc/none"), "full": Path("/tmp")}[kind]
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(name, str(given))
    if kind == "full":
        usage = types.SimpleNamespace(free=1 << 20)
        real = own_ray.shutil.disk_usage
        monkeypatch.setattr(own_ray.shutil, "disk_usage", lambda path: usage if path == "/tmp/ray" else real(path))
    said: list[str] = []
    folder = own_ray.own_folder(types.SimpleNamespace(say=said.append))
    assert folder is not None
    assert len(folder) <= own_ray._MAX_FOLDER_BYTES
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert said[0].startswith(f"Ray's files are in {folder} until the end, because {given}/ray ")
    os.rmdir(folder)


def test_without_any_folder_each_is_named_with_its_reason(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/proc/a")
    monkeypatch.setattr(own_ray, "_SHORT_PLACES", ("/proc/b",))
    with pytest.raises(ConfigError) as raised:
        own_ray.own_folder(DISPLAY)
    assert "or set RAY_TMPDIR to a short path:\n  /proc/a/ray: is not writable (" in str(raised.value)
    assert "\n  /proc/b: is not writable (" in str(raised.value)


def test_the_usual_folder_and_home_are_used_if_they_can_be(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert own_ray.own_folder(DISPLAY) is None
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_without_a_home_ray_gets_a_token_of_its_own(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    own_ray.own_folder(DISPLAY)
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    own_ray.own_folder(DISPLAY)
    assert os.environ["RAY_AUTH_TOKEN"] == token  # of the user
