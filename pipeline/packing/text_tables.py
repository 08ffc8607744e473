"""Rows of CSV and TSV files, one in memory, with the names of a table's columns made those of the forms."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.data.dialogues import COLUMNS
from pipeline.data.forms import FORMS
from pipeline.data.unread import IS_GOOD
from pipeline.errors import BadSample, PackError
from pipeline.packing.json_files import Entries, check_is_text

TEXT_TABLES = (".csv", ".tsv")
DELIMITERS = ",;\t"  # of a .csv file, the one that its header has most of
MAX_FIELD = 16 << 20  # characters; a quote that is never closed would take the rest of the file
# Columns that name an image where there is none of `COLUMNS`; the first one that a table has counts.
IMAGE_COLUMNS = (
    "file_name", "filename", "image_path", "image_file", "image_name", "file_path", "filepath", "path", "file",
    "image_url", "url",
)  # fmt: skip
LISTS = ("conversations", "messages", "texts", "history", "images")  # columns whose texts are JSON lists
FORM_KEYS = {key for form in FORMS.values() for key in form.keys}


def text_table_entries(path: Path) -> Callable[[], Entries]:
    """Return what reads the rows of a table. Raises `PackError` for one whose first line names no known column."""
    check_is_text(path)
    names = _names(path, next(_rows(path), []))
    return partial(_entries, path, names)


def _names(path: Path, header: list[str]) -> list[str]:
    """Return the names of the columns, those of forms in lower case and the image's as `image`."""
    names = [name.strip() for name in header]
    known = (*FORM_KEYS, *COLUMNS, *IMAGE_COLUMNS)
    names = [name.lower() if name.lower() in known else name for name in names]
    if not FORMS.keys() & set(names):
        raise PackError(
            f"{path}: the first line must name the columns, with one of {', '.join(FORMS)}; found "
            f"{', '.join(names)[:200] or 'nothing'}. Write a first line such as image,caption."
        )
    if repeated := sorted({name for name in names if name and names.count(name) > 1}):
        raise PackError(f"{path} has several columns {', '.join(repeated)}; give each a name of its own.")
    if not set(COLUMNS) & set(names):
        image = next((name for name in IMAGE_COLUMNS if name in names), None)
        names = ["image" if name == image else name for name in names]
    return names


def _entries(path: Path, names: list[str]) -> Entries:
    rows = _rows(path)
    next(rows, None)
    for number, row in enumerate(filter(None, rows), start=1):  # without empty lines
        yield number, _entry(names, row)


def _entry(names: list[str], row: list[str]) -> dict[str, Any] | BadSample:
    if len(row) != len(names):
        shown = " | ".join(row)[:200].encode(errors="replace").decode()
        return BadSample("row that does not fit the header", f"{len(row)} of {len(names)} columns: {shown}")
    for name, value in zip(names, row, strict=True):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            shown = value[:100].encode(errors="surrogateescape")
            return BadSample("text is not UTF-8", f"{name}: {shown}; save the file as UTF-8")
    return {name: _value(name, value) for name, value in zip(names, row, strict=True)}


def _value(name: str, text: str) -> Any:
    """Return what a text stands for: nothing, a JSON list, whether an answer is good, else itself."""
    if not text and name in FORM_KEYS:
        return None
    if name in IS_GOOD:
        return {"true": True, "false": False}.get(text.strip().lower(), text)
    if name in LISTS and text.startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):  # the form says that it is no list
            return text
    return text


def _rows(path: Path) -> Iterator[list[str]]:
    """Yield the rows with the header. Raises `PackError` where quotes do not fit: what follows cannot be known."""
    csv.field_size_limit(MAX_FIELD)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        delimiter = "\t"
        if path.suffix.lower() == ".csv":
            header = file.readline()
            delimiter = max(DELIMITERS, key=header.count)
            file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        begun = 1  # line of the row that is read
        try:
            for row in reader:
                yield row
                begun = reader.line_num + 1
        except csv.Error as error:
            raise PackError(
                f"{path}: the row at line {begun} is not valid: {error}. Write a quote within quotes twice, and "
                "close each."
            ) from error
