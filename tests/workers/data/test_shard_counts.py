"""Counts from the cache of this machine and from sidecars."""

import json
import os

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


FOREIGN = {
    "negative": ("sizes.json", '{"a.tar": -1}'),
    "bool": ("sizes.json", '{"a.tar": true}'),
    "float": ("sizes.json", '{"a.tar": 5.0}'),
    "NaN": ("sizes.json", '{"a.tar": NaN}'),
    "text": ("sizes.json", '{"a.tar": "5"}'),
    "more than the tar can hold": ("sizes.json", '{"a.tar": 999999999999999999999999}'),
    "thousands of digits": ("sizes.json", '{"a.tar": %s}' % ("9" * 5000)),
    "deep": ("sizes.json", '{"a.tar": %s}' % ("[" * 100_000)),
    "list": ("sizes.json", "[5]"),
    "latin-1": ("sizes.json", '{"a.tar": 7, "café": 1}'.encode("latin-1")),
    "cut short": ("sizes.json", '{"a.tar": 7'),
    "no list": ("index.json", '{"shardlist": {"url": "a.tar", "nsamples": 7}}'),
    "no entries": ("index.json", '{"shardlist": [7, null, "a.tar", {"url": ["a.tar"], "nsamples": 7}]}'),
    "another folder": ("index.json", '{"shardlist": [{"url": "/elsewhere/a.tar", "nsamples": 7}]}'),
    "another store": ("index.json", '{"shardlist": [{"url": "s3://b/a.tar", "nsamples": 7}]}'),
    "another size": ("index.json", '{"shardlist": [{"url": "a.tar", "nsamples": 7, "filesize": 512}]}'),
    "twice": ("index.json", '{"shardlist": [{"url": "a.tar", "nsamples": 7}, {"url": "./a.tar", "nsamples": 6}]}'),
    "no number": ("a_stats.json", '{"successes": null}'),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_cannot_be_a_count_is_counted(tmp_path, own_cache, kind):
    write_tar(tmp_path / "a.tar", [drawn_sample(n) for n in range(5)])
    name, content = FOREIGN[kind]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    manifest, num_read = num_header_passes(str(tmp_path))
    assert (manifest.num_samples, num_read) == (5, 1)


def test_sidecars_that_disagree_are_left_to_the_headers(tmp_path, own_cache):
    write_tar(tmp_path / "a.tar", [drawn_sample(n) for n in range(5)])
    (tmp_path / "sizes.json").write_text('{"a.tar": 6}')
    (tmp_path / "index.json").write_text('{"shardlist": [{"url": "a.tar", "nsamples": 5}]}')
    assert num_header_passes(str(tmp_path))[0].num_samples == 5


def test_a_sidecar_that_is_no_file_is_not_read(tmp_path, own_cache):
    write_tar(tmp_path / "a.tar", [drawn_sample(n) for n in range(5)])
    (tmp_path / "sizes.json").mkdir()
    os.mkfifo(tmp_path / "index.json")
    (tmp_path / "wids-meta.json").symlink_to(tmp_path / "wids-meta.json")
    assert num_header_passes(str(tmp_path))[0].num_samples == 5
