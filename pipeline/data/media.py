"""The check that a sample names no media without a placeholder in its text: they would be dropped silently."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from pipeline.errors import BadSample

# Matches a key's letters in lower case: `images`, `Video`, `audio_path`, `imageUrls`; not `image_id`, `video_name`.
KEY = re.compile(
    r"(?P<image>images?|imgs?|pics?|pictures?|photos?|frames)(?P<place>(file)?(paths?|files?|urls?|names?))?"
    r"|(videos?|audios?|pointclouds?)((file)?(paths?|files?|urls?))?"
)


def check_media(record: Mapping[str, Any], form: str, *, num_images: int, known: str = "image") -> None:
    """Raise `BadSample` for a key of the record, or of one of its turns, that names media beyond its images.

    The key `known` holds the images. In a sample with images, keys such as `image_path` may repeat where they are.
    """
    turns = record.get(form)
    for place in (record, *(turns if isinstance(turns, list) else [])):
        for key, value in place.items() if isinstance(place, dict) else ():
            if place is record and key in (known, form):
                continue
            kind = KEY.fullmatch(re.sub(r"[^a-z]", "", str(key).lower()))
            named = _number_named(value)
            if kind is None or named == 0:
                continue
            if kind["image"] and num_images and (kind["place"] or named == num_images):
                continue
            remedy = "only images can be read; remove the key if the text stands alone"
            if kind["image"]:
                remedy = "name images in `image`, each with its <image> in the text, or remove the key"
            raise BadSample("media without a placeholder", f"{key}: {reprlib.repr(value)}; {remedy}")


def _number_named(value: Any) -> int:
    """Return how many files a value names; None, "", [None], {} and numbers name none."""
    entries = value if isinstance(value, list) else [value]
    return sum(entry is True or (isinstance(entry, str | list | dict) and bool(entry)) for entry in entries)
