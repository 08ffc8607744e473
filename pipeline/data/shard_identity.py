"""Whether a shard is still the one that a part was captured from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from blake3 import blake3

from cache import Store
from pipeline.data.tars import open_tar, read_members
from pipeline.errors import JoinError


def shard_source(shard: str) -> dict[str, Any]:
    """What a part records of its shard: name, size, time of change, digests of its members' places and of its bytes.

    Raises `ShardError` if the shard is damaged.
    """
    about = Path(shard).stat()
    return {
        "shard": Path(shard).name,
        "bytes": about.st_size,
        "modified_ns": about.st_mtime_ns,
        "members": _members_digest(shard, about.st_size, about.st_mtime_ns),
        "blake3": _digest(shard, about.st_size, about.st_mtime_ns),
    }


@lru_cache(maxsize=1 << 16)
def _digest(shard: str, _size: int, _modified_ns: int) -> str:
    return blake3().update_mmap(shard).hexdigest()


@lru_cache(maxsize=1 << 16)
def _members_digest(shard: str, _size: int, _modified_ns: int) -> str:
    """blake3 over name, place and size of every member: the tar's headers are read, not its content.

    Size and time of change are part of the memo's key, so that a shard that changes is read again.
    """
    digest = blake3()
    with open_tar(shard) as tar:
        for member in read_members(tar, shard):
            name = member.name.encode("utf-8", "surrogateescape")
            digest.update(b"%d %d %s\n" % (member.offset_data, member.size, name))
    return digest.hexdigest()


def shard_change(shard: str, source: Mapping[str, Any], *, read_through: bool = False) -> str | None:
    """How the shard differs from what a part's `source` says; None if it is the same, or it cannot be told.

    Size and time of change are compared first, as `make` does. Only a shard that was touched or copied has its
    members listed; with `read_through` all of it is read, for content that changed at the same size. A part written
    before this record was kept has a size at most.
    """
    about = Path(shard).stat()
    if source.get("bytes", about.st_size) != about.st_size:
        return f"{source['bytes']:,} bytes when it was captured, {about.st_size:,} now"
    if "members" not in source or source.get("modified_ns") == about.st_mtime_ns:
        return None
    if _members_digest(shard, about.st_size, about.st_mtime_ns) != source["members"]:
        return "as large as it was, with other members"
    is_same = not read_through or _digest(shard, about.st_size, about.st_mtime_ns) == source.get("blake3")
    return None if is_same else "the same members with other content"


def check_unchanged(stores: Sequence[Store], shards: Mapping[str, str]) -> None:
    """Raise `JoinError` if a shard (part -> path) is not the one that a store's part was captured from."""
    changes = [
        (shard, store.path, change)
        for store in stores
        for part, shard in shards.items()
        if part in store.parts and (change := shard_change(shard, store.source(part)))
    ]
    if changes:
        shard, path, change = changes[0]
        raise JoinError(
            f"{len(changes)} of {len(shards)} shards changed since they were cached in {path}, first {shard} "
            f"({change}); restore them, or run `alignkd teacher-cache --recapture-changed`"
        )
