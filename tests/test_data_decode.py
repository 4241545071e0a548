"""Decoding: formats to known RGB pixels; damaged files to `BadImage`, never to wrong pixels."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features

from fastmim.data import BadImage, decode_image


def picture(height=61, width=83):
    """Smooth colours with some noise, so that compressed files have content everywhere."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 9)], axis=2) * 90 + 128
    return np.clip(waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)


def encode(pixels, format, mode=None, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data):
    """(H, W, 3) array."""
    img = decode_image(data, "x")
    assert img.dtype == torch.uint8
    assert img.shape[0] == 3
    return img.permute(1, 2, 0).numpy()


def png16(values, color_type=0):
    """A 16-bit PNG written by hand: grey (H, W) or, for color_type 2, RGB (H, W, 3)."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "grey": {"mode": "L"},
    "restart markers": {"restart_marker_blocks": 3},
    "4:4:4": {"subsampling": 0},
    "cmyk": {"mode": "CMYK"},
}
LOSSLESS = {
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "ppm": ("PPM", {}),
    "tiff": ("TIFF", {}),
    "tiff-lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "webp": ("WEBP", {"lossless": True}),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_keep_every_pixel(kind):
    if kind == "webp" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    format, options = LOSSLESS[kind]
    assert np.array_equal(decoded(encode(picture(), format, **options)), picture())


def test_jpeg_is_what_pillow_decodes():
    data = encode(picture(), "JPEG", quality=90)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decoded(data).astype(int) - expected).max() <= 1


def test_bytes_memoryview_and_array_decode_alike():
    data = encode(picture(), "JPEG")
    for same in (memoryview(data), np.frombuffer(data, np.uint8)):
        assert np.array_equal(decoded(same), decoded(data))


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_grey_gives_three_equal_channels(format):
    grey = picture()[:, :, 0]
    pixels = decoded(encode(grey, format, **({"quality": 95} if format == "JPEG" else {})))
    assert (pixels == pixels[:, :, :1]).all()
    if format == "PNG":
        assert np.array_equal(pixels[:, :, 0], grey)


def test_palette_and_one_bit_give_their_colours():
    palette = Image.fromarray(picture()).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(decoded(encode(palette, "PNG")), expected)
    assert np.array_equal(decoded(encode(palette, "GIF")), expected)
    bits = Image.fromarray(picture()[:, :, 0] > 128)
    assert np.array_equal(decoded(encode(bits, "PNG"))[:, :, 1], np.asarray(bits) * 255)


def test_transparency_is_laid_on_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(10, 20, 30, 0), (10, 20, 30, 255), (0, 0, 0, 51)]
    assert decoded(encode(rgba, "PNG"))[0].tolist() == [[255] * 3, [10, 20, 30], [204] * 3]
    grey = Image.fromarray(np.array([[[40, 0], [40, 255]]], np.uint8), "LA")
    assert decoded(encode(grey, "PNG"))[0, :, 0].tolist() == [255, 40]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 70, 80, 90])
    data = encode(palette, "PNG", transparency=0)
    assert decoded(data)[0].tolist() == [[255] * 3, [70, 80, 90]]


def test_cmyk_jpeg_is_converted_as_by_pillow():
    data = encode(picture(), "JPEG", mode="CMYK", quality=95)
    assert np.array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(decoded(data).astype(int) - picture()).mean() < 10  # not inverted


def test_sixteen_bit_grey_png_is_scaled_and_not_saturated():
    values = np.array([[0, 128, 129, 256, 257, 32768, 65278, 65407, 65535]], np.uint16)
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)  # 0 0 1 1 1 128 254 255 255
    pixels = decoded(png16(values))
    assert np.array_equal(pixels, np.repeat(expected[:, :, None], 3, axis=2))
    assert np.array_equal(decoded(encode(values, "TIFF"))[:, :, 0], expected)


def test_sixteen_bit_colour_png_is_within_a_level():
    values = np.random.default_rng(0).integers(0, 65536, (7, 9, 3), dtype=np.uint16)
    difference = values / 257 - decoded(png16(values, color_type=2))
    assert np.abs(difference).max() <= 1


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decoded(data)[0, 0].tolist() == [255, 0, 0]


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture(40, 60), "JPEG", exif=exif)
    assert decoded(data).shape == (40, 60, 3)


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_cut_anywhere_is_bad(kind):
    data = encode(picture(), "JPEG", **JPEGS[kind])
    decoded(data)
    for length in random.Random(0).sample(range(len(data)), 100):
        with pytest.raises(BadImage):
            decode_image(data[:length], "x")


def test_jpeg_cut_and_closed_with_an_end_marker_is_bad():
    for kind in ("baseline", "cmyk"):
        data = encode(picture(), "JPEG", **JPEGS[kind])
        with pytest.raises(BadImage, match="premature end"):
            decode_image(data[: len(data) * 2 // 3] + b"\xff\xd9", "x")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", [*LOSSLESS, "gif"])
def test_other_formats_cut_anywhere_are_bad_or_complete(kind):
    format, options = LOSSLESS.get(kind, ("GIF", {}))
    data = encode(picture(), format, **options)
    whole = decoded(data)
    for length in random.Random(0).sample(range(len(data)), 100):
        try:
            pixels = decoded(data[:length])
        except BadImage:
            continue
        assert np.array_equal(pixels, whole), f"{length} of {len(data)} bytes"  # a missing trailer


@pytest.mark.filterwarnings("ignore:::PIL")  # Pillow's remarks on broken TIFFs and sizes
@pytest.mark.parametrize("kind", [*LOSSLESS, "jpeg", "gif"])
def test_damaged_bytes_raise_nothing_but_bad_image(kind):
    format, options = LOSSLESS.get(kind, (kind.upper(), {}))
    data = encode(picture(), format, **options)
    rng = random.Random(1)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 4, 40])):
            damaged[rng.randrange(rng.choice([64, len(data)]))] = rng.randrange(256)
        try:
            decode_image(bytes(damaged), "x", max_pixels=1_000_000)
        except BadImage as error:
            assert error.reason  # noqa: PT017 - that nothing else is raised is the point


@pytest.mark.parametrize("error", [MemoryError, AttributeError])
def test_what_is_not_the_pictures_fault_is_raised(error, monkeypatch):
    def load(self):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(error):
        decode_image(encode(picture(), "PPM"), "x")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty, 0 bytes"),
        (b"<!DOCTYPE html><html>404", "not a readable image file, begins with b'<!DOCTYPE html>"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a readable image file"),
        (b"\xff\xd8", "not a readable image file"),
        (b"\0" * 500, "not a readable image file"),
    ],
)
def test_what_is_no_image_is_named(data, reason):
    with pytest.raises(BadImage) as caught:
        decode_image(data, "folder/a.jpg")
    assert caught.value.name == "folder/a.jpg"
    assert caught.value.reason.startswith(reason)


def test_decompression_bomb_is_refused_by_its_header():
    def bomb(side):  # a 1-bit PNG whose header promises side x side pixels
        image = bytearray(encode(Image.new("1", (1, 1)), "PNG"))
        image[16:24] = struct.pack(">II", side, side)
        image[29:33] = struct.pack(">I", zlib.crc32(bytes(image[12:29])))
        return bytes(image)

    too_many = pytest.raises(BadImage, match=r"9500x9500 = 90250000 pixels.*max_pixels=89000000")
    with too_many, pytest.warns(Image.DecompressionBombWarning):
        decode_image(bomb(9500), "x")
    with pytest.raises(BadImage, match="too many pixels"):
        decode_image(bomb(60000), "x")
    jpeg = encode(np.zeros((100, 100, 3), np.uint8), "JPEG")
    with pytest.raises(BadImage, match="100x100 = 10000 pixels, more than max_pixels=9999"):
        decode_image(jpeg, "x", max_pixels=9999)
    assert decode_image(jpeg, "x", max_pixels=10000).shape == (3, 100, 100)


def test_pixels_without_a_known_range_are_bad():
    for mode in ("F", "I"):
        image = Image.fromarray(np.full((4, 4), 1e6, np.float32)).convert(mode)
        with pytest.raises(BadImage, match=r"range|outside 16 bits"):
            decode_image(encode(image, "TIFF"), "x")
