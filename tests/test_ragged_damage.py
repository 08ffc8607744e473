"""Damage to stores with ragged arrays: a wrong column of tokens is found, and a wrong value named with its owner."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from ragged_store import ARRAYS, CROP, PART, B, write_ragged_store
from small_store import rewrite_record

from cache import CorruptPart, Store, verify
from cache.format.documents import document_bytes, read_document

SPECS = {spec.name: spec for spec in ARRAYS}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return write_ragged_store(tmp_path_factory.mktemp("ragged") / "s")


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "s"))


def edit_index(store: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change index.json and make every checksum right again, as a faulty writer could."""
    file = store / "parts" / PART / "index.json"
    content = read_document(file)
    change(content)
    file.write_bytes(document_bytes(content))
    rewrite_record(file.parent)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "one more": (lambda index: index.update(tokens=[6, 4, 6]), "vision/zarr.json"),
    "swapped": (lambda index: index.update(tokens=[4, 6, 5]), "index.json"),
    "swapped, without grids": (lambda index: index.update(
        tokens=[4, 6, 5], grid={"rows": [0] * 3, "columns": [0] * 3}), "attention/layer_0/zarr.json"),
    "none": (lambda index: index.update(tokens=[6, 4, 0]), "index.json"),
    "negative": (lambda index: index.update(tokens=[6, 4, -5]), "index.json"),
    "enormous": (lambda index: index.update(tokens=[6, 4, 2**62]), "index.json"),
    "large": (lambda index: index.update(tokens=[6, 4, 2**31 - 1]), "vision/zarr.json"),
    "too few": (lambda index: index.update(tokens=[6, 4]), "index.json"),
    "text": (lambda index: index.update(tokens=["6", 4, 5]), "index.json"),
    "no tokens": (lambda index: index.pop("tokens"), "index.json"),
    "no grids": (lambda index: index.pop("grid"), "index.json"),
    "another grid": (lambda index: index["grid"].update(rows=[3, 2, 0]), "index.json"),
    "grid of nothing": (lambda index: index["grid"].update(columns=[0, 2, 0]), "index.json"),
    "rows of no whole images": (lambda index: index["rows"].update(map=[0, 5, 13, 14, 14, 18]), "index.json"),
    "rows without an image": (lambda index: index["rows"].update(map=[0, 5, 14, 16, 16, 18]), "index.json"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "file"), WRONG.values(), ids=WRONG)
def test_a_wrong_column_is_found_and_never_regroups_values(copy, change, file):
    edit_index(copy, change)
    for deep in (False, True):
        problems = verify(copy, deep=deep).problems
        assert f"parts/{PART}/{file}" in {problem.file for problem in problems}
        assert {problem.kind for problem in problems} == {"count"}
    with pytest.raises(CorruptPart, match="damaged"):
        Store(copy).read("a1", list(SPECS))


def test_a_value_that_no_codec_writes_is_named_with_its_image_or_sample(copy):
    for name, place, value, owner in (
        ("vision", 4 * 6 + 3, -32768, f"element 27, of image {B}"),
        ("map", 5 * 6 + 3 * 4 + 2, np.nan, "element 44, of sample 'a1'"),
        ("vision_int8_scale", 2, np.inf, f"row 2, of image {CROP}"),
    ):
        array: Any = zarr.open_array(str(copy / "parts" / PART / name), mode="r+")
        values = array[...]
        values[place] = value
        array[...] = values
        rewrite_record(copy / "parts" / PART)
        details = [problem.detail for problem in verify(copy, deep=True).problems]
        assert any(detail.startswith(f"{owner}, holds") for detail in details), details
