"""A folder of images with a text file beside each, `a.jpg` and `a.txt`: the text is the image's caption."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from cache import hash_file
from pipeline.data.decoding import ENDINGS
from pipeline.errors import BadSample, PackError
from pipeline.packing.json_files import LINES, Entries
from pipeline.packing.tables import TABLES
from pipeline.packing.text_tables import TEXT_TABLES

TEXT = ".txt"
OTHERS = (".json", *LINES, *TABLES, *TEXT_TABLES)  # files that would be the annotations
MAX_TEXT = 1 << 20  # bytes
LETTER = re.compile(r"[^\W\d_]")


def has_text_files(folder: Path) -> bool:
    """Return whether a folder holds images with a text beside one of them, and no file of annotations."""
    if not folder.is_dir() or any(file.suffix.lower() in OTHERS for file in folder.iterdir()):
        return False
    return any(text for image, text in _pairs(folder) if image)


def text_file_entries(folder: Path) -> Entries:
    """Yield an entry for each image and for each text without one, folder by folder in the order of names."""
    for number, (image, text) in enumerate(_pairs(folder), start=1):
        try:
            yield number, _entry(folder, image, text)
        except BadSample as error:
            yield number, error


def text_file_digest(folder: Path) -> str:
    """Return the blake3 over the names of images and texts, and the contents of texts."""
    digest = blake3()
    for image, text in _pairs(folder):
        content = hash_file(folder / text) if text else ""
        digest.update(f"{image}\0{text}\0{content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _pairs(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield image and text by their paths below a folder; "" for one that is not there."""
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(place, folder)
        files = sorted(name for name in names if not name.startswith("."))
        images = [name for name in files if _ending(name).removeprefix(".") in ENDINGS]
        texts = {os.path.splitext(name)[0]: name for name in files if _ending(name) == TEXT}
        pairs = [(image, texts.get(os.path.splitext(image)[0], "")) for image in images]
        used = {text for _, text in pairs}
        pairs += [("", text) for text in texts.values() if text not in used]
        yield from ((_joined(below, image), _joined(below, text)) for image, text in pairs)


def _refuse(error: OSError) -> None:
    raise PackError(f"{error.filename} cannot be read: {error.strerror}; correct it, or move it away.")


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _joined(below: str, name: str) -> str:
    return os.path.normpath(os.path.join(below, name)) if name else ""


def _entry(folder: Path, image: str, text: str) -> dict[str, Any]:
    if not text:
        raise BadSample("image without a text", f"{image}: no {TEXT} of the same name lies beside it")
    if not image:
        raise BadSample("text without an image", f"{text}: no image of the same name lies beside it")
    return {"id": image, "image": image, "caption": _caption(folder / text, text)}


def _caption(path: Path, name: str) -> str:
    """Return the text of a file. Raises `BadSample` for one without words, such as a file of boxes."""
    size = path.stat().st_size
    if size > MAX_TEXT:
        raise BadSample("text too long", f"{name}, {size} bytes; the limit is {MAX_TEXT}")
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("text is not UTF-8", f"{name}: {error}; save it as UTF-8") from error
    if not LETTER.search(text):
        raise BadSample("text without a word", f"{name}: {text[:60]!r}")
    return text
