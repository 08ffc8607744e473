"""The images of a pack: finding and reading them, and finding files that changed after they were packed."""

from __future__ import annotations

import base64
import binascii
import errno
import json
import os
import re
import reprlib
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from blake3 import blake3

from pipeline.data.decoding import FORMATS, check_image
from pipeline.data.file_names import as_stored
from pipeline.data.tars import MAX_MEMBER_BYTES
from pipeline.errors import BadSample, writing

UNREADABLE = "unreadable image file"
# Errors of one image file. All others, of a failing disk or of too many open files, end the run.
ERRORS_OF_ONE_FILE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.ENOENT}
MAX_PATH = 4096  # characters, Linux's limit

State = list[int] | None  # bytes, and nanoseconds of the last change; None for a file that is not there
Image = str | bytes  # a path relative to the image folder, or the bytes themselves


@dataclass(frozen=True)
class ImageFile:
    """An image that decodes to its last byte; `ending` fits the content, `state` is its file's before reading."""

    ending: str
    data: bytes
    state: State
    digest: str


def image_of(value: Any, image_folder: Path) -> Image:
    """Return what an entry gives as an image: a path, file:// or data: URL, bytes, or an object with one of these.

    Raises `BadSample` for anything else, for other URLs, and for a path that leaves the image folder.
    """
    given = value
    if isinstance(value, dict):  # of the `datasets` library, with bytes first
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if not isinstance(value, str) or not value or "\0" in value or not is_unicode(value):
        raise BadSample("image is no path", reprlib.repr(given))
    if value.startswith("data:"):
        return _from_data_url(value)
    if len(value) > MAX_PATH:
        remedy = "write base64 as a URL: data:image/png;base64,..."
        raise BadSample("image is no path", f"{value[:30]!r}... of {len(value)} characters; {remedy}")
    if value.startswith("file://"):
        value = urllib.parse.unquote(value.removeprefix("file://"))
    if re.match(r"[a-z][a-z0-9+.-]*://", value):
        raise BadSample("image behind a URL", f"{value[:200]}; download it, and name its path")
    return _relative(value, image_folder)


def _from_data_url(url: str) -> bytes:
    about, _, data = url.partition(",")
    if not about.endswith(";base64"):
        raise BadSample("image is no path", f"{url[:60]}: a data URL must be base64")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("image is no path", f"{url[:60]}: {error}") from error


def is_unicode(text: str) -> bool:
    """Return whether a text has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _relative(path: str, image_folder: Path) -> str:
    normal = os.path.normpath(path)
    if os.path.isabs(normal):
        # The path and the folder may each be written with or without symbolic links.
        given, real = os.path.abspath(image_folder), os.path.realpath(image_folder)
        for folder, spelling in ((given, normal), (real, normal), (real, os.path.realpath(normal))):
            if os.path.commonpath([folder, spelling]) == folder:
                normal = os.path.relpath(spelling, folder)
                break
    # Symbolic links are not followed here: a folder inside the image folder may link to another disk.
    if os.path.isabs(normal) or normal.split("/")[0] == ".." or normal == ".":
        raise BadSample("image path leaves the image folder", normal[:200])
    return normal


def read_images(
    images: Iterable[Image], folder: Path, max_pixels: int
) -> tuple[dict[Image, ImageFile], dict[Image, BadSample]]:
    """Read each image once; return the good ones, and why the others cannot be packed."""
    good: dict[Image, ImageFile] = {}
    bad: dict[Image, BadSample] = {}
    for image in dict.fromkeys(images):
        try:
            is_file = isinstance(image, str)
            good[image] = (
                _read_file(image, folder, max_pixels) if is_file else _checked(image, None, max_pixels)
            )
        except BadSample as error:
            bad[image] = error
    return good, bad


def _read_file(image: str, folder: Path, max_pixels: int) -> ImageFile:
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
        return _checked(data, state, max_pixels, ending=path.suffix.lower().removeprefix("."))
    except BadSample as error:
        raise BadSample(error.kind, f"{image}: {error.detail}") from error


def _checked(data: bytes, state: State, max_pixels: int, *, ending: str = "") -> ImageFile:
    if len(data) > MAX_MEMBER_BYTES:
        raise BadSample("image file too large", f"{len(data)} bytes; the limit is {MAX_MEMBER_BYTES}")
    kind = check_image(data, max_pixels=max_pixels)
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


def is_changed(image: str, folder: Path, state: State, digest: str) -> bool:
    """Return whether an image's bytes have changed; a removed image has not, since the shards hold it.

    Reads only files whose time differs: a copied folder has new times and the same bytes.
    """
    now = state_of(image, folder)
    if now is None or now == state:
        return False
    if state is None or now[0] != state[0]:
        return True
    return blake3(as_stored(folder / image).read_bytes()).hexdigest() != digest


class PackedImages:
    """The list of the image files in a pack's shards: a line of JSON with path, state and blake3 for each.

    It is added to as the shards are. Its first `size` bytes are those of the finished pack; an interrupted run wrote
    what follows.
    """

    def __init__(self, file: Path, size: int = 0) -> None:
        self.file, self.size = file, size

    def __iter__(self) -> Iterator[tuple[str, State, str]]:
        left = self.size
        with open(self.file, "rb") as opened:
            while left > 0 and (line := opened.readline()):
                left -= len(line)
                if line.strip():  # earlier versions wrote an empty line wherever they added to a pack
                    image, state, digest = json.loads(line)
                    yield image, state, digest
        if left > 0:
            raise ValueError(f"{self.file.name} ends {left} bytes too early")

    def __enter__(self) -> Self:
        """Begin to add lines after those of the finished pack."""
        self._opened = open(self.file, "ab")
        self._opened.truncate(self.size)
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def add(self, image: str, file: ImageFile) -> None:
        line = json.dumps([image, file.state, file.digest]).encode() + b"\n"
        with writing(self.file):
            self._opened.write(line)
        self.size += len(line)

    def finish(self) -> None:
        """Force the list to the disk."""
        with writing(self.file):
            self._opened.flush()
            os.fsync(self._opened.fileno())
