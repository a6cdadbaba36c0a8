"""Samples that attack a data-shard worker: bombs, long captions, deep JSON, each bound exceeded."""

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.helpers.data import encode_image

CUT = "caption cut"

Members = dict[str, bytes]


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written out: Pillow cannot write all kinds that it reads. `rows` begin with their filter byte each."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def jpeg(width: int = 20, height: int = 20, **options: object) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(content, "JPEG", **options)
    return content.getvalue()


def jpeg_with_scans(num_scans: int, size: int = 20) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    content = jpeg(size, size, progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * num_scans + content[-2:]


def tiff(entries: list[tuple[int, int, int, int]], rest: bytes = b"") -> bytes:
    """A little-endian TIFF: entries of tag, type, count, value, then the rest."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + rest


def tiff_with_strips(num_strips: int) -> bytes:
    """A TIFF of 1 x 1 pixel with offsets of many strips."""
    fields = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 277: 1, 278: 1}
    entries = [(tag, 3, 1, value) for tag, value in fields.items()]
    start = 10 + 12 * (len(entries) + 2) + 4
    entries += [(273, 4, num_strips, start), (279, 4, num_strips, start)]
    return tiff(sorted(entries), bytes(4 * num_strips))


def animation(kind: str, num_frames: int) -> bytes:
    frames = [Image.new("RGB", (4, 4), (number % 256, number // 256, 0)) for number in range(num_frames)]
    content = io.BytesIO()
    frames[0].save(content, kind, save_all=True, append_images=frames[1:], duration=1)
    return content.getvalue()


def large_png() -> bytes:
    """The largest image that data.max_image_pixels lets in, with transparency: 358 MB decoded, 350 kB encoded."""
    width, height = 9_400, 9_500
    return png(width, height, 8, 6, bytes((1 + 4 * width) * height))


def in_text(kind: bytes, prefix: bytes) -> bytes:
    """A PNG whose chunk of text or colours holds 200 MB of zeros."""
    return png(8, 8, 8, 0, bytes(72), (kind, prefix + zlib.compress(bytes(200_000_000), 1)))


def _exif_with_tags(num_tags: int) -> bytes:
    """EXIF of which every tag claims the whole block."""
    return tiff([(1 + number, 7, 12 * num_tags, 8) for number in range(num_tags)])


def _word(length: int) -> bytes:
    return "".join(random.Random(length).choices("abcdefghijklmnopqrstuvwxyz", k=length)).encode()


_IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "header of a huge PNG": (lambda: png(100_000, 100_000, 8, 2, b""), "image too large"),
    "header of a huge BMP": (
        lambda: b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "image too large",
    ),
    "JPEG of thousands of scans": (lambda: jpeg_with_scans(3_000), "image too large"),
    "TIFF of a million strips": (lambda: tiff_with_strips(1_000_000), "image too large"),
    "PNG cut short": (lambda: encode_image(np.zeros((20, 20, 3), np.uint8))[:-30], "unreadable image"),
    "BMP with wrong lengths": (
        lambda: b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 2**31, 40, 900, -900, 1, 8, 1, 2**31, 0, 0, 2**31, 9),
        "unreadable image",
    ),
    "colour profile that is a bomb": (lambda: in_text(b"iCCP", b"a\0\0"), "unreadable image"),
    "text that is a bomb": (lambda: in_text(b"zTXt", b"a\0\0"), "unreadable image"),
    "TIFF of tags": (lambda: tiff([(n, 4, 2**30, 8) for n in range(1_000, 4_000)]), "unreadable image"),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", "unreadable image"),
    "GIF of a thousand frames": (lambda: animation("GIF", 1_000), ""),
    "PNG of a thousand frames": (lambda: animation("PNG", 1_000), ""),
    "line of pixels": (lambda: jpeg(65_000, 1), ""),
    "EXIF of overlapping tags": (lambda: png(8, 8, 8, 0, bytes(72), (b"eXIf", _exif_with_tags(5_000))), ""),
}
_CAPTIONS: dict[str, tuple[Members, str]] = {
    "one word": ({"txt": _word(60_000)}, CUT),
    "megabytes": ({"txt": b"a cat and " * 200_000}, CUT),
    "combining marks": ({"txt": b"a" + b"\xcc\x81" * 10_000}, CUT),
    "entities": ({"txt": b"&amp;amp;lt;" * 5_000}, CUT),
    "right to left": ({"txt": "\u202e\u0645\u0631\u062d\u0628\u0627 ".encode() * 5_000}, CUT),
    "NULs": ({"txt": b"\0" * 100_000 + b"a"}, CUT),
    "spaces": ({"txt": b" \n" * 500_000}, "empty caption"),
    "Latin-1": ({"txt": b"caf\xe9" * 100_000}, "caption is not UTF-8"),
    "none": ({}, "no caption"),
    "deep JSON": ({"json": b'{"x":' * 100_000}, "unreadable json caption"),
    "long number": ({"json": b'{"x": ' + b"7" * 100_000 + b"}"}, "unreadable json caption"),
    "numbers for texts": ({"json": b'{"x": ' + b"[1.5," + b"0," * 100_000 + b"0]}"}, "unreadable json caption"),
    "half a surrogate pair": ({"json": b'{"x": "\\ud83d"}'}, "unreadable json caption"),
    "list with null": ({"json": b'{"x": [null, 7, "a cat"]}'}, ""),
}


def hostile_samples(num_samples: int, num_good: int) -> list[tuple[Members, str]]:
    """Hostile samples between good ones, each with the reason of its refusal, `CUT`, or "" if it is used as it is."""
    good = {"png": encode_image(np.full((20, 20, 3), 99, np.uint8)), "txt": b"a cat"}
    images = [({"png": make(), "txt": b"a cat"}, reason) for make, reason in _IMAGES.values()]
    captions = [({"png": good["png"], **members}, reason) for members, reason in _CAPTIONS.values()]
    kinds = [*images, *captions, ({"txt": b"no image"}, "no image")]
    wide = b'{"x": [' + b"[]," * 2_000_000 + b"[]]}"  # 6 MB, which Python parses into 0.15 GB
    samples = [
        ({"png": large_png(), "txt": b"a large image"}, ""),
        ({"png": good["png"], "json": wide}, "unreadable json caption"),
        ({"png": good["png"], "json": b'{"x": "a cat"}' + b" " * (17 << 20)}, "unreadable json caption"),
    ]
    samples += [kinds[number % len(kinds)] for number in range(num_samples - len(samples))]
    samples += [(good, "")] * num_good
    random.Random(0).shuffle(samples)
    return samples
