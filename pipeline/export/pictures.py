"""The pictures that an export is verified with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.data.decoding import ENDINGS, decode_image
from pipeline.errors import ConfigError
from pipeline.export.source import Source
from pipeline.models.mobilevlm.images import clip_processor, pad_to_square, pixels_of

FEWEST = 20


class Pictures:
    """The images of a folder, in order of their names, as squares: runtimes resize other shapes each in its way.

    Raises `ConfigError` for fewer than `fewest`: a few pictures that agree prove little.
    """

    def __init__(self, folder: Path, source: Source, *, fewest: int = FEWEST) -> None:
        self.files = picture_files(folder, fewest=fewest)
        self.clip = clip_processor(source.folder, source.config.tower.image_size)
        self.pads = source.config.image_aspect_ratio == "pad"

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield each picture as a square, uint8 'Y X C', and as the tower's input, float32 'C Y X'."""
        for file in self.files:
            square = self.square(decode_image(file.read_bytes()))
            yield np.asarray(square), pixels_of(square, self.clip, pads=False)

    def square(self, image: Image.Image) -> Image.Image:
        """Return an image padded to a square, or its middle if the model was trained on that."""
        if self.pads:
            return pad_to_square(image, _colour(self.clip))
        side, (width, height) = min(image.size), image.size
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))


def picture_files(folder: Path, *, fewest: int = FEWEST) -> list[Path]:
    """Return the images of a folder in order of their names. Raises `ConfigError` for fewer than `fewest`."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower().lstrip(".") in ENDINGS and f.is_file())
    if len(files) < fewest:
        raise ConfigError(f"{folder}: {len(files)} images, at least {fewest} are needed; name a folder of more")
    return files


def background(source: Source) -> tuple[int, ...]:
    """Return the colour with which pictures are padded, red, green and blue of 255: CLIP's mean."""
    return _colour(clip_processor(source.folder, source.config.tower.image_size))


def _colour(clip: Any) -> tuple[int, ...]:
    return tuple(int(mean * 255) for mean in clip.image_mean)
