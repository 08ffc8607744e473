"""A GGUF file, written tensor by tensor, so that never more than one is held in its new type."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quant_shape_to_byte_shape

from pipeline.errors import writing
from pipeline.export.gguf.types import FLOATS, fitting, stored


@dataclass(frozen=True)
class Planned:
    """A tensor to write: its name in the file, its name in the checkpoint, the type that is wanted for it."""

    name: str
    source: str
    type: GGMLQuantizationType
    permuted_heads: int | None = None

    def taken(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the tensor of a checkpoint as the file holds it, in the checkpoint's dtype."""
        tensor = tensors[self.source]
        return tensor if self.permuted_heads is None else permuted(tensor, self.permuted_heads)

    def type_of(self, tensor: torch.Tensor) -> GGMLQuantizationType:
        """Return the type in which it is stored: blocks must divide its rows."""
        return fitting(self.type, tensor.shape[-1]) if tensor.ndim else self.type


def permuted(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return the rows of q or k 'D D' in llama.cpp's order: its rotary embedding pairs neighbours, ours halves."""
    half = tensor.shape[0] // num_heads // 2
    return tensor.reshape(num_heads, 2, half, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


@dataclass(frozen=True)
class Layout:
    """What a GGUF file holds: its architecture, the fields that `describe` adds, and its tensors."""

    architecture: str
    describe: Callable[[GGUFWriter], None]
    plan: Sequence[Planned]

    def write(self, file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the file, whole or not at all."""
        unfinished = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            with writing(file):
                writer = self._started(unfinished, tensors)
                for one in self.plan:
                    tensor = one.taken(tensors)
                    writer.write_tensor_data(stored(tensor, one.type_of(tensor), name=one.source))
                writer.close()
                unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)

    def write_without_values(self, file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a file of the same fields, tensors and size, which holds zeros and takes no room on the disk."""
        writer = self._started(file, tensors)
        [infos] = writer.tensors
        size = sum(writer.ggml_pad(info.nbytes, writer.data_alignment) for info in infos.values())
        writer.close()
        start = writer.ggml_pad(file.stat().st_size, writer.data_alignment)
        os.truncate(file, start + size)

    def _started(self, file: Path, tensors: Mapping[str, torch.Tensor]) -> GGUFWriter:
        """Return a writer that wrote everything but the values."""
        writer = GGUFWriter(str(file), self.architecture)
        self.describe(writer)
        for one in self.plan:
            tensor = one.taken(tensors)
            type_ = one.type_of(tensor)
            shape = tuple(tensor.shape)
            if type_ not in FLOATS:
                shape = quant_shape_to_byte_shape(shape, type_)
            dtype = np.dtype(FLOATS.get(type_, np.uint8))
            num_bytes = int(np.prod(shape)) * dtype.itemsize
            writer.add_tensor_info(one.name, shape, dtype, num_bytes, raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return writer
