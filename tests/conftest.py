"""Fixtures that tests of several packages share, and what each test needs of the machine (`tests/helpers/tiers.py`)."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings

from sigray.workers.config import DataConfig, ModelConfig
from tests.helpers.data import TOWERS, write_dataset
from tests.helpers.ranks import RankGroup
from tests.helpers.stored import Servers, places
from tests.helpers.tiers import TIERS, RayWatch, Tiers

# The verdict on a commit depends on the commit alone, and no test on time.
settings.register_profile("sigray", settings.default, deadline=None, derandomize=True, database=None)
settings.load_profile("sigray")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", choices=TIERS, default="short", help="which tests: see tests/helpers/tiers.py")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Tiers(config.getoption("--tier")), "tiers")
    config.pluginmanager.register(RayWatch(), "ray-watch")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The stores of this test run, each started when a test first needs it."""
    started = Servers(tmp_path_factory.mktemp("stores"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def s3_variables(servers: Servers) -> dict[str, str]:
    """The AWS variables that reach an S3 server of this test run; its bucket is `tests.helpers.s3.BUCKET`."""
    return servers.variables("s3")


@pytest.fixture
def new_place(servers: Servers, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Returns an empty place of a kind (`tests.helpers.stored.KINDS`), which the test's environment reaches."""
    with places(servers, tmp_path) as new:
        yield new


@pytest.fixture(scope="session")
def shared_ray(s3_variables: dict[str, str]) -> Iterator[Any]:
    """The Ray of this test run, a `ray.cluster_utils.Cluster` that grows by hosts; joined by its `address`.

    Its workers reach the S3 server: they inherit from the processes that are started here.
    """
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 8, "include_dashboard": False, "object_store_memory": 200 * 2**20}
    with mock.patch.dict(os.environ, s3_variables | {"RAY_enable_metrics_collection": "0"}):
        cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def ray_driver(shared_ray: Any) -> Iterator[Any]:
    """This process as a driver of the shared Ray, while a module's tests run; the cluster."""
    import ray

    ray.init(address=shared_ray.address, log_to_driver=False, configure_logging=False)
    yield shared_ray
    ray.shutdown()


@pytest.fixture(scope="module")
def rank_groups() -> Iterator[Callable[[int], RankGroup]]:
    """A group of gloo ranks for each size that a module's tests ask for; each is made once."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda world_size: stack.enter_context(RankGroup(world_size)))


@pytest.fixture(scope="session")
def own_ray() -> None:
    """The test, or a fixture of its, starts a Ray of its own."""


@pytest.fixture(scope="session")
def minutes() -> None:
    """The test takes a minute or more, without a Ray."""


@pytest.fixture(scope="session")
def patience() -> None:
    """The test takes many minutes."""


@pytest.fixture(scope="session")
def registries() -> None:
    """The test fetches from package registries."""


@pytest.fixture(scope="session")
def torch_xla() -> None:
    if importlib.util.find_spec("torch_xla") is None:
        pytest.skip("torch-xla (the tpu extra) is missing")


@pytest.fixture(scope="session")
def cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Hosts made of namespaces."""
    from tests.helpers.hosts import why_not

    if reason := why_not():
        pytest.skip(f"hosts of namespaces: {reason}")


@pytest.fixture(scope="session")
def tar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four uneven shards, 76 samples."""
    folder = tmp_path_factory.mktemp("tars")
    write_dataset(folder, [24, 7, 32, 13])
    return folder


@pytest.fixture
def data_config(tar_folder: Path) -> DataConfig:
    return DataConfig(shards=str(tar_folder), num_lanes=3, shuffle_window=10, block_size=4)


@pytest.fixture(scope="session")
def model_config() -> ModelConfig:
    return ModelConfig(towers=TOWERS)
