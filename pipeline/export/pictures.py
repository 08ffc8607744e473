"""The pictures that an export is verified with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.data.decoding import ENDINGS, decode_image
from pipeline.errors import ConfigError
from pipeline.export.source import Source
from pipeline.models.mobilevlm.images import clip_processor, pad_to_square, pixels_of

FEWEST = 20
MOST = 50  # more would show nothing new, and each runs in two programs


class Pictures:
    """The images of a folder, in order of their names, as squares: runtimes resize other shapes each in its way.

    Raises `ConfigError` for fewer than `fewest`: a few pictures that agree prove little.
    """

    def __init__(self, folder: Path, source: Source, *, fewest: int = FEWEST) -> None:
        self.files = picture_files(folder, fewest=fewest)
        self.clip = clip_processor(source.folder, source.config.tower.image_size)
        self.padding = padding_of(source)

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield each picture as a square, uint8 'Y X C', and as the tower's input, float32 'C Y X'."""
        for file in self.files:
            square = square_of(decode_image(file.read_bytes()), self.padding)
            yield np.asarray(square), pixels_of(square, self.clip, pads=False)


def padding_of(source: Source) -> tuple[int, ...] | None:
    """Return the colour with which a model's pictures are padded; None if it was trained on their middles."""
    return background(source) if source.config.image_aspect_ratio == "pad" else None


def square_of(image: Image.Image, padding: tuple[int, ...] | None) -> Image.Image:
    """Return an image padded to a square with a colour, or without one its middle; see `padding_of`."""
    if padding is not None:
        return pad_to_square(image, padding)
    side, (width, height) = min(image.size), image.size
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def picture_files(folder: Path, *, fewest: int = FEWEST) -> list[Path]:
    """Return images of a folder in order of their names, 50 evenly spread if it has more.

    Raises `ConfigError` for fewer than `fewest`.
    """
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower().lstrip(".") in ENDINGS and f.is_file())
    if len(files) < fewest:
        raise ConfigError(
            f"{folder}: {len(files)} images, at least {fewest} are needed; name a folder of more"
        )
    number = min(len(files), MOST)
    return [files[n * len(files) // number] for n in range(number)]


def background(source: Source) -> tuple[int, ...]:
    """Return the colour with which pictures are padded, red, green and blue of 255: CLIP's mean."""
    clip = clip_processor(source.folder, source.config.tower.image_size)
    return tuple(int(mean * 255) for mean in clip.image_mean)
