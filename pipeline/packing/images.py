"""The image files of a pack: reading them, and finding those that changed after they were packed."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from pipeline.data.decoding import FORMATS, check_image
from pipeline.data.file_names import as_stored
from pipeline.data.tars import MAX_MEMBER_BYTES
from pipeline.errors import BadSample

UNREADABLE = "unreadable image file"
# Errors of one image file. All others, of a failing disk or of too many open files, end the run.
ERRORS_OF_ONE_FILE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.ENOENT}

State = list[int] | None  # bytes, and nanoseconds of the last change; None for a file that is not there
PackedImages = dict[str, tuple[State, str]]  # path -> state and blake3 of the bytes


@dataclass(frozen=True)
class ImageFile:
    """An image file that decodes to its last byte; `ending` fits the content, `state` is that before reading."""

    ending: str
    data: bytes
    state: State
    digest: str


def read_images(
    images: Iterable[str], folder: Path, max_pixels: int
) -> tuple[dict[str, ImageFile], dict[str, BadSample]]:
    """Read each image once; return the good ones, and why the others cannot be packed."""
    good: dict[str, ImageFile] = {}
    bad: dict[str, BadSample] = {}
    for image in dict.fromkeys(images):
        try:
            good[image] = _read_image(image, folder, max_pixels)
        except BadSample as error:
            bad[image] = error
    return good, bad


def _read_image(image: str, folder: Path, max_pixels: int) -> ImageFile:
    try:
        path = as_stored(folder / image)
        if not path.is_file():
            raise BadSample("missing image file", image)
        state = state_of(image, folder)
        size = path.stat().st_size
        if size > MAX_MEMBER_BYTES:
            raise BadSample("image file too large", f"{image}, {size} bytes; the limit is {MAX_MEMBER_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        if error.errno not in ERRORS_OF_ONE_FILE:
            raise
        raise BadSample(UNREADABLE, f"{image}: {error.strerror}") from error
    try:
        kind = check_image(data, max_pixels=max_pixels)
    except BadSample as error:
        raise BadSample(error.kind, f"{image}: {error.detail}") from error
    ending = path.suffix.lower().removeprefix(".")
    if FORMATS.get(ending) != kind:
        ending = next(name for name, known in FORMATS.items() if known == kind)
    return ImageFile(ending, data, state, blake3(data).hexdigest())


def state_of(image: str, folder: Path) -> State:
    """Return size and time of an image file below a folder."""
    try:
        found = as_stored(folder / image).stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def changed_images(images: PackedImages, folder: Path) -> list[str]:
    """Return the packed images whose bytes have changed; a removed image is not one, since the shards hold it.

    Reads only files whose time differs: a copied folder has new times and the same bytes.
    """
    return [image for image, (state, digest) in images.items() if _is_changed(image, folder, state, digest)]


def _is_changed(image: str, folder: Path, state: State, digest: str) -> bool:
    now = state_of(image, folder)
    if now is None or now == state:
        return False
    if state is None or now[0] != state[0]:
        return True
    return blake3(as_stored(folder / image).read_bytes()).hexdigest() != digest


def read_packed_images(file: Path, size: int) -> PackedImages:
    """Return what the first `size` bytes of a record of images hold: an interrupted run wrote what follows.

    Earlier versions wrote an empty line wherever they added to a pack.
    """
    with open(file, "rb") as opened:
        rows = [json.loads(line) for line in opened.read(size).splitlines() if line]
        return {image: (state, digest) for image, state, digest in rows}


def packed_images_text(images: PackedImages) -> str:
    """Return a record of images: a line of JSON with path, state and blake3 for each."""
    return "".join(json.dumps([image, *about]) + "\n" for image, about in images.items())
