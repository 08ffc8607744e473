"""The mark of an export: what its files were made of, and whether they are still as they were written."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from pipeline.config.provenance import read_mark, replace_text
from pipeline.errors import ConfigError, PipelineError, writing

MARK = "export.json"


def written_before(
    path: Path, asked: Mapping[str, Any], names: Collection[str], *, overwrite: bool
) -> dict[str, Any] | None:
    """Return the mark of the export that is asked for, if it lies there; None for a folder that may be written.

    Raises `ConfigError` if the folder holds another export, or one of the files `names` without a mark, and
    `PipelineError` if a file was changed, unless `overwrite`.
    """
    if overwrite or not any((path / name).exists() for name in (MARK, *names)):
        return None
    mark = read_mark(path / MARK)
    other = [name for name, value in asked.items() if mark.get(name) != value]
    if other:
        found = ", ".join(f"{name} {mark.get(name)}" for name in other) if mark else f"files without {MARK}"
        raise ConfigError(
            f"{path} holds another export ({found}); name another folder, or --overwrite to replace it"
        )
    if not _is_whole(path, mark, names):
        raise PipelineError(f"{path / MARK} is damaged; export again with --overwrite")
    check_files(path, mark["files"])
    return mark


def _is_whole(path: Path, mark: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether a mark has the digest and the size of each of its files, and of every other that lies there."""
    files, sizes = mark.get("files"), mark.get("bytes")
    if not isinstance(files, dict) or not isinstance(sizes, dict) or files.keys() != sizes.keys():
        return False
    lie_there = {name for name in names if not name.endswith(".md") and (path / name).exists()}
    return bool(files) and lie_there <= files.keys() <= set(names)


def start_writing(path: Path, names: Collection[str]) -> None:
    """Make the folder, and remove its mark and the files `names` of an earlier export."""
    with writing(path, then="correct the path or the rights, and run the same command again"):
        path.mkdir(parents=True, exist_ok=True)
        for name in (MARK, *names):
            (path / name).unlink(missing_ok=True)


def write_mark(path: Path, content: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Write the mark, last of all, with the digests and sizes of the files, and return it."""
    files = {name: digest_of_file(path / name) for name in names}
    sizes = {name: (path / name).stat().st_size for name in names}
    mark = {**content, "files": files, "bytes": sizes}
    replace_text(path / MARK, json.dumps(mark, indent=1) + "\n")
    return mark


def check_files(path: Path, files: Mapping[str, str]) -> None:
    """Raise `PipelineError` naming a file that is missing or not as it was written."""
    for name, digest in files.items():
        file = path / name
        if not file.is_file():
            raise PipelineError(f"{file} is missing; export again with --overwrite")
        if digest_of_file(file) != digest:
            raise PipelineError(
                f"{file} is not as it was written: its blake3 is not the one in {MARK}; export again with --overwrite"
            )


def digest_of_file(file: Path) -> str:
    """Return the blake3 of a file's bytes."""
    return blake3().update_mmap(file).hexdigest()
