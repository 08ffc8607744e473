"""The shards that a config names: files, folders, globs, ranges in braces, URLs, and commands (`pipe:`)."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from braceexpand import braceexpand

from cache import MASK
from pipeline.data.file_names import as_stored, expand_home, longest_stored
from pipeline.data.reading import reading
from pipeline.data.remote_shards import expand_urls
from pipeline.data.shard_kinds import ENDINGS, is_pipe, is_remote, part_name, unpacked_first
from pipeline.errors import ShardError


def expand_shards(patterns: str | Sequence[str]) -> list[str]:
    """Return the shards that folders, globs, brace patterns, URLs and commands name, sorted.

    Raises `ShardError` if a pattern names nothing, a brace pattern names a missing file, or two shards have one name.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ShardError("No shards are named; name a folder, a glob, or shard-{000000..000009}.tar.")
    places = [str(pattern).removeprefix("file://") for pattern in patterns]
    _check_whole(places)
    urls = [(place, name) for place in places if is_remote(place) for name in _braces(place, place)]
    paths = {path for place in places if not is_remote(place) for path in _expand(place)}
    shards = sorted(paths | set(expand_urls(urls)))
    _check_names(shards)
    return shards


def _check_whole(places: Sequence[str]) -> None:
    if masked := next((place for place in places if MASK in place and "://" in place), None):
        raise ShardError(
            f"{masked} is the record of a URL, in which a token or the like is masked as {MASK}; name the shards "
            "anew in data.shards, or give the --config that has them."
        )


def _check_names(shards: Sequence[str]) -> None:
    by_name: dict[str, str] = {}
    for shard in shards:
        first = by_name.setdefault(part_name(shard), shard)
        if first != shard:
            raise ShardError(
                f"Two shards have one name, {part_name(shard)}: {first} and {shard}; rename one, "
                "for a shard's name is its part's name in the store."
            )


def _braces(text: str, pattern: str) -> list[str]:
    try:
        return list(braceexpand(text))
    except ValueError as error:  # unbalanced braces
        raise ShardError(f"{pattern}: {error}; write ranges as {{000000..000009}}.") from error


def _expand(pattern: str) -> list[str]:
    """Return the shards that a local pattern names. A path that exists is no pattern, nor the folders before one."""
    if is_pipe(pattern):
        return _braces(pattern, pattern)
    path = as_stored(expand_home(pattern))
    if path.is_dir():
        found = unpacked_first(str(file) for ending in ENDINGS for file in path.glob(f"*{ending}"))
        return found or _refuse(pattern, path)
    if path.is_file():
        return [str(path)]
    folder = longest_stored(path)
    names = _braces(str(Path(*path.parts[len(folder.parts) :])), pattern)
    paths: list[str] = []
    missing: list[Path] = []
    for name in names:
        file = as_stored(folder / name)
        if file.is_file():
            paths.append(str(file))
        elif glob.has_magic(name):
            paths += _glob(str(Path(glob.escape(str(folder))) / name)) or _refuse(str(file), file.parent)
        else:
            missing.append(file)
    if missing and len(names) == 1:
        _refuse(pattern, path.parent)
    if missing:
        raise ShardError(
            f"{pattern} names {len(names)} shards, {len(missing)} of them missing, first {missing[0]}; "
            "correct the range or restore the files."
        )
    return paths


def _glob(pattern: str) -> list[str]:
    """Return the paths that a glob names; raises `ShardError` for a folder on the way that cannot be listed."""
    folders = os.path.dirname(pattern)
    while glob.has_magic(folders):
        for folder in glob.glob(f"{folders}/", recursive=True):
            with reading(folder), os.scandir(folder):
                pass
        folders = os.path.dirname(folders)
    return glob.glob(pattern, recursive=True)


def _refuse(pattern: str, folder: Path) -> NoReturn:
    if not folder.is_dir():
        raise ShardError(f"No shard at {pattern}: there is no folder {folder}; correct the path.")
    names = sorted(entry.name for entry in folder.iterdir())
    found = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    raise ShardError(
        f"No shard at {pattern}: {folder} holds {found or 'nothing'}; correct the path, or make shards with "
        "`alignkd pack`."
    )
