"""The values of a GGUF file, put back into the checkpoint's names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader

from pipeline.errors import PipelineError, reason_of
from pipeline.export.gguf.types import read_back
from pipeline.export.gguf.writing import Planned


def opened(file: Path) -> GGUFReader:
    """Return a reader of a file. Raises `PipelineError` if the file is damaged."""
    try:
        return GGUFReader(file)
    except Exception as error:  # gguf raises what it stumbles over
        raise PipelineError(
            f"{file} is damaged ({reason_of(error)}); export again with --overwrite"
        ) from error


def read_tensors(
    file: Path, plan: Sequence[Planned], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name in the checkpoint, float32 tensor) of a file: what its types left of the weights.

    Raises `PipelineError` for a file that is damaged, or that lacks a tensor of the plan.
    """
    found = {tensor.name: tensor for tensor in opened(file).tensors}
    for one in plan:
        if one.name not in found:
            raise PipelineError(f"{file} has no tensor {one.name!r}; export again with --overwrite")
        tensor = found[one.name]
        values = torch.from_numpy(np.array(read_back(tensor.data, tensor.tensor_type)))
        values = values.reshape(shapes[one.source])
        yield one.source, values if one.permuted_heads is None else _unpermuted(values, one.permuted_heads)


def _unpermuted(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return rows in the checkpoint's order; see `writing.permuted`."""
    half = tensor.shape[0] // num_heads // 2
    return tensor.reshape(num_heads, half, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
