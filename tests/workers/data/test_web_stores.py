"""https:// and hf://: what is requested of which host, and what no host and no file gets to see."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from sigray.orchestrator.config import ConfigError, parse_config
from sigray.workers.config import DataConfig, StoresConfig
from sigray.workers.data.manifest import read_samples, scan_shards
from sigray.workers.data.shard_list import list_shards
from sigray.workers.data.store_stream import StoreStream
from sigray.workers.data.tar import DataError
from sigray.workers.evaluation.datasets import read_classes
from sigray.workers.stores import StoreError, list_objects, read_object, stat
from tests.helpers.data import TOWERS
from tests.helpers.web import Site, web_server

CONTENT = random.Random(2).randbytes(300_000)
TOKEN = "hf_c4n4ry"
# Capital and small hex digits, a plus, and signs that need no encoding: nothing of it may change.
QUERY = "?X-Amz-Signature=c4n4ry%2Fb%2bc+d&x=~%7e-_.!*()&X-Amz-Credential=a/b"


@pytest.fixture
def cdn() -> Iterator[Site]:
    with web_server(Site()) as site:
        yield site


@pytest.fixture
def hub(cdn: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server that redirects each request to `cdn`, and refuses one without the token."""
    with web_server(Site(needs=TOKEN, redirects_to=cdn.address, query=QUERY)) as site:
        monkeypatch.setenv("HF_ENDPOINT", site.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield site


def test_a_hub_redirects_and_only_the_hub_gets_the_token(hub: Site, cdn: Site) -> None:
    """Ranges and If-Match go to the host of the content, whose ETag is another than the redirect's."""
    path = "/datasets/org/name/resolve/refs%2Fpr%2F1/a%20b%7B1%7D.tar"
    cdn.files[path] = CONTENT
    info = stat("hf://datasets/org/name@refs%2Fpr%2F1/a b{1}.tar")
    with contextlib.closing(StoreStream(info, StoresConfig(), part_bytes=1 << 16)) as stream:
        assert bytes(stream.read(len(CONTENT))) == CONTENT
    assert len(hub.requests) == len(cdn.requests) >= 3
    for asked, got in zip(hub.requests, cdn.requests, strict=True):
        assert asked.headers["authorization"] == f"Bearer {TOKEN}"
        assert TOKEN not in str(got)
        assert (asked.target, got.target) == (path, f"{path}{QUERY}")
    for name in ("range", "if-match"):  # threads read at the same time
        ends = [sorted(one.headers.get(name, "") for one in site.requests[1:]) for site in (hub, cdn)]
        assert ends[0] == ends[1]
    assert {one.headers["if-match"] for one in cdn.requests[1:]} == {f'"{info.etag}"'}
    cdn.files[path] = CONTENT[::-1]
    with (
        contextlib.closing(StoreStream(info, StoresConfig())) as stream,
        pytest.raises(DataError, match="was replaced since the run's manifest was made"),
    ):
        stream.read(1)


def test_a_token_that_is_missing_is_named(hub: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(StoreError, match="access denied by http.*403.*set HF_TOKEN") as refused:
        stat("hf://datasets/org/name/a.tar")
    assert "another" not in str(refused.value)
    with pytest.raises(StoreError, match=r"hf://datasets/ORG/NAME\[@REVISION\]/PATH expected"):
        stat("hf://org/name/a.tar")


def test_redirects_that_never_end_or_lead_nowhere(cdn: Site) -> None:
    for target in (cdn.address, "http://127.0.0.1:9"):
        cdn.redirects_to = target
        with pytest.raises(StoreError, match="cannot reach the store"):
            stat(f"{cdn.address}/a.tar", StoresConfig(deadline_s=1))


def test_a_server_without_ranges_gives_single_files_and_no_shards(cdn: Site) -> None:
    cdn.has_ranges = False
    cdn.files["/classes.txt"] = b"cat\ndog\n"
    assert [one["name"] for one in read_classes(f"{cdn.address}/classes.txt?version=a/b")] == ["cat", "dog"]
    cdn.files["/a.tar"] = CONTENT
    url = f"{cdn.address}/a.tar"
    with pytest.raises(DataError, match="a.tar: the store http.* ignores ranges .*: use a store with ranges"):
        scan_shards(url, DataConfig(shards=url))


def test_names_come_from_braces_and_lists_and_not_from_a_listing(cdn: Site, tar_folder: Path, tmp_path: Path) -> None:
    for file in tar_folder.glob("*.tar"):
        cdn.files[f"/tars/{file.name}"] = file.read_bytes()
    names = sorted(cdn.files)
    (first, *others) = [f"{cdn.address}{name}" for name in names]
    braces = f"{cdn.address}/tars/shard-{{000..003}}.tar"
    assert (
        [*list_shards(braces, StoresConfig())] == [*list_shards([first, *others], StoresConfig())] == [first, *others]
    )
    manifest = scan_shards(braces, DataConfig(shards=braces))
    local = scan_shards(str(tar_folder), DataConfig(shards=str(tar_folder)))
    assert [shard.num_samples for shard in manifest.shards] == [shard.num_samples for shard in local.shards]
    for here, there in zip(local.shards, manifest.shards, strict=True):
        data = DataConfig(shards=braces)
        samples = [[sample.key for sample in read_samples(shard, data, start=5)] for shard in (here, there)]
        assert samples[0] == samples[1]
    cdn.requests.clear()
    scan_shards(f"{first}?version=a/b", DataConfig(shards="-"))
    assert {one.target.partition("?")[0] for one in cdn.requests if "?" in one.target} == {names[0]}
    for pattern in ("tars/", "tars", "tars/*.tar", "tars/shard-00[01].tar"):
        for site in (cdn.address, "hf://datasets/org/name"):
            with pytest.raises(DataError, match=r"cannot be listed: name the \.tar files, by braces or as a list"):
                list_shards(f"{site}/{pattern}", StoresConfig())
    with pytest.raises(StoreError, match="cannot be listed"):
        list(list_objects(f"{cdn.address}/tars/"))
    with pytest.raises(DataError, match=r"shard-004.tar: there is no such object"):
        scan_shards(f"{cdn.address}/tars/shard-{{003,004}}.tar", DataConfig(shards="-"))


def test_a_presigned_url_is_used_and_stands_nowhere(
    cdn: Site, tar_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The query reaches the server byte for byte; manifest, cache, config and errors have the URL without it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cdn.needs, file = "c4n4ry", sorted(tar_folder.glob("*.tar"))[0]
    cdn.files["/a%2Fb%20c//d.tar"] = file.read_bytes()
    url = f"{cdn.address}/a%2Fb%20c//d.tar"
    signed = tmp_path / "signed.txt"
    signed.write_text(f"{url}{QUERY}\n")
    data = DataConfig(shards=url, stores=StoresConfig(signed_urls=str(signed), deadline_s=1))
    manifest = scan_shards(url, data)
    assert len(list(read_samples(manifest.shards[0], data))) == manifest.num_samples > 0
    targets = {request.target for request in cdn.requests if "d.tar" in request.target}
    assert targets == {f"/a%2Fb%20c//d.tar{QUERY}"}
    written = json.dumps(manifest.to_json()) + "".join(
        path.read_text() for path in (tmp_path / "cache").rglob("*.json")
    )
    assert url in written
    assert "c4n4ry" not in written

    # The signature becomes too old; a renewed one is taken up.
    cdn.needs = "renewed"
    with pytest.raises(StoreError, match=r"access denied.*403.*line of the URL in .*signed.txt") as old:
        stat(url, data.stores)
    with pytest.raises(DataError, match="access denied") as while_reading:
        list(read_samples(manifest.shards[0], data))
    assert "c4n4ry" not in f"{old.value} {while_reading.value}"
    signed.write_text(f"{url}?sig=renewed\n")
    os.utime(signed, ns=(1, 1))
    with contextlib.suppress(StoreError):
        stat(url, data.stores)
    assert cdn.requests[-1].target.endswith("?sig=renewed")
    assert scan_shards(url, data) == manifest
    signed.unlink()
    with pytest.raises(StoreError, match="signed_urls: .*signed.txt cannot be read: No such file"):
        stat(url, data.stores)
    with pytest.raises(StoreError, match="403.*private shards need data.stores.signed_urls"):
        read_object(url)


def test_a_secret_in_the_url_of_a_config_is_refused_with_the_remedy() -> None:
    run = {"run": {"name": "a"}, "model": {"towers": TOWERS}, "train": {"num_samples": 1, "global_batch_size": 1}}
    for query in (QUERY, "?Expires=1&Signature=c4n4ry&Key-Pair-Id=a", "?sv=2024&sig=c4n4ry"):
        content = run | {"data": {"shards": f"https://h/a.tar{query}"}}
        with pytest.raises(ConfigError, match=r"data.shards: a s.* in a URL\n.*data.stores.signed_urls") as refused:
            parse_config(content, "run.yaml")
        assert "c4n4ry" not in str(refused.value)
    assert parse_config(run | {"data": {"shards": "https://h/a.tar?versionId=1"}}, "run.yaml")
    both = {"shards": "s3://b/a.tar", "s3": {"endpoint": "http://a"}, "stores": {"s3_endpoint": "http://b"}}
    with pytest.raises(ConfigError, match=r"s3 is the former name of stores: .* endpoint as s3_endpoint"):
        parse_config(run | {"data": both}, "run.yaml")
    with pytest.raises(StoreError, match="h/a.tar: name and password in a URL are not sent") as refused:
        stat("https://name:c4n4ry@h/a.tar")
    assert "c4n4ry" not in str(refused.value)
