"""The library of llama.cpp and its C declarations, from two packages that hold prebuilt ones."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, needing

# One package's library with the other's declarations: the structures of the C interface change from build to build,
# and a wrong one reads memory that is not its own. Only pairs that were tried together are loaded.
PAIRS = {"2026.10.11549": "0.11548"}
EXTRA = "llama-cpp"


def load_library() -> tuple[Any, Any, Path]:
    """Return cffi's `ffi`, the library and its file. Raises `ConfigError` if they are missing or do not fit."""
    with needing(EXTRA, by="running llama.cpp"):
        import xllamacpp
        from llama_cpp_py_sync._cffi_bindings import get_ffi
    found = tuple(importlib.metadata.version(name) for name in ("xllamacpp", "llama-cpp-py-sync"))
    if PAIRS.get(found[0]) != found[1]:
        known = " or ".join(f"xllamacpp=={one} llama-cpp-py-sync=={other}" for one, other in PAIRS.items())
        raise ConfigError(
            f"xllamacpp {found[0]} with the declarations of llama-cpp-py-sync {found[1]} was not tried; run "
            f"`pip install {known}`"
        )
    ffi = get_ffi()
    [file] = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    return ffi, ffi.dlopen(str(file)), file


def build_name() -> str:
    """Return the build of llama.cpp that the installed library is, such as b11549."""
    return f"b{importlib.metadata.version('xllamacpp').rsplit('.', 1)[-1]}"
