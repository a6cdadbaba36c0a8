"""Tars of GNU tar, bsdtar and Python's tarfile: samples found and reported are those that `tar -x` writes."""

import os
import re
import shutil
import subprocess
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigray.workers.data.tar import BLOCK, DataError, LocalFile, Tally, read_tar
from tests.helpers.tars import header

ENVIRONMENT = {**os.environ, "LC_ALL": "C.UTF-8"}
SPARSE = [["oldgnu"], ["gnu"], ["pax"], ["pax", "--sparse-version=0.0"], ["pax", "--sparse-version=0.1"]]
WRITERS = {
    **{f"tar {kind}": ["tar", f"--format={kind}", "--no-recursion"] for kind in ("v7", "ustar")},
    **{
        f"tar {' '.join(words)}": ["tar", "-S", f"--format={words[0]}", *words[1:], "--no-recursion"]
        for words in SPARSE
    },
    **{f"bsdtar {kind}": ["bsdtar", f"--format={kind}", "-n"] for kind in ("v7", "ustar", "gnutar", "pax")},
    **{f"tarfile {kind}": [kind] for kind in ("USTAR_FORMAT", "GNU_FORMAT", "PAX_FORMAT")},
}

folders = st.sampled_from(["", "d/", "d.x/e/", "n" * 101 + "/", "ü" * 60 + "/"])
stems = st.sampled_from(["a", "b", "c", "new\nline", "l" * 90, "caf\udce9", "__x__", ""])
names = st.builds("".join, st.tuples(folders, stems, st.sampled_from([".jpg", ".txt", ".seg.png", ""]))).filter(
    lambda name: not name.endswith("/")
)
kinds = st.sampled_from(["file", "file", "file", "link", "link", "symbolic link", "sparse", "fifo"])


def lay_out(folder, entries):
    """Write the files; return their names in order."""
    order, files = [], []
    for number, (name, kind, size) in enumerate(entries):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(path):
            if kind == "symbolic link":
                path.symlink_to("nowhere")
            elif kind == "fifo":
                os.mkfifo(path)
            elif kind == "link" and files:
                os.link(files[number % len(files)], path)
            else:
                path.write_bytes(os.urandom(size))
                if kind == "sparse":
                    os.truncate(path, size + (1 << 20))
                files.append(path)
            order.append(name)
    return order


def write(writer, tar, folder, order):
    command = WRITERS[writer]
    if "v7" in writer or "ustar" in writer.lower():
        # GNU tar writes a cut target of a link whose target is longer; test_manifest.py has long names of ustar.
        order = [name for name in order if len(os.fsencode(name)) < 100]
    if command[0] in ("tar", "bsdtar"):
        names = b"".join(os.fsencode(name) + b"\0" for name in order)
        words = [*command, "-cf", str(tar), "-C", str(folder), "--null", "-T", "-"]
        # Names that a format cannot hold are left out, with an error.
        subprocess.run(words, input=names, env=ENVIRONMENT, stderr=subprocess.DEVNULL, check=False)
        return
    with tarfile.open(tar, "w", format=getattr(tarfile, command[0])) as out:
        for name in order:
            try:
                out.add(folder / name, name, recursive=False)
            except ValueError:  # too long for ustar
                continue


def keys_of(folder):
    """Names, and their keys by webdataset's rule, of the files that were extracted."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            name = os.fsencode(path.relative_to(folder)).decode(errors="backslashreplace")
            key = re.match(r"((?:.*/)?[^/.]+)\.[^/]*\Z", name, re.DOTALL)
            found[name] = key[1] if key and not re.match(r"__[^/]*__($|/)", name) else None
    return found


@pytest.mark.skipif(shutil.which("bsdtar") is None, reason="bsdtar (Debian: libarchive-tools) is not installed")
@settings(max_examples=30)
@given(
    entries=st.lists(st.tuples(names, kinds, st.integers(0, 1500)), min_size=1, max_size=10),
    writers=st.lists(st.sampled_from(list(WRITERS)), min_size=1, max_size=2),
)
def test_found_and_reported_are_what_tar_extracts(tmp_path_factory, entries, writers):
    folder = tmp_path_factory.mktemp("every")
    (folder / "in").mkdir()
    order = lay_out(folder / "in", entries)
    content = b""
    for number, writer in enumerate(writers):
        write(writer, folder / f"{number}.tar", folder / "in", order[number :: len(writers)])
        content += (folder / f"{number}.tar").read_bytes()
    tar = folder / "all.tar"
    tar.write_bytes(content)
    (folder / "out").mkdir()
    subprocess.run(
        ["tar", "-xif", str(tar), "-C", str(folder / "out")], env=ENVIRONMENT, stderr=subprocess.DEVNULL, check=False
    )
    extracted = keys_of(folder / "out")

    tally = Tally()
    samples = list(read_tar(LocalFile(tar), tally=tally))
    unusable = tally.unusable()
    again, lost = (
        unusable.get(f"samples {what}", 0) for what in ("of a key that came before", "without a usable member")
    )
    assert len(samples) - again + lost == len({key for key in extracted.values() if key is not None})
    for sample in samples:
        assert sample.refusal is None
        for ending, found in sample.members.items():
            assert found == (folder / "out" / encoded(f"{sample.key}.{ending}")).read_bytes()
    for number, sample in enumerate(samples):
        rest = list(read_tar(LocalFile(tar, sample.position), first_index=number, links=tally.links))
        assert rest == samples[number:]
    num_files = sum(len(sample.members) for sample in samples) + sum(unusable.values()) - again - lost
    assert num_files == len(extracted)
    assert unusable.get("members without a key", 0) == sum(key is None for key in extracted.values())
    shutil.rmtree(folder)


def encoded(name):
    return name.replace("caf\\xe9", "caf\udce9")


@settings(max_examples=200)
@given(data=st.data())
def test_no_header_makes_the_reader_hang_or_fail_otherwise(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("hostile") / "a.tar"
    blocks = [
        header(b"x", b"x", size=30), b"30 path=a/long\nname.jpg\n5 a=".ljust(BLOCK, b"\0"),
        header(b"a.jpg", b"0", size=3), b"jpg".ljust(BLOCK, b"\0"),
        header(b"L", b"L", size=6), b"b.txt\0".ljust(BLOCK, b"\0"),
        header(b"b", b"1", link=b"a.jpg", size=3), header(b"s.png", b"S", size=4), b"hole".ljust(BLOCK, b"\0"),
        header(b"g", b"g", size=14), b"14 size=00003\n".ljust(BLOCK, b"\0"), header(b"c.txt", b"0"), bytes(BLOCK),
        bytes(1024),
    ]  # fmt: skip
    content = bytearray(b"".join(blocks))
    for _ in range(data.draw(st.integers(1, 6))):
        field = data.draw(
            st.sampled_from(
                [(0, 100), (124, 136), (124, 136), (156, 157), (156, 157), (157, 257), (257, 265), (345, 500), (0, 512)]
            )
        )
        begin = data.draw(st.integers(0, len(content) // BLOCK - 1)) * BLOCK
        place = begin + data.draw(st.integers(field[0], field[1] - 1))
        content[place] = data.draw(st.one_of(st.sampled_from(b"\0 -+_0123467gxLKS\x80\xff"), st.integers(0, 255)))
        if data.draw(st.booleans(), "mend the checksum"):
            block = content[begin : begin + BLOCK]
            content[begin + 148 : begin + 156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    path.write_bytes(content)
    source = Counting(path)
    try:
        samples = list(read_tar(source, allow_unclosed=data.draw(st.booleans())))
    except DataError:
        samples = []
    assert len(samples) <= len(content) // BLOCK
    assert source.num_reads <= 2 * len(content) // BLOCK


class Counting(LocalFile):
    """A source that counts what is read, and refuses to go back."""

    num_reads = 0

    def read(self, count):
        self.num_reads += 1
        return super().read(count)

    def skip(self, count):
        assert count >= 0
        super().skip(count)
