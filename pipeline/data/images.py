"""Image bytes to CLIP's pixels: decoding, pad-to-square, CLIP preprocessing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from blake3 import blake3
from PIL import Image

from pipeline.data.decoding import DECODING_RULES, MAX_IMAGE_PIXELS, decode_image, read_header
from pipeline.errors import BadSample, ConfigError

# Padding and resizing make an image of their own; it may have this many times `max_pixels`.
MAX_GROWTH = 4
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_IMAGE_SIZE = 336

AspectRatio = Literal["pad", "square"]


class ImagePreprocessor:
    """Turns an image file's bytes into what the CLIP tower reads: float32 'C Y X'."""

    def __init__(self, clip: Any, *, aspect_ratio: AspectRatio, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
        if aspect_ratio not in ("pad", "square"):
            raise ConfigError(f"aspect_ratio: unknown value {aspect_ratio!r}; known are pad, square.")
        self.clip = clip
        self.aspect_ratio = aspect_ratio
        self.max_pixels = max_pixels

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        aspect_ratio: AspectRatio,
        image_size: int | None = None,
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> ImagePreprocessor:
        """With the local checkpoint's preprocessor_config.json, else with OpenAI CLIP's constants.

        The published MobileVLM V2 checkpoints have no such file; they use that of
        openai/clip-vit-large-patch14-336, which is what `image_size` 336, the default, gives.
        """
        file = Path(path) / "preprocessor_config.json"
        settings = _read_settings(file)
        if settings is None:
            settings = _clip_settings(image_size or CLIP_IMAGE_SIZE)
        clip = _processor_class()(**settings)
        found = clip.crop_size["height"]
        if image_size is not None and found != image_size:
            raise ConfigError(
                f"{file}: crop_size is {found}, but the vision tower reads {image_size}; "
                "correct the file, or remove it to use CLIP's constants."
            )
        return cls(clip, aspect_ratio=aspect_ratio, max_pixels=max_pixels)

    def __call__(self, data: bytes) -> torch.Tensor:
        """float32 'C Y X'; raises `BadSample` as `decode_image` does."""
        self._check_growth(*read_header(data, max_pixels=self.max_pixels).size)
        image = decode_image(data, max_pixels=self.max_pixels)
        if self.aspect_ratio == "pad":
            image = pad_to_square(image, tuple(int(mean * 255) for mean in self.clip.image_mean))
        pixels = self.clip(image, return_tensors="np")["pixel_values"][0]
        return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))

    def digest(self, *, decoding: Mapping[str, str] = DECODING_RULES) -> str:
        """blake3 of everything that changes the pixels: how files are decoded, and each setting."""
        names = (
            "do_resize",
            "size",
            "resample",
            "do_center_crop",
            "crop_size",
            "do_rescale",
            "rescale_factor",
        )
        names += ("do_normalize", "image_mean", "image_std", "do_convert_rgb")
        settings = {name: _plain(getattr(self.clip, name, None)) for name in names}
        everything = {"aspect_ratio": self.aspect_ratio, "decoding": dict(decoding), **settings}
        text = json.dumps(everything, sort_keys=True)
        return blake3(text.encode()).hexdigest()

    def _check_growth(self, width: int, height: int) -> None:
        # A 1 x 60,000,000 image is small as a file and in pixels, but its square is not.
        longest, shortest = max(width, height), min(width, height)
        if self.aspect_ratio == "pad":
            needed = longest * longest
        else:
            needed = self.clip.crop_size["height"] ** 2 * longest // shortest
        limit = MAX_GROWTH * self.max_pixels
        if needed > limit:
            raise BadSample(
                "image too narrow", f"{width} x {height} grows to {needed} pixels; the limit is {limit}"
            )


def pad_to_square(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of its longer side (LLaVA's `expand2square`)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _read_settings(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); copy it again or remove it.") from error
    kind = (
        settings.get("image_processor_type", "CLIPImageProcessor") if isinstance(settings, dict) else "a list"
    )
    if not str(kind).startswith("CLIPImageProcessor"):
        raise ConfigError(
            f"{file} describes {kind}, but the vision tower is CLIP's; use the tower's own file."
        )
    labels = ("image_processor_type", "feature_extractor_type", "processor_class")
    return {name: value for name, value in settings.items() if name not in labels}


def _clip_settings(image_size: int) -> dict[str, Any]:
    return {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
    }


def _processor_class() -> type:
    # The Pillow processor needs no torchvision and equals the original's; older releases have one class only.
    try:
        from transformers import CLIPImageProcessorPil
    except ImportError:
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor
    return CLIPImageProcessorPil


def _plain(value: Any) -> Any:
    """The value as JSON has it: tuples, size classes and enums differ between transformers releases."""
    if not isinstance(value, dict | list | tuple | int | float | str | None):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return int(value) if isinstance(value, Image.Resampling) else value
