"""Decode a sample's members to an image of fixed size and a caption, or refuse it.

    H, W  height and width of the encoded image, upright        S  image size in pixels

A sample is its members: ending -> content. Endings are in lower case; contents are bytes or views of a buffer. An
image goes straight into its row of the batch, (S, S, 3) uint8. If the run wants views (`views.py`), they go there too.
The random choices of a sample (the boxes of crops, the caption) are a function of the run's seed and the sample's
position, `sample_random`. No state passes from one sample to the next, so any worker gives the same result at any time.

A refused sample raises `Refused` with a short reason. `workers/data/worker.py` counts the reasons and replaces the
sample; the run continues.

The fast path is a JPEG: libjpeg-turbo by simplejpeg, whose pixels equal Pillow's, then `resize.py`. For a photo of 380
to 512 px to 224, decoding takes 930 to 1,010 us, resizing 190 to 240 (`python -m benchmarks.resize`), and the rest
about 80 (one core of a busy Xeon). Reused buffers in place of the allocator's gained nothing: 1 page fault per image
instead of 13, times within 1 %.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import itertools
import json
import math
import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from sigray.workers.config import LINES, DataConfig
from sigray.workers.data.resize import resize
from sigray.workers.data.views import Pixels, Views, split
from sigray.workers.model.inputs import ImageInputs
from sigray.workers.urls import is_utf8

Members = Mapping[str, bytes | memoryview]

# Pillow's own limit warns at one size and raises at twice that. Ours is data.max_image_pixels, checked before loading.
Image.MAX_IMAGE_PIXELS = None

# What Pillow may open. Pillow knows forty formats more, among them EPS, for which it starts Ghostscript.
_FORMATS = ("PNG", "WEBP", "JPEG", "GIF", "BMP", "TIFF")
_JPEG_START = b"\xff\xd8\xff"
_ORIENTATION = 0x0112  # EXIF tag

# Memory of one image: Pillow holds 4 bytes a pixel, the result has 3. WebP's decoder holds two frames and a copy of
# one; a TIFF is turned into a second image. (Measured with 40 million pixels of each format.)
_MAX_DECODE_BYTES = 768 << 20  # 9 bytes a pixel of the default of data.max_image_pixels: a progressive JPEG
_BYTES_PER_PIXEL = {"WEBP": 16, "TIFF": 8}
_BYTES_PER_CMYK = 12  # of a JPEG with several scans: the decoder keeps the coefficients of all scans
_STRIP_PIXELS = 1 << 20
_MAX_SCANS = 100  # of a JPEG; progressive photos have about 10
_TIFF_OFFSETS = (273, 324)
_MAX_TIFF_PARTS = 1 << 18  # strips or tiles, for each of which Pillow makes an object
# Threads of a process, as those of `sigray data inspect`, decode one large image at a time.
_LARGE_PIXELS = 1 << 24
_LARGE_IMAGE = threading.Lock()

IMAGE_REASONS = ("no image", "unreadable image", "image too large", "duplicate key")
"""Why an embedding store may lack an embedding."""

# From the most to the least specific reason.
_CAPTION_REASONS = ("caption is not UTF-8", "unreadable json caption", "empty caption", "no caption")

# `image_resize: shortest` cuts a longer image to this aspect before resizing: 1 x 89,000,000 pixels would become
# 224 x 20,000,000,000.
_MAX_ASPECT = 8

# The tokenizer cuts a caption to its model's context, `cut_caption`; this bounds what is decoded before.
_MAX_TEXT_BYTES = 1 << 18
# Parsed JSON takes up to 27 times its bytes, 0.45 GB here: less than the largest image.
_MAX_JSON_BYTES = 1 << 24


class Refused(Exception):
    """A sample that cannot be used; the message is one of a few fixed reasons."""


@dataclass(frozen=True)
class SampleRandom:
    """Random numbers of one sample in one epoch: a separate stream for each purpose.

    From a hash (1.5 us for eight numbers), because the floats of numpy's generators may change with its version.
    """

    place: bytes

    def uniforms(self, purpose: str) -> Iterator[float]:
        """Yield endless numbers in [0, 1), a function of place and purpose.

        Args:
            purpose: at most 16 ASCII characters.
        """
        for counter in itertools.count():
            content = self.place + struct.pack("<Q", counter)
            digest = hashlib.blake2b(content, digest_size=64, person=purpose.encode()).digest()
            for number in struct.unpack("<8Q", digest):
                yield (number >> 11) * 2.0**-53


def sample_random(seed: int, epoch: int, shard: int, index: int) -> SampleRandom:
    """Return the random numbers of a sample: number `index` in shard number `shard`."""
    return SampleRandom(struct.pack("<4q", seed, epoch, shard, index))


class Decoder:
    """Decodes samples as a config says.

    Args:
        data: section of the config with image_keys, captions, crop settings and max_image_pixels.
        image_size: S.
        inputs: how a whole image becomes a square; None: by its centre.
        views: crops of each image beside the image.
    """

    def __init__(
        self, data: DataConfig, image_size: int, inputs: ImageInputs | None = None, views: Views | None = None
    ) -> None:
        self._data = data
        self._pixels = Pixels(image_size, views)
        self._inputs = inputs or ImageInputs()
        self._captions = sorted(data.captions.items(), key=lambda source: -source[1])

    def decode_image(self, members: Members, out: np.ndarray, random: SampleRandom | None) -> None:
        """Decode the sample's image, once, into `out`: the image, and its views.

        Transparent parts become white, and the EXIF orientation is applied. Views are crops in any case; their boxes
        have the ratio of `crop_ratio`.

        Args:
            out: uint8, C-contiguous, of the shape `Pixels.shape`; overwritten.
            random: draws the box of `crop: random`, and those of the views; None for evaluation, which takes the
                centre and has no views.

        Raises:
            Refused: "no image", "unreadable image", "image too large".
        """
        assert out.shape == self._pixels.shape
        assert out.flags.c_contiguous  # it is written in place
        ending = next((ending for ending in self._data.image_keys if ending in members), None)
        if ending is None:
            raise Refused("no image")
        decoded = decode_pixels(members[ending], self._data.max_image_pixels)
        image = out
        views = self._pixels.views
        if views is not None:
            assert random is not None
            (image,), (global_view,), (local_views,) = split(out[None], self._pixels)
            self._crop(decoded, global_view, views.global_scale, random.uniforms("global view"))
            for number, local_view in enumerate(local_views):
                self._crop(decoded, local_view, views.local_scale, random.uniforms(f"local view {number}"))
        if random is None or self._data.crop == "center":
            _resize_whole(decoded, image, self._inputs)
        else:
            self._crop(decoded, image, self._data.crop_scale, random.uniforms("crop"))

    def _crop(
        self, decoded: np.ndarray, out: np.ndarray, scale: tuple[float, float], uniforms: Iterator[float]
    ) -> None:
        """Resize a random box to `out`, as torchvision's RandomResizedCrop does."""
        height, width = decoded.shape[:2]
        box = random_box(height, width, scale, self._data.crop_ratio, uniforms)
        resize(_cut(decoded, *box), out, size=out.shape[:2], interpolation=self._inputs.image_interpolation)

    def choose_caption(self, members: Members, random: SampleRandom) -> str:
        """Return one of a sample's captions, drawn by weight; raises as `captions`."""
        # Exponential arrival times: source i is first with probability w_i / sum w, and so among any subset. So
        # sources are tried in the order of arrival until one is usable, and JSON is parsed only if it is needed.
        uniforms = random.uniforms("caption")
        sources = sorted(self._captions, key=lambda source: -math.log1p(-next(uniforms)) / source[1])
        texts = _first_usable(sources, members)
        return texts[int(next(uniforms) * len(texts))]

    def captions(self, members: Members) -> list[str]:
        """Return the sample's captions for evaluation.

        They are all captions of the usable source with the most weight, the first of equals.

        Raises:
            Refused: no caption is usable. The most specific reason: "caption is not UTF-8", "unreadable json caption",
                "empty caption", "no caption".
        """
        return _first_usable(self._captions, members)


def _first_usable(sources: list[tuple[str, float]], members: Members) -> list[str]:
    reasons = []
    for source, _ in sources:
        try:
            return captions_at(source, members)
        except Refused as refused:
            reasons.append(str(refused))
    raise Refused(min(reasons, key=_CAPTION_REASONS.index))


def random_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], uniforms: Iterator[float]
) -> tuple[int, int, int, int]:
    """Draw a box (top, left, height, width) as torchvision's RandomResizedCrop does.

    Args:
        scale: range of the box's part of the image's area.
        ratio: range of width / height, whose logarithm is uniform.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * next(uniforms))
        aspect = math.exp(low + (high - low) * next(uniforms))
        box_height = round(math.sqrt(area / aspect))
        box_width = round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(next(uniforms) * (height - box_height + 1))
            left = int(next(uniforms) * (width - box_width + 1))
            return top, left, box_height, box_width
    # As much of the centre as the ratio allows: the case of a third of all photos with a scale of 0.9 to 1.
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def decode_pixels(content: bytes | memoryview, max_pixels: int) -> np.ndarray:
    """Decode an image upright to (H, W, 3) uint8, perhaps a read-only or strided view.

    Takes at most 768 MiB of memory, or 9 bytes for each of more `max_pixels`.

    Raises:
        Refused: "unreadable image", "image too large".
    """
    try:
        if content[:3] == _JPEG_START:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            num_scans = _num_scans(content)
            if height * width > max_pixels or num_scans > _MAX_SCANS:
                raise Refused("image too large")
            if colours not in ("CMYK", "YCCK"):  # libjpeg does not convert those to RGB
                with _LARGE_IMAGE if height * width > _LARGE_PIXELS else contextlib.nullcontext():
                    # Strict by default: damaged entropy bytes raise. libjpeg alone warns, and fills with grey.
                    return _upright(simplejpeg.decode_jpeg(content, "RGB"), _jpeg_orientation(content))
            return _decode_with_pillow(content, max_pixels, _BYTES_PER_CMYK if num_scans > 1 else 0)
        return _decode_with_pillow(content, max_pixels)
    except Refused:
        raise
    except Exception as error:
        raise Refused("unreadable image") from error


def _decode_with_pillow(content: bytes | memoryview, max_pixels: int, least_bytes: int = 0) -> np.ndarray:
    if sum(count for tag, count, _ in _tiff_entries(content) if tag in _TIFF_OFFSETS) > _MAX_TIFF_PARTS:
        raise Refused("image too large")
    with Image.open(io.BytesIO(content), formats=_FORMATS) as file:  # an animation opens at its first frame
        num_pixels = file.width * file.height
        bytes_per_pixel = max(least_bytes, _BYTES_PER_PIXEL.get(str(file.format), 7))
        num_copies = 2 if file.format in ("TIFF", "WEBP") else 1
        num_bytes = num_pixels * bytes_per_pixel + num_copies * len(content)
        if num_pixels > max_pixels or num_bytes > max(9 * max_pixels, _MAX_DECODE_BYTES):
            raise Refused("image too large")
        with _LARGE_IMAGE if num_pixels > _LARGE_PIXELS else contextlib.nullcontext():
            file.load()
            return _upright(_to_rgb(file), _pillow_orientation(file))


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a loaded image in strips: each conversion copies 4 bytes a pixel."""
    width, height = image.size
    is_deep = image.mode.startswith("I")  # Pillow's conversion clips 16-bit grey to white
    pixels = np.empty((height, width, 1 if is_deep else 3), np.uint8)
    num_rows = max(1, _STRIP_PIXELS // max(1, width))
    for top in range(0, height, num_rows):
        strip = image if num_rows >= height else image.crop((0, top, width, min(height, top + num_rows)))
        rows = pixels[top : top + num_rows]
        if is_deep:
            deep = np.asarray(strip).clip(0, 65535).astype(np.uint32)
            grey = ((deep * 255 + 32767) // 65535).astype(np.uint8)
            grey[deep == image.info.get("transparency", -1)] = 255
            rows[:] = grey[:, :, None]
            continue
        if strip.has_transparency_data:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        rows[:] = np.asarray(strip.convert("RGB"))
    return np.broadcast_to(pixels, (height, width, 3))


def _pillow_orientation(file: Image.Image) -> int:
    """Return the orientation by which Pillow's exif_transpose would turn an image.

    A marker stands for the image: the function copies what it turns, and turns nothing if the EXIF cannot be written
    again. Pillow turns a TIFF itself while it loads the TIFF.
    """
    marker = Image.new("L", (1, 1))
    marker.info = {} if file.format == "TIFF" else dict(file.info)
    with contextlib.suppress(Exception):  # unreadable EXIF does not turn the picture
        orientation = marker.getexif().get(_ORIENTATION, 1)
        ImageOps.exif_transpose(marker)
        return int(orientation) if orientation in range(1, 9) else 1
    return 1


def _num_scans(content: bytes | memoryview) -> int:
    """Return the number of a JPEG's scans; each costs as much time as the first.

    A file's bytes are searched only if its header allows several scans: to search a photo takes a tenth of the time to
    decode it.
    """
    num_colours = 0
    for kind, start, _ in _jpeg_segments(content):
        if kind in (0xC0, 0xC1) and start + 6 <= len(content):
            num_colours = content[start + 5]
        elif kind == 0xDA and content[start] == num_colours:
            return 1
    return bytes(content).count(b"\xff\xda")


def _jpeg_segments(content: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Yield kind, start and end of a JPEG's segments, up to its first scan's header."""
    place = 2
    kind = 0
    while kind != 0xDA and place + 4 < len(content) and content[place] == 0xFF:
        kind = content[place + 1]
        end = place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        yield kind, place + 4, end
        place = end


def _jpeg_orientation(content: bytes | memoryview) -> int:
    """Return the EXIF orientation, 1 to 8, of the first segments; 1 if there is none."""
    for kind, start, end in _jpeg_segments(content):
        if not (0xE0 <= kind <= 0xEF or kind == 0xFE):
            break
        if kind == 0xE1 and content[start : start + 6] == b"Exif\0\0":
            values = (value for tag, _, value in _tiff_entries(content[start + 6 : end]) if tag == _ORIENTATION)
            value = next(values, 1)
            return value if 1 <= value <= 8 else 1
    return 1


def _tiff_entries(tiff: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Yield the entries of a TIFF's first directory: tag, count, 16 bits of value."""
    order = {b"II": "<", b"MM": ">"}.get(bytes(tiff[:2]))
    if order is None:
        return
    with contextlib.suppress(struct.error, OverflowError):  # cut short
        is_big = struct.unpack_from(f"{order}H", tiff, 2) == (43,)
        (start,) = struct.unpack_from(f"{order}{'Q' if is_big else 'I'}", tiff, 8 if is_big else 4)
        (num_entries,) = struct.unpack_from(f"{order}{'Q' if is_big else 'H'}", tiff, start)
        start += 8 if is_big else 2
        entry = struct.Struct(f"{order}{'HHQH6x' if is_big else 'HHIH2x'}")
        for number in range(num_entries):
            tag, _, count, value = entry.unpack_from(tiff, start + number * entry.size)
            yield tag, count, value


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return a view of (H, W, 3) pixels, turned and mirrored by an EXIF orientation."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
        orientation -= 4
    down, right = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1)}[orientation]
    return pixels[::down, ::right]


def _cut(pixels: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    return pixels[top : top + height, left : left + width]


def _resize_whole(pixels: np.ndarray, out: np.ndarray, inputs: ImageInputs) -> None:
    """Make a square of a whole image."""
    size = len(out)
    by = inputs.image_interpolation
    if inputs.image_resize == "squash":
        resize(pixels, out, size=(size, size), interpolation=by)
        return
    if inputs.image_resize == "longest":
        scale = size / max(pixels.shape[:2])
        height, width = (max(1, round(length * scale)) for length in pixels.shape[:2])
        resized = np.empty((height, width, 3), np.uint8)
        resize(pixels, resized, size=(height, width), interpolation=by)
        out[:] = inputs.image_fill
        _cut(out, (size - height) // 2, (size - width) // 2, height, width)[:] = resized
        return
    longest = _MAX_ASPECT * min(pixels.shape[:2])
    height, width = (min(length, longest) for length in pixels.shape[:2])
    pixels = _cut(pixels, (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2, height, width)
    scale = size / min(height, width)
    resized_height, resized_width = (max(size, round(length * scale)) for length in (height, width))
    corner = (resized_height - size) // 2, (resized_width - size) // 2
    resize(pixels, out, size=(resized_height, resized_width), corner=corner, interpolation=by)


def captions_at(source: str, members: Members) -> list[str]:
    """Return the non-empty captions that a source of data.captions has for a sample.

    A caption ends after 256 KiB. Of a list in JSON, whatever is not a text is left out.

    Raises:
        Refused: the source has no usable caption.
    """
    ending, _, path = source.partition(":")
    content = members.get(ending)
    if content is None:
        raise Refused("no caption")
    if path and ending == "json":
        texts = _texts_in_json(content, path)
    else:
        text = _decode_text(content, _MAX_TEXT_BYTES)
        texts = text.split("\n") if path == LINES else [text]
    texts = [stripped for text in texts if (stripped := text[:_MAX_TEXT_BYTES].strip())]
    if not texts:
        raise Refused("empty caption")
    return texts


def _decode_text(content: bytes | memoryview, max_bytes: int) -> str:
    """Return a text without the character that the bound cuts in two."""
    try:
        is_whole = len(content) <= max_bytes
        text, _ = codecs.utf_8_decode(content if is_whole else content[:max_bytes], "strict", is_whole)
    except UnicodeDecodeError as error:
        raise Refused("caption is not UTF-8") from error
    return text.removeprefix("\ufeff")


def read_json(content: bytes | memoryview) -> Any:
    """Return the value of a sample's JSON member.

    Python's parser, not `parse_json`: half of a surrogate pair in another field must not refuse the sample.

    Raises:
        Refused: "caption is not UTF-8", "unreadable json caption".
    """
    try:
        if len(content) > _MAX_JSON_BYTES:
            raise ValueError(f"{len(content)} bytes")
        return json.loads(_decode_text(content, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:  # RecursionError: a hundred thousand opening brackets
        raise Refused("unreadable json caption") from error


def _texts_in_json(content: bytes | memoryview, path: str) -> list[str]:
    """Return the text or the texts at a dotted path."""
    value = read_json(content)
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    values = value if isinstance(value, list) else [value]
    # Half of a surrogate pair is JSON, but tokenizers refuse it.
    texts = [text for text in values if isinstance(text, str) and is_utf8(text)]
    if values and not texts:
        raise Refused("no caption" if all(each is None for each in values) else "unreadable json caption")
    return texts
