"""The class token of a CLIP tower, put where it belongs, through llama.cpp's public callback.

Since May 2025 llama.cpp appends the class token to the patches (issue #25814): every patch gets its neighbour's
position, the first patch is lost, and the class token is read as a patch. The callback sees the node that joins
patches and class token before anything is computed from it, and moves the last row to the front.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from cffi import FFI

from pipeline.errors import PipelineError

JOINING = b"CONCAT"  # the only such node in the tower's graph
FUNCTIONS = """
const char *ggml_op_desc(const void *node);
size_t ggml_nbytes(const void *node);
void ggml_backend_tensor_get(const void *node, void *data, size_t offset, size_t size);
void ggml_backend_tensor_set(void *node, const void *data, size_t offset, size_t size);
"""


class ClassTokenFirst:
    """A callback that moves the last row of the tower's first input to the front; `width` is that of a row, W."""

    def __init__(self, ffi: Any, library: Path, width: int) -> None:
        self.width, self.times, self.outer = width, 0, ffi
        self.ffi = FFI()
        self.ffi.cdef(FUNCTIONS)
        self.ggml: Any = self.ffi.dlopen(str(library))
        self._function = ffi.callback("bool(void *, bool, void *)", self._seen)
        self.callback = ffi.cast("ggml_backend_sched_eval_callback", self._function)

    def _seen(self, node: Any, asks: bool, _: Any) -> bool:
        """Return whether the node is wanted, where llama.cpp asks; else look at it, and let it go on."""
        tensor = self.ffi.cast("void *", int(self.outer.cast("uintptr_t", node)))
        is_joining = self.ffi.string(self.ggml.ggml_op_desc(tensor)) == JOINING
        if is_joining and not asks:
            self._move(tensor)
        return is_joining or not asks

    def _move(self, tensor: Any) -> None:
        data = bytearray(self.ggml.ggml_nbytes(tensor))
        self.ggml.ggml_backend_tensor_get(tensor, self.ffi.from_buffer(data), 0, len(data))
        rows = np.frombuffer(data, np.float32).reshape(-1, self.width)
        moved = np.roll(rows, 1, axis=0).tobytes()
        self.ggml.ggml_backend_tensor_set(tensor, self.ffi.from_buffer(moved), 0, len(moved))
        self.times += 1

    def check_it_was_moved(self) -> None:
        """Raise `PipelineError` unless exactly one node was met since the last call: else the graph is another."""
        times, self.times = self.times, 0
        if times != 1:
            raise PipelineError(
                f"the tower's graph joins rows {times} times, expected once; this build of llama.cpp has another "
                "graph: verify with the build that `alignkd[llama-cpp]` installs"
            )
