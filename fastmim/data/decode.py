"""File bytes -> uint8 RGB tensor, or ``BadImage`` with the reason. Nothing is repaired.

JPEG goes through simplejpeg in strict mode: libjpeg-turbo's warnings (premature end, bad Huffman
code, stray bytes) are errors, so a cut file is found at every length; most single bit flips decode
without any warning and cannot be found. All other formats, and the JPEGs that need colour
management (CMYK, YCCK), go through Pillow. The EXIF orientation is ignored, as in the published
training pipelines.
"""

import importlib.util
import io
import struct

import numpy as np
import torch
from torch import Tensor

MAX_PIXELS = 89_000_000  # just under Pillow's own warning at 89,478,485

# By content, not by extension. The list keeps rarely used parsers (EPS, PSD, FITS ...) away from
# foreign files.
_PILLOW_FORMATS = ("PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG")

# No MemoryError: it tells of the machine and not of the picture.
_PILLOW_ERRORS = (
    *(OSError, ValueError, SyntaxError),  # nearly always; SyntaxError is a broken PNG
    *(EOFError, LookupError, TypeError, OverflowError, struct.error),  # of the parsers underneath
    Warning,  # under `python -W error`
)


class BadImage(Exception):
    """A picture that cannot be used. The loader skips, counts and replaces it.

    Args:
        name: The picture's name in its source.
        reason: One line, for a person.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def require_decoders() -> None:
    """Check that simplejpeg and Pillow are installed, before any work.

    Raises:
        ImportError: Names the missing package and the command that installs it.
    """
    for module, package in (("simplejpeg", "simplejpeg"), ("PIL", "pillow")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(
                f"fastmim.data: reading image files needs {package}: pip install {package}"
            )


def decode_image(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode one picture to RGB; the format is told by its content.

    Grey and palette pictures become RGB; transparency is laid on white; CMYK is converted by
    Pillow. 16-bit grey is scaled by 1/257 with rounding (65535 -> 255); of 16-bit colour Pillow
    gives the high byte, at most one level lower. Of an animation the first frame is taken.

    Args:
        data: The whole file: any object with a contiguous byte buffer.
        name: For the error.
        max_pixels: Largest width * height, compared with the header before decoding.

    Returns:
        (3, H, W), uint8, in 0..255; strides of a channel-last array.

    Raises:
        BadImage: Empty, cut, damaged, unknown format, more than ``max_pixels`` pixels, or pixels
            with no known range.
    """
    head = bytes(data[:16])
    if not head:
        raise BadImage(name, "empty, 0 bytes")
    if head.startswith(b"\xff\xd8"):
        pixels = _decode_jpeg(data, name, max_pixels)
    else:
        pixels = _decode_pillow(data, name, max_pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_jpeg(data: bytes, name: str, max_pixels: int) -> np.ndarray:
    """(H, W, 3) uint8."""
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # broken, or of a chroma sampling TurboJPEG has no name for: Pillow tells
        return _decode_pillow(data, name, max_pixels)
    _check_pixels(name, height, width, max_pixels)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as error:
        raise BadImage(name, f"damaged or cut JPEG: {error}") from None
    if colorspace in ("CMYK", "YCCK"):  # decoded above for the strict check, which Pillow lacks
        return _decode_pillow(data, name, max_pixels)
    return pixels


def _decode_pillow(data: bytes, name: str, max_pixels: int) -> np.ndarray:
    """(H, W, 3) uint8."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            _check_pixels(name, image.height, image.width, max_pixels)
            image.load()
            return _to_rgb(image, name)
    except UnidentifiedImageError:
        head = bytes(data[:16])
        raise BadImage(name, f"not a readable image file, begins with {head!r}") from None
    except Image.DecompressionBombError as error:
        raise BadImage(name, f"too many pixels: {error}") from None
    except _PILLOW_ERRORS as error:
        raise BadImage(name, f"damaged or cut file: {type(error).__name__}: {error}") from None


def _check_pixels(name: str, height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadImage(
            name, f"{width}x{height} = {height * width} pixels, more than max_pixels={max_pixels}"
        )


def _to_rgb(image, name: str) -> np.ndarray:
    """A loaded PIL image -> (H, W, 3) uint8."""
    from PIL import Image

    mode = image.mode
    if mode.startswith("I"):  # "I;16", "I;16B" and, for 16-bit PPM and old Pillows, the 32-bit "I"
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise BadImage(name, f"mode {mode}: values {grey.min()}..{grey.max()} outside 16 bits")
        grey = ((grey + 128) // 257).astype(np.uint8)  # round(v / 257); `convert` would saturate
        return np.repeat(grey[:, :, None], 3, axis=2)
    if mode == "F":
        raise BadImage(name, "floating-point pixels have no known range: save as 8 or 16 bits")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))
