"""Which runtimes are measured: each with its export, its files, and how its runner is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.export.executorch.folder import ExecutorchFolder, write_executorch
from pipeline.export.executorch.packages import hidden, is_installed
from pipeline.export.gguf.folder import export_gguf
from pipeline.export.gguf.geometry import check_vision
from pipeline.export.llama_cpp.defect import with_right_eyes
from pipeline.export.llama_cpp.process import Settings
from pipeline.export.source import Source
from pipeline.models.loading import load_network
from pipeline.models.mobilevlm.images import clip_processor, pixels_of
from pipeline.phone.runners import ExecutorchRunner, LlamaCppRunner, TorchRunner, weight_bytes

BASE = "PyTorch float32"
QUANTS = ("f16", "q8_0", "q4_k_m")


@dataclass(frozen=True)
class Contestant:
    """A runtime: `build(*arguments)` makes its runner, `bytes` is the size of the files that a phone would hold."""

    name: str
    bytes: int
    build: Callable[..., Any]
    arguments: tuple[Any, ...]
    eyes: str = "its own"


@dataclass(frozen=True)
class Bench:
    """What all contestants share: the checkpoint, where exports are kept, threads, positions, and ids that end."""

    source: Source
    folder: Path
    threads: int
    context: int
    stops: tuple[int, ...]
    say: Callable[[str], None]

    def contestants(self, quants: Sequence[str]) -> Iterator[Contestant]:
        """Yield PyTorch, GGUF at each quantisation, and ExecuTorch if it is installed, exporting what is missing."""
        yield self._torch("float32")
        programs = self._programs()
        other_eyes = self._other_eyes(programs)
        for quant in quants:
            yield self._gguf(quant, other_eyes)
        if programs is None:
            self.say("ExecuTorch is not installed, so it is left out; `pip install 'alignkd[executorch]'`")
        elif programs.has_decoder:
            size = sum(programs.mark["bytes"].values())
            yield Contestant("ExecuTorch", size, ExecutorchRunner, (programs, self.stops))

    def _torch(self, dtype: str) -> Contestant:
        folder = self.source.folder
        arguments = (str(folder), dtype, self.threads, self.stops)
        return Contestant(BASE, weight_bytes(folder), TorchRunner, arguments)

    def _programs(self) -> ExecutorchFolder | None:
        if not is_installed():
            return None
        return write_executorch(self.source, self.folder / "executorch", say=self.say)

    def _other_eyes(self, programs: ExecutorchFolder | None) -> tuple[str, str | ExecutorchFolder] | None:
        """Return the eyes of a geometry that llama.cpp does not take, by name: ExecuTorch's, else PyTorch's."""
        try:
            check_vision(self.source.config, self.source.folder)
        except ConfigError:
            return ("PyTorch's", str(self.source.folder)) if programs is None else ("ExecuTorch's", programs)
        return None

    def _gguf(self, quant: str, other_eyes: tuple[str, str | ExecutorchFolder] | None) -> Contestant:
        vision = None if other_eyes else "f16"
        written = export_gguf(self.source, self.folder / quant, quant=quant, vision=vision, say=self.say)
        settings = Settings(
            written.model, written.mmproj, context=self.context, threads=self.threads, exact=False
        )
        name, eyes = other_eyes or ("its own", None)
        if other_eyes is None:
            settings = self._with_right_eyes(settings)
        size = sum((written.path / file).stat().st_size for file in written.files)
        if isinstance(eyes, ExecutorchFolder):
            size += eyes.mark["bytes"]["eyes.pte"]
        return Contestant(f"llama.cpp {quant}", size, LlamaCppRunner, (settings, eyes), eyes=name)

    def _with_right_eyes(self, settings: Settings) -> Settings:
        """Return settings with the class token put first, if this build of llama.cpp needs it."""
        network = load_network(str(self.source.folder), dtype=torch.float32).eval()
        side = self.source.config.tower.image_size
        square = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        clip = clip_processor(self.source.folder, side)
        pixels = pixels_of(Image.fromarray(square), clip, pads=False)
        with hidden():
            settings, sentence = with_right_eyes(settings, network, square, pixels)
        self.say(sentence)
        return settings
