"""PyTorch's side of a comparison: a prompt about a picture, its logits and its greedy answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from pipeline.export.source import Source
from pipeline.models.loading import load_network
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID
from pipeline.models.mobilevlm.processor import SYSTEM, MobileVLMProcessor

Floats = NDArray[np.float32]
SMALLEST_SIZE = 1e-4  # of a tensor, rms: 16-bit floats are this fine by a thousandth
IN_FILES = -1  # how a runtime marks the positions of an image


def prompt_about(question: str) -> str:
    """Return the text of the original's dialogue `v1`, up to the answer, with `<image>` in it."""
    return f"{SYSTEM} USER: <image>\n{question} ASSISTANT:"


def relative_error(found: Floats | torch.Tensor, expected: Floats | torch.Tensor) -> float:
    """Return the rms of the difference over the rms of what is expected."""
    ours, theirs = np.asarray(found), np.asarray(expected)
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))


def _weight_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error of a tensor; values far below those that 16 bits resolve count for nothing."""
    difference, size = (found - expected).square().mean().sqrt(), expected.square().mean().sqrt()
    return float(difference / size.clamp(min=SMALLEST_SIZE))


@dataclass(frozen=True)
class Answered:
    """The likeliest token behind each position of a prompt, and the greedy answer."""

    next_tokens: NDArray[np.int64]
    answer_ids: list[int]


class TorchModel:
    """A MobileVLM V2 in float32, asked one question about pictures."""

    def __init__(self, source: Source, question: str, *, max_new_tokens: int) -> None:
        self.network = load_network(str(source.folder), dtype=torch.float32).eval()
        processor = MobileVLMProcessor.from_pretrained(source.folder)
        self.prompt = prompt_about(question)
        self._ids = processor.ids_of(self.prompt)
        self.prompt_ids = [IN_FILES if number == IMAGE_TOKEN_ID else number for number in self._ids]
        self.context = len(self._ids) + max_new_tokens + 8
        self._greedy = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=processor.tokenizer.eos_token_id,
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.network.state_dict().items()}

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
        """Replace weights, one by one; return their relative errors beside those before."""
        state, errors = self.network.state_dict(), {}
        for name, tensor in tensors:
            errors[name] = _weight_error(tensor, state[name])
            state[name].copy_(tensor)
        return errors

    @torch.no_grad()
    def embeddings(self, pixels: torch.Tensor) -> Floats:
        """Return 'N D' of an image 'C Y X'."""
        return self.network.get_image_features(pixels[None]).pooler_output[0].numpy()

    @torch.no_grad()
    def answer(self, pixels: torch.Tensor) -> Answered:
        """Answer the question about an image greedily."""
        ids = torch.tensor([self._ids])
        made = self.network.generate(input_ids=ids, pixel_values=pixels[None], generation_config=self._greedy)
        logits = self.network(input_ids=ids, pixel_values=pixels[None]).logits[0].numpy()
        return Answered(logits.argmax(-1), made[0, len(self._ids) :].tolist())

    @torch.no_grad()
    def judged(self, answer_ids: list[int], embeddings: Floats) -> tuple[Floats, list[float]]:
        """Return the logits 'S V' of the prompt, and of an answer that something else gave, its tokens' regrets.

        A regret is by how much a token's logit lies below the best. `embeddings` 'N D' are the image's.
        """
        ids = torch.tensor([[*self._ids, *answer_ids[:-1]]])
        embeds = self.network.embed(ids, torch.from_numpy(embeddings)[None])
        logits = self.network(inputs_embeds=embeds).logits[0].numpy()
        rows = logits[len(self._ids) - 1 :]
        regrets = [float(row.max() - row[number]) for row, number in zip(rows, answer_ids, strict=True)]
        return logits[: len(self._ids)], regrets
