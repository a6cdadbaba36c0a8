"""Which URIs are a storage; a folder and buckets of s3, gs and az servers behave alike."""

import os
import socket
import threading
import time
import urllib.request

import boto3
import numpy as np
import pytest

from sigray.workers import storage as storage_module
from sigray.workers.config import StoresConfig
from sigray.workers.data.shard_list import list_shards
from sigray.workers.data.tar import DataError
from sigray.workers.model.tokenizer import load_tokenizer_file
from sigray.workers.storage import ChangedError, Storage, StorageError, fingerprint, local_copy
from tests.helpers.gs import TOKEN
from tests.helpers.stored import KINDS, SCHEMES


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/runs?endpoint_override=evil.example",
        "s3://bucket/runs?",
        "s3://bucket?region=x&scheme=http/demo",
        "s3://bucket/runs#part",
        "s3://bucket/a b",
        "s3://bucket/runs\n",
        "s3://key:word@bucket/runs",
        "gs://bucket/runs?x",
        "az://key@container/runs",
        "file:///tmp?x",
    ],
)
def test_a_uri_holds_no_options_and_no_credentials(uri):
    with pytest.raises(StorageError, match="the URL of a storage holds"):
        Storage(uri)


def test_a_local_path_may_hold_any_sign(tmp_path):
    storage = Storage(tmp_path / "a?endpoint_override=b#c d")
    storage.write("x", b"content")
    assert (tmp_path / "a?endpoint_override=b#c d" / "x").read_bytes() == storage.read("x") == b"content"


@pytest.fixture(params=KINDS)
def storage(request, new_place):
    return Storage(new_place(request.param))


def test_files_and_folders(storage, tmp_path):
    assert storage.list("") == storage.list("none") == storage.walk() == []
    storage.check_writable()
    assert storage.walk() == []
    for name in ("a/b.txt", "a/c/d", "a/c/ö b%20c#?+&'.txt", "ab"):
        storage.write(name, name.encode())
    storage.write("a/b.txt", b"second")
    assert storage.read("a/b.txt") == b"second"
    assert storage.read("a/c/ö b%20c#?+&'.txt") == "a/c/ö b%20c#?+&'.txt".encode()
    assert storage.list("a") == ["b.txt", "c"]
    assert storage.walk() == ["a/b.txt", "a/c/d", "a/c/ö b%20c#?+&'.txt", "ab"]
    assert (storage.exists("a/b.txt"), storage.exists("a/b"), storage.modified("a/b")) == (True, False, None)
    with pytest.raises(FileNotFoundError, match="a/none"):
        storage.read("a/none")
    storage.delete("a/none")
    storage.delete("ab")
    storage.delete_folder("a/c")
    assert storage.walk() == ["a/b.txt"]
    (tmp_path / "up").write_bytes(b"up")
    storage.upload(tmp_path / "up", "x/up")
    storage.download("x/up", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == b"up"
    storage.delete_files(storage.walk())
    assert storage.walk() == []  # SeaweedFS keeps empty folders


@pytest.mark.parametrize("num_bytes", [0, 1, 5000, 20 << 20])
def test_a_file_of_many_parts(storage, tmp_path, monkeypatch, num_bytes):
    if num_bytes == 5000:
        monkeypatch.setattr(storage_module, "_PART_BYTES", 999)
    content = np.random.default_rng(0).bytes(num_bytes)
    found = storage.write_hashed(
        "a/b", lambda file: [file.write(content[n : n + 999_999]) for n in range(0, len(content), 999_999)]
    )
    assert found == fingerprint(content)
    assert storage.read("a/b") == content
    storage.write("a/c", content)
    storage.download("a/c", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == content


def test_a_writer_may_reuse_its_buffer(storage):
    """As torch's does: obstore's writer keeps the buffers that it is given."""
    buffer = bytearray(1000)

    def write(file):
        for number in range(200):
            buffer[:] = bytes([number]) * 1000
            file.write(buffer)

    assert storage.write_hashed("a", write) == fingerprint(storage.read("a"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_failed_write_of_a_large_file_leaves_the_old_one(new_place, scheme):
    storage = Storage(new_place(scheme))
    storage.write("a", b"old")

    def write(file):
        file.write(bytes(40 << 20))
        raise RuntimeError("the disk of the source is full")

    with pytest.raises(RuntimeError, match="source is full"):
        storage.write_hashed("a", write)
    assert storage.read("a") == b"old"


def test_a_write_on_condition(storage):
    assert storage.read_version("a") == (None, None)
    storage.write_if("a", b"one", None)
    with pytest.raises(ChangedError, match="a was written by another process"):
        storage.write_if("a", b"other", None)
    storage.write_if("a", b"one", None)  # as after a lost answer
    content, version = storage.read_version("a")
    assert content == b"one"
    storage.write_if("a", b"two", version)
    with pytest.raises(ChangedError):
        storage.write_if("a", b"three", version)
    _, version = storage.read_version("a")
    storage.delete("a")
    with pytest.raises(ChangedError):
        storage.write_if("a", b"three", version)
    assert not storage.exists("a")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_of_writers_at_once_one_succeeds(new_place, scheme):
    storage = Storage(new_place(scheme))
    for start in (None, b"start"):
        if start:
            storage.write("a", start)
        _, version = storage.read_version("a") if start else (None, None)
        barrier, done = threading.Barrier(8), []

        def write(number, version=version, barrier=barrier, done=done):
            barrier.wait()
            try:
                storage.write_if("a", f"{number}".encode(), version)
            except ChangedError:
                return
            done.append(number)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [f"{number}".encode() for number in done] == [storage.read("a")]
        storage.delete("a")


@pytest.mark.parametrize("scheme", SCHEMES[1:])  # SeaweedFS makes the bucket
def test_a_bucket_that_does_not_exist(new_place, scheme):
    new_place(scheme)
    with pytest.raises(StorageError, match="is not writable: .*no bucket 'none'"):
        Storage(f"{scheme}://none/x").check_writable()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_credentials_that_are_wrong_or_missing_are_named(new_place, monkeypatch, scheme):
    key = {"s3": "AWS_SECRET_ACCESS_KEY", "gs": "GOOGLE_BEARER_TOKEN", "az": "AZURE_STORAGE_ACCOUNT_KEY"}[scheme]
    storage = Storage(new_place(scheme))
    began = time.monotonic()
    monkeypatch.setenv(key, "d3Jvbmc=")
    with pytest.raises(StorageError, match="is not writable: .*access denied.*set ") as refused:
        storage.check_writable()
    assert "d3Jvbmc=" not in str(refused.value)
    monkeypatch.setenv("HOME", "/nowhere")
    for name in (key, "AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    # A machine in a cloud has a metadata server, whose identity the store refuses.
    named = f"(no credentials|access denied).* set .*{key[:4]}"
    with pytest.raises(StorageError, match=named):
        storage.check_writable()
    assert time.monotonic() - began < 10
    with pytest.raises(OSError, match=named):
        storage.read("config.yaml")


def test_a_metadata_server_that_is_silent_is_none(monkeypatch):
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_BEARER_TOKEN", "GOOGLE_SERVICE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nowhere")
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(OSError, match="no credentials: looked in .*127.0.0.1"):
            Storage("gs://bucket/runs").read("config.yaml")
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_the_mark_of_a_folder_is_no_file(new_place, tmp_path, scheme):
    """Consoles make a folder as an empty object whose name ends in a slash."""
    place = Storage(new_place(scheme))
    bucket, _, prefix = place.uri.partition("://")[2].partition("/")
    for key in (f"{prefix}/", f"{prefix}/sub/", f"{prefix}/x/", f"{prefix}/x/y/"):
        if scheme == "s3":
            boto3.client("s3").put_object(Bucket=bucket, Key=key)
        else:
            url, headers = f"{os.environ['STORAGE_EMULATOR_HOST']}/{bucket}/{key}", {"Authorization": f"Bearer {TOKEN}"}
            urllib.request.urlopen(urllib.request.Request(url, b"", headers, method="PUT")).close()
    place.write("sub/0.tar", b"0")
    place.write("x/y/z", b"0")
    assert (place.list(""), place.list("x/y"), place.walk()) == (["sub", "x"], ["z"], ["sub/0.tar", "x/y/z"])
    with pytest.raises(DataError, match="no object that ends in .tar"):
        list_shards(f"{place.uri}/*", StoresConfig())


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_a_place_is_copied_once_per_version(new_place, monkeypatch, tmp_path, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    storage = Storage(new_place(kind))
    storage.write("tokenizer.json", b"first")
    first = local_copy(f"{storage.uri}/tokenizer.json")
    assert (first.name, first.read_bytes()) == ("tokenizer.json", b"first")
    assert local_copy(f"{storage.uri}/tokenizer.json") == first
    storage.write("tokenizer.json", b"other")
    assert local_copy(f"{storage.uri}/tokenizer.json").read_bytes() == b"other"
    with pytest.raises(FileNotFoundError, match="none.json"):
        local_copy(f"{storage.uri}/none.json", "model.tokenizer").read_bytes()
    if kind != "local":
        with pytest.raises(FileNotFoundError, match="model.tokenizer: .*none.json"):
            load_tokenizer_file(f"{storage.uri}/none.json")
