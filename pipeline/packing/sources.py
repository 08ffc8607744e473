"""Annotations as a stream of entries: a file of JSON, CSV or Parquet, a folder, or a Hub repository.

A folder is one of `datasets`, or holds images with a text beside each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cache import hash_file
from pipeline.data.file_names import expand_home
from pipeline.errors import PackError
from pipeline.packing.data_sets import open_data_set
from pipeline.packing.json_files import LINES, Entries, json_entries
from pipeline.packing.tables import TABLES
from pipeline.packing.text_files import has_text_files, text_file_digest, text_file_entries
from pipeline.packing.text_tables import TEXT_TABLES, text_table_entries

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Annotations that can be read from beginning to end.

    `digest` changes with their content, and reads all of it. `holds_images` is whether images come within the
    entries, as in Parquet: these keep the source's order, since they cannot be gathered by image without reading
    everything twice.
    """

    name: str
    digest: Callable[[], str]
    entries: Callable[[], Entries]
    folder: Path
    holds_images: bool = False


def open_source(annotations: str | Path, *, subset: str | None = None, split: str | None = None) -> Source:
    """Return annotations by their path or Hub id. Raises `PackError` if nothing is there, or it cannot be read."""
    path = expand_home(annotations)
    is_table = path.suffix.lower() in TABLES
    if path.is_file() and not is_table:
        if subset or split:
            raise PackError(
                f"{path} is one file of entries, which has no subset and no split; remove the option."
            )
        read = text_table_entries if path.suffix.lower() in TEXT_TABLES else json_entries
        return Source(path.stem, partial(hash_file, path), read(path), path.parent)
    if has_text_files(path) and not (subset or split):
        return Source(path.name, partial(text_file_digest, path), partial(text_file_entries, path), path)
    endings = (".json", *LINES, *TABLES, *TEXT_TABLES)
    is_hub_id = HUB_ID.fullmatch(str(annotations)) and path.suffix.lower() not in endings
    if path.exists() or is_hub_id:
        where = path if path.exists() else str(annotations)
        name, digest, rows = open_data_set(where, subset=subset, split=split)
        folder = path if path.is_dir() else path.parent if path.exists() else Path()
        return Source(name, digest, lambda: enumerate(rows(), start=1), folder, holds_images=True)
    raise PackError(
        f"No annotations at {path}; name a JSON, JSONL, CSV or Parquet file, a folder of `datasets` or of images "
        "with texts, or a Hub id."
    )
