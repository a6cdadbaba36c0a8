"""Counts from the cache of this machine and from sidecars."""

import json

import pytest

from sigray.workers.config import DataConfig
from sigray.workers.data.manifest import read_samples, scan_shards
from sigray.workers.data.tar import DataError
from tests.helpers.data import drawn_sample, write_tar

DATA = DataConfig(shards="unused")


def scan(patterns):
    return scan_shards(patterns, DATA)


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
