"""Image bytes to 8-bit RGB: bounded in size, turned as EXIF says, and refused with the decoder's reason."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image

from pipeline.data.png_text import without_large_text
from pipeline.errors import BadSample

ImageSize = tuple[int, int]  # width and height in pixels, turned as EXIF says

MAX_IMAGE_PIXELS = 64_000_000
# File name endings that `pack` writes, and their formats in Pillow; no other format is tried.
FORMATS = {
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "tiff": "TIFF",
}
# Endings of images in shards made elsewhere: two more names of JPEG, which `pack` writes as jpg.
ENDINGS = {*FORMATS, "jfif", "mpo"}
KNOWN = sorted(set(FORMATS.values()))

# What changes pixels before resizing. It is part of the fingerprint: change it only together with the code below.
DECODING_RULES = {
    "orientation": "as EXIF says",
    "16-bit grey": "scaled by its range",
    "other modes of more than 8 bits": "refused",
    "alpha": "dropped",
    "frames": "first",
}

BYTE_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
CONVERT = "convert it to 8 bits, or to unsigned 16-bit grey that fills its range"
# TIFF tags, by their numbers in the TIFF 6.0 specification.
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE, SAMPLE_FORMAT, S_MAX_SAMPLE_VALUE = 258, 262, 281, 339, 341
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED_ASIDE = (5, 6, 7, 8)  # width becomes height


def decode_image(data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Return the image in RGB by `DECODING_RULES`: for 8-bit images, `convert("RGB")`, turned as EXIF says.

    Raises `BadSample` for bytes that are no image, are truncated, or have samples of an unknown range, and for more
    than `max_pixels`, which the header decides before any pixel is decoded.
    """
    image = read_header(data, max_pixels=max_pixels)
    with _refusing_damage():
        image.load()
        turn = TURNS.get(_orientation(image))
        rgb = (_byte_grey(image) if _has_16_bits(image) else image).convert("RGB")
        return rgb if turn is None else rgb.transpose(turn)


def check_image(data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS) -> str:
    """Decode an image to its last byte and return Pillow's name of its format; raises as `decode_image` does."""
    image = read_header(data, max_pixels=max_pixels)
    with _refusing_damage():
        # A JPEG is decoded at an eighth of its size: all data are read, but few pixels are computed.
        image.draft("RGB", (1, 1))
        image.load()
        if _has_16_bits(image):
            _byte_grey(image)
    # An MPO is a JPEG followed by more JPEGs; only the first is read.
    return "JPEG" if image.format == "MPO" else str(image.format)


def read_header(data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Open an image and read only its header; raises `BadSample` as `decode_image` does."""
    data = without_large_text(data)
    try:
        with warnings.catch_warnings(action="ignore"):  # of large images: `max_pixels` decides instead
            image = Image.open(io.BytesIO(data), formats=KNOWN)
    except MemoryError:
        raise  # not the image's fault
    except Image.DecompressionBombError as error:
        raise BadSample("too many pixels", f"{error}; the limit is {max_pixels}") from error
    except Exception as error:  # a damaged header can raise anything in Pillow's parsers
        raise _unopened(data) from error
    width, height = image.size
    if width * height > max_pixels:
        raise BadSample("too many pixels", f"{width} x {height}; the limit is {max_pixels}")
    with _refusing_damage():
        _check_samples(image)
    return image


def image_size(data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS) -> ImageSize:
    """Return the size that `decode_image` will give, from the header alone; raises `BadSample` as that does."""
    image = read_header(data, max_pixels=max_pixels)
    width, height = image.size
    return (height, width) if _orientation(image) in TURNED_ASIDE else (width, height)


def _unopened(data: bytes) -> BadSample:
    """Return why an image cannot be opened; `Image.open` hides most of its plugins' reasons."""
    for name in KNOWN:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(data[:16]) is not True:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                factory(io.BytesIO(data), "")
        except MemoryError:
            raise
        except Exception as error:
            return BadSample("image that cannot be opened", f"{name}, {type(error).__name__}: {error}")
    return BadSample("not an image", f"{len(data)} bytes that Pillow reads as none of {', '.join(KNOWN)}")


@contextmanager
def _refusing_damage() -> Iterator[None]:
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except (MemoryError, BadSample):
        raise  # too little memory is not the image's fault
    except Exception as error:  # damaged data can raise anything in Pillow's decoders
        raise BadSample("truncated or damaged image", f"{type(error).__name__}: {error}") from error


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return found if isinstance(found, int) else 1
    except MemoryError:
        raise
    except Exception:  # the pixels of an image with a broken EXIF block are sound
        return 1


# Samples of more than 8 bits, which Pillow would clip


def _has_16_bits(image: Image.Image) -> bool:
    """Return whether samples are unsigned, of up to 16 bits; Pillow's releases differ in the mode of such a PNG."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _check_samples(image: Image.Image) -> None:
    """Raise `BadSample` where the samples' type does not say which values are black and white."""
    tags = getattr(image, "tag_v2", {})
    if image.mode not in BYTE_MODES and not _has_16_bits(image):
        bits = _first(tags.get(BITS_PER_SAMPLE)) or 32
        raise BadSample("samples of unknown range", f"{bits}-bit, mode {image.mode}; {CONVERT}")
    if (_first(tags.get(SAMPLE_FORMAT)) or 1) not in (1, 4):
        raise BadSample("samples of unknown range", f"signed or floating-point, mode {image.mode}; {CONVERT}")
    if _has_16_bits(image) and tags.get(PHOTOMETRIC) == 0:
        raise BadSample("samples of unknown range", f"16-bit grey whose white is 0; {CONVERT}")


def _byte_grey(image: Image.Image) -> Image.Image:
    """Return 16-bit grey as mode L; its range, 65535 or the one that a TIFF declares, is scaled to 255."""
    samples = np.asarray(image).astype(np.uint32)
    most = _white(image)
    if samples.max() > most:
        raise BadSample("samples of unknown range", f"{samples.max()} found, {most} declared; {CONVERT}")
    return Image.fromarray(((samples * 255 + most // 2) // most).astype(np.uint8))


def _white(image: Image.Image) -> int:
    """Return the largest possible sample: a declared maximum counts if it is a number of bits, such as 4095.

    Any other declared maximum is a statistic of this image, and images scaled by it could not be compared.
    """
    tags = getattr(image, "tag_v2", {})
    most = 2 ** int(_first(tags.get(BITS_PER_SAMPLE)) or 16) - 1
    for tag in (S_MAX_SAMPLE_VALUE, MAX_SAMPLE_VALUE):
        declared = _first(tags.get(tag))
        if declared is not None and int(declared) in (511, 1023, 2047, 4095, 8191, 16383, 32767):
            return min(most, int(declared))
    return most


def _first(value: object) -> float | None:
    """Return the first number of a TIFF tag."""
    if isinstance(value, tuple):
        value = value[0] if value else None
    return value if isinstance(value, int | float) else None
