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

TABLES = (".parquet", ".arrow")
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
        digest, loaded = _opened(datasets, where, subset)
        chosen = _split(loaded, split, where)
    except PackError:
        raise
    except Exception as error:  # the library, its drivers and its readers each have their own
        raise PackError(f"{where} cannot be read as a data set: {reason_of(error)}") from error
    name = Path(where).stem if isinstance(where, Path) else where.rsplit("/", 1)[-1]
    return (
        name,
        lambda: f"{digest()} {subset or ''} {split or ''}".strip(),
        lambda: _rows(chosen, where),
    )


def _rows(chosen: Any, where: str | Path) -> Iterator[dict[str, Any]]:
    rows = iter(chosen)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise PackError(f"{where} cannot be read as a data set: {reason_of(error)}") from error
        if row is None:
            return
        yield row


def _opened(datasets: Any, where: str | Path, subset: str | None) -> tuple[Callable[[], str], Any]:
    if isinstance(where, str):
        from huggingface_hub import HfApi

        revision = HfApi().dataset_info(where).sha
        return lambda: f"{where}@{revision}", datasets.load_dataset(
            where, subset, revision=revision, streaming=True
        )
    if where.is_dir() and any((where / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return partial(_digest, where), datasets.load_from_disk(where)
    if where.is_dir():
        return partial(_digest, where), datasets.load_dataset(str(where), subset, streaming=True)
    kind = {".parquet": "parquet", ".arrow": "arrow"}[where.suffix.lower()]
    return partial(_digest, where), datasets.load_dataset(kind, subset, data_files=str(where), streaming=True)


def _split(loaded: Any, split: str | None, where: str | Path) -> Any:
    """Return the split that is asked for, or the only one, as a stream whose images stay encoded."""
    if isinstance(loaded, dict):
        names = list(loaded)
        if split is None and len(names) > 1:
            raise PackError(f"{where} has the splits {', '.join(names)}; name one with --split.")
        if split is not None and split not in loaded:
            raise PackError(f"{where} has no split {split!r}, only {', '.join(names)}; name one of these.")
        loaded = loaded[split or names[0]]
    elif split is not None:
        raise PackError(f"{where} is one data set without splits; remove --split.")
    stream = loaded.to_iterable_dataset() if hasattr(loaded, "to_iterable_dataset") else loaded
    return stream.decode(False) if stream.features else stream


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
