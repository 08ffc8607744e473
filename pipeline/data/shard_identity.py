"""The record of a shard in the store, and the check that the shard has not changed since."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

from blake3 import blake3

from cache import Store
from pipeline.data.shard_files import OpenShard, ShardFacts, open_shard
from pipeline.data.shard_kinds import file_name, is_local_tar, is_pipe, is_remote, part_name
from pipeline.data.tars import read_as_tar, read_members
from pipeline.errors import JoinError, ShardError


def shard_source(shard: str) -> dict[str, Any]:
    """Return the record of a shard: name, size, time of change, blake3 of its members' places and of its bytes.

    Raises `ShardError` if the shard is damaged.
    """
    with open_shard(shard) as opened:
        return source_of(opened)


def source_of(opened: OpenShard) -> dict[str, Any]:
    """Return the record of an open shard, as `shard_source` does; what has not come yet of a stream is read.

    A record of a URL has the server's `version` of the file in place of a time of change. Sizes and digests are of
    the uncompressed tar. Raises `ShardError` if the shard has changed since it was opened.
    """
    shard, facts = opened.shard, opened.facts
    digests = _digests_of_file(shard, facts) if opened.spool is None else _digests_of_stream(opened)
    if ShardFacts.of(shard, again=True) != facts:
        raise ShardError(f"{shard} changed while it was read: run the command again.")
    known = {"modified_ns": facts.modified_ns, "version": facts.version}
    name = file_name(shard) if is_local_tar(shard) else f"{part_name(shard)}.tar"
    return {"shard": name, **digests, **{name: value for name, value in known.items() if value}}


def _digests_of_file(shard: str, facts: ShardFacts) -> dict[str, Any]:
    return {"bytes": facts.size, "members": _members(shard, facts), "blake3": _digest(shard, facts)}


def _digests_of_stream(opened: OpenShard) -> dict[str, Any]:
    opened.file.seek(0)
    digest = hashlib.file_digest(cast(Any, opened.file), cast(Any, blake3)).hexdigest()
    return {"bytes": opened.file.tell(), "members": _members_digest(opened), "blake3": digest}


# Size and time of change are part of the cache's key, so that a shard that changes is read again.
@lru_cache(maxsize=1 << 16)
def _digest(shard: str, _facts: ShardFacts) -> str:
    return blake3().update_mmap(shard).hexdigest()


@lru_cache(maxsize=1 << 16)
def _members(shard: str, _facts: ShardFacts) -> str:
    """Return the digest of a local tar's members; reads its headers only."""
    with open_shard(shard) as opened:
        return _members_digest(opened)


def _members_digest(opened: OpenShard) -> str:
    """Return the blake3 over name, place and size of every member."""
    digest = blake3()
    for member in read_members(read_as_tar(opened.file, opened.shard), opened.shard):
        name = member.name.encode("utf-8", "surrogateescape")
        digest.update(b"%d %d %s\n" % (member.offset_data, member.size, name))
    return digest.hexdigest()


@lru_cache(maxsize=1 << 16)
def _streamed(shard: str, _facts: ShardFacts) -> dict[str, Any]:
    return shard_source(shard)


def content_digest(shard: str) -> str:
    """Return a digest of a shard's content: of a local file's bytes, of a URL the server's version if it has one."""
    facts = ShardFacts.of(shard)
    if is_local_tar(shard):
        return _digest(shard, facts)
    if facts.version:
        return blake3(f"{facts.stored_size} {facts.version}".encode()).hexdigest()
    return _streamed(shard, facts)["blake3"]


def shard_change(shard: str, source: Mapping[str, Any], *, read_through: bool = False) -> str | None:
    """Return how a shard differs from a part's `source`, the record of it; None if it does not.

    Size and time of change are compared first, as `make` does, and the members only where the time differs. With
    `read_through` the whole content is compared, too. A part of an early version has a size at most; then nothing
    else is compared. Of a shard behind a URL whose version is another, and of what a command prints, only
    `read_through` reads anything: stage 2 compares every sample of it anyway.
    """
    now = ShardFacts.of(shard)
    if now.size is not None and source.get("bytes", now.size) != now.size:
        return f"{source['bytes']:,} bytes when it was captured, {now.size:,} now"
    if "members" not in source or _is_as_recorded(now, source):
        return None
    if not read_through and (is_remote(shard) or is_pipe(shard)):
        return None
    if is_local_tar(shard):
        members, digest = _members(shard, now), _digest(shard, now) if read_through else source.get("blake3")
    else:
        streamed = _streamed(shard, now)
        members, digest = streamed["members"], streamed["blake3"]
    if members != source["members"]:
        return "as large as it was, with other members"
    return (
        None if not read_through or digest == source.get("blake3") else "the same members with other content"
    )


def _is_as_recorded(now: ShardFacts, source: Mapping[str, Any]) -> bool:
    if now.modified_ns is not None:
        return source.get("modified_ns") == now.modified_ns
    return bool(now.version) and source.get("version") == now.version


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
            f"({change}); restore them, or run `alignkd teacher-cache --recapture-changed`; if these are other "
            "shards, give them other names, because a part has the name of its shard"
        )
