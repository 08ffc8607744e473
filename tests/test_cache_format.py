"""The page on the format is enough to read a store: its example is run against one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import golden_store
import numpy as np
import pytest
from blake3 import blake3
from ragged_store import write_ragged_store
from small_store import write_store

from cache import FORMAT_VERSION, Store
from cache.format.codecs import CODECS

PAGE = (Path(__file__).parent.parent / "docs/store-format.md").read_text()


@pytest.fixture(scope="module", params=["format 1", "fixed rows", "ragged rows"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "format 1":
        return golden_store.folder_of(1) / "store"
    write = write_store if request.param == "fixed rows" else write_ragged_store
    return write(tmp_path_factory.mktemp("format") / "teacher.zarr")


def example() -> dict[str, Any]:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    exec(compile(blocks[0], "docs/store-format.md", "exec"), names)
    return names


def test_the_example_reads_what_the_store_reads(store: Path) -> None:
    read_sample = example()["read_sample"]
    reader = Store(store)
    for key in list(reader.keys()):
        part, _ = reader.locate(key)
        found, expected = read_sample(store, part, key), reader.read(key, list(reader.manifest.specs))
        assert found.keys() == expected.keys() and len(found) >= 6
        for name, arrays in expected.items():
            assert type(found[name]) is type(arrays) and len(found[name]) == len(arrays)
            for mine, array in zip(found[name], arrays, strict=True):
                assert mine.shape == array.shape and mine.dtype == array.dtype
                np.testing.assert_allclose(mine, array, rtol=1e-6)


def test_the_example_uses_no_code_of_ours() -> None:
    assert "import cache" not in PAGE and "from cache" not in PAGE and "pipeline" not in PAGE


def test_the_checksums_are_what_the_page_says(store: Path) -> None:
    for file in [
        store / "manifest.json",
        *store.glob("parts/*/index.json"),
        *store.glob("parts/*/part.json"),
    ]:
        content = json.loads(file.read_bytes())
        checksum = content.pop("checksum")
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        assert checksum == blake3(canonical).hexdigest()
        for key in content:
            assert f"`{key}`" in PAGE


def test_the_hashes_and_the_contents_are_what_the_page_says(store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_bytes())
    arrays = sorted(manifest["arrays"], key=lambda spec: spec["name"])
    contents = {"arrays": arrays, "fingerprint": manifest["fingerprint"]}
    if manifest["format_version"] > 1:
        contents["format_version"] = manifest["format_version"]
    canonical = json.dumps(contents, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    for part in (store / "parts").glob("*/part.json"):
        record = json.loads(part.read_bytes())
        assert record["contents"] == blake3(canonical).hexdigest()
        on_disk = {
            file.relative_to(part.parent).as_posix() for file in part.parent.rglob("*") if file.is_file()
        }
        assert record["files"].keys() == on_disk - {"part.json"}
        for name, file in record["files"].items():
            data = (part.parent / name).read_bytes()
            assert file == {"bytes": len(data), "blake3": blake3(data).hexdigest()}


def test_the_page_names_every_codec_and_the_version() -> None:
    assert f"format {FORMAT_VERSION}" in PAGE.splitlines()[0]
    for codec in CODECS:
        assert f"| `{codec}` |" in PAGE
