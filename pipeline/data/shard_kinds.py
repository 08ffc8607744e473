"""What a shard is by its name: a file, a URL or a command, compressed or not; and the name of its part."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

from pipeline.errors import ShardError

PIPE = "pipe:"
PACKED = (".tar.gz", ".tgz")  # a tar that gzip compressed
ENDINGS = (".tar", *PACKED)


def is_pipe(shard: str) -> bool:
    """Return whether a shard is what a command prints."""
    return shard.startswith(PIPE)


def is_remote(shard: str) -> bool:
    """Return whether a shard lies behind a URL."""
    return "://" in shard and not is_pipe(shard)


def is_packed(shard: str) -> bool:
    """Return whether a shard is compressed, by its name."""
    return not is_pipe(shard) and file_name(shard).endswith(PACKED)


def is_local_tar(shard: str) -> bool:
    """Return whether a shard is a file on this machine that can be read as it is."""
    return not (is_pipe(shard) or is_remote(shard) or is_packed(shard))


def file_name(shard: str) -> str:
    """Return the name of a shard's file, of a command the last one that it names."""
    if is_pipe(shard):
        return _named_in(shard)
    if not is_remote(shard):
        return Path(shard).name
    if shard.startswith(("http://", "https://")):
        return unquote(re.split("[?#]", shard)[0].rpartition("/")[2])
    return shard.rpartition("/")[2]


def part_name(shard: str) -> str:
    """Return the name of a shard's part in the store."""
    name = file_name(shard)
    ending = next((ending for ending in ENDINGS if name.endswith(ending)), "")
    return name.removesuffix(ending)


def _named_in(command: str) -> str:
    words = re.split(r"[\s'\"|;&<>()]+", command.removeprefix(PIPE))
    names = [re.split("[?#]", word)[0].rpartition("/")[2] for word in words]
    found = [name for name in names if name.endswith(ENDINGS)]
    if not found:
        raise ShardError(
            f"{command} names no file that ends with .tar, .tar.gz or .tgz, which would give its part in the store "
            "a name; add one to the command, such as by `# shard-000000.tar` at its end."
        )
    return found[-1]


def is_named_shard(place: str) -> bool:
    """Return whether the name is a shard's; else it is a folder's."""
    return file_name(place).endswith(ENDINGS)


def unpacked_first(shards: Iterable[str]) -> list[str]:
    """Return the shards of a folder that are not hidden, without the packed ones that lie there unpacked, too."""
    # macOS leaves a ._shard.tar beside each shard on foreign disks.
    seen = [shard for shard in shards if not file_name(shard).startswith(".")]
    plain = {part_name(shard) for shard in seen if not is_packed(shard)}
    return [shard for shard in seen if not (is_packed(shard) and part_name(shard) in plain)]
