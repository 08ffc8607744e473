"""Pixels equal the original's; decoding is bounded and says what is wrong."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from pipeline.data.decoding import check_image, decode_image
from pipeline.data.images import ImagePreprocessor
from pipeline.errors import BadSample, ConfigError
from pipeline.models.mobilevlm.images import pad_to_square

FIXTURE = Path(__file__).parent / "fixtures" / "mobilevlm_v2_tiny"


def encode(width: int, height: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, kind)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("source", [FIXTURE, "a/checkpoint/without/the/file"])
def test_padded_pixels_are_the_originals(source):
    preprocess = ImagePreprocessor.from_pretrained(source, aspect_ratio="pad", image_size=336)
    expected = load_file(FIXTURE / "expected.safetensors")["pixel_values"]
    for number, pixels in enumerate(expected):
        found = preprocess((FIXTURE / f"image_{number}.png").read_bytes())
        assert found.dtype == torch.float32
        assert (found - pixels).abs().max() <= 1e-5


@given(st.integers(1, 40), st.integers(1, 40))
def test_padding_puts_the_image_in_the_middle(width, height):
    image = Image.new("RGB", (width, height), (255, 0, 0))
    padded = pad_to_square(image, (1, 2, 3))
    side = max(width, height)
    assert padded.size == (side, side)
    left, top = (side - width) // 2, (side - height) // 2
    assert padded.crop((left, top, left + width, top + height)).tobytes() == image.tobytes()
    red = np.asarray(padded)[..., 0]
    assert (red == 255).sum() == width * height and (red == 1).sum() == side * side - width * height


def test_the_image_size_of_a_small_tower_is_honoured():
    for aspect_ratio in ("pad", "square"):
        preprocess = ImagePreprocessor.from_pretrained("none", aspect_ratio=aspect_ratio, image_size=64)
        assert preprocess(encode(30, 20)).shape == (3, 64, 64)


def test_square_crops_the_middle_and_pad_keeps_the_border():
    image = Image.new("RGB", (128, 64))
    image.paste((255, 255, 255), (0, 0, 16, 64))  # a white left border, outside the middle square
    file = io.BytesIO()
    image.save(file, "PNG")
    pad = ImagePreprocessor.from_pretrained("none", aspect_ratio="pad", image_size=64)(file.getvalue())
    square = ImagePreprocessor.from_pretrained("none", aspect_ratio="square", image_size=64)(file.getvalue())
    assert pad.max() > 1.5 and square.max() < 0


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_image(encode(8, 6, kind, mode)).mode == "RGB"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_known_formats_are_read_and_truncated_ones_refused(kind):
    data = encode(64, 48, kind)
    assert check_image(data) == kind
    assert decode_image(data).size == (64, 48)
    for read in (check_image, decode_image):
        with pytest.raises(
            BadSample, match=r"truncated or damaged image|image that cannot be opened|not an image"
        ):
            read(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"hello", b"%PDF-1.4 nothing", b"\x89PNG\r"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(
        BadSample, match=f"not an image: {len(data)} bytes that Pillow reads as none of BMP, GIF"
    ):
        decode_image(data)


def test_formats_outside_the_list_are_never_tried():
    with pytest.raises(BadSample, match="not an image"):
        decode_image(encode(8, 8, "PPM"))


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(side):
    with pytest.raises(BadSample, match=r"too many pixels: .*the limit is 64000000"):
        decode_image(png_header(side, side))


def test_the_pixel_limit_is_a_setting():
    assert decode_image(encode(10, 10), max_pixels=100).size == (10, 10)
    with pytest.raises(BadSample, match="too many pixels: 10 x 10; the limit is 99"):
        decode_image(encode(10, 10), max_pixels=99)


@pytest.mark.parametrize("aspect_ratio", ["pad", "square"])
def test_an_image_that_would_grow_without_bound_is_refused(aspect_ratio):
    preprocess = ImagePreprocessor.from_pretrained("none", aspect_ratio=aspect_ratio)
    with pytest.raises(
        BadSample, match=r"image too narrow: 1 x 60000000 grows to .* pixels; the limit is 256000000"
    ):
        preprocess(png_header(1, 60_000_000))


@given(st.binary(max_size=200), st.integers(0, 300))
def test_damaged_bytes_decode_or_are_refused_but_raise_nothing_else(noise, place):
    data = bytearray(encode(12, 9, "JPEG"))
    data[place : place + len(noise)] = noise
    try:
        assert decode_image(bytes(data), max_pixels=10_000).mode == "RGB"
    except BadSample as error:
        assert error.reason


def test_digests_are_equal_for_equal_settings_only(tmp_path):
    def digest(path, **options):
        return ImagePreprocessor.from_pretrained(path, **options).digest()

    original = digest(FIXTURE, aspect_ratio="pad")
    assert original == digest("none", aspect_ratio="pad")
    assert original == digest(FIXTURE, aspect_ratio="pad", max_pixels=5)
    written = json.loads((FIXTURE / "preprocessor_config.json").read_text())
    written["image_mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    others = {
        digest(FIXTURE, aspect_ratio="square"),
        digest("none", aspect_ratio="pad", image_size=64),
        digest(tmp_path, aspect_ratio="pad"),
    }
    assert len(others | {original}) == 4


def test_an_old_config_with_plain_numbers_is_read(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {"size": 64, "crop_size": 64, "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3}
        )
    )
    preprocess = ImagePreprocessor.from_pretrained(tmp_path, aspect_ratio="pad", image_size=64)
    assert (
        preprocess.digest()
        == ImagePreprocessor.from_pretrained("none", aspect_ratio="pad", image_size=64).digest()
    )


def test_wrong_settings_are_named(tmp_path):
    with pytest.raises(ConfigError, match="aspect_ratio: unknown value 'anyres'; known are pad, square"):
        ImagePreprocessor.from_pretrained(FIXTURE, aspect_ratio="anyres")  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ConfigError, match="crop_size is 336, but the vision tower reads 64; correct the file"
    ):
        ImagePreprocessor.from_pretrained(FIXTURE, aspect_ratio="pad", image_size=64)
    file = tmp_path / "preprocessor_config.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"preprocessor_config.json is not valid JSON"):
        ImagePreprocessor.from_pretrained(tmp_path, aspect_ratio="pad")
    file.write_text('{"image_processor_type": "SiglipImageProcessor"}')
    with pytest.raises(ConfigError, match="describes SiglipImageProcessor, but the vision tower is CLIP's"):
        ImagePreprocessor.from_pretrained(tmp_path, aspect_ratio="pad")
