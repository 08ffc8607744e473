"""Stores and shards from a stranger: changed documents and tar members, and what reading them comes to.

    ALIGNKD_HOSTILE_CASES=10000 python -m pytest tests/test_hostile.py

A case takes a sound store or shard, changes something, and makes every checksum right again, as a stranger could.
Then all of it is read, verified and summed up. Allowed is an answer, or one of our errors; anything else (another
exception, a file outside the folder, more than 2 GiB of memory) fails with the case that did it.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ragged_store import write_ragged_store
from small_store import rewrite_record, write_store

from cache import CacheError, Store, summarise, verify
from cache.format.documents import canonical_json, document_bytes
from pipeline.data.shards import read_shard
from pipeline.errors import PipelineError

pytestmark = pytest.mark.slow

MEMORY_BYTES = 2 * 2**30
KINDS = (tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE)
PART = "parts/shard-000000"
DOCUMENTS = ("manifest.json", f"{PART}/part.json", f"{PART}/index.json", f"{PART}/rejects.jsonl",
             f"{PART}/vision/zarr.json", f"{PART}/attention/layer_0/zarr.json", f"{PART}/zarr.json")  # fmt: skip
STORES = {"rows of one size": write_store, "ragged": write_ragged_store}
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.sampled_from([0, 1, -1, 2**31, 2**40, 2**63]),
    st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20),
    st.sampled_from(["../../outside", "/etc/passwd", "", ".", "a" * 5000, "\x00", "tmp"]),
    st.lists(st.integers(-2, 2**40), max_size=5), st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)  # fmt: skip
DEEP = st.integers(1, 2000)  # lists in lists
NESTED = VALUES | DEEP.map(lambda depth: reduce(lambda inner, _: [inner], range(depth), []))
NAMES = st.text(max_size=30) | st.sampled_from(
    ["a.json", "a.jpg", "../../outside.json", "/etc/a.json", "a.0.png", "a.1.png", ".json", "a", "b/c.json"]
)
RECORD = {"id": "a", "image": "a.jpg", "conversations": [
    {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]}  # fmt: skip
CONTENTS = st.one_of(
    st.binary(max_size=300), st.just(json.dumps(RECORD).encode()),
    VALUES.map(lambda value: json.dumps({"id": "a", "conversations": value}).encode()),
    DEEP.map(lambda depth: b'{"id": "a", "conversations": ' + b"[" * depth + b"]" * depth + b"}"),
    st.just(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\x00\x00\x00"),
)  # fmt: skip
many = settings(
    max_examples=int(os.environ.get("ALIGNKD_HOSTILE_CASES", 60)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that nothing may be written beside, while memory is bounded."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, limits[1]))
    (tmp_path / "within").mkdir()
    yield tmp_path / "within"
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["within"]


@pytest.mark.parametrize("write", STORES.values(), ids=STORES)
@many
@given(data=st.data())
def test_a_changed_document_is_read_or_refused_with_an_error_of_ours(
    write: Callable[[Path], Path], folder: Path, data: st.DataObject
):
    sound, case = folder / "sound", folder / "case"
    if not sound.exists():
        write(sound)
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(sound, case)
    name = data.draw(st.sampled_from(DOCUMENTS))
    for _ in range(data.draw(st.integers(1, 3))):
        _change(case, name, data)
    _allow_our_errors(lambda: _read_everything(case))


def _read_everything(path: Path) -> None:
    """All that a reader of a store may ask."""
    verify(path, deep=True)
    store = Store(path)
    for part in store.parts:
        store.entries(part)
        store.rejects(part)
    for key in list(store.keys())[:20]:
        store.read(key, list(store.manifest.specs))
    summarise(path)


def _change(store: Path, name: str, data: st.DataObject) -> None:
    file = store / name
    if name.endswith(".jsonl"):
        file.write_bytes(data.draw(st.binary(max_size=200)))
    else:
        content = json.loads(file.read_bytes())
        content.pop("checksum", None)
        try:
            _replace(content, data)
            text = canonical_json(content) if name.endswith("zarr.json") else document_bytes(content)
        except (ValueError, RecursionError):  # no JSON can say that
            return
        file.write_bytes(text)
    if name.startswith("parts/") and not name.endswith("part.json"):
        with suppress(CacheError):
            rewrite_record(store / PART)


def _replace(content: Any, data: st.DataObject) -> None:
    """Change or remove one value somewhere in a document."""
    while keys := list(content) if isinstance(content, dict) else list(range(len(content))):
        key = data.draw(st.sampled_from(keys))
        goes_deeper = isinstance(content[key], (dict, list)) and content[key] and data.draw(st.integers(0, 3))
        if goes_deeper:
            content = content[key]
        elif isinstance(content, dict) and not data.draw(st.integers(0, 4)):
            del content[key]
            return
        else:
            content[key] = data.draw(NESTED)
            return


@many
@given(data=st.data())
def test_a_strange_tar_is_read_or_refused_with_an_error_of_ours(folder: Path, data: st.DataObject):
    """Members of strange names, types, sizes and contents; whole tars, and bytes that are none."""
    file, tar_format = io.BytesIO(), data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for name, content in data.draw(st.lists(st.tuples(NAMES, CONTENTS), max_size=4)):
            info = tarfile.TarInfo(name.replace("\x00", "")[:90] or "x")
            info.size, info.type, info.linkname = (
                len(content),
                data.draw(st.sampled_from(KINDS)),
                "/etc/passwd",
            )
            with suppress(UnicodeEncodeError):
                tar.addfile(info, io.BytesIO(content))
    blob = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(0, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    whole = data.draw(st.booleans())
    (folder / "shard.tar").write_bytes(blob if whole else blob[: data.draw(st.integers(0, len(blob)))])
    _allow_our_errors(lambda: list(read_shard(folder / "shard.tar")))


def _allow_our_errors(work: Callable[[], object]) -> None:
    with suppress(CacheError, PipelineError):
        work()
