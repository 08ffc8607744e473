"""The record of a shard in the store, and the check that the shard has not changed since."""

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
    """Return the record of a shard: name, size, time of change, blake3 of its members' places and of its bytes.

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


# Size and time of change are part of the cache's key, so that a shard that changes is read again.
@lru_cache(maxsize=1 << 16)
def _digest(shard: str, _size: int, _modified_ns: int) -> str:
    return blake3().update_mmap(shard).hexdigest()


@lru_cache(maxsize=1 << 16)
def _members_digest(shard: str, _size: int, _modified_ns: int) -> str:
    """Return the blake3 over name, place and size of every member; reads the tar's headers only."""
    digest = blake3()
    with open_tar(shard) as tar:
        for member in read_members(tar, shard):
            name = member.name.encode("utf-8", "surrogateescape")
            digest.update(b"%d %d %s\n" % (member.offset_data, member.size, name))
    return digest.hexdigest()


def shard_change(shard: str, source: Mapping[str, Any], *, read_through: bool = False) -> str | None:
    """Return how a shard differs from a part's `source`, the record of it; None if it does not.

    Size and time of change are compared first, as `make` does, and the members only where the time differs. With
    `read_through` the whole content is compared, too. A part of an early version has a size at most; then nothing
    else is compared.
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
    """Raise `JoinError` if a shard (part -> path) changed after a store's part was captured from it."""
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
