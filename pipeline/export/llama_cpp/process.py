"""llama.cpp in a process of its own: what it asserts ends that process, and here becomes one sentence."""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError, reason_of
from pipeline.export.llama_cpp.library import load_library
from pipeline.export.llama_cpp.runtime import Answer, Floats, Runtime

LAST_CHARACTERS = 400


@dataclass(frozen=True)
class Settings:
    """What a process loads; see `Runtime`."""

    model: Path
    mmproj: Path | None = None
    context: int = 2048
    threads: int = 1
    exact: bool = True
    class_token_width: int | None = None


class LlamaCpp(AbstractContextManager["LlamaCpp"]):
    """A model in a process of its own. Raises `PipelineError` if a file is refused or the process ends."""

    def __init__(self, settings: Settings) -> None:
        load_library()  # raises here if it is not installed
        self.settings = settings
        self.words = tempfile.NamedTemporaryFile(prefix="llama-cpp-", suffix=".log")  # noqa: SIM115
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs, settings, self.words.name), daemon=True)
        self.process.start()
        theirs.close()
        self._received()

    def answer(
        self,
        prompt: str,
        *,
        image: NDArray[np.uint8] | None = None,
        embeddings: Floats | None = None,
        max_new_tokens: int = 0,
    ) -> Answer:
        """Answer one prompt, as `Runtime.answer` does."""
        self.connection.send((prompt, image, embeddings, max_new_tokens))
        return self._received()

    def peak_bytes(self) -> int:
        """Return the largest memory that the process has had."""
        self.connection.send(None)
        return self._received()

    def __exit__(self, *_: Any) -> None:
        self.connection.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()
        self.words.close()

    def _received(self) -> Any:
        try:
            result = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self.process.join()
            words = " ".join(Path(self.words.name).read_text(errors="replace").split())[-LAST_CHARACTERS:]
            raise PipelineError(
                f"{self.settings.model.parent}: llama.cpp ended with code {self.process.exitcode}; its last words: "
                f"{words or 'none'}"
            ) from error
        if isinstance(result, str):
            raise PipelineError(result)
        return result


def _serve(connection: Connection, settings: Settings, words: str) -> None:
    """Load the model and answer until the other end closes. A string is the sentence of a failure."""
    os.environ["GGML_NO_BACKTRACE"] = "1"
    os.dup2(os.open(words, os.O_WRONLY), 2)
    try:
        runtime = Runtime(
            settings.model,
            settings.mmproj,
            context=settings.context,
            threads=settings.threads,
            exact=settings.exact,
            class_token_width=settings.class_token_width,
        )
        connection.send(True)
        while True:
            asked = connection.recv()
            connection.send(_peak_bytes() if asked is None else _answered(runtime, *asked))
    except EOFError:
        return
    except Exception as error:
        connection.send(reason_of(error))


def _answered(runtime: Runtime, prompt: str, image: Any, embeddings: Any, max_new_tokens: int) -> Answer:
    return runtime.answer(prompt, image=image, embeddings=embeddings, max_new_tokens=max_new_tokens)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
