"""One model in each runtime: a picture to vision tokens, a prompt of ids to a greedy answer, and how long both took.

A runner lives in a process of its own, so that its memory is its own (`export/served.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.export.executorch.folder import ExecutorchFolder
from pipeline.export.llama_cpp.process import Settings, open_runtime
from pipeline.export.llama_cpp.runtime import Runtime
from pipeline.models.loading import load_network
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID

Floats = NDArray[np.float32]
ABSENT = -1  # in a prompt of ids, the place of a vision token


@dataclass(frozen=True)
class Asked:
    """A prompt: ids 'S' with -200 for each vision token, and its picture, if any, as both kinds of eyes take it.

    `pixels` float32 'C Y X' is the tower's input, `square` uint8 'Y X C' the picture before it is resized.
    """

    ids: tuple[int, ...]
    pixels: Floats | None = None
    square: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Timed:
    """A greedy answer, and the seconds of its parts: vision tokens, prompt, and the tokens behind the first."""

    answer_ids: tuple[int, ...]
    image: float
    prompt: float
    answer: float

    @property
    def first_token(self) -> float:
        """Seconds from the picture to the first token."""
        return self.image + self.prompt

    @property
    def tokens_a_second(self) -> float:
        return (len(self.answer_ids) - 1) / self.answer if self.answer else float("nan")


class Eyes(Protocol):
    """A picture to vision tokens 'N D'."""

    def __call__(self, asked: Asked) -> Floats: ...


class TorchEyes:
    """Tower and projector of a checkpoint in PyTorch, float32."""

    def __init__(self, network: Any) -> None:
        self.network = network

    @torch.no_grad()
    def __call__(self, asked: Asked) -> Floats:
        pixels = torch.from_numpy(asked.pixels)[None].to(next(self.network.parameters()).dtype)
        return self.network.get_image_features(pixels).pooler_output[0].float().numpy()


class ExecutorchEyes:
    """`eyes.pte` in ExecuTorch's runtime."""

    def __init__(self, folder: ExecutorchFolder) -> None:
        self.vision = folder.vision()

    def __call__(self, asked: Asked) -> Floats:
        assert asked.pixels is not None
        return self.vision(torch.from_numpy(asked.pixels)[None]).numpy()


class OwnEyes:
    """The eyes of a GGUF file in llama.cpp."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(self, asked: Asked) -> Floats:
        assert asked.square is not None
        return self.runtime.image_embeddings(asked.square)


class Runner:
    """Times a runtime: subclasses say what its eyes are, and how it answers a prompt with given vision tokens."""

    eyes: Eyes

    def run(self, asked: Asked, *, max_new_tokens: int, ignore_end: bool) -> Timed:
        """Answer greedily. With `ignore_end` the answer has `max_new_tokens`, whatever they are."""
        start = time.perf_counter()
        vision = self.eyes(asked) if asked.pixels is not None else None
        image = time.perf_counter() - start if vision is not None else 0.0
        ids, prompt, answer = self._answer(asked.ids, vision, max_new_tokens, ignore_end)
        return Timed(tuple(ids), image, prompt, answer)

    def _answer(
        self, ids: Sequence[int], vision: Floats | None, max_new_tokens: int, ignore_end: bool
    ) -> tuple[list[int], float, float]:
        """Return the answer's ids, and the seconds of the prompt and of the answer's later tokens."""
        raise NotImplementedError


class TorchRunner(Runner):
    """A checkpoint in PyTorch on the CPU, one question at a time, with a growing cache of keys and values."""

    def __init__(self, folder: str, dtype: str, threads: int, stops: Sequence[int]) -> None:
        torch.set_num_threads(threads)
        self.network = load_network(folder, dtype=getattr(torch, dtype)).eval()
        self.eyes, self.stops = TorchEyes(self.network), set(stops)

    @torch.no_grad()
    def _answer(self, ids, vision, max_new_tokens, ignore_end):
        start = time.perf_counter()
        features = None if vision is None else torch.from_numpy(vision)[None]
        embeds = self.network.embed(torch.tensor([list(ids)]), features)
        outputs = self.network(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
        made = [int(outputs.logits[0, -1].argmax())]
        first = time.perf_counter()
        while len(made) < max_new_tokens and (ignore_end or made[-1] not in self.stops):
            step = self.network.embed(torch.tensor([made[-1:]]), None)
            past = outputs.past_key_values
            outputs = self.network(inputs_embeds=step, past_key_values=past, use_cache=True, logits_to_keep=1)
            made.append(int(outputs.logits[0, -1].argmax()))
        return made, first - start, time.perf_counter() - first


class LlamaCppRunner(Runner):
    """A GGUF file in llama.cpp, with its own eyes, or with others for a geometry that it does not take."""

    def __init__(self, settings: Settings, other_eyes: str | ExecutorchFolder | None) -> None:
        torch.set_num_threads(settings.threads)
        self.runtime = open_runtime(settings)
        if other_eyes is None:
            self.eyes = OwnEyes(self.runtime)
        elif isinstance(other_eyes, str):
            self.eyes = TorchEyes(load_network(other_eyes, dtype=torch.float32).eval())
        else:
            self.eyes = ExecutorchEyes(other_eyes)

    def _answer(self, ids, vision, max_new_tokens, ignore_end):
        prompt = [ABSENT if number == IMAGE_TOKEN_ID else number for number in ids]
        made = self.runtime.answer(
            prompt, embeddings=vision, max_new_tokens=max_new_tokens, all_logits=False, ignore_end=ignore_end
        )
        return made.answer_ids, made.seconds.prompt, made.seconds.answer


class ExecutorchRunner(Runner):
    """`eyes.pte` and `decoder.pte` in ExecuTorch's runtime."""

    def __init__(self, folder: ExecutorchFolder, stops: Sequence[int]) -> None:
        self.eyes, self.decoder, self.stops = ExecutorchEyes(folder), folder.decoder(), list(stops)

    def _answer(self, ids, vision, max_new_tokens, ignore_end):
        numbers = torch.tensor(list(ids))
        is_vision = numbers == IMAGE_TOKEN_ID
        tokens = torch.empty(0, 0) if vision is None else torch.from_numpy(vision)
        answer = self.decoder.answer(
            numbers, is_vision, tokens, max_new_tokens=max_new_tokens, stops=[] if ignore_end else self.stops
        )
        return answer.ids, answer.prompt_seconds, answer.answer_seconds


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a checkpoint's weights."""
    patterns = ("*.safetensors", "pytorch_model*.bin")
    return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))
