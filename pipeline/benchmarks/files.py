"""Published files of a benchmark: found by their names, read with one sentence for what is missing or damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipeline.benchmarks.places import ImageFile, ParquetImage, reading_parquet
from pipeline.errors import PipelineError, reason_of

T = TypeVar("T", dict, list)
NAMES: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(-\w+)?$")
SPLITS = frozenset(("train", "val", "validation", "test", "testdev", "dev", "challenge", "submission"))


class MissingFile(PipelineError):  # noqa: N818 - it names what is missing
    """A published file that a benchmark needs is not there."""


def find(folder: Path, name: str) -> Path | None:
    """Return the file or folder of this name in `folder`, or in one of its own folders."""
    near = folder / name
    return near if near.exists() else next(iter(sorted(folder.glob(f"*/{name}"))), None)


def found(folder: Path, name: str, *, get: str) -> Path:
    """Return the file or folder of this name. Raises `MissingFile` with `get`, which says how to get it."""
    path = find(folder, name)
    if path is None:
        raise MissingFile(f"{folder}: {name} is missing; {get}")
    return path


def read_json(file: Path, kind: type[T]) -> T:
    """Return the content of a JSON file, an object (`dict`) or a list."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise PipelineError(
            f"{file} cannot be read as JSON ({reason_of(error)}); download it again"
        ) from error
    if not isinstance(content, kind):
        wanted, there = (NAMES.get(one, one.__name__) for one in (kind, type(content)))
        raise PipelineError(
            f"{file} holds {there}, where the published file holds {wanted}; download it again"
        )
    return content


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines."""
    try:
        rows = [json.loads(line) for line in file.read_bytes().decode().split("\n") if line.strip()]
    except (ValueError, OSError) as error:
        raise PipelineError(
            f"{file} cannot be read as JSON lines ({reason_of(error)}); download it again"
        ) from error
    if not all(isinstance(row, dict) for row in rows):
        raise PipelineError(f"{file}: not every line is a JSON object; download it again")
    return rows


def field_of(row: Mapping[str, Any], name: str, *, where: str) -> Any:
    """Return a field of an annotation. Raises `PipelineError` naming the place and the fields that are there."""
    try:
        return row[name]
    except (KeyError, TypeError):
        there = ", ".join(sorted(map(str, row))) if isinstance(row, Mapping) else type(row).__name__
        raise PipelineError(
            f"{where}: no field {name!r}, only {there}; use the published file of the benchmark"
        ) from None


def text_of(row: Mapping[str, Any], name: str, *, where: str) -> str:
    """Return a field of an annotation that is a text or a number, as text. Raises `PipelineError` for another."""
    value = field_of(row, name, where=where)
    if not isinstance(value, str | int | float):
        raise _other(name, value, "a text", where)
    return str(value)


def list_of(row: Mapping[str, Any], name: str, *, where: str) -> list[Any]:
    """Return a field of an annotation that is a list. Raises `PipelineError` for another."""
    value = field_of(row, name, where=where)
    if not isinstance(value, list):
        raise _other(name, value, "a list", where)
    return value


def _other(name: str, value: Any, wanted: str, where: str) -> PipelineError:
    there = "nothing" if value is None else NAMES.get(type(value), type(value).__name__)
    return PipelineError(
        f"{where}: {name!r} holds {there}, where the published file holds {wanted}; download it again"
    )


def image_file(folder: Path, name: str, *, get: str) -> ImageFile:
    """Return the place of an image file, which must be there and inside the folder."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise PipelineError(f"{folder}: the image {name!r} lies outside the folder; use the published files")
    if not path.is_file():
        raise MissingFile(f"{path} is missing; {get}")
    return ImageFile(path)


# Parquet files of the Hub


def parquet_files(folder: Path, split: str, *, subset: str = "") -> list[Path]:
    """Return the Parquet files of a split, by name. With `subset`, those in a folder whose name begins so, if any."""
    every = sorted(folder.rglob("*.parquet"))
    of_split = [
        f for f in every if f.stem == split or f.name.startswith(f"{split}-") or f.parent.name == split
    ]
    chosen = of_split or [file for file in every if len(every) == 1 and not _names_a_split(file)]
    of_subset = [
        file
        for file in chosen
        if subset and any(p.startswith(subset) for p in file.relative_to(folder).parts)
    ]
    _check_shards(of_subset or chosen)
    return of_subset or chosen


def _names_a_split(file: Path) -> bool:
    return bool({file.stem.split("-")[0], file.parent.name} & SPLITS)


def _check_shards(files: Sequence[Path]) -> None:
    """Raise `MissingFile` unless all files of a split are there, which their names number."""
    held: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if named := SHARD.match(file.stem):
            held.setdefault((file.parent, named[1], int(named[3])), set()).add(int(named[2]))
    for (folder, split, total), numbers in held.items():
        if absent := sorted(set(range(total)) - numbers):
            raise MissingFile(
                f"{folder}: {split}-{absent[0]:05}-of-{total:05}.parquet is missing, {len(absent)} of {total} files "
                "are; download the rest of the split"
            )


def columns_of(file: Path) -> set[str]:
    """Return the names of a Parquet file's columns."""
    with _opened(file) as parquet:
        return set(parquet.schema_arrow.names)


def parquet_rows(
    files: Sequence[Path], columns: Sequence[str], *, image: str | None = "image"
) -> Iterator[tuple[dict[str, Any], ParquetImage]]:
    """Yield the rows of Parquet files without their images, and the place of each row's image.

    Raises `PipelineError` for a file without these columns or that of the images.
    """
    needed = {*columns, *([image] if image else [])}
    for file in files:
        with _opened(file) as parquet:
            names = set(parquet.schema_arrow.names)
            if absent := sorted(needed - names):
                raise PipelineError(
                    f"{file}: no column {', '.join(absent)}, only {', '.join(sorted(names))}; use the published file"
                )
            for group in range(parquet.num_row_groups):
                with reading_parquet(file):
                    rows = parquet.read_row_group(group, columns=list(columns), use_threads=False).to_pylist()
                for number, row in enumerate(rows):
                    yield row, ParquetImage(file, group, number)


def _opened(file: Path) -> Any:
    with reading_parquet(file):
        from pyarrow.parquet import ParquetFile

        return ParquetFile(file)
