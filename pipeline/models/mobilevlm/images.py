"""A picture to the input of MobileVLM V2's CLIP tower: padded to a square, then as CLIP's own processor does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from pipeline.errors import ConfigError

CLIP_IMAGE_SIZE = 336


def clip_processor(folder: Path, image_size: int | None = None) -> Any:
    """Return a checkpoint's image processor, or OpenAI CLIP's of the tower's size where the folder has none.

    Raises `ConfigError` for a file that describes another processor or another size.
    """
    file = folder / "preprocessor_config.json"
    if file.is_file():
        clip = CLIPImageProcessorPil(**_read_settings(file))
    else:  # transformers' defaults are OpenAI CLIP's, but for the size
        side = image_size or CLIP_IMAGE_SIZE
        clip = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    found = clip.crop_size["height"]
    if image_size is not None and found != image_size:
        raise ConfigError(
            f"{file}: crop_size is {found}, but the vision tower reads {image_size}; "
            "correct the file, or remove it to use CLIP's constants."
        )
    return clip


def pixels_of(image: Image.Image, clip: Any, *, pads: bool) -> torch.Tensor:
    """Return the tower's input of an RGB image, float32 'C Y X'; with `pads` nothing of the image is cut off."""
    if pads:
        image = pad_to_square(image, tuple(int(mean * 255) for mean in clip.image_mean))
    pixels = clip(image, return_tensors="np")["pixel_values"][0]
    return torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32))


def pad_to_square(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """Return the image in the middle of a square of its longer side (LLaVA's `expand2square`)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); copy it again or remove it.") from error
    kind = "a list"
    if isinstance(settings, dict):
        kind = str(settings.get("image_processor_type", "CLIPImageProcessor"))
    if not kind.startswith("CLIPImageProcessor"):
        raise ConfigError(
            f"{file} describes {kind}, but the vision tower is CLIP's; use the tower's own file."
        )
    labels = ("image_processor_type", "feature_extractor_type", "processor_class")
    return {name: value for name, value in settings.items() if name not in labels}
