"""Places that a config names: local paths and URLs of stores, and no other kind."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigray.workers.storage import Storage, StorageError
from sigray.workers.urls import STORES, local_or_url, local_path, readable

OTHERS = {
    "https://h/x.tar": "https://",
    "GCS://b/x.tar": "GCS://",
    "hf://x/y": "hf://",
    "hf:x": "hf:",
    "s3:/b/x": "s3:/",
    "s3:b/x": "s3:",
    "pipe:cat x.tar": "pipe:",
    "pipe:aws s3 cp s3://b/x.tar -": "pipe:",
    "a::b": "a::",
    "simplecache::s3://b/x": "simplecache::",
    "file://host/x": "file://",
    "file:x": "file:",
}


@pytest.mark.parametrize("text", OTHERS)
def test_another_kind_is_named(text):
    for check in (local_or_url, local_path):
        with pytest.raises(ValueError, match="is not read here: give a local path") as error:
            check(text)
        assert str(error.value).startswith(f"{text!r}: {OTHERS[text]} is not read")
    with pytest.raises(StorageError, match="is not read here|the URL of a storage holds"):
        Storage(text)


def test_what_is_meant_for_sure_is_mended():
    assert local_or_url("S3://b/X") == "s3://b/X"
    assert [local_or_url(f"{scheme}://b/x") for scheme in STORES] == [f"{scheme}://b/x" for scheme in STORES]
    assert readable("HTTPS://h/a%20b.tar?c=d") == "https://h/a%20b.tar?c=d"
    assert readable("hf://datasets/o/n/a.tar") == "hf://datasets/o/n/a.tar"
    assert local_or_url("file:///a/b%20c") == local_path("file://localhost/a/b c") == "/a/b c"
    assert local_or_url("a/../b") == os.path.abspath("b")


@pytest.mark.parametrize("key", ["a//b.tar", "/a.tar", "../a", "a/./b", "a/..", "a\nb.tar"])
def test_a_key_that_obstore_cannot_name_is_refused(key):
    for scheme in STORES:
        for check in (local_or_url, readable):
            with pytest.raises(ValueError, match="an empty part, '.', '..' or a control character is not read here"):
                check(f"{scheme}://b/{key}")
    assert readable(f"https://h/{key}") == f"https://h/{key}"
    assert local_or_url("s3://b/...a/b..c/{0..9}.tar/") == "s3://b/...a/b..c/{0..9}.tar/"


def test_s3_is_no_local_path():
    with pytest.raises(ValueError, match="s3:// is not read here: give a local path$"):
        local_path("s3://b/x")


def test_a_file_with_a_colon_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"a local file of that name is \./words:a\.tar"):
        local_path("words:a.tar")
    (tmp_path / "words:a.tar").touch()
    assert local_path("words:a.tar") == local_path("./words:a.tar") == str(tmp_path / "words:a.tar")


@pytest.mark.parametrize(("text", "reason"), [("", "is empty"), ("a\0b", "holds a NUL"), ("a\udce9", "no UTF-8")])
def test_what_cannot_be_a_name(text, reason):
    with pytest.raises(ValueError, match=reason):
        local_or_url(text)


@given(st.text("s3S:/.a~ ", max_size=12))
def test_a_place_stays_what_it_is_when_the_saved_config_is_read(text):
    try:
        place = local_or_url(text)
    except ValueError:
        return
    assert place.startswith(("/", "s3://"))
    assert local_or_url(place) == place
