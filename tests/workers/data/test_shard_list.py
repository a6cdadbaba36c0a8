"""Which tars the patterns of a config name."""

import pytest

from sigray.workers.config import S3Config
from sigray.workers.data.shard_list import list_shards as list_shards_of
from sigray.workers.data.tar import DataError


def list_shards(patterns):
    return list(list_shards_of(patterns, S3Config()))


def test_patterns_name_the_same_shards(tar_folder):
    expected = [str(tar_folder / f"shard-{number:03d}.tar") for number in range(4)]
    assert list_shards(str(tar_folder)) == expected
    assert list_shards(f"{tar_folder}/*.tar") == expected
    assert list_shards(f"{tar_folder}/shard-{{000..003}}.tar") == expected
    assert list_shards([expected[1], f"{tar_folder}/shard-00[023].tar"]) == [expected[n] for n in (1, 0, 2, 3)]


@pytest.mark.parametrize("pattern", ["*.tar", "none-{000..001}/*.tar", ""])
def test_empty_pattern_names_pattern_and_folder(tmp_path, pattern):
    with pytest.raises(DataError, match="names no .tar file") as error:
        list_shards(f"{tmp_path}/{pattern}")
    assert str(tmp_path) in str(error.value)


def test_shard_named_twice(tar_folder):
    with pytest.raises(DataError, match=r"shard-000.tar is named twice"):
        list_shards([str(tar_folder), f"{tar_folder}/shard-000.tar"])


def test_a_folder_that_is_missing_is_the_one_named(tmp_path):
    with pytest.raises(DataError, match=r"the folder .*/none does not exist"):
        list_shards(f"{tmp_path}/none/*.tar")
