"""The check that a sample names no media without a placeholder in its text: they would be dropped silently."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from pipeline.errors import BadSample

# Matches a key's letters in lower case: `images`, `Video`, `audio_path`, `imageUrls`; not `image_id`, `video_name`.
KEY = re.compile(
    r"(?P<image>(decoded|input)?images?|screenshots?|imgs?|pics?|pictures?|photos?|frames)(?P<place>(file)?(paths?|files?|urls?|names?)|bytes|base64|b64)?"
    r"|(videos?|audios?|pointclouds?)((file)?(paths?|files?|urls?))?"
)


NO_MEDIA = ("id", "__key__", "__url__")
# What an image looks like in the value of a key that says nothing.
FILE = re.compile(r"data:image/.*|[^\n]*\.(jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE)


def check_media(
    record: Mapping[str, Any], keys: Collection[str], *, num_images: int, known: str = "image"
) -> None:
    """Raise `BadSample` for a key of the record, or of one of its turns, that names media beyond its images.

    The turns are in `keys`, the images in `known`. In a sample with images, keys such as `image_path` may repeat
    where they are. A sample without images must name no file of an image at all.
    """
    turns = [turn for key in keys if isinstance(record.get(key), list) for turn in record[key]]
    for place in (record, *turns):
        for key, value in place.items() if isinstance(place, dict) else ():
            if place is record and (key == known or key in keys):
                continue
            if not _is_beyond(key, value, num_images):
                continue
            remedy = "only images can be read; remove the key if the text stands alone"
            if _is_image(value, FILE) or (kind := _kind(key)) is None or kind["image"]:
                remedy = "name images in `image`, each with its <image> in the text, or remove the key"
            raise BadSample("media without a placeholder", f"{key}: {_shown(value)}; {remedy}")


def _is_beyond(key: object, value: Any, num_images: int) -> bool:
    """Return whether a key names media that the sample's images are not."""
    kind, named = _kind(key), _number_named(value)
    if kind is None or not named:
        return key not in NO_MEDIA and _is_image(value, None if num_images else FILE)
    if kind["image"] and num_images and not re.search("[0-9]", str(key)):
        return not (kind["place"] or named == num_images)
    return True


def _kind(key: object) -> re.Match[str] | None:
    return KEY.fullmatch(re.sub(r"[^a-z]", "", str(key).lower()))


def _is_image(value: Any, names: re.Pattern[str] | None) -> bool:
    """Return whether a value is or lists the bytes of a file, as tables have them, or a name that matches."""
    entries = value if isinstance(value, list) else [value]
    return any(
        (isinstance(entry, bytes) and entry)
        or (isinstance(entry, dict) and entry.keys() == {"bytes", "path"} and any(entry.values()))
        or (isinstance(entry, str) and names and names.fullmatch(entry))
        for entry in entries
    )


def _shown(value: Any) -> str:
    return reprlib.repr(value) if not isinstance(value, bytes) else f"{len(value)} bytes"


def _number_named(value: Any) -> int:
    """Return how many files a value names; None, "", [None], {} and numbers name none."""
    entries = value if isinstance(value, list) else [value]
    filled = (any(entry.values()) if isinstance(entry, dict) else entry for entry in entries)
    return sum(entry is True or (isinstance(entry, str | bytes | list) and bool(entry)) for entry in filled)
