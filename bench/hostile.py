"""Stores and shards from a stranger: mutated documents and tar members, and what reading them comes to.

python bench/hostile.py --cases 10000

A case takes a sound store or shard, changes something, and makes every checksum right again, as a stranger could.
Then all of it is read, verified and summed up. Allowed is an answer, or one of our errors; anything else (another
exception, a file outside the folder, more than 2 GB of memory) ends the run with the case that did it.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_store import rewrite_record, write_store

from cache import CacheError, Store, summarise, verify
from cache.format.documents import canonical_json, document_bytes
from pipeline.data.shards import read_shard
from pipeline.errors import PipelineError

MEMORY_BYTES = 2 * 2**30
KINDS = (tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE)
PART = "parts/shard-000000"
DOCUMENTS = ("manifest.json", f"{PART}/part.json", f"{PART}/index.json", f"{PART}/rejects.jsonl",
             f"{PART}/hidden/zarr.json", f"{PART}/vision/zarr.json", f"{PART}/zarr.json")  # fmt: skip
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.sampled_from([0, 1, -1, 2**31, 2**40, 2**63]),
    st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20),
    st.sampled_from(["../../outside", "/etc/passwd", "", ".", "a" * 5000, "\x00", "tmp"]),
    st.lists(st.integers(-2, 2**40), max_size=5), st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)  # fmt: skip
DEEP = st.integers(1, 2000)  # lists in lists
NESTED = VALUES | DEEP.map(lambda depth: reduce(lambda inner, _: [inner], range(depth), []))


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--cases", type=int, default=10_000)
    cases = options.parse_args().cases
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = {"documents": documents(Path(folder), cases), "tars": tars(Path(folder), cases)}
        assert sorted(path.name for path in Path(folder).iterdir()) == ["case", "sound"], (
            "a file outside the folder"
        )
    for name, (answers, errors) in outcomes.items():
        print(
            f"{name}: {answers + errors:,} cases, {answers:,} answered, {errors:,} refused with an error of ours"
        )
    print(f"{time.monotonic() - started:.0f} s, never more than {MEMORY_BYTES / 2**30:.0f} GiB")
    return 0


def documents(folder: Path, cases: int) -> tuple[int, int]:
    """Values of the store's JSON files replaced, added and taken out."""
    sound, case = write_store(folder / "sound"), folder / "case"
    tally = [0, 0]

    @given(st.data())
    @_settings(cases)
    def run(data: st.DataObject) -> None:
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(sound, case)
        name = data.draw(st.sampled_from(DOCUMENTS))
        for _ in range(data.draw(st.integers(1, 3))):
            _change(case, name, data)
        tally[_outcome(lambda: read_everything(case))] += 1

    run()
    return tally[0], tally[1]


def read_everything(path: Path) -> None:
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
        except (ValueError, RecursionError):
            return
        file.write_bytes(text)
    if name.startswith("parts/") and not name.endswith("part.json"):
        try:
            rewrite_record(store / PART)
        except CacheError:
            return


def _replace(content: Any, data: st.DataObject) -> None:
    """One value somewhere in a document."""
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.integers(0, 3)):
            place = place[key]
            continue
        if isinstance(place, dict) and not data.draw(st.integers(0, 4)):
            del place[key]
        else:
            place[key] = data.draw(NESTED)
        return


def tars(folder: Path, cases: int) -> tuple[int, int]:
    """Members of strange names, types, sizes and contents; whole tars and bytes that are none."""
    shard, tally = folder / "case" / "shard.tar", [0, 0]
    shard.parent.mkdir(exist_ok=True)
    names = st.one_of(st.text(max_size=30), st.sampled_from([
        "a.json", "a.jpg", "../../outside.json", "/etc/a.json", "a.0.png", "a.1.png", ".json", "a", "b/c.json",
    ]))  # fmt: skip
    record = {"id": "a", "image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]}  # fmt: skip
    contents = st.one_of(
        st.binary(max_size=300), st.just(json.dumps(record).encode()),
        VALUES.map(lambda value: json.dumps({"id": "a", "conversations": value}).encode()),
        DEEP.map(lambda depth: b'{"id": "a", "conversations": ' + b"[" * depth + b"]" * depth + b"}"),
        st.just(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\x00\x00\x00"),
    )  # fmt: skip

    @given(st.data())
    @_settings(cases)
    def run(data: st.DataObject) -> None:
        file = io.BytesIO()
        with tarfile.open(
            fileobj=file,
            mode="w",
            format=data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])),
        ) as tar:
            for name, content in data.draw(st.lists(st.tuples(names, contents), max_size=4)):
                info = tarfile.TarInfo(name.replace("\x00", "")[:90] or "x")
                info.size = len(content)
                info.type = data.draw(st.sampled_from(KINDS))
                info.linkname = "/etc/passwd"
                try:
                    tar.addfile(info, io.BytesIO(content))
                except UnicodeEncodeError:
                    return
        blob = bytearray(file.getvalue())
        for _ in range(data.draw(st.integers(0, 3))):
            blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
        shard.write_bytes(
            bytes(blob[: data.draw(st.integers(0, len(blob)))] if data.draw(st.booleans()) else blob)
        )
        tally[_outcome(lambda: list(read_shard(shard)))] += 1

    run()
    return tally[0], tally[1]


def _outcome(work: Callable[[], object]) -> int:
    try:
        work()
    except (CacheError, PipelineError):
        return 1
    return 0


def _settings(cases: int) -> Callable[[Any], Any]:
    return settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None)


if __name__ == "__main__":
    sys.exit(main())
