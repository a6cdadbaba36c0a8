"""Decoding against slow twins (Pillow, torchvision), the faults of real files, and what a seed decides."""

import io
import itertools
import json
import math
import mmap
import struct
import warnings
from collections import Counter

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from sigray.workers.config import DataConfig
from sigray.workers.data.decode import Decoder, Refused, captions_at, decode_pixels, random_box, sample_random
from tests.helpers.hostile import jpeg_with_scans, png, tiff_with_strips

MAX_PIXELS = 10**6
SIZES = [
    (301, 203, 64),
    (37, 53, 24),
    (203, 301, 224),
    (20, 31, 48),
    (64, 64, 64),
    (33, 64, 64),
    (7, 1, 16),
    (9, 640, 8),
]


def config(**fields) -> DataConfig:
    return DataConfig(shards="unused.tar", max_image_pixels=MAX_PIXELS, **fields)


def photo(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Something like a photo: smooth colours, hard edges, some noise; every part differs."""
    noise = np.random.default_rng(height * 1000 + width)
    smooth = Image.fromarray(noise.integers(0, 256, (4, 5, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    ImageDraw.Draw(smooth).polygon([(0, 0), (width / 2, height / 3), (width / 5, height)], fill=(250, 10, 60))
    pixels = np.asarray(smooth).astype(int) + noise.integers(-9, 10, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded_by_pillow(content: bytes) -> np.ndarray:
    return np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))


def decode(content, size=16, random=None, **fields) -> np.ndarray:
    out = np.full((3, size, size, 3), 77, np.uint8)
    Decoder(config(**fields), size).decode_image({"jpg": content}, out[1], random)
    assert (out[::2] == 77).all()  # its own row of the batch and nothing beside it
    return out[1]


def refusal(content, **fields) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Refused) as refused:
            decode(content, **fields)
    return str(refused.value)


# ---------------------------------------------------------------------------------------------- resize and crop


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_random_crop_is_torchvisions(kind, height, width, size):
    content = encoded(photo(height, width), kind)
    pixels = decoded_by_pillow(content)
    for index in range(5):
        random = sample_random(0, 0, 0, index)
        top, left, box_height, box_width = random_box(height, width, (0.3, 1.0), (0.7, 1.5), random.uniforms("crop"))
        actual = decode(content, size, random, crop_scale=(0.3, 1.0), crop_ratio=(0.7, 1.5))
        expected = tv.resized_crop(
            torch.from_numpy(pixels).permute(2, 0, 1),
            *(top, left, box_height, box_width),
            size=[size, size],
            interpolation=InterpolationMode.BICUBIC,
            antialias=True,
        )
        np.testing.assert_array_equal(actual, expected.permute(1, 2, 0).numpy())
        # Pillow weighs with more bits: torch's weights have 8 to 15, by the largest of them.
        box = Image.fromarray(pixels[top : top + box_height, left : left + box_width])
        difference = np.abs(actual - np.asarray(box.resize((size, size), Image.Resampling.BICUBIC), dtype=int))
        assert difference.max() <= 6
        assert difference.mean() <= 0.1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("height", "width", "size"), SIZES[:-1])
def test_centre_is_the_middle_of_the_whole_image_resized(kind, height, width, size):
    content = encoded(photo(height, width), kind)
    tensor = torch.from_numpy(decoded_by_pillow(content)).permute(2, 0, 1).unsqueeze(0)
    scale = size / min(height, width)
    shape = [max(size, round(height * scale)), max(size, round(width * scale))]
    resized = torch.nn.functional.interpolate(tensor, shape, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    expected = resized[top : top + size, left : left + size].numpy()
    np.testing.assert_array_equal(decode(content, size), expected)  # evaluation, also where training crops at random
    np.testing.assert_array_equal(decode(content, size, sample_random(0, 0, 0, 0), crop="center"), expected)


@pytest.mark.parametrize("shape", [(1, 200_000), (200_000, 1), (2, 90_000)])
def test_thread_of_an_image_needs_no_memory_to_be_centred(shape):
    content = encoded(Image.new("RGB", shape[::-1], (10, 20, 30)), "PNG")
    assert (decode(content, 224) == (10, 20, 30)).all()


def test_slot_that_is_not_contiguous_is_our_own_fault():
    with pytest.raises(AssertionError):
        Decoder(config(), 8).decode_image(
            {"png": encoded(photo(9, 9), "PNG")}, np.empty((8, 16, 3), np.uint8)[:, ::2], None
        )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_views_of_a_mapped_file_are_read_in_place(kind, tmp_path):
    content = encoded(photo(40, 50), kind, exif=exif(6))
    (tmp_path / "file").write_bytes(b"before" + content + b"after")
    with (
        (tmp_path / "file").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as whole,
        whole[6 : 6 + len(content)] as view,
    ):
        np.testing.assert_array_equal(decode(view), decode(content))


boxes = st.tuples(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 10**6))
scales = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: (min(pair), max(pair)))
ratios = st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(lambda pair: (min(pair), max(pair)))


@given(boxes, scales, ratios)
def test_random_box_is_inside_and_as_asked(image, scale, ratio):
    height, width, index = image
    top, left, box_height, box_width = random_box(
        height, width, scale, ratio, sample_random(1, 2, 3, index).uniforms("crop")
    )
    assert 0 <= top <= top + box_height <= height
    assert 0 <= left <= left + box_width <= width
    assert box_height > 0
    assert box_width > 0

    drawn = (
        (box_height - 0.5) * (box_width - 0.5) <= scale[1] * height * width * (1 + 1e-9)
        and (box_height + 0.5) * (box_width + 0.5) >= scale[0] * height * width * (1 - 1e-9)
        and (box_width - 0.5) / (box_height + 0.5) <= ratio[1] * (1 + 1e-9)
        and (box_width + 0.5) / (box_height - 0.5) >= ratio[0] * (1 - 1e-9)
    )
    assert drawn or (top, left, box_height, box_width) == fall_back(height, width, ratio)


def fall_back(height, width, ratio):
    """The end of torchvision's RandomResizedCrop.get_params, and one pixel where that leaves none."""
    if width / height < ratio[0]:
        box_width, box_height = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        box_height, box_width = height, round(height * ratio[1])
    else:
        box_height, box_width = height, width
    box_height, box_width = max(1, box_height), max(1, box_width)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (480, 480), (100, 500)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.2, 1.0)])
def test_random_boxes_are_distributed_as_torchvisions(height, width, scale):
    """Means over 2,000 boxes: 0.02 of the image is five standard errors of the widest of these figures."""
    torch.manual_seed(0)
    ratio, image = (3 / 4, 4 / 3), torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(2000)])
    ours = np.array(
        [random_box(height, width, scale, ratio, sample_random(0, 0, 0, i).uniforms("crop")) for i in range(2000)]
    )
    for figure in (
        lambda box: box / (height, width, height, width),
        lambda box: (box / (height, width, height, width)) ** 2,
        lambda box: (box == fall_back(height, width, ratio)).all(axis=1, keepdims=True),
    ):
        assert np.abs(figure(ours).mean(axis=0) - figure(theirs).mean(axis=0)).max() < 0.04


# ---------------------------------------------------------------------------------------------- what a seed decides


def test_random_numbers_never_change():
    """A resumed run must crop as it did before: these values are a file format."""
    random = sample_random(7, 1, 2, 3)
    assert list(itertools.islice(random.uniforms("crop"), 3)) == [
        0.593421330404506,
        0.5396992119198614,
        0.2543998060135858,
    ]
    assert next(itertools.islice(random.uniforms("caption"), 20, None)) == 0.056136315923141056
    assert random_box(480, 640, (0.5, 1.0), (3 / 4, 4 / 3), random.uniforms("crop")) == (14, 26, 413, 392)


def test_every_place_and_purpose_has_its_own_numbers():
    places = [(5, 0, 0, 0), (0, 5, 0, 0), (0, 0, 5, 0), (0, 0, 0, 5), (-1, 0, 0, 0), (2**62, 0, 0, 0)]
    firsts = {next(sample_random(*place).uniforms(purpose)) for place in places for purpose in ("crop", "caption")}
    assert len(firsts) == 12
    numbers = np.array(list(itertools.islice(sample_random(0, 0, 0, 0).uniforms("crop"), 20_000)))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert np.abs(np.histogram(numbers, 10)[0] - 2000).max() < 200  # 4.7 standard errors
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.03


def test_drawing_captions_does_not_shift_the_crop():
    content = encoded(photo(90, 70), "PNG")
    before = decode(content, random=sample_random(3, 0, 0, 9))
    random = sample_random(3, 0, 0, 9)
    for _ in range(3):
        Decoder(config(captions={"txt": 1, "alt": 2}), 16).choose_caption({"txt": b"a", "alt": b"b"}, random)
    np.testing.assert_array_equal(decode(content, random=random), before)
    assert (decode(content, random=sample_random(3, 1, 0, 9)) != before).any()


# ---------------------------------------------------------------------------------------------- kinds of files


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_pixels_are_pillows(mode, options):
    content = encoded(photo(45, 61, mode), "JPEG", **options)
    np.testing.assert_array_equal(decode_pixels(content, MAX_PIXELS), decoded_by_pillow(content))


def test_cmyk_jpeg_keeps_its_colours():
    """Pillow writes it as Adobe does, inverted and with an Adobe marker; a second one carries YCCK in the marker."""
    image = photo(40, 56)
    content = encoded(image.convert("CMYK"), "JPEG", quality=95)
    assert simplejpeg.decode_jpeg_header(content)[2] == "CMYK"
    np.testing.assert_array_equal(decode_pixels(content, MAX_PIXELS), decoded_by_pillow(content))
    assert np.abs(decode_pixels(content, MAX_PIXELS).astype(int) - np.asarray(image)).mean() < 4
    place = content.index(b"Adobe") + 11
    ycck = content[:place] + b"\x02" + content[place + 1 :]
    assert simplejpeg.decode_jpeg_header(ycck)[2] == "YCCK"
    np.testing.assert_array_equal(decode_pixels(ycck, MAX_PIXELS), decoded_by_pillow(ycck))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_strips_are_the_whole_image(monkeypatch, mode, orientation):
    """A large image is converted in strips, to bound the memory of the copies."""
    image = photo(37, 53).convert("L" if mode == "I;16" else mode)
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 201) if mode == "I;16" else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, "PNG", exif=exif, **({"transparency": 3} if mode in ("P", "L", "I;16") else {}))
    whole = decode_pixels(content, MAX_PIXELS)
    monkeypatch.setattr("sigray.workers.data.decode._STRIP_PIXELS", 200)
    np.testing.assert_array_equal(decode_pixels(content, MAX_PIXELS), whole)
    assert whole.shape == ((53, 37, 3) if orientation == 6 else (37, 53, 3))


def test_bounds_on_scans_and_strips():
    """A progressive photo has ten scans, and each further one costs a pass over the image."""
    assert refusal(jpeg_with_scans(80)) == "unreadable image"  # decoded: the last scan may not come again
    assert refusal(jpeg_with_scans(100)) == "image too large"
    assert refusal(tiff_with_strips(1 << 19)) == "image too large"


@pytest.mark.parametrize(
    ("kind", "mode", "bytes_per_pixel", "num_copies"),
    [("WEBP", "RGB", 16, 2), ("TIFF", "RGB", 8, 2), ("JPEG", "CMYK", 12, 1)],
)
def test_memory_is_bounded_too(monkeypatch, kind, mode, bytes_per_pixel, num_copies):
    """What the decoder and the conversions allocate, not pixels alone; the bound is low here."""
    content = encoded(photo(200, 100, mode), kind, **({"progressive": True} if kind == "JPEG" else {}))
    needed = 20_000 * bytes_per_pixel + num_copies * len(content)
    monkeypatch.setattr("sigray.workers.data.decode._MAX_DECODE_BYTES", needed - 1)
    with pytest.raises(Refused, match="image too large"):
        decode_pixels(content, 20_000)
    monkeypatch.setattr("sigray.workers.data.decode._MAX_DECODE_BYTES", needed)
    assert decode_pixels(content, 20_000).shape == (200, 100, 3)


def test_16_bit_grey_is_scaled_not_clipped():
    deep = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    content = encoded(Image.fromarray(deep), "PNG")
    expected = np.round(deep / 257).astype(np.uint8)
    np.testing.assert_array_equal(decode(content), np.repeat(expected[:, :, None], 3, axis=2))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    holed = decode(png(16, 16, 16, 0, rows, (b"tRNS", deep[5, 5].astype(">u2").tobytes())))
    expected[5, 5] = 255
    np.testing.assert_array_equal(holed, np.repeat(expected[:, :, None], 3, axis=2))


def test_16_bit_colour_is_scaled():
    deep = np.linspace(0, 65535, 16 * 16 * 3, dtype=np.uint16).reshape(16, 16, 3)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    assert np.abs(decode(png(16, 16, 16, 2, rows)) - deep / 257).max() <= 1


def test_palettes_and_one_bit():
    image = photo(16, 16)
    palette = image.quantize(16)
    np.testing.assert_array_equal(decode(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(decode(encoded(palette, "GIF")), np.asarray(palette.convert("RGB")))
    line = image.convert("1")
    np.testing.assert_array_equal(decode(encoded(line, "PNG"))[:, :, 1], np.asarray(line) * 255)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_parts_come_out_white(kind):
    """Half of the width black, a quarter half transparent black, a quarter transparent red."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, :8, 3], pixels[:, 8:12, 3], pixels[:, 12:] = 255, 128, (255, 0, 0, 0)
    expected = np.repeat([0, 127, 255], [8, 4, 4])
    for mode in ("RGBA", "LA") if kind == "PNG" else ("RGBA",):
        content = encoded(Image.fromarray(pixels).convert(mode), kind, lossless=True)
        np.testing.assert_array_equal(decode(content), np.broadcast_to(expected[:, None], (16, 16, 3)))


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])], ids=["one colour", "alpha of each colour"])
def test_transparent_colour_of_a_palette_comes_out_white(transparency):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(1, (8, 0, 16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode(encoded(image, "PNG", transparency=transparency))
    assert (pixels[:, :8] == (10, 20, 30)).all()
    assert (pixels[:, 8:] == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_animation_shows_its_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert np.abs(decode(content).astype(int) - (255, 0, 0)).max() < 8


def exif(orientation: int, order: str = "<") -> bytes:
    """An EXIF block with the orientation after two other entries."""
    entries = [(0x010F, 2, 4, b"abc\0"), (0x0110, 2, 4, b"abc\0")]
    packed = b"".join(struct.pack(f"{order}HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    packed += struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 3)
    return b"Exif\0\0" + start + packed + bytes(4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_as_exif_says(kind, orientation):
    image = photo(30, 44)
    options = [{"exif": exif(orientation)}, {"exif": exif(orientation, ">")}]
    if kind == "TIFF":
        options = [{"tiffinfo": {0x0112: orientation}}]
    if kind == "JPEG":  # a comment and a profile ahead of it, as some cameras write
        options.append({**options[0], "comment": b"hello", "icc_profile": bytes(3000)})
        cmyk = encoded(image.convert("CMYK"), "JPEG", **options[0])
        np.testing.assert_array_equal(decode_pixels(cmyk, MAX_PIXELS), decoded_by_pillow(cmyk))
    for option in options:
        content = encoded(image, kind, **option)
        pixels = decode_pixels(content, MAX_PIXELS)
        assert pixels.shape == ((44, 30, 3) if orientation > 4 else (30, 44, 3))
        np.testing.assert_array_equal(pixels, decoded_by_pillow(content))
        random = sample_random(0, 0, 0, orientation)
        upright = encoded(Image.fromarray(pixels), "PNG")
        np.testing.assert_array_equal(decode(content, random=random), decode(upright, random=random))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_not_cost_the_picture(kind):
    image = photo(30, 44)
    whole = exif(6)
    for block in (
        exif(9),
        exif(0),
        whole[:20],
        whole[:12],
        b"Exif\0\0",
        b"Exif\0\0??" + whole[8:],
        whole[:10] + b"\xff" * 40,
    ):
        content = encoded(image, kind, exif=block, lossless=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of the damage
            assert decode_pixels(content, MAX_PIXELS).shape == (30, 44, 3)


# ---------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_image_is_refused(kind):
    content = encoded(photo(120, 90), kind)
    for part in (0, 1, 3, 10, 30, len(content) // 3, len(content) // 2, len(content) * 9 // 10, len(content) - 40):
        assert refusal(content[:part]) == "unreadable image"


def test_jpeg_with_damaged_entropy_bytes_is_refused():
    """libjpeg only warns and continues. No decoder detects damage that is valid code.

    Of real photos with 12 random bytes 70 % are refused, with 512 random bytes 99.5 %, with 512 zeros 90 %.
    """
    content = encoded(photo(240, 320), "JPEG", quality=90)
    scan = content.index(b"\xff\xda") + 20
    random = np.random.default_rng(0)
    num_warned = 0
    for _ in range(60):
        place = int(random.integers(scan, len(content) - 600))
        broken = content[:place] + random.bytes(512) + content[place + 512 :]
        try:
            simplejpeg.decode_jpeg(broken, strict=True)
        except ValueError:
            simplejpeg.decode_jpeg(broken, strict=False)  # what others train on
            num_warned += 1
            assert refusal(broken) == "unreadable image"
    assert num_warned >= 57


@pytest.mark.parametrize("content", [b"", b"\0", b"text", b"\xff\xd8\xff broken", b"\x89PNG\r\n\x1a\n", b"<svg/>"])
def test_what_is_no_image_is_refused(content):
    assert refusal(content) == "unreadable image"
    assert refusal(memoryview(content)) == "unreadable image"


def test_postscript_is_not_run():
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(content)).format == "EPS"  # whose loading starts Ghostscript
    assert refusal(content) == "unreadable image"


def test_size_is_checked_before_decoding():
    """Headers that claim much and hold nothing: to decode them would fail, and to allocate them take 30 GB."""
    assert refusal(png(100_000, 100_000, 8, 2, b"")) == "image too large"
    small = encoded(photo(16, 16), "JPEG")
    place = small.index(b"\xff\xc0") + 5
    assert refusal(small[:place] + struct.pack(">HH", 65_000, 65_000) + small[place + 4 :]) == "image too large"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_largest_size_is_the_last_that_passes(kind):
    content = encoded(photo(30, 40), kind)
    out = np.empty((8, 8, 3), np.uint8)
    Decoder(DataConfig(shards="a.tar", max_image_pixels=1200), 8).decode_image({"png": content}, out, None)
    with pytest.raises(Refused, match="image too large"):
        Decoder(DataConfig(shards="a.tar", max_image_pixels=1199), 8).decode_image({"png": content}, out, None)


def test_first_image_key_that_is_there_is_used():
    red, blue = (encoded(Image.new("RGB", (8, 8), colour), "PNG") for colour in ("red", "blue"))
    decoder, out = Decoder(config(image_keys=["webp", "png", "jpg"]), 8), np.empty((8, 8, 3), np.uint8)
    decoder.decode_image({"jpg": red, "txt": b"x", "png": blue}, out, None)
    assert (out == (0, 0, 255)).all()
    with pytest.raises(Refused, match="no image"):
        decoder.decode_image({"gif": red}, out, None)


# ---------------------------------------------------------------------------------------------- captions


def choose(members, captions, random=None) -> str:
    """As training draws with `random`; without it, the first caption of evaluation."""
    members = {ending: value if isinstance(value, bytes) else value.encode() for ending, value in members.items()}
    decoder = Decoder(config(captions=captions), 8)
    views = {ending: memoryview(value) for ending, value in members.items()}
    if random is None:
        found = decoder.captions(members)
        assert decoder.captions(views) == found
        return found[0]
    chosen = decoder.choose_caption(members, random)
    assert decoder.choose_caption(views, random) == chosen
    return chosen


def drawn(members, captions, times=2000) -> Counter[str]:
    return Counter(choose(members, captions, sample_random(0, 0, 0, index)) for index in range(times))


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=4), st.integers(1, 15), st.integers(0, 10**6))
def test_captions_are_drawn_by_weight_among_those_that_are_there(weights, present, first):
    captions = {f"c{number}": weight for number, weight in enumerate(weights)}
    members = {ending: ending.encode() for number, ending in enumerate(captions) if present >> number & 1}
    decoder = Decoder(config(captions=captions), 8)
    if not members:
        with pytest.raises(Refused, match="no caption"):
            decoder.choose_caption(members, sample_random(0, 0, 0, first))
        return
    times = 400
    counts = Counter(decoder.choose_caption(members, sample_random(0, 0, 0, first + i)) for i in range(times))
    assert counts.keys() <= members.keys()
    total = sum(captions[ending] for ending in members)
    for ending in members:
        part = captions[ending] / total
        # 6 standard errors: one in 10^9 of some hundreds of tries.
        assert abs(counts[ending] - times * part) <= 6 * math.sqrt(times * part * (1 - part)) + 1


def test_evaluation_takes_the_heaviest_usable_and_the_first_of_equals():
    captions = {"a": 1, "b": 2, "c": 2, "json:x": 3}
    members = {"a": "A", "b": " B\n", "c": "C", "json": '{"x": ["X", "Y"]}'}
    assert choose(members, captions) == "X"
    assert choose({**members, "json": "{}"}, captions) == "B"
    assert choose({**members, "json": "{", "b": b"\xff"}, captions) == "C"
    assert choose({"a": "A"}, captions) == "A"


def test_unusable_sources_leave_the_others_weights():
    captions = {"txt": 2, "alt": 1, "syn": 5, "json:x": 9, "json:y": 9, "old": 9}
    members = {"txt": "text", "alt": "alternative", "syn": b"\xff", "json": '{"x": null}', "old": " "}
    counts = drawn(members, captions)
    assert counts.keys() == {"text", "alternative"}
    assert abs(counts["text"] / 2000 - 2 / 3) < 0.05


def test_captions_in_json():
    content = json.dumps({"captions": {"en": "a cat", "de": ["", "eine Katze", " Kater "]}, "n": 3})
    assert choose({"json": content}, {"json:captions.en": 1}) == "a cat"
    assert choose({"json": content}, {"json:captions.de": 1}) == "eine Katze"
    counts = drawn({"json": content}, {"json:captions.de": 1, "json:captions.en": 1})
    assert all(
        abs(counts[text] / 2000 - part) < 0.05
        for text, part in [("a cat", 1 / 2), ("eine Katze", 1 / 4), ("Kater", 1 / 4)]
    )


def test_byte_order_mark_is_no_part_of_a_caption():
    assert choose({"txt": b"\xef\xbb\xbfa cat\r\n"}, {"txt": 1}) == "a cat"
    assert choose({"json": b'\xef\xbb\xbf{"x": "a cat"}'}, {"json:x": 1}) == "a cat"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "no caption"),
        ({"json": '{"y": "other"}'}, "no caption"),
        ({"json": '{"x": null}'}, "no caption"),
        ({"json": '["x"]'}, "no caption"),
        ({"txt": ""}, "empty caption"),
        ({"txt": " \n\t", "json": "{}"}, "empty caption"),
        ({"json": '{"x": []}'}, "empty caption"),
        ({"json": '{"x": ["", " "]}'}, "empty caption"),
        ({"json": ""}, "unreadable json caption"),
        ({"json": '{"x": 7}'}, "unreadable json caption"),
        ({"json": '{"x": {"en": "a"}}'}, "unreadable json caption"),
        ({"json": '{"x": [7, {"en": "a"}, ["b"]]}'}, "unreadable json caption"),
        ({"json": '{"x": ["half a pair \\ud83d", null]}'}, "unreadable json caption"),
        ({"json": '{"x": [null, null]}'}, "no caption"),
        ({"json": '{"x": [null, " "]}'}, "empty caption"),
        ({"json": '{"x": "' + "y" * (17 << 20) + '"}'}, "unreadable json caption"),
        ({"txt": " \n" * (1 << 20)}, "empty caption"),
        ({"txt": b"caf\xe9" + b"e" * (1 << 20)}, "caption is not UTF-8"),
        ({"json": '{"x": "half a pair \\ud83d"}'}, "unreadable json caption"),
        ({"json": "[" * 200_000, "txt": " "}, "unreadable json caption"),
        ({"json": '{"x": ' + "7" * 9000 + "}"}, "unreadable json caption"),
        ({"json": b'{"x": "\xff"}'}, "caption is not UTF-8"),
        ({"txt": b"caf\xe9", "json": "{"}, "caption is not UTF-8"),
    ],
)
@pytest.mark.parametrize("random", [None, sample_random(0, 0, 0, 0)])
def test_reasons_for_no_caption(members, reason, random):
    with pytest.raises(Refused) as refused:
        choose(members, {"txt": 1, "json:x": 2}, random)
    assert str(refused.value) == reason


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["a cat", "\u5e0c", "half a pair \ud83d", "", " \n"]),
            st.none(),
            st.integers(),
            st.just({"en": "a"}),
            st.just(["b"]),
        ),
        max_size=6,
    )
)
def test_captions_of_a_list_are_its_texts(values):
    content = json.dumps({"captions": {"en": values}}).encode()
    expected = [text for text in values if text in ("a cat", "\u5e0c")]
    try:
        assert captions_at("json:captions.en", {"json": content}) == expected
    except Refused:
        assert not expected


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a cat\na dog\n", ["a cat", "a dog"]),
        ("a cat\r\n\r\n  a dog", ["a cat", "a dog"]),
        ("a\u2028cat\x0b or a dog", ["a\u2028cat\x0b or a dog"]),
    ],
)
def test_each_line_of_a_text_is_a_caption_where_asked(text, lines):
    members = {"txt": text.encode()}
    assert captions_at("txt:lines", members) == lines
    assert captions_at("txt", members) == [text.strip()]
    with pytest.raises(Refused, match="empty caption"):
        captions_at("txt:lines", {"txt": b"\n \n"})
    with pytest.raises(Refused, match="no caption"):
        captions_at("txt:lines", {"cap": b"a cat"})


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\u5e0c", "\U0001f600"])
@pytest.mark.parametrize("start", ["", "1", "12", "123"])
def test_a_long_text_ends_at_a_character(letter, start):
    """The bytes after the bound are not decoded, wherever the bound falls in a character."""
    content = f"{start}{letter * (1 << 18)}".encode() + b"\xff"
    (text,) = captions_at("txt", {"txt": content})
    assert text == content[: 1 << 18].decode(errors="ignore")
    assert (1 << 18) - 4 < len(text.encode()) <= 1 << 18


def test_half_a_pair_in_another_field_does_not_matter():
    assert choose({"json": '{"alt": "\\ud83d", "x": "a cat"}'}, {"json:x": 1}) == "a cat"
