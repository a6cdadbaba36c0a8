"""Headers of tars by hand: what no writer writes."""

from __future__ import annotations

BLOCK = 512
END = bytes(2 * BLOCK)


def header(
    name: bytes, kind: bytes = b"0", *, size: int | bytes = 0, link: bytes = b"", magic: bytes = b"ustar\00000"
) -> bytes:
    """A header with a valid checksum; a size in bytes is taken as it is."""
    number = size if isinstance(size, bytes) else b"%011o\0" % size
    fields = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + number.ljust(12, b"\0") + b"00000000000\0"
    fields += b" " * 8 + kind + link.ljust(100, b"\0") + magic.ljust(8, b"\0") + bytes(247)
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def member(name: bytes, content: bytes = b"", kind: bytes = b"0", **fields: object) -> bytes:
    """A header and its content."""
    return header(name, kind, **{"size": len(content), **fields}) + content + bytes(-len(content) % BLOCK)  # type: ignore[arg-type]
