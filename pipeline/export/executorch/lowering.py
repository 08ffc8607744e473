"""PyTorch modules to a program of ExecuTorch, in float32, for the CPU library XNNPACK."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._sympy.symbol import SymT, symbol_is_type

from pipeline.errors import building, writing
from pipeline.export.executorch.packages import importing


@dataclass(frozen=True)
class Method:
    """A method of a program: a module, inputs to trace it with, and which of their axes have no fixed length."""

    module: nn.Module
    examples: tuple[Tensor, ...]
    dynamic: tuple[Any, ...] | None = None


def write_program(methods: Mapping[str, Method], file: Path, *, what: str, otherwise: str) -> None:
    """Write a `.pte` with these methods.

    Raises `ConfigError` with the exporter's reason if it does not take a module; `otherwise` is what to do then.
    """
    with importing(by="`alignkd export executorch`"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    refused = f"torch's exporter does not take {what}"
    with building(refused, then=otherwise), _shortened(), warnings.catch_warnings(action="ignore"):
        traced = {name: _traced(method) for name, method in methods.items()}
        lowered = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()])
        program = lowered.to_executorch()
    with writing(file), file.open("wb") as opened:
        program.write_to_file(opened)


@torch.no_grad()
def _traced(method: Method) -> torch.export.ExportedProgram:
    module = method.module.eval().requires_grad_(False)  # a cache that is written to has no gradient
    program = torch.export.export(module, method.examples, dynamic_shapes=method.dynamic, strict=False)
    # Lowering stops at these much later, and says nothing.
    if any(symbol_is_type(symbol, SymT.UNBACKED_INT) for symbol in program.range_constraints):
        raise RuntimeError("shapes inside it depend on the values of its inputs")
    return program


@contextmanager
def _shortened() -> Iterator[None]:
    """Keep the first line of what torch says: pages of advice on debugging it follow."""
    try:
        yield
    except RuntimeError as error:
        first, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(first) from error
