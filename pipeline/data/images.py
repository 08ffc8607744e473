"""Image bytes to the vision tower's pixels: decoding, padding to a square, CLIP's preprocessing."""

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
from pipeline.models.mobilevlm.images import clip_processor, pixels_of

MAX_GROWTH = 4  # times `max_pixels`: the limit of an image after padding or resizing

# Settings of the processor that change pixels, part of the fingerprint.
DIGESTED = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_convert_rgb"),
)
AspectRatio = Literal["pad", "square"]


@dataclasses.dataclass(frozen=True)
class ImagePreprocessor:
    """Turns the bytes of an image file into the CLIP tower's input, float32 'C Y X'."""

    clip: Any
    aspect_ratio: AspectRatio
    max_pixels: int

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        aspect_ratio: AspectRatio,
        image_size: int | None = None,
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> ImagePreprocessor:
        """Use a local checkpoint's preprocessor_config.json, or OpenAI CLIP's constants where it has none.

        The published MobileVLM V2 checkpoints have none. They use that of openai/clip-vit-large-patch14-336, which
        the default of `image_size`, 336, gives.
        """
        if aspect_ratio not in ("pad", "square"):
            raise ConfigError(f"aspect_ratio: unknown value {aspect_ratio!r}; known are pad, square.")
        clip = clip_processor(Path(path), image_size)
        return cls(clip, aspect_ratio, max_pixels)

    def __call__(self, data: bytes) -> torch.Tensor:
        """Return float32 'C Y X'; raises `BadSample` as `decode_image` does, and for an image that is too narrow."""
        self._check_growth(*read_header(data, max_pixels=self.max_pixels).size)
        return pixels_of(
            decode_image(data, max_pixels=self.max_pixels), self.clip, pads=self.aspect_ratio == "pad"
        )

    def picture(self, data: bytes) -> Image.Image:
        """Return the tower's input as a picture: the normalisation is undone."""
        mean, std = (np.array(values) for values in (self.clip.image_mean, self.clip.image_std))
        colours = self(data).permute(1, 2, 0).numpy() * std + mean
        return Image.fromarray((colours.clip(0, 1) * 255).round().astype(np.uint8))

    def digest(self, *, decoding: Mapping[str, str] = DECODING_RULES) -> str:
        """Return the blake3 of everything that changes the pixels: the rules of decoding, and the settings."""
        settings = {name: _plain(getattr(self.clip, name, None)) for name in DIGESTED}
        everything = {"aspect_ratio": self.aspect_ratio, "decoding": dict(decoding), **settings}
        return blake3(json.dumps(everything, sort_keys=True).encode()).hexdigest()

    def _check_growth(self, width: int, height: int) -> None:
        # A 1 x 60,000,000 image is small as a file and in pixels, but its square is huge.
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


def _plain(value: Any) -> Any:
    """Return a value in JSON's types: transformers' releases differ in tuples, size classes and enums."""
    if not isinstance(value, dict | list | tuple | int | float | str | None):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return int(value) if isinstance(value, Image.Resampling) else value
