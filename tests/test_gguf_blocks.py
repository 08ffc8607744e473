"""The blocks of a quantised tensor beside those of the function with which llama.cpp itself quantises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from pipeline.export.gguf.types import stored
from pipeline.export.llama_cpp.library import load_library

TYPE = GGMLQuantizationType
ROWS, WIDTH = 7, 512


def rows_of(kind: str) -> torch.Tensor:
    """Return rows of numbers of a kind on which a quantiser may go astray."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, WIDTH, generator=generator)
    if kind == "an outlier among zeros":
        rows[:] = 0
        rows[2, 5] = 900
    if kind == "heavy tails":
        rows /= torch.randn(ROWS, WIDTH, generator=generator)
    scale = {"large": 1e6, "small": 1e-7, "denormal": 1e-40, "zeros": 0.0}
    return {"equal": torch.full_like(rows, 0.3), "whole": rows.round()}.get(kind, rows * scale.get(kind, 1.0))


@pytest.mark.parametrize(
    "kind",
    [
        "normal",
        "zeros",
        "equal",
        "whole",
        "large",
        "small",
        "denormal",
        "heavy tails",
        "an outlier among zeros",
    ],
)
@pytest.mark.parametrize("type_", [TYPE.Q4_K, TYPE.Q6_K, TYPE.Q8_0, TYPE.Q5_0])
def test_blocks_are_llama_cpps_own_bit_for_bit(type_, kind):
    rows = rows_of(kind)
    ours = stored(rows, type_, name="x")
    ffi, _, file = load_library()
    ffi = type(ffi)()
    ffi.cdef(
        "size_t ggml_quantize_chunk(int, const float *, void *, int64_t, int64_t, int64_t, const float *);"
    )
    theirs = np.zeros(ours.size, np.uint8)
    source = ffi.from_buffer("float[]", np.ascontiguousarray(rows.numpy()))
    target = ffi.from_buffer(theirs)
    library = ffi.dlopen(str(file))
    size = library.ggml_quantize_chunk(int(type_), source, target, 0, ROWS, WIDTH, ffi.NULL)
    assert size == ours.size
    assert theirs.tobytes() == ours.tobytes()
