"""Rows of the `datasets` library: Parquet files, folders, saved data sets and Hub repositories, one row in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from cache import hash_file
from pipeline.errors import PackError, reason_of
from pipeline.packing.json_files import LINES, json_entries
from pipeline.packing.tables import TABLES, read_tables, with_encoded_media

JSON = (".json", *LINES)
Rows = Callable[[], Iterator[dict[str, Any]]]


def open_data_set(
    where: str | Path, *, subset: str | None, split: str | None
) -> tuple[str, Callable[[], str], Rows]:
    """Return the name of a data set, what digests its content, and its rows; images in them stay encoded.

    Raises `PackError` if `datasets` is not installed or cannot read it, or if it has several splits and none is
    named.
    """
    try:
        import datasets
    except ImportError as error:
        raise PackError(
            f"{where} is read by the package `datasets`; install it with `pip install 'alignkd[datasets]'`."
        ) from error
    try:
        digest, splits = _opened(datasets, where, subset)
        rows = _split(splits, split, where)
    except PackError:
        raise
    except Exception as error:  # the library, its drivers and its readers each have their own
        raise PackError(f"{where} cannot be read as a data set: {reason_of(error)}") from error
    name = Path(where).stem if isinstance(where, Path) else where.rsplit("/", 1)[-1]
    return (
        name,
        lambda: f"{digest()} {subset or ''} {split or ''}".strip(),
        lambda: _rows(rows, where),
    )


def _rows(read: Rows, where: str | Path) -> Iterator[dict[str, Any]]:
    try:
        yield from read()
    except PackError:
        raise
    except Exception as error:
        raise PackError(f"{where} cannot be read as a data set: {reason_of(error)}") from error


def _opened(
    datasets: Any, where: str | Path, subset: str | None
) -> tuple[Callable[[], str], dict[str, Rows]]:
    """Return what digests the content of a data set, and the rows of each of its splits."""
    if isinstance(where, str):
        from huggingface_hub import HfApi

        revision = HfApi().dataset_info(where).sha
        return lambda: f"{where}@{revision}", _splits(
            datasets.load_dataset_builder(where, subset, revision=revision)
        )
    if where.is_file():
        return partial(_digest, where), {"train": partial(read_tables, [str(where)])}
    if any((where / name).is_file() for name in ("state.json", "dataset_dict.json")):
        loaded = datasets.load_from_disk(where)
        parts = loaded if isinstance(loaded, dict) else {"train": loaded}
        files = {name: [file["filename"] for file in part.cache_files] for name, part in parts.items()}
        return partial(_digest, where), {name: partial(read_tables, found) for name, found in files.items()}
    return partial(_digest, where), _splits(datasets.load_dataset_builder(str(where), subset))


def _splits(builder: Any) -> dict[str, Rows]:
    """Return the rows of each split: of tables and JSON read here, else by `datasets` with images encoded."""
    files = {str(name): list(found) for name, found in (builder.config.data_files or {}).items()}
    if files and all(file.lower().endswith(TABLES) for found in files.values() for file in found):
        return {name: partial(read_tables, found) for name, found in files.items()}
    if files and all(
        Path(file).suffix in JSON and "://" not in file for found in files.values() for file in found
    ):
        return {name: partial(_json_entries, found) for name, found in files.items()}
    return {name: partial(_streamed, part) for name, part in builder.as_streaming_dataset().items()}


def _streamed(stream: Any) -> Iterator[dict[str, Any]]:
    return iter(stream.cast(with_encoded_media(stream.features)) if stream.features else stream)


def _json_entries(files: list[str]) -> Iterator[Any]:
    """Yield the entries of JSON files as they are written; `datasets` makes JSON texts of contents of mixed types."""
    for file in files:
        yield from (entry for _, entry in json_entries(Path(file))())


def _split(splits: dict[str, Rows], split: str | None, where: str | Path) -> Rows:
    """Return the rows of the split that is asked for, or of the only one."""
    if split is None and len(splits) > 1:
        raise PackError(f"{where} has the splits {', '.join(splits)}; name one with --split.")
    if split is not None and split not in splits:
        raise PackError(f"{where} has no split {split!r}, only {', '.join(splits)}; name one of these.")
    return splits[split or next(iter(splits))]


def _digest(path: Path) -> str:
    """Return the blake3 over names and contents of a file, or of all files of a folder."""
    if path.is_file():
        return hash_file(path)
    digest = blake3()
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            file = Path(folder, name)
            digest.update(f"{file.relative_to(path)}\0{hash_file(file)}\n".encode())
    return digest.hexdigest()
