"""Decoding: no pixel is clipped or left lying on its side unsaid, and what is refused says why."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from pipeline.data.decoding import DECODING_RULES, TURNS, check_image, decode_image, read_header
from pipeline.data.images import ImagePreprocessor
from pipeline.data.png_text import MAX_TEXT, without_large_text
from pipeline.errors import BadSample

RAMP = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
COLOURS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def tiff(pixels: bytes, *, bits: int, sample_format: int = 1, order: str = "<", **tags: int) -> bytes:
    """An 8 x 8 grey TIFF of any sample type, which Pillow would not write."""
    numbers = {"white_is_black": 262, "max_sample": 281, "s_max_sample": 341}
    entries = {256: 8, 257: 8, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: 8, 279: len(pixels)}
    entries |= {339: sample_format} | {numbers[name]: value for name, value in tags.items()}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    rows = [struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(entries.items())]
    start = b"II*\0" if order == "<" else b"MM\0*"
    return (
        start
        + struct.pack(order + "IH", 8, len(rows))
        + b"".join(rows)
        + struct.pack(order + "I", 0)
        + pixels
    )


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def grey(data: bytes) -> np.ndarray:
    """The red channel, after making sure that all are equal."""
    pixels = np.asarray(decode_image(data))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


TO_BYTE = {most: (RAMP // (65536 // (most + 1)) * 255.0 / most).round() for most in (65535, 4095)}
TWELVE = (RAMP >> 4).astype("<u2")
PACKED_12 = b"".join(
    bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in TWELVE.reshape(-1, 2).tolist()
)


@pytest.mark.parametrize(
    ("data", "most"),
    [
        (encoded(RAMP, "PNG"), 65535),
        (encoded(RAMP, "TIFF"), 65535),
        (encoded(RAMP, "TIFF", compression="tiff_lzw"), 65535),
        (tiff(RAMP.astype(">u2").tobytes(), bits=16, order=">"), 65535),
        (tiff(PACKED_12, bits=12), 4095),
        (tiff(TWELVE.tobytes(), bits=16, max_sample=4095), 4095),
        (tiff(TWELVE.tobytes(), bits=16, s_max_sample=4095), 4095),
    ],
    ids=["png", "tiff", "compressed", "big-endian", "12 bits", "declared", "declared by sample"],
)
def test_grey_of_up_to_16_bits_is_scaled_by_its_range(data, most):
    assert (grey(data) == TO_BYTE[most]).all()
    assert check_image(data) in ("PNG", "TIFF")


def test_a_maximum_that_is_no_number_of_bits_is_that_of_one_image_and_scales_nothing():
    dim = (RAMP // 100).astype("<u2")
    assert (grey(tiff(dim.tobytes(), bits=16, max_sample=655)) == (dim / 257).round()).all()


def test_16_bits_a_colour_are_cut_to_8_which_loses_no_range():
    pixels = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.abs(np.asarray(decode_image(data)) - pixels / 257).max() <= 1


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (encoded(RAMP.astype(np.int32), "TIFF"), "32-bit, mode I; convert it to 8 bits, or to unsigned"),
        (encoded(RAMP.astype(np.float32), "TIFF"), "32-bit, mode F; convert it"),
        (tiff(RAMP.astype("<i2").tobytes(), bits=16, sample_format=2), "16-bit, mode I; convert it"),
        (tiff(bytes(64), bits=8, sample_format=2), "signed or floating-point, mode L; convert it"),
        (tiff(RAMP.tobytes(), bits=16, white_is_black=0), "16-bit grey whose white is 0; convert it"),
        (tiff(RAMP.tobytes(), bits=16, max_sample=4095), "65535 found, 4095 declared; convert it"),
    ],
    ids=["int32", "float32", "int16", "int8", "white is 0", "beyond what is declared"],
)
def test_samples_of_unknown_range_are_refused_with_what_to_do(data, detail):
    for read in (check_image, decode_image):
        with pytest.raises(BadSample, match=f"samples of unknown range: {detail}"):
            read(data)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP", "GIF", "BMP"])
def test_images_of_8_bits_decode_as_convert_does(kind, mode):
    file = io.BytesIO()
    try:
        Image.fromarray(COLOURS).convert(mode).save(file, kind)
    except (OSError, ValueError):
        pytest.skip(f"Pillow writes no {kind} of mode {mode}")
    expected = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
    assert decode_image(file.getvalue()).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    plain = Image.open(io.BytesIO(encoded(COLOURS, kind))).convert("RGB")
    turned = plain.transpose(TURNS[orientation]) if orientation > 1 else plain
    data = encoded(COLOURS, kind, exif=exif)
    assert decode_image(data).size == turned.size
    assert decode_image(data).tobytes() == turned.tobytes()
    assert check_image(data) == kind


@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM", b"Exif\0\0nothing at all"])
def test_a_broken_exif_block_turns_nothing_and_costs_no_image(exif):
    assert decode_image(encoded(COLOURS, "PNG", exif=exif)).tobytes() == COLOURS.tobytes()


def with_text(add: str, text: str, **options) -> bytes:
    info = PngInfo()
    getattr(info, add)("comment", text, **options)
    return encoded(COLOURS, "PNG", pnginfo=info)


LONG = "x" * (2 * MAX_TEXT)


@pytest.mark.parametrize(
    "data",
    [
        with_text("add_text", LONG),
        with_text("add_text", LONG, zip=True),
        with_text("add_itxt", LONG),
        with_text("add_itxt", LONG, zip=True),
        encoded(COLOURS, "PNG", icc_profile=LONG.encode()),
    ],
    ids=["text", "compressed", "international", "international, compressed", "profile"],
)
def test_a_large_text_or_profile_of_a_png_costs_no_image(data):
    assert check_image(data) == "PNG"
    assert decode_image(data).tobytes() == COLOURS.tobytes()


def test_very_many_texts_are_left_out_and_small_ones_kept_until_then():
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * (MAX_TEXT - 1)))
    data = encoded(COLOURS, "PNG")
    head, rest = data[:33], data[33:]  # the header chunk ends there
    assert decode_image(head + text * 200 + rest).tobytes() == COLOURS.tobytes()
    assert len(without_large_text(head + text * 200 + rest)) == len(data) + 17 * len(text)
    assert without_large_text(head + text + rest) == head + text + rest
    after = rest[:-12] + chunk(b"zTXt", b"k\0\0" + zlib.compress(LONG.encode())) + rest[-12:]
    assert decode_image(head + after).tobytes() == COLOURS.tobytes()


def test_a_damaged_or_unusual_header_is_refused_with_the_decoders_reason():
    bad_crc = bytearray(encoded(COLOURS, "PNG"))
    bad_crc[20] ^= 1
    for data, reason in (
        (bytes(bad_crc), "PNG, SyntaxError: broken PNG file"),
        (tiff(bytes(128), bits=16, sample_format=3), "TIFF, SyntaxError: unknown pixel mode"),
        (b"GIF89a", "GIF, "),
        (b"\xff\xd8\xff", "JPEG, "),
    ):
        with pytest.raises(BadSample, match=f"image that cannot be opened: {reason}"):
            read_header(data)


def test_a_photograph_with_a_second_one_behind_it_is_its_first_as_jpeg():
    file = io.BytesIO()
    images = [Image.fromarray(COLOURS), Image.fromarray(COLOURS[::-1])]
    images[0].save(file, "MPO", save_all=True, append_images=images[1:])
    assert Image.open(io.BytesIO(file.getvalue())).format == "MPO"
    assert check_image(file.getvalue()) == "JPEG"
    first = Image.open(io.BytesIO(encoded(COLOURS, "JPEG")))
    assert decode_image(file.getvalue()).tobytes() == first.tobytes()


@given(
    st.sampled_from(["PNG", "TIFF", "16-bit TIFF"]), st.binary(min_size=1, max_size=12), st.integers(0, 260)
)
def test_damaged_headers_and_tags_decode_or_are_refused_but_raise_nothing_else(kind, noise, place):
    sound = {
        "PNG": with_text("add_itxt", "x" * 50, zip=True),
        "TIFF": encoded(COLOURS, "TIFF"),
        "16-bit TIFF": tiff(TWELVE.tobytes(), bits=16, max_sample=4095),
    }
    data = bytearray(sound[kind])
    data[place : place + len(noise)] = noise
    for read in (check_image, decode_image):
        try:
            read(bytes(data), max_pixels=10_000)
        except BadSample as error:
            assert error.reason


def test_the_decoding_rules_are_part_of_the_fingerprint():
    preprocess = ImagePreprocessor.from_pretrained("none", aspect_ratio="pad")
    assert preprocess.digest() == preprocess.digest(decoding=DECODING_RULES)
    assert preprocess.digest() != preprocess.digest(decoding=DECODING_RULES | {"orientation": "ignored"})
