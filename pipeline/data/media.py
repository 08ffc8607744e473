"""Media that an entry names: what no placeholder in its text stands for must not be dropped unsaid."""

from __future__ import annotations

import re
import reprlib
from typing import Any

from pipeline.errors import BadSample

# Of a key's letters, lower case: `images`, `Video`, `audio_path`, `imageUrls`; not `image_id`, `video_name`.
KEY = re.compile(
    r"(?P<image>images?|imgs?|pics?|pictures?|photos?|frames)(?P<place>(file)?(paths?|files?|urls?|names?))?"
    r"|(videos?|audios?|pointclouds?)((file)?(paths?|files?|urls?))?"
)


def check_media(record: dict[str, Any], *, num_images: int) -> None:
    """Raise `BadSample` for a key of the entry, or of one of its turns, that names other media than its images.

    `image_path` and the like may say again where the images of a sample are; without any, they are what is lost.
    """
    turns = record.get("conversations")
    for place in (record, *(turns if isinstance(turns, list) else [])):
        for key, value in place.items() if isinstance(place, dict) else ():
            kind = KEY.fullmatch(re.sub(r"[^a-z]", "", str(key).lower()))
            named = _number_named(value)
            if kind is None or named == 0:
                continue
            if kind["image"] and num_images and (kind["place"] or named == num_images):
                continue
            raise BadSample("media without a placeholder", f"{key}: {reprlib.repr(value)}; {_remedy(kind)}")


def _number_named(value: Any) -> int:
    """How many files a value names; None, "", [None], {} and numbers name none."""
    entries = value if isinstance(value, list) else [value]
    return sum(
        entry is True or (isinstance(entry, str | list | dict) and len(entry) > 0) for entry in entries
    )


def _remedy(kind: re.Match[str]) -> str:
    if kind["image"]:
        return "name images in `image`, each with its <image> in the text, or remove the key"
    return "only images can be read; remove the key if the text stands alone"
