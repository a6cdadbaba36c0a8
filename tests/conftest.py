"""Fixtures that tests of several packages share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.data import TOWERS, write_dataset
from workers.config import DataConfig, ModelConfig


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
