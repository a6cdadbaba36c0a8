"""Manifests and reading, and everything that can be wrong with a tar."""

import gzip
import io
import json
import os
import tarfile
from dataclasses import replace

import pytest

from sigray.workers.config import DataConfig
from sigray.workers.data.manifest import Manifest, Shard, read_samples, scan_shards
from sigray.workers.data.tar import DataError
from tests.helpers.data import drawn_sample, write_tar
from tests.helpers.tars import END, header, member

DATA = DataConfig(shards="unused")


def scan(patterns):
    return scan_shards(patterns, DATA)


def test_manifest_counts_samples(tar_folder):
    manifest = scan(str(tar_folder))
    assert [shard.num_samples for shard in manifest.shards] == [24, 7, 32, 13]
    assert manifest.num_bytes == sum(path.stat().st_size for path in tar_folder.iterdir())
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_reading_starts_anywhere(tar_folder):
    manifest = scan(str(tar_folder))
    keys = [sample.key for sample in read_samples(manifest.shards[1], DATA)]
    assert keys == [f"sample{number:05d}" for number in range(24, 31)]
    assert [sample.key for sample in read_samples(manifest.shards[1], DATA, start=5)] == keys[5:]


def test_missing_and_broken_shards_are_all_named(tmp_path):
    good = write_tar(tmp_path / "good.tar", [drawn_sample(number) for number in range(3)])
    content = good.read_bytes()
    broken = {
        "cut-in-member.tar": content[:1000],
        "cut-at-member.tar": content[: len(content) // 2 // 512 * 512],
        "no-end.tar": content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512),
        "bad-header.tar": content[:10] + b"!" + content[11:],
        "not-a-tar.tar": gzip.compress(content),
        "empty.tar": b"",
    }
    for name, bytes_of_tar in broken.items():
        (tmp_path / name).write_bytes(bytes_of_tar)
    urls = [str(tmp_path / name) for name in ("good.tar", *broken, "missing.tar")]
    with pytest.raises(DataError, match="shards that cannot be read, 7:") as error:
        scan(urls)
    message = str(error.value)
    assert "missing.tar: no such file" in message
    assert "bad-header.tar: damaged: no valid tar header at byte 0" in message
    assert "cut-in-member.tar: cut short" in message
    assert all(name in message for name in broken)
    assert "good.tar" not in message


def test_tar_without_a_usable_pair(tmp_path):
    path = write_tar(tmp_path / "text.tar", [{"__key__": "a", "txt": "only a caption", "mp3": b"sound"}])
    with pytest.raises(DataError, match=r"no usable pair in 1 shards .*members found end in mp3, txt"):
        scan([str(path)])


def test_endings_after_the_first_dot_are_explained(tmp_path):
    path = tmp_path / "dots.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(2000):
            for ending in ("jpg", "txt"):
                tar.addfile(tarfile.TarInfo(f"photo.v2.{number:05d}.{ending}"))
    with pytest.raises(DataError) as error:
        scan([str(path)])
    message = str(error.value)
    assert message.count("v2.") == 10
    assert message.endswith("and 3,990 more. Set data.image_keys and data.captions; a key ends at its first dot: photo")


def test_a_tar_of_symbolic_links_is_called_so(tmp_path):
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.jpg", "a.txt"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, f"/data/{name}"
            tar.addfile(member)
    with pytest.raises(DataError, match=r"not used: 2 symbolic links, .*; symbolic links: .* cannot follow them: pack"):
        scan([str(path)])


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_grouped_as_webdataset_does(tmp_path, tar_format):
    path, folder = tmp_path / "long.tar", "d" * 90 if tar_format == tarfile.USTAR_FORMAT else "ü" * 120
    with tarfile.open(path, "w", format=tar_format) as tar:
        for number in range(4):
            for ending in ("png", "txt"):
                member = tarfile.TarInfo(f"{folder}/{'n' * 40}{number}.{ending}")
                member.size = 700
                tar.addfile(member, io.BytesIO(bytes(700)))
    manifest = scan([str(path)])
    assert manifest.shards[0].num_samples == 4
    assert len(list(read_samples(manifest.shards[0], DATA))) == 4  # webdataset's own count: an error otherwise


def test_shard_that_changes_under_the_run(tmp_path):
    path = write_tar(tmp_path / "a.tar", [drawn_sample(number) for number in range(3)])
    manifest = scan([str(path)])
    write_tar(path, [drawn_sample(number) for number in range(4)])
    with pytest.raises(DataError, match=r"a\.tar changed since the run's manifest was made"):
        list(read_samples(manifest.shards[0], DATA))
    assert manifest.differences(scan([str(path)])) == [f"{path}: content changed"]
    path.unlink()
    with pytest.raises(DataError, match=r"a\.tar: no such file"):
        list(read_samples(manifest.shards[0], DATA))


def test_another_order_or_count_of_the_same_shards_is_a_difference():
    one, two = Shard("/a.tar", 100, 5, "1", "a"), Shard("/b.tar", 100, 7, "2", "b")
    manifest = Manifest((one, two))
    assert manifest.differences(manifest) == []
    assert manifest.differences(Manifest((two, one))) == ["data.shards: the datasets were a, b, now b, a"]
    renamed = replace(two, dataset="c")
    assert manifest.differences(Manifest((one, renamed))) == ["data.shards: the datasets were a, b, now a, c"]
    more = replace(two, num_samples=8)
    assert manifest.differences(Manifest((one, more))) == ["/b.tar: 7 samples before, 8 now"]
    alike = Manifest((replace(one, dataset=""), replace(two, dataset="")))
    turned = Manifest(alike.shards[::-1])
    assert alike.differences(turned) == ["data.shards: the same shards in another order"]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_marks_lead_to_the_same_samples(tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr("sigray.workers.data.manifest._MARK_EVERY", 4)
    path = write_tar(tmp_path / "a.tar", [drawn_sample(n) for n in range(21)])
    shard = scan([str(path)]).shards[0]
    assert len(shard.marks) == 5
    assert scan([str(path)]).shards[0].marks == shard.marks  # of this machine's memory
    for start in range(21):
        found = [(sample.index, sample.key) for sample in read_samples(shard, DATA, start=start)]
        assert found == [(n, f"sample{n:05d}") for n in range(start, 21)]


def test_datasets_keep_their_shards_apart(tmp_path, own_cache):
    write_tar(tmp_path / "a" / "x.tar", [drawn_sample(n) for n in range(3)])
    write_tar(tmp_path / "b" / "y.tar", [drawn_sample(n) for n in range(4)])
    parts = {name: {"shards": str(tmp_path / name), "weight": 1} for name in "ab"}
    data = DataConfig(shards=parts)
    manifest = scan_shards(data.shards, data)
    assert {name: [shard.num_samples for shard in shards] for name, shards in manifest.datasets().items()} == {
        "a": [3],
        "b": [4],
    }
    doubled = DataConfig(shards={"a": parts["a"], "c": parts["a"]})
    with pytest.raises(DataError, match=r"x\.tar is in two datasets"):
        scan_shards(doubled.shards, doubled)


def pairs(numbers, *, linked=()):
    """Members of these samples; of the linked ones hard links to sample 0."""
    content = b"".join(member(b"%d.%s" % (n, end), b"%d" % n) for n in numbers for end in (b"jpg", b"txt"))
    links = (header(b"%d.%s" % (n, end), b"1", link=b"0." + end) for n in linked for end in (b"jpg", b"txt"))
    return content + b"".join(links)


def contents_of(samples):
    return [(sample.key, sample.members["jpg"]) for sample in samples]


@pytest.mark.parametrize("sidecar", [False, True])
def test_hard_links_and_further_archives_are_read_from_every_mark(tmp_path, own_cache, monkeypatch, sidecar):
    monkeypatch.setattr("sigray.workers.data.manifest._MARK_EVERY", 2)
    symbol = header(b"lost.jpg", b"2", link=b"0.jpg")
    (tmp_path / "a.tar").write_bytes(pairs([0, 1], linked=[2, 3]) + END + pairs([4], linked=[5]) + symbol + END)
    if sidecar:
        (tmp_path / "sizes.json").write_text('{"a.tar": 6}')
    manifest = scan(str(tmp_path))
    unusable = {} if sidecar else {"symbolic links": 1, "samples without a usable member": 1}
    for again in (manifest, scan(str(tmp_path)), Manifest.from_json(json.loads(json.dumps(manifest.to_json())))):
        shard = again.shards[0]
        assert again == manifest
        assert again.unusable() == unusable
        assert shard.num_samples == 6
        assert len(shard.marks) == (0 if sidecar else 2)
    expected = [(str(n), b"0" if n in (2, 3, 5) else b"%d" % n) for n in range(6)]
    for start in range(6):
        assert contents_of(read_samples(shard, DATA, start=start)) == expected[start:]


def test_a_global_pax_header_makes_reading_begin_at_the_front(tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr("sigray.workers.data.manifest._MARK_EVERY", 1)
    links = b"".join(header(b"%d.%s" % (n, end), b"1") for n in (1, 2) for end in (b"jpg", b"txt"))
    (tmp_path / "a.tar").write_bytes(pairs([0]) + member(b"g", b"18 linkpath=0.jpg\n", b"g") + links + END)
    shard = scan(str(tmp_path)).shards[0]
    assert contents_of(read_samples(shard, DATA, start=2)) == [("2", b"0")]


def test_a_tar_without_closing_blocks_is_read_if_the_config_says_so(tmp_path, own_cache):
    (tmp_path / "a.tar").write_bytes(pairs(range(3)))
    unclosed = DataConfig(shards="unused", allow_unclosed=True)
    for sidecar in (False, True):
        if sidecar:
            (tmp_path / "sizes.json").write_text('{"a.tar": 3}')
        with pytest.raises(DataError, match="without a tar's closing blocks; if .* set data.allow_unclosed=true"):
            scan(str(tmp_path))
        shard = scan_shards(str(tmp_path), unclosed).shards[0]
        assert len(list(read_samples(shard, unclosed))) == 3
        (tmp_path / "a.tar").touch()


def test_a_manifest_of_november_2026_is_read_by_its_rules(tmp_path, own_cache):
    """Its marks and counts decide the order of a run that began then."""
    tar = tmp_path / "a.tar"
    tar.write_bytes(pairs([0, 1], linked=[2]) + member(b"3.jpg", b"3", b"7") + END + pairs([4]) + END)
    now = scan(str(tmp_path))
    assert now.shards[0].num_samples == 5
    fingerprint = f"mtime-{os.stat(tar).st_mtime_ns}"
    saved = {"url": str(tar), "num_bytes": tar.stat().st_size, "num_samples": 2, "fingerprint": fingerprint}
    old = Manifest.from_json({"shards": [saved | {"dataset": "", "marks": []}], "store": None})
    assert old.is_old
    assert contents_of(read_samples(old.shards[0], DATA)) == [("0", b"0"), ("1", b"1")]
    # A run that goes on counts by the same rules, and saves them again.
    again = scan_shards(str(tmp_path), DATA, is_old=True)
    assert old.differences(again) == []
    assert Manifest.from_json(again.to_json()).is_old
    assert not scan(str(tmp_path)).is_old  # the cache keeps both counts apart
    assert scan(str(tmp_path)) == now


def test_what_is_no_file_is_named_and_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.tar")
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(DataError) as error:
        scan([str(tmp_path / "fifo.tar"), str(tmp_path / "folder.tar" / "")[:-1]])
    assert "fifo.tar: is a FIFO, not a file" in str(error.value)


def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path, own_cache):
    path = write_tar(tmp_path / "a.tar", [drawn_sample(n) for n in range(5)])
    samples = read_samples(scan(str(tmp_path)).shards[0], DATA)
    first = next(samples)
    os.truncate(path, 1024)
    for reads in (lambda: next(samples), lambda: first.members["png"]):
        with pytest.raises(DataError, match=rf"^{path}: cut short: shrank from \d+ to 1024 bytes"):
            reads()
