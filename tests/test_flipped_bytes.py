"""Every byte of every file of a store, flipped one after the other: `verify --deep` names the file each time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import ragged_store
from ragged_store import ARRAYS as RAGGED
from ragged_store import GRIDS, TOKENS, A, B
from small_store import ARRAYS, DIGEST_A, entry, image_arrays, manifest, sample_arrays

from cache import StoreWriter, verify

pytestmark = pytest.mark.slow

# What is read first hides what it tells of: a damaged record leaves the files that it lists unread.
RECORDS = ("manifest.json", "zarr.json", "parts/zarr.json", "parts/p/part.json")


@pytest.fixture(scope="module")
def smallest(tmp_path_factory) -> Path:
    """One part of one sample, one image and one reject; three codecs."""
    arrays = [spec for spec in ARRAYS if spec.name in ("attention/layer_0", "vision", "input_ids")]
    path = tmp_path_factory.mktemp("flipped") / "s"
    with StoreWriter.open(path, manifest("p", arrays=tuple(arrays))).part("p", source={}) as part:
        part.add_image(DIGEST_A, image_arrays(1))
        values = sample_arrays(10)
        part.add(
            entry("a", DIGEST_A), {spec.name: values[spec.name] for spec in arrays if spec.owner == "sample"}
        )
        part.reject("b", "no image")
        part.commit()
    return path


@pytest.fixture(scope="module")
def smallest_ragged(tmp_path_factory) -> Path:
    """One part of one sample with two images of different numbers of vision tokens."""
    arrays = tuple(spec for spec in RAGGED if spec.name in ("attention/layer_0", "vision"))
    path = tmp_path_factory.mktemp("ragged") / "s"
    with StoreWriter.open(path, manifest("p", arrays=arrays)).part("p", source={}) as part:
        for image in (A, B):
            values = ragged_store.image_arrays(image)["vision"]
            part.add_image(image, {"vision": values}, tokens=TOKENS[image], grid=GRIDS[image])
        blocks = ragged_store.sample_arrays(0, [TOKENS[A], TOKENS[B]], 2)["attention/layer_0"]
        part.add(entry("a", A, B), {"attention/layer_0": blocks})
        part.commit()
    return path


def files_of(store: Path) -> list[str]:
    return sorted(str(file.relative_to(store)) for file in store.rglob("*") if file.is_file())


def undetected(store: Path, names: list[str]) -> list[tuple[str, int]]:
    """(file, offset) of flips that were not found; a byte of each file is flipped at a time."""
    contents = {name: (store / name).read_bytes() for name in names}
    missed = []
    for offset in range(max(map(len, contents.values()))):
        flipped = [name for name, data in contents.items() if offset < len(data)]
        for name in flipped:
            data = bytearray(contents[name])
            data[offset] ^= 1 << offset % 8
            (store / name).write_bytes(data)
        found = {problem.file for problem in verify(store, deep=True).problems}
        missed += [(name, offset) for name in flipped if name not in found]
        for name in flipped:
            (store / name).write_bytes(contents[name])
    return missed


@pytest.mark.parametrize("name", ["smallest", "smallest_ragged"])
def test_every_flipped_byte_is_found(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    store = Path(shutil.copytree(request.getfixturevalue(name), tmp_path / "s"))
    others = [name for name in files_of(store) if name not in RECORDS]
    assert len(others) > 10 and set(RECORDS) < set(files_of(store))
    assert [undetected(store, names) for names in (others, *([name] for name in RECORDS))] == [[]] * 5
    assert verify(store, deep=True).problems == ()
