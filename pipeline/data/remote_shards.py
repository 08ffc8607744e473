"""Shards behind URLs: which there are, and what their servers say of them."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from cache import RemoteFile, find_files, has_ranges, is_glob, stat_files
from pipeline.data.reading import reading
from pipeline.data.shard_kinds import is_named_shard, unpacked_first
from pipeline.errors import ShardError

_known: dict[str, RemoteFile] = {}  # the last answers of servers
_sends_ranges: dict[str, bool] = {}  # by server


def expand_urls(urls: Sequence[tuple[str, str]]) -> list[str]:
    """Return the shards that URLs name: files, folders and globs. Each URL is given with the pattern that it is of.

    All named files are asked for at once. Raises `ShardError` for what is missing or cannot be reached.
    """
    named = {url: pattern for pattern, url in urls if is_named_shard(url) and not is_glob(url)}
    found = [file for pattern, url in urls if url not in named for file in _listed(pattern, url)]
    _known.update({file.url: file for file in found})
    # Web servers list names without sizes.
    _ask(named | {file.url: file.url for file in found if file.size is None and not file.version})
    return [*named, *(file.url for file in found)]


def _listed(pattern: str, url: str) -> list[RemoteFile]:
    with reading(url):
        files = {file.url: file for file in find_files(url.rstrip("/"))}
    found = unpacked_first(filter(is_named_shard, files))
    if not found:
        raise ShardError(
            f"No shard at {pattern}: {url} lists no .tar; correct the URL. Where a web server lists nothing, name "
            "the shards, such as .../shard-{000000..000009}.tar."
        )
    return [files[name] for name in found]


def _ask(named: dict[str, str]) -> None:
    """Learn size and version of files (URL -> the pattern that names it). Raises `ShardError` if one is missing."""
    if not named:
        return
    with reading(next(iter(named))):
        found = dict(zip(named, stat_files(list(named)), strict=True))
    if missing := [url for url, file in found.items() if file is None]:
        pattern = named[missing[0]]
        raise ShardError(
            f"{len(missing)} of {len(named)} shards behind URLs are missing, first {missing[0]}"
            f"{'' if pattern == missing[0] else f' of {pattern}'}; correct the range or put the files there."
        )
    _known.update({url: file for url, file in found.items() if file is not None})


def about(url: str, *, again: bool = False) -> RemoteFile:
    """Return size and version of a shard, as its server said when its name was expanded, or says `again` now."""
    if again or url not in _known:
        _ask({url: url})
    return _known[url]


def sends_ranges(url: str) -> bool:
    """Return whether a shard's server sends a part of a file where a part is asked for; each server is asked once."""
    parts = urlsplit(url)
    server = f"{parts.scheme}://{parts.netloc}"
    if server not in _sends_ranges:
        with reading(url):
            _sends_ranges[server] = has_ranges(url)
    return _sends_ranges[server]
