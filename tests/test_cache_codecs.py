"""Codecs keep what they state, for every row of CODECS, and refuse what they cannot keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cache import ArrayMismatch, ArraySpec, RefusedValue, SchemaError
from cache.format.codecs import (
    CODECS,
    check_specs,
    decode_rows,
    encode_rows,
    first_fill,
    holds_fill,
    stored_arrays,
)

FLOATS = st.floats(-(2.0**120), 2.0**120, width=32)
CASES: list[tuple[str, dict[str, Any], Any, st.SearchStrategy[Any]]] = [
    ("float32", {}, np.float32, FLOATS),
    ("float16", {}, np.float32, st.floats(-65504, 65504, width=32)),
    ("bfloat16", {}, np.float32, FLOATS),
    ("bfloat16", {}, np.float32, st.floats(-(2.0**-125), 2.0**-125, width=32)),
    ("bfloat16", {}, np.float16, st.floats(-65504, 65504, width=16)),
    ("integer", {"dtype": "uint16"}, np.int64, st.integers(0, 65535)),
    ("integer", {"dtype": "int32"}, np.int64, st.integers(-(2**31), 2**31 - 1)),
    ("fixed_point", {"step": 2.0**-7}, np.float32, st.floats(-32767 / 128, 32767 / 128, width=32)),
    ("fixed_point", {"step": 2.0**-12}, np.float32, st.floats(0, 1, width=32)),
    ("fixed_point", {"step": 4}, np.float32, st.floats(-131068, 131068, width=32)),
    ("sqrt_uint8", {}, np.float32, st.floats(0, 1, width=32)),
    ("sqrt_uint8", {}, np.float32, st.floats(0, 65504, width=32)),
    ("int8", {}, np.float32, st.floats(-65504, 65504, width=32)),
    ("int8", {}, np.float32, st.floats(-1, 1, width=32)),
]


def spec_of(codec: str, options: dict[str, Any], *, row_shape: tuple[int, ...] = (2, 3)) -> ArraySpec:
    axes = " ".join("RHNK"[: 1 + len(row_shape)])
    return ArraySpec("it", axes, row_shape, "sample", codec, options)


def refusal(error: type[Exception], spec: ArraySpec, rows: Any) -> str:
    with pytest.raises(error) as caught:
        encode_rows(spec, np.asarray(rows))
    return str(caught.value)


@pytest.mark.parametrize(("codec", "options", "dtype", "values"), CASES)
def test_what_comes_back_is_within_the_stated_error(
    codec: str, options: Any, dtype: Any, values: Any
) -> None:
    spec = spec_of(codec, options)

    @settings(max_examples=60)
    @given(arrays.arrays(dtype, st.tuples(st.integers(0, 4), st.just(2), st.just(3)), elements=values))
    def holds(rows: Any) -> None:
        codes = encode_rows(spec, rows)
        for stored in stored_arrays(spec):
            assert codes[stored.suffix].dtype == stored.dtype
            assert codes[stored.suffix].shape == (len(rows), *stored.row_shape)
        decoded = decode_rows(spec, codes)
        assert decoded.shape == rows.shape
        error = np.abs(decoded.astype(np.float64) - rows.astype(np.float64))
        assert (error <= CODECS[codec].max_error(rows, options)).all()

    holds()


def test_every_codec_has_a_case_and_states_its_error() -> None:
    assert {case[0] for case in CASES} == set(CODECS)
    for codec, options, _, _ in CASES:
        assert CODECS[codec].stated_error(options)


def test_codes_by_hand() -> None:
    fixed = spec_of("fixed_point", {"step": 0.5}, row_shape=(3,))
    assert encode_rows(fixed, np.float32([[1.2, -0.25, 3.0]]))[""].tolist() == [[2, 0, 6]]
    root = spec_of("sqrt_uint8", {}, row_shape=(3,))
    codes = encode_rows(root, np.float32([[0.25, 1.0, 0.0]]))
    assert codes[""].tolist() == [[128, 255, 0]] and codes["scale"].tolist() == [1.0]
    scaled = encode_rows(spec_of("int8", {}, row_shape=(3,)), np.float32([[-2.0, 1.0, 0.0]]))
    assert scaled[""].tolist() == [[-127, 64, 0]] and scaled["scale"].tolist() == [2.0]


def test_codes_of_bfloat16_are_those_of_torch() -> None:
    spec = spec_of("bfloat16", {}, row_shape=(512,))
    bits = np.random.default_rng(0).integers(0, 2**32, 2**18, dtype=np.uint32)
    halves = np.arange(2**16, dtype=np.uint32) << 16 | 0x8000  # as near to one code as to the next
    values = np.concatenate([bits, halves]).view(np.float32)
    values = np.where(np.abs(values) < 3.38e38, values, 1).astype(np.float32).reshape(-1, 512)  # NaN too
    theirs = torch.from_numpy(values).bfloat16()
    codes = encode_rows(spec, values)
    assert np.array_equal(codes[""], theirs.view(torch.uint16).numpy())
    decoded = decode_rows(spec, codes)
    assert np.array_equal(decoded.view(np.uint32), theirs.float().numpy().view(np.uint32))
    again = encode_rows(spec, decoded)  # values of bfloat16 are kept bit for bit
    assert np.array_equal(again[""], codes[""])


def test_the_fill_value_of_bfloat16_is_a_nan_that_is_never_written() -> None:
    [stored] = stored_arrays(spec_of("bfloat16", {}))
    assert stored.dtype == "uint16" and stored.fill_is_reserved
    assert torch.tensor(stored.fill_value, dtype=torch.uint16).view(torch.bfloat16).isnan()
    codes = encode_rows(spec_of("bfloat16", {}), np.ones((2, 2, 3), np.float32))[""]
    assert not holds_fill(stored, codes)
    codes[1, 1, 0] = stored.fill_value
    assert holds_fill(stored, codes) and first_fill(stored, codes) == 1


@given(st.floats(0, 65504, width=32))
def test_the_scale_is_never_below_the_largest_value(value: float) -> None:
    scale = encode_rows(spec_of("sqrt_uint8", {}, row_shape=(1,)), np.float32([[value]]))["scale"]
    assert float(scale[0]) >= value


def test_float16_rows_are_taken_as_they_are() -> None:
    rows = np.float16([[0.1, 2.0]])
    spec = spec_of("float32", {}, row_shape=(2,))
    assert (decode_rows(spec, encode_rows(spec, rows)) == rows.astype(np.float32)).all()


def test_a_fixed_step_loses_small_probabilities_that_a_root_keeps() -> None:
    """Why sqrt_uint8 is the default for attention, although a fixed step is smaller: KL asks for small ones."""
    rows = np.float32([[0.5, 1.2e-4, 1.3e-4, 4e-6]])
    fixed = spec_of("fixed_point", {"step": 2.0**-12}, row_shape=(4,))
    root = spec_of("sqrt_uint8", {}, row_shape=(4,))
    kept, by_root = (decode_rows(spec, encode_rows(spec, rows))[0] for spec in (fixed, root))
    assert kept.tolist() == [0.5, 0, 2.0**-12, 0] and (by_root > 0).all()


@pytest.mark.parametrize("codec", ["float32", "float16", "bfloat16", "fixed_point", "sqrt_uint8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_by_name(codec: str, value: float) -> None:
    options = {"step": 1.0} if codec == "fixed_point" else {}
    text = refusal(RefusedValue, spec_of(codec, options, row_shape=(2,)), np.float32([[1, value]]))
    assert text == "Array 'it': 1 of 2 values are not finite; reject the sample"


@pytest.mark.parametrize(
    ("codec", "options", "rows", "expected"),
    [
        ("float16", {}, np.float32([[1e6]]), "value 1e+06 is beyond 65504; use a wider codec than float16"),
        (
            "fixed_point",
            {"step": 0.5},
            np.float32([[-17000]]),
            "value 17000 is beyond 16383.5; use a larger step",
        ),
        ("fixed_point", {"step": 2.0**-90}, np.float32([[3e38]]), "is beyond 2.64"),
        ("bfloat16", {}, np.float32([[-3.4e38]]), "value 3.4e+38 is beyond 3.38953e+38; use float32"),
        ("sqrt_uint8", {}, np.float32([[-0.5]]), "value -0.5 is negative; sqrt_uint8 keeps values >= 0 only"),
        (
            "sqrt_uint8",
            {},
            np.float32([[70000]]),
            "value 70000 is beyond 65504; use float32 or scale it down",
        ),
        ("integer", {"dtype": "uint16"}, np.array([[65536]]), "values 65536..65536 do not fit uint16"),
        (
            "integer",
            {"dtype": "uint16"},
            np.array([[-1]]),
            "values -1..-1 do not fit uint16; use a wider dtype",
        ),
    ],
)
def test_a_value_out_of_range_is_refused_not_clipped(
    codec: str, options: Any, rows: Any, expected: str
) -> None:
    text = refusal(RefusedValue, spec_of(codec, options, row_shape=(1,)), rows)
    assert text.startswith("Array 'it': ") and expected in text


def test_rows_of_a_wrong_shape_or_kind_are_refused() -> None:
    spec = spec_of("float32", {}, row_shape=(2,))
    text = refusal(ArrayMismatch, spec, np.zeros((3, 4), np.float32))
    assert "expected shape (rows, (2,)), found shape (3, 4); hand over what its spec says" in text
    assert "expected float16 or float32 values, found float64" in refusal(
        ArrayMismatch, spec, np.zeros((1, 2))
    )
    integer = spec_of("integer", {"dtype": "int32"}, row_shape=())
    assert "expected integers, found float32" in refusal(ArrayMismatch, integer, np.zeros(2, np.float32))


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        (
            [spec_of("zip", {})],
            "arrays[it].codec: expected one of float32, float16, bfloat16, integer, fixed_point",
        ),
        (
            [spec_of("float32", {"step": 1})],
            "arrays[it].options: expected no options for codec float32, found",
        ),
        ([spec_of("integer", {})], "arrays[it].options: expected dtype for codec integer, found {}"),
        (
            [spec_of("integer", {"dtype": "int4"})],
            "arrays[it].options.dtype: expected one of int8, uint8, int16",
        ),
        ([spec_of("fixed_point", {"step": 0.01})], "arrays[it].options.step: expected a power of two"),
        ([spec_of("fixed_point", {"step": "1"})], "arrays[it].options.step: expected a power of two"),
        ([spec_of("sqrt_uint8", {}, row_shape=())], "arrays[it].row_shape: expected at least one axis"),
    ],
)
def test_a_spec_that_its_codec_cannot_keep_is_refused(specs: list[ArraySpec], expected: str) -> None:
    with pytest.raises(SchemaError) as caught:
        check_specs(specs)
    assert expected in str(caught.value)


@pytest.mark.parametrize("other", ["it_scale", "it/inner"])
def test_arrays_that_share_a_path_are_refused(other: str) -> None:
    inner = ArraySpec(other, "R K", (3,), "sample", "float32", {})
    with pytest.raises(SchemaError, match="expected names that share no path, found"):
        check_specs([spec_of("sqrt_uint8", {}), inner])
