"""The programs in ExecuTorch's own runtime: vision tokens of a picture, and greedy answers."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import PipelineError, reason_of
from pipeline.export.executorch.inputs import embedded
from pipeline.export.executorch.packages import importing


class Program:
    """A `.pte`. Raises `PipelineError` for a file that the runtime does not load, or an input that it refuses."""

    def __init__(self, file: Path) -> None:
        with importing(by="running a .pte file"):
            from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        self.file = file
        try:
            self.program = Runtime.get().load_program(file)
            self.methods: dict[str, Any] = {n: self.program.load_method(n) for n in self.program.method_names}
        except RuntimeError as error:
            raise PipelineError(
                f"{file}: ExecuTorch does not load it ({reason_of(error)}); the file is damaged or of another "
                "release, so export again with --overwrite"
            ) from error

    def run(self, method: str, *inputs: Tensor) -> Tensor:
        """Return the first output of a method."""
        try:
            return self.methods[method].execute([one.contiguous() for one in inputs])[0].clone()
        except RuntimeError as error:
            given = ", ".join(str(tuple(one.shape)) for one in inputs)
            taken = ", ".join(str(tuple(shape)) for shape in self.shapes(method))
            raise PipelineError(
                f"{self.file}: {method} does not take inputs {given} ({reason_of(error)}); it takes {taken} or less"
            ) from error

    def shapes(self, method: str) -> list[tuple[int, ...]]:
        """Return the largest shape of each input."""
        meta = self.methods[method].metadata
        return [tuple(meta.input_tensor_meta(n).sizes()) for n in range(meta.num_inputs())]


class Vision(Program):
    """The vision tower and the projector."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the vision tokens 'N D' of a picture's `pixel_values`."""
        return self.run("forward", pixels)


@dataclass(frozen=True)
class Answer:
    """A greedy answer, the logits 'V' behind the prompt, and the seconds of the prompt and of the later tokens."""

    ids: list[int]
    logits: Tensor
    prompt_seconds: float = 0.0
    answer_seconds: float = 0.0


class Decoder(Program):
    """The language model; `context` is how many positions its cache has."""

    def __init__(self, file: Path, *, context: int) -> None:
        super().__init__(file)
        self.context = context
        [self.chunk, *_] = self.shapes("forward")[0]

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings 'S D' of ids 'S'."""
        return torch.cat([self.run("embed", part) for part in ids.split(self.chunk)])

    def logits(self, embeddings: Tensor, *, position: int = 0) -> Tensor:
        """Read embeddings 'S D' from a position on and return the logits 'V' behind the last."""
        if position + len(embeddings) > self.context:
            raise PipelineError(
                f"{self.file}: {position + len(embeddings)} positions were asked for, its cache has {self.context}; "
                "shorten the prompt or the answer"
            )
        for start in range(0, len(embeddings), self.chunk):
            part = embeddings[start : start + self.chunk]
            logits = self.run("forward", part, torch.tensor([position + start]))
        return logits  # pyright: ignore[reportPossiblyUnboundVariable]

    def answer(
        self, ids: Tensor, is_vision: Tensor, vision: Tensor, *, max_new_tokens: int, stops: Collection[int]
    ) -> Answer:
        """Answer a prompt of ids 'S' greedily; vision tokens 'N D' stand where `is_vision`."""
        start = time.perf_counter()
        embeddings = self.embed(ids.masked_fill(is_vision, 0))
        if is_vision.any():
            embeddings = embedded(embeddings, is_vision, vision)
        first = logits = self.logits(embeddings)
        read = time.perf_counter()
        made: list[int] = []
        while len(made) < max_new_tokens:
            made.append(int(logits.argmax()))
            if made[-1] in stops or len(made) == max_new_tokens:
                break
            logits = self.logits(self.embed(torch.tensor(made[-1:])), position=len(ids) + len(made) - 1)
        return Answer(made, first, read - start, time.perf_counter() - read)
