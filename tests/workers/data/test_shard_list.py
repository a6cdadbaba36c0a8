"""Which tars the patterns of a config name."""

import glob
import os
import re
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sigray.workers.config import DataConfig, StoresConfig
from sigray.workers.data import shard_list
from sigray.workers.data.manifest import scan_shards
from sigray.workers.data.shard_list import list_shards as list_shards_of
from sigray.workers.data.tar import DataError
from tests.helpers.data import drawn_sample, write_tar
from tests.helpers.s3 import BUCKET, s3_server

S3 = StoresConfig()
NAMES = st.text("ab[]{},*?!1. \\^-", min_size=1, max_size=8)


def list_shards(patterns):
    return list(list_shards_of(patterns, S3))


def refusal(patterns):
    """The message of a pattern that names no shards, or none that can be read."""
    data = DataConfig(shards="unused")
    with pytest.raises(DataError) as error:
        scan_shards(patterns, data)
    return str(error.value)


def test_patterns_name_the_same_shards(tar_folder):
    expected = [str(tar_folder / f"shard-{number:03d}.tar") for number in range(4)]
    assert list_shards(str(tar_folder)) == expected
    assert list_shards(f"{tar_folder}/*.tar") == expected
    assert list_shards(f"{tar_folder}/shard-{{000..003}}.tar") == expected
    assert list_shards([expected[1], f"{tar_folder}/shard-00[023].tar"]) == [expected[n] for n in (1, 0, 2, 3)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES, NAMES)
@example("br[1]", "x[2]")
@example("x", "a{1,2}")
def test_a_name_that_exists_is_itself(tmp_path, folder, name):
    """Whatever brackets and braces it holds: by its path, its folder, and its path escaped for glob."""
    if folder in (".", "..") or name.startswith("."):
        return
    path = Path(tmp_path, f"{len(os.listdir(tmp_path))}", folder, f"{name}.tar")
    path.parent.mkdir(parents=True)
    path.touch()
    named = [str(path), str(path.parent), f"{path.parent}/*.tar", glob.escape(str(path)), [str(path)]]
    assert [list_shards(pattern) for pattern in named] == [[str(path)]] * len(named)


def test_a_name_in_braces_is_looked_up_as_it_is(tmp_path):
    for name in ("a[1]/x.tar", "b/x.tar", "b/y.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_shards(f"{tmp_path}/{{a[1],b}}/*.tar") == [
        f"{tmp_path}/{name}" for name in ("a[1]/x.tar", "b/x.tar", "b/y.tar")
    ]
    with pytest.raises(DataError, match=r"names no .tar file; the folder .*/c does not exist"):
        list_shards(f"{tmp_path}/{{b,c}}/*.tar")


@pytest.mark.parametrize("pattern", ["*.tar", "none-{000..001}/*.tar", ""])
def test_empty_pattern_names_key_pattern_and_folder(tmp_path, pattern):
    with pytest.raises(DataError, match=r"^eval\.sets\.a: .*names no .tar file") as error:
        list_shards_of(f"{tmp_path}/{pattern}", S3, "eval.sets.a")
    assert str(tmp_path) in str(error.value)


def test_a_folder_that_is_missing_is_the_one_named(tmp_path):
    with pytest.raises(DataError, match=r"the folder .*/none does not exist"):
        list_shards(f"{tmp_path}/none/*.tar")


def test_shard_named_twice(tar_folder):
    with pytest.raises(DataError, match=r"shard-000.tar is named twice"):
        list_shards([str(tar_folder), f"{tar_folder}/shard-000.tar"])


@pytest.mark.parametrize(
    "braces",
    ["{0..999999999}", "{a,b}" * 40, "{x{0..9999}{0..9999},y}", "{a," * 300 + "}" * 300, "{000..001}" * 25],
    ids=["range", "product", "nested", "deep", "ranges"],
)
def test_a_brace_pattern_without_end_is_refused_at_once(braces):
    begin = time.monotonic()
    with pytest.raises(DataError, match="lists more than 1,000,000 names") as error:
        list_shards(f"/none/{braces}.tar")
    assert time.monotonic() - begin < 2
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("braces", ["{", "{a,b", "a}{", "{0..%s}" % ("9" * 5000), "{" * 3000])
def test_braces_that_are_no_pattern_are_a_name(braces):
    assert list_shards(f"/none/{braces}.tar") == [f"/none/{braces}.tar"]


@settings(max_examples=60)
@given(st.recursive(st.sampled_from(["a", "", "{1..3}", "{08..2..3}", "{c..a}"]), lambda inner: st.one_of(
    st.lists(inner, min_size=2, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}"),
    st.lists(inner, max_size=3).map("".join)), max_leaves=8))  # fmt: skip
def test_the_names_of_a_pattern_are_counted_without_them(pattern):
    import braceexpand

    # A range of letters counts as one name: there are at most 52.
    text = pattern.replace("{c..a}", "c")
    assert shard_list._num_names(text) == len(list(braceexpand.braceexpand(text)))


def test_a_folder_with_too_many_names_is_refused(tmp_path, monkeypatch):
    for number in range(11):
        (tmp_path / f"{number}.json").touch()
    monkeypatch.setattr(shard_list, "MAX_NAMES", 10)
    for pattern in (str(tmp_path), f"{tmp_path}/*"):
        with pytest.raises(DataError, match="more than 10 names") as error:
            list_shards(pattern)
        assert repr(pattern) in str(error.value)


def test_what_is_no_tar_is_named_with_the_reason(tmp_path):
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "fifo.tar")
    (tmp_path / "broken.tar").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.tar").symlink_to(tmp_path / "loop.tar")
    message = refusal(str(tmp_path))
    for name, reason in {
        "folder.tar": "is a folder",
        "fifo.tar": "is a FIFO",
        "broken.tar": f"is a symbolic link to {tmp_path}/nowhere, which does not exist",
        "loop.tar": "too many levels of symbolic links",
    }.items():
        assert f"{tmp_path}/{name}: {reason}" in message
    assert "file name too long" in refusal(f"{tmp_path}/{'n' * 300}.tar")
    assert "not joined by `::`" in refusal(f"{tmp_path}/a.tar::{tmp_path}/b.tar")


def test_a_folder_of_other_files_says_what_it_holds(tmp_path):
    assert "exists and is empty" in refusal(str(tmp_path))
    (tmp_path / "a.json").touch()
    (tmp_path / "b.tar.gz").touch()
    for pattern in (str(tmp_path), f"{tmp_path}/*.tar"):
        assert "2 other names, as 'b.tar.gz': unpack compressed tars" in refusal(pattern)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tar")).touch()
    assert r"caf\xe9.tar': the name is not UTF-8: rename the file" in refusal(str(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's rights")
def test_a_folder_that_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory() as parent:  # pytest's own folders are closed to other users
        os.chmod(parent, 0o755)
        folder = Path(parent, "secret")
        write_tar(folder / "a.tar", [drawn_sample(1)])
        folder.chmod(0)
        os.seteuid(65534)
        try:
            message = refusal(str(folder))
        finally:
            os.seteuid(0)
    assert message == f"data.shards: the folder {folder} cannot be read: permission denied"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The S3 server, with one sample in each of these objects."""
    with s3_server(tmp_path_factory.mktemp("s3")) as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        import boto3

        client = boto3.client("s3", endpoint_url=variables["AWS_ENDPOINT_URL"])
        content = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", [drawn_sample(1)]).read_bytes()
        for key in KEYS:
            client.put_object(Bucket=BUCKET, Key=key, Body=content)
        yield f"s3://{BUCKET}"


KEYS = [
    "train/a.tar",
    "train/deep/b.tar",
    "train/sizes.json",
    "train_old/x.tar",
    "br[1]/x[2].tar",
    "a{1,2}.tar",
    "list-0.tar",
    "list-1.tar",
    "packed/a.tar.gz",
]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("train", ["train/a.tar", "train/deep/b.tar"]),
        ("train/", ["train/a.tar", "train/deep/b.tar"]),
        ("train/*.tar", ["train/a.tar"]),
        ("train*/?.tar", ["train/a.tar", "train_old/x.tar"]),
        ("*.tar", ["a{1,2}.tar", "list-0.tar", "list-1.tar"]),
        ("list-[01].tar", ["list-0.tar", "list-1.tar"]),
        ("list-{0..1}.tar", ["list-0.tar", "list-1.tar"]),
        ("{train_old,br[1]}", ["train_old/x.tar", "br[1]/x[2].tar"]),
        ("br[1]", ["br[1]/x[2].tar"]),
        ("br[1]/x[2].tar", ["br[1]/x[2].tar"]),
        ("a{1,2}.tar", ["a{1,2}.tar"]),
    ],
)
def test_patterns_of_keys(bucket, pattern, expected):
    assert list_shards(f"{bucket}/{pattern}") == [f"{bucket}/{key}" for key in expected]
    assert scan_shards(f"{bucket}/{pattern}", DataConfig(shards="unused")).num_samples == len(expected)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("tra", r"no folder has that name, though .*/train/a\.tar begins with it: for all of these, write .*/tra\*"),
        ("list-", r"though .*/list-0\.tar begins with it"),
        ("none", "no object's key begins with that prefix"),
        ("none/*.tar", "no object's key begins with that prefix"),
        ("packed", r"as '.*/packed/a\.tar\.gz': unpack compressed tars"),
        ("b?", "no object's key begins|ends in .tar"),
    ],
)
def test_a_prefix_ends_with_a_folder(bucket, pattern, reason):
    with pytest.raises(DataError, match=reason) as error:
        list_shards(f"{bucket}/{pattern}")
    assert str(error.value).startswith(f"data.shards: '{bucket}/{pattern}' names no object that ends in .tar")


def test_a_bucket_is_no_pattern(bucket):
    with pytest.raises(DataError, match="names no bucket"):
        list_shards("s3://buck*/x.tar")


def test_a_listing_is_bounded(bucket, monkeypatch):
    monkeypatch.setattr(shard_list, "MAX_NAMES", 2)
    for pattern in ("train", "*.tar"):
        with pytest.raises(DataError, match=re.escape(f"{bucket}/{pattern}' lists more than 2 names")):
            list_shards(f"{bucket}/{pattern}")
    assert list_shards(f"{bucket}/train_old") == [f"{bucket}/train_old/x.tar"]
