"""Patterns, manifests and reading, and everything that can be wrong with a tar."""

import gzip
import io
import json
import tarfile
from dataclasses import replace

import pytest

from sigray.workers.config import DataConfig, S3Config
from sigray.workers.data.manifest import Manifest, Shard, read_samples, scan_shards
from sigray.workers.data.manifest import list_shards as list_shards_of
from sigray.workers.data.tar import DataError
from tests.helpers.data import drawn_sample, write_tar

DATA = DataConfig(shards="unused")


def list_shards(patterns):
    return list(list_shards_of(patterns, S3Config()))


def scan(patterns):
    return scan_shards(patterns, DATA)


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


def num_header_passes(patterns, data=DATA):
    """The manifest, and how many shards had to be read for it."""
    totals = [0]
    manifest = scan_shards(patterns, data, lambda done, total: totals.append(total))
    return manifest, totals[-1]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_shard_is_read_once_and_again_when_it_changes(tmp_path, own_cache):
    paths = [write_tar(tmp_path / f"{n}.tar", [drawn_sample(n) for n in range(3)]) for n in range(3)]
    first, num_read = num_header_passes(str(tmp_path))
    assert num_read == 3
    assert num_header_passes([str(paths[0])])[1] == 0  # a part of the folder
    assert num_header_passes(str(tmp_path)) == (first, 0)
    write_tar(paths[1], [drawn_sample(n) for n in range(4)])
    second, num_read = num_header_passes(str(tmp_path))
    assert num_read == 1
    assert [shard.num_samples for shard in second.shards] == [3, 4, 3]
    # Which members make a pair decides what is usable: another question, another answer.
    assert num_header_passes(str(tmp_path), DataConfig(shards="unused", captions={"json:class": 1}))[1] == 3


SIDECARS = {
    "wids": lambda sizes: {"index.json": {"shardlist": [{"url": n, "nsamples": c} for n, c in sizes.items()]}},
    "sizes": lambda sizes: {"sizes.json": sizes},
    "img2dataset": lambda sizes: {
        name.replace(".tar", "_stats.json"): {"count": count + 2, "successes": count} for name, count in sizes.items()
    },
}


@pytest.mark.parametrize("kind", SIDECARS)
def test_sidecars_tell_the_counts(tmp_path, own_cache, kind):
    folder = tmp_path / "data"
    sizes = {"00000.tar": 5, "00001.tar": 3}
    for name, count in sizes.items():
        write_tar(folder / name, [drawn_sample(n) for n in range(count)])
    for name, content in SIDECARS[kind](sizes).items():
        (folder / name).write_text(json.dumps(content))
    manifest, num_read = num_header_passes(str(folder))
    assert num_read == 0
    assert [shard.num_samples for shard in manifest.shards] == [5, 3]
    assert [s.key for s in read_samples(manifest.shards[0], DATA, start=2)] == [f"sample{n:05d}" for n in (2, 3, 4)]
    # What a header pass would have found is found without one.
    path = folder / "00001.tar"
    content = path.read_bytes()
    path.write_bytes(content[: content.rstrip(b"\0").rfind(b"\0" * 32) // 512 * 512])
    with pytest.raises(DataError, match=r"00001\.tar: cut short"):
        scan(str(folder))


def test_a_wrong_sidecar_is_told_when_the_shard_is_read(tmp_path, own_cache):
    write_tar(tmp_path / "a.tar", [drawn_sample(n) for n in range(5)])
    (tmp_path / "sizes.json").write_text('{"a.tar": 6}')
    manifest = scan(str(tmp_path))
    with pytest.raises(DataError, match="5 samples read, 6 in the manifest: the sidecar with the count"):
        list(read_samples(manifest.shards[0], DATA))


def test_sidecars_do_not_hide_that_nothing_is_usable(tmp_path, own_cache):
    write_tar(tmp_path / "a.tar", [{"__key__": "a", "txt": "only a caption"}])
    (tmp_path / "sizes.json").write_text('{"a.tar": 1}')
    with pytest.raises(DataError, match=r"no usable pair in 1 shards .*members found end in txt"):
        scan(str(tmp_path))


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


def test_a_folder_that_is_missing_is_the_one_named(tmp_path):
    with pytest.raises(DataError, match=r"the folder .*/none does not exist"):
        list_shards(f"{tmp_path}/none/*.tar")
