"""The rows of a data set are what a plain union of its stores' samples is, and are of a few bytes."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import FINGERPRINT, manifest

from cache import ArraySpec, DuplicateKey, SampleEntry, Span, Store, StoreWriter
from pipeline.distill.join.missing import join_rows
from pipeline.distill.join.stores import Source, Stores

PARTS = ("p0", "p1", "p2")
TOKENS = ArraySpec("input_ids", "T", (), "sample", "integer", {"dtype": "int32"})
Content = Mapping[str, Sequence[tuple[str, int]]]  # part -> key and offset of its samples, in order


def write(path: Path, content: Content) -> Store:
    writer = StoreWriter.open(path, manifest(*PARTS, arrays=(TOKENS,), fingerprint=FINGERPRINT))
    for name, samples in content.items():
        with writer.part(name, source={}) as part:
            for key, offset in samples:
                entry = SampleEntry(key, (), (), Span(f"{key}.json", offset, 1))
                part.add(entry, {"input_ids": np.array([1])})
            part.commit()
    return Store(path)


def as_before(stores: Sequence[Store], parts: Sequence[str]) -> list[tuple[str, SampleEntry]]:
    """The union as one dict of all samples."""
    rows: dict[str, tuple[str, SampleEntry]] = {}
    for part in parts:
        having = [store for store in stores if part in store.parts]
        entries = [entry for store in having for entry in store.entries(part)]
        if len(having) > 1:
            entries.sort(key=lambda entry: entry.json_span.offset)
        for entry in entries:
            rows.setdefault(entry.key, (part, entry))
    return list(rows.values())


@st.composite
def contents(draw: st.DrawFn) -> Content:
    keys = draw(st.lists(st.sampled_from("abcdefgh"), unique=True))
    content: dict[str, list[tuple[str, int]]] = {part: [] for part in draw(st.sets(st.sampled_from(PARTS)))}
    for key in keys if content else ():
        content[draw(st.sampled_from(sorted(content)))].append((key, draw(st.integers(0, 5))))
    return content


def _odd(entry: SampleEntry) -> bool:
    return ord(entry.key) % 2 == 1


@pytest.mark.slow
@settings(max_examples=30)
@given(
    st.lists(contents(), min_size=1, max_size=3),
    st.sets(st.sampled_from(PARTS), min_size=1),
    st.sampled_from([None, _odd]),
    st.sampled_from(["skip", "recompute"]),
)
def test_rows_and_what_they_lack_are_those_of_a_plain_union(several, shards, is_chosen, on_missing):
    with tempfile.TemporaryDirectory() as folder:
        stores = [write(Path(folder) / str(number), content) for number, content in enumerate(several)]
        mixed = Stores(tuple(Source(store, ("attention",)) for store in stores), on_missing)
        known = {part for store in stores for part in store.parts}
        wanted = {part: f"{part}.tar" for part in (shards if on_missing == "skip" else shards & known)}
        joined = join_rows(mixed, wanted, is_chosen)
        rows = as_before(stores, sorted(wanted.keys() & known))
        rows = [row for row in rows if is_chosen is None or is_chosen(row[1])]
        lacks = [[key not in store for store in stores] for key in (entry.key for _, entry in rows)]
        if len(stores) == 1:
            lacks = [[] for _ in rows]
        elif on_missing == "skip":
            kept = [not any(of_one) for of_one in lacks]
            rows, lacks = (
                [one for one, keep in zip(all_, kept, strict=True) if keep] for all_ in (rows, lacks)
            )
        for found in (joined.rows, pickle.loads(pickle.dumps(joined.rows))):
            assert list(found) == rows and [found[n] for n in range(len(found))] == rows
            assert found.lacks.tolist() == lacks and len(found) == len(rows)


def test_a_key_that_occurs_twice_in_a_store_is_told_when_it_is_joined(tmp_path: Path):
    write(tmp_path / "s", {"p0": [("a", 0)]})
    other = write(tmp_path / "other", {"p1": [("b", 0), ("a", 1)]}).path
    shutil.copytree(other / "parts" / "p1", tmp_path / "s" / "parts" / "p1")
    store = Store(tmp_path / "s")
    with pytest.raises(DuplicateKey, match="'a' appears in parts 'p0' and 'p1'"):
        join_rows(Stores.single(store, {}), {"p0": "p0.tar", "p1": "p1.tar"})


def test_a_row_is_of_a_few_bytes(tmp_path: Path):
    keys = [(f"{number:06d}", number) for number in range(500)]
    store = write(tmp_path / "s", {"p0": keys})
    rows = join_rows(Stores.single(store, {}), {"p0": "p0.tar"}).rows
    assert rows.places.nbytes + rows.lacks.nbytes == 12 * len(keys)
    index = store._part("p0").index
    # Objects of a sample take over 1,000 bytes.
    assert len(pickle.dumps((index, store._keys))) < 80 * len(keys)
