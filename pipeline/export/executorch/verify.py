"""The programs in ExecuTorch's runtime, compared with PyTorch: vision tokens, logits, greedy answers, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from pipeline.data.decoding import decode_image
from pipeline.export.executorch.folder import ExecutorchFolder, stops_of
from pipeline.export.executorch.inputs import Inputs, Prompt
from pipeline.export.executorch.runtime import Answer
from pipeline.export.executorch.vision import VisionModule
from pipeline.export.pictures import picture_files
from pipeline.export.source import Source
from pipeline.export.torch_model import relative_error
from pipeline.models.loading import load_network
from pipeline.text_table import text_table

# Relative errors, rms over rms. Both sides compute in float32, whose sums differ by order alone: 1e-6 of a few
# layers, 2e-5 of CLIP's 23. XNNPACK's tanh in GELU gives 2e-4. A wrong weight, axis or picture gives 1e-2 or more.
LIMIT = 1e-3


@dataclass(frozen=True)
class Found:
    """What one picture showed; without a decoder no logits and no answer."""

    vision_error: float
    milliseconds: float
    torch_milliseconds: float
    logits_error: float | None = None
    answer_equal: bool | None = None


@dataclass(frozen=True)
class Verification:
    """The results of all pictures."""

    found: list[Found]

    @property
    def rows(self) -> list[tuple[str, str, str, bool]]:
        """What was compared, what was found, what is asked, and whether it passes."""
        count = len(self.found)
        rows = [_error_row("vision tokens", [one.vision_error for one in self.found])]
        logits = [one.logits_error for one in self.found if one.logits_error is not None]
        if logits:
            equal = sum(bool(one.answer_equal) for one in self.found)
            rows.append(_error_row("logits", logits))
            rows.append(("greedy answers", f"{equal} of {count} equal", "all", equal == count))
        return rows

    @property
    def passed(self) -> bool:
        return all(passed for *_, passed in self.rows)

    @property
    def milliseconds(self) -> tuple[float, float]:
        """The median time of a picture in ExecuTorch and in PyTorch."""
        middle = len(self.found) // 2
        ours, theirs = (
            sorted(f.milliseconds for f in self.found),
            sorted(f.torch_milliseconds for f in self.found),
        )
        return ours[middle], theirs[middle]

    def __str__(self) -> str:
        table = [["ExecuTorch beside PyTorch, float32", "found", "limit", ""]]
        table += [[*row, "ok" if passed else "DIFFERS"] for *row, passed in self.rows]
        ours, theirs = self.milliseconds
        speed = (
            f"a picture takes {ours:.1f} ms here, {theirs:.1f} ms in PyTorch (medians of {len(self.found)})"
        )
        return "\n".join([text_table(table, justify="left"), "", speed])


def _error_row(name: str, errors: list[float]) -> tuple[str, str, str, bool]:
    worst = float(np.max(errors))  # `max` passes over what is no number
    return name, f"{worst:.2e} off", f"{LIMIT:g}", worst <= LIMIT


class TorchSide:
    """The checkpoint itself in PyTorch, which reads ids and pixels as its processor makes them."""

    def __init__(self, source: Source, *, max_new_tokens: int) -> None:
        self.network = load_network(str(source.folder), dtype=torch.float32).eval()
        self.stops = stops_of(self.network)
        self.greedy = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=self.stops or None, pad_token_id=0
        )

    @torch.no_grad()
    def vision(self, prompt: Prompt) -> Tensor:
        """Return 'N D'."""
        return VisionModule(self.network, prompt.rest)(prompt.pixels)

    @torch.no_grad()
    def answer(self, prompt: Prompt) -> Answer:
        """Answer greedily."""
        inputs = {"input_ids": prompt.ids[None], "attention_mask": torch.ones_like(prompt.ids)[None]}
        inputs |= {"pixel_values": prompt.pixels} | VisionModule(self.network, prompt.rest).rest
        logits = self.network(**inputs).logits[0, -1]
        made = self.network.generate(**inputs, generation_config=self.greedy)
        return Answer(made[0, len(prompt.ids) :].tolist(), logits)


def verify_executorch(
    folder: ExecutorchFolder,
    source: Source,
    images: Path,
    *,
    question: str,
    max_new_tokens: int,
    say: Callable[[str], None] = print,
) -> Verification:
    """Compare what was written with PyTorch on every picture of a folder, at least 20."""
    folder.check_files()
    files = picture_files(images)
    torch_side = TorchSide(source, max_new_tokens=max_new_tokens)
    say(f"{len(files)} images through ExecuTorch and PyTorch")
    vision = folder.vision()
    decoder = folder.decoder() if folder.has_decoder else None
    found = []
    for prompt in _prompts(Inputs(source), files, question):
        tokens, milliseconds = _timed(vision, prompt.pixels)
        expected, torch_milliseconds = _timed(torch_side.vision, prompt)
        one = Found(relative_error(tokens, expected), milliseconds, torch_milliseconds)
        if decoder:
            wanted = torch_side.answer(prompt)
            answer = decoder.answer(
                prompt.ids, prompt.is_vision, tokens, max_new_tokens=max_new_tokens, stops=torch_side.stops
            )
            one = Found(
                one.vision_error,
                milliseconds,
                torch_milliseconds,
                relative_error(answer.logits, wanted.logits),
                answer.ids == wanted.ids,
            )
        found.append(one)
    return Verification(found)


def _prompts(inputs: Inputs, files: list[Path], question: str) -> Iterator[Prompt]:
    for file in files:
        yield inputs.prompt(question, decode_image(file.read_bytes()))


def _timed(run: Callable[[Any], Tensor], given: Any) -> tuple[Tensor, float]:
    start = time.perf_counter()
    result = run(given)
    return result, 1000 * (time.perf_counter() - start)
