"""Read samples from tars: check headers, group neighbours by key, copy nothing.

webdataset, open_clip and Ray Data read through Python's `tarfile`. `tarfile` stops without an error if a header is
damaged or the file ends early, and costs 124 us per sample of three members; this reader costs a tenth. Members are
grouped as webdataset groups them, and the tests compare with webdataset and with what `tar -x` writes.

    read_members   header -> member: its name, and its content or the reason why it has none
    read_tar       members -> samples; `Tally` counts what no sample has

A source is read front to back. Of a local file, a member's content is read when it is used: a mapping of a file that
shrinks would kill the process. `workers/data/store_stream.py` has the source for objects in stores.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
import struct
import weakref
import zlib
from array import array
from collections import Counter, UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from sigray.workers.data.other_formats import other_format

BLOCK = 512
MAX_HEADER_BYTES = 1 << 20
"""Of a long name or of pax records; libarchive's bound too."""
MAX_MEMBER_BYTES = 1 << 28
"""A larger file is no part of its sample."""
MAX_MEMBERS = 4096
"""A sample with more members is refused."""
_MAX_PADDING = 1 << 22  # bytes of zeros after an archive; GNU tar pads to records of 10,240 bytes, tapes to 1 MiB
_PREFETCH_BYTES = 1 << 22
# name, size, kind, link, magic, prefix
_HEADER = struct.Struct("100s 24x 12s 20x c 100s 6s 82x 155s 12x")
_ZEROS = bytes(BLOCK)
_FILE_KINDS = b"0\0007"  # 7: a contiguous file
_PROBLEMS = {b"2": "symbolic links", b"3": "devices", b"4": "devices", b"6": "FIFOs", b"S": "sparse files", b"1": ""}
_UNKNOWN = "files of unknown types"
_BROKEN_LINK = "hard links without a file"
_TOO_LARGE = f"files of more than {MAX_MEMBER_BYTES >> 20} MiB"
_NO_KEY = "members without a key"
_LOST = "samples without a usable member"
_AGAIN = "samples of a key that came before"
WHY_UNUSABLE = {
    "symbolic links": "a tar of data cannot follow them: pack with `tar -h`",
    "sparse files": "pack without `tar -S`",
    _BROKEN_LINK: "their files are in no earlier place of the tar",
    _NO_KEY: "a key ends at a dot; __NAME__ and .NAME are none",
    _LOST: "all their members are counted above",
    _AGAIN: "members of a sample must be neighbours: pack with `tar --sort=name`",
}
"""Reasons and remedies of what `Tally.unusable` counts."""
_NO_FILES = b"5DV"  # directories, a volume's label
_PAX_NUMBER = re.compile(rb"[0-9]{1,100}")
IF_WHOLE = "; if the tar is whole, set data.allow_unclosed=true"


class DataError(ValueError):
    """User data that stops the run; the message names the shard and the remedy."""


class ByteSource(Protocol):
    """A shard's bytes, front to back."""

    url: str
    position: int
    num_bytes: int

    def read(self, count: int) -> bytes | memoryview:
        """Return the next `count` bytes; raise DataError("cut short: ...") at the end."""

    def content_at(self, position: int, count: int) -> bytes | memoryview | Piece:
        """Return a member's content; the next byte to read may be another one then."""

    def skip(self, count: int) -> None:
        """Pass over bytes; a source need not transfer them."""

    def close(self) -> None:
        """Free the source's resources; contents that were read stay valid."""


class LocalFile:
    """A local file as a `ByteSource`.

    Raises:
        DataError: the path names no file but a FIFO, a device or a folder.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], start: int = 0) -> None:
        self.url = os.fspath(path)
        check_is_file(self.url, os.stat(path))  # before it is opened: opening a FIFO waits for its writer
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self.num_bytes = os.fstat(self._file).st_size
        self.position = start
        self._prefetched = start

    def read(self, count: int) -> bytes:
        position = self.position
        self.position = position + count
        return self.read_at(position, count)

    def read_at(self, position: int, count: int) -> bytes:
        if position + count > self.num_bytes:
            raise cut_short(self.num_bytes)
        try:
            content = os.pread(self._file, count, position)
        except OSError as error:
            raise DataError(f"{self.url}: byte {position} cannot be read: {error.strerror}") from error
        if len(content) < count:
            now = os.fstat(self._file).st_size
            raise DataError(f"{self.url}: cut short: shrank from {self.num_bytes} to {now} bytes while it was read")
        return content

    def content_at(self, position: int, count: int) -> Piece:
        if position > self._prefetched - _PREFETCH_BYTES // 2:
            # The kernel sees reads of single blocks and would prefetch nothing.
            os.posix_fadvise(self._file, position, _PREFETCH_BYTES, os.POSIX_FADV_WILLNEED)
            self._prefetched = position + _PREFETCH_BYTES
        return Piece(self, position, count)

    def skip(self, count: int) -> None:
        self.position += count

    def close(self) -> None:
        """Do nothing: the file is closed with the last content."""


class Piece(NamedTuple):
    """A member's content in a local file, not read yet."""

    file: LocalFile
    position: int
    num_bytes: int


class Members(UserDict[str, Any]):
    """A sample's members: ending, lower case -> content.

    Raises:
        DataError: on access to a content, if a local file shrank or cannot be read.
    """

    def __getitem__(self, ending: str) -> Any:
        content = self.data[ending]
        return content.file.read_at(content.position, content.num_bytes) if type(content) is Piece else content


class Member(NamedTuple):
    """One file of a tar. Its content may be read before the next member is taken."""

    name: str
    position: int  # of its first header's first byte
    header: int  # first byte of its own header, after long names and pax records
    begin: int  # first byte of its content
    num_bytes: int
    problem: str = ""  # why it has no content: a plural, as "symbolic links"
    target: str | None = None  # of a hard link without a content of its own


@dataclass(slots=True)
class TarSample:
    """Neighbouring members with one key."""

    key: str
    index: int  # in its shard
    position: int  # first byte of its first header
    members: Mapping[str, Any] = field(default_factory=dict)  # ending, lower case -> content
    refusal: str | None = None  # why the sample cannot be used; `members` has the first of two members of one name


@dataclass
class Tally:
    """What a pass over a whole tar finds beside the samples.

    Samples that `tar -x` would write or fail to link, grouped by key = samples - samples whose key came before +
    samples without a usable member.
    """

    links: dict[int, tuple[int, int]] = field(
        default_factory=dict
    )  # a hard link's header -> first byte and size of its content
    is_seekable: bool = True  # no global pax header renames what follows
    problems: Counter[str] = field(default_factory=Counter)  # members by reason
    key_hashes: array[int] = field(default_factory=lambda: array("q"))  # of samples
    lost_hashes: array[int] = field(default_factory=lambda: array("q"))  # keys of members that cannot be used

    def unusable(self) -> dict[str, int]:
        """Return the number of members and samples that cannot be used, by reason."""
        keys = set(self.key_hashes)
        lost = set(self.lost_hashes) - keys
        samples = {_LOST: len(lost), _AGAIN: len(self.key_hashes) - len(keys)}
        return dict(sorted(self.problems.items())) | {reason: count for reason, count in samples.items() if count}


def cut_short(num_bytes: int) -> DataError:
    """Return the error for a tar that ends too early."""
    return DataError(f"cut short: ends at byte {num_bytes} without a tar's closing blocks")


def check_is_file(url: str, status: os.stat_result) -> None:
    """Refuse what a reader would wait for, or never come to the end of."""
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
        raise DataError(f"{url}: is {kinds.get(stat.S_IFMT(status.st_mode), 'a device')}, not a file")


def read_members(
    source: ByteSource, *, allow_unclosed: bool = False, tally: Tally | None = None, is_old: bool = False
) -> Iterator[Member]:
    """Yield the files of the tars in a source, from its position on.

    Reads what GNU tar, bsdtar and Python's tarfile write: v7, ustar, old GNU and pax.

    Args:
        source: at a header.
        allow_unclosed: accept a tar that ends after a member, without two closing blocks.
        tally: receives whether a reader may begin at any member.
        is_old: read as until November 2026: up to the first closing blocks, regular files only, pax records by lines.
            A manifest without `Shard.rules` has the counts of that reader, and they decide the order of its run.

    Raises:
        DataError: a header is damaged, or the tar ends too early.
    """
    num_bytes = source.num_bytes
    first = source.position
    is_closed = False
    ahead: bytes | memoryview = b""  # a header that has been read
    names: dict[bytes, bytes] = {}  # GNU's long name (L) and long link (K) of the next member
    records: dict[bytes, bytes] = {}  # pax records of the next member
    common: dict[bytes, bytes] = {}  # pax records of all members that follow
    while True:
        position = source.position - len(ahead)
        if position + BLOCK > num_bytes:
            _check_end(source, is_closed, allow_unclosed and position == first)
            return
        header = ahead or source.read(BLOCK)
        ahead = b""
        name, size_field, kind, link, magic, prefix = _HEADER.unpack(header)
        if not name[0] and header == _ZEROS:
            if is_old:
                return
            if names or records:
                raise DataError(f"damaged: no member follows the names at byte {first}")
            ahead = _skip_padding(source, position, allow_unclosed)
            first = source.position - len(ahead)
            is_closed = True
            common = {}
            continue
        size = _number(size_field)
        if size < 0 or not _is_header(header):
            raise DataError(_what_is_there(source, bytes(header), position))
        is_closed = False
        if kind in b"LKxXg":
            extra = _read_extra(source, size, position)
            if kind in b"LK":
                names[kind] = extra.partition(b"\0")[0]
            elif is_old:
                records |= re.findall(rb"(?:^|\n)\d+ (path|size)=([^\n]*)", extra if kind == b"x" else b"")
            elif kind == b"g":
                found = _pax_records(extra, position)
                common |= {key: found[key] for key in (b"path", b"size", b"linkpath") if key in found}
                if common and tally:
                    tally.is_seekable = False
            else:
                records |= _pax_records(extra, position)
            continue
        problem = ""
        target = None
        if names or records or common:
            fields = {b"path": names.get(b"L", b""), b"linkpath": names.get(b"K", link)} | common | records
            if b"size" in fields:
                if not _PAX_NUMBER.fullmatch(fields[b"size"]):
                    raise DataError(f"damaged: a size that is no number, {fields[b'size'][:40]!r}, at byte {first}")
                size = int(fields[b"size"])
            if any(key.startswith(b"GNU.sparse.") for key in records):
                problem = _PROBLEMS[b"S"]
                fields[b"path"] = records.get(b"GNU.sparse.name", fields[b"path"])
            if fields[b"path"]:
                name = fields[b"path"]
                prefix = b""
            link = fields[b"linkpath"]
        if kind not in _FILE_KINDS and not is_old:
            problem = _PROBLEMS.get(kind, _UNKNOWN)
            if kind == b"1":
                if size and not records and source.position + BLOCK <= num_bytes:
                    # Only pax gives a hard link a content of its own. libarchive's rule without pax records: if a
                    # header follows at once, the size says nothing. GNU tar and Python never read such a content.
                    ahead = source.read(BLOCK)
                    size = 0 if ahead == _ZEROS or _is_header(ahead) else size
                target = None if size else link.partition(b"\0")[0].decode("utf-8", "backslashreplace")
            elif kind == b"S" and header[482]:
                while source.read(BLOCK)[504]:  # more of the map of holes
                    pass
            elif kind in b"23456":
                size = 0
        begin = source.position - len(ahead)
        end = begin - (-size // BLOCK) * BLOCK
        if end > num_bytes:
            raise DataError(f"cut short: a member of {size} bytes begins at byte {position} of {num_bytes}")
        if size > MAX_MEMBER_BYTES and not is_old:
            problem = problem or _TOO_LARGE
        name = name.partition(b"\0")[0]
        if magic == b"ustar\0" and prefix[:1] not in (b"", b"\0"):
            name = prefix.partition(b"\0")[0] + b"/" + name
        if kind in b"0\0" if is_old else kind not in _NO_FILES and not name.endswith(b"/"):
            # Linux allows any bytes in names; every text of ours must be UTF-8.
            text = name.decode("utf-8", "backslashreplace")
            yield Member(text, first, position, begin, size, problem, target)
        if size:
            ahead = b""
            source.skip(end - source.position)
        first = end
        if names or records:
            names, records = {}, {}


def read_tar(
    source: ByteSource,
    *,
    first_index: int = 0,
    headers_only: bool = False,
    allow_unclosed: bool = False,
    links: Mapping[int, tuple[int, int]] | None = None,
    tally: Tally | None = None,
    is_old: bool = False,
) -> Iterator[TarSample]:
    """Yield the samples of a tar from the source's position on.

    A hard link has the content of the newest earlier file of its target's name, as after `tar -x`.

    Args:
        source: of the tar's bytes; its position must be the first header of a sample.
        first_index: number of the first sample.
        headers_only: leave the contents out, and do not transfer them if that saves time.
        allow_unclosed: as in `read_members`.
        links: contents of hard links, as `Tally.links` of another pass; None: find them, from the first byte on.
        tally: receives what no sample has.
        is_old: as in `read_members`.

    Raises:
        DataError: as `read_members`.
    """
    sample: TarSample | None = None
    contents: dict[str, Any] = {}
    files: dict[int, tuple[int, int] | None] = {}  # by hash of the path, which may have a mebibyte
    index = first_index
    tally = tally or Tally()
    members = read_members(source, allow_unclosed=allow_unclosed, tally=tally, is_old=is_old)
    for name, position, header, begin, num_bytes, problem, target in members:
        if target is not None:
            place = files.get(_path_hash(target)) if links is None else links.get(header)
            if place is not None:
                begin, num_bytes = tally.links[header] = place
            else:
                problem = _BROKEN_LINK
        if links is None:
            files[_path_hash(name)] = None if problem else (begin, num_bytes)
        if target == name and not problem:  # `tar -c a a` writes the second as a link to the first
            continue
        # webdataset's rule: the key ends at the first dot of the last part of the path.
        slash = name.rfind("/")
        dot = name.find(".", slash + 1)
        if dot <= slash + 1 or (name.startswith("__") and re.match(r"__[^/]*__($|/)", name)):
            tally.problems[_NO_KEY] += 1
            continue
        key = name[:dot]
        ending = name[dot + 1 :].lower()
        if problem:
            tally.problems[problem] += 1
            tally.lost_hashes.append(hash(key))
            if sample is not None and key == sample.key and ending in contents:
                sample.refusal = "duplicate key"
            continue
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            found = Members()
            contents = found.data
            sample = TarSample(key, index, position, found)
            index += 1
            tally.key_hashes.append(hash(key))
        if ending in contents:
            sample.refusal = "duplicate key"
        elif len(contents) >= MAX_MEMBERS and not is_old:
            sample.refusal = f"more than {MAX_MEMBERS:,} members"
        else:
            contents[ending] = None if headers_only else source.content_at(begin, num_bytes)
    if sample is not None:
        yield sample


def _path_hash(name: str) -> int:
    """Return a hash of the path that `tar -x` writes to."""
    return hash(posixpath.normpath(name).lstrip("/"))


def _number(field: bytes) -> int:
    """Parse octal digits, or base 256 if the first bit is set; -1: neither."""
    digits = field.rstrip(b"\0 ").lstrip(b" ") or b"0"
    try:
        if digits.isdigit():  # int() takes signs and underscores too
            return int(digits, 8)
    except ValueError:
        return -1
    return int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1)) if field[0] & 0xC0 == 0x80 else -1


def _is_header(block: bytes | memoryview) -> bool:
    stored = bytes(block[148:156])
    number = _number(stored)
    # Adler-32's lower half is 1 + the sum of the bytes, modulo 65521: twenty times as fast as sum().
    total = (zlib.adler32(block) & 0xFFFF) - 1 - sum(stored) + 8 * 0x20
    return number >= 0 and (number - total) % 65521 == 0


def _read_extra(source: ByteSource, size: int, position: int) -> bytes:
    """Return a long name or pax records."""
    if source.position + size > source.num_bytes:
        raise DataError(f"cut short: a header of {size} bytes begins at byte {position} of {source.num_bytes}")
    if size > MAX_HEADER_BYTES:
        raise DataError(f"damaged: names of {size} bytes at byte {position}, more than {MAX_HEADER_BYTES}")
    return bytes(source.read(-(-size // BLOCK) * BLOCK)[:size])


def _pax_records(extra: bytes, position: int) -> dict[bytes, bytes]:
    """Parse "LENGTH KEY=VALUE\\n" by the lengths: values may have newlines in them."""
    records = {}
    begin = 0
    while begin < len(extra) and extra[begin]:
        digits = extra[begin : begin + 8].partition(b" ")[0]
        end = begin + int(digits) if digits.isdigit() else 0
        key, equals, value = extra[begin + len(digits) + 1 : end].partition(b"=")
        if end <= begin or end > len(extra) or not equals or not value.endswith(b"\n"):
            raise DataError(f"damaged: no valid pax record at byte {begin} of the header at byte {position}")
        records[key] = value[:-1]
        begin = end
    return records


def _skip_padding(source: ByteSource, position: int, allow_unclosed: bool) -> bytes | memoryview:
    """Pass over the zeros after an archive; return the next one's first block, if any.

    Args:
        position: of the first closing block, which has been read.
    """
    while source.position + BLOCK <= source.num_bytes:
        block = source.read(BLOCK)
        if block != _ZEROS:
            if source.position == position + 2 * BLOCK:
                raise DataError(f"damaged: one closing block instead of two at byte {position}")
            return block
        if source.position - position > _MAX_PADDING:
            raise DataError(
                f"damaged: more than {_MAX_PADDING} bytes of zeros from byte {position} on: a download that was never "
                "finished?"
            )
    if source.position == position + BLOCK and not allow_unclosed:
        raise DataError(f"damaged: one closing block instead of two at byte {position}{IF_WHOLE}")
    return b""


def _check_end(source: ByteSource, is_closed: bool, is_allowed: bool) -> None:
    """Raise a DataError if a tar may not end here, with less than a block left."""
    begin = source.position
    rest = bytes(source.read(source.num_bytes - begin)) if source.num_bytes > begin else b""
    if not begin:
        raise DataError(_what_is_there(source, rest, 0) if rest else "cut short: the file is empty")
    if is_closed or is_allowed:
        if rest.strip(b"\0"):
            raise DataError(f"damaged: no tar header at byte {begin} of {source.num_bytes}")
        return
    raise DataError(f"{cut_short(source.num_bytes)}{'' if rest else IF_WHOLE}")


def _what_is_there(source: ByteSource, block: bytes, position: int) -> str:
    """Return what a block is that is no header."""
    if not position and (other := other_format(block, source.url)):
        return other
    if len(block) == BLOCK and _is_header(block):
        return f"damaged: a size that is no number, {block[124:136]!r}, in the header at byte {position}"
    if len(block) < BLOCK:
        return str(cut_short(source.num_bytes))
    return f"damaged: no valid tar header at byte {position} of {source.num_bytes}"
