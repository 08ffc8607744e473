"""The folder of an export: its files, what they were made of, and whether they are still as they were written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.export.gguf.geometry import check_is_mobilevlm, check_language_model, check_vision
from pipeline.export.gguf.language_model import language_model_layout, language_model_plan
from pipeline.export.gguf.reading import read_tensors
from pipeline.export.gguf.vision import vision_layout, vision_plan
from pipeline.export.gguf.writing import Layout
from pipeline.export.mark import check_files, start_writing, write_mark, written_before
from pipeline.export.source import Source
from pipeline.models.loading import load_network

MODEL, MMPROJ, CARD = "model.gguf", "mmproj.gguf", "README.md"
LAYOUT = 1  # of these files: what an export of another number holds is written again


@dataclass(frozen=True)
class GGUFFolder:
    """What `export gguf` wrote: `vision` is the type of the tower's matrices, None without a tower."""

    path: Path
    source_digest: str
    quant: str
    vision: str | None
    files: dict[str, str]  # name -> blake3
    config: Any

    @property
    def model(self) -> Path:
        return self.path / MODEL

    @property
    def mmproj(self) -> Path | None:
        return self.path / MMPROJ if self.vision else None

    def check_files(self) -> None:
        """Raise `PipelineError` naming a file that is missing or not as it was written."""
        check_files(self.path, self.files)

    def tensors(self, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name in the checkpoint, float32 tensor) of everything in the files."""
        yield from read_tensors(self.model, language_model_plan(self.config, self.quant), shapes)
        if self.mmproj and self.vision:
            yield from read_tensors(self.mmproj, vision_plan(self.config, self.vision), shapes)


def export_gguf(
    source: Source,
    path: Path,
    *,
    quant: str,
    vision: str | None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> GGUFFolder:
    """Write `model.gguf` and, unless `vision` is None, `mmproj.gguf`; files of the same export are left as they are.

    Raises `ConfigError` for a model that llama.cpp does not take, before a weight is opened, and `PipelineError` if
    the folder holds another export, or files of one that were changed, unless `overwrite`. Neither touches what lies
    in the folder.
    """
    config = check_is_mobilevlm(source.config, source.folder)
    check_language_model(config, source.folder)
    if vision:
        check_vision(config, source.folder)
    source.check_is_not(path)
    asked = {"layout": LAYOUT, "source_digest": source.digest, "other_digest": source.other_digest}
    asked |= {"quant": quant, "vision": vision}
    names = (MODEL, MMPROJ, CARD)
    found = written_before(path, asked, names, overwrite=overwrite)
    if found:
        say(f"{path}: written before from the same checkpoint; nothing was done")
    else:
        layouts = layouts_of(source, quant, vision)
        state = load_network(str(source.folder), dtype="auto").state_dict()
        start_writing(path, names)
        for name, layout in layouts.items():
            say(f"{path / name}: writing, {quant if name == MODEL else vision}")
            layout.write(path / name, state)
        found = write_mark(path, asked, list(layouts))
    return GGUFFolder(path, source.digest, quant, vision, dict(found["files"]), config)


def layouts_of(source: Source, quant: str, vision: str | None) -> dict[str, Layout]:
    """Return what each file of an export holds, by its name."""
    layouts = {MODEL: language_model_layout(source, quant)}
    return layouts | ({MMPROJ: vision_layout(source, vision)} if vision else {})
