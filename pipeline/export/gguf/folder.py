"""The folder of an export: its files, what they were made of, and whether they are still as they were written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from pipeline.config.provenance import read_mark, replace_text
from pipeline.errors import ConfigError, PipelineError, writing
from pipeline.export.gguf.geometry import check_is_mobilevlm, check_language_model, check_vision
from pipeline.export.gguf.language_model import language_model_plan, write_language_model
from pipeline.export.gguf.reading import read_tensors
from pipeline.export.gguf.vision import vision_plan, write_vision
from pipeline.export.source import Source
from pipeline.models.loading import load_network

MARK = "export.json"
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
        for name, digest in self.files.items():
            file = self.path / name
            if not file.is_file():
                raise PipelineError(f"{file} is missing; export again with --overwrite")
            if digest_of_file(file) != digest:
                raise PipelineError(
                    f"{file} is not as it was written: its blake3 is not the one in {MARK}; export again with "
                    "--overwrite"
                )

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
    the folder holds another export, or files of one that were changed, unless `overwrite`.
    """
    config = check_is_mobilevlm(source.config, source.folder)
    check_language_model(config, source.folder)
    if vision:
        check_vision(config, source.folder)
    asked = {"layout": LAYOUT, "source_digest": source.digest, "quant": quant, "vision": vision}
    found = _found(path, asked, config, overwrite=overwrite)
    if found:
        say(f"{path}: written before from the same weights; nothing was done")
        return found
    names = [MODEL, MMPROJ] if vision else [MODEL]
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        for name in (MARK, CARD, MODEL, MMPROJ):
            (path / name).unlink(missing_ok=True)
    state = load_network(str(source.folder), dtype="auto").state_dict()
    say(f"{path / MODEL}: writing, {quant}")
    write_language_model(source, state, path / MODEL, quant=quant)
    if vision:
        say(f"{path / MMPROJ}: writing, {vision}")
        write_vision(source, state, path / MMPROJ, quant=vision)
    files = {name: digest_of_file(path / name) for name in names}
    folder = GGUFFolder(path, source.digest, quant, vision, files, config)
    mark = asked | {"files": files, "bytes": {name: (path / name).stat().st_size for name in names}}
    replace_text(path / MARK, json.dumps(mark, indent=1) + "\n")
    return folder


def _found(path: Path, asked: dict[str, Any], config: Any, *, overwrite: bool) -> GGUFFolder | None:
    """Return the export that lies there, if it is the one that is asked for."""
    if overwrite or not any((path / name).exists() for name in (MARK, MODEL, MMPROJ)):
        return None
    mark = read_mark(path / MARK)
    other = [name for name, value in asked.items() if mark.get(name) != value]
    if other:
        lies = ", ".join(f"{name} {mark.get(name)}" for name in other) if mark else f"files without {MARK}"
        raise ConfigError(
            f"{path} holds another export ({lies}); name another folder, or --overwrite to replace it"
        )
    folder = GGUFFolder(
        path, asked["source_digest"], asked["quant"], asked["vision"], dict(mark["files"]), config
    )
    folder.check_files()
    return folder


def digest_of_file(file: Path) -> str:
    """Return the blake3 of a file's bytes."""
    return blake3().update_mmap(file).hexdigest()
