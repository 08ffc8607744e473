"""An uncompressed tar as groups of members with one key, by WebDataset's rules; read to its end or refused.

Read by `tarfile`, which tells the place of a member's bytes; WebDataset's own reader does not.
"""

from __future__ import annotations

import json
import re
import tarfile
import unicodedata
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from webdataset.tariterators import base_plus_ext

from pipeline.data.decoding import ENDINGS
from pipeline.data.reading import opened, reading
from pipeline.errors import BadSample, PipelineError, ShardError

DIALOGUES = {"conversations", "messages", "texts"}  # keys that no other JSON beside a sample has
MAX_MEMBER_BYTES = 256 * 1024 * 1024
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
REMEDY = "make or copy the shard again."
# Names __like_this__, as in WebDataset, and files that file managers leave. macOS writes a ._NAME beside each NAME;
# by WebDataset's rule "folder/._1.json" would be a member of the key "folder/".
NOT_A_MEMBER = re.compile(r"^__[^/]*__($|/)|(^|/)(\.[^/]*$|__MACOSX/)|(^|/)(Thumbs\.db|desktop\.ini)$", re.I)


@dataclass
class Group:
    """The members of a sample by lower-case ending, not read yet; `problem` is what is wrong with them."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    problem: BadSample | None = None

    def add(self, ending: str, member: tarfile.TarInfo) -> None:
        """Add a member; a member that cannot be read is the group's problem."""
        if ending in self.members:
            self.problem = BadSample("file occurs twice in a sample", member.name)
        elif member.issparse():
            self.problem = BadSample("sparse file in the tar", member.name)
        elif member.size > MAX_MEMBER_BYTES:
            self.problem = BadSample("file too large", f"{member.name}, {member.size} bytes")
        self.members[ending] = member


@contextmanager
def open_tar(path: str | Path) -> Generator[tarfile.TarFile]:
    """Open a tar file for reading; raises `ShardError` if it is compressed or no tar."""
    with opened(path) as file:
        yield read_as_tar(file, path)


def read_as_tar(file: BinaryIO, path: str | Path) -> tarfile.TarFile:
    """Return an open file as a tar, to be closed by the caller; raises `ShardError` if it is compressed or no tar."""
    with reading(path):
        start = file.read(6)
        file.seek(0)
    for magic, name in COMPRESSIONS.items():
        if start.startswith(magic):
            raise ShardError(
                f"{path} is compressed with {name}, so no sample can be found by its place; unpack it"
                f"{', or name it .tar.gz' if name == 'gzip' else ''}."
            )
    try:
        with reading(path):
            return tarfile.open(fileobj=file, mode="r:")
    except (PipelineError, MemoryError):
        raise
    except Exception as error:  # damaged headers can raise anything in tarfile's parsers
        raise ShardError(f"{path} is no tar file ({error}); {REMEDY}") from error


def read_groups(tar: tarfile.TarFile, path: str | Path) -> Iterator[Group]:
    """Yield the adjacent members with one key. A name up to its first dot is the key, the rest the ending.

    A sample with more dots in its name is a bad group of its own. Raises `ShardError` if the tar is truncated or
    damaged; a group is yielded only after all its bytes were there.
    """
    # Archives made on macOS may mix both Unicode forms of a name.
    for _, named in groupby(_named(tar, path), key=lambda item: unicodedata.normalize("NFC", item[0])):
        group = None
        for key, ending, member in named:
            group = group or Group(key)
            group.add(ending, member)
        assert group is not None  # groupby yields no empty groups
        yield from _split_dotted(group, tar)


def _named(tar: tarfile.TarFile, path: str | Path) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield key, ending and header of the members that belong to a sample."""
    for member in read_members(tar, path):
        key, ending = base_plus_ext(member.name)
        if key is None or ending is None or not member.isreg() or NOT_A_MEMBER.search(member.name):
            continue
        # Names in other encodings stay printable.
        yield key.encode("utf-8", "backslashreplace").decode(), ending.lower(), member


def _split_dotted(group: Group, tar: tarfile.TarFile) -> Iterator[Group]:
    """Yield the group's own members, if any, and each sample with more dots in its name, as a bad group.

    By WebDataset's rule scan_1.5.json is a member of scan_1. KEY.meta.json and KEY.mask.png stay members of KEY.
    """
    stems = [ending.removesuffix(".json") for ending in group.members if _is_sample(ending, group, tar)]
    members: dict[str | None, dict[str, tarfile.TarInfo]] = {stem: {} for stem in (None, *stems)}
    for ending, member in group.members.items():
        owners = (stem for stem in stems if ending.startswith(f"{stem}."))
        members[max(owners, key=len, default=None)][ending] = member
    if own := members[None]:
        yield replace(group, members=own)
    for stem in stems:
        name = members[stem][f"{stem}.json"].name
        folder, slash, file = name.rpartition("/")
        better = file[: -len(".json")].replace(".", "_") + ".json"  # it may end in .JSON
        problem = BadSample(
            "dots in the name",
            f"WebDataset reads {name} as the key {group.key} with the ending {stem}.json; rename it to "
            f"{folder}{slash}{better}, and what belongs to it likewise",
        )
        yield Group(f"{group.key}.{stem}", members[stem], group.problem or problem)


def _is_sample(ending: str, group: Group, tar: tarfile.TarFile) -> bool:
    """Return whether an ending such as 5.json is a sample's: it has a conversation, or an image beside it."""
    stem, dot, last = ending.rpartition(".")
    if not dot or last != "json":
        return False
    kinds = {other.rpartition(".")[2] for other in group.members if other.startswith(f"{stem}.")}
    if "json" not in group.members and kinds & ENDINGS:
        return True
    member = group.members[ending]
    try:
        found = json.loads(read_member(tar, member)) if member.size <= MAX_MEMBER_BYTES else None
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and not DIALOGUES.isdisjoint(found)


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return a member's bytes, as they are stored."""
    file: BinaryIO = tar.fileobj  # pyright: ignore[reportAssignmentType]
    with reading(str(tar.name)):
        file.seek(member.offset_data)
        return file.read(member.size)


def read_members(tar: tarfile.TarFile, path: str | Path) -> Iterator[tarfile.TarInfo]:
    """Yield every member in order; raises `ShardError` if the tar is truncated or damaged."""
    try:
        while True:
            with reading(path):
                member = tar.next()
            if member is None:
                break
            yield member
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # else every header stays in memory
    except (PipelineError, MemoryError):
        raise
    except Exception as error:  # damaged headers can raise anything in tarfile's parsers
        raise ShardError(
            f"{path} is damaged or truncated after byte {tar.offset} ({error}); {REMEDY}"
        ) from error
    _check_end(tar, path)


def _check_end(tar: tarfile.TarFile, path: str | Path) -> None:
    # tarfile takes a damaged header, or the end of the file, for the end of the archive: samples would be lost.
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
