"""The tar reader against Python's tarfile and webdataset, and against damage that those do not notice."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from sigray.workers.data.tar import BLOCK, DataError, MappedFile, read_members, read_tar

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


@settings(max_examples=150, deadline=None)
@given(members=st.lists(st.tuples(names, contents), max_size=8), tar_format=formats)
def test_members_are_those_of_tarfile(tmp_path_factory, members, tar_format):
    path = tar_of(tmp_path_factory.mktemp("tar") / "a.tar", members, tar_format)
    with tarfile.open(path) as tar:
        expected = [(info.name, tar.extractfile(info).read()) for info in tar if info.isfile()]
    found = [(member.name, bytes(member.content)) for member in read_members(MappedFile(path))]
    assert found == expected
    headers = list(read_members(MappedFile(path), headers_only=True))
    assert [member.name for member in headers] == [name for name, _ in expected]
    assert all(member.content is None for member in headers)


keys = st.sampled_from(["a", "b", "d/a", "d.x/a", "__meta__", "__x__/y"])
endings = st.sampled_from(["jpg", "txt", "JSON", "seg.png"])


@settings(max_examples=150, deadline=None)
@given(members=st.lists(st.tuples(keys, endings, contents), max_size=12))
def test_samples_are_those_of_webdataset(tmp_path_factory, members):
    path = tar_of(tmp_path_factory.mktemp("tar") / "a.tar", [(f"{k}.{e}", content) for k, e, content in members])
    found = list(read_tar(MappedFile(path)))
    assert [sample.index for sample in found] == list(range(len(found)))
    if any(sample.has_duplicates for sample in found):
        with pytest.raises(ValueError, match="duplicate file name"):
            list(samples_of_webdataset(path))
        return
    expected = list(samples_of_webdataset(path))
    assert [sample.key for sample in found] == [sample["__key__"] for sample in expected]
    for ours, theirs in zip(found, expected, strict=True):
        own = {ending: bytes(content) for ending, content in ours.members.items()}
        assert own == {ending: content for ending, content in theirs.items() if not ending.startswith("__")}


@settings(max_examples=60, deadline=None)
@given(members=st.lists(st.tuples(keys, endings, contents), min_size=1, max_size=12), data=st.data())
def test_reading_from_any_samples_position_gives_the_rest(tmp_path_factory, members, data):
    path = tar_of(tmp_path_factory.mktemp("tar") / "a.tar", [(f"{k}.{e}", content) for k, e, content in members])
    whole = list(read_tar(MappedFile(path)))
    if not whole:
        return
    number = data.draw(st.integers(0, len(whole) - 1))
    rest = list(read_tar(MappedFile(path, whole[number].position), first_index=number))
    assert rest == whole[number:]


@settings(max_examples=200, deadline=None)
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
    with pytest.raises(DataError, match="cut short|damaged"):
        list(read_tar(MappedFile(path)))


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
    assert {member.name: bytes(member.content) for member in read_members(MappedFile(path))} == contents


def test_sizes_beyond_octal_are_understood(tmp_path):
    """GNU's base 256, which tarfile writes from 8 GiB on: only the number is tried here."""
    from sigray.workers.data.tar import _number

    assert _number(b"00000001750\0") == 1000
    assert _number(b"\x80" + (9 << 30).to_bytes(11, "big")) == 9 << 30


def test_a_name_that_is_not_utf8_is_named(tmp_path):
    path = tar_of(tmp_path / "a.tar", [("x.txt", b"text")])
    content = bytearray(path.read_bytes())
    content[0] = 0xFF
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:BLOCK]))
    path.write_bytes(content)
    with pytest.raises(DataError, match="name is not UTF-8"):
        list(read_tar(MappedFile(path)))
