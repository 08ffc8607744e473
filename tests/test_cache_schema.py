"""What a store says of itself survives JSON, and says which field is wrong when it does not."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_store import ARRAYS, FINGERPRINT, manifest

from cache import (
    ArraySpec,
    CorruptFile,
    Difference,
    Manifest,
    SampleEntry,
    SchemaError,
    Span,
    UnsafeName,
    UnsupportedFormat,
)
from cache.differences import leaf_differences
from cache.format.documents import canonical_json, document_bytes, read_document
from cache.format.layout import check_array_name, check_file_name, check_part_name
from cache.format.schema import check_format


def test_a_manifest_survives_json() -> None:
    made = manifest()
    assert Manifest.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_a_fingerprint_names_every_field_that_differs() -> None:
    mine = replace(FINGERPRINT, tokenizer="99", template="")
    found = [(d.field, d.stored, d.mine) for d in FINGERPRINT.differences(mine)]
    assert found == [("tokenizer", "70", "99"), ("template", "7a", "")]


def test_families_are_compared_where_both_stores_tell_theirs() -> None:
    llava, gemma = (replace(FINGERPRINT, family=family) for family in ("11", "99"))
    assert FINGERPRINT.differences(llava) == llava.differences(FINGERPRINT) == []
    assert [str(difference) for difference in llava.differences(gemma)] == ["family: 11 -> 99"]
    assert llava.to_json()["family"] == "11" and "family" not in FINGERPRINT.to_json()
    assert manifest(fingerprint=llava).contents_digest() != manifest().contents_digest()
    made = manifest(fingerprint=llava)
    assert Manifest.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_of_settings_the_values_alone_that_differ_are_told_with_their_keys() -> None:
    stored = {
        "dtype": "f32",
        "targets": {"logits": {"top_k": 16, "codec": "a"}, "vision": {}},
        "layers": [0, 1],
    }
    mine = {"dtype": "f32", "targets": {"logits": {"top_k": 8, "codec": "a"}}, "layers": [0], "step": None}
    assert [(d.key, d.stored, d.mine) for d in leaf_differences("capture", stored, mine)] == [
        ("layers", "[0, 1]", "[0]"),
        ("step", "absent", "null"),
        ("targets.logits.top_k", "16", "8"),
        ("targets.vision", "{}", "absent"),
    ]
    assert list(leaf_differences("x", {"a": 1}, {"a": 1.0})) == [Difference("x", "1", "1.0", "a")]
    fingerprint = replace(FINGERPRINT, capture="99", template="")
    found = manifest(capture=stored).differences(manifest(capture=mine, fingerprint=fingerprint))
    assert [str(difference) for difference in found] == [
        "template: 7a -> none",
        "capture: layers: [0, 1] -> [0]",
        "capture: step: absent -> null",
        "capture: targets.logits.top_k: 16 -> 8",
        "capture: targets.vision: {} -> absent",
    ]
    assert {difference.field for difference in found} == {"template", "capture"}


def test_the_contents_digest_does_not_know_provenance_or_order() -> None:
    digest = manifest().contents_digest()
    assert digest == manifest(provenance={"command": "other"}, arrays=ARRAYS[::-1]).contents_digest()
    assert digest != manifest(arrays=ARRAYS[1:]).contents_digest()
    assert digest != manifest(format_version=1).contents_digest()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"owner": "batch"},
            "arrays[0].owner: expected 'sample' or 'image', found 'batch'; correct this",
        ),
        (
            {"row_shape": [0]},
            "arrays[hidden].row_shape: expected positive integers, and null for the last one only, found (0,)",
        ),
        (
            {"row_shape": [None, 4], "axes": "R N D"},
            "arrays[hidden].row_shape: expected positive integers, and null for the last one only, found (None",
        ),
        (
            {"axes": "R"},
            "arrays[hidden].axes: expected 2 letters, for the rows and row_shape (4,), found 'R'",
        ),
        ({"row_shape": ["4"]}, "arrays[0].row_shape[0]: expected a valid integer, found '4'"),
        ({"row_shape": [True]}, "arrays[0].row_shape[0]: expected a valid integer, found True"),
        ({"row_shape": 4}, "arrays[0].row_shape: expected a valid tuple, found 4"),
        ({"options": {"step": [1]}}, "arrays[0].options.step: expected a valid number, found [1]"),
        ({"options": {"step": True}}, "arrays[0].options.step: expected a valid number, found True"),
        ({"codec": None}, "arrays[0].codec: expected a valid string, found None"),
        ({"name": 3}, "arrays[0].name: expected a valid string, found 3"),
    ],
)
def test_a_wrong_field_of_an_array_is_named(changes: dict[str, Any], expected: str) -> None:
    record = next(spec for spec in ARRAYS if spec.name == "hidden").to_json() | changes
    with pytest.raises(SchemaError) as caught:
        Manifest.from_json(manifest().to_json() | {"arrays": [record]})
    assert expected in str(caught.value)


def test_a_missing_field_is_named() -> None:
    record = manifest().to_json()
    teacher = record.pop("teacher")
    with pytest.raises(SchemaError, match=r"^teacher: expected a value, found nothing; correct this value"):
        Manifest.from_json(record)
    record |= {"teacher": teacher, "fingerprint": {"teacher": "7e"}}
    with pytest.raises(SchemaError, match=r"^fingerprint\.tokenizer: expected a value, found nothing"):
        Manifest.from_json(record)


@pytest.mark.parametrize("field", ["teacher", "capture", "provenance"])
def test_facts_are_not_nested_without_end(field: str) -> None:
    """Deeper than this, a walk over the manifest could overflow Python's stack: later, and out of sight."""
    nested = {"a": functools.reduce(lambda inner, _: [inner], range(30), [])}
    Manifest.from_json(manifest().to_json() | {field: nested})
    with pytest.raises(SchemaError, match=rf"^{field}: expected lists and objects nested at most 32 deep"):
        Manifest.from_json(manifest().to_json() | {field: {"b": nested}})


def test_an_array_of_an_unknown_owner_is_refused_before_it_is_written() -> None:
    owner: Any = "batch"
    with pytest.raises(
        SchemaError, match=r"^arrays\[hidden\]\.owner: expected 'sample' or 'image', found 'ba"
    ):
        ArraySpec("hidden", "R", (), owner, "float32", {})


def test_an_array_twice_is_refused() -> None:
    with pytest.raises(SchemaError, match="arrays: expected each name once"):
        manifest(arrays=ARRAYS[:1] * 2)


def test_a_store_of_another_format_is_told_as_such() -> None:
    expected = (
        r"manifest.json is of store format 3, this version reads formats 1 and 2; use the alignkd version"
    )
    with pytest.raises(UnsupportedFormat, match=expected):
        Manifest.from_json(manifest().to_json() | {"format_version": 3})
    for equal_to_1 in (True, 1.0):
        with pytest.raises(UnsupportedFormat, match=f"is of store format {equal_to_1}, "):
            check_format({"format_version": equal_to_1}, "part.json")


def test_an_entry_needs_a_span_for_every_image() -> None:
    with pytest.raises(
        SchemaError, match=r"entry 'k'.image_spans: expected one span for each of the 1 images"
    ):
        SampleEntry("k", ("aa",), (), Span("k.json", 0, 1))


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "a b", "zarr.json", "a\n", "é", "x" * 151, None]
)
def test_a_part_name_that_could_leave_the_store_is_refused(name: Any) -> None:
    with pytest.raises(UnsafeName, match="cannot name a part: use up to 150 letters, digits"):
        check_part_name(name)


@pytest.mark.parametrize("name", ["", "/etc", "a//b", "a/../b", "a/", "part.json", "a/zarr.json"])
def test_an_array_name_that_could_leave_its_part_is_refused(name: Any) -> None:
    with pytest.raises(UnsafeName, match="cannot name an array: use up to 150"):
        check_array_name(name)


def test_a_file_name_that_could_leave_its_part_is_refused() -> None:
    assert check_file_name("attention/layer_0/c/0/0/0") == "attention/layer_0/c/0/0/0"
    with pytest.raises(UnsafeName, match=r"'\.\./\.\./secret' cannot name a file"):
        check_file_name("../../secret")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON_VALUES)
def test_canonical_json_has_one_spelling(value: Any) -> None:
    assert canonical_json(json.loads(canonical_json(value))) == canonical_json(value)


def test_a_flipped_bit_in_any_byte_of_a_document_is_found(tmp_path: Path) -> None:
    file = tmp_path / "it.json"
    data = document_bytes({"a": [1, 2.5, "é"], "b": {"c": None}})
    file.write_bytes(data)
    assert read_document(file) == {"a": [1, 2.5, "é"], "b": {"c": None}}
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(flipped)
        with pytest.raises(CorruptFile, match=r"it\.json is damaged: .*; run `alignkd verify` on the store"):
            read_document(file)


def test_a_document_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    file = tmp_path / "it.json"
    for data, expected in [
        (None, r"it cannot be read \(No such file or directory\)"),
        (b"{", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b'{"a": NaN}', "it is not JSON"),
        (b"[1]\n", "its bytes are not the canonical JSON object"),
        (b'{"a": 1}\n', "its bytes are not the canonical JSON object"),
        (b'{"a":1}\n', "its checksum is [0-9a-f]{64}, but it says None"),
    ]:
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(CorruptFile, match=expected):
            read_document(file)
