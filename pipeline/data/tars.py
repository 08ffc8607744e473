"""An uncompressed tar as runs of members with one key, by WebDataset's rules; read to its end or refused.

Plain `tarfile` does the reading: unlike a stream, it tells where a member's bytes lie.
"""

from __future__ import annotations

import re
import tarfile
import unicodedata
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from webdataset.tariterators import base_plus_ext

from cache import UnreadableFile
from pipeline.errors import BadSample, ShardError

MAX_MEMBER_BYTES = 256 * 1024 * 1024
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
REMEDY = "make or copy the shard again."
# As WebDataset: what is named __like_this__. And what file managers leave beside files, macOS a ._NAME for each
# NAME: by WebDataset's rule "folder/._1.json" would be a member of the key "folder/".
NOT_A_MEMBER = re.compile(r"^__[^/]*__($|/)|(^|/)(\.[^/]*$|__MACOSX/)|(^|/)(Thumbs\.db|desktop\.ini)$", re.I)


@dataclass
class Group:
    """The members of one sample by lower-case ending, not yet read; `problem` is what is wrong with them."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    problem: BadSample | None = None


def open_tar(path: str | Path) -> tarfile.TarFile:
    """The tar, open for reading; raises `ShardError` if it is compressed or no tar."""
    with reading(path), open(path, "rb") as file:
        start = file.read(6)
    for magic, name in COMPRESSIONS.items():
        if start.startswith(magic):
            raise ShardError(
                f"{path} is compressed with {name}, so no sample can be found by its place; unpack it."
            )
    try:
        with reading(path):
            return tarfile.open(path, "r:")
    except (ShardError, MemoryError):
        raise  # the machine's trouble, not the shard's
    except Exception as error:  # damaged headers can raise anything in tarfile's parsers
        raise ShardError(f"{path} is no tar file ({error}); {REMEDY}") from error


def read_groups(tar: tarfile.TarFile, path: str | Path) -> Iterator[Group]:
    """Adjacent members with one key. A name up to its first dot is the key, the rest the ending.

    Raises `ShardError` if the tar is truncated or damaged; a group comes only when all its bytes are there.
    """
    group: Group | None = None
    for member in read_members(tar, path):
        key, ending = base_plus_ext(member.name)
        if key is None or ending is None or not member.isreg() or NOT_A_MEMBER.search(member.name):
            continue
        key = key.encode("utf-8", "backslashreplace").decode()  # names in other encodings stay printable
        if group is None or not _is_one_name(group.key, key):
            if group is not None:
                yield group
            group = Group(key)
        _add(group, ending.lower(), member)
    if group is not None:
        yield group


def _is_one_name(first: str, second: str) -> bool:
    """Whether names are equal but for how accents are stored: archives of macOS may mix both forms."""
    return first == second or unicodedata.normalize("NFC", first) == unicodedata.normalize("NFC", second)


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A member's bytes."""
    file = tar.extractfile(member)
    assert file is not None  # groups hold regular files only
    with reading(str(tar.name)):
        return file.read()


@contextmanager
def reading(path: str | Path) -> Generator[None]:
    """Raise `ShardError` for what the system refuses: it says which file, why, and nothing about what it holds."""
    try:
        yield
    except OSError as error:
        raise ShardError(str(UnreadableFile(Path(path), error))) from error


def read_members(tar: tarfile.TarFile, path: str | Path) -> Iterator[tarfile.TarInfo]:
    """Every member in its order. Raises `ShardError` if the tar is truncated or damaged."""
    try:
        while (member := _next(tar, path)) is not None:
            yield member
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # else every header is kept
    except (ShardError, MemoryError):
        raise  # the machine's trouble, not the shard's
    except Exception as error:  # damaged headers can raise anything in tarfile's parsers
        raise ShardError(
            f"{path} is damaged or truncated after byte {tar.offset} ({error}); {REMEDY}"
        ) from error
    _check_end(tar, path)


def _next(tar: tarfile.TarFile, path: str | Path) -> tarfile.TarInfo | None:
    with reading(path):
        return tar.next()


def _check_end(tar: tarfile.TarFile, path: str | Path) -> None:
    # tarfile takes a damaged header, or the file's end, for the end of the archive: samples would be lost.
    file: BinaryIO = tar.fileobj  # pyright: ignore[reportAssignmentType]
    with reading(path):
        file.seek(tar.offset)
        end = file.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE:
        raise ShardError(f"{path} is truncated: it ends at byte {tar.offset} without an end mark; {REMEDY}")
    while end:
        if end.strip(b"\0"):
            raise ShardError(
                f"{path} is damaged at byte {tar.offset}: neither a member nor the end; {REMEDY}"
            )
        with reading(path):
            end = file.read(1024 * 1024)


def _add(group: Group, ending: str, member: tarfile.TarInfo) -> None:
    if ending in group.members:
        group.problem = BadSample("file occurs twice in a sample", member.name)
    elif member.issparse():
        group.problem = BadSample("sparse file in the tar", member.name)
    elif member.size > MAX_MEMBER_BYTES:
        group.problem = BadSample("file too large", f"{member.name}, {member.size} bytes")
    group.members[ending] = member
