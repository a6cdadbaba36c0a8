"""Which URIs become a file system: one place decides, before anything is opened."""

from __future__ import annotations

import pytest

from sigray.workers.storage import Storage, StorageError


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
