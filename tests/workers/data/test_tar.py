"""The tar reader against Python's tarfile and webdataset, and against damage that those do not notice."""

import bz2
import gzip
import io
import lzma
import os
import socket
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from sigray.workers.data.tar import BLOCK, MAX_HEADER_BYTES, DataError, LocalFile, Tally, read_members, read_tar
from tests.helpers.tars import END, header, member

names = st.text("ab./ü", min_size=1, max_size=30).filter(
    lambda n: not n.startswith("/") and not n.endswith("/") and n.strip("./")
)
contents = st.binary(max_size=1500)
formats = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def tar_of(path, members, tar_format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples_of_webdataset(path):
    with open(path, "rb") as stream:
        yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))


@settings(max_examples=100)
@given(members=st.lists(st.tuples(names, contents), max_size=8), tar_format=formats)
def test_members_are_those_of_tarfile(tmp_path_factory, members, tar_format):
    path = tar_of(tmp_path_factory.mktemp("tar") / "a.tar", members, tar_format)
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        expected = [(info.name, tar.extractfile(info).read()) for info in tar if info.isfile()]
    found = [(each.name, content[each.begin :][: each.num_bytes]) for each in read_members(LocalFile(path))]
    assert found == expected


keys = st.sampled_from(["a", "b", "d/a", "d.x/a", "__meta__", "__x__/y"])
endings = st.sampled_from(["jpg", "txt", "JSON", "seg.png"])


@settings(max_examples=100)
@given(members=st.lists(st.tuples(keys, endings, contents), max_size=12))
def test_samples_are_those_of_webdataset(tmp_path_factory, members):
    path = tar_of(tmp_path_factory.mktemp("tar") / "a.tar", [(f"{k}.{e}", content) for k, e, content in members])
    found = list(read_tar(LocalFile(path)))
    assert [sample.index for sample in found] == list(range(len(found)))
    if any(sample.refusal for sample in found):
        with pytest.raises(ValueError, match="duplicate file name"):
            list(samples_of_webdataset(path))
        return
    expected = list(samples_of_webdataset(path))
    assert [sample.key for sample in found] == [sample["__key__"] for sample in expected]
    for ours, theirs in zip(found, expected, strict=True):
        own = {ending: bytes(content) for ending, content in ours.members.items()}
        assert own == {ending: content for ending, content in theirs.items() if not ending.startswith("__")}


@settings(max_examples=60)
@given(members=st.lists(st.tuples(keys, endings, contents), min_size=1, max_size=12), data=st.data())
def test_reading_from_any_samples_position_gives_the_rest(tmp_path_factory, members, data):
    path = tar_of(tmp_path_factory.mktemp("tar") / "a.tar", [(f"{k}.{e}", content) for k, e, content in members])
    whole = list(read_tar(LocalFile(path)))
    if not whole:
        return
    number = data.draw(st.integers(0, len(whole) - 1))
    rest = list(read_tar(LocalFile(path, whole[number].position), first_index=number))
    assert rest == whole[number:]


@settings(max_examples=100)
@given(data=st.data())
def test_no_cut_and_no_changed_header_goes_unnoticed(tmp_path_factory, data):
    """tarfile, and webdataset with it, takes a cut or a bad checksum between members for the end of the archive."""
    members = [(f"{number:03d}.{ending}", bytes([number]) * 700) for number in range(6) for ending in ("png", "txt")]
    path = tar_of(tmp_path_factory.mktemp("tar") / "a.tar", members)
    content = bytearray(path.read_bytes())
    end = len(content.rstrip(b"\0")) + BLOCK - len(content.rstrip(b"\0")) % BLOCK
    if data.draw(st.booleans(), "cut"):
        content = content[: data.draw(st.integers(0, end + BLOCK), "bytes")]
    else:
        header = data.draw(st.integers(0, 11)) * 3 * BLOCK
        place = header + data.draw(st.integers(0, BLOCK - 1))
        changed = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]))
        # A checksum field may be written in several ways that mean the same number.
        if header + 148 <= place < header + 156 and chr(changed) in " \0":
            return
        content[place] = changed
    path.write_bytes(content)
    with pytest.raises(DataError, match="cut short|damaged|no tar but"):
        list(read_tar(LocalFile(path)))


def test_a_size_of_pax_is_one_members(tmp_path):
    """The next one has its own, here in as many blocks; and so has its name."""
    path, contents = tmp_path / "a.tar", {"a.txt": b"a" * 700, "b.txt": b"b" * 1000, "c.txt": b"c"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.pax_headers = {"size": "700", "path": name} if name == "a.txt" else {}
            tar.addfile(info, io.BytesIO(content))
    assert b" size=700\n" in path.read_bytes()
    assert {sample.key + ".txt": sample.members["txt"] for sample in read_tar(LocalFile(path))} == contents


A, B = member(b"a.jpg", b"first"), member(b"b.jpg", b"second")


def read(path, content, **options):
    """Samples and tally of these bytes."""
    path.write_bytes(content)
    tally = Tally()
    return list(read_tar(LocalFile(path), tally=tally, **options)), tally


def contents_of(samples):
    return {f"{sample.key}.{ending}": found for sample in samples for ending, found in sample.members.items()}


def test_a_hard_link_has_the_newest_earlier_content(tmp_path):
    link = header(b"b.jpg", b"1", link=b"./a.jpg")
    chain = header(b"c.jpg", b"1", link=b"b.jpg")
    itself = header(b"c.jpg", b"1", link=b"c.jpg")  # `tar -c c.jpg c.jpg`, if the file has another name too
    later = member(b"a.jpg", b"later") + header(b"d.jpg", b"1", link=b"a.jpg")
    samples, tally = read(tmp_path / "a.tar", A + link + chain + itself + END + later + END)
    expected = {"a.jpg": b"later", "b.jpg": b"first", "c.jpg": b"first", "d.jpg": b"later"}
    assert contents_of(samples) == expected
    assert tally.unusable() == {"samples of a key that came before": 1}
    # A link to a link that cannot be followed, to a later file and to a link's symbol.
    symbol = header(b"s.jpg", b"2", link=b"a.jpg")
    links = [
        header(b"%d.jpg" % number, b"1", link=name) for number, name in enumerate((b"none.jpg", b"b.jpg", b"s.jpg"))
    ]
    samples, tally = read(tmp_path / "a.tar", A + symbol + b"".join(links) + B + END)
    assert [sample.key for sample in samples] == ["a", "b"]
    lost = {"hard links without a file": 3, "symbolic links": 1, "samples without a usable member": 4}
    assert tally.unusable() == lost


def test_a_hard_link_may_have_a_content_of_its_own(tmp_path):
    """Of pax; elsewhere the size says nothing if a header follows."""
    body = b"second".ljust(BLOCK, b"\0")
    pax = member(b"x", b"15 comment=new\n", b"x")
    for link, expected in {
        header(b"b.jpg", b"1", link=b"a.jpg", size=6): b"first",
        pax + header(b"b.jpg", b"1", link=b"a.jpg", size=6) + body: b"second",
        header(b"b.jpg", b"1", link=b"a.jpg", size=6) + body: b"second",
    }.items():
        samples, _ = read(tmp_path / "a.tar", A + link + member(b"c.jpg", b"third") + END)
        assert contents_of(samples) == {"a.jpg": b"first", "b.jpg": expected, "c.jpg": b"third"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (A + END + bytes(8192) + B + END, None),
        (A + END + bytes(100), None),
        (A + bytes(BLOCK) + B + END, "one closing block instead of two at byte 1024"),
        (A + END + b"junk".ljust(BLOCK), "no valid tar header at byte 2048"),
        (A + END + b"junk", "no tar header at byte 2048"),
        (A + END + bytes(5 << 20), "more than 4194304 bytes of zeros from byte 1024"),
        (A + member(b"L", b"b.jpg", b"L") + END, "no member follows the names at byte 1024"),
        (A, "cut short.*data.allow_unclosed=true"),
        (A + bytes(BLOCK), "one closing block.*data.allow_unclosed=true"),
        (A[:-1], "cut short"),
        (A + B[:700], "cut short"),
    ],
)  # fmt: skip
def test_how_a_tar_may_end(tmp_path, content, problem):
    if problem is None:
        read(tmp_path / "a.tar", content)
        return
    with pytest.raises(DataError, match=problem):
        read(tmp_path / "a.tar", content)
    if "allow_unclosed" in problem:
        samples, _ = read(tmp_path / "a.tar", content, allow_unclosed=True)
        assert contents_of(samples) == {"a.jpg": b"first"}
    else:
        with pytest.raises(DataError, match=problem):
            read(tmp_path / "a.tar", content, allow_unclosed=True)


@pytest.mark.parametrize(
    ("field", "number"),
    [
        (b"00000001750\0", 1000),
        (b"       1750 ", 1000),
        (b"1750", 1000),
        (b"\0", 0),
        (b"\x80" + (9 << 30).to_bytes(11, "big"), 9 << 30),
        *((bad, None) for bad in (b"-0001000", b"+0001750", b"1_750", b"0o1750", b"1750x", b"18", b"\t1750", b"1 750")),
        *((bytes([first]) + bytes(10) + b"\1", None) for first in (0xFF, 0xC0)),
    ],
)
def test_numbers(tmp_path, field, number):
    content = END + header(b"a.jpg", size=field) + bytes(1024) + END
    problem = (
        "damaged: a size that is no number.* at byte 1024" if number is None else "cut short: a member of 9663676416"
    )
    if number in (None, 9 << 30):
        with pytest.raises(DataError, match=problem):
            read(tmp_path / "a.tar", content)
    else:
        assert contents_of(read(tmp_path / "a.tar", content)[0]) == {"a.jpg": bytes(number)}


def pax(**records):
    """A pax header of these records, each with its length in front."""
    text = b""
    for key, value in records.items():
        record = b" %s=%s\n" % (key.replace("_", ".").encode(), value)
        length = len(record) + 1
        while length != len(b"%d" % length) + len(record):
            length += 1
        text += b"%d%s" % (length, record)
    return member(b"pax", text, b"x")


@pytest.mark.parametrize(
    ("records", "name"),
    [
        ({"path": b"new\nline/a.jpg"}, "new\nline/a.jpg"),
        ({"path": b"a.jpg", "comment": b"9 path=b.jpg\n9 size=99\n"}, "a.jpg"),
        ({"comment": b"1\n17 path=b.jpg"}, "plain.jpg"),
        ({"path": b"caf\xe9.jpg", "hdrcharset": b"BINARY"}, "caf\\xe9.jpg"),
        ({"size": b"1" + b"0" * 30}, "cut short: a member of 10{30} bytes"),
        ({"size": b"9" * 5000}, "damaged: a size that is no number"),
        ({"size": b"-3"}, "damaged: a size that is no number"),
        ({"size": b""}, "damaged: a size that is no number"),
    ],
)
def test_pax_records(tmp_path, records, name):
    content = pax(**records) + member(b"plain.jpg", b"abc") + END
    if "size" in records:
        with pytest.raises(DataError, match=name):
            read(tmp_path / "a.tar", content)
    else:
        assert contents_of(read(tmp_path / "a.tar", content)[0]) == {name: b"abc"}


@pytest.mark.parametrize(
    "text", [b"99 path=a.jpg\n", b"0 path=a.jpg\n", b"path=a.jpg\n", b"-1 a=b\n", b"14 path=a.jpg ", b"7 path\n"]
)
def test_a_damaged_pax_record_is_named(tmp_path, text):
    with pytest.raises(DataError, match="no valid pax record at byte 0 of the header at byte 0"):
        read(tmp_path / "a.tar", member(b"pax", text, b"x") + A + END)


def test_a_global_pax_header_holds_for_what_follows(tmp_path):
    common = member(b"g", b"18 linkpath=a.jpg\n", b"g")
    samples, tally = read(tmp_path / "a.tar", common + A + header(b"b.jpg", b"1") + END + header(b"c.jpg", b"1") + END)
    assert contents_of(samples) == {"a.jpg": b"first", "b.jpg": b"first"}
    assert not tally.is_seekable  # a reader that begins at b.jpg does not know the target
    assert tally.unusable() == {"hard links without a file": 1, "samples without a usable member": 1}


def test_every_member_that_cannot_be_used_is_counted(tmp_path):
    unusable = b"".join(header(b"%c.jpg" % kind, bytes([kind]), size=9) for kind in b"2346")  # no content follows
    unusable += member(b"S.jpg", b"hole", b"S", magic=b"ustar  \0") + member(b"Z.jpg", b"what", b"Z")
    unusable += member(b".hidden", b"x") + member(b"__meta__/a.json", b"{}") + header(b"folder.d/", b"5", size=9)
    samples, tally = read(tmp_path / "a.tar", A + unusable + member(b"7.jpg", b"contiguous", b"7") + B + A + END)
    assert [sample.key for sample in samples] == ["a", "7", "b", "a"]
    assert tally.unusable() == {
        "devices": 2, "symbolic links": 1, "FIFOs": 1, "sparse files": 1, "files of unknown types": 1,
        "members without a key": 2, "samples without a usable member": 6, "samples of a key that came before": 1,
    }  # fmt: skip


def test_bounds(tmp_path, monkeypatch):
    for kind in (b"L", b"K", b"x", b"g"):
        with pytest.raises(DataError, match=f"damaged: names of {MAX_HEADER_BYTES + 1} bytes at byte 0"):
            read(tmp_path / "a.tar", header(b"n", kind, size=MAX_HEADER_BYTES + 1) + bytes(2 << 20))
    monkeypatch.setattr("sigray.workers.data.tar.MAX_MEMBER_BYTES", 5)
    samples, tally = read(tmp_path / "a.tar", A + B + END)
    assert contents_of(samples) == {"a.jpg": b"first"}
    assert tally.unusable() == {"files of more than 256 MiB": 1, "samples without a usable member": 1}
    monkeypatch.setattr("sigray.workers.data.tar.MAX_MEMBERS", 3)
    many = b"".join(member(b"m.%d" % number) for number in range(5))
    samples, _ = read(tmp_path / "a.tar", many + A + END)
    assert [(sample.key, len(sample.members), sample.refusal) for sample in samples] == [
        ("m", 3, "more than 3 members"),
        ("a", 1, None),
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (gzip.compress(A), "compressed with gzip: unpack it with `mv 'a b.tar' 'a b.tar'.gz && gunzip 'a b.tar'.gz`"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed with zstd: .* && zstd -d --rm "),
        (bz2.compress(A), "compressed with bzip2"),
        (lzma.compress(A), "compressed with xz"),
        (b"<!DOCTYPE html><html>403", "an HTML page"),
        (b"<?xml version='1.0'?><Error>" + b" " * 600, "XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-LFS pointer: run `git lfs pull`"),
        (b"PAR1" + bytes(600), "a Parquet file"),
        (b"PK\x03\x04" + bytes(600), "a zip archive"),
        (b'{"url": 1}', "JSON"),
        (b"hello, world\n" * 100, "plain text"),
        (b"", "cut short: the file is empty"),
        (bytes(range(256)) * 4, "damaged: no valid tar header at byte 0"),
    ],
    ids=["gzip", "zstd", "bzip2", "xz", "html", "xml", "lfs", "parquet", "zip", "json", "text", "empty", "other"],
)
def test_what_is_no_tar_is_called_what_it_is(tmp_path, content, problem):
    with pytest.raises(DataError, match=problem):
        read(tmp_path / "a b.tar", content)


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.tar")
    (tmp_path / "folder.tar").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket.tar"))
    for name, kind in {"fifo": "a FIFO", "folder": "a folder", "socket": "a socket"}.items():
        with pytest.raises(DataError, match=f"{name}.tar: is {kind}, not a file"):
            LocalFile(tmp_path / f"{name}.tar")
    with pytest.raises(DataError, match="is a device, not a file"):
        LocalFile("/dev/zero")


def test_a_file_that_shrinks_is_named(tmp_path):
    """A mapping would end the process with SIGBUS."""
    path = tmp_path / "a.tar"
    path.write_bytes(A + B + END)
    samples = read_tar(LocalFile(path))
    first = next(samples)
    os.truncate(path, 600)
    with pytest.raises(DataError, match=r"a\.tar: cut short: shrank from 3072 to 600 bytes"):
        next(samples)
    os.truncate(path, 0)
    with pytest.raises(DataError, match=r"a\.tar: cut short: shrank from 3072 to 0 bytes"):
        first.members["jpg"]
