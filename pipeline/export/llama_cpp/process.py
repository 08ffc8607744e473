"""llama.cpp in a process of its own: it ends the whole process over what it asserts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.export.llama_cpp.library import load_library
from pipeline.export.llama_cpp.runtime import Answer, Floats, Runtime
from pipeline.export.served import Served


@dataclass(frozen=True)
class Settings:
    """What a process loads; see `Runtime`."""

    model: Path
    mmproj: Path | None = None
    context: int = 2048
    threads: int = 1
    exact: bool = True
    class_token_width: int | None = None


class LlamaCpp(Served):
    """A model in a process of its own. Raises `PipelineError` if a file is refused or the process ends."""

    def __init__(self, settings: Settings) -> None:
        load_library()  # raises here if it is not installed
        super().__init__(open_runtime, settings, what=f"{settings.model.parent}: llama.cpp")

    def answer(
        self,
        prompt: str | Sequence[int],
        *,
        image: NDArray[np.uint8] | None = None,
        embeddings: Floats | None = None,
        max_new_tokens: int = 0,
    ) -> Answer:
        """Answer one prompt, as `Runtime.answer` does."""
        return self.call("answer", prompt, image=image, embeddings=embeddings, max_new_tokens=max_new_tokens)


def open_runtime(settings: Settings) -> Runtime:
    """Return the runtime of these settings, in this process."""
    options: dict[str, Any] = dict(vars(settings))
    return Runtime(options.pop("model"), options.pop("mmproj"), **options)
