"""Whether the fields and the tensors of GGUF files are those that the export writes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from gguf import GGUFReader

from pipeline.errors import PipelineError
from pipeline.export.gguf.folder import GGUFFolder, layouts_of
from pipeline.export.gguf.reading import opened
from pipeline.export.source import Source

# What people call the model, and the licence that they name, may change from one run to the next.
NAMES = ("general.name", "general.license")
AGAIN = "export again with --overwrite"


def check_layout(folder: GGUFFolder, source: Source, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `PipelineError` naming a field or a tensor of a file that is not as the export writes it.

    A wrong end-of-answer token or chat template changes no logits, so that running the file does not show it.
    `tensors` are the checkpoint's, of any values.
    """
    with tempfile.TemporaryDirectory() as place:
        for name, layout in layouts_of(source, folder.quant, folder.vision).items():
            file, expected = folder.path / name, Path(place) / name
            layout.write_without_values(expected, tensors)
            if other := _first_difference(_parts(opened(file)), _parts(opened(expected))):
                raise PipelineError(f"{file} is not what the export writes: {other}; {AGAIN}")


def _parts(reader: GGUFReader) -> dict[str, bytes]:
    """Return what stands in a file before its values, by name."""
    fields = {
        f"field {name!r}": b"".join(part.tobytes() for part in field.parts)
        for name, field in reader.fields.items()
        if name not in NAMES and not name.startswith("GGUF.")
    }
    tensors = {
        f"tensor {one.name!r}": b"".join(part.tobytes() for part in one.field.parts) for one in reader.tensors
    }
    length = len(reader.data) - reader.data_offset
    return fields | tensors | {"the length of the values": str(length).encode()}


def _first_difference(found: dict[str, bytes], expected: dict[str, bytes]) -> str | None:
    """Return the first name that one of both lacks, or whose content differs."""
    for name in expected:
        if found.get(name) != expected[name]:
            return f"{name} differs" if name in found else f"{name} is missing"
    return next((f"{name} is one too many" for name in found if name not in expected), None)
