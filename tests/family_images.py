"""Images of any size for the tests of model families."""

from __future__ import annotations

import io

import small_experiment
from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return coarse noise as an image, another for each seed."""
    return Image.open(io.BytesIO(small_experiment.picture(seed, (width, height)))).convert("RGB")
