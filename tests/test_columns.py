"""Columns give back what they were made of, and a key is found where it lies: exact, whatever the hashes."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import DuplicateKey, Span
from cache.format.columns import Spans, Texts, compact, digests, offsets
from cache.read.keys import KeyTable

LETTERS = st.characters(exclude_categories=())  # half a character of two, too: JSON may hold it
TEXTS = st.lists(st.text(LETTERS, max_size=8), max_size=12)
LARGE = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32), st.integers(-2, 2))


@given(TEXTS, st.slices(12))
def test_texts_are_a_sequence_of_the_same_strings(texts: list[str], part: slice):
    column = Texts(texts)
    assert list(column) == texts and len(column) == len(texts)
    assert [column[n] for n in range(-len(texts), len(texts))] == texts + texts
    assert column[part] == tuple(texts[part])
    for beyond in (len(texts), -len(texts) - 1):
        with pytest.raises(IndexError):
            column[beyond]
    assert list(pickle.loads(pickle.dumps(column))) == texts


@given(st.lists(st.tuples(st.text(LETTERS, max_size=5), LARGE, LARGE), max_size=9))
def test_spans_are_the_same_spans(rows: list[tuple[str, int, int]]):
    spans = [Span(*row) for row in rows]
    assert list(Spans.of(spans)) == spans


HEX = st.binary(min_size=32, max_size=32).map(bytes.hex)


@given(st.lists(st.one_of(HEX, HEX.map(str.upper), st.text("0123456789abcdef \n", max_size=66)), max_size=6))
def test_digests_come_back_to_the_letter(texts: list[str]):
    assert list(digests(texts)) == texts


def test_digests_of_blake3_take_half_of_their_letters():
    texts = [bytes([n] * 32).hex() for n in range(100)]
    assert len(pickle.dumps(digests(texts))) < 3400 < 6400 < len(pickle.dumps(Texts(texts)))
    assert digests(["a" * 64])[0] == "a" * 64 and digests(["A" * 64])[0] == "A" * 64


@given(st.lists(LARGE, max_size=9))
def test_numbers_are_the_same_in_as_few_bytes_as_hold_them(numbers: list[int]):
    small = compact(np.array(numbers, dtype=np.int64))
    assert small.tolist() == numbers
    assert small.itemsize == (4 if all(0 <= number < 2**32 for number in numbers) else 8)


@given(st.lists(st.integers(0, 5), max_size=9))
def test_offsets_add_up_counts(counts: list[int]):
    assert offsets(counts).tolist() == [sum(counts[:n]) for n in range(len(counts) + 1)]


# Keys

KEYS = st.lists(st.lists(st.text(LETTERS, max_size=3), max_size=7), max_size=5)
HASHES = st.sampled_from([hash, len, lambda key: 0, lambda key: hash(key) % 3 - 1, lambda key: -(2**63)])


def _parts(keys: Sequence[Sequence[str]]) -> list[tuple[str, Texts]]:
    return [(f"part {number}", Texts(some)) for number, some in enumerate(keys)]


@given(KEYS, st.lists(st.text(LETTERS, max_size=3), max_size=5), HASHES)
def test_every_key_is_found_in_its_place_and_no_other_key(keys, others, hash_key):
    """Also where all hashes are one: a dict is the judge."""
    unique = dict.fromkeys(key for some in keys for key in some)
    parts = _parts([[key for key in some if unique.pop(key, 0) is None] for some in keys])
    table = KeyTable(parts, hash_key=hash_key)
    known = {key: (part, number) for part, some in parts for number, key in enumerate(some)}
    asked = [*known, *others, *reversed(known)]
    assert table.find(asked) == [known.get(key) for key in asked]
    assert list(table) == list(known) and len(table) == len(known)


@given(KEYS, HASHES)
def test_two_samples_of_one_key_are_refused_as_they_are_met(keys, hash_key):
    first: dict[str, str] = {}
    expected = None
    for part, some in _parts(keys):
        for key in some:
            if key in first and expected is None:
                expected = str(DuplicateKey(key, parts=(first[key], part)))
            first.setdefault(key, part)
    if expected is None:
        table = KeyTable(_parts(keys), hash_key=hash_key)
        table.check_duplicates()
        assert len(table) == len(first)
    else:
        with pytest.raises(DuplicateKey) as caught:
            KeyTable(_parts(keys), hash_key=hash_key).check_duplicates()
        assert str(caught.value) == expected
